"""The benchmarks tell the truth: wrong results are not timed, absent peers are named, gates can fail."""

import csv
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("trl", reason="the trl extra is not installed")

from benchmarks import cases, harness, plan, report, run
from benchmarks import compile as gate
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.cases import linear_policy_loss
from benchmarks.shapes import Shape, shapes_for
from dppo_kernels import PRESETS
from tests.linear_policy_loss import test_work as policy_work

CPU = torch.device("cpu")
TINY = {"C1": Shape(24, 16, 300)}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("name", cases.NAMES)
def test_every_case_runs_and_says_who_is_missing(name: str, console: Console, tmp_path: Path, monkeypatch) -> None:
    if name in (*cases.POLICY_LOSSES[1:], *cases.DISTILLATION[1:]):  # seconds to compile, and the same code as in the first
        monkeypatch.delitem(cases.load(name).PROVIDERS, "torch.compile")
    rows = run.run_case(name, TINY, CPU, torch.float32, 2, console)
    present = {row["provider"] for row in rows}
    assert {"dppo_kernels", "naive"} <= present
    for provider in set(cases.load(name).PROVIDERS) - present:
        for mode in cases.load(name).MODES:
            assert f"{provider} is missing from {mode}: " in console.file.getvalue()
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["max_error"]) < 1e-3
        assert row["gradient_error"] == "" if row["mode"] == "forward" else 0 < float(row["gradient_error"]) < 1e-5
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


def with_gradients_times(factor: float, function):
    """The same values with wrong gradients."""
    return lambda x: factor * function(x) + (1 - factor) * function(x).detach()


@pytest.mark.parametrize("factor", [1 + 1e-4, torch.nan])
def test_wrong_gradients_are_not_timed(factor: float, console: Console, monkeypatch) -> None:
    case = cases.load("linear_policy_loss")
    monkeypatch.setitem(case.PROVIDERS, cases.OURS, with_gradients_times(factor, case.exact))
    monkeypatch.setattr(run, "paired_rounds", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: None)
    with pytest.raises(SystemExit, match=r"not timing wrong results of forward\+backward: (gradients|values) are wrong"):
        run.run_case("linear_policy_loss", TINY, CPU, torch.float32, 2, console)


def test_a_peer_with_wrong_gradients_is_missing_with_the_reason(monkeypatch) -> None:
    case = cases.load("linear_policy_loss")
    monkeypatch.setitem(case.PROVIDERS, "trl", with_gradients_times(0.5, case.exact))
    monkeypatch.setitem(case.PROVIDERS, "naive", with_gradients_times(0.95, case.exact))  # off, as low precision may be
    x = case.inputs(TINY["C1"], torch.float32, CPU)
    errors, missing = run.verify(case, x, TINY["C1"], "forward+backward")
    assert missing["trl"] == "gradients are wrong: relative error 5.0e-01"
    assert "trl" not in errors
    assert errors["naive"].gradient == pytest.approx(0.05, rel=1e-3)


def test_one_wrong_row_or_input_is_found(monkeypatch) -> None:
    """The gradient of every trained input counts, and one of 64 rows is enough."""
    case, shape = cases.load("linear_logprobs"), Shape(64, 16, 300)
    x = case.inputs(shape, torch.float32, CPU)._replace(upstream=torch.ones(64))
    wrong = {
        "trl": lambda x: case.exact(x._replace(hidden=torch.cat([x.hidden[:-1], x.hidden[-1:].detach()]))),
        "naive": lambda x: case.exact(x._replace(weight=x.weight.detach() + 0 * x.weight)),
    }
    for peer, provider in wrong.items():
        monkeypatch.setitem(case.PROVIDERS, peer, provider)
    _, missing = run.verify(case, x, shape, "forward+backward")
    for peer in wrong:
        assert "gradients are wrong" in missing[peer]


def rows_with_gradient(case, x) -> torch.Tensor:
    return torch.autograd.grad(case.exact(x), x.hidden)[0].abs().sum(-1) != 0


def test_policy_losses_are_what_their_names_say() -> None:
    policy = [cases.load(name) for name in cases.POLICY_LOSSES]
    inputs = [case.inputs(TINY["C1"], torch.float32, CPU) for case in policy]
    plain, half, frozen, topk = inputs
    assert [len(run.trained(x)) for x in inputs] == [2, 2, 1, 2]
    assert [(x.advantages == 0).sum() for x in inputs] == [0, 4, 0, 0]
    assert [x.topk_ids is None for x in (plain, half, frozen)] == [True] * 3
    assert topk.topk_ids.shape == (8, 3, linear_policy_loss.K + 1)
    for case, x in zip(policy, inputs, strict=True):
        # Neither clip nor trust region takes rows away: the work is that of all rows that have an advantage.
        torch.testing.assert_close(rows_with_gradient(case, x), (x.advantages != 0)[:, None].expand(8, 3))
        assert case.rows(x, 16).ids.shape == (8, 2)


