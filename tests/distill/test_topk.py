"""`topk_distill_loss` against its definition, and its contract. Which divergence it is, `test_reference` asks."""

from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import topk_distill_loss
from tests.distill.cases import KINDS, DistillCase, cast, distill_cases, head, run_topk, teacher_topk
from tests.distill.test_op import ALL, hold_to_reference
from tests.numerics import bit_equal


def least_left(case: DistillCase, k: int) -> float:
    """Smallest probability that either model leaves to tokens that were not recorded."""
    ids, teacher = teacher_topk(case, min(k, case.vocab))
    counted = case.mask()
    student = torch.log_softmax(case.final_logits()[0][counted], -1).gather(-1, ids[counted].clamp(min=0))
    kept = [torch.where(ids[counted] >= 0, x.double().exp(), 0.0).sum(-1) for x in (student, teacher[counted])]
    return 1 - max((x.max().item() for x in kept if x.numel()), default=0.0)


@given(case=distill_cases(dtypes=ALL), k=st.sampled_from([1, 4, 20]))
@example(case=DistillCase("jsd", 0.1, t=11, softcap=5.0, bias=True, lora="student", temperature="per_row", t_squared=True), k=4)
@example(case=DistillCase("reverse_kl", dtype=torch.bfloat16, scale=0.5, temperature="cold", layout="strided"), k=1)
@example(case=DistillCase("forward_kl", bias=True, banned="both"), k=4)
def test_as_exact_as_torch(case: DistillCase, k: int) -> None:
    # 1 minus a sum of float32 probabilities: a rest of 1e-7 is noise, and its inverse is in the gradient.
    assume(least_left(case, k) > 1e-3)
    hold_to_reference(case, lambda *args, **options: run_topk(*args, k=k, **options), "torch")


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_nothing_left_to_other_tokens_is_finite(kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, scale=30.0, temperature="cold", masked="none")
    assert least_left(case, case.vocab) < 1e-6
    values, grads, _ = run_topk(case, torch.float32, "torch", k=case.vocab)
    assert all(x.isfinite().all() for x in (*values.values(), *grads.values()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_nan_behind_the_mask_changes_nothing(kind: str, beta: float, backend: str) -> None:
    case = DistillCase(kind, beta, b=4, t=9, bias=True, lora="student", temperature="per_row", t_squared=True)
    ids, logprobs = teacher_topk(case, 4)
    mask, (student, _) = case.mask(), cast(case, torch.float32, "cpu")
    assert (ids[~mask] > case.vocab).all()
    leaves, found = list(student.values()), []
    for poisoned in (False, True):
        temperature = case.per_token_temperature()
        x = {"hidden": student["hidden"], "ids": ids, "logprobs": logprobs, "temperature": temperature}
        if not poisoned:
            x = {name: torch.where(mask[..., None] if y.dim() == 3 else mask, y, 0) for name, y in x.items()}
            x["temperature"] = torch.where(mask, temperature, 1.0)
            x["logprobs"] = torch.where(x["ids"] >= 0, x["logprobs"], 0.0)  # of padding
        loss, stats = topk_distill_loss(
            *(x["hidden"], head(student), x["ids"], x["logprobs"], mask),
            **(case.options() | {"temperature": x["temperature"]}),
            student_bias=student["bias"],
            backend=backend,
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves), *stats["divergence"]))
    for clean, poisoned_value in zip(*found, strict=True):
        assert bit_equal(clean, poisoned_value)
        assert not poisoned_value.isnan().any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_token_that_counts_gives_exact_zeros(backend: str) -> None:
    values, grads, _ = run_topk(DistillCase(masked="all", bias=True), torch.float32, backend)
    assert not any(value.any() for value in values.values())
    assert not any(grad.any() for grad in grads.values())


