"""Divergences and the trust-region mask: ordering, exactness of float32 masks, directions, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import DIVERGENCES, divergence, topk_logprobs, trust_region_mask
from dppo_kernels._numerics import log1mexp
from tests.strategies import probabilities


def topk_inputs(log_mu: Tensor, log_pi: Tensor, sampled: Tensor, k: int) -> dict[str, Tensor]:
    """What a rollout records and a trainer gathers, from full distributions [N, V]."""
    top = topk_logprobs(log_mu, sampled, k)
    gathered = log_pi.gather(1, top.ids.clamp(min=0)).masked_fill(~top.valid, 0.0)
    return {"topk_logprobs": gathered, "rollout_topk_logprobs": top.logprobs, "topk_valid": top.valid}


def pick(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(1, ids[:, None]).squeeze(1)


@given(st.sampled_from([2, 5, 40]), st.integers(1, 5), st.integers(0, 2**20), st.sampled_from([0.5, 3.0]))
def test_binary_is_below_topk_is_below_full(vocab: int, k: int, seed: int, sharpness: float) -> None:
    k = min(k, vocab)
    log_mu, log_pi = probabilities(vocab, 16, seed, sharpness)
    sampled = torch.multinomial(log_mu.exp(), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    log_m, log_p = pick(log_mu, sampled), pick(log_pi, sampled)
    full = {"tv": (log_mu.exp() - log_pi.exp()).abs().sum(1) / 2, "kl": (log_mu.exp() * (log_mu - log_pi)).sum(1)}
    previous: Tensor | None = None
    for kind, upper in full.items():
        binary = divergence(f"binary_{kind}", log_p, log_m)
        previous = binary
        for more in range(k, vocab + 1, 5):  # refining the partition never lowers a divergence
            topk = divergence(f"topk_{kind}", log_p, log_m, **topk_inputs(log_mu, log_pi, sampled, more))
            assert (previous <= topk + 1e-12).all()
            previous = topk
        assert (previous <= upper + 1e-12).all()
        assert (binary >= 0).all()


@given(st.integers(0, 2**20))
def test_equal_policies_have_zero_divergence(seed: int) -> None:
    log_mu, _ = probabilities(30, 8, seed)
    log_mu = log_mu.float()
    sampled = torch.arange(8)
    for kind in DIVERGENCES:
        extra = topk_inputs(log_mu, log_mu, sampled, 4) if kind.startswith("topk") else {}
        d = divergence(kind, pick(log_mu, sampled), pick(log_mu, sampled), **extra)
        assert (d >= 0).all()
        # The rollout's top-K log-probs are normalised again, in float32; the binary kinds compare a number with itself.
        assert d.max() <= (1e-6 if extra else 0)


def test_kl_is_rollout_to_policy_not_the_reverse() -> None:
    log_m, log_p = torch.tensor([0.3]).log(), torch.tensor([0.05]).log()
    m, p = 0.3, 0.05
    forward = m * torch.tensor(m / p).log() + (1 - m) * torch.tensor((1 - m) / (1 - p)).log()
    torch.testing.assert_close(divergence("binary_kl", log_p, log_m), forward[None])
    assert abs(divergence("binary_kl", log_m, log_p).item() - forward.item()) > 0.1


def masks(kind: str, log_m: Tensor, log_p: Tensor, delta: float, **extra: Tensor) -> Tensor:
    """Keep-mask where the advantage always pushes outwards."""
    outwards = torch.where(log_p > log_m, 1.0, -1.0)
    return trust_region_mask(divergence(kind, log_p, log_m, **extra), log_p, log_m, outwards, low=delta, high=delta)


PAIRS = 200_000


def test_float32_binary_kl_masks_are_exact_near_one() -> None:
    g = torch.Generator().manual_seed(1)
    one_minus = torch.exp(torch.empty(2, PAIRS, dtype=torch.float64).uniform_(-20.72, -2.303, generator=g))  # 1e-9 .. 1e-1
    log_m, log_p = torch.log1p(-one_minus)
    exact = masks("binary_kl", log_m, log_p, 0.05)
    assert 0 < (~exact).sum() < PAIRS
    assert (masks("binary_kl", log_m.float(), log_p.float(), 0.05) != exact).sum() == 0
    error = divergence("binary_kl", log_p.float(), log_m.float()).double() - divergence("binary_kl", log_p, log_m)
    assert error.abs().max() < 1e-6


def test_float32_binary_tv_masks_are_exact_away_from_the_threshold() -> None:
    g = torch.Generator().manual_seed(2)
    log_m, log_p = torch.empty(2, PAIRS, dtype=torch.float64).uniform_(1e-6, 1, generator=g).log()
    exact = divergence("binary_tv", log_p, log_m)
    decided = (exact - 0.15).abs() > 1e-6
    wrong = masks("binary_tv", log_m.float(), log_p.float(), 0.15) != masks("binary_tv", log_m, log_p, 0.15)
    assert decided.sum() > 0.99 * PAIRS
    assert (wrong & decided).sum() == 0


@pytest.mark.parametrize(("kind", "delta"), [("topk_tv", 0.15), ("topk_kl", 0.05)])
def test_float32_topk_masks_are_as_good_as_float64_arithmetic(kind: str, delta: float) -> None:
    rows, k = 20_000, 20
    log_mu, log_pi = probabilities(200, rows, seed=3, sharpness=3.0)
    sampled = torch.multinomial(log_mu.exp(), 1, generator=torch.Generator().manual_seed(4)).squeeze(1)
    log_m, log_p = pick(log_mu, sampled), pick(log_pi, sampled)
    extra = topk_inputs(log_mu, log_pi, sampled, k)
    exact = masks(kind, log_m, log_p, delta, **extra)
    single = {name: x if x.dtype == torch.bool else x.float() for name, x in extra.items()}
    rounded = {name: x if x.dtype == torch.bool else x.double() for name, x in single.items()}
    in_double = masks(kind, log_m.float().double(), log_p.float().double(), delta, **rounded)
    ours = masks(kind, log_m.float(), log_p.float(), delta, **single)
    assert 0 < (~exact).sum() < rows
    assert (ours != exact).sum() <= (in_double != exact).sum()


def test_floor_decides_where_float32_log_softmax_rounds_to_zero() -> None:
    # p = 1 - 3e-8 is log-prob 0 in float32: the floor makes 1 - p = 1e-9, finite, and far enough from m = .995 to mask.
    log_p, log_m = torch.zeros(1), torch.tensor([0.995]).log()
    d = divergence("binary_kl", log_p, log_m)
    assert d.isfinite().all()
    assert d > 0.05
    assert divergence("binary_kl", torch.zeros(1), torch.zeros(1)) == 0
    assert divergence("binary_kl", log_m, torch.zeros(1)).isfinite()


def test_impossible_tokens_stay_finite_or_infinite_as_they_should() -> None:
    minus_inf, some = torch.tensor([-torch.inf]), torch.tensor([0.4]).log()
    assert divergence("binary_tv", minus_inf, some).item() == pytest.approx(0.4)
    assert divergence("binary_kl", minus_inf, some) == torch.inf
    assert divergence("binary_kl", some, minus_inf).isfinite()
    topk = {"topk_logprobs": torch.tensor([[0.4, 0.6]]).log(), "rollout_topk_logprobs": torch.tensor([[1.0, 0.0]]).log()}
    assert divergence("topk_kl", some, torch.zeros(1), **topk).isfinite()


def test_log1mexp_is_exact_at_both_ends() -> None:
    x = -torch.logspace(-8, 1.5, 400, dtype=torch.float64)
    exact = torch.log(-torch.expm1(x))
    assert (log1mexp(x.float()).double() - torch.log(-torch.expm1(x.float().double()))).abs().max() < 2e-6
    torch.testing.assert_close(log1mexp(x), exact, rtol=1e-12, atol=1e-12)
    assert log1mexp(torch.zeros(1)).isfinite()


def test_invalid_columns_count_as_absent() -> None:
    log_mu, log_pi = probabilities(12, 6, 5)
    sampled = log_mu.argmax(1)
    extra = topk_inputs(log_mu, log_pi, sampled, 3)  # the sampled token is in the top 3: column 3 is padding
    assert not extra["topk_valid"][:, 3].any()
    log_m, log_p = pick(log_mu, sampled), pick(log_pi, sampled)
    without = {name: x[:, :3] for name, x in extra.items()}
    garbage = {**extra, "rollout_topk_logprobs": extra["rollout_topk_logprobs"].masked_fill(~extra["topk_valid"], torch.nan)}
    for kind in ("topk_tv", "topk_kl"):
        expected = divergence(kind, log_p, log_m, **without)
        torch.testing.assert_close(divergence(kind, log_p, log_m, **extra), expected)
        torch.testing.assert_close(divergence(kind, log_p, log_m, **garbage), expected)


@given(st.integers(0, 2**20), st.sampled_from([0.01, 0.15, 0.5]))
def test_mask_never_drops_a_token_pushed_towards_its_anchor(seed: int, delta: float) -> None:
    log_mu, log_pi = probabilities(6, 64, seed)
    log_m, log_p = log_mu[:, 0], log_pi[:, 0]
    advantages = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keep = trust_region_mask(divergence("binary_tv", log_p, log_m), log_p, log_m, advantages, low=delta, high=delta)
    towards = (advantages > 0) & (log_p <= log_m) | (advantages < 0) & (log_p >= log_m) | (advantages == 0)
    assert keep[towards].all()


def test_thresholds_are_separate_and_strict() -> None:
    log_m = torch.tensor([0.5, 0.5, 0.5, 0.5]).log()
    log_p = torch.tensor([0.7, 0.7, 0.3, 0.3]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    d = torch.full((4,), 0.2)
    assert trust_region_mask(d, log_p, log_m, advantages, low=0.1, high=0.3).tolist() == [True, True, True, False]
    assert trust_region_mask(d, log_p, log_m, advantages, low=0.3, high=0.1).tolist() == [False, True, True, True]
    exact = torch.full((4,), 0.25)
    assert trust_region_mask(exact, log_p, log_m, advantages, low=0.25, high=0.25).all()


def test_no_gradient_flows() -> None:
    log_p = torch.randn(4).sub(1).requires_grad_()
    assert not divergence("binary_kl", log_p, torch.full((4,), -1.0)).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "tv"}, ValueError, "`kind` must be one of 'binary_tv'"),
        ({"rollout_logprobs": torch.zeros(3)}, ValueError, r"`rollout_logprobs` must have shape .* = \[4\], got \[3\]"),
        ({"logprobs": torch.zeros(4, dtype=torch.long)}, TypeError, "`logprobs` must have a floating-point dtype"),
        ({"kind": "topk_tv"}, ValueError, "needs `topk_logprobs` and `rollout_topk_logprobs`"),
        ({"topk_logprobs": torch.zeros(4, 3)}, ValueError, "`topk_logprobs` is given, but kind='binary_tv' does not use it"),
        ({"topk_valid": torch.ones(4, 3, dtype=torch.bool)}, ValueError, "`topk_valid` is given"),
        (
            {"kind": "topk_kl", "topk_logprobs": torch.zeros(4, 3), "rollout_topk_logprobs": torch.zeros(4, 2)},
            ValueError,
            "`rollout_topk_logprobs` must have shape",
        ),
        (
            {
                "kind": "topk_kl",
                "topk_logprobs": torch.zeros(4, 3),
                "rollout_topk_logprobs": torch.zeros(4, 3),
                "topk_valid": torch.ones(4, 3),
            },
            TypeError,
            "`topk_valid` must be a bool tensor",
        ),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"kind": "binary_tv", "logprobs": torch.zeros(4), "rollout_logprobs": torch.zeros(4)}
    with pytest.raises(error, match=message):
        divergence(**{**arguments, **changes})


def test_advantages_of_the_mask_must_have_its_shape() -> None:
    x = torch.full((3, 3), -1.0)
    with pytest.raises(ValueError, match="`advantages` must have shape"):
        trust_region_mask(x, x, x, torch.ones(3), low=0.1, high=0.1)  # [B] would broadcast along T
    assert trust_region_mask(x, x, x, torch.ones(3, 1), low=0.1, high=0.1).all()
    with pytest.raises(TypeError, match=r"`divergence` must be a torch\.Tensor, got float"):
        trust_region_mask(0.1, x, x, x, low=0.1, high=0.1)


@pytest.mark.parametrize("name", ["low", "high"])
def test_thresholds_must_be_positive(name: str) -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=f"`{name}` must be positive"):
        trust_region_mask(x, x, x, x, **{"low": 0.1, "high": 0.1, name: 0.0})
