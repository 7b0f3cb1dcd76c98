"""Reading results back: comparisons of two runs, the table of docs/benchmarks.md, plots of time and peak memory."""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
KEY = ("case", "shape", "dtype", "mode", "provider")
BEGIN, END = "<!-- benchmarks: written by `python -m benchmarks report` -->", "<!-- end of benchmarks -->"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
STANDARD = ("S1", "S2", "S3", "C1", "C2", "C3")

Row = dict[str, str]


def read_rows(source: Path) -> dict[tuple[str, ...], Row]:
    """The newest row by (case, shape, dtype, mode, provider) of a CSV file, or of all below a folder."""
    files = sorted(source.rglob("*.csv")) if source.is_dir() else [source]
    rows: dict[tuple[str, ...], Row] = {}
    for file in files:
        with file.open(newline="") as handle:
            for row in csv.DictReader(handle):
                rows[tuple(row[name] for name in KEY)] = row
    return rows


def print_comparison(a: str, b: str, console: Console) -> int:
    """Time of B over time of A for everything that both measured; the exit status is 1 if that is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = (_rows_of(source, Path(folder, str(i))) for i, source in enumerate((a, b)))
    both = [key for key in before if key in after]
    table = Table(title=f"{b} against {a}")
    for column in (*KEY, "A ms", "B ms", "B / A"):
        table.add_column(column)
    for key in both:
        old, new = float(before[key]["p50_ms"]), float(after[key]["p50_ms"])
        table.add_row(*key, f"{old:.3f}", f"{new:.3f}", f"{new / old:.2f}")
    console.print(table if both else "nothing that both measured")
    return 0 if both else 1


def _rows_of(source: str, folder: Path) -> dict[tuple[str, ...], Row]:
    """Results of a file, a folder, or of a git ref, which is checked out aside and run."""
    if Path(source).exists():
        return read_rows(Path(source))
    tree, out = folder / "tree", folder / "results"
    folder.mkdir(parents=True)
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), source], cwd=ROOT, check=True)
    try:
        subprocess.run([sys.executable, "-m", "benchmarks", "run", "--quick", "--out", str(out)], cwd=tree, check=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return read_rows(out)


def write_report(results: Path, console: Console) -> int:
    """Put a table of the standard shapes between the markers of docs/benchmarks.md, and plots beside the results."""
    rows = list(read_rows(results).values())
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + markdown(rows) + "\n" + END + rest.split(END)[1])
    for path in plot(rows, results):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def markdown(rows: Iterable[Row]) -> str:
    """A table a device: a line per case and mode, a column per shape; times of all providers, fastest first."""
    tables: dict[tuple[str, str], dict[tuple[str, str], dict[str, list[Row]]]] = {}
    for row in rows:
        if row["shape"] in STANDARD:
            lines = tables.setdefault((row["device"], row["dtype"]), {})
            cells = lines.setdefault((row["case"], row["mode"]), {})
            cells.setdefault(", ".join(row[name] for name in "nhv"), []).append(row)
    text = []
    for (device, dtype), lines in tables.items():
        shapes = list(dict.fromkeys(shape for cells in lines.values() for shape in cells))
        facts = next(iter(next(iter(lines.values())).values()))[0]
        text += [
            "",
            f"{device}, {dtype}, torch {facts['torch']}, TRL {facts['trl']}; median ms (times ours) by N, H, V:",
            "",
            f"| case | mode | {' | '.join(shapes)} |",
            "|---|---|" + "---|" * len(shapes),
        ]
        for (case, mode), cells in lines.items():
            text.append(f"| {case} | {mode} | {' | '.join(_times(cells.get(shape, [])) for shape in shapes)} |")
    return "\n".join(text[1:])


def _times(group: Iterable[Row]) -> str:
    ordered = sorted(group, key=lambda row: float(row["p50_ms"]))
    return "<br>".join(f"{row['provider']} {float(row['p50_ms']):.0f} ({row['time_over_ours']})" for row in ordered)


def plot(rows: Iterable[Row], results: Path) -> list[Path]:
    """Time and peak memory against V and N per provider, from the sweeps; one figure a case and device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    swept = [row for row in rows if row["shape"][0] in "VN" and row["mode"] == "forward+backward"]
    written = []
    for case, device in dict.fromkeys((row["case"], row["device"]) for row in swept):
        mine = [row for row in swept if (row["case"], row["device"]) == (case, device)]
        figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
        for column, axis_name in enumerate(("v", "n")):
            for line, (quantity, label) in enumerate((("p50_ms", "ms"), ("peak_mib", "peak MiB"))):
                axis = axes[line][column]
                for provider in dict.fromkeys(row["provider"] for row in mine):
                    points = sorted(
                        (int(row[axis_name]), float(row[quantity]))
                        for row in mine
                        if row["provider"] == provider and row["shape"][0] == axis_name.upper() and row[quantity]
                    )
                    axis.plot(*zip(*points, strict=True), marker="o", label=provider) if points else None
                axis.set(xlabel="vocabulary" if axis_name == "v" else "tokens", ylabel=label, xscale="log", yscale="log")
                axis.grid(alpha=0.3)
        axes[0][0].legend()
        figure.suptitle(f"{case}, forward + backward, {device}")
        folder = next(path.parent for path in results.rglob(f"{case}.csv") if device in path.read_text())
        written.append(folder / f"{case}.png")
        figure.savefig(written[-1], dpi=100)
        pyplot.close(figure)
    return written
