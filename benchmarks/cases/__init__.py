"""One module a case; see `Case` for what each has."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.shapes import Shape

NAMES = ("linear_logprobs", "topk_gather", "token_logprobs")
OURS = "dppo_kernels"
FULL_LOGITS_LIMIT = {"cuda": 60 << 30, "cpu": 8 << 30}  # bytes; providers that need more are left out, by name


class Case(Protocol):
    """What a module of this package defines."""

    MODES: tuple[str, ...]  # "forward" (no grad) and "forward+backward"
    PROVIDERS: Mapping[str, Callable[[Any], Tensor]]  # name -> log-probs [N] or [N, K] of the inputs
    MAX_ERROR: Mapping[torch.dtype, float]  # of our log-probs against float64 of the same inputs

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any: ...

    def rows(self, x: Any, n: int) -> Any:
        """The first n rows of the inputs, detached."""

    def exact(self, x: Any) -> Tensor:
        """float64 log-probs."""

    def trained(self, x: Any) -> tuple[Tensor, ...]:
        """Inputs whose gradient the backward computes."""

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        """(amount, "flop" or "byte") that the provider's design needs."""

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        """Memory beyond the inputs that grows with N x V; 0 if none does."""


def load(name: str) -> Case:
    return importlib.import_module(f"benchmarks.cases.{name}")  # type: ignore[return-value]
