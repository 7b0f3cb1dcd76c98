"""The C++ kernel under AddressSanitizer and UndefinedBehaviorSanitizer, for each instruction set this machine has."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
TARGETS = {"default": [], "x86-64-v3": ["-march=x86-64-v3"]}


def has_avx2() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and {"avx2", "fma", "f16c"} <= set(cpu.read_text().split())


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("target", TARGETS)
def test_no_memory_error_and_no_undefined_behaviour(target: str, tmp_path: Path) -> None:
    if target != "default" and not (platform.machine() == "x86_64" and has_avx2()):
        pytest.skip(f"this processor is not {target}")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    # As setup.py builds it, less the choice of the instruction set at load time, which runs before the sanitizers start.
    flags = ["-std=c++20", "-O2", "-g", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
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
