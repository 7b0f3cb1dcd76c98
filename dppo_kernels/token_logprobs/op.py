"""Public `token_logprobs` and its custom ops ``dppo_kernels::token_logprobs*``."""

import math
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._numerics import split_temperature, stat_dtype
from dppo_kernels._row_stats import Upstream
from dppo_kernels.token_logprobs import torch_impl
from dppo_kernels.token_logprobs.reference import token_logprobs_ref

OUTPUTS = ("logprobs", "lse", "entropy")


class TokenLogprobs(NamedTuple):
    """Per-token statistics of given logits; fields that were not asked for are None."""

    logprobs: Tensor | None  # [...]
    entropy: Tensor | None  # [...] nats
    lse: Tensor | None  # [...]
    gathered: Tensor | None  # [..., K] log-probs


def token_logprobs(
    logits: Tensor,  # [..., V]
    ids: Tensor,  # [...]
    *,
    gather_ids: Tensor | None = None,  # [..., K]
    temperature: float | Tensor = 1.0,  # scalar or [...]
    ignore_index: int = -100,
    outputs: Sequence[str] = ("logprobs",),
    inplace_backward: bool = False,
    backend: str | None = None,
    check_values: bool = False,
) -> TokenLogprobs:
    """Log-probs, entropy, LSE and gathered log-probs of logits that already exist.

    Args:
        logits: [..., V], -inf is allowed. Any strides: not copied as long as the leading dimensions fold into two, as those of
            ``logits[:, :-1]`` do.
        ids: [...] int32/int64 token ids. Rows equal to `ignore_index` give 0, get no gradient and are not read.
        gather_ids: [..., K] ids whose log-probs are wanted as well; an id < 0 gives 0 and no gradient.
        temperature: positive number, or a tensor [...] with one per row (not differentiable); ``z = logits / temperature``.
        ignore_index: marks rows to skip.
        outputs: any of "logprobs", "lse", "entropy".
        inplace_backward: write the gradient over `logits` instead of allocating another [..., V] tensor. The logits are
            destroyed by the backward, so nothing else may need them; a leaf that requires grad, a view of one, and logits
            whose elements share memory are refused.
        backend: "auto" (default: "triton" on CUDA, else "torch"), "triton", "torch" or "reference"; also set by
            ``DPPO_KERNELS_BACKEND``. float64 runs on "torch".
        check_values: check the range of ids on CUDA too (a host sync); on CPU they are always checked.

    Returns:
        `TokenLogprobs`, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, device, id, temperature, output or backend.

    Source: online softmax, Milakov & Gimelshein (arXiv 1805.02867).
    """
    _checks.check_logits(logits, "ids", ids)
    if gather_ids is not None:
        _checks.check_gather_ids(gather_ids, ids)
    _checks.check_temperature(temperature, "ids", ids)
    if isinstance(outputs, str) or (not outputs and gather_ids is None):
        raise ValueError(f"`outputs` must be a sequence naming at least one of {', '.join(OUTPUTS)}; got {outputs!r}")
    for output in outputs:
        _checks.check_choice("outputs", output, OUTPUTS)
    name = _backend.resolve("token_logprobs", backend, logits.device, logits.dtype)
    if inplace_backward:
        _check_inplace(logits, name)
    lead, vocab = ids.shape, logits.shape[-1]
    row_blocks, flat_ids = as_row_blocks(logits), ids.reshape(-1).long()
    flat_gather = None if gather_ids is None else gather_ids.reshape(flat_ids.shape[0], gather_ids.shape[-1]).long()
    row_temperature, scalar_temperature = split_temperature(temperature, flat_ids.shape[0], stat_dtype(logits.dtype))
    if name == "reference":
        if logits.device.type == "cpu" or check_values:
            _checks.check_values(flat_ids, flat_gather, row_temperature, vocab, ignore_index)
        values = token_logprobs_ref(
            logits.reshape(-1, vocab),
            flat_ids,
            flat_gather,
            scalar_temperature if row_temperature is None else row_temperature,
            ignore_index=ignore_index,
        )
    else:
        flat = torch.ops.dppo_kernels.token_logprobs(
            row_blocks,
            flat_ids,
            flat_gather,
            row_temperature,
            scalar_temperature,
            ignore_index,
            inplace_backward,
            ",".join(outputs),
            check_values,
            name,
        )
        values = dict(zip(_FIELDS, flat, strict=True))
    wanted = {key: values[key].reshape(lead) for key in outputs}
    if gather_ids is not None:
        wanted["gathered"] = values["gathered"].reshape(gather_ids.shape)
    return TokenLogprobs(**{field: wanted.get(field) for field in TokenLogprobs._fields})


_FIELDS = ("logprobs", "lse", "entropy", "gathered", "row_max", "log_sum")


