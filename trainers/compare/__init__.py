"""``dppo compare``: DPO and PPO on synthetic table rows, from the same start, discriminators and number of generated tokens."""

from dppo_kernels.trainers.compare.command import run_compare, write_report
from dppo_kernels.trainers.compare.config import CompareConfig

__all__ = ["CompareConfig", "run_compare", "write_report"]
