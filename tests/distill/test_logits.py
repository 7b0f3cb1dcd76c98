"""`distill_loss` against its definition, and its contract: it reads logits that somebody else owns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from dppo_kernels import distill_loss
from dppo_kernels.distill import logits_op, logits_torch, rows
from tests.distill.cases import KINDS, DistillCase, distill_cases, run_logits
from tests.distill.test_op import ALL, hold_to_reference
from tests.numerics import bit_equal


@given(case=distill_cases(dtypes=ALL))
@example(case=DistillCase("jsd", 0.1, t=11, temperature="per_row", t_squared=True, layout="strided"))
@example(case=DistillCase("reverse_kl", dtype=torch.bfloat16, teacher_dtype=torch.float16, scale=30.0, temperature="cold"))
@example(case=DistillCase("forward_kl", bias=True, banned="teacher", layout="strided"))
@example(case=DistillCase("tv", bias=True, banned="both", scale=30.0))
def test_as_exact_as_torch(case: DistillCase) -> None:
    # What the head is made of does not matter here: logits are given.
    hold_to_reference(replace(case, lora="none"), run_logits, "torch")


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_statistics_are_those_of_the_reference(kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, b=4, t=9, dtype=torch.float64, teacher_dtype=torch.float64, temperature="per_row")
    (_, _, ours), (_, _, theirs) = (run_logits(case, torch.float64, backend) for backend in ("torch", "reference"))
    assert list(ours["stats"]) == list(theirs["stats"]) == ["divergence", "student_entropy", "agreement"]
    torch.testing.assert_close(ours["stats"], theirs["stats"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_nan_behind_the_mask_changes_nothing(kind: str, beta: float, backend: str) -> None:
    case = DistillCase(kind, beta, b=4, t=9, temperature="per_row", t_squared=True)
    mask = case.mask()
    options = case.options() | {"backend": backend}
    found = []
    for poison in (0.0, torch.nan):
        student, teacher = (torch.where(mask[..., None], z, poison).float() for z in case.logits())
        options["temperature"] = torch.where(mask, options["temperature"], 1.0 + poison)
        student.requires_grad_()
        loss, stats = distill_loss(student, teacher, mask, **options)
        found.append((loss, *torch.autograd.grad(loss, student), *stats["divergence"]))
    for clean, poisoned in zip(*found, strict=True):
        assert bit_equal(clean, poisoned)
        assert not poisoned.isnan().any()
    assert not found[1][1][~mask].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_token_that_counts_gives_exact_zeros(backend: str) -> None:
    values, grads, _ = run_logits(DistillCase(masked="all"), torch.float32, backend)
    assert not any(value.any() for value in values.values())
    assert not grads["logits"].any()
    for shape in ((0,), (0, 4), (2, 0)):
        student = torch.randn(*shape, 7, requires_grad=True)
        loss, _ = distill_loss(student, torch.randn(*shape, 7), torch.ones(shape, dtype=torch.bool), backend=backend)
        loss.backward()
        assert loss == 0
        assert student.grad.shape == student.shape


@pytest.mark.parametrize("view", [lambda x: x[:, :-1], lambda x: x[:, 1:], lambda x: x.transpose(0, 1)])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_views_of_logits_are_read_where_they_are_and_not_modified(view: Any, kind: str, beta: float) -> None:
    source, other = torch.randn(3, 5, 11, requires_grad=True), torch.randn(3, 5, 11)
    before = source.detach().clone(), other.clone()
    mask = torch.rand(view(other).shape[:-1]) < 0.8
    grads = []
    copies = view(source).contiguous(), view(other).contiguous()
    for student, teacher in ((view(source), view(other)), copies, (view(source), copies[1]), (copies[0], view(other))):
        loss, _ = distill_loss(student, teacher, mask, kind=kind, beta=beta, temperature=0.7)
        grads.append((loss.detach(), *torch.autograd.grad(loss, source)))
    for other_grads in grads[1:]:
        torch.testing.assert_close(grads[0], other_grads)
    assert torch.equal(source, before[0])
    assert torch.equal(other, before[1])
    assert logits_op.as_row_blocks(view(other)).data_ptr() == view(other).data_ptr()


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = DistillCase(b=3, t=11, temperature="per_row")
    whole = run_logits(case, torch.float32, "torch")
    monkeypatch.setattr(logits_torch, "pick_row_chunk", lambda vocab: 4)
    monkeypatch.setattr(rows, "PIECE_ELEMENTS", 2 * case.vocab)
    for a, b in zip(whole[:2], run_logits(case, torch.float32, "torch")[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_backward_may_run_again() -> None:
    """It is computed from the logits, which are still there."""
    student = torch.randn(4, 11, requires_grad=True)
    loss, _ = distill_loss(student, torch.randn(4, 11), torch.ones(4, dtype=torch.bool))
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(4, 11, requires_grad=True), torch.randn(4, 11, requires_grad=True)
    for backend in ("torch", "reference"):
        student.grad = None
        distill_loss(student, teacher, torch.ones(4, dtype=torch.bool), backend=backend)[0].backward()
        assert teacher.grad is None
        assert student.grad.any()
    loss, _ = distill_loss(student.detach(), teacher, torch.ones(4, dtype=torch.bool))
    assert not loss.requires_grad


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_rows_of_the_gradient_sum_to_zero(kind: str, beta: float) -> None:
    _, grads, _ = run_logits(DistillCase(kind, beta, masked="none"), torch.float32, "torch")
    assert grads["logits"].any()
    assert grads["logits"].sum(-1).abs().max() < 1e-6


def test_micro_batches_with_a_global_denominator_add_up() -> None:
    case = DistillCase(temperature="per_row", dtype=torch.float64)
    student, teacher = case.logits()
    student.requires_grad_()
    arguments = case.options() | {"loss_mask": case.mask()}

    def loss(rows: slice, **changes: Any) -> Tensor:
        part = {name: x[rows] if isinstance(x, Tensor) else x for name, x in (arguments | changes).items()}
        return distill_loss(student[rows], teacher[rows], **part)[0]

    whole, total = loss(slice(None)), float(case.mask().sum())
    parts = sum(loss(slice(row, row + 1), denominator=total) for row in range(case.b))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, student), torch.autograd.grad(whole, student))


def test_compiled_equals_eager() -> None:
    source, teacher, mask = torch.randn(6, 30, requires_grad=True), torch.randn(6, 30), torch.rand(6) < 0.8

    def step(source: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats, aux = distill_loss(
            source * 2,
            teacher,
            mask,
            temperature=torch.full((6,), 0.7),
            with_entropy=True,
            with_agreement=True,
            return_aux=True,
        )
        return loss * 3 + stats["divergence"].mean * 0, aux.student_entropy

    outs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, entropy = function(source)
        outs.append((loss.detach(), entropy, *torch.autograd.grad(loss, source)))
    torch.testing.assert_close(*outs)


def test_opcheck() -> None:
    student, teacher = torch.randn(1, 5, 30, requires_grad=True), torch.randn(1, 5, 30)
    mask, per_row = torch.rand(5) < 0.8, torch.rand(5) + 0.5
    for args in (
        (student, teacher, mask, None, 0.7, "jsd", 0.3, True, True, "torch"),
        (student, teacher, mask, per_row, 1.0, "forward_kl", 0.0, False, False, "torch"),
    ):
        assert set(torch.library.opcheck(logits_op._forward_op, args).values()) == {"SUCCESS"}


MASK = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": None}, TypeError, "`student_logits` must be a torch.Tensor, got NoneType"),
        ({"teacher_logits": torch.zeros(4, 11).int()}, TypeError, "`teacher_logits` must have a floating-point dtype"),
        (
            {"student_logits": torch.zeros(5, 11)},
            ValueError,
            r"`student_logits` must be \[\*loss_mask.shape, V\], got \[5, 11\]",
        ),
        ({"teacher_logits": torch.zeros(2, 2, 11)}, ValueError, r"`teacher_logits` must be \[\*loss_mask.shape, V\]"),
        (
            {"teacher_logits": torch.zeros(4, 12)},
            ValueError,
            "`student_logits` has a vocabulary of 11 and `teacher_logits` one of 12: they must be over the same tokens",
        ),
        ({"teacher_logits": torch.zeros(4, 11).double()}, TypeError, "both or none in float64"),
        ({"teacher_logits": torch.zeros(4, 11, device="meta")}, ValueError, "`teacher_logits` is on meta"),
        ({"loss_mask": MASK.long()}, TypeError, "`loss_mask` must be a bool tensor"),
        ({"loss_mask": MASK.view(2, 2, 1)}, ValueError, r"`loss_mask` must be \[B, T\] or \[N\]"),
        ({"kind": "js"}, ValueError, "`kind` must be one of"),
        ({"beta": -0.1}, ValueError, r"`beta` must be in \[0, 1\]"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "`temperature` must have shape one per row"),
        ({"temperature": torch.full((4,), torch.nan)}, ValueError, "`temperature` must be positive and finite"),
        ({"temperature": torch.ones(4, requires_grad=True)}, ValueError, "`temperature` is not differentiable"),
        ({"denominator": -1}, ValueError, "`denominator` must be positive"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve distill_loss"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_arguments(changes: dict, error: type[Exception], message: str, backend: str) -> None:
    good = {"student_logits": torch.zeros(4, 11), "teacher_logits": torch.zeros(4, 11), "loss_mask": MASK, "backend": backend}
    with pytest.raises(error, match=message):
        distill_loss(**(good | changes))
