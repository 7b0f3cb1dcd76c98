"""Thin trainers on TRL. They need the ``trl`` extra; `dppo_kernels` itself does not."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dppo_kernels.trainers.accelerate import accelerate_trl
    from dppo_kernels.trainers.dapo import DAPOConfig, DAPOTrainer
    from dppo_kernels.trainers.decoupled_ppo import DecoupledPPOTrainer
    from dppo_kernels.trainers.distill_ppo import DistillPPOTrainer
    from dppo_kernels.trainers.distill_ppo_config import DistillPPOConfig
    from dppo_kernels.trainers.dpo import DPOConfig, DPOTrainer
    from dppo_kernels.trainers.dppo import DPPOConfig, DPPOTrainer
    from dppo_kernels.trainers.pairs import make_pairs
    from dppo_kernels.trainers.pairs_config import PairsConfig
    from dppo_kernels.trainers.ppo import PPOTrainer
    from dppo_kernels.trainers.ppo_config import DecoupledPPOConfig, PPOConfig

__all__ = [
    "DAPOConfig",
    "DAPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DPPOConfig",
    "DPPOTrainer",
    "DecoupledPPOConfig",
    "DecoupledPPOTrainer",
    "DistillPPOConfig",
    "DistillPPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PairsConfig",
    "accelerate_trl",
    "make_pairs",
]

_MODULES = {
    "DAPOConfig": "dapo",
    "DAPOTrainer": "dapo",
    "DPOConfig": "dpo",
    "DPOTrainer": "dpo",
    "DPPOConfig": "dppo",
    "DPPOTrainer": "dppo",
    "DecoupledPPOConfig": "ppo_config",
    "DecoupledPPOTrainer": "decoupled_ppo",
    "DistillPPOConfig": "distill_ppo_config",
    "DistillPPOTrainer": "distill_ppo",
    "PPOConfig": "ppo_config",
    "PPOTrainer": "ppo",
    "PairsConfig": "pairs_config",
    "accelerate_trl": "accelerate",
    "make_pairs": "pairs",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `dppo doctor` and the rewards must work where TRL is missing.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    importlib.import_module(f"{__name__}._trl_seam")  # first: it says which package is missing or of the wrong version
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
