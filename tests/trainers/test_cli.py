"""The command: doctor's report, usage errors, the demo's options."""

import pytest

from dppo_kernels import _backend
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
    assert "available (tested with trl" in report


def test_doctor_names_a_backend_that_cannot_serve(monkeypatch) -> None:
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", "cuda")
    assert "linear_logprobs fails: " in cli.doctor()
    assert "this version has no cuda implementation" in cli.doctor()


def test_doctor_works_without_trl(monkeypatch) -> None:
    monkeypatch.setattr(cli, "_trainers", lambda: "not available: dppo_kernels.trainers needs trl")
    assert "not available: dppo_kernels.trainers needs trl" in cli.doctor()


@pytest.mark.parametrize(
    "arguments", [[], ["train-everything"], ["doctor", "--fast"], ["demo", "--seeds", "0"], ["demo", "--sedes", "1"]]
)
def test_usage_errors(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: dppo" in capsys.readouterr().err
