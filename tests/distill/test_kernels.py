"""Triton kernels of distillation, in the interpreter and (marked gpu) on a device: values, poison, work, bits."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dppo_kernels import distill_loss, linear_distill_loss
from dppo_kernels.distill import op, triton_impl
from dppo_kernels.distill.task import Task
from dppo_kernels.linear_logprobs.kernels_gemm import ChunkGemms
from tests.census import counted_kernels
from tests.distill.cases import DistillCase, cast, distill_cases, head, run, run_logits
from tests.distill.test_op import hold_to_reference
from tests.numerics import bit_equal

ON_CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU of this machine")
)
DEVICES = [ON_CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETED = settings(max_examples=6)  # an example is about a second
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = {"workspace_bytes": 0}  # a block of rows at a time: several chunks in the interpreter
FEATURES = DistillCase("jsd", 0.1, b=3, t=11, softcap=5.0, bias=True, banned="both", lora="both", temperature="per_row")


@pytest.mark.parametrize("device", DEVICES)
@given(case=distill_cases(dtypes=DTYPES))
@example(case=FEATURES)
@example(case=DistillCase("tv", dtype=torch.bfloat16, layout="strided", temperature="per_row", t_squared=True))
@example(case=DistillCase("reverse_kl", scale=30.0, temperature="cold", masked="none", trained=("hidden",)))
@example(case=DistillCase("forward_kl", vocab=123, teacher_dtype=torch.bfloat16, teacher="close"))
@INTERPRETED
def test_as_exact_as_torch(device: str, case: DistillCase) -> None:
    hold_to_reference(case, run, "triton", device, **BLOCK)


@pytest.mark.parametrize("device", DEVICES)
@given(case=distill_cases(dtypes=DTYPES))
@example(case=DistillCase("jsd", 0.9, dtype=torch.float16, layout="strided", temperature="per_row", vocab=123))
@example(case=DistillCase("forward_kl", dtype=torch.bfloat16, b=1, t=1, vocab=2, scale=0.1, temperature="cold", seed=2))
@INTERPRETED
def test_given_logits_as_exact_as_torch(device: str, case: DistillCase) -> None:
    hold_to_reference(case, run_logits, "triton", device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("tv", 0.5)])
def test_statistics_are_those_of_the_reference(device: str, kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, b=2, t=9)
    for runner in (run, run_logits):
        _, _, ours = runner(case, torch.float32, "triton", device)
        _, _, exact = runner(case, torch.float64, "reference")
        assert list(ours["stats"]) == list(exact["stats"])
        for name, stat in exact["stats"].items():
            for a, b in zip(ours["stats"][name], stat, strict=True):
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(ours["agrees"], exact["agrees"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_buffers_need_not_be_clean(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = DistillCase(kind, b=3, t=11, bias=True, lora="both")
    clean = run(case, torch.float32, "triton", device, **BLOCK)
    real = ChunkGemms.new

    def poisoned(self: ChunkGemms, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return real(self, shape, dtype).fill_(torch.nan)

    monkeypatch.setattr(ChunkGemms, "new", poisoned)
    dirty = run(case, torch.float32, "triton", device, **BLOCK)
    for found, again in zip(clean[:2], dirty[:2], strict=True):
        for name, value in found.items():
            assert bit_equal(value, again[name]), name


def captured(case: DistillCase, device: str, **changes: Any) -> Task:
    """The task of a call."""
    student, teacher = cast(case, case.dtype, device)
    arguments = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in case.arguments().items()}
    tasks: list[Task] = []
    real = op._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_run", lambda task, backend: tasks.append(task) or real(task, backend))
        linear_distill_loss(
            student["hidden"], head(student), teacher["hidden"], head(teacher), **(arguments | changes), backend="triton"
        )
    return tasks[0]


@pytest.mark.parametrize("device", DEVICES)
def test_descriptors_pointers_and_reruns_give_the_same_bits(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this device has no tensor memory accelerator")
    task = captured(DistillCase(b=3, t=11, student_size=16, teacher_size=24), device, **BLOCK)
    with torch.no_grad():
        runs = [triton_impl.linear_distill_loss_fwd(task, descriptors=described) for described in (True, False, True)]
    for other in runs[1:]:
        assert torch.equal(runs[0].loss_sum, other.loss_sum)
        assert torch.equal(runs[0].rows.divergence, other.rows.divergence)
        for a, b in zip(runs[0].gradients, other.gradients, strict=True):
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_the_others(device: str) -> None:
    case = DistillCase("jsd", 0.3, b=3, t=11, masked="none", vocab=123)
    student, teacher = cast(case, case.dtype, device)
    every, some = torch.ones(3, 11, dtype=torch.bool), torch.zeros(3, 11, dtype=torch.bool)
    # The interpreter multiplies tiles with BLAS, whose bits depend on the place in the tile: there, rows keep their places.
    some[(0, slice(0, 8)) if device == "cpu" else (1, slice(2, 9, 3))] = True
    found = []
    for mask in (every, some):
        _, _, aux = linear_distill_loss(
            *(student["hidden"], head(student), teacher["hidden"], head(teacher), mask.to(device)),
            return_aux=True,
            backend="triton",
            **BLOCK,
        )
        found.append(aux.divergence.cpu())
    assert bit_equal(found[0][some], found[1][some])


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    case = DistillCase(b=4, t=64, masked="none")
    student, teacher = cast(case, case.dtype, "cuda")
    mask = case.mask().cuda()
    logits = [torch.randn(4, 64, 53, device="cuda") for _ in range(2)]

    def both() -> None:
        loss, _ = linear_distill_loss(student["hidden"], head(student), teacher["hidden"], head(teacher), mask)
        other, _ = distill_loss(logits[0].requires_grad_(), logits[1], mask)
        torch.autograd.grad(loss + other, (student["hidden"], student["weight"], logits[0]))

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_elements_moved() -> None:
    """Each head once per block of rows that count to project, the student's once more for dhidden; other rows move nothing."""
    task = captured(DistillCase(b=3, t=11, student_size=16, teacher_size=24, trained=("hidden",)), "cpu")
    n, vocab = int(task.mask.sum()), task.student.weight.shape[0]
    named = {
        f"{owner}_{part}": getattr(x, part)
        for owner, x in (("student", task.student), ("teacher", task.teacher))
        for part in ("hidden", "weight")
    }
    with torch.no_grad(), counted_kernels(**named) as work:
        triton_impl.linear_distill_loss_fwd(task)
    blocks = -(-n // 16)  # of the projection and of the dhidden GEMM in the interpreter
    assert n < task.mask.numel()
    assert work.loaded == {
        "student_hidden": n * 16,
        "teacher_hidden": n * 24,
        "student_weight": 2 * blocks * vocab * 16,
        "teacher_weight": blocks * vocab * 24,
    }
    assert not work.stored


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_elements_moved_of_given_logits() -> None:
    """Logits of rows that count: three reads of the student's and teacher's; every row of the gradient is written once."""
    student, teacher, mask = torch.randn(3, 11, 53), torch.randn(3, 11, 53), torch.rand(3, 11) < 0.7
    n = int(mask.sum())
    with counted_kernels(student=student, teacher=teacher) as work:
        loss, _ = distill_loss(student.requires_grad_(), teacher, mask, backend="triton")
        torch.autograd.grad(loss, student)
    # Normalisers, divergence, gradient.
    assert work.loaded == {"student": 3 * n * 53, "teacher": 3 * n * 53}
    assert not work.stored
