"""``dppo train ppo`` and ``decoupled-ppo``, the example script, and what the documents say of them."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Qwen3ForCausalLM

from dppo_kernels.estimators import KL_ESTIMATORS
from dppo_kernels.trainers import cli
from dppo_kernels.trainers.train import ALGORITHMS
from tests.trainers import conftest
from tests.trainers.ppo_runs import reward_model
from tests.trainers.test_train import CPU, tags

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {"ppo": ROOT / "docs" / "ppo.md", "decoupled-ppo": ROOT / "docs" / "decoupled_ppo.md"}
TINY = [
    *("--offline_warmup_steps", "30", "--max_steps", "16", "--per_device_train_batch_size", "8", "--eval_size", "16"),
    *("--per_device_eval_batch_size", "16", "--eval_steps", "16", "--logging_steps", "8", "--dataset_name", "uneven:96"),
]


def section(algorithm: str, title: str) -> str:
    return DOCUMENTS[algorithm].read_text().split(f"## {title}")[1].split("\n## ")[0]


def documented_metrics(algorithm: str) -> set[str]:
    """Names in the first column of the table."""
    rows = re.findall(r"^\| (`[^|]+) \|", section(algorithm, "What is logged"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("algorithm", DOCUMENTS)
def test_the_quick_test_trains_evaluates_logs_and_saves(tmp_path, capsys, algorithm: str) -> None:
    arguments = ["train", algorithm, "--config", "cpu_quick_test", *TINY, "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "held-out answers that are right: " in capsys.readouterr().out
    logged = tags(tmp_path)
    names = documented_metrics(algorithm)
    assert len(names) >= 8
    assert {f"train/{name}" for name in names} <= set(logged)
    own = {f"train/{name}" for name in documented_metrics("ppo") | names}
    if algorithm == "ppo":
        own -= {"train/value/updated", "train/value/learning_rate"}
    documented = {name for name in logged if name.startswith(("train/objective/", "train/policy/", "train/value/"))}
    assert documented <= own  # every figure of ours is explained
    assert {"eval/answers/correct", "eval/objective/scores", "eval/value/explained_variance"} <= set(logged)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size > 10
    values = AutoModelForTokenClassification.from_pretrained(tmp_path / "value_model")
    assert values.config.num_labels == 1
    assert values.score.weight.abs().sum() > 0


@pytest.mark.parametrize("algorithm", DOCUMENTS)
def test_options_that_the_document_names_exist(algorithm: str) -> None:
    fields = {field.name for field in dataclasses.fields(ALGORITHMS[algorithm][0])}
    rows = re.findall(r"^\|[^|]+\|(.*)\|$", section(algorithm, "What an update is"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 10
    assert named <= fields | {*KL_ESTIMATORS}
    documented = " ".join(path.read_text() for path in DOCUMENTS.values())
    own = {field.name for field in dataclasses.fields(ALGORITHMS["decoupled-ppo"][0]) if field.name.startswith("vf_")}
    assert {name for name in own if f"`{name}`" not in documented} == set()


def test_the_example_script(tmp_path, monkeypatch, tokenizer) -> None:
    """As its first lines say, with models made here; only a reward model scores."""
    policy = Qwen3ForCausalLM(conftest.small_config(len(tokenizer)))
    for name, model in {"policy": policy, "reward": reward_model(len(tokenizer))}.items():
        model.bfloat16().save_pretrained(tmp_path / name)  # as checkpoints are published
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(16)))
    script = ROOT / "examples" / "ppo" / "decoupled_ppo.py"
    text = script.read_text()
    options = set(re.findall(r"--(\w+)", text.split('"""')[1])) - {"multi_gpu", "num_processes"}
    values = {
        "model_name_or_path": str(tmp_path / "policy"),
        "reward_model_path": str(tmp_path / "reward"),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "dataset_train_split": "train",
        "learning_rate": "3e-6",
        "vf_learning_rate": "1e-4",
        "output_dir": str(tmp_path / "out"),
    }
    assert options == set(values)
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    arguments += ["--use_cpu", *CPU[1:], "--max_steps", "4", "--max_completion_length", "6", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    trainer = runpy.run_path(str(script))["main"]()
    assert trainer.state.global_step == 4
    assert trainer.value_model.pooled
    assert {p.dtype for model in (trainer.model, trainer.value_model) for p in model.parameters()} == {torch.float32}
    assert (tmp_path / "out" / "value_model" / "model.safetensors").is_file()
    arguments = [
        "train",
        "ppo",
        *arguments[: 2 * 4 + 2],
        "--reward_funcs",
        "none",
        *CPU,
        "--max_steps",
        "4",
        "--report_to",
        "none",
    ]
    arguments += ["--max_completion_length", "6", "--gradient_checkpointing", "false", "--output_dir", str(tmp_path / "cli")]
    assert cli.main(arguments) == 0
    assert (tmp_path / "cli" / "value_model" / "model.safetensors").is_file()
