"""``dppo pairs``: the whole command, and what it refuses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import load_dataset

from dppo_kernels.trainers import cli
from dppo_kernels.trainers.pairs_command import parse

REWARD = """
def length(completions, answer=None, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [len(text) + 0.1 * ord(text.strip()[:1] or "a") for text in texts]

def needs_answers(completions, answer, **kwargs):
    return length(completions)
"""
NEEDED = ["pairs", "--model_name_or_path", "m", "--output_file", "p.parquet", "--max_completion_length", "5"]


@pytest.fixture
def folder(model, tokenizer, tmp_path: Path, monkeypatch) -> Path:
    """The working directory, with a model, a reward and prompts with answers and without."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "my_pair_rewards.py").write_text(REWARD)
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) + "\n" for i in range(6))
    )
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}: "}) + "\n" for i in range(3)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "my_pair_rewards", raising=False)
    return tmp_path


def test_the_whole_command(folder: Path, capsys) -> None:
    arguments = [
        *("pairs", "--model_name_or_path", "model", "--dataset_name", "problems.jsonl", "--output_file", "out/pairs.parquet"),
        *("--reward_funcs", "my_pair_rewards.length", "my_pair_rewards.needs_answers", "--reward_weights", "1", "2"),
        *("--max_completion_length", "5", "--temperatures", "0.5", "1.5", "--batch_size", "4", "--as_chat", "--device", "cpu"),
        *("--extra_columns", "answer"),
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    pairs = load_dataset("parquet", data_files="out/pairs.parquet", split="train", cache_dir="cache")
    assert f"pairs      {len(pairs)} of 6 prompts" in printed
    assert "T = 1.5    chosen in" in printed
    assert "written to out/pairs.parquet" in printed
    assert len(pairs) > 3
    for pair in pairs:
        [question] = pair["prompt"]
        assert question["content"] == f"{int(pair['answer']) - 1}+1="
        for side in ("chosen", "rejected"):
            text = pair[side][0]["content"]
            assert pair[f"{side}_reward"] == pytest.approx(3 * (len(text) + 0.1 * ord(text.strip()[:1] or "a")))
        assert pair["chosen_reward"] > pair["rejected_reward"] + 0.01
        assert {pair["chosen_temperature"], pair["rejected_temperature"]} == {0.5, 1.5}
    statistics = json.loads(Path("out/pairs.statistics.json").read_text())
    assert statistics["pairs"] == len(pairs)
    before = Path("out/pairs.parquet").read_bytes()
    assert cli.main(arguments) == 0  # all of it is there
    assert Path("out/pairs.parquet").read_bytes() == before


def test_prompts_without_answers_and_a_budget_from_texts(folder: Path, capsys) -> None:
    Path("texts.txt").write_text("abc\nabcdefg\n")
    Path("mine.yaml").write_text("temperatures: [0.9, 1.1]\nseed: 3\n")
    arguments = [
        *("pairs", "--config=mine.yaml", "--model_name_or_path", "model", "--dataset_name", "texts.jsonl", "--without_answers"),
        *("--reward_funcs", "my_pair_rewards.length", "--budget_file", "texts.txt", "--output_file", "pairs.parquet"),
    ]
    assert cli.main(arguments) == 0
    manifest = json.loads(Path("pairs.shards/manifest.json").read_text())
    assert (manifest["max_completion_length"], manifest["temperatures"], manifest["seed"]) == (8, [0.9, 1.1], 3)
    assert "of 3 prompts" in capsys.readouterr().out


def test_rewards_and_pairs_get_the_columns_that_are_named(folder: Path) -> None:
    rows = [{"prompt": f"{i}?", "answer": i, "level": [i, -i], "tools": f'[{{"name": "{i}"}}]', "other": i} for i in range(3)]
    Path("columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_pair_rewards.py").write_text(
        "def by_level(completions, level, **columns):\n"
        "    assert sorted(columns) == ['answer', 'completion_ids', 'prompts', 'tools']\n"
        "    return [level[i][0] + i % 4 for i in range(len(completions))]\n"
    )
    arguments = [
        "--model_name_or_path",
        "model",
        "--dataset_name",
        "columns.jsonl",
        "--reward_funcs",
        "my_pair_rewards.by_level",
    ]
    arguments += ["--extra_columns", "level", "answer", "--output_file", "pairs.parquet", "--max_completion_length", "3"]
    assert cli.main(["pairs", *arguments, "--as_chat"]) == 0
    pairs = load_dataset("parquet", data_files="pairs.parquet", split="train", cache_dir="cache")
    assert pairs.column_names[-3:] == ["level", "answer", "tools"]
    assert pairs["level"][:] == [[0, 0], [1, -1], [2, -2]]
    assert pairs["tools"][:] == [row["tools"] for row in rows]
    assert pairs["chosen_reward"][:] == [3.0, 4.0, 5.0]


def test_vllm_gets_the_revision_and_the_dtype(folder: Path, monkeypatch) -> None:
    given: list[dict] = []

    def start(**settings: object) -> None:
        given.append(settings)
        raise RuntimeError("started")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    arguments = [*NEEDED, "--use_vllm", "--dataset_name", "texts.jsonl", "--without_answers"]
    arguments[2] = "model"
    arguments += ["--reward_funcs", "my_pair_rewards.length", "--model_revision", "v1", "--dtype", "float16"]
    with pytest.raises(RuntimeError, match="started"):
        cli.main(arguments)
    assert given[0].items() >= {"revision": "v1", "tokenizer_revision": "v1", "dtype": "float16"}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs", "--output_file", "p.parquet"], "--model_name_or_path is needed"),
        (["pairs", "--model_name_or_path", "m"], "--output_file is needed"),
        (["pairs", "--model_name_or_path", "m", "--output_file", "p.json"], "`output_file` must end in .parquet"),
        (NEEDED[:5], "one of --max_completion_length and --budget_file is needed"),
        ([*NEEDED, "--budget_file", "x"], "one of --max_completion_length and --budget_file is needed"),
        ([*NEEDED[:5], "--budget_file", "nothing.txt"], "--budget_file nothing.txt: no such file"),
        ([*NEEDED, "--reward_funcs", "none"], "--reward_funcs none: pairs are chosen by a reward"),
        ([*NEEDED, "--dtype", "int8"], "--dtype must be auto"),
        ([*NEEDED, "--temperatures", "0.5"], "at least two completions"),
        ([*NEEDED, "--temperatures", "hot"], "--temperatures"),
        ([*NEEDED, "--temprature", "1"], "--temprature"),
        ([*NEEDED, "--config", "nothing.yaml"], "nothing.yaml"),
        ([*NEEDED, "--reward_funcs", "length"], "`reward_funcs` holds 'length'"),
        ([*NEEDED, "--reward_funcs", "no_such_module.length"], "no_such_module"),
        ([*NEEDED, "--dataset_name", "nothing.jsonl"], "no such file"),
        ([*NEEDED, "--without_answers"], "--without_answers: --reward_funcs math_answer compares with gold answers"),
        ([*NEEDED, "--dataset_name", "mixed:9", "--extra_columns", "level"], "must have a column 'level'"),
        ([*NEEDED, "--reward_weights", "1", "2"], "a weight for each of 1 functions"),
        ([*NEEDED[:5], "--budget_file", "blank.txt"], "`budget_file` 'blank.txt' must hold texts"),
        ([*NEEDED[:5], "--budget_file", "latin.txt"], "`budget_file` 'latin.txt' must be text in UTF-8"),
        ([*NEEDED, "--extra_columns", "chosen"], "`extra_columns` holds 'chosen'"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"\xe9\n")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_several_processes(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(NEEDED)
    assert exit_info.value.code == 2
    assert "WORLD_SIZE is 2: pairs are made by one process" in capsys.readouterr().err


def test_help_lists_the_options(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["pairs", "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: dppo pairs" in printed
    for option in ("--temperatures", "--min_gap", "--reward_funcs", "--output_file", "--use_vllm"):
        assert option in printed


def test_the_defaults() -> None:
    data, config, [reward], prompts = parse([*NEEDED[1:], "--dataset_limit", "5"])
    assert (type(reward).__name__, prompts.column_names, len(prompts)) == ("MathAnswerReward", ["prompt", "answer"], 5)
    assert config.temperatures == [0.6, 0.8, 1.0, 1.2]
    assert (config.top_p, config.top_k, config.repetition_penalty, config.min_gap) == (1.0, 0, 1.0, 0.01)
    assert (data.reward_funcs, data.dataset_name) == (["math_answer"], "mixed")