def test_no_tokens_at_all() -> None:
    hidden, weight = torch.randn(0, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    loss, _ = topk_distill_loss(hidden, weight, torch.zeros(0, 2).long(), torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


def test_a_token_with_only_padding_has_nothing_to_learn() -> None:
    """One outcome, of probability 1 in both models."""
    hidden, weight = torch.randn(2, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    for kind, beta in KINDS:
        loss, _ = topk_distill_loss(
            hidden, weight, torch.full((2, 3), -1), torch.zeros(2, 3), torch.ones(2, dtype=torch.bool), kind=kind, beta=beta
        )
        assert abs(loss) < 1e-15
        assert not torch.autograd.grad(loss, weight)[0].any()


def test_micro_batches_with_a_global_denominator_add_up() -> None:
    case = DistillCase(temperature="per_row", dtype=torch.float64, lora="student")
    ids, logprobs = teacher_topk(case, 4)
    student, _ = cast(case, torch.float64, "cpu")
    arguments = case.options() | {"loss_mask": case.mask()}

    def loss(rows: slice, **changes: Any) -> Tensor:
        part = {name: x[rows] if isinstance(x, Tensor) else x for name, x in (arguments | changes).items()}
        return topk_distill_loss(student["hidden"][rows], head(student), ids[rows], logprobs[rows], **part)[0]

    whole, total = loss(slice(None)), float(case.mask().sum())
    parts = sum(loss(slice(row, row + 1), denominator=total) for row in range(case.b))
    torch.testing.assert_close(parts, whole)
    leaves = list(student.values())
    torch.testing.assert_close(torch.autograd.grad(parts, leaves), torch.autograd.grad(whole, leaves))


def test_compiled_equals_eager() -> None:
    case = DistillCase(bias=True, temperature="per_row", lora="student")
    ids, logprobs = teacher_topk(case, 4)
    student, _ = cast(case, torch.float32, "cpu")
    arguments = case.options() | {"loss_mask": case.mask()}

    def step(student: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, stats = topk_distill_loss(
            student["hidden"] * 2, head(student), ids, logprobs, **arguments, student_bias=student["bias"], with_entropy=True
        )
        return loss * 3, stats["student_entropy"].sum

    outs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, entropy = function(student)
        outs.append((loss.detach(), entropy, *torch.autograd.grad(loss, list(student.values()))))
    torch.testing.assert_close(*outs)


MASK = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": torch.zeros(5, 3)}, ValueError, r"`student_hidden` must have shape \[\*loss_mask.shape, H of"),
        ({"student_weight": torch.zeros(7, 3).half()}, TypeError, "`student_hidden` is .*32 and `student_weight` is .*16"),
        ({"student_bias": torch.zeros(6)}, ValueError, "`student_bias` must have shape"),
        ({"student_softcap": 0.0}, ValueError, "`student_softcap` must be positive"),
        ({"student_logit_scale": None}, TypeError, "`student_logit_scale` must be a number"),
        ({"teacher_ids": torch.zeros(4, 2)}, TypeError, "`teacher_ids` must hold token ids"),
        (
            {"teacher_ids": torch.zeros(4, 0).long()},
            ValueError,
            r"`teacher_ids` must be \[\*loss_mask.shape, K\], got \[4, 0\]",
        ),
        ({"teacher_ids": torch.zeros(4).long()}, ValueError, r"`teacher_ids` must be \[\*loss_mask.shape, K\]"),
        ({"teacher_logprobs": torch.zeros(4, 3)}, ValueError, "`teacher_logprobs` must have shape that of `teacher_ids`"),
        ({"teacher_logprobs": torch.zeros(4, 2).long()}, TypeError, "`teacher_logprobs` must have a floating-point dtype"),
        ({"teacher_logprobs": torch.zeros(4, 2, device="meta")}, ValueError, "`teacher_logprobs` is on meta"),
        ({"loss_mask": MASK.float()}, TypeError, "`loss_mask` must be a bool tensor"),
        ({"loss_mask": MASK.view(2, 2, 1)}, ValueError, r"`loss_mask` must be \[B, T\] or \[N\]"),
        ({"kind": "kl"}, ValueError, "`kind` must be one of"),
        ({"beta": 2}, ValueError, r"`beta` must be in \[0, 1\]"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive"),
        ({"temperature": torch.ones(2)}, ValueError, "`temperature` must have shape one per row"),
        ({"temperature": torch.zeros(4)}, ValueError, "`temperature` must be positive and finite"),
        ({"temperature": torch.ones(4, requires_grad=True)}, ValueError, "`temperature` is not differentiable"),
        ({"denominator": 0}, ValueError, "`denominator` must be positive"),
        ({"workspace_bytes": 0.5}, ValueError, "`workspace_bytes` must be an int >= 0"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve linear_logprobs"),
        ({"teacher_ids": torch.tensor([[0, 7]] * 4)}, ValueError, r"`teacher_ids` must be below 7 .*got 7"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    good = {
        "student_hidden": torch.zeros(4, 3),
        "student_weight": torch.zeros(7, 3),
        "teacher_ids": torch.tensor([[0, 1]] * 4),
        "teacher_logprobs": torch.full((4, 2), -1.0),
        "loss_mask": MASK,
    }
    with pytest.raises(error, match=message):
        topk_distill_loss(**(good | changes))
