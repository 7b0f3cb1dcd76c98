"""Distillation from logits that already exist: ours, TRL, the formula as it is usually written, and that compiled."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import DISTILL_LOSSES, OURS
from benchmarks.cases.linear_distill_loss import BETAS, divergence
from benchmarks.shapes import Shape


class Inputs(NamedTuple):
    student: Tensor  # [N, V]
    teacher: Tensor  # [N, V]
    upstream: Tensor  # scalar


def ours(x: Inputs, kind: str) -> Tensor:
    from dppo_kernels import distill_loss

    mask = torch.ones(x.student.shape[0], dtype=torch.bool, device=x.student.device)
    return distill_loss(x.student, x.teacher, mask, kind=kind)[0]


def naive(x: Inputs, kind: str) -> Tensor:
    return divergence(x.student, x.teacher, kind)


def trl(x: Inputs, kind: str) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(x.student, x.teacher, beta=BETAS[kind])


@functools.cache
def _compiled_naive():  # type: ignore[no-untyped-def]
    return torch.compile(naive, dynamic=False)


def compiled(x: Inputs, kind: str) -> Tensor:
    return _compiled_naive()(x, kind)


@dataclass(frozen=True)
class Variant:
    """A case: the same providers of one kind."""

    kind: str

    MODES: ClassVar = ("forward", "forward+backward")
    MAX_ERROR: ClassVar = {torch.float32: 1e-4, torch.bfloat16: 1e-4}
    # Of the JSD: models this far apart have small gradients, differences of numbers around log 2. Torch is off by 5e-4.
    MAX_GRADIENT_ERROR: ClassVar = {torch.float32: 5e-5, torch.bfloat16: 5e-3}

    @functools.cached_property
    def PROVIDERS(self) -> dict[str, Callable[[Inputs], Tensor]]:
        functions = {OURS: ours, "trl": trl, "naive": naive, "torch.compile": compiled}
        return {name: functools.partial(function, kind=self.kind) for name, function in functions.items()}

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        student, teacher = (
            torch.empty(shape.n, shape.v, dtype=dtype, device=device).normal_(0, 4, generator=g) for _ in range(2)
        )
        return Inputs(student.requires_grad_(), teacher, torch.ones((), device=device))

    def rows(self, x: Inputs, n: int) -> Inputs:
        return x._replace(student=x.student[:n], teacher=x.teacher[:n])

    def exact(self, x: Inputs) -> Tensor:
        return naive(x, self.kind)

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        """Both models' logits read once forward; read once more and a gradient written once backward."""
        return float((2 if mode == "forward" else 5) * shape.n * shape.v * dtype.itemsize), "byte"

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        return (2 if provider == OURS else 7) * 4 * shape.n * shape.v


VARIANTS = dict(zip(DISTILL_LOSSES, map(Variant, ("forward_kl", "reverse_kl", "jsd")), strict=True))
