"""Rewards and values -> advantages and returns (generalised advantage estimation)."""

from dppo_kernels.gae.op import Gae, gae

__all__ = ["Gae", "gae"]
