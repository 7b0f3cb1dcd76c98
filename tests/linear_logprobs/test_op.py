"""The op against the reference: values, gradients, properties, every error, opcheck, compiled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import linear_logprobs
from dppo_kernels._tiling import Tile
from dppo_kernels.linear_logprobs import op, torch_impl
from tests.numerics import assert_as_exact_as_torch, bit_equal
from tests.strategies import IGNORE, ScoringCase, scoring_cases

OUTPUTS = ("logprobs", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
DIFFERENTIABLE = ("logprobs", "lse", "entropy", "gathered")
HALF = (torch.bfloat16, torch.float16)


def run(
    case: ScoringCase, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of a loss through all of them, with inputs rounded to the case's dtype, then cast to `dtype`."""
    leaves = [None if x is None else x.to(device, dtype).requires_grad_() for x in case.hidden_and_head()]
    hidden, weight, bias = leaves
    gather_ids, temperature = (
        x.to(device) if isinstance(x, Tensor) else x for x in (case.gather_ids(), case.row_temperature())
    )
    out = linear_logprobs(
        hidden,
        weight,
        case.ids().to(device),
        bias=bias,
        gather_ids=gather_ids,
        temperature=temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        outputs=OUTPUTS,
        backend=backend,
    )
    values = {name: value.cpu() for name, value in out._asdict().items() if value is not None}
    g = torch.Generator().manual_seed(case.seed + 1)
    loss = sum((values[name] * torch.randn(values[name].shape, generator=g)).sum() for name in DIFFERENTIABLE if name in values)
    used = {name: leaf for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True) if leaf is not None}
    return values, {name: grad.cpu() for name, grad in zip(used, torch.autograd.grad(loss, list(used.values())), strict=True)}


def hold_to_reference(case: ScoringCase, backend: str) -> None:
    values, grads = run(case, case.dtype, backend)
    exact, exact_grads = run(case, torch.float64, "reference")
    upcast = torch.float64 if case.dtype == torch.float64 else torch.float32
    in_torch, torch_grads = run(case, upcast, "reference")
    largest = case.largest_logit()
    for name, value in values.items():
        if name == "is_top1":
            # Ties and near-ties may fall either way; where the target clearly leads or trails they may not.
            clear = (in_torch["is_top1"] == exact["is_top1"]).logical_and(in_torch["logprobs"].exp() > 0.51)
            assert torch.equal(value[clear], exact[name][clear])
        else:
            assert_as_exact_as_torch(name, value, in_torch[name], exact[name], largest=largest)
    for name, grad in grads.items():
        torch_grad = torch_grads[name].to(case.dtype)
        assert_as_exact_as_torch(f"d{name}", grad, torch_grad, exact_grads[name], largest=largest)


@given(scoring_cases(dtypes=(torch.float32, torch.float64, *HALF)))
def test_as_exact_as_torch(case: ScoringCase) -> None:
    hold_to_reference(case, "torch")


def sharp_bf16_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, ids and float64 log-probs; logits have a standard deviation of 4."""
    hidden, weight = torch.randn(64, 256).bfloat16(), (torch.randn(20000, 256) * 4 / 16).bfloat16()
    logp = torch.log_softmax(hidden.double() @ weight.double().t(), -1)
    ids = torch.multinomial(logp.exp(), 1).squeeze(1)
    return hidden, weight, ids, logp


def test_statistics_of_16_bit_inputs_are_exact_where_16_bit_logits_are_not() -> None:
    """Log-prob and entropy within 1e-4 of float64 of the same inputs. Tiles of bf16 logits, as TRL's, lose 1e-2 and more."""
    hidden, weight, ids, logp = sharp_bf16_inputs()
    exact, entropy = logp.gather(1, ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)
    out = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
    assert (out.logprobs - exact).abs().max() < 1e-4
    assert (out.entropy - entropy).abs().max() < 1e-4
    tiles = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, ids[:, None]).squeeze(1)
    assert (tiles - exact).abs().max() > 1e-2


@given(scoring_cases())
def test_entropy_bounds_and_signs(case: ScoringCase) -> None:
    values, _ = run(case, torch.float32, "torch")
    assert (values["entropy"] >= 0).all()
    assert (values["entropy"] <= math.log(case.vocab) + 1e-5).all()
    assert (values["logprobs"] <= 0).all()
    if case.n_gather:
        assert (values["gathered"] <= 0).all()


