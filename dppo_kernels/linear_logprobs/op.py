"""Public `linear_logprobs` and its custom ops ``dppo_kernels::linear_logprobs{,_backward,_unit_backward}``."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._lora import LoraWeight, split_head
from dppo_kernels._numerics import autocast_dtype, compute_dtype_of, split_temperature, stat_dtype
from dppo_kernels._row_stats import OUTPUTS, Upstream
from dppo_kernels._shard import VocabShard, check_ranks, encode, is_dtensor, local_ids, nominal_vocab, take_shard, whole_head
from dppo_kernels._tiling import DEFAULT_WORKSPACE_BYTES, TARGET_ROWS, kind_of
from dppo_kernels.linear_logprobs import groups_torch, torch_impl, unit_gradient
from dppo_kernels.linear_logprobs.design import Design, choose_design
from dppo_kernels.linear_logprobs.groups import GroupResult, GroupTask, two_pass
from dppo_kernels.linear_logprobs.projection import Gradients, Needs, Projection
from dppo_kernels.linear_logprobs.reference import linear_logprobs_ref

if TYPE_CHECKING:  # not in builds of torch without it
    from torch.distributed import ProcessGroup


class LinearLogprobs(NamedTuple):
    """Per-token statistics of the lm_head's distribution; fields that were not asked for are None."""

    logprobs: Tensor | None  # [...]
    entropy: Tensor | None  # [...] nats
    lse: Tensor | None  # [...]
    gathered: Tensor | None  # [..., K] log-probs
    log_sum_sq_probs: Tensor | None  # [...] log sum_v p_v^2, no gradient
    mean_logits: Tensor | None  # [...] no gradient
    is_top1: Tensor | None  # [...] bool


