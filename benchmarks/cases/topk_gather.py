"""What DPPO's top-K divergences score: the sampled token and 20 gathered ids a row, against full logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import linear_logprobs
from benchmarks.cases.linear_logprobs import needs_bytes, work
from benchmarks.shapes import Shape

__all__ = ["MAX_ERROR", "MAX_GRADIENT_ERROR", "MODES", "PROVIDERS", "exact", "inputs", "needs_bytes", "rows", "work"]

K = 20
MODES = linear_logprobs.MODES
MAX_ERROR = linear_logprobs.MAX_ERROR
MAX_GRADIENT_ERROR = linear_logprobs.MAX_GRADIENT_ERROR


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [N, K + 1]: the sampled token, then the gathered ids
    upstream: Tensor  # [N, K + 1]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    base = linear_logprobs.inputs(shape, dtype, device)
    g = torch.Generator(device).manual_seed(1)
    ids = torch.cat([base.ids[:, None], torch.randint(0, shape.v, (shape.n, K), generator=g, device=device)], 1)
    return Inputs(base.hidden, base.weight, ids, torch.randn(ids.shape, generator=g, device=device))


def rows(x: Inputs, n: int) -> Inputs:
    return Inputs(x.hidden[:n], x.weight, x.ids[:n], x.upstream[:n])


def exact(x: Inputs) -> Tensor:
    return torch.log_softmax(x.hidden @ x.weight.t(), -1).gather(1, x.ids)


def ours(x: Inputs) -> Tensor:
    from dppo_kernels import linear_logprobs

    scores = linear_logprobs(x.hidden, x.weight, x.ids[:, 0], gather_ids=x.ids[:, 1:])
    assert scores.logprobs is not None
    assert scores.gathered is not None
    return torch.cat([scores.logprobs[:, None], scores.gathered], 1)


def naive(x: Inputs) -> Tensor:
    logits = torch.nn.functional.linear(x.hidden, x.weight).float()
    return torch.log_softmax(logits, -1).gather(1, x.ids)


PROVIDERS = {"dppo_kernels": ours, "naive": naive}
