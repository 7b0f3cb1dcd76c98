"""PPO with a teacher: the loss against full logits, what the teacher is asked, and that the student becomes like it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from dppo_kernels.trainers import DistillPPOTrainer
from tests.trainers.conftest import history, reward_length, weights
from tests.trainers.distill_runs import (
    divergence_of,
    full_logits,
    make_distill,
    scaled_teacher,
    settings,
    teacher_model,
)
from tests.trainers.ppo_runs import reward_model, value_model

ONE_STEP: dict[str, Any] = {
    "optimizer_name": "sgd",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "ppo_epochs": 1,
    "mini_batch_size": 4,
    "max_steps": 1,
}


@pytest.fixture
def completed(prompts) -> Any:
    """Prompts with completions of a dataset, of unequal length; some are longer than a completion may be."""
    return prompts.add_column("completion", ["ab"[: i % 3] + "x" * (i % 7) for i in range(len(prompts))])


@pytest.mark.parametrize(
    ("kind", "data", "given"),
    [
        ("reverse_kl", "rollouts", {"kd_temperature": 2.0}),
        ("jsd", "rollouts", {"kd_beta": 0.3, "kd_temperature": 1.5, "kd_t_squared": False}),
        ("forward_kl", "dataset", {"kd_temperature": 0.7, "temperature": 0.9}),
        ("tv", "dataset", {}),
    ],
)
def test_the_gradient_is_that_of_the_formula(
    make_trainer, model, prompts, completed, kind: str, data: str, given: dict[str, Any]
) -> None:
    """One SGD step of two micro-batches against full logits and autograd; policy loss and distillation loss together."""
    teacher, coefficient = scaled_teacher(108), 0.7
    start = {name: p.clone() for name, p in model.state_dict().items()}
    trainer = make_distill(
        make_trainer,
        value_model=value_model(108),
        teacher=teacher,
        kd_coef=coefficient,
        kd_kind=kind,
        kd_data=data,
        train_dataset=completed if data == "dataset" else prompts,
        **{**ONE_STEP, **given},
    )
    trainer.train()
    after = weights(trainer)
    model.load_state_dict(start)
    model.zero_grad()
    temperature, squared = given.get("kd_temperature", 1.0), given.get("kd_t_squared", True)
    found: list[tuple[Tensor, Tensor]] = []
    surrogates = []
    for x in trainer.micro_batches:
        own = {"completion_ids": x["kd_ids"], "completion_mask": x["kd_mask"].long()} if data == "dataset" else {}
        y = {**x, **own}
        ids = torch.cat([y["prompt_ids"], y["completion_ids"]], 1)
        attention = torch.cat([y["prompt_mask"], y["completion_mask"]], 1)
        sides = [full_logits(m, ids, attention, y["completion_ids"].shape[1]) / temperature for m in (model, teacher)]
        per_token = divergence_of(kind, *(z.log_softmax(-1) for z in sides), given.get("kd_beta", 0.5))
        found.append((per_token * (temperature**2 if squared else 1.0), y["completion_mask"].bool()))
        surrogates.append((surrogate_of(model, x, given.get("temperature", 1.0)), x["completion_mask"].bool()))
    tokens = sum(mask.sum() for _, mask in found)
    distill = sum((value * mask).sum() for value, mask in found) / tokens
    written = sum(mask.sum() for _, mask in surrogates)
    policy = sum((value * mask).sum() for value, mask in surrogates) / written
    (policy + coefficient * distill).backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        change = (start[name] - after[name]) / 1e-2
        torch.testing.assert_close(change, p.grad, rtol=1e-3, atol=3e-4 * largest, msg=lambda text, n=name: f"{n}: {text}")
    assert history(trainer, "distill/loss")[0] == pytest.approx(distill.item(), rel=1e-4)
    scale = temperature**2 if squared else 1.0
    assert history(trainer, "distill/divergence")[0] == pytest.approx(distill.item() / scale, rel=1e-4)
    if data == "dataset":
        assert {int(mask.sum(1).max()) for _, mask in found} == {6}  # longer ones were cut off
        ended = [row[mask][-1] == 1 for x in trainer.micro_batches for row, mask in zip(x["kd_ids"], x["kd_mask"], strict=True)]
        assert any(ended)


def surrogate_of(model: Any, x: dict[str, Any], temperature: float) -> Tensor:
    """On unchanged weights: ratios are 1."""
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    attention = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    logits = full_logits(model, ids, attention, x["completion_ids"].shape[1]) / temperature
    logprobs = logits.log_softmax(-1).gather(2, x["completion_ids"][..., None])[..., 0]
    return -(logprobs - logprobs.detach()).exp() * x["advantages"]


class OwnLogits(nn.Module):
    """A teacher that is no causal LM of transformers."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.asked = inner, 0

    def get_teacher_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.asked += len(input_ids)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=positions).logits


