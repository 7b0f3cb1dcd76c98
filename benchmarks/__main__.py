"""``python -m benchmarks run [--family F] [--device D] [--dtype T] [--rounds R]``: verify, then time every provider.

Prints a table and appends tidy rows (p20/p50/p80, error, device, versions, commit) to benchmarks/results/<device>/<family>.csv.
"""

import argparse
import importlib
import re
from pathlib import Path

import torch

from benchmarks.compile import ARCHITECTURES, run_compile
from benchmarks.harness import device_name, paired_rounds, peak_bytes, quantiles, ratio, stamp, write_rows
from benchmarks.shapes import shapes_for

FAMILIES = ("linear_logprobs",)
OURS = "dppo_kernels"
MAX_ERROR = 1e-4  # of our log-probs against float64 of the same inputs: slower is reported, wrong is not


def run(family: str, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Rows of one family over all shapes and modes."""
    case = importlib.import_module(f"benchmarks.cases.{family}")
    facts, rows = stamp(device), []
    for shape_name, shape in shapes_for(device.type).items():
        x = case.inputs(shape, dtype, device)
        errors = case.verify(x)
        if not errors[OURS] <= MAX_ERROR:
            raise SystemExit(f"{family} {shape_name}: error {errors[OURS]:.2e} > {MAX_ERROR:.0e}; not timing wrong results")
        for mode in ("forward", "forward+backward"):
            providers = case.providers(x, mode)
            seconds = paired_rounds(providers, rounds, device)
            for name, times in seconds.items():
                p20, p50, p80 = quantiles(times)
                peak = peak_bytes(providers[name], device)
                row = {
                    "family": family,
                    "shape": shape_name,
                    **shape._asdict(),
                    "dtype": str(dtype).removeprefix("torch."),
                    "mode": mode,
                    "provider": name,
                    "p20_ms": f"{p20 * 1e3:.3f}",
                    "p50_ms": f"{p50 * 1e3:.3f}",
                    "p80_ms": f"{p80 * 1e3:.3f}",
                    "tflops": f"{case.flops(shape, mode, name) / p50 / 1e12:.3f}",
                    "peak_mib": "" if peak is None else f"{peak / 2**20:.0f}",
                    "max_error": f"{errors[name]:.2e}",
                    "time_over_ours": f"{ratio(seconds, name, OURS):.2f}",
                    **facts,
                }
                rows.append(row)
                print(
                    "  ".join(
                        f"{row[key]!s:>12}" for key in ("shape", "mode", "provider", "p50_ms", "max_error", "time_over_ours")
                    )
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    arguments = commands.add_parser("run")
    arguments.add_argument("--family", choices=FAMILIES, action="append")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    compiled = commands.add_parser("compile", help="compile every kernel ahead of time and report its resources")
    compiled.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parsed = parser.parse_args()
    if parsed.command == "compile":
        raise SystemExit(run_compile(parsed.arch))
    device = torch.device(parsed.device)
    dtype = getattr(torch, parsed.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    folder = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    for family in parsed.family or FAMILIES:
        write_rows(parsed.out / folder / f"{family}.csv", run(family, device, dtype, parsed.rounds))


if __name__ == "__main__":
    main()
