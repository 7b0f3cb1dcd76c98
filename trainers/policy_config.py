"""What the trainers on GRPOTrainer share of their configuration: a loss that is one `PolicyLossSpec`."""

from dataclasses import dataclass, field, fields
from typing import Any

from dppo_kernels import DIVERGENCES, PRESETS, PolicyLossSpec, _checks
from dppo_kernels.trainers._trl_seam import GRPOConfig
from dppo_kernels.trainers.loss_spec import LOSS_TYPES, grpo_spec
from dppo_kernels.trainers.mismatch import MISMATCH_ACTIONS
from dppo_kernels.trainers.neutral_sampling import check_sampling, check_vllm_sampling

# GRPO options that no `PolicyLossSpec` has, that mean nothing once the loss is a divergence's, and the other way round.
_NEVER = (
    *("off_policy_mask_threshold", "use_adaptive_entropy"),
    *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
)
_SAPO = ("sapo_temperature_neg", "sapo_temperature_pos")
_NOT_BY_A_DIVERGENCE = ("loss_type", "delta", "importance_sampling_level", *_SAPO)
_BY_A_DIVERGENCE_ONLY = ("divergence_topk", "clip_ratio_c", "mismatch_threshold", "mismatch_action")


@dataclass
class PolicyConfig(GRPOConfig):
    """GRPOConfig with a loss of our own; inherited options that it would ignore are refused.

    With `use_vllm`, settings under which vLLM does not sample from ``softmax(logits / temperature)`` are refused wherever its
    log-probs enter the loss. TRL's colocated engine computes in half precision even if the trainer does not, so their log-probs
    differ by rounding.

    Args:
        divergence_type: "binary_tv", "binary_kl", "topk_tv" or "topk_kl" for DPPO's loss; None for the one of `loss_type`.
        divergence_topk: K of the top-K divergences; the sampled token is added to it. 1 <= K <= min(V, 128).
        clip_ratio_c: cap C of the ratio that weights DPPO's gradient. None = no cap. (`delta` is the cap of clipped losses.)
        epsilon: clip width or threshold where the advantage is negative. None = the loss's default (DPPO: TV .15, KL .05).
        epsilon_high: the same where the advantage is positive. None = the loss's default (DPPO: `epsilon`).
        fused_loss: compute the loss and its gradient in the forward (`linear_policy_loss`). None = unless
            `top_entropy_quantile` needs the entropy of all tokens first.
        score_inactive: score tokens without an advantage too, so that metrics cover every completion token; costs their
            projection, changes no gradient. The share that is not scored is logged as "unscored".
        disable_dropout: with DPPO it must stay True where the model has dropout, which would make rollout and training policies
            differ.
        vllm_importance_sampling_correction: None = as TRL, except with DPPO, whose ratio to the rollout policy already is that
            correction.
        mismatch_threshold: DPPO: largest mean of |mu - pi| over sampled tokens that is accepted on unchanged weights, where it
            is the mismatch between the engine that samples and the one that trains. None = no check.
        mismatch_action: "warn" when a logged mean crosses the threshold, or "stop" the training.

    Raises:
        ValueError: a setting that cannot be honoured, with the reason.
    """

    divergence_type: str | None = field(default=None, metadata={"help": f"DPPO's loss: one of {', '.join(DIVERGENCES)}."})
    divergence_topk: int = field(default=20, metadata={"help": "K of the top-K divergences."})
    clip_ratio_c: float | None = field(default=20.0, metadata={"help": "Cap of the ratio that weights DPPO's gradient."})
    epsilon: float | None = field(default=None, metadata={"help": "Where A < 0: clip width or threshold."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Where A > 0: clip width or threshold."})
    fused_loss: bool | None = field(default=None, metadata={"help": "Gradient in the forward (default: where possible)."})
    score_inactive: bool = field(default=False, metadata={"help": "Score tokens without an advantage, for metrics."})
    disable_dropout: bool = field(default=True, metadata={"help": "Disable dropout in the model."})
    vllm_importance_sampling_correction: bool | None = field(
        default=None, metadata={"help": "TRL's correction of vLLM's log-probs (default: unless the loss is DPPO's)."}
    )
    mismatch_threshold: float | None = field(default=0.05, metadata={"help": "DPPO: largest mean gap of sampler and trainer."})
    mismatch_action: str = field(default="warn", metadata={"help": f"DPPO: one of {', '.join(MISMATCH_ACTIONS)}."})

    def __post_init__(self) -> None:
        for name in ("epsilon", "epsilon_high", "clip_ratio_c", "delta", "temperature", "mismatch_threshold"):
            if getattr(self, name) is not None:
                _checks.check_positive(name, getattr(self, name))
        self.policy_loss_spec()
        _checks.check_choice("mismatch_action", self.mismatch_action, MISMATCH_ACTIONS)
        if type(self.divergence_topk) is not int or not 1 <= self.divergence_topk <= 128:
            raise ValueError(f"`divergence_topk` must be an int in [1, 128], got {self.divergence_topk}")
        self._refuse_ignored(_NEVER)
        self._refuse_ignored(_NOT_BY_A_DIVERGENCE if self.divergence_type else self._unused_by_the_loss_type())
        if self.top_entropy_quantile < 1.0 and self.entropy_coef:
            raise ValueError("`top_entropy_quantile` < 1 together with `entropy_coef` is not supported")
        if self.top_entropy_quantile < 1.0 and self.fused_loss:
            raise ValueError("`top_entropy_quantile` < 1 needs all entropies before the loss: leave `fused_loss` at None")
        if self.neftune_noise_alpha is not None:
            raise ValueError("`neftune_noise_alpha` adds noise to every forward: rollout and training policies would differ")
        if self.divergence_type:
            if self.vllm_importance_sampling_correction:
                raise ValueError(
                    "`vllm_importance_sampling_correction` would correct twice: DPPO's ratio is to the rollout policy"
                )
            if self.use_transformers_continuous_batching or self.use_transformers_paged:
                raise ValueError("`use_transformers_continuous_batching` returns no log-probs of the rollout policy")
        if self.vllm_importance_sampling_correction is None:
            self.vllm_importance_sampling_correction = self.divergence_type is None
        super().__post_init__()  # parses `generation_kwargs` given as JSON
        names = ["top_p", "top_k", "min_p", "repetition_penalty"]
        if self.use_vllm and (self.divergence_type or self.vllm_importance_sampling_correction):
            names.append("vllm_structured_outputs_regex")
            check_vllm_sampling({name: getattr(self, name) for name in names}, self.generation_kwargs, self.temperature)
        elif self.divergence_type:
            check_sampling({name: getattr(self, name) for name in names}, self.temperature)

    def policy_loss_spec(self) -> PolicyLossSpec:
        """The loss these settings describe."""
        if self.divergence_type is None:
            _checks.check_choice("loss_type", self.loss_type, LOSS_TYPES)
            preset = PRESETS["gspo" if self.importance_sampling_level == "sequence" else self.loss_type]
            return grpo_spec(
                self,
                epsilon_low=preset.epsilon_low if self.epsilon is None else self.epsilon,
                epsilon_high=preset.epsilon_high if self.epsilon_high is None else self.epsilon_high,
                beta=self.beta,
                entropy_coef=self.entropy_coef,
            )
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

    def _unused_by_the_loss_type(self) -> tuple[str, ...]:
        own = {"cispo": ("epsilon", "delta", *_SAPO), "sapo": ("epsilon", "epsilon_high", "delta")}
        return (*_BY_A_DIVERGENCE_ONLY, *own.get(self.loss_type, _SAPO))

    def _refuse_ignored(self, names: tuple[str, ...]) -> None:
        algorithm = type(self).__name__.removesuffix("Config")
        loss = f" with `loss_type`={self.loss_type!r}" if self.divergence_type is None else ""
        for name, value in _defaults(type(self), names).items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}`={getattr(self, name)!r} would be ignored by {algorithm}{loss}: leave it at {value!r}"
                )


def _defaults(config: type, names: tuple[str, ...]) -> dict[str, Any]:
    return {f.name: f.default for f in fields(config) if f.name in names}
