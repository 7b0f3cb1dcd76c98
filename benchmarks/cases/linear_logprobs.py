"""linear_logprobs against TRL's chunked log-prob function and full logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Provider
from benchmarks.shapes import Shape

FULL_LOGITS_LIMIT = 8 << 30  # bytes; beyond it naive torch is left out


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [N]
    upstream: Tensor  # [N]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.n, shape.h, generator=g).to(device, dtype).requires_grad_()
    weight = (4 / shape.h**0.5 * torch.randn(shape.v, shape.h, generator=g)).to(device, dtype).requires_grad_()
    ids = torch.randint(0, shape.v, (shape.n,), generator=g).to(device)
    return Inputs(hidden, weight, ids, torch.randn(shape.n, generator=g).to(device))


def dppo_kernels_logprobs(x: Inputs) -> Tensor:
    from dppo_kernels import linear_logprobs

    logprobs = linear_logprobs(x.hidden, x.weight, x.ids).logprobs
    assert logprobs is not None
    return logprobs


def trl_logprobs(x: Inputs) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    arguments = (x.hidden, x.weight, None, x.ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    return ChunkedLogProbFunction.apply(*arguments)[0]


def naive_logprobs(x: Inputs) -> Tensor:
    logits = torch.nn.functional.linear(x.hidden, x.weight).float()
    return torch.log_softmax(logits, -1).gather(1, x.ids[:, None]).squeeze(1)


LOGPROBS = {"dppo_kernels": dppo_kernels_logprobs, "trl": trl_logprobs, "naive": naive_logprobs}


def providers(x: Inputs, mode: str) -> dict[str, Provider]:
    """Callables by name for "forward" (no grad) or "forward+backward" (hidden and weight trained)."""
    n, v = x.hidden.shape[0], x.weight.shape[0]
    names = [name for name in LOGPROBS if name != "naive" or 3 * 4 * n * v <= FULL_LOGITS_LIMIT]

    def forward(name: str) -> Provider:
        return torch.no_grad()(lambda: LOGPROBS[name](x))

    def both(name: str) -> Provider:
        return lambda: torch.autograd.grad(LOGPROBS[name](x), (x.hidden, x.weight), x.upstream)

    return {name: forward(name) if mode == "forward" else both(name) for name in names}


def flops(shape: Shape, mode: str, provider: str) -> float:
    """Per call; full logits need no recomputation in the backward."""
    backward = 4 if provider == "naive" else 6
    return (2 if mode == "forward" else 2 + backward) * shape.n * shape.h * shape.v


def verify(x: Inputs) -> dict[str, float]:
    """Largest log-prob error of each provider against float64 of the same inputs, over the first 64 rows."""
    rows = x._replace(hidden=x.hidden[:64].detach(), weight=x.weight.detach(), ids=x.ids[:64])
    exact = torch.log_softmax(rows.hidden.double() @ rows.weight.double().t(), -1).gather(1, rows.ids[:, None]).squeeze(1)
    with torch.no_grad():
        return {name: (logprobs(rows).double() - exact).abs().max().item() for name, logprobs in LOGPROBS.items()}
