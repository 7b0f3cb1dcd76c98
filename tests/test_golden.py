"""Hand-checkable cases agreed with public implementations; every id is asserted here."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dppo_kernels import (
    PREFERENCE_LOSSES,
    PRESETS,
    PolicyLossSpec,
    PreferenceSpec,
    aggregate,
    distill_loss,
    divergence,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    linear_distill_loss,
    linear_policy_loss,
    linear_preference_loss,
    linear_sequence_logprobs,
    masked_moments,
    policy_loss,
    preference_loss,
    sequence_logprobs,
    token_logprobs,
    token_rewards,
    topk_distill_loss,
    topk_logprobs,
    trust_region_mask,
    value_loss,
    whiten,
)
from dppo_kernels._numerics import log1mexp
from dppo_kernels.control import AdaptiveKLController, RunningMoments, ScoreProcessor
from dppo_kernels.preference_formulas import Pairs, pair_losses
from dppo_kernels.trainers import DecoupledPPOConfig, DistillPPOConfig, DistillPPOTrainer
from dppo_kernels.trainers.rewards import MathAnswerReward, hierarchical_reward
from dppo_kernels.trainers.rewards.length import soft_overlong_penalty
from dppo_kernels.trainers.sampling import PromptStream, RefillRule, collect, judge
from dppo_kernels.trainers.tabular import discriminator_bce
from dppo_kernels.trainers.value_optimizer import make_value_scheduler

GOLDEN = {case["id"]: case for case in json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())["cases"]}

TOLERANCE = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.float32: {"rtol": 0, "atol": 2e-6}}
ASSERTED: dict[str, Any] = {}


def golden(*ids: str):
    """Register a test function (inputs, expected, dtype) for the ids it asserts."""

    def register(check):
        for case_id in ids:
            ASSERTED[case_id] = check
        return check

    return register


def close(value: Tensor | float, expected: Any, dtype: torch.dtype) -> None:
    value = torch.as_tensor(value, dtype=dtype)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=dtype), **TOLERANCE[dtype])


@golden("s1.binary_divergences")
def binary_divergences(x: dict, y: dict, dtype: torch.dtype) -> None:
    log_m, log_p = torch.tensor(x["mu_pi"], dtype=dtype).log().unbind(1)
    close(divergence("binary_tv", log_p, log_m), y["tv"], dtype)
    kl = divergence("binary_kl", log_p, log_m)
    close(kl, y["kl_mu_pi"], dtype)
    wrong = torch.tensor(y["kl_pi_mu_WRONG_DIRECTION"], dtype=dtype)
    assert ((kl - wrong).abs() > 1e-4).sum() == len(wrong) - 1  # equal only where mu = pi


@golden("s1.mask_table_tv")
def mask_table(x: dict, y: dict, dtype: torch.dtype) -> None:
    advantages, mu, pi = torch.tensor(x["rows"], dtype=dtype).unbind(1)
    # The table probes |mu - pi| == delta: its divergences are exact binary fractions, those of log-probs are not.
    d, delta = (mu - pi).abs(), x["delta"]
    keep = trust_region_mask(d, pi.log(), mu.log(), advantages, low=delta, high=delta)
    assert keep.tolist() == [bool(k) for k in y["keep"]]


def topk_columns(x: dict, dtype: torch.dtype, k: int) -> dict[str, Tensor]:
    log_mu, log_pi = (torch.tensor([x[name]], dtype=dtype).log() for name in ("mu", "pi"))
    top = topk_logprobs(log_mu, torch.tensor([x["sampled"]]), k)
    gathered = log_pi.gather(1, top.ids.clamp(min=0))
    return {
        "logprobs": log_pi[:, x["sampled"]],
        "rollout_logprobs": log_mu[:, x["sampled"]],
        "topk_logprobs": gathered,
        "rollout_topk_logprobs": top.logprobs,
        "topk_valid": top.valid,
        "ids": top.ids,
    }


@golden("s1.topk_sampled_0", "s1.topk_sampled_3")
def topk_union(x: dict, y: dict, dtype: torch.dtype) -> None:
    columns = topk_columns(x, dtype, x["k"])
    ids, valid = columns.pop("ids")[0], columns["topk_valid"][0]
    assert ids[valid].tolist() == y["union"]["ids"]
    kept = columns["rollout_topk_logprobs"][0][valid].exp()
    close(torch.cat([kept, 1 - kept.sum(0, keepdim=True)]), y["union"]["mu_bucketed"], dtype)
    close(divergence("topk_tv", **columns), [y["union"]["tv"]], dtype)
    close(divergence("topk_kl", **columns), [y["union"]["kl_mu_pi"]], dtype)
    sampled = {name: columns[name] for name in ("logprobs", "rollout_logprobs")}
    close(divergence("binary_tv", **sampled), [y["binary"]["tv"]], dtype)
    close(divergence("binary_kl", **sampled), [y["binary"]["kl_mu_pi"]], dtype)
    # The evicting variant of other implementations is another partition; ours is the union.
    if y["evict"]["ids"] != y["union"]["ids"]:
        assert abs(divergence("topk_tv", **columns).item() - y["evict"]["tv"]) > 1e-3


@golden("s1.topk_full_vocab")
def topk_full_vocab(x: dict, y: dict, dtype: torch.dtype) -> None:
    columns = topk_columns(x, dtype, x["k"])
    del columns["ids"]
    close(divergence("topk_tv", **columns), [y["tv"]], dtype)
    close(divergence("topk_kl", **columns), [y["kl_mu_pi"]], dtype)


def dppo_batch(x: dict, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    inputs = {
        "logprobs": torch.tensor(x["pi"], dtype=dtype).log().requires_grad_(),
        "anchor_logprobs": torch.tensor(x["mu"], dtype=dtype).log(),
        "advantages": torch.tensor(x["adv"], dtype=dtype),
        "loss_mask": torch.tensor(x["mask"]).bool(),
    }
    return inputs, inputs["loss_mask"]


@golden("s1.loss_tv_c20.0")
def loss_tv(x: dict, y: dict, dtype: torch.dtype) -> None:
    inputs, mask = dppo_batch(x, dtype)
    spec = PRESETS["dppo_binary_tv"]
    assert spec.epsilon_low == spec.epsilon_high == x["delta"]
    assert spec.ratio_cap == x["clip_ratio_c"]
    logp, anchor = inputs["logprobs"].detach(), inputs["anchor_logprobs"]
    d = divergence("binary_tv", logp, anchor)
    close(d, y["tv"], dtype)
    keep = trust_region_mask(d, logp, anchor, inputs["advantages"][:, None], low=x["delta"], high=x["delta"])
    assert keep[mask].tolist() == [bool(k) for k in torch.tensor(y["keep"])[mask]]

    def loss(**changes: Any) -> Tensor:
        reduction = changes.pop("reduction", "token_mean")
        return policy_loss(**inputs, spec=spec.replace(reduction=reduction), **changes)[0]

    token_mean = loss()
    close(token_mean.detach(), y["token-mean"], dtype)
    close(torch.autograd.grad(token_mean, inputs["logprobs"])[0], y["dloss_dlogp(token-mean)"], dtype)
    close(loss(denominator=10).detach(), y["num-items(10)"], dtype)
    close(loss(reduction="sequence_mean").detach(), y["seq-mean-token-mean"], dtype)
    close(loss(denominator=2).detach(), y["seq-mean-token-sum"], dtype)
    close(loss(denominator=3).detach(), y["drgrpo-sum(max_len=3; Stable-RL, verl before #5417)"], dtype)
    fixed = loss(reduction="fixed_length", max_length=3)
    close(fixed.detach(), y["drgrpo-mean(max_len=3; TRL, verl since #5417)"], dtype)
    close(aggregate(torch.tensor(y["per_token_loss"], dtype=dtype), mask, "token_mean"), y["token-mean"], dtype)
    stats = policy_loss(**inputs, spec=spec)[1]
    close(stats["surrogate"].mean.float(), y["surrogate_value(token-mean, -keep*ratio*A)"], torch.float32)
    close((logp - anchor).exp(), y["ratio"], dtype)


@golden("s1.loss_kl")
def loss_kl(x: dict, y: dict, dtype: torch.dtype) -> None:
    inputs, mask = dppo_batch(x, dtype)
    spec = PRESETS["dppo_binary_kl"]
    assert spec.epsilon_high == x["delta"]
    d = divergence("binary_kl", inputs["logprobs"].detach(), inputs["anchor_logprobs"])
    close(d[mask], y["kl"], dtype)
    loss, stats = policy_loss(**inputs, spec=spec)
    close(loss.detach(), y["token-mean"], dtype)
    assert stats["masked"].sum == mask.sum() - sum(sum(row) for row in y["keep"])


@golden("s1.metrics_tv")
def metrics_tv(x: dict, y: dict, dtype: torch.dtype) -> None:
    inputs, mask = dppo_batch(x, dtype)
    stats = policy_loss(**inputs, spec=PRESETS["dppo_binary_tv"])[1]
    expected = {
        "prob_gap": y["prob_diff/mean"],
        "masked": y["mask_ratio/overall_mean"],
        "masked_positive": y["mask_ratio/positive_adv_mean"],
        "masked_negative": y["mask_ratio/negative_adv_mean"],
        "anchor_kl": y["ppo_kl = mean(logmu-logpi)"],
    }
    for name, value in expected.items():
        close(stats[name].mean, value, torch.float32)
    close(stats["prob_gap"].max, y["prob_diff/max"], torch.float32)
    assert stats["masked"].count == mask.sum()


@golden("s1.temperature_mismatch")
def temperature_mismatch(x: dict, y: dict, dtype: torch.dtype) -> None:
    logits, sampled = torch.tensor([x["logits"]], dtype=dtype), torch.tensor([x["sampled"]])
    at_t = topk_logprobs(logits, sampled, 3, temperature=x["T"])
    close(at_t.logprobs[0, :3].exp(), y["mu_T"], dtype)
    unscaled = token_logprobs(logits, sampled).logprobs
    close(divergence("binary_tv", unscaled, at_t.sampled_logprobs), [y["fake_tv"]], dtype)
    scaled = token_logprobs(logits, sampled, temperature=x["T"]).logprobs
    close(divergence("binary_tv", scaled, at_t.sampled_logprobs), [y["true_tv"]], dtype)


@golden("s1.ppo_special_case")
def ppo_special_case(x: dict, y: dict, dtype: torch.dtype) -> None:
    ratio, advantages = torch.tensor(x["ratio"], dtype=dtype), torch.tensor(x["adv"], dtype=dtype)
    logprobs, eps = ratio.log().requires_grad_(), x["eps"]
    anchor = torch.zeros_like(ratio)
    keep = trust_region_mask((ratio - 1).abs(), ratio.log(), anchor, advantages, low=eps, high=eps)
    assert keep.tolist() == [bool(k) for k in y["keep"]]
    spec = PolicyLossSpec("clip", epsilon_low=eps, epsilon_high=eps)
    loss, _ = policy_loss(logprobs, anchor, advantages, torch.ones_like(keep), spec=spec)
    assert (torch.autograd.grad(loss, logprobs)[0] != 0).tolist() == [bool(k) for k in y["ppo_keep"]]


@golden("s0.kl_estimators")
def kl_estimators(x: dict, y: dict, dtype: torch.dtype) -> None:
    logp, ref = torch.tensor(x["logp"], dtype=dtype), torch.tensor(x["ref"], dtype=dtype)
    for kind in ("k1", "k2", "k3"):
        close(kl_estimate(kind, logp, ref), y[kind], dtype)


@golden("s0.policy_loss_A+1")
def clipped_surrogate(x: dict, y: dict, dtype: torch.dtype) -> None:
    new, old = torch.tensor(x["new_p"], dtype=dtype).log(), torch.tensor(x["old_p"], dtype=dtype).log()
    mask, advantages = torch.ones_like(new, dtype=torch.bool), torch.tensor([x["adv"]], dtype=dtype)
    spec = PolicyLossSpec("clip", epsilon_low=x["cliprange"], epsilon_high=x["cliprange"])
    loss, stats = policy_loss(new, old, advantages, mask, spec=spec)
    close(loss, y["mean"], dtype)
    for t, expected in enumerate(y["per_token"][0]):
        only = torch.zeros_like(mask)
        only[0, t] = True
        close(policy_loss(new, old, advantages, only, spec=spec)[0], expected, dtype)
    close((new - old).exp(), y["ratio"], dtype)
    close(stats["clipped_low"].mean + stats["clipped_high"].mean, y["clipfrac"], torch.float32)
    close(stats["anchor_kl"].mean, y["k1(mean(old-new))"], torch.float32)
    close(kl_estimate("k2", new, old).mean(), y["approxkl(0.5*mean(diff^2))"], dtype)


@golden("s0.gae_g1.0_l0.95", "s0.gae_g1.0_l1.0", "s0.gae_g1.0_l0.0")
def generalised_advantages(x: dict, y: dict, dtype: torch.dtype) -> None:
    rewards, values = (torch.tensor(x[name], dtype=dtype) for name in ("rewards", "values"))
    mask = torch.ones_like(values, dtype=torch.bool)
    for backend in ("auto", "torch", "reference"):
        out = gae(rewards, values, mask, gamma=x["gamma"], lam=x["lam"], backend=backend)
        close(out.advantages, y["advantages"], dtype)
        close(out.returns, y["returns"], dtype)


@golden("s0.reward_placement")
def reward_placement(x: dict, y: dict, dtype: torch.dtype) -> None:
    logp, ref, scores = (torch.tensor(x[name], dtype=dtype) for name in ("logp", "ref", "score"))
    mask = torch.tensor(x["mask"]).bool()
    rewards = token_rewards(scores, mask, kl=kl_estimate("k1", logp, ref), kl_coef=x["kl_coef"])
    close(rewards, y["old_trl_0.11(last real token)"], dtype)
    assert [int(row.argmax()) for row in rewards] == x["last_index"]
    other = torch.tensor(y["trl_ppo(last+1 if it exists else last)"], dtype=dtype)
    assert not torch.allclose(rewards[0], other[0])
    close(rewards.sum(1), other.sum(1).tolist(), dtype)


@golden("s0.whiten")
def masked_whitening(x: dict, y: dict, dtype: torch.dtype) -> None:
    values, mask = torch.tensor(x["x"], dtype=dtype), torch.tensor(x["mask"]).bool()
    moments = masked_moments(values, mask)
    assert (moments.mean, moments.variance()) == (y["mean"], y["var"])
    for expected, shift_mean in (("shift_mean", True), ("keep_mean", False)):
        # What stands behind the mask there is left to the caller; here it is 0.
        close(whiten(values, mask, shift_mean=shift_mean), [[*y[expected][0][:3], 0.0]], dtype)


@golden("s0.decoupled_schedule")
def decoupled_schedule(x: dict, y: dict, dtype: torch.dtype) -> None:
    """Ours is the second table: the value scheduler counts value updates. The policy's is stepped by transformers."""
    names = ("num_ppo_epochs", "num_vf_epochs", "vf_update_frequency", "learning_rate", "vf_learning_rate")
    args = DecoupledPPOConfig(use_cpu=True, bf16=False, gradient_accumulation_steps=2, **{name: x[name] for name in names})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=x["vf_learning_rate"])
    scheduler = make_value_scheduler(args, optimizer, args.count_value_updates(x["updates"]))
    rows = []
    for update in range(1, x["updates"] + 1):
        due = args.is_value_update(update)
        policy_rate = x["learning_rate"] * (x["updates"] - update + 1) / x["updates"]
        rows.append(
            (update, args.num_ppo_epochs, due * args.num_vf_epochs, policy_rate, scheduler.get_last_lr()[0] if due else None)
        )
        if due:
            optimizer.step()
            scheduler.step()
    expected = y["value_scheduler_steps_on_value_updates_only"]
    assert [row[:3] for row in rows] == [tuple(row[:3]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        close(row[3], other[3], dtype)
        assert (row[4] is None) == (other[4] is None)
        if row[4] is not None:
            close(row[4], other[4], dtype)


@golden("s0.vf_coef_scaling")
def value_coefficient(x: dict, y: dict, dtype: torch.dtype) -> None:
    """The same value loss inside a coupled loss and alone: what an optimiser makes of the coefficient."""
    optimizers = {
        "adam_first_step": lambda p: torch.optim.Adam([p], lr=x["lr"], eps=x["adam_eps"]),
        "sgd_step": lambda p: torch.optim.SGD([p], lr=x["lr"]),
    }
    counted = torch.ones(1, dtype=torch.bool)
    for name, make in optimizers.items():
        for kind, coefficient in (("coupled", x["vf_coef"]), ("decoupled", 1.0)):
            values = torch.zeros(1, dtype=dtype, requires_grad=True)
            loss, _ = value_loss(values, None, torch.full((1,), -x["grad"], dtype=dtype), counted)
            optimizer = make(values)
            (coefficient * loss).backward()
            optimizer.step()
            close(values.detach(), [y[f"{name}_{kind}"]], dtype)


@golden("s2.dpo_losses")
def preference_losses(x: dict, y: dict, dtype: torch.dtype) -> None:
    sums = [torch.tensor(x[name], dtype=dtype) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    lengths = {f"{name}_lengths": torch.tensor(x[f"len_{name}"]) for name in ("chosen", "rejected")}
    ours = {"sigmoid_label_smoothing(cDPO, not in TRL 1.16)": "sigmoid_smoothed", "ipo_avg": "ipo"}
    ours["ipo_sum(paper eq17, not TRL)"] = "ipo_sum"
    for name, expected in y.items():
        spec = PreferenceSpec(ours.get(name, name), beta=x["beta"], label_smoothing=x["label_smoothing"], discopop_tau=x["tau"])
        loss, _ = preference_loss(*sums, spec=spec, **lengths)
        close(loss, sum(expected) / len(expected), dtype)
        pairs = Pairs(*(v.double() for v in (*sums, *lengths.values())))
        close(pair_losses(pairs, spec).to(dtype), expected, dtype)
    assert {ours.get(name, name) for name in y} == set(PREFERENCE_LOSSES) - {"sft"}


@golden("s2.completion_logp")
def completion_logprob(x: dict, y: dict, dtype: torch.dtype) -> None:
    ids, mask = torch.tensor(x["input_ids"][1:]).expand(2, -1), torch.tensor(x["completion_mask"][1:]).bool().expand(2, -1)
    for name, total in (("logits", y["sum_completion"]), ("ref_logits", y["ref_sum_completion"])):
        shifted = torch.tensor(x[name], dtype=dtype)[:-1].expand(2, -1, -1)
        scored = token_logprobs(shifted, ids).logprobs
        if name == "logits":
            close(scored[0], y["per_token_shifted"], dtype)
        close(sequence_logprobs(scored, mask)[0], total, dtype)
        found = linear_sequence_logprobs(shifted, torch.eye(3, dtype=dtype), ids, mask)
        close(found.logprobs.to(dtype), [total, total], dtype)


@golden("s2.seed_loss_is_not_dpo")
def vocabulary_means_are_not_logprobs(x: dict, y: dict, dtype: torch.dtype) -> None:
    """What the request's script computes does not know the tokens; ours does."""
    chosen, rejected = (torch.tensor(x[f"logits_{name}"], dtype=dtype) for name in ("chosen", "rejected"))
    means = [logits.log_softmax(-1).mean() for logits in (chosen, rejected)]
    close(torch.stack(means), [y["vocab_mean_chosen"], y["vocab_mean_rejected"]], dtype)
    close(-torch.nn.functional.logsigmoid(x["beta"] * (means[0] - means[1])), y["loss"], dtype)
    assert max(means) <= y["upper_bound_of_vocab_mean"] + 1e-6
    mask, hidden, losses = torch.ones(2, 1, dtype=torch.bool), torch.stack([chosen, rejected])[:, None], set()
    for token in range(3):
        rows = (hidden, torch.eye(3, dtype=dtype), torch.full((2, 1), token), mask)
        losses.add(linear_preference_loss(*rows, ref_logprobs=torch.zeros(2))[0].item())
    assert len(losses) == 3 > len(set(y["loss_for_any_choice_of_token_ids"]))


@golden("s4.adaptive_kl")
def adaptive_kl(x: dict, y: dict, dtype: torch.dtype) -> None:
    found = []
    for coef, kl, target, n, horizon in x["rows_beta_kl_target_n_horizon"]:
        controller = AdaptiveKLController(coef, target=target, horizon=horizon)
        controller.update(kl, n)
        found.append(controller.coef)
    close(torch.tensor(found, dtype=dtype), y["beta"], dtype)


@golden("s4.running_moments")
def running_moments(x: dict, y: dict, dtype: torch.dtype) -> None:
    running = RunningMoments()
    processors = {
        "scaled": ScoreProcessor(scaling=True),
        "normed": ScoreProcessor(scaling=True, norm=True),
        "normed_clip1": ScoreProcessor(scaling=True, norm=True, clip=x["score_clip"]),
    }
    for batch, expected in zip(x["batches"], y["steps"], strict=True):
        scores = torch.tensor(batch, dtype=dtype)
        found = running.update(scores)
        close(torch.tensor([found.mean, found.std], dtype=dtype), [expected["batch_mean"], expected["batch_std"]], dtype)
        for name in ("mean", "std"):
            close(getattr(running, name), expected[name], dtype)
        close(running.state_dict()["m2"] / running.count, expected["var_biased"], dtype)
        for name, processor in processors.items():
            close(processor(scores), expected[name], dtype)


@golden("s4.lr_schedules")
def learning_rate_schedules(x: dict, y: dict, dtype: torch.dtype) -> None:
    """As the trainer sets them up."""
    for name, expected in y.items():
        args = DistillPPOConfig(
            use_cpu=True, bf16=False, scheduler_name=name, scheduler_kwargs={"num_warmup_steps": x["warmup"]}
        )
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = DistillPPOTrainer._setup_scheduler(SimpleNamespace(args=args), optimizer, x["total"])
        found = []
        for _ in x["steps"]:
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        close(torch.tensor(found, dtype=dtype), expected, dtype)


@golden("s4.explained_variance")
def explained(x: dict, y: dict, dtype: torch.dtype) -> None:
    """Ours divides by the biased variance, so that the best constant explains nothing."""
    values, returns = (torch.tensor(x[name], dtype=dtype) for name in ("values", "returns"))
    mask = torch.ones_like(values, dtype=torch.bool)
    close(explained_variance(values, returns, mask), y["ev_biased"], dtype)
    moments = masked_moments(returns, mask)
    close(moments.variance(unbiased=False), y["var_biased"], dtype)
    close(moments.variance(), y["var_unbiased"], dtype)
    _, stats = value_loss(values, None, returns, mask)
    close(stats["value_error"].mean, y["mse"], dtype)
    close(1 - stats["value_error"].mean / moments.variance(), y["ev_old_trl(unbiased)"], dtype)


def distillation(x: dict, dtype: torch.dtype, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient of the student's logits) of every public function and backend, through heads that are the identity."""
    student, teacher = (torch.tensor([x[f"{name}_logits"]], dtype=dtype) for name in ("student", "teacher"))
    student.requires_grad_()
    head, counted, every_id = torch.eye(3, dtype=dtype), torch.ones(1, dtype=torch.bool), torch.tensor([[2, 0, 1]])
    logprobs = torch.log_softmax(teacher / options.get("temperature", 1.0), -1).gather(1, every_id)
    found = []
    for backend in ("torch", "reference"):
        losses = (
            distill_loss(student, teacher, counted, backend=backend, **options),
            linear_distill_loss(student, head, teacher, head, counted, backend=backend, **options),
            topk_distill_loss(student, head, every_id, logprobs, counted, backend=backend, **options),
        )
        found += [(loss.detach(), torch.autograd.grad(loss, student)[0]) for loss, _ in losses]
    return found


@golden("s4.kd_T1")
def distillation_terms(x: dict, y: dict, dtype: torch.dtype) -> None:
    for kind in ("forward_kl", "reverse_kl"):
        for loss, _ in distillation(x, dtype, kind=kind, temperature=x["T"]):
            close(loss, y[kind], dtype)
    logp = torch.log_softmax(torch.tensor(x["teacher_logits"], dtype=dtype) / x["T"], -1)
    for loss, grad in distillation(x, dtype, kind="forward_kl", temperature=x["T"], t_squared=True):
        close(loss, y["forward_kl_T2"], dtype)
        close(loss - x["T"] ** 2 * (logp.exp() * logp).sum(), y["soft_ce_T2"], dtype)  # the teacher's entropy apart
        close(grad, [y["grad_forward_kl_T2_wrt_student_logits"]], dtype)


@golden("s4.gjsd")
def generalised_jsd(x: dict, y: dict, dtype: torch.dtype) -> None:
    for name, expected in y.items():
        beta, _, temperature = name.removeprefix("beta=").partition(",T=")
        for loss, _ in distillation(x, dtype, kind="jsd", beta=float(beta), temperature=float(temperature or 1)):
            close(loss, expected, dtype)


@golden("s3.grad_accum_normaliser")
def accumulation_normaliser(x: dict, y: dict, dtype: torch.dtype) -> None:
    values, mask = torch.tensor(x["per_token"], dtype=dtype), torch.tensor(x["mask"]).bool()
    micro = [(values[i : i + 1], mask[i : i + 1]) for i in range(2)]
    close(sum(aggregate(v, m, "token_mean", denominator=mask.sum()) for v, m in micro), y["correct(sum/total)"], dtype)
    wrong = sum(aggregate(v, m, "token_mean") for v, m in micro) / 2
    close(wrong, y["wrong(mean of micro-batch means)"], dtype)


@golden("s3.clip_higher_vs_symmetric")
def clip_higher(x: dict, y: dict, dtype: torch.dtype) -> None:
    for name, suffix in (("dapo", "high"), ("ppo", "sym")):
        logprobs = torch.tensor([math.log(x["ratio"])], dtype=dtype, requires_grad=True)
        zero = torch.zeros(1, dtype=dtype)
        loss, _ = policy_loss(
            logprobs, zero, torch.tensor([x["adv"]], dtype=dtype), zero.bool().logical_not(), spec=PRESETS[name]
        )
        close(loss.detach(), y[f"loss_{suffix}"], dtype)
        assert bool(torch.autograd.grad(loss, logprobs)[0].any()) == y[f"grad_flows_{suffix}"]


@golden("s3.group_advantage")
def group_advantage(x: dict, y: dict, dtype: torch.dtype) -> None:
    scores = torch.tensor(x["scores"], dtype=dtype)
    close(group_advantages(scores, 8), y["trl(ddof1,1e-4)"], dtype)
    close(group_advantages(scores, 8, eps=1e-6), y["verl(ddof1,1e-6)"], dtype)
    close(group_advantages(scores, 8, eps=1e-6, unbiased=False), y["ddof0,1e-6"], dtype)
    close(group_advantages(scores, 8, scale=False), y["no_std(Dr.GRPO)"], dtype)
    centred, scaled = (group_advantages(scores, 8, scale=scale, eps=0.0) for scale in (False, True))
    close((centred / scaled)[0], y["std_ddof1"], dtype)


@golden("s3.advantage_01_vs_pm1")
def one_zero_against_plus_minus_one(x: dict, y: dict, dtype: torch.dtype) -> None:
    signs, ones, penalty = (torch.tensor(x[name], dtype=dtype) for name in ("pm1", "zero_one", "penalty"))
    for name, rewards in {
        "pm1": signs,
        "zero_one": ones,
        "pm1_with_penalty": signs + penalty,
        "zero_one_with_penalty": ones + penalty,
    }.items():
        close(group_advantages(rewards, 8, eps=0.0), y[name], dtype)


@golden("s3.overlong")
def overlong(x: dict, y: dict, dtype: torch.dtype) -> None:
    penalties = [soft_overlong_penalty(n, x["L_max"], x["L_cache"], x["factor"]) for n in x["lengths"]]
    close(torch.tensor(penalties, dtype=dtype), y["paper"], dtype)
    close(torch.tensor(penalties[:4], dtype=dtype), y["verl"][:4], dtype)  # the same, up to the longest there can be


@golden("s3.dynamic_sampling")
def dynamic_sampling(x: dict, y: dict, dtype: torch.dtype) -> None:
    for max_rounds in (0, 2, 3):
        batches = iter(x["batches"])
        drawn: list[list[str]] = []

        def generate(rows: list[int], batches: Any = batches, drawn: list[list[str]] = drawn) -> list[Any]:
            batch = next(batches)
            drawn.append([name for name, _ in batch])
            accuracies = torch.tensor([scores for _, scores in batch], dtype=dtype)
            return judge(accuracies, accuracies)

        rule = RefillRule(need=x["need"], per_round=4, max_rounds=max_rounds, exhausted="train")
        collected = collect(PromptStream(100, seed=0, shuffle=False), rule, generate)
        names, rounds, outcome = y[f"max_gen={max_rounds}"]
        assert [drawn[group.round][group.place] for group in collected.trained] == names
        assert collected.rounds == rounds
        assert (len(collected.trained) < rule.need) == (outcome == "exhausted")


@golden("s3.math_dapo_answers")
def math_answers(x: dict, y: dict, dtype: torch.dtype) -> None:
    completions, golds = zip(*x["cases"], strict=True)
    for boxed, expected in (
        ("never", "reward_without_box_fallback"),
        ("fallback", "reward_with_box_fallback(verl HEAD since #7407)"),
    ):
        close(torch.tensor(MathAnswerReward(boxed=boxed)(completions, answer=golds), dtype=dtype), y[expected], dtype)


@golden("s2.hierarchical_reward")
def reward_of_levels(x: dict, y: dict, dtype: torch.dtype) -> None:
    levels = [torch.tensor(x[name], dtype=dtype) for name in ("token", "sentence", "row")]
    features = {group: torch.tensor(score, dtype=dtype) for group, score in x["features"].items()}
    close(hierarchical_reward(*levels, features), y["reward"], dtype)


@golden("s2.discriminator_bce")
def discriminator_loss(x: dict, y: dict, dtype: torch.dtype) -> None:
    labels, logits = (torch.tensor(x[name], dtype=dtype) for name in ("labels", "logits"))
    close(discriminator_bce(logits, labels), y["mean"], dtype)
    for i, expected in enumerate(y["per_example"]):
        close(discriminator_bce(logits, labels, torch.eye(len(labels), dtype=dtype)[i]), expected, dtype)
    close(logits.sigmoid(), y["prob_real"], dtype)


def fused_policy_loss(logprobs: Tensor, anchor: Tensor | None = None, *rest: Tensor, **options: Any) -> Any:
    """`policy_loss` by way of `linear_policy_loss`: a head of two tokens whose first has the given log-probs."""
    anchor = options.pop("anchor_logprobs", anchor)
    # Clipped losses are given ratios, some as log-probs above 0: only the difference counts there.
    shift = max(logprobs.max().item(), 0.0) and logprobs.max().item() + 1
    z = torch.stack([logprobs - shift, log1mexp(logprobs - shift)], -1)
    names = dict(zip(("advantages", "loss_mask"), rest, strict=False))
    ids = torch.zeros(logprobs.shape, dtype=torch.long)
    head = torch.eye(2, dtype=logprobs.dtype)
    FUSED_CALLS.append(shift)
    return linear_policy_loss(z, head, ids, anchor - shift, **names, **options, score_inactive=True)


FUSED_CALLS: list[float] = []
LOSSES = (
    *("s1.loss_tv_c20.0", "s1.loss_kl", "s1.metrics_tv", "s1.ppo_special_case"),
    *("s0.policy_loss_A+1", "s3.clip_higher_vs_symmetric"),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case_id", LOSSES)
def test_golden_losses_through_the_fused_op(case_id: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "policy_loss", fused_policy_loss)
    FUSED_CALLS.clear()
    case = GOLDEN[case_id]
    ASSERTED[case_id](case["inputs"], case["expected"], dtype)
    assert FUSED_CALLS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case_id", ASSERTED)
def test_golden(case_id: str, dtype: torch.dtype) -> None:
    case = GOLDEN[case_id]
    ASSERTED[case_id](case["inputs"], case["expected"], dtype)


def test_every_case_is_asserted() -> None:
    assert ASSERTED.keys() == GOLDEN.keys()
