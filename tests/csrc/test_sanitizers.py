"""The C++ kernel under AddressSanitizer and UndefinedBehaviorSanitizer with the loops this processor gets, and those of any."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
# What the processor has is picked at run time; the loops without it are tested by themselves.
TARGETS = {"picked": [], "baseline": ["-DDPPO_BASELINE_ONLY"]}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("target", TARGETS)
def test_no_memory_error_and_no_undefined_behaviour(target: str, tmp_path: Path) -> None:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = [
        "-std=c++20",
        "-O2",
        "-g",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
    ]
    sources = [ROOT / "csrc" / "cpu" / "topk_logprobs.cpp", ROOT / "tests" / "csrc" / "fuzz_topk.cpp"]
    program = tmp_path / "fuzz_topk"
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
    assert ran.stdout.strip() == "2000 rows"
