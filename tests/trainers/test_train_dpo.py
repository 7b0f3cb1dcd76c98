"""``dppo train dpo`` from prompts and from pairs, the example script, and what the document says of them."""

import dataclasses
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dppo_kernels import F_DIVERGENCES, PREFERENCE_LOSSES
from dppo_kernels.trainers import DPOConfig, PairsConfig, cli, make_pairs
from dppo_kernels.trainers._trl_seam import create_model_from_path
from dppo_kernels.trainers.arguments import shipped_configs
from dppo_kernels.trainers.data import load_preferences
from dppo_kernels.trainers.dpo import METRICS
from dppo_kernels.trainers.train_dpo import DPOTrainArguments, _check_same_options, _load, parse, train_dpo
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
    start = (tmp_path / "start" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds the pairs of another run, where seed was 0 and not 1: remove its pairs\.\*"):
        train_dpo([*arguments, "--output_dir", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "start" / "model.safetensors").read_bytes() == start
    assert "model" not in capsys.readouterr().out  # said at once


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


def test_pairs_of_prompts_without_answers(tmp_path, model, tokenizer, monkeypatch) -> None:
    """Into a folder whose name looks like a pattern; all that is loaded, as it is asked for."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"prompt": [f"{a}+1=" for a in range(12)]}).to_json(tmp_path / "prompts.jsonl")
    (tmp_path / "budget.txt").write_text("12345\n1\n")
    loaded, made, real = [], [], make_pairs

    def load(path: str, **options: Any) -> Any:
        loaded.append((Path(path).name, options))
        return create_model_from_path(path, **options)

    def make(*args: Any, **options: Any) -> Any:
        made.append((args[4], options))
        return real(*args, **options)

    monkeypatch.setattr("dppo_kernels.trainers.train_dpo.create_model_from_path", load)
    monkeypatch.setattr("dppo_kernels.trainers.train_dpo.make_pairs", make)
    paths = {"model_name_or_path": "model", "dataset_name": "prompts.jsonl", "output_dir": "run[1]", "ref_model_path": "model"}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(tmp_path / path))]
    arguments += [*CPU, "--max_steps", "1", "--gradient_checkpointing", "false", "--without_answers", "--pair_min_gap", "0.0"]
    arguments += ["--reward_funcs", "tests.trainers.conftest.reward_length", "--pair_budget_file", str(tmp_path / "budget.txt")]
    arguments += ["--trust_remote_code", "--ref_model_revision", "second", "--model_revision", "first"]
    columns = []
    for size in ("0", "2"):
        shutil.rmtree(tmp_path / "run[1]", ignore_errors=True)
        columns.append(train_dpo([*arguments, "--eval_size", size]).train_dataset.column_names)
    assert columns[0] == columns[1]
    assert {"prompt", "chosen", "rejected"} == {name for name in columns[0] if not name.endswith("_ids")}
    (reference, start), trusting = loaded[:2], {"trust_remote_code": True, "attn_implementation": None, "dtype": "float32"}
    assert reference == ("model", {**trusting, "revision": "second"})
    assert start == ("model", {**trusting, "revision": "first"})
    assert all(options["budget_texts"] == ["12345", "1"] for _, options in made)
    making, measuring = made[1][0], made[2][0]
    assert (making.temperatures, making.max_completion_length, making.drop_truncated) == ([0.6, 0.8, 1.0, 1.2], None, False)
    assert (measuring.temperatures, measuring.output_file) == ([1.0], None)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {"device_map": None}) for kind in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)]
    + [(DistributedType.NO, {})],
)
def test_the_reference_is_loaded_as_the_policy_is(monkeypatch, kind: DistributedType, options: dict[str, None]) -> None:
    """By TRL: quantised, and on several GPUs each process its own."""
    loaded = []
    monkeypatch.setattr(
        "dppo_kernels.trainers.train_dpo.create_model_from_path", lambda path, **options: loaded.append((path, options))
    )
    config = SimpleNamespace(
        trust_remote_code=False,
        model_init_kwargs={"revision": "first", "dtype": "bfloat16"},
        distributed_state=SimpleNamespace(distributed_type=kind),
    )
    _load("there", config, "in four bits", revision="main")
    expected = {"trust_remote_code": False, "revision": "main", "dtype": "bfloat16"}
    assert loaded == [("there", {**expected, "quantization_config": "in four bits", **options})]


def test_options_of_pairs_are_those_of_the_command() -> None:
    """With their defaults; a batch is larger where the model is at hand."""
    data, config = DPOTrainArguments(), PairsConfig()
    assert data.pairs_config() == dataclasses.replace(config, batch_size=64)
    changed = DPOTrainArguments(pair_drop_truncated=True, pair_samples_per_temperature=3)
    assert changed.pairs_config(seed=5) == dataclasses.replace(
        config, batch_size=64, drop_truncated=True, samples_per_temperature=3, seed=5
    )


def test_pairs_are_made_again_by_the_same_options_alone(tmp_path) -> None:
    arguments = ["--config", "cpu_quick_test", *TINY, "--output_dir", str(tmp_path)]
    file = tmp_path / "pairs.parquet"
    data, config, _ = parse(arguments)
    _check_same_options(file, data, config)
    other, _, _ = parse([*arguments, "--offline_warmup_steps", "9"])
    _check_same_options(file, other, config)  # nothing was made of them yet
    file.with_suffix(".shards").mkdir()
    again, _, _ = parse([*arguments, "--offline_warmup_steps", "9", "--ref_model_path", "elsewhere"])
    _check_same_options(file, again, config)
    with pytest.raises(ValueError, match="where offline_warmup_steps was 9 and not 8"):
        _check_same_options(file, data, config)


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
        (["--model_name_or_path", "m", "--without_answers"], "--without_answers: math_answer needs them"),
        (
            ["--model_name_or_path", "offline", "--without_answers", "--reward_funcs", "my.own"],
            "--without_answers: offline needs them",
        ),
        (["--model_name_or_path", "m", "--ref_model_revision", "v2"], "`ref_model_revision`='v2' is of a `ref_model_path`"),
        (["--model_name_or_path", "m", "--pair_budget_file", "nowhere.txt"], "`pair_budget_file` 'nowhere.txt': no such file"),
        (
            ["--model_name_or_path", "m", "--pair_budget_file", "x", "--pair_max_completion_length", "4"],
            "one of `pair_max_completion_length` and `pair_budget_file` can be given",
        ),
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


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--eval_strategy", "steps", "--eval_steps", "2"], ValueError, "needs a dataset of pairs and an `eval_size`"),
        (["--eval_strategy", "steps", "--eval_steps", "2", "--eval_size", "8"], ValueError, "needs a dataset of pairs and an"),
        (["--ref_model_path", "./nowhere/model"], OSError, "nowhere/model"),
        (["--reward_funcs", "tests.trainers.conftest.nothing"], AttributeError, "nothing"),
        (["--dataset_name", "pairs", "--model_name_or_path", "m", "--without_answers"], ValueError, "is of prompts: "),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    flags: list[str], error: type[Exception], message: str, tmp_path, pairs, monkeypatch
) -> None:
    monkeypatch.setattr("dppo_kernels.trainers.train_dpo.offline_model", lambda *args: pytest.fail("a model was made"))
    given = [pairs if flag == "pairs" else flag for flag in flags]
    if "--without_answers" in given:
        given += ["--reward_funcs", "tests.trainers.conftest.reward_length"]
    common = ["--model_name_or_path", "offline", "--dataset_name", "addition:32", "--pair_max_completion_length", "4"]
    with pytest.raises(error, match=message):
        train_dpo([*common, "--output_dir", str(tmp_path / "out"), *CPU, *given])
    assert not (tmp_path / "out").exists()


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
    arguments = {field.name for field in dataclasses.fields(DPOTrainArguments)}
    assert {"eval_size", "reward_funcs", "without_answers", "ref_model_path", "ref_model_revision"} <= arguments
    of_pairs = {name.removeprefix("pair_") for name in arguments if name.startswith("pair_")}
    named = set(re.findall(r"`(\w+)`", TEXT.split("with\n`pair_` before them")[1].split("make the pairs first")[0]))
    assert named == of_pairs - {"temperatures", "samples_per_temperature"}
    for path in re.findall(r"`((?:examples|tests)/[\w./]+)`", TEXT):
        assert (ROOT / path).exists(), path
