"""Interleaved timing: every round runs each provider once, so that drift of the machine hits all of them alike."""

import csv
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Provider = Callable[[], object]


class Ceilings(NamedTuple):
    """What this machine reaches at best, measured in the same run."""

    flop_per_s: float  # a large square matrix product in the benchmark's dtype
    byte_per_s: float  # a device copy, reads plus writes


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    size, length = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 27)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(length, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = paired_rounds({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 5, device)
    return Ceilings(2 * size**3 / min(seconds["matmul"]), 2 * length / min(seconds["copy"]))


def paired_rounds(providers: Mapping[str, Provider], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds by provider, one entry a round, after one warm-up each. The order rotates; a GPU's L2 is emptied before each."""
    names = list(providers)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    for name in names:
        providers[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if flush is not None:
                flush.zero_()
            _synchronise(device)
            start = time.perf_counter()
            providers[name]()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], peer: str, ours: str) -> float:
    """Median over rounds of peer time / our time."""
    return statistics.median(p / o for p, o in zip(seconds[peer], seconds[ours], strict=True))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    ordered = sorted(values)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)]
    return at[0], at[1], at[2]


def peak_bytes(provider: Provider, device: torch.device) -> int | None:
    """Bytes allocated on a CUDA device above what was there before; None on CPU, which keeps no such count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    provider()
    _synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({torch.get_num_threads()} threads)"


def stamp(device: torch.device) -> dict[str, str]:
    """What a figure needs beside it: device, versions, commit (marked dirty if the tree is not clean)."""
    versions = {}
    for name in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "-"
    driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device.type == "cuda" else ""
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    dirty = "-dirty" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return {"device": device_name(device), "driver": driver.split("\n")[0], **versions, "commit": commit + dirty}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a tidy CSV, creating it with a header.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            if next(csv.reader(file)) != list(rows[0]):
                raise ValueError(f"{path} has other columns than these rows: rerun its cases, or write elsewhere with --out")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _git(*arguments: str) -> str:
    return _command("git", *arguments)


def _command(*arguments: str) -> str:
    """What a command prints, run in this folder; empty where it does not exist or fails."""
    root = Path(__file__).resolve().parent
    try:
        return subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