@given(scoring_cases(), st.sampled_from([(1, 5), (3, 7), (64, 1)]))
def test_tiles_do_not_matter(case: ScoringCase, tile: tuple[int, int]) -> None:
    whole, whole_grads = run(case, torch.float64, "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, "pick_linear_tile", lambda *shape: Tile(*tile))
        tiled, tiled_grads = run(case, torch.float64, "torch")
    for name, value in whole.items():
        torch.testing.assert_close(tiled[name], value, rtol=1e-9, atol=1e-9)
    for name, grad in whole_grads.items():
        torch.testing.assert_close(tiled_grads[name], grad, rtol=1e-9, atol=1e-9)


def test_permuting_rows_commutes() -> None:
    hidden, weight, ids = torch.randn(33, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64), torch.arange(33)
    order = torch.randperm(33)
    direct = linear_logprobs(hidden[order], weight, ids[order]).logprobs
    torch.testing.assert_close(direct, linear_logprobs(hidden, weight, ids).logprobs[order], rtol=1e-12, atol=1e-12)


def test_leading_shapes_are_kept() -> None:
    hidden, weight, ids = torch.randn(2, 3, 5, 8), torch.randn(11, 8), torch.randint(0, 11, (2, 3, 5))
    gather_ids = torch.randint(0, 11, (2, 3, 5, 4))
    out = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, temperature=torch.rand(2, 3, 5) + 1)
    assert out.logprobs.shape == (2, 3, 5)
    assert out.gathered.shape == (2, 3, 5, 4)
    scalar = linear_logprobs(hidden[0, 0, 0], weight, ids[0, 0, 0])
    assert scalar.logprobs.shape == ()
    zero_dim = linear_logprobs(hidden, weight, ids, temperature=torch.tensor(2.0))
    torch.testing.assert_close(zero_dim.logprobs, linear_logprobs(hidden, weight, ids, temperature=2.0).logprobs)
    narrow = linear_logprobs(hidden, weight, ids.int(), gather_ids=gather_ids.int())
    assert bit_equal(narrow.gathered, linear_logprobs(hidden, weight, ids, gather_ids=gather_ids).gathered)


def test_outputs_not_asked_for_are_none() -> None:
    hidden, weight, ids = torch.randn(4, 8), torch.randn(11, 8), torch.zeros(4, dtype=torch.long)
    out = linear_logprobs(hidden, weight, ids)
    assert [name for name, value in out._asdict().items() if value is not None] == ["logprobs"]
    out = linear_logprobs(hidden, weight, ids, outputs=("entropy",))
    assert [name for name, value in out._asdict().items() if value is not None] == ["entropy"]


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_any_subset_of_inputs_may_be_frozen(wanted: tuple[bool, bool, bool]) -> None:
    leaves = [torch.randn(6, 4), torch.randn(9, 4), torch.randn(9)]
    ids = torch.tensor([0, 3, IGNORE, 8, 8, 1])
    all_leaves = [x.clone().requires_grad_() for x in leaves]
    some = [x.clone().requires_grad_(need) for x, need in zip(leaves, wanted, strict=True)]
    for x in (all_leaves, some):
        linear_logprobs(x[0], x[1], ids, bias=x[2]).logprobs.square().sum().backward()
    for full, leaf, need in zip(all_leaves, some, wanted, strict=True):
        assert (leaf.grad is None) != need
        if need:
            torch.testing.assert_close(leaf.grad, full.grad)


def test_only_rows_with_upstream_gradient_enter_the_backward() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    ids = torch.randint(0, 9, (8,))
    out = linear_logprobs(hidden, weight, ids).logprobs
    upstream = torch.tensor([0.0, 1, 0, 0, 2, 0, 0, 0])
    with torch.no_grad():
        poisoned = hidden.detach().clone()
        poisoned[upstream == 0] = torch.nan  # a row that is read would spread NaN over all of dweight
    (dhidden, dweight) = torch.autograd.grad(out, (hidden, weight), upstream, retain_graph=True)
    assert torch.equal(dhidden[upstream == 0], torch.zeros(6, 4))
    projection = torch_impl.Projection(poisoned, weight.detach(), None, 1.0, 1.0, None, torch.float32)
    saved = torch_impl.linear_logprobs_fwd(
        torch_impl.Projection(hidden.detach(), weight.detach(), None, 1.0, 1.0, None, torch.float32),
        ids,
        None,
        ignore_index=IGNORE,
        outputs=frozenset(["logprobs"]),
    )
    poisoned_dweight = torch_impl.linear_logprobs_bwd(
        projection,
        ids,
        None,
        torch_impl.Upstream(upstream, None, None, None),
        saved,
        ignore_index=IGNORE,
        needs=(True, True, False),
    ).weight
    torch.testing.assert_close(poisoned_dweight, dweight)


