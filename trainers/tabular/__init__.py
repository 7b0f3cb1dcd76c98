"""Rows of a table as text: tables, their serialisation, discriminators of synthetic rows, and what synthetic rows are worth.

It needs scikit-learn: ``pip install 'dppo-kernels[tabular]'``.
"""

try:
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError("dppo_kernels.trainers.tabular needs scikit-learn: pip install 'dppo-kernels[tabular]'") from error

from dppo_kernels.trainers.tabular.discriminators import Discriminators, Scores
from dppo_kernels.trainers.tabular.evaluation import Evaluation, Evaluator, evaluate
from dppo_kernels.trainers.tabular.negatives import CORRUPTIONS, Negatives, corruptions_for
from dppo_kernels.trainers.tabular.schema import Number, Schema
from dppo_kernels.trainers.tabular.table import Split, Table, load_table, split_table
from dppo_kernels.trainers.tabular.text import (
    Clause,
    Fault,
    Parsed,
    draw_prompts,
    parse,
    prompt_for,
    serialise,
    serialise_rows,
    to_frame,
    validity,
)
from dppo_kernels.trainers.tabular.tokens import TextEncoder, build_table_tokenizer, completion_budget, vocabulary
from dppo_kernels.trainers.tabular.training import TrainingOptions, discriminator_bce

__all__ = [
    "CORRUPTIONS",
    "Clause",
    "Discriminators",
    "Evaluation",
    "Evaluator",
    "Fault",
    "Negatives",
    "Number",
    "Parsed",
    "Schema",
    "Scores",
    "Split",
    "Table",
    "TextEncoder",
    "TrainingOptions",
    "build_table_tokenizer",
    "completion_budget",
    "corruptions_for",
    "discriminator_bce",
    "draw_prompts",
    "evaluate",
    "load_table",
    "parse",
    "prompt_for",
    "serialise",
    "serialise_rows",
    "split_table",
    "to_frame",
    "validity",
    "vocabulary",
]