def linear_logprobs(
    hidden: Tensor,  # [..., H]
    weight: Tensor | LoraWeight,  # [V, H]
    ids: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    gather_ids: Tensor | None = None,  # [..., K]
    temperature: float | Tensor = 1.0,  # scalar or [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = ("logprobs",),
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    check_values: bool = False,
) -> LinearLogprobs:
    """Log-probs, entropy and LSE of ``hidden @ weight.T`` at chosen ids, without a tensor of N x V.

    ``z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature``; without soft-cap
    ``z = logit_scale * (h W^T + b) / temperature``. ``logprobs = z[id] - logsumexp(z)``, ``entropy = -sum p log p``. Log-prob,
    entropy, LSE and gathered log-probs are differentiable in hidden, weight and bias; any of the three may be frozen.

    Where only hidden is trained, the forward saves the gradient of the log-probs, [N, H] (4 NHV FLOPs in all; recomputing
    takes 6), and the backward multiplies no matrices. A gradient at the entropy recomputes all the same: pass
    ``workspace_bytes=0`` if there will be one, or if fewer than half of the rows will have a gradient.
    `explain_linear_logprobs` says what serves a call. Designs agree to rounding, not in every bit.

    Args:
        hidden: [..., H] hidden states, already shifted: row t predicts ``ids[t]``.
        weight: [V, H] lm_head, of hidden's dtype (under autocast: any; both are rounded to the autocast dtype), or a
            `LoraWeight`, whose sum with its update is never made.
        ids: [...] int32/int64 token ids. Rows equal to `ignore_index` give 0, get no gradient and enter no GEMM.
        bias: [V] lm_head bias.
        gather_ids: [..., K] ids whose log-probs are wanted as well; an id < 0 gives 0 and no gradient.
        temperature: positive number, or a tensor [...] with one per row (not differentiable).
        logit_scale: multiplies the projection before soft-capping (Cohere ``logit_scale``, Granite ``1 / logits_scaling``).
        softcap: Gemma-style soft-cap of the logits.
        outputs: any of "logprobs", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; the last three carry no
            gradient. Outputs not asked for are None and cost nothing.
        process_group: ranks among which the head is shared out along V (tensor parallelism). `weight` and `bias` are then this
            rank's rows, even or uneven shards, or DTensors with ``Shard(0)`` over the group; all else is the same on all ranks,
            and so are the results. Ranks exchange a few numbers per row (see docs/scaling.md), and the gradient of `hidden`,
            which is complete on every rank. It must be called on all ranks of the group, like its backward.
        vocab_start: the id of this rank's first row; of a DTensor it is known.
        vocab_size: V, which all ranks hold together. Rows of ids from there on are padding and count for nothing.
        workspace_bytes: memory that may save work. Only hidden trained: bound of the chunk of exponentials that exists during
            the forward (default 40 MiB on CPU, 512 MiB on CUDA). Head trained: logits that are kept until the backward, whose
            rows then cost 6 NHV instead of 8 (default 0; "torch" only). 0 keeps nothing and recomputes.
        backend: "auto" (default: "triton" on CUDA, else "torch"), "triton", "torch" or "reference"; also set by
            ``DPPO_KERNELS_BACKEND``. float64 runs on "torch".
        check_values: check the range of ids on CUDA too (a host sync); on CPU they are always checked.

    Returns:
        `LinearLogprobs`, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, device, id, temperature, output, workspace or backend.

    Source: online softmax, Milakov & Gimelshein (arXiv 1805.02867); recomputed tiles, Wijmans et al. (arXiv 2411.09009).
    """
    weight, bias, shard = take_shard(weight, bias, process_group, vocab_start, vocab_size)
    check_linear_arguments(hidden, weight, ids, bias, gather_ids, temperature, logit_scale, softcap)
    if isinstance(outputs, str) or (not outputs and gather_ids is None):
        raise ValueError(f"`outputs` must be a sequence naming at least one of {', '.join(OUTPUTS)}; got {outputs!r}")
    for output in outputs:
        _checks.check_choice("outputs", output, OUTPUTS)
    _checks.check_workspace_bytes(workspace_bytes)
    compute_dtype = compute_dtype_of(hidden)
    name = _backend.resolve("linear_logprobs", backend, hidden.device, compute_dtype)
    lead, hidden_size = ids.shape, hidden.shape[-1]
    hidden = hidden.reshape(-1, hidden_size)
    ids = ids.reshape(-1).long()
    weight, low_hidden, low_weight = split_head(weight, hidden, ids != ignore_index, compute_dtype)
    if gather_ids is not None:
        gather_ids = gather_ids.reshape(ids.shape[0], gather_ids.shape[-1]).long()
    row_temperature, scalar_temperature = split_temperature(temperature, ids.shape[0], stat_dtype(compute_dtype))

    if name == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.device.type == "cpu" or check_values:
                check_ranks(shard, ids.shape[0], hidden.device)
            head, bias, low_weight = whole_head(shard, weight, bias, low_weight)
            if hidden.device.type == "cpu" or check_values:
                _checks.check_values(ids, gather_ids, row_temperature, head.shape[0], ignore_index)
            # NaN in an ignored row would reach the head's gradient.
            hidden = torch.where((ids != ignore_index)[:, None], hidden, 0.0)
            values = linear_logprobs_ref(
                hidden.to(compute_dtype),
                head.to(compute_dtype),
                bias,
                ids,
                gather_ids,
                scalar_temperature if row_temperature is None else row_temperature,
                logit_scale=logit_scale,
                softcap=softcap,
                ignore_index=ignore_index,
                low_hidden=low_hidden,
                low_weight=None if low_weight is None else low_weight.to(compute_dtype),
            )
    else:
        # Above autograd: inside the op nothing requires a gradient.
        inputs = (hidden, weight, None if bias is None else bias.contiguous(), low_hidden, low_weight)
        needs = Needs(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs))
        asked = (*outputs, *(("gathered",) if gather_ids is not None else ()))
        lora = low_hidden is not None
        vocab = nominal_vocab(shard, weight.shape[0])
        design = _design(needs, asked, vocab, compute_dtype, hidden.device, lora, workspace_bytes, name)
        flat = torch.ops.dppo_kernels.linear_logprobs(
            *inputs,
            ids,
            gather_ids,
            row_temperature,
            scalar_temperature,
            logit_scale,
            softcap,
            ignore_index,
            compute_dtype,
            *encode(shard),
            ",".join(outputs),
            design.name,
            design.rows,
            check_values,
            name,
        )
        values = dict(zip(FIELDS, flat, strict=True))
    wanted = {key: values[key].reshape(lead) for key in outputs}
    if gather_ids is not None:
        wanted["gathered"] = values["gathered"].reshape(*lead, gather_ids.shape[1])
    return LinearLogprobs(**{field: wanted.get(field) for field in LinearLogprobs._fields})


