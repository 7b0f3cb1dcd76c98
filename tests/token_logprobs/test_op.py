"""The ops against the reference: values, gradients, properties, every error, opcheck, compiled."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from dppo_kernels import token_logprobs
from dppo_kernels._row_stats import Upstream
from dppo_kernels.token_logprobs import op, torch_impl
from tests.numerics import assert_as_exact_as_torch, bit_equal
from tests.strategies import IGNORE, ScoringCase, scoring_cases

OUTPUTS = ("logprobs", "lse", "entropy")
HALF = (torch.bfloat16, torch.float16)


def run(case: ScoringCase, dtype: torch.dtype, backend: str) -> tuple[dict[str, Tensor], Tensor]:
    logits = case.logits().to(dtype).requires_grad_()
    out = token_logprobs(
        logits,
        case.ids(),
        gather_ids=case.gather_ids(),
        temperature=case.row_temperature(),
        outputs=OUTPUTS,
        backend=backend,
    )
    values = {name: value for name, value in out._asdict().items() if value is not None}
    g = torch.Generator().manual_seed(case.seed + 1)
    loss = sum((value * torch.randn(value.shape, generator=g)).sum() for value in values.values())
    return values, torch.autograd.grad(loss, logits)[0]


@given(scoring_cases(dtypes=(torch.float32, torch.float64, *HALF)))
def test_as_exact_as_torch(case: ScoringCase) -> None:
    values, grad = run(case, case.dtype, "torch")
    exact, exact_grad = run(case, torch.float64, "reference")
    in_torch, torch_grad = run(case, torch.float64 if case.dtype == torch.float64 else torch.float32, "reference")
    for name, value in values.items():
        assert_as_exact_as_torch(name, value, in_torch[name], exact[name])
    assert_as_exact_as_torch("dlogits", grad, torch_grad.to(case.dtype), exact_grad)


@given(scoring_cases())
def test_entropy_bounds_and_gradient_rows_sum_to_zero(case: ScoringCase) -> None:
    logits = case.logits().requires_grad_()
    out = token_logprobs(logits, case.ids(), temperature=case.row_temperature(), outputs=("logprobs", "entropy"))
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(case.vocab) + 1e-5).all()
    (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), logits)
    assert (grad.sum(-1).abs() <= 1e-5 * grad.abs().amax(-1).clamp(min=1)).all() if case.rows else True


def test_shifting_a_row_of_logits_changes_nothing() -> None:
    # Multiples of 1/256 and whole shifts below 2^15 are exact in float32, so that not one bit may change.
    logits = torch.randint(-2000, 2000, (9, 200)) / 256
    ids, shift = torch.randint(0, 200, (9,)), torch.randint(-1000, 1000, (9, 1)).float()
    for a, b in zip(
        token_logprobs(logits, ids, outputs=("logprobs", "entropy"))[:2],
        token_logprobs(logits + shift, ids, outputs=("logprobs", "entropy"))[:2],
        strict=True,
    ):
        assert bit_equal(a, b)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    logits, ids = torch.randn(300, 5000), torch.randint(0, 5000, (300,))
    whole = token_logprobs(logits, ids, outputs=("logprobs", "entropy"))
    for rows in (slice(0, 1), slice(299, 300), slice(100, 203)):
        part = token_logprobs(logits[rows], ids[rows], outputs=("logprobs", "entropy"))
        assert bit_equal(part.logprobs, whole.logprobs[rows])
        assert bit_equal(part.entropy, whole.entropy[rows])


def test_chunks_do_not_matter(monkeypatch) -> None:
    logits, ids = torch.randn(10, 30, requires_grad=True), torch.randint(0, 30, (10,))

    def everything() -> list[Tensor]:
        out = token_logprobs(logits, ids, outputs=("logprobs", "entropy"))
        return [*out[:2], *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), logits)]

    whole = everything()
    monkeypatch.setattr(torch_impl, "pick_row_chunk", lambda vocab: 3)
    for a, b in zip(everything(), whole, strict=True):
        assert bit_equal(a, b)


def test_impossible_tokens_have_no_gradient() -> None:
    logits = torch.randn(3, 8)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    out = token_logprobs(logits, torch.tensor([0, 1, 3]), outputs=("logprobs", "entropy"))
    (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), logits)
    assert grad.isfinite().all()
    assert not grad[:, 2].any()


def test_skipped_rows_are_not_read() -> None:
    logits = torch.randn(4, 8)
    logits[1] = torch.nan
    logits.requires_grad_()
    out = token_logprobs(logits, torch.tensor([0, IGNORE, 3, 4]), outputs=("logprobs", "entropy"))
    upstream = torch.tensor([1.0, 1.0, 0.0, 1.0])
    (grad,) = torch.autograd.grad(out.logprobs, logits, upstream)
    assert not grad[1].any()
    assert not grad[2].any()
    assert grad[0].any()


@pytest.mark.parametrize("shape", [(5, 30), (2, 5, 30)])
def test_inplace_backward_overwrites_the_logits(shape: tuple[int, ...]) -> None:
    source = torch.randn(*shape, requires_grad=True)
    ids = torch.randint(0, 30, shape[:-1])
    ids.view(-1)[0] = IGNORE
    (expected,) = torch.autograd.grad(token_logprobs(source * 1, ids, temperature=0.5).logprobs.sum(), source)
    logits = source * 1
    logprobs = token_logprobs(logits, ids, temperature=0.5, inplace_backward=True).logprobs
    (grad,) = torch.autograd.grad(logprobs.sum(), source)
    assert torch.equal(grad, expected)
    assert torch.equal(logits, expected)


def test_inplace_backward_of_a_view_with_a_dimension_of_one() -> None:
    source, ids = torch.randn(3, 2, 20, requires_grad=True), torch.tensor([[1], [2], [3]])
    (expected,) = torch.autograd.grad(token_logprobs((source * 1)[:, -1:], ids).logprobs.sum(), source)
    logprobs = token_logprobs((source * 1)[:, -1:], ids, inplace_backward=True).logprobs
    (grad,) = torch.autograd.grad(logprobs.sum(), source)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda leaf: leaf, "leaf whose values would be lost"),
        (lambda leaf: leaf.view(8, 4)[:4], "leaf whose values would be lost"),
        (lambda leaf: (leaf * 1)[:1].expand(4, 8), r"share memory \(strides \(0, 1\)\)"),
        (lambda leaf: (leaf * 1).flatten().as_strided((4, 8), (1, 1)), r"share memory \(strides \(1, 1\)\)"),
        (lambda leaf: (leaf * 1).view(2, 2, 2, 4).permute(2, 1, 0, 3), "must fold into two"),
    ],
)
def test_inplace_backward_is_refused_where_it_would_lose_data(make, message: str) -> None:
    logits = make(torch.randn(4, 8, requires_grad=True))
    ids = torch.zeros(logits.shape[:-1], dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        token_logprobs(logits, ids, inplace_backward=True)
    token_logprobs(logits, ids).logprobs.sum().backward()  # out of place it works


@pytest.mark.parametrize("view", [lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[:, 1:].unsqueeze(1)])
@pytest.mark.parametrize("inplace", [False, True])
def test_shifted_and_transposed_logits_are_not_copied(view, inplace: bool) -> None:
    source = torch.randn(3, 5, 11, requires_grad=True)
    logits = view(source * 1)
    ids = torch.randint(0, 11, logits.shape[:-1])
    assert op.as_row_blocks(logits).data_ptr() == logits.data_ptr()
    out = token_logprobs(logits, ids, inplace_backward=inplace).logprobs
    expected = torch.log_softmax(view(source), -1).gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), source)[0] for x in (expected, token_logprobs(view(source), ids).logprobs)]
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), source)[0], grads[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_the_reference_has_no_inplace_backward() -> None:
    logits, ids = torch.randn(4, 8, requires_grad=True) * 1, torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="backend 'reference' has none"):
        token_logprobs(logits, ids, inplace_backward=True, backend="reference")


def test_rounding_happens_once_in_half_precision() -> None:
    logits = torch.randn(6, 50).bfloat16().requires_grad_()
    ids = torch.randint(0, 50, (6,))
    (grad,) = torch.autograd.grad(token_logprobs(logits, ids).logprobs.sum(), logits)
    exact = torch.autograd.grad(
        token_logprobs(z := logits.detach().double().requires_grad_(), ids, backend="reference").logprobs.sum(), z
    )[0]
    assert (grad.double() - exact).abs().max() <= (exact.bfloat16().double() - exact).abs().max() + 1e-6


def test_backward_function_fills_a_poisoned_buffer() -> None:
    logits, ids = torch.randn(1, 6, 20), torch.tensor([0, 1, IGNORE, 3, 4, 5])
    saved = torch_impl.token_logprobs_fwd(logits, ids, None, 1.0, ignore_index=IGNORE, outputs=frozenset(["logprobs"]))
    dlogits = torch.full_like(logits, torch.nan)
    upstream = Upstream(torch.tensor([1.0, 0, 1, 1, 0, 2]), None, None, None)
    torch_impl.token_logprobs_bwd(logits, ids, None, 1.0, upstream, saved, ignore_index=IGNORE, dlogits=dlogits)
    assert dlogits.isfinite().all()
    assert not dlogits[0, [1, 2, 4]].any()


def good_arguments() -> dict:
    return {"logits": torch.randn(4, 11), "ids": torch.zeros(4, dtype=torch.long)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": None}, TypeError, "`logits` must be a torch.Tensor, got NoneType"),
        ({"logits": torch.zeros(4, 11, dtype=torch.int32)}, TypeError, "`logits` must have a floating-point dtype"),
        ({"ids": torch.zeros(4)}, TypeError, "`ids` must hold token ids"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, ValueError, r"`logits` must be \[\*ids.shape, V\]; got \[4, 11\]"),
        ({"ids": torch.tensor([0, 1, 11, 2])}, ValueError, r"`ids` must be in \[0, 11\) or -100; got 11 at index \[2\]"),
        ({"gather_ids": torch.zeros(3, 2, dtype=torch.long)}, ValueError, "`gather_ids` must be"),
        ({"gather_ids": torch.full((4, 2), 11)}, ValueError, "`gather_ids` must be below 11"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be positive"),
        ({"outputs": ("mean_logits",)}, ValueError, "`outputs` must be one of"),
        ({"outputs": ()}, ValueError, "`outputs` must be a sequence"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve token_logprobs"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_logprobs(**{**good_arguments(), **changes})


def test_opcheck() -> None:
    logits, ids = torch.randn(1, 5, 30, requires_grad=True), torch.randint(0, 30, (5,))
    gather_ids, per_row = torch.randint(-1, 30, (5, 3)), torch.rand(5) + 0.5
    for args in (
        (logits, ids, gather_ids, None, 0.7, IGNORE, False, "logprobs,lse,entropy", False, "torch"),
        (logits, ids, None, per_row, 1.0, IGNORE, False, "logprobs", False, "torch"),
    ):
        assert set(torch.library.opcheck(op._forward_op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_equals_eager(inplace: bool) -> None:
    source, ids, gather_ids = torch.randn(6, 30, requires_grad=True), torch.randint(0, 30, (6,)), torch.randint(0, 30, (6, 2))

    def loss(source: Tensor) -> Tensor:
        out = token_logprobs(source * 2, ids, gather_ids=gather_ids, outputs=("logprobs", "entropy"), inplace_backward=inplace)
        return out.logprobs.sum() + out.entropy.square().sum() + out.gathered.mean()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(source), source), torch.autograd.grad(loss(source), source))
