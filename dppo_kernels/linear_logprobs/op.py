"""Public `linear_logprobs` and its custom ops ``dppo_kernels::linear_logprobs{,_backward}``."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._numerics import autocast_dtype, split_temperature, stat_dtype
from dppo_kernels._row_stats import OUTPUTS, Upstream
from dppo_kernels.linear_logprobs import torch_impl
from dppo_kernels.linear_logprobs.projection import Projection
from dppo_kernels.linear_logprobs.reference import linear_logprobs_ref


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
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    gather_ids: Tensor | None = None,  # [..., K]
    temperature: float | Tensor = 1.0,  # scalar or [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = ("logprobs",),
    backend: str | None = None,
    check_values: bool = False,
) -> LinearLogprobs:
    """Log-probs, entropy and LSE of ``hidden @ weight.T`` at chosen ids, without a tensor of N x V.

    ``z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature``; without soft-cap
    ``z = logit_scale * (h W^T + b) / temperature``. ``logprobs = z[id] - logsumexp(z)``, ``entropy = -sum p log p``. Log-prob,
    entropy, LSE and gathered log-probs are differentiable in hidden, weight and bias; any of the three may be frozen.

    Args:
        hidden: [..., H] hidden states, already shifted: row t predicts ``ids[t]``.
        weight: [V, H] lm_head, of hidden's dtype (under autocast: any; both are rounded to the autocast dtype).
        ids: [...] int32/int64 token ids. Rows equal to `ignore_index` give 0, get no gradient and enter no GEMM.
        bias: [V] lm_head bias.
        gather_ids: [..., K] ids whose log-probs are wanted as well; an id < 0 gives 0 and no gradient.
        temperature: positive number, or a tensor [...] with one per row (not differentiable).
        logit_scale: multiplies the projection before soft-capping (Cohere ``logit_scale``, Granite ``1 / logits_scaling``).
        softcap: Gemma-style soft-cap of the logits.
        outputs: any of "logprobs", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; the last three carry no
            gradient. Outputs not asked for are None and cost nothing.
        backend: "auto" (default: "triton" on CUDA, else "torch"), "triton", "torch" or "reference"; also set by
            ``DPPO_KERNELS_BACKEND``. float64 runs on "torch".
        check_values: check the range of ids on CUDA too (a host sync); on CPU they are always checked.

    Returns:
        `LinearLogprobs`, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, device, id, temperature, output or backend.

    Source: online softmax, Milakov & Gimelshein (arXiv 1805.02867); recomputed tiles, Wijmans et al. (arXiv 2411.09009).
    """
    check_linear_arguments(hidden, weight, ids, bias, gather_ids, temperature, logit_scale, softcap)
    if isinstance(outputs, str) or (not outputs and gather_ids is None):
        raise ValueError(f"`outputs` must be a sequence naming at least one of {', '.join(OUTPUTS)}; got {outputs!r}")
    for output in outputs:
        _checks.check_choice("outputs", output, OUTPUTS)
    autocast = autocast_dtype(hidden.device)
    compute_dtype = hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast
    name = _backend.resolve("linear_logprobs", backend, hidden.device, compute_dtype)
    lead, hidden_size = ids.shape, hidden.shape[-1]
    hidden = hidden.reshape(-1, hidden_size)
    ids = ids.reshape(-1).long()
    if gather_ids is not None:
        gather_ids = gather_ids.reshape(ids.shape[0], gather_ids.shape[-1]).long()
    row_temperature, scalar_temperature = split_temperature(temperature, ids.shape[0], stat_dtype(compute_dtype))

    if name == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.device.type == "cpu" or check_values:
                _checks.check_values(ids, gather_ids, row_temperature, weight.shape[0], ignore_index)
            values = linear_logprobs_ref(
                hidden.to(compute_dtype),
                weight.to(compute_dtype),
                bias,
                ids,
                gather_ids,
                scalar_temperature if row_temperature is None else row_temperature,
                logit_scale=logit_scale,
                softcap=softcap,
                ignore_index=ignore_index,
            )
    else:
        flat = torch.ops.dppo_kernels.linear_logprobs(
            hidden,
            weight,
            bias,
            ids,
            gather_ids,
            row_temperature,
            scalar_temperature,
            logit_scale,
            softcap,
            ignore_index,
            compute_dtype,
            ",".join(outputs),
            check_values,
            name,
        )
        values = dict(zip(_FIELDS, flat, strict=True))
    wanted = {key: values[key].reshape(lead) for key in outputs}
    if gather_ids is not None:
        wanted["gathered"] = values["gathered"].reshape(*lead, gather_ids.shape[1])
    return LinearLogprobs(**{field: wanted.get(field) for field in LinearLogprobs._fields})


# What the forward op returns, in order. Not asked for: an empty tensor. The last two are saved for the backward.
_FIELDS = (*OUTPUTS, "gathered", "row_max", "log_sum")
_DIFFERENTIABLE = ("logprobs", "lse", "entropy", "gathered")


@torch.library.custom_op("dppo_kernels::linear_logprobs", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    outputs: str,
    check_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if hidden.device.type == "cpu" or check_values:
        _checks.check_values(ids, gather_ids, row_temperature, weight.shape[0], ignore_index)
    asked = frozenset(outputs.split(","))
    projection = Projection(
        hidden, weight, bias, temperature if row_temperature is None else row_temperature, logit_scale, softcap, compute_dtype
    )
    with torch.autocast(hidden.device.type, enabled=False):
        values = implementation(backend)[0](projection, ids, gather_ids, ignore_index=ignore_index, outputs=asked)
    return _pack(values, asked, projection.dtype, hidden)


@_forward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, gather_ids: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    compute_dtype, outputs, *_ = rest[-4:]
    asked, dtype = frozenset(outputs.split(",")), stat_dtype(compute_dtype)
    values = {
        name: hidden.new_empty(ids.shape[0], dtype=torch.bool if name == "is_top1" else dtype)
        for name in _FIELDS
        if name != "gathered"
    }
    if gather_ids is not None:
        values["gathered"] = hidden.new_empty(gather_ids.shape, dtype=dtype)
    return _pack(values, asked, dtype, hidden)


def implementation(backend: str) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., Any]]:
    """(forward, backward) of a backend."""
    if backend == "triton":  # imported here: the package works without Triton
        from dppo_kernels.linear_logprobs import kernels, kernels_bwd

        return kernels.linear_logprobs_fwd, kernels_bwd.linear_logprobs_bwd
    return torch_impl.linear_logprobs_fwd, torch_impl.linear_logprobs_bwd


def _pack(values: dict[str, Tensor], asked: frozenset[str], dtype: torch.dtype, like: Tensor) -> Any:
    always = ("gathered", "row_max", "log_sum")
    return tuple(
        values[name]
        if name in values and (name in asked or name in always)
        else like.new_empty(0, dtype=torch.bool if name == "is_top1" else dtype)
        for name in _FIELDS
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
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    projection = Projection(
        hidden, weight, bias, temperature if row_temperature is None else row_temperature, logit_scale, softcap, compute_dtype
    )
    saved = {"row_max": row_max, "log_sum": log_sum}
    if dentropy is not None:
        saved["entropy"] = entropy
    with torch.autocast(hidden.device.type, enabled=False):
        grads = implementation(backend)[1](
            projection,
            ids,
            gather_ids,
            Upstream(dlogprobs, dlse, dentropy, dgathered),
            saved,
            ignore_index=ignore_index,
            needs=(needs_hidden, needs_weight, needs_bias),
        )
    empty = (hidden.new_empty(0), weight.new_empty(0), (weight if bias is None else bias).new_empty(0))
    return tuple(e if g is None else g for g, e in zip(grads, empty, strict=True))  # type: ignore[return-value]


@_backward_op.register_fake
def _(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dgathered: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, weight if bias is None else bias)
    needs = (*rest[-3:-1], rest[-1] and bias is not None)
    dhidden, dweight, dbias = (torch.empty_like(x) if need else x.new_empty(0) for x, need in zip(inputs, needs, strict=True))
    return dhidden, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, gather_ids, row_temperature, *scalars, outputs, _, backend = inputs
    values = dict(zip(_FIELDS, output, strict=True))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(values[name] for name in _FIELDS if name not in _DIFFERENTIABLE))
    ctx.save_for_backward(
        hidden, weight, bias, ids, gather_ids, row_temperature, values["row_max"], values["log_sum"], values["entropy"]
    )
    ctx.scalars = (*scalars, backend)
    ctx.outputs = outputs.split(",")


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, *rest = ctx.saved_tensors
    by_name = dict(zip(_FIELDS, grads, strict=True))
    # A placeholder can be handed a (materialised) gradient under torch.compile; only asked-for outputs count.
    upstream = [by_name[name] if name in (*ctx.outputs, "gathered") else None for name in _DIFFERENTIABLE]
    if rest[1] is None:  # no gather_ids
        upstream[-1] = None
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.dppo_kernels.linear_logprobs_backward(*upstream, hidden, weight, bias, *rest, *ctx.scalars, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 11)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def check_linear_arguments(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    gather_ids: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Checks of everything that makes logits."""
    _checks.check_floating("hidden", hidden)
    _checks.check_floating("weight", weight)
    _checks.check_ids("ids", ids)
    if weight.dim() != 2:
        raise ValueError(f"`weight` must be [V, H], got shape {list(weight.shape)}")
    _checks.check_shape("hidden", hidden, (*ids.shape, weight.shape[1]), "[*ids.shape, H of `weight`]")
    if hidden.dtype != weight.dtype and autocast_dtype(hidden.device) is None:
        raise TypeError(f"`hidden` is {hidden.dtype} and `weight` is {weight.dtype}: cast one, or run under torch.autocast")
    _checks.check_device("weight", weight, "hidden", hidden)
    _checks.check_device("ids", ids, "hidden", hidden)
    if bias is not None:
        _checks.check_floating("bias", bias)
        _checks.check_shape("bias", bias, weight.shape[:1], "[V]")
        _checks.check_device("bias", bias, "hidden", hidden)
    if gather_ids is not None:
        _checks.check_gather_ids(gather_ids, ids)
    _checks.check_temperature(temperature, ids)
    _checks.check_number("logit_scale", logit_scale)
    if softcap is not None:
        _checks.check_positive("softcap", softcap)
