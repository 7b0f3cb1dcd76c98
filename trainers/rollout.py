"""Recording the rollout policy while transformers generates: sampled and top-K log-probs, step by step.

One [B, V] tensor of logits is alive at a time and is reduced to K + 1 columns before the next step. Log-probs are those of
``logits / temperature`` over the full vocabulary, which is the distribution the tokens were drawn from as long as nothing else
(top-p, penalties) reshapes it; `check_sampling` refuses what does.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dppo_kernels import TopKLogprobs, token_logprobs, topk_logprobs

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases

# Generation settings that reshape the distribution tokens are drawn from, and the values at which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_return_sequences": (None, 1),
    "return_dict_in_generate": (None, False),
    "num_beams": (None, 1),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
}


def check_sampling(settings: Mapping[str, Any], temperature: float) -> None:
    """Refuse generation settings under which the sampler is not ``softmax(logits / temperature)``.

    Raises:
        ValueError: naming the setting, its value and the neutral one.
    """
    for name, neutral in _NEUTRAL.items():
        if name in settings and settings[name] not in neutral:
            raise ValueError(
                f"`{name}`={settings[name]!r} reshapes the sampling distribution, but ratios and divergences compare "
                f"full-vocabulary log-probs: every ratio would be biased even on unchanged weights. Set it to {neutral[-1]!r}."
            )
    if settings.get("temperature", temperature) not in (None, temperature):
        raise ValueError(
            f"generation runs at temperature {settings['temperature']}, training at {temperature}: set `temperature` only"
        )


# Engines round: a log-prob may end up this much above 0.
MAX_LOGPROB = 1e-3


class CapturedLogprob(float):
    """A sampled token's log-prob that remembers its row in the store of top-K columns.

    TRL slices, concatenates and interleaves the lists of log-probs (tool turns, truncation); carrying the row number in the
    list keeps columns and tokens aligned through all of it. Tokens the policy did not write are plain floats.
    """

    row: int

    def __new__(cls, value: float, row: int) -> "CapturedLogprob":
        captured = super().__new__(cls, value)
        captured.row = row
        return captured


class RolloutStore:
    """Top-K columns of all tokens of one call of `generate and score`, one row per token; row 0 stands for "not captured"."""

    def __init__(self, k: int) -> None:
        self.k = k
        nothing = torch.full((1, k + 1), -1), torch.zeros(1, k + 1), torch.zeros(1, k + 1, dtype=torch.bool)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = [nothing]  # ids, logprobs, valid, each [rows, K+1]
        self._rows = 1

    def add(self, ids: Tensor, logprobs: Tensor, valid: Tensor) -> int:
        """Append rows; returns the number of the first."""
        first, self._rows = self._rows, self._rows + ids.shape[0]
        self._parts.append((ids, logprobs, valid))
        return first

    def columns(self, logprobs: Sequence[Sequence[float]], width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, logprobs, valid [B, width, K+1] for per-token lists of log-probs; id -1 and valid False where not captured."""
        rows = torch.zeros(len(logprobs), width, dtype=torch.long)
        for b, sequence in enumerate(logprobs):
            rows[b, : len(sequence)] = torch.tensor([getattr(value, "row", 0) for value in sequence], dtype=torch.long)
        rows = rows.to(device)
        ids, values, valid = (torch.cat([x.to(device) for x in parts])[rows] for parts in zip(*self._parts, strict=True))
        return ids, values, valid


class _StepCapture:
    """Sees the logits of each step as a logits processor, and the token drawn from them as a stopping criterion."""

    def __init__(self, k: int, temperature: float) -> None:
        self.k, self.temperature = k, temperature
        self.logits: Tensor | None = None
        self.sampled: list[Tensor] = []  # [B] per step
        self.topk: list[TopKLogprobs] = []

    def record(self, sampled_ids: Tensor) -> None:
        if self.logits is None:
            raise RuntimeError("generate() drew a token without calling its logits processors")
        if self.k:
            top = topk_logprobs(self.logits, sampled_ids, self.k, temperature=self.temperature)
            self.topk.append(top)
            self.sampled.append(top.sampled_logprobs)
        else:
            logprobs = token_logprobs(self.logits, sampled_ids, temperature=self.temperature).logprobs
            self.sampled.append(logprobs)  # type: ignore[arg-type]
        self.logits = None


class _SeeLogits(LogitsProcessor):
    def __init__(self, capture: _StepCapture) -> None:
        self.capture = capture

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.capture.logits = scores
        return scores