def explain_linear_logprobs(
    *,
    vocab: int,
    needs_gradient: tuple[bool, bool, bool] = (True, True, False),
    outputs: Sequence[str] = ("logprobs",),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lora: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> str:
    """Which design serves a call of `linear_logprobs`, in words.

    Args:
        vocab: V.
        needs_gradient: whether hidden, weight and bias require a gradient.
        outputs: as in `linear_logprobs`, and "gathered" where `gather_ids` are given.
        dtype: of hidden and weight (under autocast: the autocast dtype).
        device: where they are.
        lora: whether the head is a `LoraWeight`; its base is what `needs_gradient` calls weight, its factors are trained.
        workspace_bytes: as in `linear_logprobs`.
        backend: as in `linear_logprobs`.
    """
    device = torch.device(device)
    for output in outputs:
        _checks.check_choice("outputs", output, (*OUTPUTS, "gathered"))
    _checks.check_workspace_bytes(workspace_bytes)
    name = _backend.resolve("linear_logprobs", backend, device, dtype)
    if name == "reference":
        return "reference: autograd through row chunks that are recomputed"
    needs = Needs(*needs_gradient, lora, lora)
    return f"{name}: {_design(needs, outputs, vocab, dtype, device, lora, workspace_bytes, name).explain()}"


def _design(
    needs: Needs,
    outputs: Sequence[str],
    vocab: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    lora: bool,
    workspace_bytes: int | None,
    backend: str,
) -> Design:
    kind = kind_of(device)
    return choose_design(
        needs=needs,
        outputs=outputs,
        vocab=vocab,
        element_size=(compute_dtype if backend == "triton" else stat_dtype(compute_dtype)).itemsize,
        exponent_range=backend != "triton" or compute_dtype != torch.float16,
        keeps=backend != "triton",
        lora=lora,
        workspace_bytes=workspace_bytes,
        default_bytes=DEFAULT_WORKSPACE_BYTES[kind],
        target_rows=TARGET_ROWS[kind],
    )


# What the forward op returns, in order. Not asked for: an empty tensor. Those of _SAVED are for the backward: the log-sum-exp
# in two parts, the unit gradient and the log-probs of target and gathered ids, logits that were kept.
_SAVED = ("row_max", "log_sum", "unit", "picked", "kept")
FIELDS = (*OUTPUTS, "gathered", *_SAVED)
_DIFFERENTIABLE = ("logprobs", "lse", "entropy", "gathered")


@torch.library.custom_op("dppo_kernels::linear_logprobs", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    group: str,
    span: Sequence[int],
    outputs: str,
    design: str,
    design_rows: int,
    check_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_or_scalar = temperature if row_temperature is None else row_temperature
    low_rank, shard = pair(low_hidden, low_weight), VocabShard.decode(group, span)
    projection = Projection(hidden, weight, bias, row_or_scalar, logit_scale, softcap, compute_dtype, low_rank, shard)
    if hidden.device.type == "cpu" or check_values:
        check_ranks(shard, ids.shape[0], hidden.device)
        _checks.check_values(ids, gather_ids, row_temperature, projection.vocab, ignore_index)
    ids, gather_ids, ignore_index = local_ids(shard, ids, gather_ids, ignore_index)
    asked = frozenset(outputs.split(","))
    with torch.autocast(hidden.device.type, enabled=False):
        if design == "unit":
            values = unit_implementation(backend)[0](
                projection,
                ids,
                gather_ids,
                ignore_index=ignore_index,
                with_entropy="entropy" in asked,
                chunk_rows=design_rows,
            )
        else:
            keep = {"keep_rows": min(design_rows, ids.shape[0])} if design == "keep" else {}
            values = implementation(backend)[0](projection, ids, gather_ids, ignore_index=ignore_index, outputs=asked, **keep)
    return _pack(values, asked, projection.dtype, hidden)


@_forward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ids: Tensor,
    gather_ids: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    compute_dtype, _, _, outputs, design, design_rows, *_ = rest[-8:]
    asked, dtype, n = frozenset(outputs.split(",")), stat_dtype(compute_dtype), ids.shape[0]
    values = {
        name: hidden.new_empty(n, dtype=torch.bool if name == "is_top1" else dtype) for name in (*OUTPUTS, "row_max", "log_sum")
    }
    if gather_ids is not None:
        values["gathered"] = hidden.new_empty(gather_ids.shape, dtype=dtype)
    if design == "unit":
        values["unit"] = hidden.new_empty(hidden.shape, dtype=dtype)
        values["picked"] = hidden.new_empty((n, 1 + (0 if gather_ids is None else gather_ids.shape[1])), dtype=dtype)
    if design == "keep":
        values["kept"] = hidden.new_empty((min(design_rows, n), weight.shape[0]), dtype=dtype)
    return _pack(values, asked, dtype, hidden)


def pair(low_hidden: Tensor | None, low_weight: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """A schema has no optional pairs."""
    return None if low_hidden is None or low_weight is None else (low_hidden, low_weight)


def implementation(backend: str) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., Gradients]]:
    """(forward, backward) of a backend."""
    if backend == "triton":  # imported here: the package works without Triton
        from dppo_kernels.linear_logprobs import kernels, kernels_bwd

        return kernels.linear_logprobs_fwd, kernels_bwd.linear_logprobs_bwd
    return torch_impl.linear_logprobs_fwd, torch_impl.linear_logprobs_bwd


def unit_implementation(backend: str) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., Tensor]]:
    """(forward, backward) of a backend for a frozen head whose unit gradient is saved."""
    if backend == "triton":
        from dppo_kernels.linear_logprobs import kernels_unit

        return kernels_unit.unit_gradient_fwd, kernels_unit.unit_gradient_bwd
    return unit_gradient.unit_gradient_fwd, unit_gradient.unit_gradient_bwd


