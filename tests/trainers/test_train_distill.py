"""``dppo train distill-ppo``, the example script, and what the document says of them."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from dppo_kernels import DISTILL_KINDS
from dppo_kernels.estimators import KL_ESTIMATORS
from dppo_kernels.trainers import DistillPPOConfig, DistillPPOTrainer, PPOConfig, cli
from dppo_kernels.trainers.data import CHARACTERS
from dppo_kernels.trainers.demo.offline import build_offline_model, careless_solutions
from dppo_kernels.trainers.distill_ppo_config import KD_DATA
from dppo_kernels.trainers.train import train
from tests.trainers import conftest
from tests.trainers.distill_runs import teacher_model
from tests.trainers.ppo_runs import reward_model
from tests.trainers.test_train import CPU, tags
from tests.trainers.test_train_ppo import documented_metrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "distill_ppo.md").read_text()
TINY = [
    *("--offline_warmup_steps", "8", "--offline_teacher_steps", "8", "--max_steps", "16", "--mini_batch_size", "8"),
    *("--batch_size", "32", "--eval_size", "16", "--per_device_eval_batch_size", "16", "--eval_steps", "16"),
    *("--logging_steps", "8", "--dataset_name", "addition:96"),
]


def section(title: str) -> str:
    return TEXT.split(f"## {title}")[1].split("\n## ")[0]


def test_the_quick_test_trains_evaluates_logs_and_saves(tmp_path, capsys) -> None:
    arguments = ["train", "distill-ppo", "--config", "cpu_quick_test", *TINY, "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "held-out answers that are right: " in capsys.readouterr().out
    logged = tags(tmp_path)
    rows = re.findall(r"^\| (`[^|]+) \|", section("What is logged"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(names) == 8
    own = {f"train/{name}" for name in names}
    assert own <= set(logged)
    ours = {name for name in logged if re.match("train/(objective|policy|value|distill)/", name)}
    assert ours <= own | {f"train/{name}" for name in documented_metrics("ppo")}  # every figure of ours is explained
    assert {"eval/answers/correct", "eval/distill/divergence", "eval/objective/scores"} <= set(logged)
    sizes = [
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / name).parameters()) for name in ("", "teacher")
    ]
    assert sizes[1] > sizes[0]


def test_options_that_the_document_names_exist() -> None:
    fields = {field.name for field in dataclasses.fields(DistillPPOConfig)}
    rows = re.findall(r"^\|[^|]+\|(.*)\|$", section("What an update is"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 25
    assert named <= fields | {*DISTILL_KINDS, *KD_DATA, "num_warmup_steps"}
    added = fields - {field.name for field in dataclasses.fields(PPOConfig)}
    assert added <= named | {"optimizer_kwargs"}
    methods = re.findall(r"^\| `(_setup_\w+)\(", section("Four methods to override"), re.MULTILINE)
    assert len(methods) == 4
    assert all(callable(getattr(DistillPPOTrainer, name)) for name in methods)
    there = {
        name for row in re.findall(r"^\|([^|]+)\| the same names", TEXT, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert len(there) == 11
    assert there <= added
    assert set(re.findall(r"`(k\d)`", TEXT)) == {*KL_ESTIMATORS}


def test_the_example_script(tmp_path, monkeypatch, tokenizer) -> None:
    """As its first lines say, with models made here; only a reward model scores."""
    student = Qwen3ForCausalLM(conftest.small_config(len(tokenizer)))
    models = {"student": student, "teacher": teacher_model(len(tokenizer)), "reward": reward_model(len(tokenizer))}
    for name, model in models.items():
        model.bfloat16().save_pretrained(tmp_path / name)  # as checkpoints are published
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(16)))
    script = ROOT / "examples" / "ppo" / "distill_ppo.py"
    options = set(re.findall(r"--(\w+)", script.read_text().split('"""')[1])) - {"multi_gpu", "num_processes"}
    values = {
        "student_path": str(tmp_path / "student"),
        "teacher_path": str(tmp_path / "teacher"),
        "reward_model_path": str(tmp_path / "reward"),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "learning_rate": "1e-5",
        "batch_size": "16",
        "mini_batch_size": "8",
        "output_dir": str(tmp_path / "out"),
    }
    assert options == set(values)
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    arguments += ["--use_cpu", *CPU[1:], "--max_steps", "8", "--max_completion_length", "6", "--report_to", "none"]
    arguments += ["--use_score_scaling", "--optimizer_kwargs", '{"betas": [0.9, 0.95]}', "--logging_steps", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    trainer = runpy.run_path(str(script))["main"]()
    assert trainer.state.global_step == 8
    assert {p.dtype for model in (trainer.model, trainer.value_model) for p in model.parameters()} == {torch.float32}
    assert tuple(trainer.optimizer.param_groups[0]["betas"]) == (0.9, 0.95)
    [raw] = conftest.history(trainer, "objective/raw_scores")  # before their logarithms
    assert 0 < abs(trainer.score_processor.moments.mean) < abs(raw)
    assert (tmp_path / "out" / "value_model" / "model.safetensors").is_file()
    again = train(
        "distill-ppo",
        [
            *("--model_name_or_path", values["student_path"], "--teacher_model_path", values["teacher_path"]),
            *("--reward_model_path", values["reward_model_path"], "--reward_funcs", "none", "--dataset_name"),
            *(values["dataset_name"], *CPU, "--batch_size", "16", "--mini_batch_size", "8", "--max_steps", "2", "--report_to"),
            *("none", "--max_completion_length", "6", "--gradient_checkpointing", "false"),
            *("--output_dir", str(tmp_path / "cli"), "--kd_kind", "jsd", "--kd_beta", "0.1"),
        ],
    )
    assert again.state.global_step == 2
    assert again.args.kd_beta == 0.1


def test_an_expert_is_right_and_wider(tmp_path) -> None:
    prompts, answers = [f"{a}+{b}=" for a in range(9) for b in range(9)], [str(a + b) for a in range(9) for b in range(9)]
    written = [text.removeprefix("Answer: ") for _, text in careless_solutions(prompts, answers, seed=0, forgets=0.0)]
    assert written == answers
    for expert in (False, True):
        build_offline_model(tmp_path / str(expert), prompts, answers, steps=1, expert=expert)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / str(expert)) for expert in (False, True)]
    assert [model.config.hidden_size for model in models] == [96, 128]
    assert models[0].config.vocab_size == models[1].config.vocab_size == len(CHARACTERS) + 4
