"""DPPO: GRPO's rollouts and rewards with a trust region on policy divergence (arXiv 2602.04879)."""

from dataclasses import dataclass, field

from dppo_kernels import DIVERGENCES, _checks
from dppo_kernels.trainers.policy_config import PolicyConfig
from dppo_kernels.trainers.policy_trainer import PolicyTrainer


@dataclass
class DPPOConfig(PolicyConfig):
    """`PolicyConfig` whose `divergence_type` is never None: which divergence the trust region measures.

    Raises:
        ValueError: a setting that DPPO cannot honour, with the reason.
    """

    divergence_type: str = field(default="binary_tv", metadata={"help": f"One of {', '.join(DIVERGENCES)}."})

    def __post_init__(self) -> None:
        _checks.check_choice("divergence_type", self.divergence_type, DIVERGENCES)
        super().__post_init__()


class DPPOTrainer(PolicyTrainer):
    """GRPOTrainer that masks tokens by the divergence from the rollout policy instead of clipping their ratio.

    Takes GRPOTrainer's arguments; `args` is a `DPPOConfig`. The rollout policy's log-probs are captured while generating, with
    transformers or vLLM, and are the only anchor: no old log-probs are recomputed and no importance correction is applied.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.
    """

    _name = "DPPO"
    _tag_names = ["trl", "dppo"]  # noqa: RUF012  (TRL's attribute, read-only)
    _paper = {"title": "Rethinking the Trust Region in LLM Reinforcement Learning", "id": "2602.04879"}  # noqa: RUF012
    config_class = DPPOConfig
