"""`linear_distill_loss` against its definition: every kind, dtype, mask and workspace; its contract."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import LoraWeight, explain_linear_distill_loss, linear_distill_loss
from dppo_kernels.distill import op
from dppo_kernels.distill import rows as row_stage
from dppo_kernels.linear_logprobs import gradient_gemms
from tests.distill.cases import KINDS, STUDENT, DistillCase, Found, cast, distill_cases, head, run
from tests.numerics import assert_as_exact_as_torch, bit_equal

HALF = (torch.bfloat16, torch.float16)
ALL = (torch.float32, torch.float64, *HALF)
# No more than must be; sixteen rows; everything.
WORKSPACES = (0, 16 * 123 * 8, 1 << 20)


def hold_to_reference(case: DistillCase, runner: Any, backend: str, device: str = "cpu", **options: Any) -> Found:
    """As exact as torch in values, per-token results and gradients; returns what was found."""
    found = values, grads, rest = runner(case, case.dtype, backend, device, **options)
    exact, exact_grads, exact_rest = runner(case, torch.float64, "reference")
    # A low-rank update is rounded to 16 bits between its two products, as torch has it.
    rounds = case.lora != "none" or case.dtype == torch.float64
    in_torch, torch_grads, _ = runner(case, case.dtype if rounds else torch.float32, "reference")
    largest = max(1.0, case.largest_logit())
    assert values.keys() == exact.keys()
    for name, value in values.items():
        assert_as_exact_as_torch(name, value, in_torch[name], exact[name], largest=largest)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        # Logits over the temperature are compared, and what that gives divided by it once more.
        unit = largest / case.coldest()
        assert_as_exact_as_torch(f"d{name}", grad, torch_grads[name].to(case.dtype), exact_grads[name], largest=unit)
    mask = case.mask()
    for stat in rest["stats"].values():
        assert stat[1] == mask.sum()
    assert not any(value[~mask].any() for name, value in values.items() if name != "loss")
    if rest["agrees"] is not None and case.softcap is None and case.teacher_softcap is None and case.dtype in ALL[:2]:
        assert torch.equal(rest["agrees"], exact_rest["agrees"])
    return found


@pytest.mark.parametrize("workspace", WORKSPACES)
@given(case=distill_cases(dtypes=ALL))
@example(case=DistillCase("jsd", 0.1, t=11, softcap=5.0, bias=True, lora="both", temperature="per_row", t_squared=True))
@example(case=DistillCase("reverse_kl", dtype=torch.bfloat16, teacher_dtype=torch.float16, scale=30.0, temperature="cold"))
@example(case=DistillCase("forward_kl", bias=True, banned="teacher", layout="strided", trained=("weight", "bias")))
@example(case=DistillCase("tv", bias=True, banned="both", scale=30.0))
def test_as_exact_as_torch(workspace: int, case: DistillCase) -> None:
    hold_to_reference(case, run, "torch", workspace_bytes=workspace)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_statistics_are_those_of_the_reference(kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, b=4, t=9, dtype=torch.float64, teacher_dtype=torch.float64, temperature="per_row")
    (_, _, ours), (_, _, theirs) = (run(case, torch.float64, backend) for backend in ("torch", "reference"))
    assert list(ours["stats"]) == list(theirs["stats"]) == ["divergence", "student_entropy", "agreement"]
    for name, stat in theirs["stats"].items():
        for a, b in zip(ours["stats"][name], stat, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    assert ours["stats"]["divergence"][0] > 0
    values, _, plain = run(case, torch.float64, "torch", with_entropy=False, with_agreement=False)
    assert list(plain["stats"]) == ["divergence"]
    assert "student_entropy" not in values
    assert plain["agrees"] is None


def test_an_interpolated_jsd_keeps_its_digits_in_float32() -> None:
    """Also where student and teacher nearly agree: the divergence is then of second order in what float32 rounds."""
    for beta in (0.01, 0.1, 0.5, 0.9):
        for teacher, relative in (("apart", 1e-5), ("close", 1e-2)):
            case = DistillCase("jsd", beta, b=4, t=11, vocab=123, masked="none", teacher=teacher, student_size=33, scale=1.0)
            runs = ((torch.float32, "torch"), (torch.float32, "reference"), (torch.float64, "reference"))
            ours, in_torch, exact = (run(case, dtype, backend)[0]["divergence"].double() for dtype, backend in runs)
            error, theirs = ((x / exact - 1).abs().max() for x in (ours, in_torch))
            print(f"beta {beta}, {teacher}: relative error {error:.1e}, torch {theirs:.1e}")
            assert error < min(relative, 2 * theirs + 1e-6)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_teacher_as_its_own_student_has_nothing_to_learn(kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, teacher="same", bias=True, banned="both", lora="both", softcap=5.0)
    values, grads, rest = run(case, torch.float32, "torch")
    assert values["divergence"].abs().max() == 0
    assert max(grad.abs().max() for grad in grads.values()) < 1e-7
    assert torch.equal(rest["agrees"], case.mask())


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_nan_behind_the_mask_changes_nothing(kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, b=4, t=9, bias=True, lora="both", temperature="per_row", t_squared=True)
    mask = case.mask()
    assert case.leaves()["hidden"][~mask].isnan().all()
    assert case.per_token_temperature()[~mask].isnan().all()
    for backend in ("torch", "reference"):
        poisoned = run(case, torch.float32, backend)
        same = run(replace(case, poison=False), torch.float32, backend)
        for ours, others in zip(poisoned[:2], same[:2], strict=True):
            assert ours.keys() == others.keys()
            for name, value in ours.items():
                assert bit_equal(value, others[name]), name
                assert not value.isnan().any(), name
        for name, stat in poisoned[2]["stats"].items():
            assert stat == same[2]["stats"][name]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_no_token_that_counts_gives_exact_zeros(kind: str, beta: float, backend: str) -> None:
    values, grads, rest = run(DistillCase(kind, beta, bias=True, lora="both", masked="all"), torch.float32, backend)
    assert not any(value.any() for value in values.values())
    assert not any(grad.any() for grad in grads.values())
    assert rest["stats"]["divergence"][:2] == (0, 0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_tokens_at_all(shape: tuple[int, ...], backend: str) -> None:
    hidden, weight = torch.randn(*shape, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    mask = torch.ones(shape, dtype=torch.bool)
    loss, _ = linear_distill_loss(hidden, weight, torch.randn(*shape, 3), torch.randn(7, 3), mask, backend=backend)
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()
    assert hidden.grad.shape == hidden.shape


@given(st.integers(0, 2**20), st.sampled_from(KINDS))
def test_micro_batches_with_a_global_denominator_add_up(seed: int, kind: tuple[str, float]) -> None:
    case = DistillCase(
        *kind, seed=seed, dtype=torch.float64, teacher_dtype=torch.float64, lora="student", temperature="per_row"
    )
    student, teacher = cast(case, torch.float64, "cpu")
    arguments = case.arguments()
    total = arguments["loss_mask"].sum().clamp(min=1)

    def loss(rows: slice, denominator: Any) -> Tensor:
        part = {name: x[rows] if isinstance(x, Tensor) else x for name, x in arguments.items()}
        hidden, other = student["hidden"][rows], teacher["hidden"][rows]
        return linear_distill_loss(hidden, head(student), other, head(teacher), **part, denominator=denominator)[0]

    leaves = list(student.values())
    whole = loss(slice(None), None)
    expected = torch.autograd.grad(whole, leaves)
    parts = [loss(slice(row, row + 1), number) for row, number in enumerate((total, float(total), total.view(1)))]
    summed = [torch.autograd.grad(part, leaves) for part in parts]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close([sum(grads) for grads in zip(*summed, strict=True)], list(expected))


def test_chunks_pieces_and_tiles_of_the_head_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = DistillCase(b=3, t=11, vocab=123, bias=True, lora="both", softcap=5.0, temperature="per_row", dtype=torch.bfloat16)
    whole = run(case, torch.bfloat16, "torch")
    monkeypatch.setattr(row_stage, "PIECE_ELEMENTS", 3 * 123)
    monkeypatch.setattr(gradient_gemms, "WEIGHT_TILE_ELEMENTS", 40 * 12)
    cut = run(case, torch.bfloat16, "torch", workspace_bytes=0)
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut[1], whole[1], rtol=2**-7, atol=1e-5)
    assert torch.equal(cut[2]["agrees"], whole[2]["agrees"])


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_lora_head_equals_the_sum(kind: str) -> None:
    case = DistillCase(kind, dtype=torch.float64, teacher_dtype=torch.float64, lora="both", bias=True, softcap=5.0)
    student, teacher = cast(case, torch.float64, "cpu")
    bias = {"student_bias": student["bias"], "teacher_bias": teacher["bias"]}
    leaves, results = list(student.values()), []
    for summed in (False, True):
        heads = [
            x.base + x.scale * x.b @ x.a if summed and isinstance(x, LoraWeight) else x for x in (head(student), head(teacher))
        ]
        loss, _ = linear_distill_loss(
            student["hidden"], heads[0], teacher["hidden"], heads[1], **case.arguments(), **bias, backend="torch"
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert list(student) == ["hidden", "weight", "bias", "a", "b"]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("a", "b"), ("hidden", "bias"), ("b",), ()])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_frozen_inputs(trained: tuple[str, ...], workspace: int) -> None:
    case = DistillCase(bias=True, lora="student")
    _, everything, _ = run(case, torch.float32, "torch")
    assert tuple(everything) == STUDENT
    _, grads, _ = run(replace(case, trained=trained), torch.float32, "torch", workspace_bytes=workspace)
    assert grads.keys() == set(trained)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, everything[name])


def test_the_teacher_gets_no_gradient() -> None:
    case = DistillCase(bias=True, lora="both")
    for backend in ("torch", "reference"):
        student, teacher = cast(case, torch.float32, "cpu")
        for x in teacher.values():
            x.requires_grad_()
        loss, _ = linear_distill_loss(
            *(student["hidden"], head(student), teacher["hidden"], head(teacher)),
            **case.arguments(),
            student_bias=student["bias"],
            teacher_bias=teacher["bias"],
            backend=backend,
        )
        loss.backward()
        assert all(x.grad is None for x in teacher.values())
        assert all(x.grad.any() for x in student.values())


def test_without_grad_mode_nothing_is_differentiable() -> None:
    case = DistillCase()
    with torch.no_grad():
        student, teacher = cast(case, torch.float32, "cpu")
        loss, _ = linear_distill_loss(
            student["hidden"], student["weight"], teacher["hidden"], teacher["weight"], **case.arguments()
        )
    assert not loss.requires_grad
    assert torch.equal(loss, run(case, torch.float32, "torch")[0]["loss"])


def test_the_gradient_is_scaled_by_what_arrives() -> None:
    case = DistillCase(bias=True)
    _, once, _ = run(case, torch.float32, "torch")
    _, scaled, _ = run(case, torch.float32, "torch", upstream=-2.5)
    for name, grad in once.items():
        torch.testing.assert_close(scaled[name], -2.5 * grad)


def call(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hidden, weight) of a call that trains both."""
    case = DistillCase()
    student, teacher = cast(case, torch.float32, "cpu")
    hidden, weight = student["hidden"], student["weight"]
    loss, _ = linear_distill_loss(hidden, weight, teacher["hidden"], teacher["weight"], **(case.arguments() | changes))
    return loss, hidden, weight


