"""The definition agrees with first principles, with torch's own KL, and with TRL: float64 where nothing else is said."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import distill_loss, linear_distill_loss
from dppo_kernels.distill import reference
from dppo_kernels.distill.kinds import resolve_kind
from dppo_kernels.distill.reference import divergence_of_logprobs, divergence_ref
from tests.distill.cases import KINDS, DistillCase, distill_cases, run, run_logits, run_topk, teacher_topk
from tests.strategies import probabilities

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
PAIRS = st.tuples(st.sampled_from([1, 2, 17, 100]), st.integers(0, 2**20), st.sampled_from([0.1, 2.0, 30.0]))
DOUBLE = (torch.float64,)


def pair(vocab: int, seed: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Log-probs of a student and of a teacher, 9 rows."""
    teacher, student = probabilities(vocab, 9, seed, sharpness)
    return student, teacher


def divergence(kind: str, student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    return divergence_ref(student, teacher, resolve_kind(kind, beta)).divergence


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_gradcheck(kind: str, beta: float) -> None:
    mask = torch.tensor([True, False, True])
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    hidden, weight, bias = leaf(3, 4), leaf(7, 4), leaf(7)
    other, other_weight = leaf(3, 5).detach(), leaf(7, 5).detach()
    temperature = torch.tensor([0.7, 1.0, 1.5], dtype=torch.float64)
    options = {"kind": kind, "beta": beta, "temperature": temperature, "t_squared": True, "backend": "reference"}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = {"student_bias": bias, "student_softcap": 3.0, "student_logit_scale": 0.5, "teacher_softcap": 2.0}
        return linear_distill_loss(hidden, weight, other, other_weight, mask, **head, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
    logits, others = hidden @ weight.t(), other @ other_weight.t()
    assert torch.autograd.gradcheck(lambda z: distill_loss(z, others, mask, **options)[0], (logits.detach().requires_grad_(),))


@given(PAIRS, st.sampled_from(KINDS))
def test_never_negative_and_zero_for_equal_distributions(which: tuple, kind: tuple[str, float]) -> None:
    student, teacher = pair(*which)
    assert (divergence(kind[0], student, teacher, kind[1]) >= -1e-14).all()
    torch.testing.assert_close(divergence(kind[0], teacher + 3, teacher, kind[1]), torch.zeros(9).double(), rtol=0, atol=1e-12)


@given(PAIRS, st.floats(0.01, 0.99))
def test_the_jsd_is_at_most_the_entropy_of_its_weights(which: tuple, beta: float) -> None:
    """It is what one draw from the mixture tells about which of the two models it came from."""
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert (divergence("jsd", *pair(*which), beta) <= bound + 1e-12).all()


def test_the_bound_is_reached_where_the_supports_are_apart() -> None:
    student, teacher = torch.zeros(1, 4).double(), torch.zeros(1, 4).double()
    student[:, :2], teacher[:, 2:] = -torch.inf, -torch.inf
    torch.testing.assert_close(
        divergence("jsd", student, teacher, 0.5), torch.tensor([math.log(2)], dtype=torch.float64), **CLOSE
    )
    torch.testing.assert_close(divergence("tv", student, teacher), torch.ones(1).double(), **CLOSE)


@given(PAIRS, st.floats(0.01, 0.99))
def test_swapping_the_models_mirrors_beta(which: tuple, beta: float) -> None:
    student, teacher = pair(*which)
    torch.testing.assert_close(
        divergence("jsd", student, teacher, beta), divergence("jsd", teacher, student, 1 - beta), **CLOSE
    )
    torch.testing.assert_close(divergence("forward_kl", student, teacher), divergence("reverse_kl", teacher, student), **CLOSE)
    torch.testing.assert_close(divergence("tv", student, teacher), divergence("tv", teacher, student), **CLOSE)


@given(PAIRS)
def test_beta_0_and_1_are_the_kls_and_not_the_limits_of_the_formula(which: tuple) -> None:
    student, teacher = pair(*which)
    for beta, kind in ((0, "forward_kl"), (1.0, "reverse_kl")):
        kl = divergence(kind, student, teacher)
        assert torch.equal(divergence("jsd", student, teacher, beta), kl)
        near = abs(beta - 1e-9)
        assert (divergence("jsd", student, teacher, near) <= 1e-7 + 1e-8 * kl).all()
        # What the formula tends to once it is divided by what goes to 0; so close that the second order does not show.
        if which[2] == 0.1:
            torch.testing.assert_close(divergence("jsd", student, teacher, abs(beta - 1e-5)) / 1e-5, kl, rtol=1e-3, atol=1e-9)


@given(PAIRS)
def test_total_variation_is_a_distance_bounded_by_the_kl(which: tuple) -> None:
    student, teacher = pair(*which)
    tv = divergence("tv", student, teacher)
    assert (tv >= 0).all()
    assert (tv <= 1 + 1e-12).all()
    for kind in ("forward_kl", "reverse_kl"):
        assert (tv <= (divergence(kind, student, teacher).clamp(min=0) / 2).sqrt() + 1e-7).all()


@given(PAIRS)
def test_against_torchs_kl(which: tuple) -> None:
    student, teacher = (torch.log_softmax(z, -1) for z in pair(*which))
    forward = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence("forward_kl", student, teacher), forward, **CLOSE)
    log_m = (0.3 * teacher.exp() + 0.7 * student.exp()).log()
    jsd = sum(
        weight * torch.nn.functional.kl_div(log_m, x, reduction="none", log_target=True).sum(-1)
        for weight, x in ((0.3, teacher), (0.7, student))
    )
    torch.testing.assert_close(divergence("jsd", student, teacher, 0.3), jsd, rtol=1e-7, atol=1e-9)


@given(PAIRS, st.sampled_from([0.3, 2.0, 50.0]))
def test_the_temperature_divides_both_logits_and_its_square_multiplies_the_loss(which: tuple, temperature: float) -> None:
    student, teacher = pair(*which)
    mask = torch.ones(9, dtype=torch.bool)
    for kind, beta in KINDS:
        options = {"kind": kind, "beta": beta, "backend": "reference"}
        divided, _ = distill_loss(student / temperature, teacher / temperature, mask, **options)
        loss, stats = distill_loss(student, teacher, mask, temperature=temperature, **options)
        squared, same = distill_loss(student, teacher, mask, temperature=temperature, t_squared=True, **options)
        torch.testing.assert_close(loss, divided, **CLOSE)
        torch.testing.assert_close(squared, temperature**2 * loss, **CLOSE)
        assert torch.equal(stats["divergence"].sum, same["divergence"].sum)


def test_the_square_keeps_the_size_of_the_gradient_of_a_hot_forward_kl() -> None:
    """Hinton et al.: towards high temperatures T^2 KL has the gradient of a mean squared difference of centred logits."""
    student, teacher = pair(17, 0, 2.0)
    student.requires_grad_()
    mask = torch.ones(9, dtype=torch.bool)
    loss, _ = distill_loss(student, teacher, mask, kind="forward_kl", temperature=1e4, t_squared=True, backend="reference")
    centred = [z - z.mean(-1, keepdim=True) for z in (student.detach(), teacher)]
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], (centred[0] - centred[1]) / 17 / 9, rtol=1e-2, atol=1e-4)