def run_groups(task: GroupTask, backend: str) -> GroupResult:
    """A loss whose coefficients become known group by group, on a backend."""
    if task.design.name in ("score", "recompute"):
        return two_pass(task, *implementation(backend))
    if backend == "triton":
        from dppo_kernels.linear_logprobs import groups_triton

        return groups_triton.run_groups(task)
    return groups_torch.run_groups(task)


def _pack(values: dict[str, Tensor], asked: frozenset[str], dtype: torch.dtype, like: Tensor) -> Any:
    always = ("gathered", *_SAVED)
    return tuple(
        values[name]
        if name in values and (name in asked or name in always)
        else like.new_empty(0, dtype=torch.bool if name == "is_top1" else dtype)
        for name in FIELDS
    )


@torch.library.custom_op("dppo_kernels::linear_logprobs_backward", mutates_args=())
def _backward_op(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dgathered: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    kept: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    group: str,
    span: Sequence[int],
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_or_scalar = temperature if row_temperature is None else row_temperature
    low_rank, shard = pair(low_hidden, low_weight), VocabShard.decode(group, span)
    projection = Projection(hidden, weight, bias, row_or_scalar, logit_scale, softcap, compute_dtype, low_rank, shard)
    ids, gather_ids, ignore_index = local_ids(shard, ids, gather_ids, ignore_index)
    saved = {"row_max": row_max, "log_sum": log_sum}
    if dentropy is not None:
        saved["entropy"] = entropy
    if kept is not None:
        saved["kept"] = kept
    with torch.autocast(hidden.device.type, enabled=False):
        grads = implementation(backend)[1](
            projection,
            ids,
            gather_ids,
            Upstream(dlogprobs, dlse, dentropy, dgathered),
            saved,
            ignore_index=ignore_index,
            needs=tuple(needs),
        )
    return tuple(  # type: ignore[return-value]
        (hidden if x is None else x).new_empty(0) if grad is None else grad
        for grad, x in zip(grads, projection.inputs(), strict=True)
    )


@_backward_op.register_fake
def _(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dgathered: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    inputs = (hidden, weight, bias, low_hidden, low_weight)
    return tuple(
        torch.empty_like(x) if need and x is not None else (hidden if x is None else x).new_empty(0)
        for x, need in zip(inputs, rest[-1], strict=True)
    )


@torch.library.custom_op("dppo_kernels::linear_logprobs_unit_backward", mutates_args=())
def _unit_backward_op(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dgathered: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    unit: Tensor,
    picked: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    group: str,
    span: Sequence[int],
    backend: str,
) -> Tensor:
    row_or_scalar, shard = temperature if row_temperature is None else row_temperature, VocabShard.decode(group, span)
    projection = Projection(hidden, weight, None, row_or_scalar, logit_scale, softcap, compute_dtype, shard=shard)
    ids, gather_ids, ignore_index = local_ids(shard, ids, gather_ids, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        return unit_implementation(backend)[1](
            projection,
            ids,
            gather_ids,
            Upstream(dlogprobs, dlse, None, dgathered),
            {"unit": unit, "picked": picked, "row_max": row_max, "log_sum": log_sum},
            ignore_index=ignore_index,
        )


@_unit_backward_op.register_fake
def _(dlogprobs: Tensor | None, dlse: Tensor | None, dgathered: Tensor | None, hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(hidden)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    trainable, (ids, gather_ids, row_temperature, *scalars, outputs, design, _, _, backend) = inputs[:5], inputs[5:]
    values = dict(zip(FIELDS, output, strict=True))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(values[name] for name in FIELDS if name not in _DIFFERENTIABLE))
    ctx.save_for_backward(
        *trainable, *(ids, gather_ids, row_temperature, values["entropy"]), *(values[name] for name in _SAVED)
    )
    ctx.scalars, ctx.design = (*scalars, backend), design
    ctx.outputs = outputs.split(",")


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    trainable, (ids, gather_ids, row_temperature, entropy, *saved) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    row_max, log_sum, unit, picked, kept = saved
    by_name = dict(zip(FIELDS, grads, strict=True))
    # A placeholder can be handed a (materialised) gradient under torch.compile; only asked-for outputs count.
    dlogprobs, dlse, dentropy, dgathered = (by_name[k] if k in (*ctx.outputs, "gathered") else None for k in _DIFFERENTIABLE)
    if gather_ids is None:
        dgathered = None
    constants = (None,) * 15
    rows = (ids, gather_ids, row_temperature, row_max, log_sum)
    if ctx.design == "unit" and dentropy is None:
        dhidden = torch.ops.dppo_kernels.linear_logprobs_unit_backward(
            dlogprobs, dlse, dgathered, *trainable[:2], *rows, unit, picked, *ctx.scalars
        )
        return (dhidden, None, None, None, None, *constants)
    needs = list(ctx.needs_input_grad[:5])
    if ctx.design != "keep":
        kept = None
    gradients = torch.ops.dppo_kernels.linear_logprobs_backward(
        dlogprobs, dlse, dentropy, dgathered, *trainable, *rows, entropy, kept, *ctx.scalars, needs
    )
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *constants)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def check_linear_arguments(
    hidden: Tensor,
    weight: Tensor | LoraWeight,
    ids: Tensor,
    bias: Tensor | None,
    gather_ids: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Checks of everything that makes logits."""
    _checks.check_ids("ids", ids)
    check_head(hidden, weight, bias, logit_scale, softcap, lead=("ids", ids.shape))
    _checks.check_device("ids", ids, "hidden", hidden)
    if gather_ids is not None:
        _checks.check_gather_ids(gather_ids, ids)
    _checks.check_temperature(temperature, "ids", ids)


def check_head(
    hidden: Tensor,
    weight: Tensor | LoraWeight,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    lead: tuple[str, Sequence[int]],
    prefix: str = "",
) -> None:
    """Checks of hidden states and a head; `lead` names the argument whose shape hidden begins with, `prefix` is of names."""
    name, shape = lead
    hidden_name, weight_name, bias_name = (f"{prefix}{part}" for part in ("hidden", "weight", "bias"))
    _checks.check_floating(hidden_name, hidden)
    if is_dtensor(hidden):
        raise ValueError(f"`{hidden_name}` must be a plain tensor, the same on all ranks: pass full_tensor() of the DTensor")
    lora, weight = (weight, weight.base) if isinstance(weight, LoraWeight) else (None, weight)
    _checks.check_floating(weight_name, weight)
    if weight.dim() != 2:
        raise ValueError(f"`{weight_name}` must be [V, H], got shape {list(weight.shape)}")
    if lora is not None:
        lora.check(hidden, prefix)
    _checks.check_shape(hidden_name, hidden, (*shape, weight.shape[1]), f"[*{name}.shape, H of `{weight_name}`]")
    if hidden.dtype != weight.dtype and autocast_dtype(hidden.device) is None:
        raise TypeError(
            f"`{hidden_name}` is {hidden.dtype} and `{weight_name}` is {weight.dtype}: cast one, or run under torch.autocast"
        )
    _checks.check_device(weight_name, weight, hidden_name, hidden)
    if bias is not None:
        _checks.check_floating(bias_name, bias)
        _checks.check_shape(bias_name, bias, weight.shape[:1], "[V]")
        _checks.check_device(bias_name, bias, hidden_name, hidden)
    _checks.check_number(f"{prefix}logit_scale", logit_scale)
    if softcap is not None:
        _checks.check_positive(f"{prefix}softcap", softcap)
