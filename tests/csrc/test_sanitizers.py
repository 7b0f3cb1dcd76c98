"""C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer with the loops this processor gets, and those of any."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
# What the processor has is picked at run time; the loops without it are tested by themselves.
TARGETS = {"picked": [], "baseline": ["-DDPPO_BASELINE_ONLY"]}
# Source, optimisation (the vectors of GAE are written out: they need none), last line.
PROGRAMS = {"fuzz_topk": ("topk_logprobs.cpp", "-O2", "2000 rows"), "fuzz_gae": ("gae.cpp", "-O1", "2000 batches")}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_memory_error_and_no_undefined_behaviour(name: str, target: str, tmp_path: Path) -> None:
    source, optimisation, says = PROGRAMS[name]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = [
        "-std=c++20",
        optimisation,
        "-g",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
        "-Wno-psabi",
    ]
    sources = [ROOT / "csrc" / "cpu" / source, ROOT / "tests" / "csrc" / f"{name}.cpp"]
    program = tmp_path / name
    command = [
        COMPILER,
        *flags,
        *sanitizers,
        *TARGETS[target],
        "-DDPPO_ONE_TARGET",
        "-I",
        ROOT / "csrc",
        *sources,
        "-o",
        program,
    ]
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program), "2000"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip() == says
