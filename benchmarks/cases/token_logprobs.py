"""Log-probs of sampled tokens from logits that already exist: bandwidth, one read forward, one read and one write backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape

MODES = ("forward", "forward+backward")
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-4}
MAX_GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


class Inputs(NamedTuple):
    logits: Tensor  # [N, V]
    ids: Tensor  # [N]
    upstream: Tensor  # [N]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape.n, shape.v, dtype=dtype, device=device).normal_(0, 4, generator=g).requires_grad_()
    ids = torch.randint(0, shape.v, (shape.n,), generator=g, device=device)
    return Inputs(logits, ids, torch.randn(shape.n, generator=g, device=device))


def rows(x: Inputs, n: int) -> Inputs:
    return Inputs(x.logits[:n], x.ids[:n], x.upstream[:n])


def exact(x: Inputs) -> Tensor:
    return torch.log_softmax(x.logits, -1).gather(1, x.ids[:, None]).squeeze(1)


def ours(x: Inputs) -> Tensor:
    from dppo_kernels import token_logprobs

    logprobs = token_logprobs(x.logits, x.ids).logprobs
    assert logprobs is not None
    return logprobs


def trl(x: Inputs) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(x.logits, x.ids).float()


def naive(x: Inputs) -> Tensor:
    return torch.log_softmax(x.logits.float(), -1).gather(1, x.ids[:, None]).squeeze(1)


PROVIDERS = {"dppo_kernels": ours, "trl": trl, "naive": naive}


def work(shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
    """Logits read once forward; read once more and their gradient written once backward."""
    return float((1 if mode == "forward" else 3) * shape.n * shape.v * dtype.itemsize), "byte"


def needs_bytes(shape: Shape, provider: str) -> int:
    return (3 if provider == "naive" else 2) * 4 * shape.n * shape.v
