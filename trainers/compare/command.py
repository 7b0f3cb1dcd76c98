"""``dppo compare``: options, results, and the report that is made of them."""

import json
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dppo_kernels.trainers.arguments import ArgumentParser, shipped_configs, with_shipped_config
from dppo_kernels.trainers.compare import report
from dppo_kernels.trainers.compare.conclusion import Finding, in_words
from dppo_kernels.trainers.compare.config import METHODS, WARM_START, CompareConfig
from dppo_kernels.trainers.compare.run import WarmStartError, run_seeds, versions
from dppo_kernels.trainers.compare.task import read_split

SHOWN = ("reward", "judge_reward", "validity", "kl", "utility", "correlation_error")


@dataclass
class ReportArguments:
    """Args:
    from_results: a results.json: write its report again, and run nothing.
    """

    from_results: str | None = field(default=None, metadata={"help": "A results.json: write its report, run nothing."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Run as told, or write the report of earlier results; exits with status 2 where the options are not understood."""
    names = shipped_configs("compare")
    parser = ArgumentParser(
        (CompareConfig, ReportArguments),
        prog="dppo compare",
        description=f"{run_compare.__doc__} Shipped for --config: {', '.join(names)}.",
    )
    try:
        config, asked = parser.parse_args_and_config(with_shipped_config(parser, arguments, names))
        if asked.from_results is not None:
            return write_report(asked.from_results, config.output_dir)
        read_split(config, seed=0)  # what is wrong with a table is said before any work
    except (OSError, TypeError, ValueError) as reason:
        parser.error(str(reason))
    try:
        return run_compare(config, command=shlex.join(["dppo", "compare", *arguments]))
    except WarmStartError as reason:
        return parser.error(str(reason))


def run_compare(config: CompareConfig, command: str = "run_compare(config)") -> dict[str, Any]:
    """Train DPO and PPO on the rows of a table, offline and on this CPU; write report.md, report.png and results.json."""
    console, started = Console(), time.perf_counter()
    seeds = run_seeds(
        config, lambda text: console.print(f"{time.perf_counter() - started:5.0f} s  {text}", highlight=False, soft_wrap=True)
    )
    results = {
        "command": command,
        "config": asdict(config),
        "learning_rates": {method: config.rate(method) for method in METHODS},
        "commit": ", ".join(dict.fromkeys(seed["commit"] or "unknown" for seed in seeds)),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "seconds": sum(seed["seconds"] for seed in seeds),
        "seeds": seeds,
    }
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    path.write_text(json.dumps(results, indent=1))
    return write_report(path, out)


def write_report(results: str | Path, folder: str | Path) -> dict[str, Any]:
    """Write report.md and report.png of a results.json to `folder`, print the conclusion, and return the results.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no results of a comparison.
    """
    path, folder = Path(results), Path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"`results` must be the path of a results.json, got {str(path)!r}")
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not found.get("seeds"):
        raise ValueError(f"`results` must hold the results of a comparison, got {path.name} without seeds")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report.render(found))
    report.draw(found, folder / "report.png")
    console = Console()
    _print(console, found, report.conclude(found))
    console.print(f"report   {folder / 'report.md'}", soft_wrap=True)
    return found


def _print(console: Console, results: dict[str, Any], findings: Sequence[Finding]) -> None:
    table = Table(title="means over seeds", title_justify="left")
    table.add_column("")
    for who in (WARM_START, *METHODS):
        table.add_column(who, justify="right")
    for name in SHOWN:
        cells = [report.mean_and_spread(report.values_of(results, who)[name]) for who in (WARM_START, *METHODS)]
        table.add_row(report.TITLES[name], *cells)
    console.print(table)
    console.print(in_words(findings), highlight=False)