def test_ignored_rows_never_enter_a_gemm() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8, requires_grad=True)
    hidden[1] = torch.nan
    ids = torch.tensor([3, IGNORE, 5, 0])
    out = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
    assert out.logprobs[1] == 0
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert weight.grad.isfinite().all()


def test_zero_upstream_gives_exact_zero() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    out = linear_logprobs(hidden, weight, torch.zeros(4, dtype=torch.long), outputs=("logprobs", "entropy", "lse"))
    ((out.logprobs + out.entropy + out.lse) * 0).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(4, 8))
    assert torch.equal(weight.grad, torch.zeros(11, 8))


def test_bias_of_minus_infinity_is_an_impossible_token() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight, bias = torch.randn(11, 8), torch.randn(11)
    bias[2] = -torch.inf
    gather_ids = torch.tensor([[2, 3]]).expand(4, 2)
    out = linear_logprobs(
        hidden, weight, torch.tensor([0, 1, 3, 4]), bias=bias, gather_ids=gather_ids, outputs=("logprobs", "entropy")
    )
    without = torch.tensor([i for i in range(11) if i != 2])
    kept = linear_logprobs(
        hidden, weight[without], torch.tensor([0, 1, 2, 3]), bias=bias[without], outputs=("logprobs", "entropy")
    )
    torch.testing.assert_close(out.logprobs, kept.logprobs)
    torch.testing.assert_close(out.entropy, kept.entropy)
    assert (out.gathered[:, 0] == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), hidden)
    (expected,) = torch.autograd.grad(kept.logprobs.sum() + kept.entropy.sum(), hidden)
    torch.testing.assert_close(grad, expected)


