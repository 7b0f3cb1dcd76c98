"""``python -m benchmarks run | compare | report | compile``: timings, their comparison, tables, compile gate."""

import argparse
import re
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.cases import NAMES
from benchmarks.compile import ARCHITECTURES, run_compile
from benchmarks.harness import device_name, write_rows
from benchmarks.run import print_rows, run_case
from benchmarks.shapes import shapes_for

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="verify, then time every provider; rows go to OUT/<device>/<case>.csv")
    run.add_argument("--case", choices=NAMES, action="append", help="default: all")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, float32 elsewhere")
    run.add_argument("--rounds", type=int, default=9)
    run.add_argument("--quick", action="store_true", help="one or two shapes, five rounds")
    run.add_argument("--shape", action="append", help="only these of the shapes, by name")
    run.add_argument("--sweep", action="store_true", help="also vary the vocabulary and the number of tokens")
    run.add_argument("--out", type=Path, default=RESULTS)
    compare = commands.add_parser("compare", help="time of B over time of A, by case, shape, mode and provider")
    compare.add_argument("a", help="a CSV file of results, a folder of them, or a git ref (run with --quick)")
    compare.add_argument("b", help="the same")
    commands.add_parser("report", help="write docs/benchmarks.md's table and plots of time and memory from benchmarks/results")
    compiled = commands.add_parser("compile", help="compile every kernel ahead of time and report its resources")
    compiled.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parsed = parser.parse_args()
    console = Console(width=150)
    if parsed.command == "compile":
        return run_compile(parsed.arch)
    if parsed.command == "report":
        return report.write_report(RESULTS, console)
    if parsed.command == "compare":
        return report.print_comparison(parsed.a, parsed.b, console)
    device = torch.device(parsed.device)
    dtype = getattr(torch, parsed.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    folder = parsed.out / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    shapes = shapes_for(device.type, quick=parsed.quick, sweep=parsed.sweep)
    if unknown := set(parsed.shape or ()) - shapes.keys():
        parser.error(f"--shape {', '.join(sorted(unknown))}: there are {', '.join(shapes)}")
    shapes = {name: shape for name, shape in shapes.items() if not parsed.shape or name in parsed.shape}
    for name in parsed.case or NAMES:
        rows = run_case(name, shapes, device, dtype, 5 if parsed.quick else parsed.rounds, console)
        print_rows(rows, console)
        write_rows(folder / f"{name}.csv", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
