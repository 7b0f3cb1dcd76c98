"""Distillation from hidden states and two lm_heads, forward and backward: ours, TRL, Liger, full logits, compiled full logits.

Variants of one loss: the forward KL, the reverse KL and the JSD with a trained head, and the forward KL with a frozen one. The
teacher is half as wide again as the student, and about as sure of itself.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import LINEAR_DISTILL_LOSSES, OURS
from benchmarks.cases.linear_logprobs import KEEPS_LOGITS, with_tf32
from benchmarks.shapes import Shape

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, 3 H / 2]
    teacher_weight: Tensor  # [V, 3 H / 2]
    upstream: Tensor  # scalar


def teacher_width(shape: Shape) -> int:
    return 3 * shape.h // 2


def ours(x: Inputs, kind: str) -> Tensor:
    from dppo_kernels import linear_distill_loss

    mask = torch.ones(x.hidden.shape[0], dtype=torch.bool, device=x.hidden.device)
    return linear_distill_loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, mask, kind=kind, beta=BETAS["jsd"])[0]


def trl(x: Inputs, kind: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    arguments = (x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, BETAS[kind])
    return ChunkedDivergenceFunction.apply(*arguments)[0].mean()


def liger(x: Inputs, kind: str) -> Tensor:
    """The soft loss alone, which is ours; the loss of labels that it always computes is weighted by 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[kind])
    labels = torch.zeros(x.hidden.shape[0], dtype=torch.long, device=x.hidden.device)
    return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels)


def naive(x: Inputs, kind: str) -> Tensor:
    student = torch.nn.functional.linear(x.hidden, x.weight)
    return divergence(student, torch.nn.functional.linear(x.teacher_hidden, x.teacher_weight), kind)


def divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Of logits, the mean over rows, as it is usually written; 16-bit logits are upcast."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q, log_p = torch.log_softmax(student.to(dtype), -1), torch.log_softmax(teacher.to(dtype), -1)
    kl_div = functools.partial(torch.nn.functional.kl_div, reduction="batchmean", log_target=True)
    if kind == "forward_kl":
        return kl_div(log_q, log_p)
    if kind == "reverse_kl":
        return kl_div(log_p, log_q)
    beta = BETAS[kind]
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl_div(log_m, log_p) + (1 - beta) * kl_div(log_m, log_q)


@functools.cache
def _compiled_naive():  # type: ignore[no-untyped-def]
    return torch.compile(naive, dynamic=False)


def compiled(x: Inputs, kind: str) -> Tensor:
    return _compiled_naive()(x, kind)


@dataclass(frozen=True)
class Variant:
    """A case: the same providers of one kind."""

    kind: str
    trains_head: bool = True

    MODES: ClassVar = ("forward+backward",)
    MAX_ERROR: ClassVar = {torch.float32: 1e-4, torch.bfloat16: 1e-4}
    # Of the JSD: models this far apart have small gradients, differences of numbers around log 2. Torch is off by 6e-4.
    MAX_GRADIENT_ERROR: ClassVar = {torch.float32: 5e-5, torch.bfloat16: 5e-3}

    @functools.cached_property
    def PROVIDERS(self) -> dict[str, Callable[[Inputs], Tensor]]:
        functions = {OURS: ours, "trl": trl, "liger": liger, "naive": naive, "torch.compile": compiled}
        found = {name: functools.partial(function, kind=self.kind) for name, function in functions.items()}
        return found | {"liger tf32": with_tf32(found["liger"])}

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)

        def model(width: int) -> tuple[Tensor, Tensor]:
            hidden = torch.randn(shape.n, width, generator=g, device=device).to(dtype)
            return hidden, (4 / width**0.5 * torch.randn(shape.v, width, generator=g, device=device)).to(dtype)

        hidden, weight = model(shape.h)
        weight.requires_grad_(self.trains_head)
        return Inputs(hidden.requires_grad_(), weight, *model(teacher_width(shape)), torch.ones((), device=device))

    def rows(self, x: Inputs, n: int) -> Inputs:
        return x._replace(hidden=x.hidden[:n], teacher_hidden=x.teacher_hidden[:n])

    def exact(self, x: Inputs) -> Tensor:
        return naive(x, self.kind)

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        """2 N V a product and unit of width: TRL projects both models again in its backward, and in its forward for the JSD."""
        both = shape.h + teacher_width(shape)
        projections = 1 if provider != "trl" else 3 if self.kind == "jsd" else 2
        # Liger computes the head's gradient in any case.
        gradients = 1 + (self.trains_head or provider.startswith("liger"))
        return 2.0 * shape.n * shape.v * (projections * both + gradients * shape.h), "flop"

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        return 6 * 4 * shape.n * shape.v if provider in KEEPS_LOGITS else 0


VARIANTS = dict(
    zip(
        LINEAR_DISTILL_LOSSES,
        (Variant("forward_kl"), Variant("reverse_kl"), Variant("jsd"), Variant("forward_kl", trains_head=False)),
        strict=True,
    )
)
