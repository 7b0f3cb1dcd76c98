"""``dppo compare``: DPO and PPO on synthetic table rows, from the same start, discriminators and number of generated tokens."""

try:
    import matplotlib  # noqa: F401  (said now, and not when the figure is drawn)
except ImportError as error:
    raise ImportError("dppo_kernels.trainers.compare needs matplotlib: pip install 'dppo-kernels[demo]'") from error

from dppo_kernels.trainers.compare.command import run_compare, write_report
from dppo_kernels.trainers.compare.config import CompareConfig

__all__ = ["CompareConfig", "run_compare", "write_report"]