def test_backward_hands_the_gradient_over_once() -> None:
    loss, hidden, _ = call()
    loss.backward(retain_graph=True)
    kept = hidden.grad.clone()
    with pytest.raises(RuntimeError, match=r"linear_distill_loss .* backward runs once"):
        loss.backward()
    assert torch.equal(hidden.grad, kept)


def test_it_has_no_second_derivative() -> None:
    loss, hidden, _ = call()
    with pytest.raises(RuntimeError, match="linear_distill_loss has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_fp16_gradients_survive_a_large_denominator() -> None:
    """4096 tokens: their gradients, of about 1e-7 each before the loss is scaled, are float16's subnormals."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, 8, generator=g).half(), torch.randn(31, 8, generator=g).mul(1e-2).half()
    other, other_weight = torch.randn(4096, 8, generator=g).half(), torch.randn(31, 8, generator=g).half()
    mask, found = torch.ones(4096, dtype=torch.bool), []
    for dtype, backend in ((torch.float16, "torch"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        teacher = [x.to(dtype) for x in (other, other_weight)]
        loss, _ = linear_distill_loss(*leaves, *teacher, mask, kind="forward_kl", denominator=1e5, backend=backend)
        found.append(torch.autograd.grad(loss * 2.0**16, leaves))
    assert (found[1][0] / 2**16).abs().max() < 6e-7
    for ours, exact in zip(*found, strict=True):
        assert (ours.double() - exact).norm() < 1e-3 * exact.norm()


def test_under_autocast_products_round_as_in_linear_logprobs() -> None:
    case = DistillCase()
    student, teacher = cast(case, torch.float32, "cpu")
    leaves = student["hidden"], student["weight"]
    others = teacher["hidden"], teacher["weight"]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_distill_loss(*leaves, *others, **case.arguments())
    grads = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.float32] * 2
    rounded = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected, _ = linear_distill_loss(*rounded, *(x.bfloat16() for x in others), **case.arguments())
    assert torch.equal(loss, expected)
    assert torch.equal(grads[0].bfloat16(), torch.autograd.grad(expected, rounded)[0])


def test_autocast_takes_heads_of_another_dtype() -> None:
    case = DistillCase(lora="both")
    student, teacher = cast(case, torch.float32, "cpu")
    mixed = head(student | {"hidden": student["hidden"].detach()})
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_distill_loss(
            student["hidden"].bfloat16(), mixed, teacher["hidden"], teacher["weight"].bfloat16(), **case.arguments()
        )
    grads = torch.autograd.grad(loss, [student[name] for name in ("weight", "a", "b")])
    assert all(g.dtype == torch.float32 and g.any() for g in grads)


def test_compiled_equals_eager() -> None:
    case = DistillCase(bias=True, lora="both", temperature="per_row")
    student, teacher = cast(case, torch.float32, "cpu")
    arguments = case.arguments()

    def step(student: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        loss, stats, aux = linear_distill_loss(
            *(student["hidden"] * 2, head(student), teacher["hidden"], head(teacher)),
            **arguments,
            student_bias=student["bias"],
            with_entropy=True,
            with_agreement=True,
            return_aux=True,
        )
        return loss * 3 + stats["divergence"].mean.detach() * 0, stats["agreement"].sum, aux.student_entropy

    outs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, *others = function(student)
        outs.append((loss.detach(), *others, *torch.autograd.grad(loss, list(student.values()))))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("asked", [{}, {"with_entropy": True, "with_agreement": True}])
def test_opcheck(asked: dict[str, bool]) -> None:
    case = DistillCase(b=2, t=3, vocab=11, lora="both", bias=True, temperature="per_row")
    seen = {}
    real = torch.ops.dppo_kernels.linear_distill_loss

    def record(*args: Any) -> Any:
        # Leaves of their own: opcheck differentiates more than once.
        seen["args"] = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.dppo_kernels, "linear_distill_loss", record)
        run(case, torch.float32, "torch", **({"with_entropy": False, "with_agreement": False} | asked))
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(op._op, tuple(seen["args"]), test_utils=utils)


def test_dead_tokens_of_both_models_get_no_gradient() -> None:
    case = DistillCase(bias=True, banned="both", masked="none")
    dead = torch.isinf(case.leaves()["bias"])
    assert dead.any()
    for kind, beta in KINDS:
        _, grads, _ = run(replace(case, kind=kind, beta=beta, teacher="close"), torch.float32, "torch")
        assert not grads["bias"][dead].any()
        assert not grads["weight"][dead].any()
        assert all(grad.isfinite().all() for grad in grads.values())


MASK = torch.ones(2, 3, dtype=torch.bool)
F64 = torch.zeros(2, 3, 5).double()


def good_arguments() -> dict[str, Any]:
    return {
        "student_hidden": torch.randn(2, 3, 4),
        "student_weight": torch.randn(7, 4),
        "teacher_hidden": torch.randn(2, 3, 5),
        "teacher_weight": torch.randn(7, 5),
        "loss_mask": MASK,
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": None}, TypeError, "`student_hidden` must be a torch.Tensor, got NoneType"),
        ({"student_hidden": torch.zeros(2, 3, 4).int()}, TypeError, "`student_hidden` must have a floating-point dtype"),
        ({"student_hidden": torch.zeros(2, 4, 4)}, ValueError, r"`student_hidden` must have shape \[\*loss_mask.shape, H of"),
        ({"student_hidden": torch.zeros(2, 3, 9)}, ValueError, "`student_hidden` must have shape"),
        ({"student_weight": torch.zeros(7)}, ValueError, r"`student_weight` must be \[V, H\]"),
        ({"student_weight": torch.zeros(7, 4).half()}, TypeError, "`student_hidden` is .*32 and `student_weight` is .*16"),
        ({"teacher_hidden": torch.zeros(6, 5)}, ValueError, "`teacher_hidden` must have shape"),
        ({"teacher_weight": torch.zeros(7, 4)}, ValueError, "`teacher_hidden` must have shape"),
        ({"teacher_weight": torch.zeros(7, 5).half()}, TypeError, "`teacher_hidden` is .*32 and `teacher_weight` is .*16"),
        (
            {"teacher_weight": torch.zeros(9, 5)},
            ValueError,
            "`student_weight` has a vocabulary of 7 and `teacher_weight` one of 9: they must be over the same tokens",
        ),
        (
            {"teacher_weight": LoraWeight(torch.zeros(9, 5), torch.zeros(2, 5), torch.zeros(9, 2))},
            ValueError,
            "a vocabulary of 7 and `teacher_weight` one of 9",
        ),
        (
            {"student_weight": LoraWeight(torch.zeros(7, 4), torch.zeros(2, 4), torch.zeros(9, 2))},
            ValueError,
            "`student_weight.b` must have shape",
        ),
        (
            {"teacher_hidden": F64, "teacher_weight": torch.zeros(7, 5).double()},
            TypeError,
            "`student_hidden` is torch.float32 and `teacher_hidden` is torch.float64: both or none in float64",
        ),
        ({"student_bias": torch.zeros(6)}, ValueError, "`student_bias` must have shape"),
        ({"teacher_bias": torch.zeros(7).long()}, TypeError, "`teacher_bias` must have a floating-point dtype"),
        ({"student_softcap": -1.0}, ValueError, "`student_softcap` must be positive"),
        ({"teacher_softcap": 0.0}, ValueError, "`teacher_softcap` must be positive"),
        ({"student_logit_scale": "1"}, TypeError, "`student_logit_scale` must be a number"),
        ({"teacher_logit_scale": float("nan")}, ValueError, "`teacher_logit_scale` must be finite"),
        ({"loss_mask": MASK.float()}, TypeError, "`loss_mask` must be a bool tensor"),
        ({"loss_mask": MASK[..., None]}, ValueError, r"`loss_mask` must be \[B, T\] or \[N\], got \[2, 3, 1\]"),
        ({"loss_mask": MASK.to("meta")}, ValueError, "`loss_mask` is on meta, but `student_hidden` is on cpu"),
        ({"teacher_weight": torch.zeros(7, 5, device="meta")}, ValueError, "`teacher_weight` is on meta"),
        ({"kind": "kl"}, ValueError, "`kind` must be one of 'forward_kl', 'reverse_kl', 'jsd', 'tv'; got 'kl'"),
        ({"beta": 1.5}, ValueError, r"`beta` must be in \[0, 1\], got 1.5"),
        ({"beta": None}, TypeError, "`beta` must be a number"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "`temperature` must have shape one per row"),
        ({"temperature": torch.ones(2, 3, requires_grad=True)}, ValueError, "`temperature` is not differentiable"),
        ({"temperature": torch.zeros(2, 3)}, ValueError, "`temperature` must be positive and finite; got 0.0 at index"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "`temperature` must be positive and finite; got -1.0"),
        ({"denominator": 0.0}, ValueError, "`denominator` must be positive"),
        ({"denominator": torch.ones(2)}, ValueError, "`denominator` must be one number"),
        ({"workspace_bytes": -1}, ValueError, "`workspace_bytes` must be an int >= 0"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve linear_distill_loss"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_arguments(changes: dict, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=message):
        linear_distill_loss(**(good_arguments() | {"backend": backend} | changes))


def test_a_scalar_tensor_is_a_temperature() -> None:
    for backend in ("torch", "reference"):
        losses = [
            linear_distill_loss(**(good := good_arguments()), temperature=2.0, t_squared=True, backend=backend)[0],
            linear_distill_loss(**good, temperature=torch.tensor(2.0), t_squared=True, backend=backend)[0],
        ]
        torch.testing.assert_close(losses[0], losses[1])


def test_explain_names_rows_and_work() -> None:
    assert explain_linear_distill_loss(n_rows=8192, vocab=151936) == (
        "torch: gradient in the forward, 69 rows of both models' logits at a time: 2 n V (3 H_s + H_t) FLOPs"
    )
    assert "16 rows" in explain_linear_distill_loss(n_rows=8192, vocab=151936, workspace_bytes=0)
    assert "34 rows" in explain_linear_distill_loss(n_rows=8192, vocab=151936, dtype=torch.float64)
    assert explain_linear_distill_loss(n_rows=1, vocab=2, backend="reference").startswith("reference")
    with pytest.raises(ValueError, match="`workspace_bytes`"):
        explain_linear_distill_loss(n_rows=1, vocab=2, workspace_bytes=-1)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_permuting_rows_commutes(kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, b=4, temperature="per_row")
    student, teacher = cast(case, torch.float32, "cpu")
    order, found = torch.tensor([2, 0, 3, 1]), []
    for rows in (slice(None), order):
        arguments = {name: x[rows] if isinstance(x, Tensor) else x for name, x in case.arguments().items()}
        hidden, other = student["hidden"][rows], teacher["hidden"][rows]
        loss, _, aux = linear_distill_loss(hidden, head(student), other, head(teacher), **arguments, return_aux=True)
        (grad,) = torch.autograd.grad(loss, student["hidden"])
        found.append((loss, aux.divergence if rows is order else aux.divergence[order], grad))
    torch.testing.assert_close(*found)