class OwnStudent(Qwen3ForCausalLM):
    """A student whose logits are compared, not its hidden states."""

    asked = 0

    def get_student_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        type(self).asked += len(input_ids)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self(input_ids, attention_mask=attention_mask, position_ids=positions).logits


@pytest.mark.parametrize("data", ["rollouts", "dataset"])
def test_models_that_give_their_own_logits(make_trainer, model, prompts, completed, data: str) -> None:
    """The same step as from hidden states, for a teacher, for a student, for both."""
    student = OwnStudent(model.config)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    ends = []
    alone = [(True, False), (False, True)] if data == "rollouts" else []
    for own_teacher, own_student in ((False, False), *alone, (True, True)):
        policy = student if own_student else model
        policy.load_state_dict(start)
        teacher = OwnLogits(scaled_teacher(108)).train() if own_teacher else scaled_teacher(108)
        OwnStudent.asked = 0
        trainer = make_distill(
            make_trainer,
            model=policy,
            teacher=teacher,
            kd_data=data,
            train_dataset=completed if data == "dataset" else prompts,
            **{**ONE_STEP, "ppo_epochs": 2, "max_steps": 2},
        )
        trainer.train()
        ends.append(weights(trainer))
        assert OwnStudent.asked == (16 if own_student else 0)
        if own_teacher:
            assert teacher.asked == 16  # at every micro-batch of both passes
            assert "teacher_hidden" not in trainer.rollouts[0]
    largest = max(float((p - start[name]).abs().max()) for name, p in ends[0].items())
    assert largest > 1e-4
    for end in ends[1:]:
        for name, p in ends[0].items():
            torch.testing.assert_close(end[name], p, rtol=0, atol=1e-3 * largest, msg=name)


def test_the_teacher_is_asked_once_a_rollout_and_stays_as_it_is(make_trainer) -> None:
    teacher = teacher_model(108, attention_dropout=0.5).train()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    asked: list[int] = []
    trainer = make_distill(make_trainer, teacher=teacher, eval_strategy="no")
    backbone = teacher.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        assert not teacher.training
        asked.append(len(kwargs["input_ids"]))
        return backbone(*args, **kwargs)

    teacher.model.forward = counted
    trainer.train()
    assert asked == [2] * 4 * 2  # two rollouts of eight, a micro-batch at a time, whatever the passes
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}
    for x in trainer.micro_batches:  # shuffled with its rows
        ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
        attention = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
        own = trainer.teacher.hidden(ids, attention, x["completion_ids"].shape[1])
        mask = x["completion_mask"].bool()
        torch.testing.assert_close(x["teacher_hidden"][mask], own[mask], rtol=1e-4, atol=1e-5)


def test_distillation_alone_makes_the_student_like_its_teacher(make_trainer) -> None:
    """Equal scores and no KL leave PPO without an advantage; what is learnt comes from the teacher."""
    trainer = make_distill(
        make_trainer,
        reward=lambda completions, **kwargs: [0.0] * len(completions),
        init_kl_coef=0.0,
        kd_coef=1.0,
        batch_size=32,
        mini_batch_size=16,
        ppo_epochs=4,
        max_steps=40,
        learning_rate=1e-2,
    )
    trainer.train()
    assert not any(x["advantages"].any() for x in trainer.rollouts)
    agreement, divergence = history(trainer, "distill/agreement"), history(trainer, "distill/divergence")
    assert agreement[0] < 0.2
    assert sum(agreement[-4:]) / 4 > 0.5
    assert sum(divergence[-4:]) < 0.4 * sum(divergence[:4])
    assert all(0 <= entropy <= 4.7 for entropy in history(trainer, "distill/student_entropy"))  # log 108


