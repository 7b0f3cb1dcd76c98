"""Verify, then time: every provider of every case, interleaved, with the ceilings of this machine measured in the same run."""

import functools
import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.cases import FULL_LOGITS_LIMIT, OURS, Case, load
from benchmarks.harness import Ceilings, Provider, measure_ceilings, paired_rounds, peak_bytes, quantiles, ratio, stamp
from benchmarks.shapes import Shape

VERIFIED_ROWS = 64
# A peer's gradient further off than this (norm of the difference over the norm) is wrong, not imprecise.
WRONG_GRADIENT = 0.1
COLUMNS = ("shape", "mode", "provider", "p50_ms", "rate", "share", "peak_mib", "max_error", "gradient_error", "time_over_ours")


class Errors(NamedTuple):
    """Of a provider against float64."""

    value: float  # largest
    gradient: float | None  # relative, the largest of what is trained; None in a forward


def run_case(
    name: str, shapes: dict[str, Shape], device: torch.device, dtype: torch.dtype, rounds: int, console: Console
) -> list[dict[str, object]]:
    """Tidy rows of one case; providers that cannot take part are printed with the reason.

    Raises:
        SystemExit: our own results are wrong: they are not timed.
    """
    case, facts, ceilings = load(name), stamp(device), measure_ceilings(device, dtype)
    rows: list[dict[str, object]] = []
    for shape_name, shape in shapes.items():
        torch.compiler.reset()  # or compiled providers reach the limit of recompilations and fall back to eager
        x = case.inputs(shape, dtype, device)
        for mode in case.MODES:
            errors, missing = verify(case, x, shape, mode)
            if OURS in missing:
                raise SystemExit(f"{name} {shape_name}: not timing wrong results of {mode}: {missing[OURS]}")
            providers, failed = _that_run(case, errors, x, mode)
            for provider, reason in (missing | failed).items():
                console.print(f"{name} {shape_name}: {provider} is missing from {mode}: {reason}", soft_wrap=True)
            seconds = paired_rounds(providers, rounds, device)
            for provider, times in seconds.items():
                peak = peak_bytes(providers[provider], device)
                rows.append(
                    {
                        "case": name,
                        "shape": shape_name,
                        **shape._asdict(),
                        "dtype": str(dtype).removeprefix("torch."),
                        "mode": mode,
                        "provider": provider,
                        **_timing(times),
                        **_rate(case, shape, dtype, mode, provider, times, ceilings),
                        "peak_mib": "" if peak is None else f"{peak / 2**20:.0f}",
                        "max_error": f"{errors[provider].value:.1e}",
                        "gradient_error": "" if (error := errors[provider].gradient) is None else f"{error:.1e}",
                        "time_over_ours": f"{ratio(seconds, provider, OURS):.2f}",
                        **facts,
                    }
                )
        del x, providers
        gc.collect()
    return rows


def print_rows(rows: Sequence[dict[str, object]], console: Console) -> None:
    table = Table(title=f"{rows[0]['case']}, {rows[0]['dtype']}, {rows[0]['device']}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("shape", "mode", "provider") else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS))
    console.print(table)


def verify(case: Case, x: Any, shape: Shape, mode: str) -> tuple[dict[str, Errors], dict[str, str]]:
    """(errors by provider, why the others are missing), of what is timed, on a few rows."""
    head, wide = (leaves(case.rows(x, VERIFIED_ROWS), dtype) for dtype in (None, torch.float64))
    exact = values_and_gradients(case.exact, wide, mode)
    dtype, device = next((tensor.dtype, tensor.device) for tensor in head if tensor is not None and tensor.is_floating_point())
    errors: dict[str, Errors] = {}
    missing: dict[str, str] = {}
    for provider, function in case.PROVIDERS.items():
        needed = case.needs_bytes(shape, provider)
        if needed > FULL_LOGITS_LIMIT[device.type]:
            missing[provider] = f"needs {needed / 2**30:.0f} GiB for logits"
            continue
        try:
            found = values_and_gradients(function, head, mode)
        except Exception as reason:  # a peer that is not installed, or cannot run here: named, not hidden
            missing[provider] = _first_line(reason)
            continue
        value = (found[0].double() - exact[0]).abs().max().item()
        gradients = [((a - b).norm() / b.norm()).item() for a, b in zip(found[1:], exact[1:], strict=True)]
        gradient = max(gradients, key=lambda error: (error != error, error), default=None)  # NaN is the largest
        limit = case.MAX_GRADIENT_ERROR[dtype] if provider == OURS else WRONG_GRADIENT
        if provider == OURS and not value <= case.MAX_ERROR[dtype]:
            missing[provider] = f"values are wrong: error {value:.1e}"
        elif gradient is not None and not gradient <= limit:
            missing[provider] = f"gradients are wrong: relative error {gradient:.1e}"
        else:
            errors[provider] = Errors(value, gradient)
    return errors, missing


def leaves(x: Any, dtype: torch.dtype | None) -> Any:
    """The inputs as leaves of their own, floating ones in `dtype`, if one is given."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)

    return type(x)(*map(leaf, x))


def trained(x: Any) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in x if tensor is not None and tensor.requires_grad)


def values_and_gradients(function: Callable[[Any], Tensor], x: Any, mode: str) -> tuple[Tensor, ...]:
    """What is timed: the values, or the values and the gradients of what the case trains."""
    if mode == "forward":
        with torch.no_grad():
            return (function(x),)
    values = function(x)
    return (values.detach(), *torch.autograd.grad(values, trained(x), x.upstream))


def timed(case: Case, provider: str, x: Any, mode: str) -> Provider:
    return functools.partial(values_and_gradients, case.PROVIDERS[provider], x, mode)


def _that_run(case: Case, names: Iterable[str], x: Any, mode: str) -> tuple[dict[str, Provider], dict[str, str]]:
    """(what is timed by provider, why the others are not): a peer may fail at full size, or have no such backward."""
    providers, failed = {}, {}
    for name in names:
        provider = timed(case, name, x, mode)
        try:
            provider()
        except Exception as reason:
            if name == OURS:
                raise
            failed[name] = _first_line(reason)
        else:
            providers[name] = provider
    return providers, failed


def _first_line(reason: Exception) -> str:
    return f"{type(reason).__name__}: {next(iter(str(reason).splitlines()), '')}"


def _timing(times: Sequence[float]) -> dict[str, str]:
    return {f"{name}_ms": f"{1e3 * value:.3f}" for name, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True)}


def _rate(
    case: Case, shape: Shape, dtype: torch.dtype, mode: str, provider: str, times: Sequence[float], ceilings: Ceilings
) -> dict[str, str]:
    amount, unit = case.work(shape, dtype, mode, provider)
    rate = amount / quantiles(times)[1]
    ceiling = ceilings.flop_per_s if unit == "flop" else ceilings.byte_per_s
    scale, label = (1e12, "TFLOP/s") if unit == "flop" else (1e9, "GB/s")
    return {
        "rate": f"{rate / scale:.3g} {label}",
        "ceiling": f"{ceiling / scale:.3g} {label}",
        "share": f"{rate / ceiling:.0%}",
    }
