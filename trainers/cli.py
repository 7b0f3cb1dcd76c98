"""The ``dppo`` command: ``dppo doctor`` says what this installation can do, ``dppo train dapo`` trains from flags and a YAML
file, ``dppo pairs`` generates preference pairs, ``dppo demo`` and ``dppo compare`` compare methods on this machine,
``dppo accelerate train.py`` runs a script with TRL on our kernels."""

import argparse
import importlib.metadata
import os
import platform
import runpy
import sys
from collections.abc import Sequence

import torch

from dppo_kernels import __version__, _backend

PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "math-verify")
TRAINERS = ("dapo", "decoupled-ppo", "distill-ppo", "dpo", "dppo", "ppo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dppo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print versions, devices, and why each backend is or is not available")
    demo = commands.add_parser("demo", help="GRPO against DPPO on arithmetic, offline, on this machine", add_help=False)
    demo.add_argument("rest", nargs=argparse.REMAINDER)
    compare = commands.add_parser("compare", help="DPO against PPO on table rows, offline, on this machine", add_help=False)
    compare.add_argument("rest", nargs=argparse.REMAINDER)
    train = commands.add_parser(
        "train",
        help="train from flags and --config file.yaml",
        description="`dppo train dapo --help` lists the options. On several devices: "
        "accelerate launch -m dppo_kernels.trainers.cli train dapo ...",
    )
    train.add_argument("algorithm", choices=TRAINERS)
    train.add_argument("rest", nargs=argparse.REMAINDER, help="options of the trainer")
    pairs = commands.add_parser("pairs", help="generate preference pairs for DPO from prompts and a reward", add_help=False)
    pairs.add_argument("rest", nargs=argparse.REMAINDER)
    accelerate = commands.add_parser(
        "accelerate",
        help="run a training script with TRL's trainers scoring through our kernels",
        description="Run a script as `python` would, after accelerate_trl(): GRPO, RLOO, SFT, DPO and KTO of TRL score through "
        "the kernels of linear_logprobs. On several devices: "
        "accelerate launch -m dppo_kernels.trainers.cli accelerate train.py ...",
    )
    accelerate.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as in `python -m`")
    accelerate.add_argument("script", help="path of a Python file (with -m: a module, for example trl.scripts.sft)")
    accelerate.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the script")
    parsed, extra = parser.parse_known_args(arguments)
    if parsed.command == "demo":
        return _demo([*extra, *parsed.rest])
    if parsed.command == "compare":
        return _compare([*extra, *parsed.rest])
    if parsed.command == "train":
        return _train(parsed.algorithm, [*extra, *parsed.rest])
    if parsed.command == "pairs":
        return _pairs([*extra, *parsed.rest])
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if parsed.command == "doctor":
        print(doctor())
        return 0
    if not parsed.module and not os.path.exists(parsed.script):
        accelerate.error(f"no such file: {parsed.script} (a module needs -m)")
    _accelerate(parsed.script, parsed.arguments, parsed.module)
    return 0


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


def _compare(arguments: list[str]) -> int:
    from dppo_kernels.trainers import _trl_seam  # noqa: F401  (first: it says which package is missing or of the wrong version)
    from dppo_kernels.trainers.compare.command import main as compare

    compare(arguments)
    return 0


def _train(algorithm: str, arguments: list[str]) -> int:
    from dppo_kernels.trainers import _trl_seam  # noqa: F401  (first, as above)

    if algorithm == "dpo":  # trains on pairs, the others on prompts and rewards
        from dppo_kernels.trainers.train_dpo import train_dpo

        train_dpo(arguments)
    else:
        from dppo_kernels.trainers.train import train

        train(algorithm, arguments)
    return 0


def _pairs(arguments: list[str]) -> int:
    from dppo_kernels.trainers import _trl_seam  # noqa: F401  (first, as above)
    from dppo_kernels.trainers.pairs_command import run_pairs

    run_pairs(arguments)
    return 0


def _accelerate(script: str, arguments: list[str], is_module: bool) -> None:
    from dppo_kernels.trainers import accelerate_trl

    # What `python` sets up: the script's own arguments, and imports from where it lies.
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(os.path.abspath(script)))
    with accelerate_trl():
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
