"""GRPOTrainer with a `PolicyLossSpec` for a loss: fused into the forward, exact metrics, exact resume."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from dppo_kernels import PolicyLossSpec, Stat, policy_loss
from dppo_kernels.trainers._trl_seam import GRPOTrainer, check_attributes
from dppo_kernels.trainers.checkpoint import AtomicCheckpointMixin
from dppo_kernels.trainers.dropout import check_deterministic, disable_dropout
from dppo_kernels.trainers.head import head_shape
from dppo_kernels.trainers.loss_spec import STEP_NORMALISED
from dppo_kernels.trainers.mismatch import MISMATCH_METRICS, MismatchMonitorMixin, fresh_stats
from dppo_kernels.trainers.neutral_sampling import check_sampling
from dppo_kernels.trainers.normaliser import accumulation_steps, active_tokens, own_count, tokens_per_window, whole_sequences
from dppo_kernels.trainers.policy_config import PolicyConfig
from dppo_kernels.trainers.resume import ExactResumeMixin
from dppo_kernels.trainers.rollout import RolloutCaptureMixin
from dppo_kernels.trainers.rollout_vllm import prepare_engine, warn_of_merging
from dppo_kernels.trainers.scoring import IGNORE_INDEX, install_scoring
from dppo_kernels.trainers.sharding import EngineMixin

# Logged name -> (stat, how it is read), of every loss and of each surrogate.
_METRICS = {
    "ratio/mean": ("ratio", "mean"),
    "ratio/max": ("ratio", "max"),
    "anchor_kl": ("anchor_kl", "mean"),
    "surrogate": ("surrogate", "mean"),
    "entropy": ("entropy", "mean"),
    "kl": ("ref_kl", "mean"),
    "aux_loss": ("aux_loss", "mean"),
    "unscored": ("unscored", "mean"),
}
_SURROGATE_METRICS = {
    "clip": {
        "clip_ratio/low": ("clipped_low", "mean"),
        "clip_ratio/high": ("clipped_high", "mean"),
        "clip_fraction": ("clipped", "mean"),
    },
    "cispo": {"ratio/above_cap": ("ratio_above_cap", "mean"), "clip_fraction": ("ratio_above_cap", "mean")},
    "sapo": {},
    "divergence": {
        "divergence/mean": ("divergence", "mean"),
        "divergence/max": ("divergence", "max"),
        "masked/all": ("masked", "mean"),
        "masked/positive_advantage": ("masked_positive", "mean"),
        "masked/negative_advantage": ("masked_negative", "mean"),
        "clip_fraction": ("masked", "mean"),
        "prob_gap/mean": ("prob_gap", "mean"),
        "prob_gap/max": ("prob_gap", "max"),
        "ratio/above_cap": ("ratio_above_cap", "mean"),
        **MISMATCH_METRICS,
    },
}


class PolicyTrainer(
    MismatchMonitorMixin, AtomicCheckpointMixin, ExactResumeMixin, RolloutCaptureMixin, EngineMixin, GRPOTrainer
):
    """GRPOTrainer whose loss is the `PolicyLossSpec` of its config; the base of this package's policy trainers.

    Takes GRPOTrainer's arguments; `args` is a `config_class`. Where the loss is DPPO's, the rollout policy's log-probs are
    captured while generating, with transformers or vLLM, and are the only anchor. Otherwise the anchor is GRPO's: log-probs of
    the trained model before the rollout's first update, none where there is only one.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.
    """

    config_class: type[PolicyConfig] = PolicyConfig

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is None:
            args = self.config_class(f"{self._name.lower()}-output")
        if not isinstance(args, self.config_class):
            raise TypeError(f"`args` must be a {self.config_class.__name__}, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.spec: PolicyLossSpec = args.policy_loss_spec()
        self.stat_metrics = {**_SURROGATE_METRICS[self.spec.surrogate], **_METRICS}
        self.captures_rollout = self.spec.divergence is not None
        self.rollout_topk = args.divergence_topk if self.spec.needs_topk else 0
        self._generation_step = -1  # global step whose weights wrote the buffered rollout
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if args.disable_dropout:
            disable_dropout(self.model)
        self._check_model(policy)
        if self.use_vllm:
            if self.captures_rollout:
                prepare_engine(self, self.rollout_topk)
            warn_of_merging(self.model)
        for scored in (policy, self.ref_model):
            if scored is not None:
                self._install_scoring(scored)
        check_attributes(self)

    def _install_scoring(self, model: Any) -> None:
        base = self.accelerator.unwrap_model(model)
        install_scoring(base, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)

    def _check_model(self, policy: Any) -> None:
        if self.captures_rollout and not self.use_vllm:
            merged = self.generation_config.to_dict()
            # generate() fills what is None here from the model's own generation config.
            merged |= {k: v for k, v in policy.generation_config.to_dict().items() if merged.get(k) is None}
            check_sampling(merged, self.temperature)
        vocab, _ = head_shape(policy)
        if self.rollout_topk > vocab:
            raise ValueError(f"`divergence_topk`={self.rollout_topk} exceeds the model's vocabulary of {vocab}")
        if self.rollout_topk and self.rollout_func is not None and self.tools:
            raise ValueError("top-K divergences cannot follow `rollout_func` through TRL's tool loop: call the tools inside it")
        if self._is_vlm:
            raise ValueError("vision-language models are not supported yet: pass a text model and tokenizer")
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt-learning PEFT (prompt, prefix, p-tuning) is not supported: use LoRA or another adapter")
        if self.captures_rollout:
            check_deterministic(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        need = self.args.generation_batch_size // self.num_generations
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) < need:
            raise ValueError(
                f"`train_dataset` has {len(self.train_dataset)} prompts, fewer than the {need} of one rollout "
                f"(`generation_batch_size` / `num_generations`): no step would be made"
            )
        return super().train(*args, **kwargs)

    def _is_reference(self, model: Any) -> bool:
        if model is self.ref_model or not is_peft_model(self.accelerator.unwrap_model(self.model)):
            return model is self.ref_model
        status = self.accelerator.unwrap_model(self.model).get_model_status()  # TRL switches adapters for the reference
        return status.enabled is False or status.active_adapters == ["ref"]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[Tensor | None, None, None]:
        """GRPO scores its rollouts here, under no_grad: the reference, and the old log-probs where they are the anchor."""
        if self.captures_rollout and not self._is_reference(model):
            return None, None, None
        size = batch_size or input_ids.shape[0]
        parts = []
        for ids, attention in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            scored = ids[:, -logits_to_keep:].masked_fill(attention[:, -logits_to_keep:] == 0, IGNORE_INDEX)
            parts.append(self._score(model, ids, attention, scored).logprobs)
        return torch.cat(parts), None, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            self._generation_step = self.state.global_step
        return super()._generate_and_score_completions(inputs)

    def resume_signature(self) -> dict[str, float | str]:
        return {**super().resume_signature(), "divergence_topk": self.rollout_topk, "captures": int(self.captures_rollout)}

    def extra_resume_state(self) -> dict[str, Any]:
        return {**super().extra_resume_state(), "generation_step": self._generation_step}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        super().load_extra_resume_state(state)
        self._generation_step = state["generation_step"]

    def _score(self, model: Any, input_ids: Tensor, attention_mask: Tensor, scored_ids: Tensor, **extra: Any) -> Any:
        with self.accelerator.autocast():
            return model(input_ids=input_ids, attention_mask=attention_mask, scored_ids=scored_ids, **extra)

    def step_tokens(self, inputs: Mapping[str, Any]) -> Tensor:
        """What losses that are normalised over the optimiser step divide by, for one process."""
        return tokens_per_window(self, inputs)

    def _denominator(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor | float:
        if self.spec.divergence is not None or self.loss_type in STEP_NORMALISED:
            return self.step_tokens(inputs)
        return own_count(self.spec.reduction, mask, self.max_completion_length) * accumulation_steps(self)

    def _entropy_denominator(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor | float:
        """GRPO's: the mean over micro-batches of their means over tokens."""
        return mask.sum().clamp(min=1) * accumulation_steps(self)

    def _scored_on_unchanged_weights(self) -> bool:
        return not self.model.training or self.state.global_step == self._generation_step

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        completion_ids, mask = inputs["completion_ids"], active_tokens(inputs)
        input_ids, attention_mask = whole_sequences(inputs)
        score = functools.partial(
            self._score,
            model,
            input_ids,
            attention_mask,
            completion_ids.masked_fill(~mask, IGNORE_INDEX),
            scored_gather_ids=inputs.get("rollout_topk_ids"),
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
            **self.scoring_options(inputs),
        )
        accumulation = accumulation_steps(self)
        anchor = "sampling_per_token_logps" if self.captures_rollout else "old_per_token_logps"
        arguments = {
            "anchor_logprobs": inputs.get(anchor),
            "advantages": inputs["advantages"],
            "loss_mask": mask,
            "spec": self.spec,
            "ref_logprobs": inputs.get("ref_per_token_logps"),
            "rollout_topk_logprobs": inputs.get("rollout_topk_logprobs"),
            "topk_valid": inputs.get("rollout_topk_valid"),
            "token_weights": inputs.get("importance_sampling_ratio"),
            "denominator": self._denominator(inputs, mask),
            "entropy_denominator": self._entropy_denominator(inputs, mask),
        }
        if self.args.fused_loss is not False and self.top_entropy_quantile == 1.0:
            scores = score(policy_loss={**arguments, "with_entropy": True, "score_inactive": self.args.score_inactive})
            loss, stats = scores.loss, scores.stats
        else:
            scores = score()
            if self.top_entropy_quantile < 1.0:
                chosen = self.get_high_entropy_mask(scores.entropy, mask, 1 - self.top_entropy_quantile).float()
                weights = arguments["token_weights"]
                arguments["token_weights"] = chosen if weights is None else chosen * weights
            loss, stats = policy_loss(scores.logprobs, entropy=scores.entropy, topk_logprobs=scores.gathered, **arguments)
        if scores.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / accumulation
            aux_loss = scores.aux_loss.detach()
            stats["aux_loss"] = Stat(aux_loss, torch.ones_like(aux_loss), aux_loss)
        if self.captures_rollout and self._scored_on_unchanged_weights():
            stats.update(fresh_stats(stats, self.args.divergence_type))
        if "clipped_low" in stats:  # no token is both
            stats["clipped"] = _either(stats["clipped_low"], stats["clipped_high"])
        loss = self.finish_loss(loss, scores, inputs, stats)
        self.record(stats)
        return loss

    def scoring_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Further keywords of the scoring forward that the loss of these inputs is computed in."""
        return {}

    def finish_loss(self, loss: Tensor, scores: Any, inputs: dict[str, Any], stats: dict[str, Stat]) -> Tensor:
        """Add what else is trained to the policy's loss, and its stats to `stats`."""
        return loss


def _either(first: Stat, second: Stat) -> Stat:
    """The share of tokens of which one of two exclusive things is true."""
    return Stat(first.sum + second.sum, first.count, torch.maximum(first.max, second.max))
