"""Rule rewards for GRPO-like trainers: answers checked by algebra, and a length penalty. They need no TRL to be imported."""

from dppo_kernels.trainers.rewards.length import SoftOverlongPenalty
from dppo_kernels.trainers.rewards.math_verify import MathAnswerReward

__all__ = ["MathAnswerReward", "SoftOverlongPenalty"]
