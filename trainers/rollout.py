"""Recording the rollout policy while transformers generates: sampled and top-K log-probs, step by step.

One [B, V] tensor of logits is alive at a time and is reduced to K + 1 columns before the next step. Log-probs are those of
``logits / temperature`` over the full vocabulary, which is the distribution the tokens were drawn from as long as nothing else
(top-p, penalties) reshapes it; `check_sampling` refuses what does.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dppo_kernels import TopKLogprobs, token_logprobs, topk_logprobs
from dppo_kernels.trainers.head import head_shape
from dppo_kernels.trainers.rollout_columns import MAX_LOGPROB, CapturedLogprob, RolloutStore, ranked_columns
from dppo_kernels.trainers.rollout_vllm import capturing
from dppo_kernels.trainers.shadow import shadowed

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases


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


def _looked_on(generate: Callable[..., Any], capture: _StepCapture) -> Callable[..., Any]:
    """`generate` of a model, with `capture` looking on."""
    return functools.partial(
        generate,
        logits_processor=LogitsProcessorList([_SeeLogits(capture)]),
        stopping_criteria=StoppingCriteriaList([_SeeSample(capture)]),
    )


class RolloutCaptureMixin(Host):
    """Put before GRPOTrainer in the bases: rollouts come back with the sampler's log-probs, from transformers or vLLM.

    Adds to the dict of `_generate_and_score_completions`: ``sampling_per_token_logps`` [B, T] and, where `rollout_topk` > 0,
    ``rollout_topk_ids``, ``rollout_topk_logprobs``, ``rollout_topk_valid`` [B, T, K+1]. Memory beyond generation is O(B T K).
    A `rollout_func` replaces the capture: it must return the log-probs itself. Without `captures_rollout`, rollouts are TRL's.
    """

    captures_rollout: bool = True
    rollout_topk: int = 0  # K; 0 = the sampled token's log-prob only

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_synced_weights()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_synced_weights()
        return super().evaluate(*args, **kwargs)

    def _forget_synced_weights(self) -> None:
        # TRL pushes weights to vLLM when the global step changed; a checkpoint, a second run or the best model loaded at the
        # end change them without.
        if self.use_vllm:
            self._last_loaded_step = -1

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[CapturedLogprob]]]:
        if not self.captures_rollout:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm:
            engine = self.vllm_generation
            with shadowed(engine, "generate", capturing(engine.generate, self._rollout_store, self._vocab())):
                return super()._generate_single_turn(*args, **kwargs)
        capture = _StepCapture(self.rollout_topk, self.temperature)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with shadowed(model, "generate", _looked_on(model.generate, capture)):
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

    def _vocab(self) -> int:
        return head_shape(self.model)[0]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if not self.captures_rollout:
            return super()._generate(prompts)
        self._rollout_store = RolloutStore(self.rollout_topk)
        generated = super()._generate(prompts)
        _, completion_ids, written_by_policy, _, logprobs, extra_fields, *_ = generated
        if self.rollout_func is not None:
            check_custom_logprobs(completion_ids, logprobs, written_by_policy)
            if self.rollout_topk:
                logprobs = store_custom_rollout(
                    self._rollout_store, completion_ids, logprobs, written_by_policy, extra_fields, self._vocab()
                )
        self._rollout_logprobs = logprobs
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self.captures_rollout:
            return output
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
    for b, (tokens, sampled) in enumerate(zip(completion_ids, logprobs, strict=True)):
        place = f"completion {b} of `rollout_func`"
        if not len(topk_ids[b]) == len(topk_logprobs_[b]) == len(tokens):
            raise ValueError(
                f"{place} has {len(tokens)} tokens, {len(topk_ids[b])} rows of `topk_token_ids` and "
                f"{len(topk_logprobs_[b])} rows of `topk_logprobs`"
            )
        written = [True] * len(tokens) if written_by_policy is None else written_by_policy[b]
        ids: list[list[int]] = [[] for _ in tokens]
        values: list[list[float | None]] = [[] for _ in tokens]
        for t, token in enumerate(tokens):
            if written[t]:  # the sampled token goes last: it counts only where the rollout left it out
                ids[t], values[t] = [*topk_ids[b][t], token], [*topk_logprobs_[b][t], sampled[t]]
                if len(set(ids[t])) > store.k + 1:
                    raise ValueError(f"{place}, token {t}: `topk_token_ids` holds more than K = {store.k} ids")
        _, columns = ranked_columns(tokens, ids, values, k=store.k, vocab=vocab, place=place)
        first = store.add(*columns)
        captured.append([CapturedLogprob(0.0 if value is None else value, first + t) for t, value in enumerate(sampled)])
    return captured
