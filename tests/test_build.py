"""An install never fails for want of torch, a compiler or a toolkit, says what it left out, and fails where it was told to."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
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


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("ImportError('no torch here')", "--force-reinstall"),
        ("OSError('libcublas.so.12: cannot open')", "(importing it failed: OSError: lib"),
    ],
)
def test_without_torch_the_wheel_is_pure_and_says_why(checkout: Path, tmp_path_factory, broken: str, reason: str) -> None:
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text(f"raise {broken}\n")
    result = build(checkout, "-q", "bdist_wheel", PYTHONPATH=str(folder))
    assert result.returncode == 0, result.stderr
    [wheel] = checkout.glob("dist/*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    said = json.loads(zipfile.ZipFile(wheel).read("dppo_kernels/_build.json"))
    assert set(said) == {"_C", "_C_cuda"}
    assert all(text.startswith("torch was not found") and reason in text for text in said.values())
    required = build(checkout, PYTHONPATH=str(folder), DPPO_KERNELS_REQUIRE_EXT="1")
    assert required.returncode != 0
    assert "the extensions cannot be built: torch was not found" in required.stderr


def test_without_a_compiler_nothing_is_built_and_the_reason_is_kept(checkout: Path) -> None:
    broken = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    result = build(checkout, **broken)
    assert result.returncode == 0, result.stderr
    assert report(checkout)["_C"].startswith("its build failed: CompileError")
    assert torch.version.cuda is not None or report(checkout)["_C_cuda"] == "torch is a CPU build"
    assert not list(checkout.glob("dppo_kernels/*.so"))
    assert build(checkout, DPPO_KERNELS_REQUIRE_EXT="1", **broken).returncode != 0


def test_a_source_that_does_not_compile_is_left_out_with_what_was_built_before(checkout: Path) -> None:
    (checkout / "csrc" / "ops.cpp").write_text("#error not today\n")
    before = checkout / "dppo_kernels" / "_C.abi3.so"
    before.write_text("of an earlier build")
    assert build(checkout).returncode == 0
    assert report(checkout)["_C"].startswith("its build failed")
    assert not before.exists()


def test_a_toolkit_that_does_not_run_loses_only_its_extension(checkout: Path) -> None:
    toolkit = checkout / "toolkit"
    for file in ("include/cuda_runtime.h", "bin/nvcc", "lib64/libcudart_static.a"):
        (toolkit / file).parent.mkdir(parents=True)
        (toolkit / file).write_text("not executable")
    broken = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "CUDA_HOME": str(toolkit), "FORCE_CUDA": "1"}
    assert build(checkout, **broken).returncode == 0
    assert report(checkout)["_C_cuda"].startswith("its build failed: PermissionError")


def test_a_wheel_without_extensions_is_for_every_machine(checkout: Path) -> None:
    result = build(checkout, "-q", "bdist_wheel", DPPO_KERNELS_SKIP_EXT="1")
    assert result.returncode == 0, result.stderr
    assert [path.name.endswith("-py3-none-any.whl") for path in checkout.glob("dist/*.whl")] == [True]


def test_a_missing_or_broken_file_is_explained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(_ext, "_FOLDER", tmp_path)
    monkeypatch.setattr(_ext, "_is_loaded", lambda name: False)
    assert _ext._load("_C")[:2] == (
        False,
        "not built: no build was tried (pip install --no-build-isolation, without DPPO_KERNELS_SKIP_EXT)",
    )
    (tmp_path / "_build.json").write_text('{"_C": "built", "_C_cuda": "no CUDA toolkit (set CUDA_HOME)"}')
    assert _ext._load("_C")[:2] == (False, "not built: its file is gone since")
    assert _ext._load("_C_cuda")[:2] == (False, "not built: no CUDA toolkit (set CUDA_HOME)")
    (tmp_path / "_build.json").write_text("")
    assert "_build.json cannot be read" in _ext._load("_C_cuda").reason
    (tmp_path / "_C.abi3.so").write_text("not a library")
    loaded, reason, _ = _ext._load("_C")
    assert not loaded
    assert reason.startswith("_C.abi3.so does not load: ")


def test_what_a_loaded_extension_lacks(monkeypatch) -> None:
    monkeypatch.setattr(_ext, "OPS", {"_C": ("topk_logprobs", "of_tomorrow")})
    monkeypatch.setattr(torch.ops, "dppo_kernels_C", type("Namespace", (), {"topk_logprobs": None}))
    assert _ext._load("_C") == (True, "loaded before", ("of_tomorrow",))
    monkeypatch.setattr(torch.ops, "dppo_kernels_C", object())
    assert not _ext._is_loaded("_C")
