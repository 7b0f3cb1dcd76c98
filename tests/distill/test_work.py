"""The work that a fused call does, counted on the torch path; and what TRL's function does, counted the same way."""

import pytest
import torch

from dppo_kernels import linear_distill_loss
from dppo_kernels._tiling import MIN_ROWS
from dppo_kernels.distill import op
from dppo_kernels.distill.task import Task, pick_chunk_rows
from tests.census import GemmFlops, LargestTensor
from tests.distill.cases import KINDS, DistillCase, cast, head

B, T, H_S, H_T, V = 6, 20, 8, 11, 211
ROW = 2 * 4 * V  # bytes of both models' logits of a row
CASE = DistillCase(b=B, t=T, student_size=H_S, teacher_size=H_T, vocab=V, masked="some")
COUNTED = int(CASE.mask().sum())
TRAINED = {
    "trained": (("hidden", "weight"), 3 * H_S + H_T),
    "frozen head": (("hidden",), 2 * H_S + H_T),
    "frozen hidden": (("weight",), 2 * H_S + H_T),
    "no gradient": ((), H_S + H_T),
}


def captured(trained: tuple[str, ...] = ("hidden", "weight"), **changes) -> Task:
    """The task of a call, as its op builds it."""
    tasks = []
    real = op._run
    student, teacher = cast(CASE, torch.float32, "cpu")
    student, teacher = ({name: x.detach() for name, x in model.items()} for model in (student, teacher))
    for name in trained:
        student[name].requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_run", lambda task, backend: tasks.append(task) or real(task, backend))
        linear_distill_loss(
            *(student["hidden"], head(student), teacher["hidden"], head(teacher)), **(CASE.arguments() | changes)
        )
    return tasks[0]


def flops(task: Task) -> int:
    with torch.no_grad(), GemmFlops() as count:
        op._run(task, "torch")
    return count.flops


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("workspace", [0, 50 * ROW, 1 << 30])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_flops_of_the_rows_that_count(kind: str, beta: float, workspace: int, trained: str) -> None:
    names, products = TRAINED[trained]
    assert 0 < COUNTED < B * T
    assert flops(captured(names, kind=kind, beta=beta, workspace_bytes=workspace)) == 2 * COUNTED * V * products


def test_no_row_that_counts_runs_no_gemm() -> None:
    assert flops(captured(loss_mask=torch.zeros(B, T, dtype=torch.bool))) == 0


def test_entropy_agreement_and_softcap_need_no_gemm() -> None:
    asked = {"with_entropy": True, "with_agreement": True, "student_softcap": 5.0, "teacher_softcap": 5.0}
    assert flops(captured(**asked)) == 2 * COUNTED * V * (3 * H_S + H_T)


@pytest.mark.parametrize(("beta", "in_units"), [(0.0, 12), (1.0, 12), (0.5, 16)])
def test_trl_needs_half_as_much_again_or_twice_as_much(beta: float, in_units: int) -> None:
    """At equal widths ours needs 8 N H V; it projects again in its backward, and for the JSD once more in its forward."""
    kernels = pytest.importorskip("trl.kernels.chunked_divergence", reason="the trl extra is not installed")
    n, h = 30, 8
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(V, h, requires_grad=True)
    with GemmFlops() as theirs:
        divergence, _ = kernels.ChunkedDivergenceFunction.apply(
            hidden, weight, None, torch.randn(n, h), torch.randn(V, h), None, beta
        )
        divergence.sum().backward()
    assert theirs.flops == in_units * n * h * V


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_no_tensor_exceeds_the_workspace(kind: str, beta: float, softcap: float | None) -> None:
    """A chunk of one model's logits is the largest there is: nothing has both N and V."""
    task = captured(kind=kind, beta=beta, workspace_bytes=MIN_ROWS * ROW, student_softcap=softcap)
    with torch.no_grad(), LargestTensor() as largest:
        op._run(task, "torch")
    assert (MIN_ROWS - 4) * ROW / 2 <= largest.nbytes <= MIN_ROWS * ROW / 2  # chunks are balanced
    assert largest.nbytes > 4 * max(V * H_T, B * T * H_T)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, 250, id="balanced chunks"),
        pytest.param({"workspace_bytes": 100 * 8000}, 100, id="bounded by the workspace"),
        pytest.param({"workspace_bytes": 99 * 8000}, 91, id="no sliver at the end"),
        pytest.param({"workspace_bytes": 0}, MIN_ROWS, id="no workspace"),
        pytest.param({"workspace_bytes": 0, "n_rows": 5}, 5, id="few rows"),
        pytest.param({"n_rows": 0}, 1, id="no rows"),
        pytest.param({"vocab": 0}, 250, id="no vocabulary"),
        pytest.param({"vocab": 151936}, 67, id="a large vocabulary in the default"),
        pytest.param({"backend": "triton"}, 256, id="whole blocks of the interpreter's kernels"),
        pytest.param({"backend": "triton", "workspace_bytes": 0, "device": "cuda"}, 128, id="one block of a GPU's kernels"),
        pytest.param({"backend": "triton", "n_rows": 5, "device": "cuda"}, 128, id="less than a block"),
        pytest.param({"backend": "triton", "n_rows": 10**5, "device": "cuda"}, 4096, id="a GPU's target"),
    ],
)
def test_rows_of_a_chunk(changes: dict, expected: int) -> None:
    arguments = {"n_rows": 1000, "vocab": 1000, "bytes_per_logit": 8, "workspace_bytes": None, "device": "cpu"}
    arguments |= {"backend": "torch"} | changes
    assert pick_chunk_rows(**(arguments | {"device": torch.device(arguments["device"])})) == expected
