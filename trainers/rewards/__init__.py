"""Rewards for GRPO-like trainers: answers checked by algebra, a length penalty, table rows. They need no TRL to be imported."""

from dppo_kernels.trainers.rewards.length import SoftOverlongPenalty
from dppo_kernels.trainers.rewards.math_verify import MathAnswerReward
from dppo_kernels.trainers.rewards.tabular import HierarchicalReward, hierarchical_reward

__all__ = ["HierarchicalReward", "MathAnswerReward", "SoftOverlongPenalty", "hierarchical_reward"]
