"""DPPO: GRPO's rollouts and rewards with a trust region on policy divergence (arXiv 2602.04879)."""

import functools
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from dppo_kernels import DIVERGENCES, PRESETS, PolicyLossSpec, Stat, _checks, policy_loss
from dppo_kernels.trainers._trl_seam import GRPOConfig, GRPOTrainer, check_attributes
from dppo_kernels.trainers.dropout import check_deterministic, disable_dropout
from dppo_kernels.trainers.mismatch import MISMATCH_ACTIONS, MISMATCH_METRICS, MismatchMonitorMixin, fresh_stats
from dppo_kernels.trainers.neutral_sampling import check_sampling, check_vllm_sampling
from dppo_kernels.trainers.normaliser import accumulation_steps, tokens_per_window
from dppo_kernels.trainers.resume import ExactResumeMixin
from dppo_kernels.trainers.rollout import RolloutCaptureMixin
from dppo_kernels.trainers.rollout_vllm import prepare_engine, warn_of_merging
from dppo_kernels.trainers.scoring import IGNORE_INDEX, install_scoring

# GRPO options that mean nothing here: the loss, its ratio and its correction are DPPO's own.
_IGNORED = (
    *("loss_type", "delta", "importance_sampling_level", "off_policy_mask_threshold", "use_adaptive_entropy"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
)

# Logged name -> (stat, how it is read).
_METRICS = {
    "divergence/mean": ("divergence", "mean"),
    "divergence/max": ("divergence", "max"),
    "masked/all": ("masked", "mean"),
    "masked/positive_advantage": ("masked_positive", "mean"),
    "masked/negative_advantage": ("masked_negative", "mean"),
    "prob_gap/mean": ("prob_gap", "mean"),
    "prob_gap/max": ("prob_gap", "max"),
    "ratio/mean": ("ratio", "mean"),
    "ratio/max": ("ratio", "max"),
    "ratio/above_cap": ("ratio_above_cap", "mean"),
    "anchor_kl": ("anchor_kl", "mean"),
    "surrogate": ("surrogate", "mean"),
    "entropy": ("entropy", "mean"),
    "kl": ("ref_kl", "mean"),
    "aux_loss": ("aux_loss", "mean"),
    **MISMATCH_METRICS,
    "unscored": ("unscored", "mean"),
}


@dataclass
class DPPOConfig(GRPOConfig):
    """GRPOConfig with DPPO's trust region; inherited options that DPPO would ignore are refused.

    With `use_vllm`, settings under which vLLM does not sample from ``softmax(logits / temperature)`` are refused. TRL's
    colocated engine computes in half precision even if the trainer does not, so their log-probs differ by rounding.

    Args:
        divergence_type: "binary_tv", "binary_kl", "topk_tv" or "topk_kl".
        divergence_topk: K of the top-K divergences; the sampled token is added to it. 1 <= K <= min(V, 128).
        clip_ratio_c: cap C of the ratio that weights the gradient. None = no cap.
        epsilon: threshold where the advantage is negative. None = the divergence's default (TV .15, KL .05).
        epsilon_high: threshold where the advantage is positive. None = `epsilon`.
        fused_loss: compute the loss and its gradient in the forward (`linear_policy_loss`). None = unless
            `top_entropy_quantile` needs the entropy of all tokens first.
        score_inactive: score tokens without an advantage too, so that metrics cover every completion token; costs their
            projection, changes no gradient. The share that is not scored is logged as "unscored".
        disable_dropout: must stay True where the model has dropout: it would make rollout and training policies differ.
        vllm_importance_sampling_correction: must stay False: DPPO's ratio to the rollout policy already is that correction.
        mismatch_threshold: largest mean of |mu - pi| over sampled tokens that is accepted on unchanged weights, where it is the
            mismatch between the engine that samples and the one that trains. None = no check.
        mismatch_action: "warn" when a logged mean crosses the threshold, or "stop" the training.

    Raises:
        ValueError: a setting that DPPO cannot honour, with the reason.
    """

    divergence_type: str = field(default="binary_tv", metadata={"help": f"One of {', '.join(DIVERGENCES)}."})
    divergence_topk: int = field(default=20, metadata={"help": "K of the top-K divergences."})
    clip_ratio_c: float | None = field(default=20.0, metadata={"help": "Cap of the ratio that weights the gradient."})
    epsilon: float | None = field(default=None, metadata={"help": "Threshold where A < 0 (default: TV .15, KL .05)."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Threshold where A > 0 (default: epsilon)."})
    fused_loss: bool | None = field(default=None, metadata={"help": "Gradient in the forward (default: where possible)."})
    score_inactive: bool = field(default=False, metadata={"help": "Score tokens without an advantage, for metrics."})
    disable_dropout: bool = field(default=True, metadata={"help": "Disable dropout in the model."})
    vllm_importance_sampling_correction: bool = field(default=False, metadata={"help": "Must stay False."})
    mismatch_threshold: float | None = field(default=0.05, metadata={"help": "Largest mean gap of sampler and trainer."})
    mismatch_action: str = field(default="warn", metadata={"help": f"One of {', '.join(MISMATCH_ACTIONS)}."})

    def __post_init__(self) -> None:
        for name in ("epsilon", "epsilon_high", "clip_ratio_c", "temperature", "mismatch_threshold"):
            if getattr(self, name) is not None:
                _checks.check_positive(name, getattr(self, name))
        self.policy_loss_spec()
        _checks.check_choice("mismatch_action", self.mismatch_action, MISMATCH_ACTIONS)
        if type(self.divergence_topk) is not int or not 1 <= self.divergence_topk <= 128:
            raise ValueError(f"`divergence_topk` must be an int in [1, 128], got {self.divergence_topk}")
        stock = {f.name: f.default for f in fields(GRPOConfig)}
        for name in _IGNORED:
            if getattr(self, name) != stock[name]:
                raise ValueError(f"`{name}`={getattr(self, name)!r} would be ignored by DPPO: leave it at {stock[name]!r}")
        if self.top_entropy_quantile < 1.0 and self.entropy_coef:
            raise ValueError("`top_entropy_quantile` < 1 together with `entropy_coef` is not supported")
        if self.top_entropy_quantile < 1.0 and self.fused_loss:
            raise ValueError("`top_entropy_quantile` < 1 needs all entropies before the loss: leave `fused_loss` at None")
        if self.vllm_importance_sampling_correction:
            raise ValueError("`vllm_importance_sampling_correction` would correct twice: DPPO's ratio is to the rollout policy")
        if self.use_transformers_continuous_batching or self.use_transformers_paged:
            raise ValueError("`use_transformers_continuous_batching` returns no log-probs of the rollout policy")
        if self.neftune_noise_alpha is not None:
            raise ValueError("`neftune_noise_alpha` adds noise to every forward: rollout and training policies would differ")
        super().__post_init__()  # parses `generation_kwargs` given as JSON
        names = ["top_p", "top_k", "min_p", "repetition_penalty"]
        if self.use_vllm:
            names.append("vllm_structured_outputs_regex")
            check_vllm_sampling({name: getattr(self, name) for name in names}, self.generation_kwargs, self.temperature)
        else:
            check_sampling({name: getattr(self, name) for name in names}, self.temperature)

    def policy_loss_spec(self) -> PolicyLossSpec:
        """The loss these settings describe."""
        _checks.check_choice("divergence_type", self.divergence_type, DIVERGENCES)
        preset = PRESETS[f"dppo_{self.divergence_type}"]
        low = preset.epsilon_low if self.epsilon is None else self.epsilon
        return preset.replace(
            epsilon_low=low,
            epsilon_high=low if self.epsilon_high is None else self.epsilon_high,
            ratio_cap=self.clip_ratio_c,
            beta=self.beta,
            kl_ratio_weighted=self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef,
        )


class DPPOTrainer(MismatchMonitorMixin, ExactResumeMixin, RolloutCaptureMixin, GRPOTrainer):
    """GRPOTrainer that masks tokens by the divergence from the rollout policy instead of clipping their ratio.

    Takes GRPOTrainer's arguments; `args` is a `DPPOConfig`. The rollout policy's log-probs are captured while generating, with
    transformers or vLLM, and are the only anchor: no old log-probs are recomputed and no importance correction is applied.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.
    """

    _name = "DPPO"
    _tag_names = ["trl", "dppo"]  # noqa: RUF012  (TRL's attribute, read-only)
    _paper = {"title": "Rethinking the Trust Region in LLM Reinforcement Learning", "id": "2602.04879"}  # noqa: RUF012
    stat_metrics = _METRICS

    def __init__(self, model: Any, reward_funcs: Any = None, args: DPPOConfig | None = None, *rest: Any, **kwargs: Any) -> None:
        if args is None:
            args = DPPOConfig("dppo-output")
        if not isinstance(args, DPPOConfig):
            raise TypeError(f"`args` must be a DPPOConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.spec = args.policy_loss_spec()
        self.rollout_topk = args.divergence_topk if self.spec.needs_topk else 0
        self._generation_step = -1  # global step whose weights wrote the buffered rollout
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if args.disable_dropout:
            disable_dropout(self.model)
        self._check_model(policy)
        if self.use_vllm:
            prepare_engine(self, self.rollout_topk)
            warn_of_merging(self.model)
        for scored in (policy, self.ref_model):
            if scored is not None:
                base = self.accelerator.unwrap_model(scored)
                install_scoring(base, temperature=self.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
        check_attributes(self)

    def _check_model(self, policy: Any) -> None:
        if not self.use_vllm:
            merged = self.generation_config.to_dict()
            # generate() fills what is None here from the model's own generation config.
            merged |= {k: v for k, v in policy.generation_config.to_dict().items() if merged.get(k) is None}
            check_sampling(merged, self.temperature)
        vocab = policy.get_output_embeddings().weight.shape[0]
        if self.rollout_topk > vocab:
            raise ValueError(f"`divergence_topk`={self.rollout_topk} exceeds the model's vocabulary of {vocab}")
        if self.rollout_topk and self.rollout_func is not None and self.tools:
            raise ValueError("top-K divergences cannot follow `rollout_func` through TRL's tool loop: call the tools inside it")
        if self._is_vlm:
            raise ValueError("vision-language models are not supported yet: pass a text model and tokenizer")
        if self.is_fsdp_enabled or self.accelerator.distributed_type == "DEEPSPEED":
            raise ValueError("FSDP and DeepSpeed are not supported yet: run on one process or with DDP")
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt-learning PEFT (prompt, prefix, p-tuning) is not supported: use LoRA or another adapter")
        check_deterministic(self.model)

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
        """GRPO scores its rollouts here: the reference as the policy is scored, the old log-probs (not our anchor) never."""
        if not self._is_reference(model):
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

    def resume_signature(self) -> dict[str, float]:
        return {**super().resume_signature(), "divergence_topk": self.rollout_topk}

    def extra_resume_state(self) -> dict[str, Any]:
        return {**super().extra_resume_state(), "generation_step": self._generation_step}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        super().load_extra_resume_state(state)
        self._generation_step = state["generation_step"]

    def _score(self, model: Any, input_ids: Tensor, attention_mask: Tensor, scored_ids: Tensor, **extra: Any) -> Any:
        with self.accelerator.autocast():
            return model(input_ids=input_ids, attention_mask=attention_mask, scored_ids=scored_ids, **extra)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        score = functools.partial(
            self._score,
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion_ids.masked_fill(~mask, IGNORE_INDEX),
            scored_gather_ids=inputs.get("rollout_topk_ids"),
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        accumulation = accumulation_steps(self)
        arguments = {
            "anchor_logprobs": inputs["sampling_per_token_logps"],
            "advantages": inputs["advantages"],
            "loss_mask": mask,
            "spec": self.spec,
            "ref_logprobs": inputs.get("ref_per_token_logps"),
            "rollout_topk_logprobs": inputs.get("rollout_topk_logprobs"),
            "topk_valid": inputs.get("rollout_topk_valid"),
            "denominator": tokens_per_window(self, inputs),
            "entropy_denominator": mask.sum().clamp(min=1) * accumulation,
        }
        if self.args.fused_loss is not False and self.top_entropy_quantile == 1.0:
            scores = score(policy_loss={**arguments, "with_entropy": True, "score_inactive": self.args.score_inactive})
            loss, stats = scores.loss, scores.stats
        else:
            scores = score()
            if self.top_entropy_quantile < 1.0:
                chosen = self.get_high_entropy_mask(scores.entropy, mask, 1 - self.top_entropy_quantile)
                arguments["token_weights"] = chosen.float()
            loss, stats = policy_loss(scores.logprobs, entropy=scores.entropy, topk_logprobs=scores.gathered, **arguments)
        if scores.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / accumulation
            aux_loss = scores.aux_loss.detach()
            stats["aux_loss"] = Stat(aux_loss, torch.ones_like(aux_loss), aux_loss)
        if not self.model.training or self.state.global_step == self._generation_step:
            stats.update(fresh_stats(stats, self.args.divergence_type))
        self.record(stats)
        return loss
