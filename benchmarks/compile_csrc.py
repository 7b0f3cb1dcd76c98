"""The part of ``python -m benchmarks compile`` for `csrc/cuda/*.cu`: registers, spills and shared memory of every kernel.

Needs nvcc and no GPU. Fails on a spill on any of sm_80, sm_90 and sm_100, and on source that does not compile, on the host side
too. Without nvcc it says so, and fails only where ``DPPO_KERNELS_REQUIRE_EXT=1``.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100")


class KernelUsage(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spill_stores: int  # bytes
    spill_loads: int
    shared: int


def find_nvcc() -> Path | None:
    """That of CUDA_HOME if it is a toolkit, not a wrapper without headers; else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "include", "cuda_runtime.h").exists() and Path(home, "bin", "nvcc").exists():
        return Path(home, "bin", "nvcc")
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


def parse_ptxas(log: str) -> list[KernelUsage]:
    """Every ``Compiling entry function`` of ``ptxas -v``, in the order of the log."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        head = re.match(r"(.+)' for 'sm_(\d+)\w*'", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if not head or not registers or not spills:
            raise ValueError(f"ptxas -v said what is not understood here: {part[:300]!r}")
        usage = (int(registers[1]), int(spills[1]), int(spills[2]), int(shared[1]) if shared else 0)
        found.append(KernelUsage(head[1], head[2], *usage))
    return found


def short_name(demangled: str) -> str:
    """``topk_partial_kernel<Float32>`` of a full signature."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ").split("(")[0]
    return re.sub(r"\w+::", "", name)


def demangle(log: str) -> str:
    """With the demangler of binutils, which C++ compilers bring; without one, names stay as they are."""
    tool = shutil.which("c++filt")
    return subprocess.run([tool], input=log, capture_output=True, text=True, check=True).stdout if tool else log


def compile_source(nvcc: Path, source: Path, architectures: Sequence[str]) -> list[KernelUsage]:
    """Device code for these architectures and the host side; RuntimeError with what nvcc printed."""
    with tempfile.TemporaryDirectory() as folder:
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
        command = [str(nvcc), "-std=c++17", "-c", *targets, "-Xptxas", "-v", str(source), "-o", str(Path(folder, "kernels.o"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{result.stderr or result.stdout}")
    usages = parse_ptxas(demangle(result.stdout + result.stderr))
    return [usage._replace(kernel=short_name(usage.kernel)) for usage in usages]


def complaints(usage: KernelUsage) -> list[str]:
    spilled = usage.spill_stores + usage.spill_loads
    return [f"spills: {usage.spill_stores} bytes stored, {usage.spill_loads} loaded"] if spilled else []


def run_compile_csrc(architectures: Sequence[str], console: Console, sources: Path = SOURCES) -> list[str]:
    """Print a table per source; what is wrong."""
    wanted = [name for name in architectures if name in ARCHITECTURES]
    files = sorted(sources.glob("*.cu"))
    if not wanted or not files:
        return []
    nvcc = find_nvcc()
    if nvcc is None:
        required = os.environ.get("DPPO_KERNELS_REQUIRE_EXT") == "1"
        reason = "no nvcc: neither CUDA_HOME (with include/cuda_runtime.h) nor PATH has one"
        console.print(f"csrc/cuda skipped, {reason}")
        return [f"csrc/cuda: {reason}, and DPPO_KERNELS_REQUIRE_EXT=1"] if required else []
    failures: list[str] = []
    for file in files:
        try:
            usages = compile_source(nvcc, file, wanted)
        except (RuntimeError, ValueError) as error:
            failures.append(str(error))
            continue
        if not usages:
            failures.append(f"{file.name}: no kernel found in it")
        table = Table(title=f"csrc/cuda/{file.name}")
        for column in ("kernel", "architecture", "registers", "spill stores", "spill loads", "shared bytes", ""):
            table.add_column(column)
        for usage in sorted(usages, key=lambda usage: (usage.kernel, int(usage.architecture))):
            wrong = complaints(usage)
            failures += [f"sm_{usage.architecture} {usage.kernel}: {what}" for what in wrong]
            numbers = (usage.registers, usage.spill_stores, usage.spill_loads, usage.shared)
            table.add_row(usage.kernel, f"sm_{usage.architecture}", *map(str, numbers), "; ".join(wrong))
        console.print(table)
    return failures
