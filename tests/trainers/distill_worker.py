"""One rank of `test_distill_ddp.py`: two passes on given completions, distilling on either kind of data."""

from pathlib import Path
from typing import Any

from dppo_kernels.trainers import DistillPPOConfig
from tests.trainers import conftest
from tests.trainers.dapo_worker import by_length, given_completions
from tests.trainers.distill_runs import RecordingDistill, settings, teacher_model
from tests.trainers.ppo_runs import value_model, value_weights

tokenizer = conftest.tokenizer.__wrapped__()
DATA = ("rollouts", "dataset")
LOGGED = (
    *("objective/scores", "objective/raw_scores", "objective/score_mean", "objective/score_std", "objective/kl"),
    *("objective/kl_coef", "policy/approx_kl", "policy/grad_norm", "value/grad_norm"),
    *("distill/loss", "distill/divergence", "distill/agreement", "distill/student_entropy"),
)


def one_update(out: Path, data: str, batch: int, rows: int, accumulation: int) -> dict[str, Any]:
    """What two passes of one SGD step each change, in student and values; scores are processed, the coefficient adapts."""
    given = settings(
        batch_size=batch,
        mini_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        optimizer_name="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        max_steps=2,
        init_kl_coef=0.1,
        target=1.0,
        vf_coef=0.5,
        use_score_scaling=True,
        use_score_norm=True,
        score_clip=1.0,
        kd_data=data,
        kd_kind="jsd",
        kd_temperature=1.5,
    )
    config = conftest.make_config.__wrapped__(out)(DistillPPOConfig, **given)
    prompts = conftest.prompts.__wrapped__()
    prompts = prompts.add_column("completion", ["x" * (int(text.split("+")[0]) % 7) for text in prompts["prompt"]])
    trainer = RecordingDistill(
        conftest.model.__wrapped__(tokenizer),
        by_length,
        config,
        train_dataset=prompts,
        processing_class=tokenizer,
        value_model=value_model(len(tokenizer)),
        teacher=teacher_model(len(tokenizer)),
        rollout_func=given_completions,
    )
    before = {**conftest.weights(trainer), **{f"values.{n}": p for n, p in value_weights(trainer).items()}}
    trainer.train()
    after = {**conftest.weights(trainer), **{f"values.{n}": p for n, p in value_weights(trainer).items()}}
    return {
        "change": {name: after[name] - p for name, p in before.items()},
        "logged": {name: conftest.history(trainer, name) for name in LOGGED},
        "moments": trainer.score_processor.state_dict(),
        "processes": trainer.accelerator.num_processes,
    }


def main(wrapper: str, out: Path) -> dict[str, Any]:
    return {data: one_update(out, data, 8, 4, 2) for data in DATA}
