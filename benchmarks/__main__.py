"""``python -m benchmarks run | compare | report | compile | plan``: timings, comparisons, tables, compile gate, scaling."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import plan, report
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
    planned = commands.add_parser("plan", help="memory, time and traffic of a training step on many GPUs, by a model of it")
    planned.add_argument("--model", choices=[model.name for model in plan.MODELS], default=plan.MODELS[1].name)
    planned.add_argument("--vocab", type=int, help="default: the model's")
    planned.add_argument("--gpus", type=int, default=64)
    planned.add_argument("--tensor_parallel", type=int, default=1)
    planned.add_argument("--sequences", type=int, default=1024)
    planned.add_argument("--prompt", type=int, default=512)
    planned.add_argument("--completion", type=int, default=2048)
    planned.add_argument("--write", action="store_true", help="write docs/scaling.md's table instead")
    parsed = parser.parse_args()
    console = Console(width=150)
    if parsed.command == "compile":
        return run_compile(parsed.arch)
    if parsed.command == "plan":
        if parsed.write:
            plan.write()
            return 0
        model = next(model for model in plan.MODELS if model.name == parsed.model)
        sizes = {name: getattr(parsed, name) for name in ("gpus", "tensor_parallel", "sequences", "prompt", "completion")}
        if bad := [name for name, size in {**sizes, "vocab": parsed.vocab or 1}.items() if size < 1]:
            parser.error(f"--{bad[0]} must be positive")
        if sizes["gpus"] % sizes["tensor_parallel"]:
            parser.error(f"--gpus {sizes['gpus']} is no multiple of --tensor_parallel {sizes['tensor_parallel']}")
        plan.show(plan.Step(replace(model, vocab=parsed.vocab or model.vocab), **sizes), console)
        return 0
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
