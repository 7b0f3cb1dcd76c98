"""The DPO family of sequence log-probs: formulas against autograd and each other, weights of tokens, the contract."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import PREFERENCE_LOSSES, PreferenceSpec, preference_loss, sequence_logprobs
from dppo_kernels.preference_formulas import FORMULAS, Pairs, pair_losses, pair_slopes, score, score_slope
from dppo_kernels.preference_spec import F_DIVERGENCES, MARGIN_LOSSES, SORTING_LOSSES

P = 6


def random_pairs(seed: int, spread: float = 3.0) -> Pairs:
    g = torch.Generator().manual_seed(seed)
    sums = [-20 + spread * torch.randn(P, generator=g, dtype=torch.float64) for _ in range(4)]
    return Pairs(*sums, *(torch.randint(1, 9, (P,), generator=g).double() for _ in range(2)))


ACCEPTED = [
    (name, kind)
    for name in PREFERENCE_LOSSES
    for kind in F_DIVERGENCES
    if name != "sft" and (kind == "reverse_kl" or name in MARGIN_LOSSES)
]


def test_every_loss_has_a_formula() -> None:
    assert FORMULAS.keys() | {"sft"} == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
@given(seed=st.integers(0, 2**20), alpha=st.sampled_from([-0.5, 0.5, 1.0, 1.5]))
def test_slopes_are_the_derivatives(name: str, kind: str, seed: int, alpha: float) -> None:
    spec = PreferenceSpec(name, beta=0.3, label_smoothing=0.2, f_divergence_type=kind, f_alpha_divergence_coef=alpha)
    pairs = random_pairs(seed, 1.0)
    weights = torch.full((P,), 0.3) if name in SORTING_LOSSES else torch.rand(P, dtype=torch.float64)  # the order is lost
    leaves = [x.requires_grad_() for x in pairs[:2]]
    expected = torch.autograd.grad((weights * pair_losses(pairs, spec)).sum(), leaves)
    torch.testing.assert_close(pair_slopes(pairs, weights, spec), expected)


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_scores_of_f_divergences(kind: str) -> None:
    """0 where the models agree, increasing, and the slope is theirs; far from the reference nothing is infinite or NaN."""
    spec = PreferenceSpec(f_divergence_type=kind)
    h = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    values = score(h, spec)
    assert values[6].item() == pytest.approx(0.0, abs=1e-15)
    assert (values.diff() > 0).all()
    torch.testing.assert_close(torch.autograd.grad(values.sum(), h)[0], score_slope(h.detach(), spec))
    far = torch.tensor([-1e4, -300.0, 300.0, 1e4], dtype=torch.float64)
    assert score(far, spec).isfinite().all()
    assert score_slope(far, spec).isfinite().all()


def loss_of(pairs: Pairs, **changes: Any) -> Tensor:
    lengths = {"chosen_lengths": pairs.lengths()[0].long(), "rejected_lengths": pairs.lengths()[1].long()}
    return preference_loss(*pairs[:4], spec=PreferenceSpec(**changes), **lengths)[0]


@given(st.integers(0, 2**20))
def test_losses_that_coincide(seed: int) -> None:
    pairs = random_pairs(seed)
    same = torch.testing.assert_close
    plain = loss_of(pairs)
    same(loss_of(pairs, loss_type="sigmoid_smoothed"), plain)
    same(loss_of(pairs, loss_type="robust"), plain)
    same(loss_of(pairs, label_smoothing=0.4), plain)  # "sigmoid" ignores it, as TRL's does
    same(loss_of(pairs, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0), plain)
    ones = pairs._replace(chosen_lengths=torch.ones(P), rejected_lengths=torch.ones(P))
    same(loss_of(ones, loss_type="sigmoid_norm"), plain)
    same(loss_of(ones, loss_type="ipo"), loss_of(pairs, loss_type="ipo_sum"))
    one = Pairs(*(x[:1] for x in pairs))
    same(loss_of(one, loss_type="aot"), loss_of(one))  # of one pair, nothing is sorted
    same(loss_of(one, loss_type="aot_unpaired"), loss_of(one))
    half = loss_of(pairs, loss_type="sigmoid_smoothed", label_smoothing=0.5)
    swapped = loss_of(Pairs(*(pairs[i] for i in (1, 0, 3, 2, 5, 4))), loss_type="sigmoid_smoothed", label_smoothing=0.5)
    same(half, swapped)
    mixture = loss_of(pairs, loss_type=("sigmoid", "hinge", "sft"), loss_weights=(0.5, 2.0, 0.1))
    same(mixture, 0.5 * plain + 2 * loss_of(pairs, loss_type="hinge") + 0.1 * loss_of(pairs, loss_type="sft"))
    same(loss_of(pairs, loss_type=("sigmoid", "sigmoid")), 2 * plain)


def test_a_policy_at_its_reference() -> None:
    pairs = random_pairs(0)
    pairs = pairs._replace(chosen=pairs.ref_chosen, rejected=pairs.ref_rejected)
    at_start = {"sigmoid": math.log(2), "hinge": 1.0, "apo_zero": 1.0, "bco_pair": 2 * math.log(2), "ipo": 25.0}
    for name, expected in at_start.items():
        assert loss_of(pairs, loss_type=name).item() == pytest.approx(expected, rel=1e-15), name


def test_far_pairs_are_finite() -> None:
    far = Pairs(*(torch.tensor([a, b], dtype=torch.float64) for a, b in ((-1e4, 0), (0, -1e4), (0, 0), (0, 0), (1, 1), (1, 1))))
    for name, kind in (*ACCEPTED, ("sft", "reverse_kl")):
        if name == "discopop" and kind in ("forward_kl", "alpha_divergence"):
            continue  # exp(-x) itself: a score of -exp(80) is beyond any float
        loss = loss_of(far, loss_type=name, label_smoothing=0.1, f_divergence_type=kind)
        assert loss.isfinite(), (name, kind)
        if name != "sft":
            spec = PreferenceSpec(name, label_smoothing=0.1, f_divergence_type=kind)
            assert all(x.isfinite().all() for x in pair_slopes(far, 1.0, spec)), (name, kind)


def test_weights_and_normalisers() -> None:
    pairs, weights = random_pairs(0), torch.rand(P, dtype=torch.float64)
    lengths = {"chosen_lengths": pairs.lengths()[0], "rejected_lengths": pairs.lengths()[1]}
    spec = PreferenceSpec(("sigmoid", "sft"), loss_weights=(1.0, 0.3))
    whole, _ = preference_loss(*pairs[:4], spec=spec, **lengths)
    numbers = {"denominator": P, "token_denominator": pairs.lengths()[0].sum()}
    parts = [
        preference_loss(
            *(x[i : i + 2] for x in pairs[:4]), spec=spec, **{k: x[i : i + 2] for k, x in lengths.items()}, **numbers
        )
        for i in range(0, P, 2)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    weighted, _ = preference_loss(*pairs[:4], spec=spec, **lengths, pair_weights=weights)
    per_pair = torch.stack([preference_loss(*(x[i : i + 1] for x in pairs[:4]))[0] for i in range(P)])
    sft = -pairs.chosen.sum() / pairs.lengths()[0].sum()
    torch.testing.assert_close(weighted, (weights * per_pair).mean() + 0.3 * weights.mean() * sft)


def test_stats() -> None:
    pairs = random_pairs(3)
    _, stats = preference_loss(*(x.float() for x in pairs[:4]), spec=PreferenceSpec(beta=0.5))
    chosen, rejected = 0.5 * (pairs.chosen - pairs.ref_chosen), 0.5 * (pairs.rejected - pairs.ref_rejected)
    expected = {
        "logprobs_chosen": pairs.chosen,
        "logprobs_rejected": pairs.rejected,
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "margins": chosen - rejected,
        "accuracies": (chosen > rejected).double(),
    }
    assert stats.keys() == expected.keys()
    for name, values in expected.items():
        assert stats[name].count == P
        assert stats[name].mean.item() == pytest.approx(values.mean().item(), rel=1e-5)
        assert stats[name].max.item() == pytest.approx(values.max().item(), rel=1e-5)


def test_ld_alpha_weighs_what_is_longer_than_the_shorter() -> None:
    logprobs = torch.arange(1.0, 13.0).view(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 0]], dtype=torch.bool)  # 4 and 2 tokens
    poisoned = torch.where(mask, logprobs, torch.nan)
    assert sequence_logprobs(poisoned, mask).tolist() == [2 + 3 + 4 + 5, 9 + 11]
    assert sequence_logprobs(poisoned, mask, ld_alpha=0.25).tolist() == [2 + 3 + 0.25 * (4 + 5), 9 + 11]
    assert sequence_logprobs(poisoned, mask, ld_alpha=0.0).tolist() == [2 + 3, 9 + 11]


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - set(MARGIN_LOSSES) - {"sft"}))
def test_an_f_divergence_with_a_loss_of_no_difference(name: str) -> None:
    with pytest.raises(ValueError, match="there a term of the partition function does not cancel"):
        PreferenceSpec(("sigmoid", name), f_divergence_type="js_divergence")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss_type": "dpo"}, ValueError, "`loss_type` must be one of 'sigmoid', .* got 'dpo'"),
        ({"loss_type": ()}, ValueError, "`loss_type` must name at least one loss"),
        ({"loss_weights": (1.0, 2.0)}, ValueError, "`loss_weights` must hold one number per loss type, got 2"),
        ({"loss_weights": ("a",)}, TypeError, "`loss_weights` must be a number"),
        ({"beta": 0.0}, ValueError, "`beta` must be positive"),
        ({"discopop_tau": -1}, ValueError, "`discopop_tau` must be positive"),
        ({"label_smoothing": 1.1}, ValueError, r"`label_smoothing` must be in \[0, 1\]"),
        ({"ld_alpha": -0.1}, ValueError, r"`ld_alpha` must be in \[0, 1\]"),
        ({"f_divergence_type": "kl"}, ValueError, "`f_divergence_type` must be one of 'reverse_kl'"),
        ({"loss_type": "exo_pair"}, ValueError, r"'exo_pair' needs `label_smoothing` in \(0, 1\)"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "'robust' divides by 1 - 2 `label_smoothing`"),
        ({"loss_type": "aot", "use_weighting": True}, NotImplementedError, "sort chosen and rejected apart"),
    ],
)
def test_specs_that_mean_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PreferenceSpec(**changes)


def test_too_much_smoothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"of 'robust' should be in \[0, 0.5\), got 0.7"):
        PreferenceSpec("robust", label_smoothing=0.7)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chosen_logprobs": torch.zeros(3).long()}, TypeError, "`chosen_logprobs` must have a floating-point dtype"),
        ({"chosen_logprobs": torch.zeros(3, 2)}, ValueError, r"`chosen_logprobs` must be \[P\], one sum per pair"),
        ({"rejected_logprobs": torch.zeros(2)}, ValueError, r"`rejected_logprobs` must have shape \[P\] of `chosen_logprobs`"),
        ({"ref_chosen_logprobs": None}, TypeError, "`ref_chosen_logprobs` must be a torch.Tensor"),
        ({"ref_rejected_logprobs": torch.zeros(3, device="meta")}, ValueError, "`ref_rejected_logprobs` is on meta"),
        ({"spec": PreferenceSpec("ipo")}, ValueError, r"`loss_type`=\['ipo'\] needs `chosen_lengths` and `rejected_lengths`"),
        ({"pair_weights": torch.zeros(1)}, ValueError, "`pair_weights` must have shape"),
        ({"pair_weights": torch.ones(3), "spec": PreferenceSpec("aot")}, ValueError, "`pair_weights` weigh pairs"),
        ({"denominator": 0}, ValueError, "`denominator` must be positive"),
        ({"denominator": torch.ones(3)}, ValueError, "`denominator` must be one number"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    good = {name: torch.zeros(3) for name in names}
    preference_loss(**good)
    with pytest.raises(error, match=message):
        preference_loss(**(good | changes))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), TypeError, "`loss_mask` must be a bool tensor"),
        ((torch.zeros(3, 3), torch.ones(3, 3).bool()), ValueError, r"`logprobs` must be \[2P, T\], chosen then rejected"),
        ((torch.zeros(2, 3), torch.ones(2, 2).bool()), ValueError, "`loss_mask` must have shape that of `logprobs`"),
    ],
)
def test_errors_of_sequence_logprobs(arguments: tuple[Tensor, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sequence_logprobs(*arguments)
