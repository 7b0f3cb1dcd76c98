"""``dppo train dpo`` from prompts and from pairs, the example script, and what the document says of them."""

import dataclasses
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dppo_kernels import F_DIVERGENCES, PREFERENCE_LOSSES
from dppo_kernels.trainers import DPOConfig, cli
from dppo_kernels.trainers.arguments import shipped_configs
from dppo_kernels.trainers.data import load_preferences
from dppo_kernels.trainers.dpo import METRICS
from dppo_kernels.trainers.train_dpo import DPOTrainArguments, parse, train_dpo
from tests.trainers.test_train import CPU, tags

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "dpo.md").read_text()
TINY = [
    *("--offline_warmup_steps", "8", "--max_steps", "2", "--per_device_train_batch_size", "4", "--eval_size", "8"),
    *("--logging_steps", "1", "--dataset_name", "addition:64", "--pair_min_gap", "0.0", "--pair_batch_size", "32"),
]


@pytest.fixture
def pairs(tmp_path) -> str:
    file = tmp_path / "given.parquet"
    rows = [{"prompt": f"{a} + 1 = ", "chosen": str(a + 1), "rejected": "0", "note": "left behind"} for a in range(20)]
    Dataset.from_list(rows).to_parquet(str(file))
    return str(file)


def test_the_quick_test_makes_pairs_trains_logs_and_saves(tmp_path, capsys) -> None:
    """Rewards of so short a warm-up are all the same: they are replaced by ones that differ."""
    arguments = ["--config", "cpu_quick_test", *TINY, "--reward_funcs", "tests.trainers.conftest.reward_length"]
    assert cli.main(["train", "dpo", *arguments, "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"pairs +\d+ of 56 prompts", printed)
    assert re.search(r"mean reward of held-out prompts: [\d.]+ first, [\d.]+ last", printed)
    logged = set(tags(tmp_path))
    assert {f"train/{name}" for name in METRICS if name != "aux_loss"} <= logged
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0
    assert len(Dataset.from_parquet(str(tmp_path / "pairs.parquet"))) > 8


def test_pairs_of_a_file_are_trained_on_as_they_are(tmp_path, pairs, model, tokenizer) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", pairs, "--output_dir", str(tmp_path / "out")]
    settings = ["--max_steps", "2", "--logging_steps", "1", "--gradient_checkpointing", "false", "--eval_size", "4"]
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2", "--ref_model_path", str(tmp_path / "model")]
    trainer = train_dpo([*common, *CPU, *settings, *evaluation, "--loss_type", "sigmoid", "sft", "--beta", "0.3"])
    assert trainer.args.loss_type == ["sigmoid", "sft"]
    assert trainer.spec.beta == 0.3
    assert len(trainer.train_dataset) == 16
    assert any("eval_rewards/margins" in entry for entry in trainer.state.log_history)
    assert "note" not in trainer.train_dataset.column_names


@pytest.mark.parametrize("name", shipped_configs("dpo"))
def test_every_shipped_config_is_understood(name: str) -> None:
    data, config, model = parse(["--config", name, *CPU])
    assert data.eval_size > 0
    assert config.preference_spec().beta == 0.1
    assert model.model_name_or_path


def test_sources_of_pairs(pairs, tmp_path) -> None:
    assert load_preferences(pairs).column_names == ["prompt", "chosen", "rejected"]
    assert len(load_preferences(pairs, limit=3)) == 3
    assert load_preferences("addition:16") is None
    prompts, half = tmp_path / "prompts.parquet", tmp_path / "half.parquet"
    Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}).to_parquet(str(prompts))
    assert load_preferences(str(prompts)) is None
    Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}).to_parquet(str(half))
    with pytest.raises(ValueError, match="has a column 'chosen' and not both of chosen, rejected"):
        load_preferences(str(half))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_preferences("./nowhere.parquet")
    for name in ("image", "images"):
        seen = tmp_path / f"{name}.parquet"
        Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], name: [["x.png"]]}).to_parquet(str(seen))
        with pytest.raises(ValueError, match=f"has a column '{name}': pairs with images are not supported"):
            load_preferences(str(seen))


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1, ValueError, "`limit` must be an int >= 1, got -1"),
        (0, ValueError, "`limit` must be an int >= 1, got 0"),
        (True, TypeError, "`limit` must be an int or None, got bool"),
        ("3", TypeError, "`limit` must be an int or None, got str"),
    ],
)
def test_limits_are_those_of_prompts(limit, error: type[Exception], message: str) -> None:
    for source in ("./nowhere.parquet", "addition:16"):
        with pytest.raises(error, match=message):
            load_preferences(source, limit=limit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model_name_or_path is needed"),
        (["--model_name_or_path", "offline", "--config", "nope"], "--config nope: no such file"),
        (["--model_name_or_path", "offline", "--loss_type", "dpo"], "`loss_type` must be one of"),
        (["--model_name_or_path", "offline", "--reward_funcs", "none"], "--reward_funcs none"),
        (["--model_name_or_path", "offline", "--pair_temperatures", "1.0", "1.0"], "`temperatures` must be distinct"),
        (["--model_name_or_path", "offline", "--eval_size", "-1"], "`eval_size` must be an int of at least 0"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse([*arguments, "--output_dir", "x", *CPU])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--dataset_name": "addition:32"}, "making pairs needs `pair_max_completion_length`"),
        ({"--dataset_name": "pairs"}, "a dataset of pairs needs a model"),
        ({"--dataset_name": "addition:32", "--pair_max_completion_length": "4", "--offline_warmup_steps": "1"}, "gave no pair"),
    ],
)
def test_runs_that_cannot_be(changes: dict[str, str], message: str, tmp_path, pairs) -> None:
    named = {name: pairs if value == "pairs" else value for name, value in changes.items()}
    flags = [part for pair in named.items() for part in pair]
    with pytest.raises(ValueError, match=message):
        train_dpo(["--model_name_or_path", "offline", "--output_dir", str(tmp_path), *CPU, *flags])


