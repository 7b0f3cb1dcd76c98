"""The clipped value loss and its gradient on [N / 4, 16 H] values (V means nothing here): a question of memory traffic."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape

MODES = ("forward+backward",)
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-5}
MAX_GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
CLIP = 0.2


class Inputs(NamedTuple):
    values: Tensor  # [B, T]
    old_values: Tensor
    returns: Tensor
    mask: Tensor
    upstream: Tensor  # scalar


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    size = (shape.n // 4, 16 * shape.h)
    old_values, returns, moved = (torch.randn(size, generator=g, device=device) for _ in range(3))
    values = (old_values + 0.3 * moved).to(dtype).requires_grad_()
    mask = torch.rand(size, generator=g, device=device) < 0.5
    return Inputs(values, old_values.to(dtype), returns.to(dtype), mask, torch.ones((), device=device))


def rows(x: Inputs, n: int) -> Inputs:
    return Inputs(*(y[:n] for y in x[:4]), x.upstream)


def exact(x: Inputs) -> Tensor:
    clipped = torch.clamp(x.values, x.old_values - CLIP, x.old_values + CLIP)
    losses = torch.max((x.values - x.returns).square(), (clipped - x.returns).square())
    return 0.5 * (losses * x.mask).sum() / x.mask.sum()


def ours(x: Inputs) -> Tensor:
    from dppo_kernels import value_loss

    return value_loss(x.values, x.old_values, x.returns, x.mask, clip=CLIP)[0]


def naive(x: Inputs) -> Tensor:
    """Without statistics."""
    return exact(x._replace(values=x.values.float(), old_values=x.old_values.float(), returns=x.returns.float()))


PROVIDERS = {"dppo_kernels": ours, "naive": naive}


def work(shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
    """Three inputs and the mask read; the gradient written, read and written as the scaled one."""
    return 4.0 * shape.n * shape.h * (3 * dtype.itemsize + 1 + 8 + dtype.itemsize), "byte"


def needs_bytes(shape: Shape, provider: str) -> int:
    return 0
