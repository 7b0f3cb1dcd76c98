"""Top-K in one read of the logits, by the compiled extensions: allocation and checks are here, the loops in `csrc/`."""

import torch
from torch import Tensor

from dppo_kernels._tiling import pick_topk_splits
from dppo_kernels.token_logprobs.torch_impl import check_finite_maximum

TopK = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # ids, logprobs, valid [N, K+1], sampled_logprobs, lse [N]


def topk_logprobs_cpp(logits: Tensor, sampled_ids: Tensor, k: int, temperature: float | Tensor, *, check_values: bool) -> TopK:
    """`topk_logprobs_fwd` of `torch_impl`, by the C++ extension."""
    logits, row_temperature, scalar, out = _prepare(logits, k, temperature)
    torch.ops.dppo_kernels_C.topk_logprobs(logits, sampled_ids.contiguous(), row_temperature, scalar, *out)
    return _finish(logits, temperature, out, check_values)


def topk_logprobs_cuda(logits: Tensor, sampled_ids: Tensor, k: int, temperature: float | Tensor, *, check_values: bool) -> TopK:
    """The same by the CUDA extension, on the current stream; no host sync unless `check_values`."""
    logits, row_temperature, scalar, out = _prepare(logits, k, temperature)
    n, vocab = logits.shape
    with torch.cuda.device(logits.device):
        splits = pick_topk_splits(n, vocab, torch.cuda.get_device_properties(logits.device).multi_processor_count)
        workspace = (
            logits.new_empty((n, splits, k), dtype=torch.float32),  # values of each part's best
            logits.new_empty((n, splits, k), dtype=torch.int32),  # their ids
            logits.new_empty((n, splits, 2), dtype=torch.float32),  # maximum and sum of each part
        )
        stream = torch.cuda.current_stream().cuda_stream
        torch.ops.dppo_kernels_C_cuda.topk_logprobs(
            logits, sampled_ids.contiguous(), row_temperature, scalar, *out, *workspace, stream
        )
    return _finish(logits, temperature, out, check_values)


def _prepare(
    logits: Tensor, k: int, temperature: float | Tensor
) -> tuple[Tensor, Tensor | None, float, tuple[Tensor, Tensor, Tensor, Tensor]]:
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    n = logits.shape[0]
    out = (
        logits.new_empty((n, k + 1), dtype=torch.int64),
        logits.new_empty((n, k + 1), dtype=torch.float32),
        logits.new_empty(n, dtype=torch.float32),
        logits.new_empty(n, dtype=torch.float32),
    )
    if isinstance(temperature, Tensor):
        return logits, temperature.contiguous(), 1.0, out
    return logits, None, temperature, out


def _finish(
    logits: Tensor, temperature: float | Tensor, out: tuple[Tensor, Tensor, Tensor, Tensor], check_values: bool
) -> TopK:
    ids, logprobs, sampled_logprobs, lse = out
    if check_values and not bool((finite := lse.isfinite()).all()):
        row = int((~finite).nonzero()[0])
        divisor = temperature[row] if isinstance(temperature, Tensor) else temperature
        check_finite_maximum((logits[row : row + 1].float() / divisor).amax(1), row)
    return ids, logprobs, ids >= 0, sampled_logprobs, lse
