"""What the demo shows: an introduction, one table, one figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dppo_kernels.trainers.demo.run import DemoConfig, RunResult

# Panel -> metric names tried in order: GRPO calls its masked share a clip ratio, and measures no divergence.
PANELS = {
    "reward": ("reward",),
    "entropy (nats)": ("entropy",),
    "divergence from the rollout policy (mean)": ("divergence/mean",),
    "share of tokens masked (GRPO: clipped)": ("masked/all", "clip_ratio/region_mean"),
}


def introduce(console: Console, training: int, held_out: int, config: "DemoConfig") -> None:
    console.print(
        f"[bold]DPPO demo[/bold]: addition with carries, {training} training and {held_out} held-out problems. A small Qwen3 "
        f"imitates a teacher who forgets most carries, then {config.steps} optimiser steps of RL on verified answers, 8 per "
        "rollout." + (" [bold]Control: rewards are shuffled.[/bold]" if config.shuffle_rewards else "")
    )


def print_table(console: Console, results: Sequence["RunResult"]) -> None:
    """Held-out accuracy before and after by method and seed."""
    table = Table(title="greedy accuracy on held-out problems (%)")
    for name, justify in (("method", "left"), ("seed", "right"), ("before", "right"), ("after", "right"), ("gain", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("masked tokens", "entropy", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        gain = 100 * (result.accuracy_after - result.accuracy_before)
        masked, entropy = (
            series(result, PANELS[panel]) for panel in ("share of tokens masked (GRPO: clipped)", "entropy (nats)")
        )
        table.add_row(
            result.method,
            str(result.seed),
            f"{100 * result.accuracy_before:.1f}",
            f"{100 * result.accuracy_after:.1f}",
            f"{gain:+.1f}",
            f"{100 * sum(masked) / len(masked):.2f} %" if masked else "-",
            f"{entropy[0]:.3f} -> {entropy[-1]:.3f}" if entropy else "-",
            f"{result.seconds:.0f}",
        )
    console.print(table)


def series(result: "RunResult", names: Sequence[str]) -> list[float]:
    """Values of the first metric that was logged, in order of steps, NaN left out."""
    for name in names:
        values = [entry[name] for entry in result.history if entry.get(name) is not None]
        if values:
            return [value for value in values if not math.isnan(value)]
    return []


def draw(results: Sequence["RunResult"], path: Path) -> Path:
    """Reward, entropy, divergence and masked share over optimiser steps; one line a run, one colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    methods = list(dict.fromkeys(result.method for result in results))
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for result in results:
            steps, values = _points(result, names)
            first = result.seed == min(r.seed for r in results)
            colour = f"C{methods.index(result.method)}"
            axis.plot(steps, values, color=colour, alpha=0.85, linewidth=1.2, label=result.method if first else None)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _points(result: "RunResult", names: Sequence[str]) -> tuple[list[Any], list[float]]:
    for name in names:
        points = [(entry["step"], entry[name]) for entry in result.history if entry.get(name) is not None]
        if points:
            return [step for step, _ in points], [value for _, value in points]
    return [], []