@torch.library.custom_op("dppo_kernels::token_logprobs", mutates_args=())
def _forward_op(
    logits: Tensor,  # [A, B, V]: row a * B + b of the N = A B rows
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    ignore_index: int,
    inplace_backward: bool,
    outputs: str,
    check_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if logits.device.type == "cpu" or check_values:
        _checks.check_values(ids, gather_ids, row_temperature, logits.shape[2], ignore_index)
    asked = frozenset(outputs.split(","))
    values = _implementation(backend).token_logprobs_fwd(
        logits,
        ids,
        gather_ids,
        temperature if row_temperature is None else row_temperature,
        ignore_index=ignore_index,
        outputs=asked,
    )
    return _pack(values, asked, logits)


@_forward_op.register_fake
def _(logits: Tensor, ids: Tensor, gather_ids: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype = stat_dtype(logits.dtype)
    values = {name: logits.new_empty(ids.shape[0], dtype=dtype) for name in _FIELDS if name != "gathered"}
    if gather_ids is not None:
        values["gathered"] = logits.new_empty(gather_ids.shape, dtype=dtype)
    return _pack(values, frozenset(rest[-3].split(",")), logits)


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":  # imported here: the package works without Triton
        from dppo_kernels.token_logprobs import kernels

        return kernels
    return torch_impl


def _pack(values: dict[str, Tensor], asked: frozenset[str], like: Tensor) -> Any:
    empty = like.new_empty(0, dtype=stat_dtype(like.dtype))
    kept = {name: value for name, value in values.items() if name in asked or name not in OUTPUTS}
    return tuple(kept[name] if name in kept else empty.clone() for name in _FIELDS)


@torch.library.custom_op("dppo_kernels::token_logprobs_backward", mutates_args={"dlogits"})
def _backward_op(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dgathered: Tensor | None,
    logits: Tensor | None,
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
    backend: str,
    dlogits: Tensor,
) -> None:
    """`logits` None means that `dlogits` holds them and is overwritten."""
    saved = {"row_max": row_max, "log_sum": log_sum}
    if dentropy is not None:
        saved["entropy"] = entropy
    _implementation(backend).token_logprobs_bwd(
        dlogits if logits is None else logits,
        ids,
        gather_ids,
        temperature if row_temperature is None else row_temperature,
        Upstream(dlogprobs, dlse, dentropy, dgathered),
        saved,
        ignore_index=ignore_index,
        dlogits=dlogits,
    )


@_backward_op.register_fake
def _(*args: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, gather_ids, row_temperature, temperature, ignore_index, inplace, outputs, _, backend = inputs
    values = dict(zip(_FIELDS, output, strict=True))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(values["row_max"], values["log_sum"])
    ctx.save_for_backward(logits, ids, gather_ids, row_temperature, values["row_max"], values["log_sum"], values["entropy"])
    ctx.scalars, ctx.inplace = (temperature, ignore_index, backend), inplace
    ctx.outputs = outputs.split(",")


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, ids, gather_ids, *rest = ctx.saved_tensors
    by_name = dict(zip(_FIELDS, grads, strict=True))
    # A placeholder can be handed a (materialised) gradient under torch.compile; only asked-for outputs count.
    upstream = [by_name[name] if name in ctx.outputs else None for name in OUTPUTS]
    upstream.append(None if gather_ids is None else by_name["gathered"])
    dlogits = logits.detach() if ctx.inplace else torch.empty_like(logits)
    source = None if ctx.inplace else logits
    torch.ops.dppo_kernels.token_logprobs_backward(*upstream, source, ids, gather_ids, *rest, *ctx.scalars, dlogits)
    return (dlogits, *(None,) * 9)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _check_inplace(logits: Tensor, backend: str) -> None:
    """Refuse to overwrite logits that something else needs, or whose elements are not all their own."""
    reason = None
    base = logits if logits._base is None else logits._base
    # Sorted by stride, every dimension must step over all of the smaller ones; sizes of 1 step over nothing.
    dims = sorted((stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1)
    span = 1
    for stride, size in dims:
        if stride < span:
            reason = f"elements of `logits` share memory (strides {logits.stride()})"
        span = stride * (size - 1) + span
    if backend == "reference":
        reason = "backend 'reference' has none"
    elif base.is_leaf and base.requires_grad:
        reason = "`logits` is (a view of) a leaf whose values would be lost"
    elif reason is None and _fold(logits) is None:
        reason = f"the leading dimensions of `logits` must fold into two, got strides {logits.stride()}"
    if reason is not None:
        raise ValueError(f"`inplace_backward=True` is not possible: {reason}")


def _fold(x: Tensor) -> int | None:
    """How many leading dimensions fold into A, so that ``x`` views as [A, B, V]; None if no number does."""

    def folds(dims: range) -> bool:
        steps = [(x.stride(i), x.shape[i]) for i in dims if x.shape[i] != 1]
        return all(outer[0] == inner[0] * inner[1] for outer, inner in pairwise(steps))

    lead = x.dim() - 1
    return next((i for i in range(lead + 1) if folds(range(i)) and folds(range(i, lead))), None)


def as_row_blocks(x: Tensor) -> Tensor:
    """``x [..., V]`` as [A, B, V]; a view wherever there is one."""
    split = _fold(x) or 0
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:-1]), x.shape[-1])
