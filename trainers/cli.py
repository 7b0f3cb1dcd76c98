"""The ``dppo`` command: ``dppo doctor`` says what this installation can do, ``dppo demo`` trains with DPPO on this machine."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

from dppo_kernels import __version__, _backend

PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dppo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print versions, devices, and why each backend is or is not available")
    demo = commands.add_parser("demo", help="GRPO against DPPO on arithmetic, offline, on this machine", add_help=False)
    demo.add_argument("rest", nargs=argparse.REMAINDER)
    parsed, extra = parser.parse_known_args(arguments)
    if parsed.command == "doctor":
        if extra:
            parser.error(f"unrecognized arguments: {' '.join(extra)}")
        print(doctor())
        return 0
    return _demo([*extra, *parsed.rest])


def doctor() -> str:
    """The report of ``dppo doctor``."""
    lines = [f"dppo-kernels  {__version__}", f"python        {platform.python_version()} ({sys.executable})"]
    lines += [f"{name:<13} {_version(name)}" for name in PACKAGES]
    lines += ["", "devices", f"  cpu         {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines.append(f"  cuda:{index}      {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("  cuda        none: " + ("no device found" if torch.backends.cuda.is_built() else "torch is a CPU build"))
    lines += ["", "backends"]
    lines += [f"  {name:<11} {'yes' if ok else 'no '}  {reason}" for name, (ok, reason) in _backend.status().items()]
    lines += ["", "operations", *(f"  {_explain(op)}" for op in _backend.IMPLEMENTATIONS)]
    lines += ["", f"trainers      {_trainers()}"]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _explain(op: str) -> str:
    try:
        return _backend.explain(op)
    except ValueError as reason:  # DPPO_KERNELS_BACKEND names one that cannot serve: what a doctor is asked about
        return f"{op} fails: {reason}"


def _trainers() -> str:
    try:
        from dppo_kernels.trainers import _trl_seam
    except ImportError as reason:
        return f"not available: {reason}"
    return f"available (tested with trl{_trl_seam.supported_range('trl')})"


def _demo(arguments: list[str]) -> int:
    from transformers import HfArgumentParser

    from dppo_kernels.trainers.demo import DemoConfig, run_demo

    parser = HfArgumentParser(DemoConfig, prog="dppo demo", description=run_demo.__doc__)
    try:
        (config,) = parser.parse_args_into_dataclasses(arguments)
    except ValueError as reason:
        parser.error(str(reason))
    run_demo(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
