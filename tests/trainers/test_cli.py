"""The command: doctor's report, usage errors, the demo's options."""

import sys
from pathlib import Path

import pytest

from dppo_kernels import _backend, _ext
from dppo_kernels.trainers import cli


def test_doctor_reports_versions_devices_and_reasons(capsys) -> None:
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for package in ("dppo-kernels", "python", "torch", "trl", "transformers"):
        assert package in report
    for name, (available, reason) in _backend.status().items():
        line = next(line for line in report.splitlines() if line.split()[:1] == [name] and reason in line)
        assert ("yes" in line) == available
    assert "linear_logprobs runs on 'torch'" in report
    assert _ext.CPU.reason in report  # what was built, and why not
    assert _ext.CUDA.reason in report
    assert "available (tested with trl" in report


def test_doctor_names_a_backend_that_cannot_serve(monkeypatch) -> None:
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", "cuda")
    assert "linear_logprobs fails: " in cli.doctor()
    assert "this version has no cuda implementation" in cli.doctor()


def test_doctor_works_without_trl(monkeypatch) -> None:
    monkeypatch.setattr(cli, "_trainers", lambda: "not available: dppo_kernels.trainers needs trl")
    assert "not available: dppo_kernels.trainers needs trl" in cli.doctor()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train-everything"],
        ["doctor", "--fast"],
        ["demo", "--seeds", "0"],
        ["demo", "--sedes", "1"],
        ["accelerate"],
        ["accelerate", "--fast", __file__],
        ["accelerate", "no_such_script.py"],
    ],
)
def test_usage_errors(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: dppo" in capsys.readouterr().err


SCRIPT = """
import sys
from trl.trainer import utils
from beside import NAME

if __name__ == "__main__":
    print(NAME, sys.argv[1:], utils._ChunkedLogProbFunction.__name__)
    sys.exit(3)
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_accelerate_runs_a_script_with_trl_patched(as_module: bool, tmp_path: Path, monkeypatch, capsys) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="the trl extra is not installed")
    monkeypatch.setattr(sys, "argv", ["dppo"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "train_it.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    if as_module:
        monkeypatch.chdir(tmp_path)
    what = ["-m", "train_it"] if as_module else [str(tmp_path / "train_it.py")]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["accelerate", *what, "--lr", "1e-5", "-m", "x", "--help"])
    monkeypatch.delitem(sys.modules, "beside")
    assert exit_info.value.code == 3
    assert capsys.readouterr().out == "beside ['--lr', '1e-5', '-m', 'x', '--help'] LinearLogprobFunction\n"
    assert utils._ChunkedLogProbFunction.__name__ == "ChunkedLogProbFunction"


def test_accelerate_says_what_it_runs(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["accelerate", "--help"])
    assert exit_info.value.code == 0
    assert "accelerate launch -m dppo_kernels.trainers.cli accelerate" in " ".join(capsys.readouterr().out.split())