class _SeeSample(StoppingCriteria):
    def __init__(self, capture: _StepCapture) -> None:
        self.capture = capture

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.capture.record(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _captured_generate(model: Any, capture: _StepCapture) -> Iterator[None]:
    """Shadow ``model.generate`` with one that lets `capture` look on."""
    shadowed = vars(model).get("generate")  # somebody's own instance attribute, if any
    model.generate = functools.partial(
        model.generate,
        logits_processor=LogitsProcessorList([_SeeLogits(capture)]),
        stopping_criteria=StoppingCriteriaList([_SeeSample(capture)]),
    )
    try:
        yield
    finally:
        del model.generate
        if shadowed is not None:
            model.generate = shadowed


class RolloutCaptureMixin(Host):
    """Put before GRPOTrainer in the bases: rollouts come back with the sampler's log-probs.

    Adds to the dict of `_generate_and_score_completions`: ``sampling_per_token_logps`` [B, T] and, where `rollout_topk` > 0,
    ``rollout_topk_ids``, ``rollout_topk_logprobs``, ``rollout_topk_valid`` [B, T, K+1]. Memory beyond generation is O(B T K).
    A `rollout_func` replaces the capture: it must return the log-probs itself.
    """

    rollout_topk: int = 0  # K; 0 = the sampled token's log-prob only

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[CapturedLogprob]]]:
        capture = _StepCapture(self.rollout_topk, self.temperature)
        with _captured_generate(self.accelerator.unwrap_model(self.model_wrapped), capture):
            completion_ids, _ = super()._generate_single_turn(*args, **kwargs)
        sampled = torch.stack(capture.sampled, 1)  # [B, steps]
        steps, first = sampled.shape[1], 0
        if self.rollout_topk:
            columns = (torch.stack([getattr(top, name) for top in capture.topk], 1) for name in ("ids", "logprobs", "valid"))
            first = self._rollout_store.add(*(column.flatten(0, 1) for column in columns))
        logprobs = [
            [CapturedLogprob(value, first + b * steps + t) for t, value in enumerate(row[: len(ids)])]
            for b, (ids, row) in enumerate(zip(completion_ids, sampled.tolist(), strict=True))
        ]
        return completion_ids, logprobs

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        self._rollout_store = RolloutStore(self.rollout_topk)
        generated = super()._generate(prompts)
        _, completion_ids, written_by_policy, _, logprobs, extra_fields, *_ = generated
        if self.rollout_func is not None:
            check_custom_logprobs(completion_ids, logprobs, written_by_policy)
            if self.rollout_topk:
                vocab = self.model.get_output_embeddings().weight.shape[0]
                logprobs = store_custom_rollout(
                    self._rollout_store, completion_ids, logprobs, written_by_policy, extra_fields, vocab
                )
        self._rollout_logprobs = logprobs
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.rollout_topk:
            completion_ids = output["completion_ids"]
            columns = self._rollout_store.columns(self._rollout_logprobs, completion_ids.shape[1], completion_ids.device)
            names = ("rollout_topk_ids", "rollout_topk_logprobs", "rollout_topk_valid")
            output.update(zip(names, columns, strict=True))
        del self._rollout_store, self._rollout_logprobs
        return output


def check_custom_logprobs(
    completion_ids: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float | None]] | None,
    written_by_policy: Sequence[Sequence[int]] | None,
) -> None:
    """A `rollout_func` must give the finite log-prob of every token that the policy wrote.

    Raises:
        ValueError: none were returned, or one is None, NaN, infinite or positive (with its place).
    """
    if logprobs is None:
        raise ValueError("`rollout_func` returned no log-probs; the trust region is measured against them")
    for b, (ids, row) in enumerate(zip(completion_ids, logprobs, strict=True)):
        if len(row) != len(ids):
            raise ValueError(f"`rollout_func` returned {len(ids)} tokens and {len(row)} log-probs for completion {b}")
        for t, value in enumerate(row):
            if written_by_policy is not None and not written_by_policy[b][t]:
                continue
            if value is None or not -math.inf < value <= MAX_LOGPROB:
                raise ValueError(
                    f"`rollout_func` returned log-prob {value} for token {t} of completion {b}; it must be finite and at most 0"
                )


def store_custom_rollout(
    store: RolloutStore,
    completion_ids: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float | None]],
    written_by_policy: Sequence[Sequence[int]] | None,
    extra_fields: dict[str, Any],
    vocab: int,
) -> list[list[float]]:
    """Take ``topk_token_ids`` and ``topk_logprobs`` of a `rollout_func` into the store, the sampled token injected.

    Both are lists [B][T][<= K+1], by completion token. They are removed from `extra_fields`, which go to reward functions.

    Raises:
        ValueError: a field is missing or does not match the completions.
    """
    missing = [name for name in ("topk_token_ids", "topk_logprobs") if name not in extra_fields]
    if missing:
        raise ValueError(
            f"top-K divergences need `{'` and `'.join(missing)}` from `rollout_func`, one list per completion token"
        )
    topk_ids, topk_logprobs_ = extra_fields.pop("topk_token_ids"), extra_fields.pop("topk_logprobs")
    captured: list[list[float]] = []
    for b, (ids, sampled) in enumerate(zip(completion_ids, logprobs, strict=True)):
        if not len(topk_ids[b]) == len(topk_logprobs_[b]) == len(ids):
            raise ValueError(
                f"`rollout_func` returned {len(ids)} tokens, {len(topk_ids[b])} rows of `topk_token_ids` and "
                f"{len(topk_logprobs_[b])} rows of `topk_logprobs` for completion {b}"
            )
        id_rows = torch.full((len(ids), store.k + 1), -1)
        value_rows = torch.zeros(len(ids), store.k + 1)
        for t, token in enumerate(ids):
            if written_by_policy is not None and not written_by_policy[b][t]:
                continue
            row = dict(zip(topk_ids[b][t], topk_logprobs_[b][t], strict=True))  # by id: engines repeat the sampled token
            row.setdefault(token, sampled[t])
            if not all(0 <= i < vocab for i in row):
                raise ValueError(f"`topk_token_ids` of completion {b}, token {t} must be in [0, {vocab}), got {list(row)}")
            for value in row.values():
                if value is None or not value <= MAX_LOGPROB:  # -inf is an impossible token; NaN compares False
                    raise ValueError(f"`topk_logprobs` of completion {b}, token {t} holds {value}; log-probs are at most 0")
            if len(row) > store.k + 1:
                raise ValueError(f"`topk_token_ids` of completion {b}, token {t} holds more than K = {store.k} ids")
            id_rows[t, : len(row)] = torch.tensor(list(row))
            value_rows[t, : len(row)] = torch.tensor(list(row.values()))
        first = store.add(id_rows, value_rows, id_rows >= 0)
        captured.append([CapturedLogprob(0.0 if value is None else value, first + t) for t, value in enumerate(sampled)])
    return captured
