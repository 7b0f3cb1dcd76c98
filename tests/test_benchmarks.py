"""The benchmarks tell the truth: wrong results are not timed, absent peers are named, gates can fail."""

import csv
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("trl", reason="the trl extra is not installed")

from benchmarks import cases, harness, report, run
from benchmarks import compile as gate
from benchmarks.shapes import Shape, shapes_for

CPU = torch.device("cpu")
TINY = {"C1": Shape(24, 16, 300)}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("name", cases.NAMES)
def test_every_case_runs_and_says_who_is_missing(name: str, console: Console, tmp_path: Path) -> None:
    rows = run.run_case(name, TINY, CPU, torch.float32, 2, console)
    present = {row["provider"] for row in rows}
    assert {"dppo_kernels", "naive"} <= present
    for provider in set(cases.load(name).PROVIDERS) - present:
        assert f"{provider} is missing: " in console.file.getvalue()
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["max_error"]) < 1e-3
        assert row["commit"]
    assert {row["time_over_ours"] for row in rows if row["provider"] == "dppo_kernels"} == {"1.00"}
    run.print_rows(rows, console)
    harness.write_rows(tmp_path / "a.csv", rows)
    harness.write_rows(tmp_path / "a.csv", rows)
    assert len(list(csv.DictReader((tmp_path / "a.csv").open()))) == 2 * len(rows)


def test_wrong_results_are_not_timed(console: Console, monkeypatch) -> None:
    case = cases.load("linear_logprobs")
    monkeypatch.setitem(case.PROVIDERS, cases.OURS, lambda x: case.naive(x) + 0.01)
    with pytest.raises(SystemExit, match="not timing wrong results"):
        run.run_case("linear_logprobs", TINY, CPU, torch.float32, 2, console)


def test_a_peer_without_a_backward_is_named_and_the_others_are_timed(console: Console, monkeypatch) -> None:
    case = cases.load("linear_logprobs")
    monkeypatch.setitem(case.PROVIDERS, "trl", torch.no_grad()(case.naive))
    rows = run.run_case("linear_logprobs", TINY, CPU, torch.float32, 2, console)
    assert {row["mode"] for row in rows if row["provider"] == "trl"} == {"forward"}
    assert {row["mode"] for row in rows if row["provider"] == cases.OURS} == {"forward", "forward+backward"}
    assert "trl is missing from forward+backward: RuntimeError" in console.file.getvalue()


def test_gradients_of_all_cases_agree_with_full_logits() -> None:
    for name in cases.NAMES:
        case = cases.load(name)
        x = case.inputs(TINY["C1"], torch.float32, CPU)
        ours, naive = (run.timed(case, provider, x, "forward+backward")() for provider in (cases.OURS, "naive"))
        for a, b in zip(ours, naive, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rounds_rotate_and_count() -> None:
    calls = []
    seconds = harness.paired_rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert harness.ratio({"peer": [2.0, 6.0, 4.0], "ours": [1.0, 2.0, 2.0]}, "peer", "ours") == 2
    assert harness.quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)


def rows_file(path: Path, milliseconds: float) -> str:
    row = {
        "case": "c",
        "shape": "C1",
        "dtype": "float32",
        "mode": "forward",
        "provider": "dppo_kernels",
        "p50_ms": milliseconds,
    }
    row |= {"time_over_ours": 1, "device": "d", "n": 1, "h": 2, "v": 3, "torch": "t", "trl": "r"}
    harness.write_rows(path, [row])
    return str(path)


def test_comparison_and_table(tmp_path: Path, console: Console) -> None:
    a, b = rows_file(tmp_path / "a.csv", 2.0), rows_file(tmp_path / "b.csv", 5.0)
    assert report.print_comparison(a, b, console) == 0
    assert "2.50" in console.file.getvalue()
    rows_file(tmp_path / "a.csv", 4.0)  # appended: the newest row counts
    assert [row["p50_ms"] for row in report.read_rows(tmp_path / "a.csv").values()] == ["4.0"]
    assert "| c | 1, 2, 3 | forward | dppo_kernels 5 (1) |" in report.markdown(report.read_rows(tmp_path / "b.csv").values())


def test_sweeps_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    sweep = {name: shape for name, shape in shapes_for("cpu", sweep=True).items() if name[0] in "VN"}
    rows = [
        {"case": "c", "shape": name, **shape._asdict(), "dtype": "float32", "mode": "forward+backward", "provider": provider}
        | {"p50_ms": shape.n * shape.v / 1e6, "peak_mib": "" if provider == "trl" else 1.5, "device": "d"}
        for name, shape in sweep.items()
        for provider in ("dppo_kernels", "trl")
    ]
    harness.write_rows(tmp_path / "d" / "c.csv", rows)
    [figure] = report.plot(report.read_rows(tmp_path).values(), tmp_path)
    assert figure == tmp_path / "d" / "c.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_readme_holds_the_reports_table() -> None:
    text = (report.ROOT / "README.md").read_text()
    table = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert table == report.markdown(report.read_rows(report.ROOT / "benchmarks" / "results").values()).strip()


def test_shapes() -> None:
    assert set(shapes_for("cuda")) == {"S1", "S2", "S3"}
    assert len(shapes_for("cpu", quick=True)) <= 2
    assert {"V8192", "N128", "C1"} <= set(shapes_for("cpu", sweep=True))


def test_the_compile_gate_complains() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    gemm = next(case for case in gate.cases("90") if case.gemm)
    good = gate.Report(registers=200, spilled_bytes=0, shared=147480, matrix="wgmma.mma", tma=True)
    assert gate.complaints(gemm, "90", good) == []
    bad = gate.Report(registers=255, spilled_bytes=64, shared=300000, matrix="mma.sync", tma=False)
    assert len(gate.complaints(gemm, "90", bad)) == 3
    assert len(gate.complaints(gemm, "80", bad)) == 1
