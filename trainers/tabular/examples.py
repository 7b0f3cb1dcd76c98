"""Real and synthetic texts, and what each level is told about them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dppo_kernels.trainers.tabular.encoders import Encoded
from dppo_kernels.trainers.tabular.negatives import CORRUPTIONS, corruptions_for
from dppo_kernels.trainers.tabular.schema import Schema
from dppo_kernels.trainers.tabular.text import serialise
from dppo_kernels.trainers.tabular.training import Examples


@dataclass(frozen=True)
class Batch:
    """Texts and the truth about them. C columns in the order of the schema."""

    texts: list[str]
    generated: Tensor  # bool [N]
    replaced: Tensor  # bool [N, C], of corrupted rows
    keeps_marginal: Tensor  # bool [N], where what was replaced is by itself as good as real

    @classmethod
    def join(cls, batches: Sequence["Batch"]) -> "Batch":
        return cls(
            texts=[text for batch in batches for text in batch.texts],
            generated=torch.cat([batch.generated for batch in batches]),
            replaced=torch.cat([batch.replaced for batch in batches]),
            keeps_marginal=torch.cat([batch.keeps_marginal for batch in batches]),
        )


@dataclass(frozen=True)
class Pool:
    """What one part of the data has: real rows, texts of the current generator and of older ones."""

    real: pd.DataFrame
    current: Sequence[str] = ()
    older: Sequence[str] = ()


def draw_batch(schema: Schema, pool: Pool, count: int, rng: np.random.Generator, *, target_first: bool) -> Batch:
    """`count` real texts and as many synthetic ones: corrupted rows, and up to a half generated, old and new in equal parts."""
    real = pool.real.iloc[_sample(len(pool.real), count, rng)]
    new = [pool.current[i] for i in _sample(len(pool.current), count // 4 if pool.older else count // 2, rng)]
    old = [pool.older[i] for i in _sample(len(pool.older), count // 4, rng)]
    kinds = corruptions_for(schema)
    corrupted = len(real) - len(new) - len(old)
    frames, replaced, marginal = [real], [np.zeros((len(real), len(schema.columns)), dtype=bool)], [False] * len(real)
    for i, kind in enumerate(kinds):
        # Of more rows than are used: a column permuted among few would hardly change.
        negatives = CORRUPTIONS[kind].corrupt(schema, pool.real, rng)
        picked = _sample(len(negatives.frame), (corrupted + i) // len(kinds), rng)
        frames.append(negatives.frame.iloc[picked])
        replaced.append(negatives.replaced[picked])
        marginal += [CORRUPTIONS[kind].keeps_marginal] * len(picked)
    rows = [row for frame in frames for row in frame.to_dict("records")]
    texts = [serialise(schema, row, rng, target_first=target_first) for row in rows]
    generated = [*new, *old]
    nothing = torch.zeros(len(generated), len(schema.columns), dtype=torch.bool)
    return Batch(
        texts=[*texts, *generated],
        generated=torch.arange(len(texts) + len(generated)) >= len(texts),
        replaced=torch.cat([torch.from_numpy(np.concatenate(replaced)), nothing]),
        keeps_marginal=torch.tensor([*marginal, *[False] * len(generated)]),
    )


def _sample(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(size)[:count]


def token_inputs(encoded: Encoded) -> dict[str, Tensor]:
    return {name: getattr(encoded, name) for name in ("ids", "lengths", "token_columns", "values")}


def token_examples(encoded: Encoded, batch: Batch) -> Examples:
    """A token is synthetic in a generated text and in a replaced value. Judged are those of values: the others never change."""
    columns = encoded.token_columns
    replaced = torch.cat([batch.replaced, torch.zeros(len(columns), 1, dtype=torch.bool)], 1).gather(1, columns)
    real = ~batch.generated[:, None] & ~(replaced & encoded.in_value)
    return Examples(token_inputs(encoded), real.float(), encoded.is_token, encoded.in_value)


def sentence_examples(encoded: Encoded, batch: Batch) -> Examples:
    """A clause is synthetic in a generated text or if it was replaced; what was drawn from real marginals is left out."""
    real = ~batch.generated[:, None] & ~batch.replaced
    counted = encoded.present & ~(batch.replaced & batch.keeps_marginal[:, None])
    return Examples({"values": encoded.alone}, real.float(), counted, counted)


def row_examples(encoded: Encoded, batch: Batch) -> Examples:
    """A row is synthetic if it was generated or any value replaced; texts that are no row are left to the gate."""
    real = ~batch.generated & ~batch.replaced.any(1)
    return Examples({"values": encoded.values}, real.float(), encoded.valid, encoded.valid)


def group_examples(encoded: Encoded, batch: Batch, columns: Sequence[int]) -> Examples:
    """As a row, of the group's columns alone; a replaced value from the marginal shows only beside others."""
    chosen = list(columns)
    replaced = batch.replaced[:, chosen].any(1)
    real = ~batch.generated & ~replaced
    counted = encoded.present[:, chosen].all(1)
    if len(chosen) == 1:
        counted &= ~(replaced & batch.keeps_marginal)
    return Examples({"values": encoded.alone[:, chosen]}, real.float(), counted, counted)
