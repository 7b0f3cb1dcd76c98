"""What both methods of a seed share: rows, tokens, a warm start, completions at temperature 1, and their KL from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from dppo_kernels import token_logprobs
from dppo_kernels.trainers.compare.config import CompareConfig
from dppo_kernels.trainers.demo.warmup import build_model, warm_up
from dppo_kernels.trainers.pairs_generation import Sampling, TransformersSampler, derived_seed
from dppo_kernels.trainers.tabular import (
    Schema,
    Split,
    Table,
    build_table_tokenizer,
    completion_budget,
    draw_prompts,
    load_table,
    serialise_rows,
    split_table,
)

WARMUP_TEXTS = 4096  # at least, in which each row comes in several orders of its columns
WARMUP: dict[str, Any] = {"batch": 16, "learning_rate": 5e-3}  # by which so small a model writes whole rows within a minute
SCORED_AT_ONCE = 64

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Completions at temperature 1 of prompts drawn like those of training.

    ids: of each completion, its end token included. texts: prompt and completion; starts: where the completion begins.
    """

    prompts: list[str]
    ids: list[list[int]]
    texts: list[str]

    @property
    def starts(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class Task:
    """One seed's table, split and tokens; `budget` is of completions, `positions` of prompt and completion."""

    schema: Schema
    split: Split
    tokenizer: PreTrainedTokenizerBase
    budget: int
    positions: int
    width: int
    seed: int
    examples: list[tuple[str, str]]

    @classmethod
    def build(cls, config: CompareConfig, seed: int) -> "Task":
        table, split = read_split(config, seed)
        tokenizer = build_table_tokenizer(table.schema)
        rng = np.random.default_rng(seed)
        orders = -(-WARMUP_TEXTS // len(split.train))
        examples = [pair for _ in range(orders) for pair in serialise_rows(table.schema, split.train, rng)]
        budget = completion_budget([completion for _, completion in examples], tokenizer)
        longest = max(map(len, tokenizer(sorted({prompt for prompt, _ in examples}))["input_ids"]))
        return cls(table.schema, split, tokenizer, budget, longest + budget, config.width, seed, examples)

    def model(self, weights: Weights | None = None) -> Qwen3ForCausalLM:
        """A model of its own, in eval mode; untrained without `weights`."""
        model = build_model(self.tokenizer, self.seed, self.width, self.positions)
        if weights is not None:
            model.load_state_dict(weights)
        return model.eval()

    def warm_start(self, steps: int, on_step: Callable[[int, float], None]) -> Weights:
        """Supervised on the serialised training rows."""
        model = self.model()
        warm_up(model, self.tokenizer, self.examples, seed=self.seed, steps=steps, on_step=on_step, **WARMUP)
        return copy_of(model)

    def prompts(self, count: int, *place: int) -> list[str]:
        """Drawn from the classes of the training rows, by this seed and numbers that say what for."""
        return draw_prompts(self.schema, self.split.train, count, np.random.default_rng([self.seed, *place]))

    def sample(self, weights: Weights, count: int, seed: int) -> Samples:
        """The same prompts for the same `seed`, whoever completes them."""
        prompts, derived = self.prompts(count, seed), derived_seed(self.seed, seed)
        sampling = Sampling((1.0,), 1, 1.0, 0, 1.0, self.budget, (self.tokenizer.eos_token_id,), derived)
        ids = [found[0] for found in TransformersSampler(self.model(weights))(self._tokens(prompts), 0, sampling)]
        completions = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Samples(prompts, ids, [prompt + text for prompt, text in zip(prompts, completions, strict=True)])

    def kl(self, samples: Samples, weights: Weights, reference: Weights) -> np.ndarray:
        """log policy - log reference of each completion, in nats [N]: its mean over the policy's samples estimates the KL."""
        policy, other = self.model(weights), self.model(reference)
        prompts = self._tokens(samples.prompts)
        return _score(policy, prompts, samples.ids) - _score(other, prompts, samples.ids)

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(prompts))["input_ids"]


def read_split(config: CompareConfig, seed: int) -> tuple[Table, Split]:
    """Raises ValueError where the table is not what the options say."""
    table = load_table(config.data, target=config.target)
    return table, split_table(table, seed)


def copy_of(model: Any) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def _score(model: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> np.ndarray:
    """Log-probs of whole completions, [N]."""
    found = []
    for first in range(0, len(prompts), SCORED_AT_ONCE):
        pairs = list(zip(prompts[first : first + SCORED_AT_ONCE], completions[first : first + SCORED_AT_ONCE], strict=True))
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        attended, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(pairs):
            length = len(prompt) + len(completion)
            ids[row, :length] = torch.tensor([*prompt, *completion])
            attended[row, :length] = 1
            counted[row, len(prompt) : length] = True
        logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
        labels = ids.masked_fill(~counted, -100)[:, 1:]
        scored = cast(Tensor, token_logprobs(logits, labels).logprobs)  # which is asked for by default
        found.append(scored.double().sum(1).numpy())
    return np.concatenate(found)