def test_as_in_the_request(model, tokenizer, prompts, make_config) -> None:
    """`teacher`, `student`, `reward_model` and `config` by name, with a reward model alone."""
    from dppo_kernels.trainers import DistillPPOConfig

    config = make_config(DistillPPOConfig, **settings(use_score_scaling=True, use_score_norm=True))
    trainer = DistillPPOTrainer(
        teacher=teacher_model(108),
        student=model,
        reward_model=reward_model(len(tokenizer)),
        config=config,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.model is model
    assert trainer.state.global_step == 8
    names = {"objective/raw_scores", "objective/scores", "objective/kl", "distill/loss", "distill/agreement", "policy/epochs"}
    assert names <= set(trainer.state.log_history[3]) | set(trainer.state.log_history[0])


def test_the_teacher_as_the_reference(make_trainer) -> None:
    """The KL in the rewards is against the teacher, at the sampling temperature; without a coefficient nothing else is."""
    teacher = scaled_teacher(108)
    trainer = make_distill(
        make_trainer, teacher=teacher, teacher_as_reference=True, kd_coef=0.0, temperature=0.8, max_steps=1, ppo_epochs=1
    )
    trainer.train()
    assert trainer.ref_model is teacher
    [x] = trainer.rollouts
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    attention = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    logits = full_logits(teacher, ids, attention, x["completion_ids"].shape[1]) / 0.8
    expected = logits.log_softmax(-1).gather(2, x["completion_ids"][..., None])[..., 0]
    mask = x["completion_mask"].bool()
    torch.testing.assert_close(x["ref_per_token_logps"][mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("distill/")]
    both = make_distill(make_trainer, teacher=scaled_teacher(108), teacher_as_reference=True, max_steps=2)
    both.train()
    assert history(both, "distill/loss")[0] > 0
    assert history(both, "objective/kl")[0] > 0


def test_an_evaluation_distils_on_its_rollouts(make_trainer, completed) -> None:
    """It has no completions of a dataset, and reports none of their loss."""
    held_out = [{"prompt": f"{i}+1="} for i in range(5, 9)]
    for data, found in (("rollouts", True), ("dataset", False)):
        trainer = make_distill(
            make_trainer,
            kd_data=data,
            train_dataset=completed,
            eval_dataset=held_out,
            per_device_eval_batch_size=4,
            eval_strategy="steps",
            eval_steps=2,
            max_steps=2,
        )
        trainer.train()
        [entry] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert ("eval_distill/loss" in entry) == found
        assert history(trainer, "distill/loss")


@pytest.fixture
def first_loss(make_trainer, model, completed) -> Callable[..., float]:
    """The distillation loss of the first step, of all of the rollout, from the same start on the same completions."""
    start = {name: p.clone() for name, p in model.state_dict().items()}

    def measure(**given: Any) -> float:
        model.float().load_state_dict(start)
        same = {"kd_data": "dataset", "train_dataset": completed, "batch_size": 4, "max_steps": 1}
        trainer = make_distill(make_trainer, **same, **given)
        trainer.train()
        return history(trainer, "distill/loss")[0]

    return measure


def test_half_precision_and_a_head_in_float32(first_loss) -> None:
    """Under autocast, the head of the student at full precision or not: a loss close to that in float32."""
    cast = {"bf16": True, "cast_lm_head_to_fp32": True}
    losses = [first_loss(**given) for given in ({}, {"bf16": True}, cast)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] == pytest.approx(losses[0], rel=0.05)
    assert len(set(losses)) == 3


def test_beside_other_losses(first_loss) -> None:
    """The value head on the student, no fused policy loss, DPPO's trust region: the same distillation."""
    expected = first_loss()
    for given in ({"share_value_backbone": True}, {"fused_loss": False}, {"divergence_type": "binary_tv"}):
        assert first_loss(**given) == pytest.approx(expected, rel=1e-5), given


def test_a_student_with_an_adapter(make_trainer, model, tmp_path) -> None:
    """Its adapter alone is trained, towards the teacher too: without scores that differ, by nothing else."""
    model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    trainer = make_distill(
        make_trainer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        reward=lambda completions, **kwargs: [0.0] * len(completions),
        init_kl_coef=0.0,
        learning_rate=5e-2,
    )
    before = weights(trainer)
    trainer.train()
    moved = {name for name, p in weights(trainer).items() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora" in name for name in moved)
    assert history(trainer, "distill/divergence")[3] < history(trainer, "distill/divergence")[0]


def test_caches_are_emptied_after_rollouts_and_updates(make_trainer, monkeypatch) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    make_distill(make_trainer, optimize_cuda_cache=True).train()
    assert len(emptied) == 2 * 2
    make_distill(make_trainer).train()
    assert len(emptied) == 2 * 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"teacher": None}, TypeError, "`teacher` is missing"),
        ({"teacher": 3}, TypeError, "`teacher` must be a causal LM, its path, or an object with a method .*, got int"),
        ({"teacher": "value"}, TypeError, "`teacher` must be a causal LM, .* got Qwen3ForTokenClassification"),
        ({"teacher": 97}, ValueError, "`teacher` has a vocabulary of 97, the policy one of 108"),
        ({"teacher": "student"}, ValueError, "`teacher` shares 25 parameters with the policy"),
        ({"ref_model": "somewhere", "teacher_as_reference": True}, ValueError, "`ref_model` would not be used"),
        ({"teacher": "own logits", "teacher_as_reference": True}, ValueError, "needs a teacher whose own head is used"),
        ({"kd_data": "dataset"}, ValueError, "needs a column 'completion' in `train_dataset`, which has \\['prompt'\\]"),
        ({"optimizers": (object(), None)}, ValueError, "`optimizers` would go past `_setup_optimizer`"),
    ],
)
def test_models_that_are_refused(make_trainer, model, given: dict[str, Any], error: type, message: str) -> None:
    made = {97: lambda: teacher_model(97), "student": lambda: model, "own logits": lambda: OwnLogits(teacher_model(108))}
    made["value"] = lambda: value_model(108)
    given = {name: made[x]() if isinstance(x, int | str) and x in made else x for name, x in given.items()}
    with pytest.raises(error, match=message):
        make_distill(make_trainer, **given)


