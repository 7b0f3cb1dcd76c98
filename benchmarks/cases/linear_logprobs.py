"""Log-probs of sampled tokens from hidden states and the lm_head: ours, TRL, Liger, CCE, full logits, compiled full logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape

MODES = ("forward", "forward+backward")
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-4}
MAX_GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [N]
    upstream: Tensor  # [N]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape.n, shape.h, generator=g, device=device).to(dtype).requires_grad_()
    weight = (4 / shape.h**0.5 * torch.randn(shape.v, shape.h, generator=g, device=device)).to(dtype).requires_grad_()
    ids = torch.randint(0, shape.v, (shape.n,), generator=g, device=device)
    return Inputs(hidden, weight, ids, torch.randn(shape.n, generator=g, device=device))


def rows(x: Inputs, n: int) -> Inputs:
    return Inputs(x.hidden[:n], x.weight, x.ids[:n], x.upstream[:n])


def exact(x: Inputs) -> Tensor:
    return torch.log_softmax(x.hidden @ x.weight.t(), -1).gather(1, x.ids[:, None]).squeeze(1)


def ours(x: Inputs) -> Tensor:
    from dppo_kernels import linear_logprobs

    logprobs = linear_logprobs(x.hidden, x.weight, x.ids).logprobs
    assert logprobs is not None
    return logprobs


def trl(x: Inputs) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    arguments = (x.hidden, x.weight, None, x.ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    return ChunkedLogProbFunction.apply(*arguments)[0]


def liger(x: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none")


def with_tf32(provider: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The same with TF32 allowed in its forward (where Liger computes its gradients)."""

    def run(x: Any) -> Tensor:
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return provider(x)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed

    return run


def cce(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none", impl="cce")


def naive(x: Inputs) -> Tensor:
    logits = torch.nn.functional.linear(x.hidden, x.weight).float()
    return torch.log_softmax(logits, -1).gather(1, x.ids[:, None]).squeeze(1)


@functools.cache
def _compiled_naive():  # type: ignore[no-untyped-def]
    return torch.compile(naive, dynamic=False)


def compiled(x: Inputs) -> Tensor:
    return _compiled_naive()(x)


PROVIDERS = {
    "dppo_kernels": ours,
    "trl": trl,
    "liger": liger,
    "liger tf32": with_tf32(liger),
    "cce": cce,
    "naive": naive,
    "torch.compile": compiled,
}
KEEPS_LOGITS = ("naive", "torch.compile")


def work(shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
    """2 NHV a projection; full logits need no recomputation in the backward."""
    backward = 4 if provider in KEEPS_LOGITS else 6
    return float((2 if mode == "forward" else 2 + backward) * shape.n * shape.h * shape.v), "flop"


def needs_bytes(shape: Shape, provider: str) -> int:
    return 3 * 4 * shape.n * shape.v if provider in KEEPS_LOGITS else 0
