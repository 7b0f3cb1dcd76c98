"""Public `topk_logprobs` and its custom op ``dppo_kernels::topk_logprobs``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._numerics import split_temperature, stat_dtype
from dppo_kernels.token_logprobs.reference import topk_logprobs_ref
from dppo_kernels.token_logprobs.topk_native import topk_logprobs_cpp, topk_logprobs_cuda
from dppo_kernels.token_logprobs.torch_impl import check_finite_maximum, topk_logprobs_fwd

MAX_K = 128


class TopKLogprobs(NamedTuple):
    """Top-K log-probs with the sampled token injected: K + 1 columns, no id twice."""

    ids: Tensor  # [..., K+1] int64; column K is -1 where the sampled token is among the top K
    logprobs: Tensor  # [..., K+1]; 0 where `valid` is False
    valid: Tensor  # [..., K+1] bool
    sampled_logprobs: Tensor  # [...]
    lse: Tensor  # [...]


def topk_logprobs(
    logits: Tensor,  # [..., V]
    sampled_ids: Tensor,  # [...]
    k: int,
    *,
    temperature: float | Tensor = 1.0,  # scalar or [...]
    backend: str | None = None,
    check_values: bool = False,
) -> TopKLogprobs:
    """What a rollout must record for top-K divergences: the K most likely ids, the sampled one, and their log-probs.

    Columns 0..K-1 are ordered by (value descending, id ascending). Column K holds the sampled token if it is outside the top K,
    else id -1, log-prob 0, ``valid`` False: so every id appears once. No gradient flows.

    Args:
        logits: [..., V] raw logits; -inf is allowed, a row whose maximum is not finite is refused with its number.
        sampled_ids: [...] int32/int64 ids of the sampled tokens.
        k: 1 <= k <= min(V, 128).
        temperature: positive number, or a tensor [...] with one per row; log-probs are those of ``logits / temperature``.
        backend: "auto" (default: "cuda" or "cpp" where that extension is built, else "torch"), "cuda", "cpp", "torch" or
            "reference"; also set by ``DPPO_KERNELS_BACKEND``. float64 runs on "torch".
        check_values: check ids and logits on CUDA too (a host sync); on CPU they are always checked.

    Returns:
        `TopKLogprobs`, log-probs in float32 (float64 for float64 inputs), over the full vocabulary (not renormalised).

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, device, id, k, temperature, backend, or logits.

    Source: DPPO (arXiv 2602.04879), A' = TopK(mu, K) + {y_t}.
    """
    _checks.check_logits(logits, "sampled_ids", sampled_ids)
    _checks.check_temperature(temperature, "sampled_ids", sampled_ids)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"`k` must be an int, got {type(k).__name__}")
    vocab = logits.shape[-1]
    if not 1 <= k <= min(vocab, MAX_K):
        raise ValueError(f"`k` must be in [1, min(V, {MAX_K})] = [1, {min(vocab, MAX_K)}], got {k}")
    name = _backend.resolve("topk_logprobs", backend, logits.device, logits.dtype)
    lead = sampled_ids.shape
    flat_logits, flat_ids = logits.detach().reshape(-1, vocab), sampled_ids.reshape(-1).long()
    row_temperature, scalar_temperature = split_temperature(temperature, flat_ids.shape[0], stat_dtype(logits.dtype))
    if name == "reference":
        row_or_scalar = scalar_temperature if row_temperature is None else row_temperature
        if logits.device.type == "cpu" or check_values:
            _checks.check_values(flat_ids, None, row_temperature, vocab, None, ids_name="sampled_ids")
            check_finite_maximum(flat_logits.amax(1).to(stat_dtype(logits.dtype)) / row_or_scalar, 0)
        flat = topk_logprobs_ref(flat_logits, flat_ids, k, row_or_scalar)
    else:
        flat = torch.ops.dppo_kernels.topk_logprobs(
            flat_logits, flat_ids, k, row_temperature, scalar_temperature, check_values, name
        )
    return TopKLogprobs(*(value.reshape((*lead, *value.shape[1:])) for value in flat))


@torch.library.custom_op("dppo_kernels::topk_logprobs", mutates_args=())
def _topk_op(
    logits: Tensor,  # [N, V]
    sampled_ids: Tensor,  # [N]
    k: int,
    row_temperature: Tensor | None,
    temperature: float,
    check_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check = logits.device.type == "cpu" or check_values
    if check:
        _checks.check_values(sampled_ids, None, row_temperature, logits.shape[1], None, ids_name="sampled_ids")
    run = {"cuda": topk_logprobs_cuda, "cpp": topk_logprobs_cpp, "torch": topk_logprobs_fwd}[backend]
    row_or_scalar = temperature if row_temperature is None else row_temperature
    return run(logits, sampled_ids, k, row_or_scalar, check_values=check)


@_topk_op.register_fake
def _(logits: Tensor, sampled_ids: Tensor, k: int, *rest: Any) -> tuple[Tensor, ...]:
    n, dtype = logits.shape[0], stat_dtype(logits.dtype)
    columns, rows = logits.new_empty((n, k + 1), dtype=dtype), logits.new_empty(n, dtype=dtype)
    ids = sampled_ids.new_empty(n, k + 1)
    return ids, columns, torch.empty_like(ids, dtype=torch.bool), rows, torch.empty_like(rows)
