"""PPO on GRPOTrainer: rewards, advantages and losses against their formulas, and steps that are really made."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from dppo_kernels.trainers import PPOTrainer
from tests.trainers.conftest import history, reward_length, weights
from tests.trainers.ppo_runs import make_ppo, reward_model, value_model, value_weights


class Steps(TrainerCallback):
    """Which update each optimiser step belongs to."""

    def __init__(self) -> None:
        self.updates: list[int] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updates.append(self.trainer.update_count)


@pytest.mark.parametrize(("epochs", "mini_batches", "accumulation"), [(2, 2, 1), (3, 1, 2), (1, 4, 1), (2, 2, 2)])
def test_every_update_makes_its_steps(make_trainer, prompts, epochs: int, mini_batches: int, accumulation: int) -> None:
    """Also at the end of an epoch: 21 prompts are two to five rollouts and a rest, and three passes are made."""
    steps = Steps()
    trainer = make_ppo(
        make_trainer,
        num_ppo_epochs=epochs,
        num_mini_batches=mini_batches,
        gradient_accumulation_steps=accumulation,
        train_dataset=prompts.select(range(21)),
        max_steps=-1,
        num_train_epochs=3,
        callbacks=[steps],
    )
    steps.trainer = trainer
    moved: list[bool] = []
    before = weights(trainer)

    class Moves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal before
            now = weights(trainer)
            moved.append(any(not torch.equal(now[name], before[name]) for name in now))
            before = now

    trainer.add_callback(Moves())
    trainer.train()
    rollout = 2 * accumulation * mini_batches
    updates = 3 * (21 // rollout)
    assert updates >= 6
    assert steps.updates == [u + 1 for u in range(updates) for _ in range(epochs * mini_batches)]
    assert trainer.state.global_step == updates * epochs * mini_batches
    assert all(moved)


def reference_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, lam: Any) -> torch.Tensor:
    """One row at a time, over the tokens that count."""
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        advantage = following = 0.0
        lam_b = lam[b] if isinstance(lam, torch.Tensor) else lam
        for t in reversed(mask[b].nonzero()[:, 0].tolist()):
            advantage = rewards[b, t] + following - values[b, t] + lam_b * advantage
            following = values[b, t]
            out[b, t] = advantage
    return out


def test_advantages_are_those_of_token_rewards(make_trainer, tokenizer) -> None:
    trainer = make_ppo(
        make_trainer,
        value_model=value_model(len(tokenizer)),
        kl_coef=0.3,
        kl_estimator="k3",
        missing_eos_penalty=2.5,
        lam=0.9,
        lam_value=1.0,
        whiten_rewards=True,
        cliprange_value=None,
    )
    trainer.train()
    assert len(trainer.rollouts) == 2
    eos = tokenizer.eos_token_id
    for x in trainer.rollouts:
        mask = x["completion_mask"].bool()
        rows, last = torch.arange(len(mask)), mask.sum(1) - 1
        ended = x["completion_ids"][rows, last] == eos
        scores = x["scores"] - 2.5 * ~ended
        log_ratio = x["ref_per_token_logps"] - x["old_per_token_logps"]
        rewards = torch.where(mask, -0.3 * (log_ratio.exp() - 1 - log_ratio), 0)
        rewards[rows, last] += scores
        mean = rewards[mask].mean()
        rewards = torch.where(mask, (rewards - mean) / (rewards[mask].var() + 1e-8).sqrt() + mean, 0)
        expected = reference_gae(rewards, x["old_values"], mask, 0.9)
        flat = expected[mask]
        expected = torch.where(mask, (expected - flat.mean()) / (flat.var() + 1e-8).sqrt(), 0)
        torch.testing.assert_close(x["advantages"], expected, rtol=1e-4, atol=1e-5)
        returns = reference_gae(rewards, x["old_values"], mask, 1.0) + torch.where(mask, x["old_values"], 0)
        torch.testing.assert_close(x["returns"], returns, rtol=1e-4, atol=1e-5)
    raw = float(trainer.rollouts[0]["scores"].mean())
    assert history(trainer, "objective/scores")[0] == pytest.approx(raw - 2.5 * (1 - history(trainer, "objective/eos")[0]))
    assert history(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-4)
    assert history(trainer, "objective/kl")[1] > 0.01
    assert history(trainer, "objective/rlhf_reward")[1] == pytest.approx(
        history(trainer, "objective/scores")[1] + history(trainer, "objective/non_score_reward")[1], rel=1e-6
    )


@pytest.mark.parametrize("lam_value", [None, 1.0])
def test_lambda_by_length(make_trainer, tokenizer, lam_value: float | None) -> None:
    """VAPO's lambda is that of the advantages; the returns keep theirs. Advantages as they are, without whitening."""
    trainer = make_ppo(
        make_trainer,
        value_model=value_model(len(tokenizer)),
        kl_coef=0.0,
        length_adaptive_alpha=0.4,
        lam=0.9,
        lam_value=lam_value,
        whiten_advantages=False,
        max_steps=4,
    )
    trainer.train()
    [x] = trainer.rollouts
    mask = x["completion_mask"].bool()
    lengths = mask.sum(1)
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), lengths - 1] = x["scores"]
    expected = reference_gae(rewards, x["old_values"], mask, (1 - 1 / (0.4 * lengths)).clamp(0, 1))
    torch.testing.assert_close(x["advantages"], expected, rtol=1e-4, atol=1e-5)
    returns = reference_gae(rewards, x["old_values"], mask, 0.9 if lam_value is None else lam_value)
    torch.testing.assert_close(x["returns"], returns + x["old_values"], rtol=1e-4, atol=1e-5)


