"""Prompts with verifiable answers: from files, folders, the hub, or generated on the spot."""

from dppo_kernels.trainers.data.generated import CHARACTERS, generate_problems, split_problems
from dppo_kernels.trainers.data.preferences import load_preferences
from dppo_kernels.trainers.data.prompts import MATH_TEMPLATE, load_prompts

__all__ = ["CHARACTERS", "MATH_TEMPLATE", "generate_problems", "load_preferences", "load_prompts", "split_problems"]
