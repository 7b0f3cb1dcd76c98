"""The four set-up points of PPO with a teacher: what they do by default, and that overriding one is all it takes."""

import math
from typing import Any

import pytest
import torch

from dppo_kernels.control import ScoreProcessor
from tests.trainers.conftest import history, weights
from tests.trainers.distill_runs import RecordingDistill, make_distill
from tests.trainers.ppo_runs import value_weights


def moved(trainer: Any) -> tuple[float, float]:
    """How far training moved student and value model at most."""
    before = weights(trainer), value_weights(trainer)
    trainer.train()
    after = weights(trainer), value_weights(trainer)
    return tuple(max(float((b[name] - a[name]).abs().max()) for name in a) for a, b in zip(before, after, strict=True))


def test_the_optimiser_holds_student_and_values(make_trainer) -> None:
    """With its keywords; weight decay as transformers deals it out."""
    trainer = make_distill(
        make_trainer,
        optimizer_name="sgd",
        optimizer_kwargs={"momentum": 0.5, "weight_decay": 0.1},
        max_steps=2,
    )
    assert min(moved(trainer)) > 0
    groups = trainer.optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    expected = [id(p) for module in (trainer.model, trainer.value_model) for p in module.parameters()]
    assert sorted(held) == sorted(expected)
    assert {group["momentum"] for group in groups} == {0.5}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_keywords_that_the_optimiser_does_not_take_are_refused(make_trainer) -> None:
    with pytest.raises(ValueError, match="`optimizer_kwargs` holds 'momentum', which AdamW does not take: params, lr, betas"):
        make_distill(make_trainer, optimizer_kwargs={"momentum": 0.5}).train()


def test_another_optimiser(make_trainer) -> None:
    """One that knows the student alone: the values are added to it, at its settings."""

    class Own(RecordingDistill):
        def _setup_optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=1e-3)

    trainer = make_distill(make_trainer, Own, max_steps=4)
    student, values = moved(trainer)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert len(trainer.optimizer.param_groups) == 3
    assert student > 0
    assert values > 0
    assert history(trainer, "learning_rate") == [1e-3] * 4


def test_the_schedule_counts_optimiser_steps(make_trainer) -> None:
    trainer = make_distill(
        make_trainer,
        scheduler_name="cosine",
        scheduler_kwargs={"num_warmup_steps": 2, "num_cycles": 0.5},
    )
    trainer.train()
    expected = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6))]
    assert history(trainer, "learning_rate") == pytest.approx([1e-2 * x for x in expected])


def test_another_schedule(make_trainer) -> None:
    class Own(RecordingDistill):
        def _setup_scheduler(self, optimizer: torch.optim.Optimizer, num_training_steps: int) -> Any:
            assert num_training_steps == 8
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    trainer = make_distill(make_trainer, Own)
    trainer.train()
    assert history(trainer, "learning_rate") == pytest.approx([1e-2 * 0.5**step for step in range(8)])


def test_early_stopping_and_the_passes_that_were_made(make_trainer) -> None:
    never = make_distill(make_trainer, learning_rate=2e-2)
    never.train()
    assert never.stop_rule is None
    assert history(never, "policy/epochs") == [2.0, 2.0]
    stopping = make_distill(make_trainer, learning_rate=2e-2, early_stopping=True, target_kl=1e-3)
    stopping.train()
    assert history(stopping, "policy/updated") == [1, 0, 0, 0] * 2
    assert history(stopping, "policy/epochs") == [0.5, 0.5]  # one of two mini-batches of the first pass


def test_another_rule_to_stop(make_trainer) -> None:
    """It is asked with the KL that is logged, and nothing else stops an update."""
    asked: list[float] = []

    class Own(RecordingDistill):
        def _setup_early_stopping(self) -> Any:
            def third(kl: float) -> bool:
                asked.append(kl)
                return len(asked) % 3 == 0

            return third

    trainer = make_distill(make_trainer, Own)
    trainer.train()
    assert history(trainer, "policy/updated") == [1, 1, 0, 0] * 2
    assert asked == pytest.approx(history(trainer, "policy/approx_kl"), rel=1e-4, abs=1e-7)
    assert history(trainer, "policy/epochs") == [1.0, 1.0]


