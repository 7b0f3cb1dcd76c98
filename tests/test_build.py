"""An install never fails for want of torch, a compiler or a toolkit, says what it left out, and fails where it was told to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dppo_kernels import _ext

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("csrc", "dppo_kernels", "trainers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=LEFT_OUT)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def build(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DPPO_KERNELS_")}
    return subprocess.run(
        [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))],
        cwd=checkout,
        env={**clean, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def report(checkout: Path) -> dict[str, str]:
    return json.loads((checkout / "dppo_kernels" / "_build.json").read_text())


@pytest.fixture
def no_torch(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('no torch here')\n")
    return str(folder)


def test_without_torch_nothing_is_built_and_the_reason_is_kept(checkout: Path, no_torch: str) -> None:
    result = build(checkout, PYTHONPATH=no_torch)
    assert result.returncode == 0, result.stderr
    assert set(report(checkout).values()) == {
        "torch was not found when this was installed: install torch, then this with --no-build-isolation"
    }
    required = build(checkout, PYTHONPATH=no_torch, DPPO_KERNELS_REQUIRE_EXT="1")
    assert required.returncode != 0
    assert "dppo_kernels._C cannot be built: torch was not found" in required.stderr


def test_without_a_compiler_nothing_is_built_and_the_reason_is_kept(checkout: Path) -> None:
    broken = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    result = build(checkout, **broken)
    assert result.returncode == 0, result.stderr
    assert report(checkout)["_C"].startswith("its build failed: CompileError")
    assert torch.version.cuda is not None or report(checkout)["_C_cuda"] == "torch is a CPU build"
    assert not list(checkout.glob("dppo_kernels/*.so"))
    assert build(checkout, DPPO_KERNELS_REQUIRE_EXT="1", **broken).returncode != 0


def test_a_source_that_does_not_compile_is_left_out(checkout: Path) -> None:
    (checkout / "csrc" / "ops.cpp").write_text("#error not today\n")
    assert build(checkout).returncode == 0
    assert report(checkout)["_C"].startswith("its build failed")


def test_a_wheel_without_extensions_is_for_every_machine(checkout: Path) -> None:
    result = build(checkout, "-q", "bdist_wheel", DPPO_KERNELS_SKIP_EXT="1")
    assert result.returncode == 0, result.stderr
    assert [path.name.endswith("-py3-none-any.whl") for path in checkout.glob("dist/*.whl")] == [True]


def test_a_missing_or_broken_file_is_explained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(_ext, "_FOLDER", tmp_path)
    assert _ext._load("_C") == (
        False,
        "not built: no build was tried (pip install --no-build-isolation, without DPPO_KERNELS_SKIP_EXT)",
    )
    (tmp_path / "_build.json").write_text('{"_C": "built", "_C_cuda": "no CUDA toolkit (set CUDA_HOME)"}')
    assert _ext._load("_C") == (False, "not built: its file is gone since")
    assert _ext._load("_C_cuda") == (False, "not built: no CUDA toolkit (set CUDA_HOME)")
    (tmp_path / "_C.abi3.so").write_text("not a library")
    loaded, reason = _ext._load("_C")
    assert not loaded
    assert reason.startswith("_C.abi3.so does not load: ")