class Before(TrainerCallback):
    """Weights of both models before one optimiser step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.policy, self.values = weights(self.trainer), value_weights(self.trainer)


def policy_terms(model: Any, x: dict[str, Any], old: torch.Tensor, clip: float) -> tuple[torch.Tensor, ...]:
    """Clipped surrogate and entropy per token, and hidden states, from full logits."""
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    attention = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    steps = x["completion_ids"].shape[1]
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    out = type(model).forward(model, ids, attention_mask=attention, position_ids=positions, output_hidden_states=True)
    logprobs = out.logits[:, -steps - 1 : -1].float().log_softmax(-1)
    ratio = (logprobs.gather(2, x["completion_ids"][..., None])[..., 0] - old).exp()
    advantages = x["advantages"]
    surrogate = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return surrogate, -(logprobs.exp() * logprobs).sum(-1), out.hidden_states[-1][:, -steps - 1 : -1]


@pytest.mark.parametrize("shared", [False, True], ids=["own model", "shared backbone"])
def test_the_gradient_is_that_of_the_formula(make_trainer, model, tokenizer, shared: bool) -> None:
    """The second SGD step on a rollout, of two micro-batches, against full logits and autograd; clipping is in force."""
    clip, clip_value, rate, coefficient = 0.01, 0.01, 1e-2, 0.7
    before = Before(1)
    trainer = make_ppo(
        make_trainer,
        **({"share_value_backbone": True} if shared else {"value_model": value_model(len(tokenizer))}),
        optim="sgd",
        learning_rate=rate,
        max_grad_norm=0.0,
        num_ppo_epochs=2,
        num_mini_batches=1,
        max_steps=2,
        per_device_train_batch_size=4,
        cliprange=clip,
        cliprange_value=clip_value,
        vf_coef=coefficient,
        entropy_coef=0.01,
        callbacks=[before],
    )
    before.trainer = trainer
    trainer.train()
    after = {**weights(trainer), **{f"values.{name}": p for name, p in value_weights(trainer).items()}}
    model.load_state_dict(before.policy)
    trainer.value_model.load_state_dict(before.values)
    model.zero_grad()
    trainer.value_model.zero_grad()
    micro_batches = trainer.micro_batches[2:]
    tokens = sum(x["completion_mask"].sum() for x in micro_batches)
    clipped = 0
    for x in micro_batches:
        mask = x["completion_mask"].bool()
        surrogate, entropy, hidden = policy_terms(model, x, x["old_per_token_logps"], clip)
        if shared:
            values = trainer.value_model(hidden)
        else:
            ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
            values = trainer.value_model(ids, torch.cat([x["prompt_mask"], x["completion_mask"]], 1), mask.shape[1])
        error = (values - x["returns"]).square()
        bounded = torch.minimum(torch.maximum(values, x["old_values"] - clip_value), x["old_values"] + clip_value)
        worse = torch.maximum(error, (bounded - x["returns"]).square())
        clipped += int(((worse > error) & mask).sum())
        loss = (surrogate - 0.01 * entropy + coefficient * worse / 2)[mask].sum() / tokens
        loss.backward()
    start = {**before.policy, **{f"values.{name}": p for name, p in before.values.items()}}
    named = [*model.named_parameters(), *((f"values.{n}", p) for n, p in trainer.value_model.named_parameters())]
    assert clipped > 0
    assert history(trainer, "policy/clip_fraction")[1] > 0
    largest = max(float(p.grad.abs().max()) for _, p in named if p.grad is not None)
    for name, p in named:
        if p.grad is not None:
            found = (start[name] - after[name]) / rate
            torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=2e-4 * largest, msg=lambda text, n=name: f"{n}: {text}")
    norms = [history(trainer, name)[1] for name in ("policy/grad_norm", "value/grad_norm", "grad_norm")]
    assert norms[2] == pytest.approx(math.hypot(*norms[:2]), rel=1e-5)
    own = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.value_model.parameters()))
    assert norms[1] == pytest.approx(own, rel=1e-3)
    masked = sum(x["completion_mask"].sum() for x in trainer.rollouts)
    assert history(trainer, "value/clip_fraction")[1] == pytest.approx(clipped / int(masked), abs=1e-6)


def test_a_kl_beyond_its_target_stops_before_the_step(make_trainer, model) -> None:
    """The first step moves the policy too far for the second one, which is not made, nor are the others of the rollout."""
    start = {name: p.clone() for name, p in model.state_dict().items()}
    steps = Steps()
    settings = {"learning_rate": 2e-2, "num_mini_batches": 1, "num_ppo_epochs": 4, "weight_decay": 0.1}
    stopping = make_ppo(make_trainer, target_kl=1e-3, max_steps=8, callbacks=[steps], **settings)
    before = Before(1)
    before.trainer = stopping
    stopping.add_callback(before)
    steps.trainer = stopping
    values = value_weights(stopping)
    stopping.train()
    assert history(stopping, "policy/updated") == [1, 0, 0, 0, 1, 0, 0, 0]
    assert steps.updates == [1] * 4 + [2] * 4
    kl = history(stopping, "policy/approx_kl")
    assert len(kl) == 4  # two steps that were made, two that were measured and dropped
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-3
    assert any(not torch.equal(p, values[name]) for name, p in value_weights(stopping).items())
    # One step a rollout with the same rollouts gives the same bits: what was dropped left no trace.
    after_one = before.policy
    model.load_state_dict(start)
    once = make_ppo(make_trainer, max_steps=1, **{**settings, "num_ppo_epochs": 1})
    once.train()
    for name, p in weights(once).items():
        assert torch.equal(p, after_one[name]), name


def test_completions_without_a_score_do_not_count(make_trainer) -> None:
    def some(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if i % 3 == 0 else float(i) for i in range(len(completions))]

    trainer = make_ppo(make_trainer, reward=some, max_steps=1)
    trainer.train()
    [x] = trainer.rollouts
    unscored = torch.arange(8) % 3 == 0
    assert torch.equal(x["scores"].isnan(), unscored)
    assert not x["completion_mask"][unscored].any()
    assert not x["advantages"][unscored].any()
    assert x["advantages"][~unscored].any()
    assert history(trainer, "objective/unscored") == [3 / 8]
    assert history(trainer, "objective/scores")[0] == pytest.approx((1 + 2 + 4 + 5 + 7) / 5)


def test_the_adaptive_coefficient_follows_the_measured_kl(make_trainer) -> None:
    trainer = make_ppo(make_trainer, kl_coef=0.2, kl_target=1.0, kl_horizon=100, max_steps=16)
    trainer.train()
    coefficients, kls = history(trainer, "objective/kl_coef"), history(trainer, "objective/kl")
    assert len(coefficients) == 4
    assert coefficients[0] == 0.2
    for i in range(3):
        error = min(max(kls[i] / 1.0 - 1, -0.2), 0.2)
        assert coefficients[i + 1] == pytest.approx(coefficients[i] * (1 + error * 8 / 100), rel=1e-12)
        assert trainer.rollouts[i]["kl_coef"] == coefficients[i]
    assert coefficients[1] < 0.2  # the first rollout's KL is 0
    assert coefficients[3] > coefficients[2]


def test_a_further_pass_shuffles_and_keeps_every_completion(make_trainer) -> None:
    trainer = make_ppo(make_trainer, max_steps=8, num_ppo_epochs=4, num_mini_batches=2)
    trainer.train()
    passes = [trainer.micro_batches[i : i + 4] for i in range(0, 16, 4)]
    rows = [
        [tuple(row.tolist()) for x in one for row in torch.cat([x["prompt_ids"], x["completion_ids"]], 1)] for one in passes
    ]
    assert all(sorted(one) == sorted(rows[0]) for one in rows)
    assert len({tuple(one) for one in rows}) > 1
    for x in trainer.micro_batches:
        place = {tuple(row.tolist()): i for i, row in enumerate(trainer.rollouts[0]["completion_ids"])}
        for ids, advantages in zip(x["completion_ids"], x["advantages"], strict=True):
            assert torch.equal(advantages, trainer.rollouts[0]["advantages"][place[tuple(ids.tolist())]])


def mean_advantage(rollout: dict[str, Any]) -> torch.Tensor:
    return rollout["advantages"].sum(1) / rollout["completion_mask"].sum(1)


def test_models_as_in_trls_removed_trainer(make_trainer, model, tokenizer, prompts, tmp_path) -> None:
    """`ref_model`, `reward_model` and `value_model` by keyword, without reward functions; evaluation; what is saved."""
    model.save_pretrained(tmp_path / "start")
    reference = type(model).from_pretrained(tmp_path / "start")
    scorer, valuer = reward_model(len(tokenizer)), value_model(len(tokenizer))
    args = {"ref_model": reference, "reward_model": scorer, "value_model": valuer, "reward": None}
    trainer = make_ppo(
        make_trainer,
        eval_dataset=[{"prompt": f"{i}+1="} for i in range(5, 17)],
        per_device_eval_batch_size=12,  # more than a rollout
        eval_strategy="steps",
        eval_steps=4,
        missing_eos_penalty=0.0,
        **args,
    )
    trainer.train()
    assert trainer.ref_model is reference
    texts = {tuple(tokenizer(text)["input_ids"]): text for text in prompts["prompt"]}
    first = trainer.rollouts[0]
    for prompt, completion, score in zip(first["prompt_ids"], first["completion_ids"], first["scores"], strict=True):
        text = texts[tuple(prompt[prompt != 0].tolist())] + tokenizer.decode(completion, skip_special_tokens=True)
        with torch.no_grad():
            expected = scorer(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0, 0]
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)
    evaluated = [entry for entry in trainer.state.log_history if "eval_objective/scores" in entry]
    assert len(evaluated) == 2
    assert trainer._logs["advantages"][-1] == pytest.approx(float(mean_advantage(trainer.rollouts[-1])[-1]), abs=1e-6)
    assert {"eval_loss", "eval_policy/entropy", "eval_value/loss", "eval_objective/kl"} <= set(evaluated[0])
    trainer.save_model(str(tmp_path / "end"))
    saved = type(valuer).from_pretrained(tmp_path / "end" / "value_model")
    assert all(torch.equal(p, dict(valuer.named_parameters())[name]) for name, p in saved.named_parameters())
    trainer.args.save_value_model = False
    trainer.save_model(str(tmp_path / "policy only"))
    assert not (tmp_path / "policy only" / "value_model").exists()


def test_the_given_reference_equals_the_one_that_is_loaded(make_trainer, model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "start")
    model.config._name_or_path = str(tmp_path / "start")
    start = {name: p.clone() for name, p in model.state_dict().items()}
    runs = []
    for given in (None, str(tmp_path / "start")):
        model.load_state_dict(start)
        trainer = make_ppo(make_trainer, ref_model=given, kl_coef=0.5)
        trainer.train()
        runs.append((history(trainer, "objective/kl"), weights(trainer)))
    assert runs[0][0] == runs[1][0]
    assert runs[0][0][1] > 0
    assert all(torch.equal(p, runs[1][1][name]) for name, p in runs[0][1].items())


def test_lora_without_a_reference_model(make_trainer, model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "start")
    model.config._name_or_path = str(tmp_path / "start")
    trainer = make_ppo(make_trainer, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), learning_rate=5e-2)
    trainer.train()
    assert trainer.ref_model is None
    kl = history(trainer, "objective/kl")
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert abs(kl[1]) > 1e-4
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad == ("lora" in name)


def test_dppos_trust_region_instead_of_clipping(make_trainer) -> None:
    trainer = make_ppo(make_trainer, divergence_type="binary_tv")
    trainer.train()
    assert history(trainer, "divergence/mean")
    assert history(trainer, "policy/clip_fraction") == history(trainer, "masked/all")
    assert all(x.get("old_per_token_logps") is None for x in trainer.rollouts)


def test_models_that_share_parameters_are_refused(make_trainer, model, tokenizer) -> None:
    scorer = reward_model(len(tokenizer))
    with pytest.raises(ValueError, match="`value_model` shares 25 parameters with the reward model"):
        make_ppo(make_trainer, reward=None, reward_model=scorer, value_model=scorer, kl_coef=0.0)
    valuer = value_model(len(tokenizer))
    valuer.model = model.model
    with pytest.raises(ValueError, match="parameters with the policy"):
        make_ppo(make_trainer, value_model=valuer, kl_coef=0.0)
    with pytest.raises(ValueError, match="`ref_model` shares 25 parameters with the policy"):
        make_ppo(make_trainer, ref_model=model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_coef": 0.0, "ref_model": "somewhere"}, "`ref_model` would not be used: `kl_coef` is 0"),
        ({"share_value_backbone": True, "value_model": "somewhere"}, "`value_model` would not be used"),
        ({"sync_ref_model": True, "ref_model": "somewhere"}, "`sync_ref_model` moves a reference loaded from the policy"),
    ],
)
def test_models_that_would_not_be_used_are_refused(make_trainer, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_ppo(make_trainer, **given)


def test_other_configurations_are_refused(make_config, model, tokenizer, prompts) -> None:
    with pytest.raises(TypeError, match="`args` must be a PPOConfig, got DPPOConfig"):
        PPOTrainer(model, reward_length, make_config(), train_dataset=prompts, processing_class=tokenizer)