def test_scores_are_processed_before_they_enter_the_rewards(make_trainer) -> None:
    """Moments of all rollouts so far, the one at hand included; an evaluation uses them and leaves them as they are."""
    trainer = make_distill(
        make_trainer,
        use_score_scaling=True,
        use_score_norm=True,
        score_clip=1.2,
        init_kl_coef=0.0,
        eval_dataset=[{"prompt": f"{i}+1="} for i in range(5, 9)],
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=4,
    )
    raw: list[torch.Tensor] = []
    process = trainer.process_scores
    trainer.process_scores = lambda scores: raw.append(scores) or process(scores)
    trainer.train()
    seen = torch.empty(0)
    training = [scores for scores in raw if len(scores) == 8]
    assert len(training) == 2
    assert len(raw) == 4
    for scores, rollout in zip(training, [x for x in trainer.rollouts if len(x["scores"]) == 8], strict=True):
        seen = torch.cat([seen, scores])
        expected = ((scores - seen.mean()) / seen.std()).clamp(-1.2, 1.2)
        torch.testing.assert_close(rollout["scores"], expected, rtol=1e-5, atol=1e-6)
    assert trainer.score_processor.moments.count == 16
    assert history(trainer, "objective/raw_scores") == pytest.approx([float(x.mean()) for x in training])
    assert history(trainer, "objective/score_mean")[1] == pytest.approx(float(seen.mean()))
    assert history(trainer, "objective/score_std")[1] == pytest.approx(float(seen.std()))
    assert history(trainer, "objective/scores") == pytest.approx(
        [float(x["scores"].mean()) for x in trainer.rollouts if len(x["scores"]) == 8], abs=1e-6
    )
    measured = [(x, x_raw) for x, x_raw in zip(trainer.rollouts, raw, strict=True) if len(x_raw) == 4]
    for (rollout, scores), so_far in zip(measured, (training[:1], training), strict=True):
        known = torch.cat(so_far)
        torch.testing.assert_close(
            rollout["scores"], ((scores - known.mean()) / known.std()).clamp(-1.2, 1.2), rtol=1e-5, atol=1e-6
        )


def test_scores_that_are_none_or_all_the_same(make_trainer) -> None:
    """None and NaN are left out and counted; equal scores stay finite, centred to 0."""

    def some(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if i % 4 == 0 else math.nan if i % 4 == 1 else float(i) for i in range(len(completions))]

    options = {"use_score_scaling": True, "use_score_norm": True}
    trainer = make_distill(make_trainer, reward=some, **options)
    trainer.train()
    assert history(trainer, "objective/unscored") == [0.5, 0.5]
    assert history(trainer, "objective/raw_scores") == [4.5, 4.5]  # of 2, 3, 6, 7
    assert trainer.score_processor.moments.count == 8
    for x in trainer.rollouts:
        unscored = torch.arange(8) % 4 < 2
        assert torch.equal(x["scores"].isnan(), unscored)
        assert not x["completion_mask"][unscored].any()
    same = make_distill(make_trainer, reward=lambda completions, **kwargs: [3.0] * len(completions), **options)
    same.train()
    assert all(torch.equal(x["scores"], torch.zeros(8)) for x in same.rollouts)
    assert all(math.isfinite(loss) for loss in history(same, "loss"))
    nothing = make_distill(make_trainer, reward=lambda completions, **kwargs: [None] * len(completions), max_steps=4, **options)
    nothing.train()
    assert history(nothing, "objective/unscored") == [1.0]
    assert nothing.score_processor.moments.count == 0


def test_another_way_to_process_scores(make_trainer) -> None:
    class Ranks(ScoreProcessor):
        def __call__(self, scores: torch.Tensor, *, update: bool = True) -> torch.Tensor:
            return scores.argsort().argsort().to(scores.dtype)

    class Own(RecordingDistill):
        def _setup_score_processing(self) -> ScoreProcessor:
            return Ranks()

    trainer = make_distill(make_trainer, Own, use_score_scaling=True)
    trainer.train()
    for x in trainer.rollouts:
        assert sorted(x["scores"].tolist()) == list(range(8))
    assert history(trainer, "objective/scores") == [3.5, 3.5]


def test_a_second_run_starts_anew(make_trainer) -> None:
    trainer = make_distill(make_trainer, use_score_scaling=True, max_steps=4)
    trainer.train()
    first = trainer.score_processor
    trainer.train()
    assert trainer.score_processor is not first
    assert trainer.score_processor.moments.count == 8