def test_autocast_rounds_inputs_and_keeps_gradients_unrounded() -> None:
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    ids = torch.randint(0, 40, (5,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprobs(hidden, weight, ids).logprobs
    assert out.dtype == torch.float32
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
    expected = linear_logprobs(*rounded, ids, backend="reference").logprobs
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(out.sum(), (hidden, weight))
    for grad, exact in zip(grads, torch.autograd.grad(expected.sum(), rounded), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_inputs_keep_float32_statistics(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(32, 64).to(dtype), (torch.randn(500, 64) / 2).to(dtype)  # logits of std 4
    ids = torch.randint(0, 500, (32,))
    out = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
    exact = linear_logprobs(hidden.double(), weight.double(), ids, outputs=("logprobs", "entropy"), backend="reference")
    assert (out.logprobs - exact.logprobs).abs().max() < 1e-4
    assert (out.entropy - exact.entropy).abs().max() < 1e-4


def test_all_negative_and_large_logits() -> None:
    hidden = torch.ones(2, 1)
    weight = torch.full((300, 1), -100.0)
    out = linear_logprobs(hidden, weight, torch.tensor([0, 299]), outputs=("logprobs", "entropy"))
    torch.testing.assert_close(out.logprobs, torch.full((2,), -math.log(300)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy, torch.full((2,), math.log(300)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [129920, 151936])
def test_vocabularies_that_are_no_multiple_of_a_tile(vocab: int) -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(vocab, 4)
    ids = torch.tensor([0, vocab // 2, vocab - 1])
    exact = linear_logprobs(hidden.double(), weight.double(), ids, outputs=("logprobs", "entropy"), backend="reference")
    out = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=0, atol=2e-6)
    torch.testing.assert_close(out.entropy.double(), exact.entropy, rtol=0, atol=2e-5)


def test_rerun_is_bit_equal() -> None:
    hidden, weight, ids = torch.randn(700, 8), torch.randn(3000, 8), torch.randint(0, 3000, (700,))
    assert bit_equal(linear_logprobs(hidden, weight, ids).logprobs, linear_logprobs(hidden, weight, ids).logprobs)


ROWS, HIDDEN, VOCAB = 4, 8, 11


def good_arguments() -> dict:
    return {
        "hidden": torch.randn(ROWS, HIDDEN),
        "weight": torch.randn(VOCAB, HIDDEN),
        "ids": torch.zeros(ROWS, dtype=torch.long),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "`hidden` must be a torch.Tensor, got list"),
        ({"hidden": torch.zeros(ROWS, HIDDEN, dtype=torch.long)}, TypeError, "`hidden` must have a floating-point dtype"),
        ({"ids": torch.zeros(ROWS)}, TypeError, "`ids` must hold token ids as int64 or int32, got torch.float32"),
        ({"weight": torch.randn(VOCAB)}, ValueError, r"`weight` must be \[V, H\]"),
        ({"hidden": torch.randn(ROWS, 7)}, ValueError, r"`hidden` must have shape .* = \[4, 8\], got \[4, 7\]"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, ValueError, r"`hidden` must have shape .* = \[3, 8\], got \[4, 8\]"),
        (
            {"weight": torch.randn(VOCAB, HIDDEN).bfloat16()},
            TypeError,
            "`hidden` is torch.float32 and `weight` is torch.bfloat16",
        ),
        ({"bias": torch.randn(3)}, ValueError, r"`bias` must have shape \[V\] = \[11\], got \[3\]"),
        ({"gather_ids": torch.zeros(ROWS, dtype=torch.long)}, ValueError, "`gather_ids` must be"),
        ({"gather_ids": torch.full((ROWS, 2), VOCAB)}, ValueError, r"`gather_ids` must be below 11 .*got 11 at index \[0, 0\]"),
        ({"ids": torch.tensor([0, 1, VOCAB, 2])}, ValueError, r"`ids` must be in \[0, 11\) or -100; got 11 at index \[2\]"),
        ({"ids": torch.tensor([0, 1, -1, 2])}, ValueError, r"got -1 at index \[2\]"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive, got 0.0"),
        ({"temperature": "hot"}, TypeError, "`temperature` must be a number, got str"),
        (
            {"temperature": torch.tensor([1.0, 1, 0, 1])},
            ValueError,
            r"`temperature` must be positive and finite; got 0.0 at index \[2\]",
        ),
        ({"temperature": torch.ones(3)}, ValueError, "`temperature` must have shape one per row"),
        ({"temperature": torch.ones(ROWS, requires_grad=True)}, ValueError, "`temperature` is not differentiable"),
        ({"softcap": -1.0}, ValueError, "`softcap` must be positive"),
        ({"logit_scale": "1"}, TypeError, "`logit_scale` must be a number"),
        ({"logit_scale": math.nan}, ValueError, "`logit_scale` must be finite"),
        ({"outputs": ("probs",)}, ValueError, "`outputs` must be one of 'logprobs'.*got 'probs'"),
        ({"outputs": "entropy"}, ValueError, "`outputs` must be a sequence"),
        ({"outputs": ()}, ValueError, "`outputs` must be a sequence naming at least one"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve linear_logprobs"),
        ({"hidden": torch.randn(ROWS, HIDDEN, device="meta")}, ValueError, "`weight` is on cpu, but `hidden` is on meta"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_logprobs(**{**good_arguments(), **changes})


def test_reference_checks_values_too() -> None:
    with pytest.raises(ValueError, match="got 11 at index"):
        linear_logprobs(**{**good_arguments(), "ids": torch.tensor([0, 1, VOCAB, 2])}, backend="reference")


@pytest.mark.parametrize("outputs", ["logprobs", "logprobs,lse,entropy,log_sum_sq_probs,mean_logits,is_top1"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("design", ["recompute", "keep"])
def test_opcheck(outputs: str, frozen: bool, design: str) -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=not frozen), torch.randn(30, 8, requires_grad=True)
    ids, gather_ids = torch.randint(0, 30, (5,)), torch.randint(-1, 30, (5, 3))
    bias, per_row = torch.randn(30, requires_grad=True), torch.rand(5) + 0.5
    low_rank = (torch.randn(5, 2, requires_grad=True), torch.randn(30, 2, requires_grad=True))
    for extra in ((bias, *low_rank, ids, gather_ids, None), (None, None, None, ids, None, per_row)):
        scalars = (0.7, 1.0, 4.0, IGNORE, torch.float32, "", [])  # the head is whole
        args = (hidden, weight, *extra, *scalars, outputs, design, 3, False, "torch")
        result = torch.library.opcheck(op._forward_op, args)
        assert set(result.values()) == {"SUCCESS"}


def test_compiled_equals_eager() -> None:
    leaves = [torch.randn(6, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)]
    ids, gather_ids = torch.randint(0, 30, (6,)), torch.randint(0, 30, (6, 2))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, outputs=("logprobs", "entropy"), temperature=0.7)
        return out.logprobs.sum() + out.entropy.square().sum() + out.gathered.mean()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_meta_tensors_give_shapes() -> None:
    hidden, weight = torch.randn(4, 8, device="meta"), torch.randn(11, 8, device="meta")
    out = linear_logprobs(hidden, weight, torch.zeros(4, dtype=torch.long, device="meta"), outputs=("logprobs", "is_top1"))
    assert out.logprobs.shape == (4,)
    assert out.is_top1.dtype == torch.bool
