"""``dppo demo``: real learning on a CPU in minutes. GRPO's clipping against DPPO's trust region from the same start."""

from dppo_kernels.trainers.demo.run import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
