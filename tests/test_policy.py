"""Policy losses: each surrogate against a formula written out here, coincidences of presets, masking, statistics, errors."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import PRESETS, PolicyLossSpec, Stat, policy_loss, topk_logprobs
from tests.strategies import probabilities

SEEDS = st.integers(0, 2**20)


def batch(seed: int, b: int = 4, t: int = 6, *, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    anchor = -torch.rand(b, t, generator=g, dtype=dtype) * 3
    return {
        "logprobs": (anchor + 0.4 * torch.randn(b, t, generator=g, dtype=dtype)).clamp(max=-1e-3).requires_grad_(),
        "anchor_logprobs": anchor,
        "advantages": torch.randn(b, generator=g, dtype=dtype),
        "loss_mask": torch.rand(b, t, generator=g) < 0.7,
    }


def topk_batch(seed: int, b: int = 4, t: int = 6, k: int = 3) -> dict[str, Tensor]:
    log_mu, log_pi = probabilities(10, b * t, seed)
    sampled = torch.multinomial(log_mu.exp(), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    top = topk_logprobs(log_mu, sampled, k)
    gathered = log_pi.gather(1, top.ids.clamp(min=0)).masked_fill(~top.valid, 0.0)
    base = batch(seed, b, t)
    return {
        **base,
        "logprobs": log_pi.gather(1, sampled[:, None]).view(b, t).requires_grad_(),
        "anchor_logprobs": log_mu.gather(1, sampled[:, None]).view(b, t),
        "topk_logprobs": gathered.view(b, t, -1),
        "rollout_topk_logprobs": top.logprobs.view(b, t, -1),
        "topk_valid": top.valid.view(b, t, -1),
    }


def inputs_of(name: str, seed: int) -> dict[str, Tensor]:
    return topk_batch(seed) if PRESETS[name].needs_topk else batch(seed)


def loss_and_grad(spec: PolicyLossSpec, inputs: dict, **extra) -> tuple[Tensor, Tensor]:
    loss, _ = policy_loss(**inputs, spec=spec, max_length=inputs["logprobs"].shape[-1], **extra)
    (grad,) = torch.autograd.grad(loss, inputs["logprobs"])
    return loss.detach(), grad


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].sum() / mask.sum()


@given(SEEDS)
def test_clip_by_formula(seed: int) -> None:
    x = batch(seed)
    spec = PolicyLossSpec("clip", epsilon_low=0.2, epsilon_high=0.28, ratio_cap=1.5)
    a = x["advantages"][:, None]
    ratio = (x["logprobs"] - x["anchor_logprobs"]).exp()
    expected = token_mean(-torch.min(ratio.clamp(max=1.5) * a, ratio.clamp(0.8, 1.28) * a), x["loss_mask"])
    loss, grad = loss_and_grad(spec, x)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x["logprobs"])[0])


@given(SEEDS)
def test_sequence_level_by_formula(seed: int) -> None:
    x = batch(seed)
    x["loss_mask"][0] = False  # a sequence without active tokens counts as 0
    mask, a = x["loss_mask"], x["advantages"]
    difference = torch.where(mask, x["logprobs"] - x["anchor_logprobs"], 0.0)
    ratio = (difference.sum(1) / mask.sum(1).clamp(min=1)).exp()
    per_sequence = -torch.min(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a)
    expected = torch.where(mask.any(1), per_sequence, 0.0).mean()
    loss, grad = loss_and_grad(PRESETS["gspo"], x)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x["logprobs"])[0])


@given(SEEDS)
def test_score_function_losses_by_formula(seed: int) -> None:
    x = batch(seed)
    a = x["advantages"][:, None]
    ratio = (x["logprobs"] - x["anchor_logprobs"]).exp().detach()
    cispo = token_mean(-ratio.clamp(max=1.1) * a * x["logprobs"], x["loss_mask"])
    loss, grad = loss_and_grad(PRESETS["cispo"].replace(epsilon_high=1.1), x)
    torch.testing.assert_close(loss, cispo.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(cispo, x["logprobs"])[0])

    gap = x["logprobs"].exp().detach() - x["anchor_logprobs"].exp()
    keep = ~((a > 0) & (gap > 0.15) | (a < 0) & (gap < -0.15))
    dppo = token_mean(-ratio.clamp(max=1.2) * a * keep * x["logprobs"], x["loss_mask"])
    loss, grad = loss_and_grad(PRESETS["dppo_binary_tv"].replace(ratio_cap=1.2), x)
    torch.testing.assert_close(loss, dppo.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(dppo, x["logprobs"])[0])


@given(SEEDS)
def test_sapo_by_formula(seed: int) -> None:
    x = batch(seed)
    x["loss_mask"] |= True
    a = x["advantages"][:, None]
    tau = torch.where(a > 0, 1.0, 1.05).double()
    ratio = (x["logprobs"] - x["anchor_logprobs"]).exp()
    expected = (-a * 4 / tau / (1 + (-tau * (ratio - 1)).exp())).mean()
    loss, grad = loss_and_grad(PRESETS["sapo"], x)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x["logprobs"])[0])


@given(SEEDS)
def test_score_form_and_surrogate_have_the_same_gradient(seed: int) -> None:
    x = batch(seed)
    spec = PRESETS["dppo_binary_kl"].replace(ratio_cap=None)
    a, m, p = x["advantages"][:, None], x["anchor_logprobs"].exp(), x["logprobs"].detach().exp()
    kl = m * (m / p).log() + (1 - m) * ((1 - m) / (1 - p)).log()
    keep = ~((kl > 0.05) & ((a > 0) & (p > m) | (a < 0) & (p < m)))
    surrogate = token_mean(-(x["logprobs"] - x["anchor_logprobs"]).exp() * a * keep, x["loss_mask"])
    _, grad = loss_and_grad(spec, x)
    torch.testing.assert_close(grad, torch.autograd.grad(surrogate, x["logprobs"])[0])
    _, stats = policy_loss(**x, spec=spec)
    torch.testing.assert_close(stats["surrogate"].mean.double(), surrogate.detach(), rtol=1e-5, atol=1e-6)


@given(SEEDS)
def test_presets_coincide_where_papers_say_so(seed: int) -> None:
    x = batch(seed)
    x["loss_mask"] |= True  # equal lengths: token mean, sequence mean and fixed length agree
    reference = loss_and_grad(PRESETS["ppo"], x)
    for name in ("grpo", "bnpo", "dr_grpo"):
        torch.testing.assert_close(loss_and_grad(PRESETS[name], x), reference)
    torch.testing.assert_close(loss_and_grad(PRESETS["dapo"].replace(epsilon_high=0.2), x), reference)
    # A sequence of one token has one ratio, whatever the level.
    one = {**batch(seed, t=1), "loss_mask": torch.ones(4, 1, dtype=torch.bool)}
    gspo = PRESETS["gspo"].replace(epsilon_low=0.2, epsilon_high=0.2)
    torch.testing.assert_close(loss_and_grad(gspo, one), loss_and_grad(PRESETS["grpo"], one))
    # A trust region that nothing leaves, with the same cap, is CISPO.
    wide = PRESETS["dppo_binary_tv"].replace(epsilon_low=1.0, epsilon_high=1.0, ratio_cap=5.0)
    torch.testing.assert_close(loss_and_grad(wide, x), loss_and_grad(PRESETS["cispo"], x))


@given(SEEDS)
def test_on_policy_every_gradient_is_minus_advantage(seed: int) -> None:
    for name, spec in PRESETS.items():
        x = inputs_of(name, seed)
        x["loss_mask"] |= True
        x["anchor_logprobs"] = x["logprobs"].detach().clone()
        if spec.needs_topk:
            x["rollout_topk_logprobs"] = x["topk_logprobs"]
        _, grad = loss_and_grad(spec, x)
        expected = -x["advantages"][:, None].expand_as(grad) / grad.numel()
        torch.testing.assert_close(grad, expected, msg=name)


@pytest.mark.parametrize("name", PRESETS)
def test_nan_behind_the_mask_changes_nothing(name: str) -> None:
    spec = PRESETS[name].replace(beta=0.1, entropy_coef=0.01)
    x = inputs_of(name, 7)
    g = torch.Generator().manual_seed(1)
    x |= {"ref_logprobs": -torch.rand(4, 6, generator=g).double(), "entropy": torch.rand(4, 6, generator=g).double()}
    x["token_weights"] = torch.rand(4, 6, generator=g).double()
    x["advantages"] = x["advantages"][:, None].expand(4, 6).clone()

    def run(fill: float) -> tuple[Tensor, dict[str, Stat], Tensor]:
        y = {}
        for key, value in x.items():
            hidden = ~x["loss_mask"] if value.dim() == 2 else ~x["loss_mask"][..., None]
            y[key] = value if value.dtype == torch.bool else value.detach().masked_fill(hidden, fill)
        y["logprobs"].requires_grad_()
        loss, stats = policy_loss(**y, spec=spec, max_length=6)
        return loss, stats, torch.autograd.grad(loss, y["logprobs"])[0]

    loss, stats, grad = run(0.0)
    poisoned_loss, poisoned_stats, poisoned_grad = run(math.nan)
    assert loss.isfinite()
    assert torch.equal(loss, poisoned_loss)
    assert torch.equal(grad, poisoned_grad)
    assert not grad[~x["loss_mask"]].any()
    for key, stat in stats.items():
        assert stat == poisoned_stats[key], key


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_active_is_an_exact_zero(name: str) -> None:
    x = inputs_of(name, 3)
    x["loss_mask"] = torch.zeros_like(x["loss_mask"])
    loss, grad = loss_and_grad(PRESETS[name], x)
    assert loss == 0
    assert not grad.any()
    _, stats = policy_loss(**x, spec=PRESETS[name], max_length=6)
    assert all(stat.count == 0 and stat.max == -torch.inf for stat in stats.values())


@given(SEEDS, st.sampled_from(sorted(PRESETS)))
def test_micro_batches_with_a_global_denominator_are_one_batch(seed: int, name: str) -> None:
    spec, x = PRESETS[name], inputs_of(name, seed)
    denominator = {"token_mean": x["loss_mask"].sum().clamp(min=1), "sequence_mean": 4, "fixed_length": 24}[spec.reduction]
    whole, grad = loss_and_grad(spec, x)
    parts = [
        loss_and_grad(
            spec, {k: v[rows].detach().requires_grad_(k == "logprobs") for k, v in x.items()}, denominator=denominator
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), grad)


@given(SEEDS)
def test_flat_and_padded_layouts_agree(seed: int) -> None:
    for name in ("dapo", "dppo_topk_tv", "cispo"):
        x = inputs_of(name, seed)
        mask = x["loss_mask"]
        flat = {k: v[mask].detach() for k, v in x.items() if v.dim() > 1}
        flat["advantages"] = x["advantages"][:, None].expand(4, 6)[mask]
        flat["logprobs"].requires_grad_()
        loss, grad = loss_and_grad(PRESETS[name], x)
        flat_loss, flat_grad = loss_and_grad(PRESETS[name], flat)
        torch.testing.assert_close(loss, flat_loss)
        torch.testing.assert_close(grad[mask], flat_grad)


def test_reference_kl_and_entropy_bonus() -> None:
    x = batch(0)
    ref, entropy = x["anchor_logprobs"] - 0.3, torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    plain, _ = loss_and_grad(PRESETS["dapo"], x)
    mask = x["loss_mask"]
    k3 = (ref - x["logprobs"]).exp() - (ref - x["logprobs"]) - 1
    with_kl, _ = loss_and_grad(PRESETS["dapo"].replace(beta=0.1), x, ref_logprobs=ref)
    torch.testing.assert_close(with_kl, plain + 0.1 * token_mean(k3, mask).detach())
    ratio = (x["logprobs"] - x["anchor_logprobs"]).exp()
    weighted, _ = loss_and_grad(PRESETS["dapo"].replace(beta=0.1, kl_ratio_weighted=True), x, ref_logprobs=ref)
    torch.testing.assert_close(weighted, plain + 0.1 * token_mean(k3 * ratio, mask).detach())
    _, stats = policy_loss(**x, spec=PRESETS["dapo"], ref_logprobs=ref)
    torch.testing.assert_close(stats["ref_kl"].mean.double(), token_mean(k3, mask).detach(), rtol=1e-6, atol=1e-6)

    loss, stats = policy_loss(**x, spec=PRESETS["dapo"].replace(entropy_coef=0.5), entropy=entropy)
    torch.testing.assert_close(loss.detach(), plain - 0.5 * token_mean(entropy, mask).detach())
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], -0.5 * mask.double() / mask.sum())
    scaled, _ = policy_loss(**x, spec=PRESETS["dapo"].replace(entropy_coef=0.5), entropy=entropy, entropy_denominator=100)
    torch.testing.assert_close(scaled.detach(), plain - 0.005 * entropy[mask].sum().detach())
    torch.testing.assert_close(stats["entropy"].mean.double(), token_mean(entropy, mask).detach(), rtol=1e-6, atol=1e-6)


def test_token_weights_scale_the_surrogate_but_not_the_reference_kl() -> None:
    x = batch(1)
    ref = x["anchor_logprobs"] - 0.3
    spec = PRESETS["dapo"].replace(beta=0.1)
    zero, _ = loss_and_grad(spec, x, ref_logprobs=ref, token_weights=torch.zeros(4, 1))
    kl_only = loss_and_grad(spec, x, ref_logprobs=ref)[0] - loss_and_grad(PRESETS["dapo"], x)[0]
    torch.testing.assert_close(zero, kl_only)
    double, _ = loss_and_grad(PRESETS["dapo"], x, token_weights=torch.full((4, 6), 2.0))
    torch.testing.assert_close(double, 2 * loss_and_grad(PRESETS["dapo"], x)[0])


def test_statistics_by_hand() -> None:
    p = torch.tensor([[0.6, 0.5, 0.7], [0.3, 0.3, 0.9]])
    m = torch.tensor([[0.5, 0.1, 0.8], [0.3, 0.6, 0.9]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    _, stats = policy_loss(
        p.log(), m.log(), torch.tensor([1.0, -2.0]), mask, spec=PRESETS["dppo_binary_tv"].replace(ratio_cap=4)
    )
    assert all(stat.count == 5 for stat in stats.values())
    assert stats["masked"].sum == 2
    assert stats["masked_positive"].sum == 1
    assert stats["masked_negative"].sum == 1
    assert stats["ratio_above_cap"].sum == 1
    assert stats["divergence"].max.item() == pytest.approx(0.4)
    assert stats["prob_gap"].mean.item() == pytest.approx((0.1 + 0.4 + 0.1 + 0 + 0.3) / 5, rel=1e-5)
    assert stats["ratio"].max.item() == pytest.approx(5.0, rel=1e-5)
    assert stats["ratio_squared"].mean.item() == pytest.approx((1.44 + 25 + (7 / 8) ** 2 + 1 + 0.25) / 5, rel=1e-5)
    assert not any(x.requires_grad for stat in stats.values() for x in stat)
    _, stats = policy_loss(p.log(), m.log(), torch.tensor([1.0, -2.0]), mask, spec=PRESETS["dapo"])
    assert stats["clipped_high"].sum == 1  # ratio 5 with A > 0
    assert stats["clipped_low"].sum == 1  # ratio 0.5 with A < 0
    cispo = PRESETS["cispo"].replace(epsilon_high=4)
    _, stats = policy_loss(p.log(), m.log(), torch.tensor([1.0, -2.0]), mask, spec=cispo)
    assert stats["ratio_above_cap"].sum == 1


@pytest.mark.parametrize(
    ("name", "advantage"),
    # Not CISPO at -1: it masks nothing, and pushing an impossible token further down is an infinite loss.
    [("cispo", 0.0), ("dppo_binary_tv", 0.0), ("dppo_binary_tv", -1.0), ("dppo_binary_kl", 0.0), ("dppo_binary_kl", -1.0)],
)
def test_a_token_that_became_impossible_leaves_a_finite_loss_where_it_has_no_gradient(name: str, advantage: float) -> None:
    logprobs = torch.tensor([[-torch.inf, -1.0]], requires_grad=True)
    anchor, mask = torch.tensor([[-0.5, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, anchor, torch.tensor([advantage]), mask, spec=PRESETS[name])
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()


def test_extreme_log_ratios_stay_finite() -> None:
    logprobs = torch.tensor([[-1e-4, -90.0]], requires_grad=True)
    for name in ("ppo", "cispo", "sapo", "dppo_binary_kl"):
        loss, _ = policy_loss(
            logprobs,
            torch.tensor([[-90.0, -1e-4]]),
            torch.tensor([1.0]),
            torch.ones(1, 2, dtype=torch.bool),
            spec=PRESETS[name],
            max_length=2,
        )
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_gradcheck(name: str) -> None:
    x = inputs_of(name, 11)
    spec = PRESETS[name].replace(beta=0.2, entropy_coef=0.3)
    fixed = {k: v for k, v in x.items() if k != "logprobs"}
    entropy, ref = torch.rand(4, 6, dtype=torch.float64, requires_grad=True), x["anchor_logprobs"] - 0.1
    if spec.surrogate in ("clip", "sapo"):  # differentiable ratio: the loss is what it says

        def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
            return policy_loss(logprobs, **fixed, spec=spec, entropy=entropy, ref_logprobs=ref, max_length=6)[0]

        assert torch.autograd.gradcheck(loss, (x["logprobs"], entropy))
    else:  # score form: the gradient is that of the loss with its weights held fixed
        weights = loss_and_grad(PRESETS[name], x)[1] * x["loss_mask"].sum()

        def frozen(logprobs: Tensor, entropy: Tensor) -> Tensor:
            k3 = (ref - logprobs).exp() - (ref - logprobs) - 1
            per_token = weights * logprobs + 0.2 * k3 - 0.3 * entropy
            return token_mean(per_token, x["loss_mask"])

        assert torch.autograd.gradcheck(frozen, (x["logprobs"], entropy))
        loss = policy_loss(**x, spec=spec, entropy=entropy, ref_logprobs=ref)[0]
        inputs = (x["logprobs"], entropy)
        for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(frozen(*inputs), inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["dapo", "gspo", "dppo_topk_kl"])
def test_compiled_equals_eager(name: str) -> None:
    x = inputs_of(name, 2)

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(**{**x, "logprobs": logprobs}, spec=PRESETS[name])[0]

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(x["logprobs"]), loss(x["logprobs"]))
    a, b = (torch.autograd.grad(f(x["logprobs"]), x["logprobs"])[0] for f in (compiled, loss))
    torch.testing.assert_close(a, b)


def test_presets_are_frozen_and_have_the_published_thresholds() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["dapo"].beta = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["dapo"]  # type: ignore[index]
    for kind in ("binary", "topk"):
        assert PRESETS[f"dppo_{kind}_tv"].epsilon_high == PRESETS[f"dppo_{kind}_tv"].epsilon_low == 0.15
        assert PRESETS[f"dppo_{kind}_kl"].epsilon_high == PRESETS[f"dppo_{kind}_kl"].epsilon_low == 0.05
        assert PRESETS[f"dppo_{kind}_tv"].ratio_cap == 20.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": "ppo"}, "`surrogate` must be one of"),
        ({"ratio_level": "batch"}, "`ratio_level` must be one of"),
        ({"reduction": "mean"}, "`reduction` must be one of"),
        ({"epsilon_low": 0.0}, "`epsilon_low` must be positive"),
        ({"ratio_cap": -1.0}, "`ratio_cap` must be positive"),
        ({"surrogate": "cispo", "ratio_cap": 2.0}, "surrogate 'cispo' ignores it"),
        ({"surrogate": "divergence"}, "`divergence` must be one of"),
        ({"divergence": "binary_tv"}, "surrogate 'clip' measures none"),
        ({"surrogate": "cispo", "ratio_level": "sequence"}, "defined per token"),
        ({"beta": -0.1}, "`beta` must not be negative"),
        ({"beta": math.nan}, "`beta` must be finite"),
        ({"entropy_coef": math.inf}, "`entropy_coef` must be finite"),
    ],
)
def test_bad_specs(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLossSpec(**{"surrogate": "clip", **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"spec": "dapo"}, TypeError, "`spec` must be a PolicyLossSpec"),
        ({"logprobs": torch.zeros(2, 3, 4)}, ValueError, r"`logprobs` must be \[B, T\] or \[N\]"),
        ({"loss_mask": torch.ones(2, 3)}, TypeError, "`loss_mask` must be a bool tensor"),
        ({"anchor_logprobs": torch.zeros(2, 2)}, ValueError, "`anchor_logprobs` must have shape"),
        ({"advantages": torch.zeros(3)}, ValueError, r"`advantages` must have shape \[B\] = \[2\], got \[3\]"),
        ({"advantages": torch.zeros(2, 2)}, ValueError, "`advantages` must have shape"),
        ({"spec": PRESETS["dapo"].replace(beta=0.1)}, ValueError, "`ref_logprobs` is needed"),
        ({"spec": PRESETS["dapo"].replace(entropy_coef=0.1)}, ValueError, "`entropy` is needed"),
        ({"token_weights": torch.ones(3, 1)}, ValueError, "`token_weights` must be"),
        ({"spec": PRESETS["dppo_topk_tv"]}, ValueError, "needs `topk_logprobs` and `rollout_topk_logprobs`"),
        ({"rollout_topk_logprobs": torch.zeros(2, 3, 4)}, ValueError, "`spec` compares no top-K"),
        ({"topk_valid": torch.ones(2, 3, 4, dtype=torch.bool)}, ValueError, "`topk_valid` is given, but"),
        ({"anchor_logprobs": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "`anchor_logprobs` must have a floating-point"),
        ({"token_weights": [1.0]}, TypeError, "`token_weights` must be a torch.Tensor"),
        ({"denominator": 0}, ValueError, "`denominator` must be positive"),
        ({"spec": PRESETS["dr_grpo"]}, ValueError, "needs `max_length` or `denominator`"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "logprobs": torch.zeros(2, 3),
        "anchor_logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "loss_mask": torch.ones(2, 3, dtype=torch.bool),
        "spec": PRESETS["dapo"],
    }
    with pytest.raises(error, match=message):
        policy_loss(**{**arguments, **changes})


def test_flat_layout_is_refused_where_sequences_matter() -> None:
    x = torch.zeros(3)
    for name in ("gspo", "grpo", "dr_grpo"):
        with pytest.raises(ValueError, match=r"needs \[B, T\] `logprobs`"):
            policy_loss(x, x, x, x.bool(), spec=PRESETS[name])
