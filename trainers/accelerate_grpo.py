"""TRL's GRPOTrainer through `linear_policy_loss`: its loss, gradient and metrics, the gradient computed in the forward."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from dppo_kernels import PolicyLossSpec
from dppo_kernels.trainers._trl_seam import GRPOTrainer, check_attributes
from dppo_kernels.trainers.loss_spec import LOSS_TYPES, STEP_NORMALISED, grpo_spec
from dppo_kernels.trainers.normaliser import accumulation_steps, active_tokens, own_count, tokens_per_window
from dppo_kernels.trainers.scoring import scoring_installed

LossMethod = Callable[[Any, Any, dict[str, Any]], Tensor]


def fused_loss_obstacle(trainer: Any) -> str | None:
    """Why `accelerate_trl` leaves this GRPOTrainer's loss to TRL, in words; None if it goes through the fused loss."""
    if trainer.loss_type not in LOSS_TYPES:
        return f"loss_type {trainer.loss_type!r} is not fused"
    if trainer.loss_type == "cispo" and trainer.importance_sampling_level == "sequence":
        return "cispo with a sequence-level ratio is not fused"
    if min(trainer.epsilon_low, trainer.epsilon_high) <= 0:
        return "a clip width of 0 is not fused"
    if trainer.off_policy_mask_threshold is not None:
        return "off_policy_mask_threshold is set"
    if trainer.top_entropy_quantile < 1.0:
        return "top_entropy_quantile needs all entropies before the loss"
    if trainer.use_adaptive_entropy:
        return "use_adaptive_entropy is set"
    if trainer._is_vlm:
        return "the model is a vision-language model"
    if trainer.is_fsdp_enabled or trainer.accelerator.distributed_type == "DEEPSPEED":
        return "the lm_head is sharded"
    scores = "_get_per_token_logps_and_entropies"
    if getattr(type(trainer), scores) is not getattr(GRPOTrainer, scores):
        return f"{type(trainer).__name__} overrides {scores}"
    head = _base_model(trainer).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"the lm_head is a {type(head).__name__}"
    return None


def fused(original: LossMethod) -> LossMethod:
    """GRPOTrainer's `_compute_loss` through the fused loss where the trainer's settings allow it, else as it was."""

    @functools.wraps(original)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        if fused_loss_obstacle(self) is not None:
            return original(self, model, inputs)
        check_attributes(self)
        return _fused_loss(self, model, inputs)

    return _compute_loss


def _base_model(trainer: Any) -> Any:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if is_peft_model(model) else model


def _spec(trainer: Any) -> PolicyLossSpec:
    return grpo_spec(
        trainer.args,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        beta=trainer.beta,
        entropy_coef=trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0,
    )


def _fused_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    mode = "train" if self.model.training else "eval"
    completion_ids, mask = inputs["completion_ids"], active_tokens(inputs)
    spec, active = _spec(self), mask.sum().clamp(min=1)
    accumulation = accumulation_steps(self)
    normaliser: Tensor | float
    if self.loss_type in STEP_NORMALISED:
        normaliser, policy_scale = tokens_per_window(self, inputs), 1
    else:
        normaliser = own_count(spec.reduction, mask, self.max_completion_length) * accumulation
        policy_scale = accumulation
    corrected = self.use_vllm and self.vllm_importance_sampling_correction
    scoring = scoring_installed(
        _base_model(self),
        temperature=self.temperature,
        cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
        derive_positions=False,  # TRL passes none
    )
    with scoring, self.accelerator.autocast():
        scores = model(
            input_ids=torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            scored_ids=completion_ids,
            policy_loss={
                "anchor_logprobs": inputs.get("old_per_token_logps"),
                "advantages": inputs["advantages"],
                "loss_mask": mask,
                "spec": spec,
                "ref_logprobs": inputs["ref_per_token_logps"] if spec.beta else None,
                "token_weights": inputs["importance_sampling_ratio"] if corrected else None,
                "denominator": normaliser,
                "entropy_denominator": active * accumulation,
                "with_entropy": True,
                "score_inactive": True,  # TRL's metrics are over every token
            },
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
    loss = scores.loss
    logged = self._metrics[mode]
    if self._entropy_bonus_enabled:
        bonus = spec.entropy_coef * scores.stats["entropy"].sum / (active * accumulation)
        policy_loss = (loss.detach() + bonus) * policy_scale
        logged["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
        if mode == "train" and self.accelerator.sync_gradients:
            logged["entropy_coef"].append(self.entropy_coef)
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * scores.aux_loss / accumulation
        logged["aux_loss"].append(self.accelerator.gather_for_metrics(scores.aux_loss).mean().item())
    _log(self, logged, inputs, mask, scores.logprobs, scores.stats, spec)
    return loss


def _log(
    self: Any,
    logged: Any,
    inputs: Mapping[str, Any],
    mask: Tensor,
    logprobs: Tensor,
    stats: Mapping[str, Any],
    spec: PolicyLossSpec,
) -> None:
    """TRL's metrics of this loss, by its names."""

    def mean(total: Tensor, count: Tensor) -> float:
        both = self.accelerator.reduce(torch.stack([total.float(), count.float()]), reduction="sum")
        return (both[0] / both[1].clamp(min=1.0)).item()

    if spec.beta:
        logged["kl"].append(mean(stats["ref_kl"].sum, mask.sum()))
    logged["entropy"].append(mean(stats["entropy"].sum, mask.sum()))
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    old = inputs.get("old_per_token_logps")
    log_ratio = torch.zeros_like(logprobs) if old is None else torch.where(mask, logprobs - old, 0.0)
    counts = mask
    if spec.ratio_level == "sequence":  # one value a sequence, and every sequence counts
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        counts = torch.ones_like(log_ratio, dtype=torch.bool)
    ratio = log_ratio.exp() if spec.ratio_cap is None else log_ratio.exp().clamp(max=spec.ratio_cap)
    if spec.surrogate == "cispo":
        capped = (ratio > spec.epsilon_high) & (advantages > 0) & counts
        logged["cispo_clip_ratio"].append(mean(capped.sum(), counts.sum()))
    if spec.surrogate != "clip":
        return
    low = (ratio < 1 - spec.epsilon_low) & (advantages < 0) & counts
    high = (ratio > 1 + spec.epsilon_high) & (advantages > 0) & counts
    for name, clipped in (("low", low), ("high", high), ("region", low | high)):
        logged[f"clip_ratio/{name}_mean"].append(mean(clipped.sum(), counts.sum()))
    for name, clipped in (("low_min", low), ("high_max", high)):
        per_sequence = self.accelerator.gather(clipped.sum(1) / counts.sum(1))  # NaN where a sequence has no tokens
        known = per_sequence[~per_sequence.isnan()]
        extreme = known.min() if name == "low_min" else known.max()
        logged[f"clip_ratio/{name}"].append(extreme.item() if known.numel() else torch.nan)
