"""PPO with and without a teacher at one learning rate, three seeds. ``make long``; writes docs/results/distill_ppo.md."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo extra is not installed")

import matplotlib.pyplot as plt

from benchmarks.harness import stamp
from dppo_kernels.trainers.train import train
from tests.trainers.test_ppo_long import series

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SEEDS, STEPS, HELD_OUT = 3, 96, 512
ROLLOUT, STEPS_PER_ROLLOUT = 256, 4
RATE, KL_TARGET, KL_COEF, KL_HORIZON = 2e-4, 0.6, 0.3, 512
# Of held-out accuracy, in points: what tokens are counted to, as students of different seeds start far apart.
# The last is asserted; smaller ones are within the noise of an evaluation.
GAINS = (10, 15)
TOKENS = {gain: f"thousand generated tokens until {gain} points are gained" for gain in GAINS}
SHARED = {
    "dataset_name": "addition:4096",
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "max_completion_length": 8,
    "learning_rate": RATE,
    "max_steps": STEPS,
    "vf_coef": 0.5,
    "eval_size": HELD_OUT,
    "eval_on_start": "true",
    "eval_strategy": "steps",
    "eval_steps": 8,
    "per_device_eval_batch_size": HELD_OUT,
    "logging_steps": STEPS_PER_ROLLOUT,
    "save_strategy": "no",
    "report_to": "none",
}
METHODS = {  # name -> (algorithm, options)
    "with a teacher": (
        "distill-ppo",
        {
            "model_name_or_path": "offline",
            "teacher_model_path": "offline",
            "offline_warmup_steps": 400,
            "offline_teacher_steps": 700,
            "batch_size": ROLLOUT,
            "mini_batch_size": ROLLOUT // 2,
            "ppo_epochs": 2,
            "init_kl_coef": KL_COEF,
            "target": KL_TARGET,
            "horizon": KL_HORIZON,
            "scheduler_name": "constant",
            "kd_coef": 0.3,
        },
    ),
    "without": (
        "ppo",
        {
            "per_device_train_batch_size": ROLLOUT // 2,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "kl_coef": KL_COEF,
            "kl_target": KL_TARGET,
            "kl_horizon": KL_HORIZON,
            "lr_scheduler_type": "constant",
        },
    ),
}


def run(method: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """The student that the first method made is where the other starts too."""
    algorithm, options = METHODS[method]
    options = {"model_name_or_path": out / f"{next(iter(METHODS))}-{seed}" / "start", **options}
    options |= {**SHARED, "seed": seed, "output_dir": out / f"{method}-{seed}"}
    return train(algorithm, [str(x) for name, value in options.items() for x in (f"--{name}", value)]).state.log_history


def tokens_written(log: list[dict[str, Any]]) -> dict[int, float]:
    """Generated tokens, in thousands, by the step that they were needed for."""
    total, found = 0.0, {0: 0.0}
    for step, tokens in zip(*series(log, "objective/tokens"), strict=True):
        total += tokens * ROLLOUT / 1000
        found[step] = total
    return found


def accuracies(log: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Thousands of generated tokens, and the held-out accuracy after them."""
    steps, values = series(log, "eval_answers/correct")
    written = tokens_written(log)
    return [written[step] for step in steps], values


