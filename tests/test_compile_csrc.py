"""The compile gate of `csrc/cuda`: it reads what ptxas says, complains of spills, and does not pass by skipping."""

import io
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the trl extra is not installed")

from rich.console import Console

from benchmarks import compile_csrc as gate

# As printed by nvcc 13.0, two architectures, one kernel that spills and one without shared memory.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4dppo12_GLOBAL__N_113topk_kernelI7Float32EEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN4dppo12_GLOBAL__N_113topk_kernelI7Float32EEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 13504 bytes smem, 456 bytes cmem[0], 80 bytes cmem[2]
ptxas info    : Compile time = 196.766 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4dppo12_GLOBAL__N_113topk_kernelI7Float32EEvPKT_' for 'sm_100a'
ptxas info    : Function properties for _ZN4dppo12_GLOBAL__N_113topk_kernelI7Float32EEvPKT_
    72 bytes stack frame, 112 bytes spill stores, 184 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 72 bytes cumulative stack size
ptxas info    : Compile time = 282.965 ms
"""
MANGLED = "_ZN4dppo12_GLOBAL__N_113topk_kernelI7Float32EEvPKT_"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_log_of_ptxas() -> None:
    good, bad = gate.parse_ptxas(LOG)
    assert good == gate.KernelUsage(MANGLED, "80", 32, 0, 0, 13504)
    assert bad == gate.KernelUsage(MANGLED, "100", 40, 112, 184, 0)
    assert gate.complaints(good) == []
    assert gate.complaints(bad) == ["spills: 112 bytes stored, 184 loaded"]
    assert gate.complaints(bad._replace(spill_stores=0)) != []
    with pytest.raises(ValueError, match="not understood"):
        gate.parse_ptxas(LOG.replace("Used", "Took"))


def test_names_are_short() -> None:
    full = "void dppo::(anonymous namespace)::topk_kernel<dppo::(anonymous namespace)::Float32>(dppo::Bits const*, float)"
    assert gate.short_name(full) == "topk_kernel<Float32>"
    assert gate.short_name(MANGLED) == MANGLED


def test_nvcc_is_that_of_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        assert gate.find_nvcc() is None
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert gate.find_nvcc() == tmp_path / "bin" / "nvcc"


def test_a_missing_nvcc_is_said_and_fails_where_it_is_required(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "find_nvcc", lambda: None)
    monkeypatch.delenv("DPPO_KERNELS_REQUIRE_EXT", raising=False)
    assert gate.run_compile_csrc(("80", "90"), console) == []
    assert "skipped, no nvcc" in text(console)
    monkeypatch.setenv("DPPO_KERNELS_REQUIRE_EXT", "1")
    assert gate.run_compile_csrc(("80", "90"), console) != []
    assert gate.run_compile_csrc(("gfx942",), console) == []


@pytest.fixture
def nvcc() -> Path:
    found = gate.find_nvcc()
    if found is None:
        pytest.skip("no nvcc on this machine")
    return found


def test_kernels_compile_without_spills(nvcc: Path, console: Console) -> None:
    assert gate.run_compile_csrc(("90",), console) == []
    for name in ("topk_partial_kernel", "topk_merge_kernel"):
        assert text(console).count(name) == 3  # dtypes


def test_what_does_not_compile_fails(nvcc: Path, console: Console, tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("__global__ void kernel() { undefined(); }\n")
    (tmp_path / "empty.cu").write_text("int nothing;\n")
    broken, empty = gate.run_compile_csrc(("90",), console, tmp_path)
    assert broken.startswith("broken.cu does not compile")
    assert "undefined" in broken
    assert empty == "empty.cu: no kernel found in it"
