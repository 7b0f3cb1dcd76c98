"""What a rollout records per token: the K best ids, their log-probs and the sampled token's, from logits that are read once.

`topk_logprobs_ascending` sorts every row: each token beats all before it, the worst case of a search for the K best.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape

K = 20


class Inputs(NamedTuple):
    logits: Tensor  # [N, V]
    ids: Tensor  # [N]
    upstream: Tensor  # unused: no gradient flows


def ours(x: Inputs) -> Tensor:
    from dppo_kernels import topk_logprobs

    top = topk_logprobs(x.logits, x.ids, K)
    return torch.cat([top.logprobs[:, :K], top.sampled_logprobs[:, None]], 1)


def naive(x: Inputs) -> Tensor:
    return _by_log_softmax(x.logits.float(), x.ids)


def in_dtype(x: Inputs) -> Tensor:
    """Log-probs in the dtype of the logits: faster, and rounded to it."""
    return _by_log_softmax(x.logits, x.ids)


def _by_log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    logprobs = torch.log_softmax(logits, -1)
    return torch.cat([logprobs.topk(K, -1).values, logprobs.gather(1, ids[:, None])], 1)


@dataclass(frozen=True)
class Variant:
    """See `Case`."""

    ascending: bool = False
    MODES: ClassVar = ("forward",)
    PROVIDERS: ClassVar = {"dppo_kernels": ours, "naive": naive, "naive_in_dtype": in_dtype}
    MAX_ERROR: ClassVar = {torch.float32: 3e-6, torch.bfloat16: 3e-6}
    MAX_GRADIENT_ERROR: ClassVar = dict.fromkeys(MAX_ERROR, 0.0)  # nothing is trained

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        logits = torch.empty(shape.n, shape.v, dtype=dtype, device=device).normal_(0, 3, generator=g)
        if self.ascending:
            for part in logits.split(64):
                part.copy_(part.sort(dim=1).values)
        return Inputs(logits, torch.randint(0, shape.v, (shape.n,), generator=g, device=device), logits.new_empty(0))

    def rows(self, x: Inputs, n: int) -> Inputs:
        return Inputs(x.logits[:n], x.ids[:n], x.upstream)

    def exact(self, x: Inputs) -> Tensor:
        return _by_log_softmax(x.logits, x.ids)

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        return float(shape.n * shape.v * dtype.itemsize), "byte"

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        return 0 if provider == "dppo_kernels" else 8 * shape.n * shape.v


VARIANTS = {"topk_logprobs": Variant(), "topk_logprobs_ascending": Variant(ascending=True)}