def figures(log: list[dict[str, Any]]) -> dict[str, float]:
    written, accuracy = accuracies(log)
    kl = series(log, "objective/kl")[1]
    last = kl[-len(kl) // 3 :]
    return {
        "right before, %": 100 * accuracy[0],
        "right after, %": 100 * accuracy[-1],
        **{name: _until(written, accuracy, accuracy[0] + gain / 100) for gain, name in TOKENS.items()},
        "thousand generated tokens in all": written[-1],
        "KL, last third, nats per completion": sum(last) / len(last),
        "KL coefficient, last": series(log, "objective/kl_coef")[1][-1],
    }


def _until(written: list[float], accuracy: list[float], wanted: float) -> float:
    return next((n for n, value in zip(written, accuracy, strict=True) if value >= wanted), float("inf"))


def write_results(logs: dict[tuple[str, int], list[dict[str, Any]]], facts: str) -> dict[str, list[dict[str, float]]]:
    """Figures of every run by method; the document and its picture."""
    by_method = {name: [figures(logs[name, seed]) for seed in range(SEEDS)] for name in METHODS}
    shown = {
        "held-out answers right (sampled)": accuracies,
        "KL from the first policy, nats": lambda log: series(log, "objective/kl"),
        "KL coefficient": lambda log: series(log, "objective/kl_coef"),
        "agreement with the teacher": lambda log: series(log, "distill/agreement"),
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 3.6))
    for axis, (title, points) in zip(axes, shown.items(), strict=True):
        for (method, seed), log in logs.items():
            axis.plot(*points(log), color=f"C{list(METHODS).index(method)}", label=None if seed else method)
        axis.set(title=title, xlabel="thousand generated tokens" if points is accuracies else "optimiser steps")
        axis.legend()
    axes[1].axhline(KL_TARGET, color="grey", linewidth=0.8)
    figure.tight_layout()
    figure.savefig(RESULTS / "distill_ppo.png", dpi=110)
    lines = [f"| | {' | '.join(METHODS)} |", "|---|---|---|"]
    for name in by_method["without"][0]:
        cells = []
        for runs in by_method.values():
            values = torch.tensor([run[name] for run in runs], dtype=torch.float64)
            digits = 2 if "KL" in name else 1
            if name in TOKENS.values():
                cells.append(", ".join(f"{value:.1f}" if value < float("inf") else "never" for value in values.tolist()))
            else:
                cells.append(f"{values.mean():.{digits}f} ± {values.std():.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    (RESULTS / "distill_ppo.md").write_text(
        "# PPO with and without a teacher\n\n"
        f"`pytest -m long tests/trainers/test_distill_ppo_long.py` ({facts}).\n\n"
        "Additions below 100. The student, of 190 thousand parameters, imitated a careless teacher and is mostly 10 short;\n"
        "the teacher it is distilled from is wider and imitated right answers, on the same problems. Both methods start from\n"
        f"one student per seed and take {STEPS} steps at {RATE:g}, four on each rollout of {ROLLOUT}, with an adaptive KL\n"
        f"coefficient (target {KL_TARGET:g} nats per completion, horizon {KL_HORIZON}). With a teacher: `kd_coef` .3, reverse\n"
        f"KL on the student's own rollouts. {HELD_OUT} held-out problems, answers sampled at temperature 1, every 8 steps.\n"
        f"Mean and standard deviation over {SEEDS} seeds; tokens by seed.\n\n{table}\n\n"
        "Chosen after a first look: the rate (at 3e-4 PPO alone collapsed on one seed), and that tokens are counted to a gain\n"
        "(students of different seeds start far apart). The larger gain is asserted; at the smaller one, a seed is a tie.\n\n"
        "![held-out accuracy, KL, its coefficient, agreement](distill_ppo.png)\n"
    )
    return by_method


@pytest.mark.long
def test_a_teacher_saves_tokens_and_the_kl_is_held(tmp_path: Path) -> None:
    facts = ", ".join(f"{name} {value}" for name, value in stamp(torch.device("cpu")).items())
    logs = {(name, seed): run(name, seed, tmp_path) for seed in range(SEEDS) for name in METHODS}
    by_method = write_results(logs, facts)
    for seed in range(SEEDS):
        taught, alone = by_method["with a teacher"][seed], by_method["without"][seed]
        assert taught[TOKENS[GAINS[-1]]] < alone[TOKENS[GAINS[-1]]], (seed, taught, alone)
        for name, found in (("with a teacher", taught), ("without", alone)):
            kl = found["KL, last third, nats per completion"]
            assert abs(kl / KL_TARGET - 1) <= 0.3, (name, seed, kl)
