"""One module a case; see `Case` for what each has."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.shapes import Shape

POLICY_LOSSES = tuple(f"linear_policy_loss{variant}" for variant in ("", "_half", "_frozen", "_topk"))
TOPK = ("topk_logprobs", "topk_logprobs_ascending")
GAE = ("gae", "gae_full")
LINEAR_DISTILL_LOSSES = tuple(f"linear_distill_loss_{variant}" for variant in ("forward_kl", "reverse_kl", "jsd", "frozen"))
DISTILL_LOSSES = tuple(f"distill_loss_{kind}" for kind in ("forward_kl", "reverse_kl", "jsd"))
DISTILLATION = (*LINEAR_DISTILL_LOSSES, *DISTILL_LOSSES)
PREFERENCE_LOSSES = tuple(f"linear_preference_loss{variant}" for variant in ("", "_metrics", "_frozen"))
LOSSES = (*POLICY_LOSSES, *GAE, "value_loss", *DISTILLATION, *PREFERENCE_LOSSES)
NAMES = ("linear_logprobs", "topk_gather", "token_logprobs", *TOPK, *LOSSES)
# Modules that hold more than one case.
_VARIANTS = (
    dict.fromkeys(POLICY_LOSSES, "linear_policy_loss")
    | dict.fromkeys(TOPK, "topk_logprobs")
    | dict.fromkeys(GAE, "gae")
    | dict.fromkeys(LINEAR_DISTILL_LOSSES, "linear_distill_loss")
    | dict.fromkeys(DISTILL_LOSSES, "distill_loss")
    | dict.fromkeys(PREFERENCE_LOSSES, "linear_preference_loss")
)
OURS = "dppo_kernels"
FULL_LOGITS_LIMIT = {"cuda": 60 << 30, "cpu": 8 << 30}  # bytes; providers that need more are left out, by name


class Case(Protocol):
    """What a module of this package defines, or one of its variants."""

    MODES: tuple[str, ...]  # "forward" (no grad) and "forward+backward"
    PROVIDERS: Mapping[str, Callable[[Any], Tensor]]  # name -> log-probs [N] or [N, K], or the loss, of the inputs
    MAX_ERROR: Mapping[torch.dtype, float]  # of our values against float64 of the same inputs
    MAX_GRADIENT_ERROR: Mapping[torch.dtype, float]  # the same, relative, of our gradients

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
        """A NamedTuple of tensors: `upstream`, the gradient that arrives at the values, and what they are a function of.

        The backward computes the gradients of those that require one.
        """

    def rows(self, x: Any, n: int) -> Any:
        """The inputs cut to n rows."""

    def exact(self, x: Any) -> Tensor:
        """The values, differentiable, in the precision of the inputs."""

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        """(amount, "flop" or "byte") that the provider's design needs."""

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        """Memory beyond the inputs that grows with N x V; 0 if none does."""


def load(name: str) -> Case:
    module = importlib.import_module(f"benchmarks.cases.{_VARIANTS.get(name, name)}")
    return module.VARIANTS[name] if name in _VARIANTS else module  # type: ignore[return-value]
