"""Verify, then time: every provider of every case, interleaved, with the ceilings of this machine measured in the same run."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.cases import FULL_LOGITS_LIMIT, OURS, Case, load
from benchmarks.harness import Ceilings, Provider, measure_ceilings, paired_rounds, peak_bytes, quantiles, ratio, stamp
from benchmarks.shapes import Shape

VERIFIED_ROWS = 64
COLUMNS = ("shape", "mode", "provider", "p50_ms", "rate", "share", "peak_mib", "max_error", "time_over_ours")


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
        errors, missing = _verify(case, x, shape, device)
        for provider, reason in missing.items():
            console.print(f"{name} {shape_name}: {provider} is missing: {reason}", soft_wrap=True)
        if not errors.get(OURS, torch.inf) <= case.MAX_ERROR[dtype]:
            raise SystemExit(f"{name} {shape_name}: not timing wrong results: error {errors.get(OURS)}, {missing.get(OURS)}")
        for mode in case.MODES:
            providers, failed = _that_run(case, errors, x, mode)
            for provider, reason in failed.items():
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
                        "max_error": f"{errors[provider]:.1e}",
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


def _verify(case: Case, x: Any, shape: Shape, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """(largest log-prob error against float64 by provider, why the others are missing)."""
    head = case.rows(x, VERIFIED_ROWS)
    exact = case.exact(head)
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for provider, logprobs in case.PROVIDERS.items():
        needed = case.needs_bytes(shape, provider)
        if needed > FULL_LOGITS_LIMIT[device.type]:
            missing[provider] = f"needs {needed / 2**30:.0f} GiB for logits"
            continue
        try:
            with torch.no_grad():
                errors[provider] = (logprobs(head).double() - exact).abs().max().item()
        except Exception as reason:  # a peer that is not installed, or cannot run here: named, not hidden
            missing[provider] = _first_line(reason)
    return errors, missing


def timed(case: Case, provider: str, x: Any, mode: str) -> Provider:
    """What is timed: the log-probs, or the log-probs and the gradients of what the case trains."""
    logprobs = case.PROVIDERS[provider]
    if mode == "forward":
        return torch.no_grad()(lambda: logprobs(x))

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(logprobs(x), case.trained(x), x.upstream)

    return forward_and_backward


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