def test_naive_losses_mask_and_clip_as_ours_do() -> None:
    """Far from the anchor, where the timed inputs never are, the losses written out here still agree with the library's."""
    for name in ("linear_policy_loss", "linear_policy_loss_topk"):
        case = cases.load(name)
        x = case.inputs(Shape(400, 16, 300), torch.float32, CPU)
        x = x._replace(anchor=x.anchor + torch.randn_like(x.anchor), hidden=(1.5 * x.hidden).detach().requires_grad_())
        kept = rows_with_gradient(case, x).float().mean()
        assert 0.2 < kept < 0.8
        errors, missing = run.verify(case, x, Shape(400, 16, 300), "forward+backward")
        assert cases.OURS in errors, missing


def test_work_of_a_policy_loss_in_units_of_nhv() -> None:
    shape = Shape(1000, 10, 10)
    units = {
        name: [
            case.work(shape, torch.float32, "forward+backward", provider)[0] / (shape.n * shape.h * shape.v)
            for provider in (cases.OURS, "dppo_kernels unfused", "trl", "liger", "naive")
        ]
        for name in cases.POLICY_LOSSES
        for case in [cases.load(name)]
    }
    assert list(units.values()) == [[6, 8, 8, 8, 6], [3, 5, 8, 8, 6], [4, 6, 6, 6, 4], [6, 8, 8, 8, 6]]


def test_work_of_a_distillation_loss_in_units_of_nhv() -> None:
    """The teacher is half as wide again: a projection of both models is 5, and a gradient 2."""
    shape = Shape(1000, 10, 10)
    units = {
        name: [
            case.work(shape, torch.float32, "forward+backward", provider)[0] / (shape.n * shape.h * shape.v)
            for provider in (cases.OURS, "trl", "liger", "naive")
        ]
        for name in cases.LINEAR_DISTILL_LOSSES
        for case in [cases.load(name)]
    }
    assert list(units.values()) == [[9, 14, 9, 9], [9, 14, 9, 9], [9, 19, 9, 9], [7, 12, 9, 7]]


def test_distillation_losses_are_what_their_names_say() -> None:
    distill = [cases.load(name) for name in cases.LINEAR_DISTILL_LOSSES]
    inputs = [case.inputs(TINY["C1"], torch.float32, CPU) for case in distill]
    assert [len(run.trained(x)) for x in inputs] == [2, 2, 2, 1]
    assert [x.teacher_weight.shape for x in inputs] == [(300, 24)] * 4
    assert [case.rows(x, 16).teacher_hidden.shape[0] for case, x in zip(distill, inputs, strict=True)] == [16] * 4
    # Three losses of the same inputs, and one of them again.
    losses = [case.exact(x).item() for case, x in zip(distill, inputs, strict=True)]
    assert len(set(losses)) == 3
    assert losses[0] == losses[3]


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
    [other] = report.read_rows(tmp_path / "b.csv").values()
    rows = [other, other | {"provider": "peer", "p50_ms": "3.0"}, other | {"mode": "forward+backward", "n": "4"}]
    assert report.markdown(rows).splitlines()[2:] == [
        "| case | mode | 1, 2, 3 | 4, 2, 3 |",
        "|---|---|---|---|",
        "| c | forward | peer 3 (1)<br>dppo_kernels 5 (1) |  |",
        "| c | forward+backward |  | dppo_kernels 5 (1) |",
    ]


def test_rows_are_not_mixed_with_rows_of_other_columns(tmp_path: Path) -> None:
    harness.write_rows(tmp_path / "a.csv", [{"a": 1, "b": 2}])
    with pytest.raises(ValueError, match="other columns"):
        harness.write_rows(tmp_path / "a.csv", [{"a": 1, "c": 2, "b": 3}])
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


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


def test_the_document_holds_the_reports_table() -> None:
    text = report.DOCUMENT.read_text()
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


def test_the_plan_counts_what_the_library_does() -> None:
    """Its FLOPs are those that the dispatch counter finds; a rank of two sends what a ring does."""
    mask = torch.ones(policy_work.B, policy_work.T, dtype=torch.bool)
    call = policy_work.captured(PRESETS["cispo"], loss_mask=mask, advantages=torch.ones(policy_work.B))
    model = plan.Model("tiny", body=0.0, hidden=policy_work.H, vocab=policy_work.V, layers=1, kv_width=1)
    one, two = (
        plan.Step(model, gpus=n, tensor_parallel=n, sequences=policy_work.B, prompt=0, completion=policy_work.T) for n in (1, 2)
    )
    assert policy_work.flops(call) * policy_work.H * policy_work.V == one.head_flops() == 2 * two.head_flops()
    assert one.head_traffic() == (0, 0)
    assert two.head_traffic() == (4 * 2 * policy_work.N, 4 * policy_work.N * policy_work.H)


def test_the_document_holds_the_plan() -> None:
    text = plan.DOCUMENT.read_text()
    assert text.split(plan.BEGIN)[1].split(plan.END)[0].strip() == plan.markdown()


def test_a_plan_for_other_sizes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["benchmarks", "plan", "--gpus", "64", "--tensor_parallel", "4", "--vocab", "262144"]
    monkeypatch.setattr("sys.argv", command)
    assert benchmarks_main() == 0
    assert "64" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--gpus", "63"])
    with pytest.raises(SystemExit):
        benchmarks_main()
    assert "--gpus 63 is no multiple of --tensor_parallel 4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be a multiple of `tensor_parallel`: got 63 and 4"):
        plan.Step(plan.MODELS[0], 63, 4)
