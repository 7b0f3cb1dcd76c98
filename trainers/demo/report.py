"""What the demo shows: an introduction, one table, one figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dppo_kernels.trainers.demo.run import DemoConfig, RunResult

MASKED = "share of tokens masked (GRPO: clipped)"
# Panel -> metric names tried in order: GRPO calls its masked share a clip ratio, and measures no divergence.
PANELS = {
    "reward": ("reward",),
    "entropy (nats)": ("entropy",),
    "divergence from the rollout policy (mean)": ("divergence/mean",),
    MASKED: ("masked/all", "clip_fraction", "clip_ratio/region_mean"),
}
# Against generated tokens, which are what dynamic sampling spends.
TOKEN_PANELS = {
    "reward of all that was generated": ("reward",),
    "greedy accuracy on held-out problems": ("accuracy",),
    "share of trained groups without a signal": ("frac_reward_zero_std",),
    "entropy (nats)": ("entropy",),
}


def introduce(console: Console, training: int, held_out: int, config: "DemoConfig") -> None:
    length = f"{config.steps} optimiser steps" if config.tokens is None else f"{config.tokens} generated tokens"
    console.print(
        f"[bold]DPPO demo[/bold]: addition with carries, {training} training and {held_out} held-out problems. A small Qwen3 "
        f"imitates a teacher who forgets most carries, then {length} of RL on verified answers, 8 optimiser steps per rollout."
        + (" [bold]Control: rewards are shuffled.[/bold]" if config.shuffle_rewards else "")
    )


def print_table(console: Console, results: Sequence["RunResult"]) -> None:
    """Held-out accuracy before and after by method and seed."""
    table = Table(title="greedy accuracy on held-out problems (%)", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for name in ("seed", "before", "after", "gain", "masked", "entropy", "steps", "tokens", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        gain = 100 * (result.accuracy_after - result.accuracy_before)
        masked, entropy = (points(result, PANELS[panel])[1] for panel in (MASKED, "entropy (nats)"))
        table.add_row(
            result.method,
            str(result.seed),
            f"{100 * result.accuracy_before:.1f}",
            f"{100 * result.accuracy_after:.1f}",
            f"{gain:+.1f}",
            f"{100 * sum(masked) / len(masked):.1f} %" if masked else "-",
            f"{entropy[0]:.2f} > {entropy[-1]:.2f}" if entropy else "-",
            f"{result.history[-1]['step']:.0f}",
            f"{result.tokens / 1000:.0f} k",
            f"{result.seconds:.0f} s",
        )
    console.print(table)


def draw(results: Sequence["RunResult"], path: Path, *, by_tokens: bool = False) -> Path:
    """Metrics over optimiser steps, or generated tokens; one line a run, one colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    methods = list(dict.fromkeys(result.method for result in results))
    for axis, (title, names) in zip(axes.flat, (TOKEN_PANELS if by_tokens else PANELS).items(), strict=True):
        for result in results:
            steps, values = points(result, names, "tokens" if by_tokens else "step")
            first = result.seed == min(r.seed for r in results)
            colour = f"C{methods.index(result.method)}"
            axis.plot(steps, values, color=colour, alpha=0.85, linewidth=1.2, label=result.method if first else None)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("generated tokens" if by_tokens else "optimiser step")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def points(result: "RunResult", names: Sequence[str], x: str = "step") -> tuple[list[float], list[float]]:
    """(values of `x`, values) of the first metric that was logged, NaN left out."""
    for name in names:
        logged = [(entry.get(x), entry.get(name)) for entry in result.history]
        points = [(at, value) for at, value in logged if at is not None and value is not None and not math.isnan(value)]
        if points:
            return [at for at, _ in points], [value for _, value in points]
    return [], []