@given(distill_cases(dtypes=DOUBLE))
def test_hidden_states_and_their_logits_agree(case: DistillCase) -> None:
    (linear, _, a), (given_logits, _, b) = (runner(case, torch.float64, "reference") for runner in (run, run_logits))
    torch.testing.assert_close(linear, given_logits, **CLOSE)
    torch.testing.assert_close(a["stats"], b["stats"], **CLOSE)
    student, teacher = case.final_logits()
    mask = case.mask()
    assert torch.equal(a["stats"]["divergence"][1], mask.sum())
    p = torch.distributions.Categorical(logits=student[mask]) if mask.any() else None
    entropy = p.entropy() if p is not None else torch.zeros(0).double()
    torch.testing.assert_close(linear["student_entropy"][mask], entropy, **CLOSE)
    if case.softcap is None and case.teacher_softcap is None:
        assert torch.equal(a["agrees"], (student.argmax(-1) == teacher.argmax(-1)) & mask)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = DistillCase(dtype=torch.float64, teacher_dtype=torch.float64, lora="both", bias=True, temperature="per_row")
    whole = run(case, torch.float64, "reference")
    monkeypatch.setattr(reference, "pick_row_chunk", lambda vocab: 2)
    for a, b in zip(whole, run(case, torch.float64, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(distill_cases(dtypes=DOUBLE), st.integers(1, 20))
def test_merging_outcomes_lowers_the_divergence(case: DistillCase, k: int) -> None:
    case = replace(case, lora="none", banned="none", teacher="apart")
    full, _, _ = run(case, torch.float64, "reference")
    merged, _, _ = run_topk(case, torch.float64, "reference", k=k)
    # Recorded log-probs are float32, and the bucket of the rest holds at least 1e-12.
    assert (merged["divergence"] <= full["divergence"] * (1 + 1e-5) + 1e-5).all()


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_all_ids_recorded_is_the_full_divergence(kind: str, beta: float) -> None:
    case = DistillCase(kind, beta, vocab=17, dtype=torch.float64, teacher_dtype=torch.float64, masked="some", scale=1.0)
    full, grads, _ = run(case, torch.float64, "reference")
    logp = torch.log_softmax(case.final_logits()[1].nan_to_num(nan=0.0), -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.distill.cases.teacher_topk", lambda case, k: (logp.argsort(-1), logp.sort(-1).values))
        merged, merged_grads, _ = run_topk(case, torch.float64, "reference", k=17)
    loose = {"rtol": 1e-6, "atol": 1e-9}  # the rest counts as 1e-12
    torch.testing.assert_close({name: merged[name] for name in full}, full, **loose)
    torch.testing.assert_close(merged_grads, grads, **loose)


def test_what_was_recorded_is_used_in_any_order_and_without_padding() -> None:
    case = DistillCase("forward_kl", dtype=torch.float64, teacher_dtype=torch.float64, masked="none")
    ids, logprobs = teacher_topk(case, 4)
    assert (ids < 0).any()
    student = case.logits()[0]
    present = ids >= 0
    log_q = torch.log_softmax(student, -1).gather(-1, ids.clamp(min=0))
    p, q = (torch.where(present, x.exp(), 0.0) for x in (logprobs.double(), log_q))
    terms = torch.where(present, p * (logprobs.double() - log_q), 0.0).sum(-1)
    rest = 1 - p.sum(-1), 1 - q.sum(-1)
    values, _, _ = run_topk(case, torch.float64, "reference")
    torch.testing.assert_close(values["divergence"], terms + rest[0] * (rest[0] / rest[1]).log(), **CLOSE)


@pytest.mark.parametrize(("kind", "beta"), [pair for pair in KINDS if pair[0] != "tv"])
@pytest.mark.parametrize("teacher", ["apart", "close"])
def test_values_are_those_of_trl(kind: str, beta: float, teacher: str) -> None:
    kernels = pytest.importorskip("trl.kernels.chunked_divergence", reason="the trl extra is not installed")
    case = DistillCase(
        kind, beta, masked="none", bias=True, softcap=5.0, logit_scale=0.5, teacher_logit_scale=0.25, teacher=teacher
    )
    x, y, options = case.leaves(), case.teacher_leaves(), case.arguments()
    theirs, entropy = kernels.ChunkedDivergenceFunction.apply(
        *(x["hidden"].flatten(0, 1), x["weight"], x["bias"], y["hidden"].flatten(0, 1), y["weight"], y["bias"]),
        *({"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[kind], 1.0, options["student_logit_scale"]),
        *(options["student_softcap"], options["teacher_logit_scale"], options["teacher_softcap"]),
    )
    for backend in ("reference", "torch"):
        values, _, _ = run(case, torch.float32, backend)
        torch.testing.assert_close(values["divergence"].flatten(), theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values["student_entropy"].flatten(), entropy, rtol=1e-4, atol=1e-5)


def test_it_takes_logprobs_of_any_shape() -> None:
    student, teacher = pair(17, 0, 2.0)
    for kind, beta in KINDS:
        flat = divergence_of_logprobs(student, teacher, resolve_kind(kind, beta))
        shaped = divergence_of_logprobs(student.view(3, 3, 17), teacher.view(3, 3, 17), resolve_kind(kind, beta))
        assert torch.equal(flat.view(3, 3), shaped)