@pytest.mark.parametrize("both", [{"student": "s"}, {"config": "c"}])
def test_two_names_for_one_argument_are_refused(model, make_config, both: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(both))}` is another name of"):
        DistillPPOTrainer(model, reward_length, make_config(), teacher=model, **both)
    with pytest.raises(TypeError, match="`student` is missing"):
        DistillPPOTrainer(teacher=model)


def test_a_teacher_by_path_must_write_the_same_tokens(make_trainer, tokenizer, tmp_path, caplog) -> None:
    teacher_model(108).save_pretrained(tmp_path)
    make_distill(make_trainer, teacher=str(tmp_path))
    assert any("whether the teacher's ids mean the same was not checked" in record.message for record in caplog.records)
    tokenizer.save_pretrained(tmp_path)
    trainer = make_distill(make_trainer, teacher=str(tmp_path), max_steps=2)
    trainer.train()
    file = tmp_path / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"7":', '"@@":', 1))
    with pytest.raises(ValueError, match="`teacher` has a tokenizer of 108 tokens, the student one of 108: the id of '7'"):
        make_distill(make_trainer, teacher=str(tmp_path))


def test_logits_of_another_shape_are_refused(make_trainer) -> None:
    class Narrow:
        def get_teacher_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.zeros(*input_ids.shape, 97)

    with pytest.raises(ValueError, match=r"`get_teacher_logits` must return logits \[B, S, V\] = \[2, \d+, 108\], got"):
        make_distill(make_trainer, teacher=Narrow()).train()


@pytest.mark.parametrize("bad", [None, 3, [{"role": "user", "content": "x"}]])
def test_rows_without_a_completion_are_refused(make_trainer, bad: Any) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "1+1=", "completion": bad}] * 8)
    with pytest.raises(ValueError, match=r"'completion' must be a string or one assistant message, got .* in row 0"):
        make_distill(make_trainer, kd_data="dataset", train_dataset=rows)