@pytest.fixture
def example(tmp_path, model, tokenizer, monkeypatch) -> Callable[..., Any]:
    """Runs the script on a model as checkpoints are published."""
    model.bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"prompt": [f"{a}+1=" for a in range(12)]}).to_json(tmp_path / "prompts.jsonl")
    paths = {"model_path": "model", "dataset_name": "prompts.jsonl", "output_dir": "out"}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(tmp_path / path))]
    settings = [*CPU, "--max_steps", "2", "--gradient_checkpointing", "false", "--max_completion_length", "6"]
    monkeypatch.setattr(sys, "argv", ["dpo.py", *arguments, *settings])
    return runpy.run_path(str(ROOT / "examples" / "dpo" / "dpo.py"))["main"]


def test_the_example_trains(example, tmp_path) -> None:
    trainer = example()
    assert trainer.state.global_step == 2
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}  # an update of 1e-6 is none in bf16


def test_the_example_stops_where_no_completion_is_better(example, monkeypatch) -> None:
    monkeypatch.setitem(example.__globals__, "brevity", lambda completions, **columns: [0.0] * len(completions))
    with pytest.raises(SystemExit, match=r"no prompt of .*prompts.jsonl gave a pair"):
        example()


def test_options_that_the_document_names_exist() -> None:
    fields = {field.name for field in dataclasses.fields(DPOConfig)}
    losses = TEXT.split("## Losses")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|(.*)\|$", losses, re.MULTILINE)
    options = {name for row, _ in rows for name in re.findall(r"`(\w+)`", row)}
    assert options == options & fields
    assert len(options) >= 9
    values = {name for _, row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(PREFERENCE_LOSSES) | set(F_DIVERGENCES) <= values
    assert {"eval_size", "reward_funcs"} <= {field.name for field in dataclasses.fields(DPOTrainArguments)}
    for path in re.findall(r"`((?:examples|tests)/[\w./]+)`", TEXT):
        assert (ROOT / path).exists(), path
