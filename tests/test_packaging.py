"""What users install: the package list, the public names, an import that pulls in nothing heavy, the command."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import dppo_kernels

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_package_folder_is_listed() -> None:
    found = set()
    for folder, package in ((ROOT / "dppo_kernels", "dppo_kernels"), (ROOT / "trainers", "dppo_kernels.trainers")):
        for init in folder.rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(folder).parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_extras_and_license() -> None:
    assert {"trl", "bench", "test"} <= set(PROJECT["project"]["optional-dependencies"])
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / "dppo_kernels" / "py.typed").exists()


def test_all_is_exact() -> None:
    public = {name for name, x in vars(dppo_kernels).items() if not name.startswith("_") and not isinstance(x, ModuleType)}
    assert set(dppo_kernels.__all__) == public | {"__version__"}


def test_versions_agree() -> None:
    assert python("import dppo_kernels; print(dppo_kernels.__version__)") == dppo_kernels.__version__


def test_importing_the_core_pulls_in_nothing_heavy() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import dppo_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(new & {'triton', 'trl', 'transformers', 'accelerate', 'datasets'}, torch.cuda.is_initialized())"
    )
    assert python(code) == "set() False"


def test_a_plain_checkout_finds_its_trainers() -> None:
    algorithms = ("DAPO", "DPO", "DPPO", "DecoupledPPO", "DistillPPO", "PPO")
    names = [*(f"{name}{kind}" for name in algorithms for kind in ("Config", "Trainer"))]
    names += ["PairsConfig", "accelerate_trl", "make_pairs"]
    assert python("import dppo_kernels.trainers as t; print(t.__all__)") == str(names)


@pytest.mark.parametrize("gone", ["trl", "transformers"])
def test_without_trl_the_message_says_what_to_install(gone: str) -> None:
    code = f"""
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name == {gone!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
try:
    from dppo_kernels.trainers import DPPOTrainer
except ImportError as error:
    print(error)
"""
    message = python(code)
    assert f"needs {gone}>=" in message
    assert "pip install 'dppo-kernels[trl]'" in message


def test_without_any_of_the_extra_the_message_is_the_same() -> None:
    code = """
import importlib.metadata, sys
gone = ("trl", "transformers", "accelerate", "datasets", "peft", "tokenizers", "rich", "packaging")
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
real = importlib.metadata.version
def version(name):
    if name in gone:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
import dppo_kernels
from dppo_kernels.trainers import cli
assert "not available: dppo_kernels.trainers needs trl" in cli.doctor()
try:
    from dppo_kernels.trainers import DPPOTrainer
except ImportError as error:
    print(error)
"""
    assert "pip install 'dppo-kernels[trl]'" in python(code)


def test_an_untested_trl_is_refused_by_name() -> None:
    code = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "1.99.0" if name == "trl" else real(name)
try:
    from dppo_kernels.trainers import DPPOTrainer
except ImportError as error:
    print(error)
"""
    assert python(code) == "dppo_kernels.trainers was tested with trl>=1.16,<1.17; found trl 1.99.0"
