"""Prompts from every source and format, each read to the same two columns; what is repeated, contradictory or unusable."""

import json
import logging
import math
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets", reason="the trl extra is not installed")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from dppo_kernels.trainers.data import MATH_TEMPLATE, generate_problems, load_prompts

FLAT = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+3?", "answer": "5"}]
DAPO_MATH = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve: {a}+1", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(a + 1), "style": "rule"},
        "extra_info": {"index": f"id-{a}"},
    }
    for a in range(3)
]


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches and relative names are the test's own, no request leaves it, no bars clutter the output."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if had_bars:
        datasets.enable_progress_bars()


def write(path: str, rows: list[dict[str, Any]]) -> str:
    """Rows as the file that `path` is named for."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        Path(path).write_text(json.dumps(rows) if path.endswith(".json") else "\n".join(map(json.dumps, rows)))
    return path


def pairs(data: Dataset) -> list[tuple[Any, str]]:
    assert data.column_names == ["prompt", "answer"]
    return [(row["prompt"], row["answer"]) for row in data]


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), contents, strict=False)]


# Sources


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl", "some [1]* folder/a?[x].jsonl"])
def test_files(name: str, tmp_path: Path) -> None:
    expected = [("1+1?", "2"), ("2+3?", "5")]
    write(name, FLAT)
    assert pairs(load_prompts(name)) == expected
    assert pairs(load_prompts(str(tmp_path / name))) == expected
    assert pairs(load_prompts(f"./{name}")) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_the_format_of_dapo_math_17k(name: str) -> None:
    data = load_prompts(write(name, DAPO_MATH))
    assert pairs(data) == [([{"role": "user", "content": f"Solve: {a}+1"}], str(a + 1)) for a in range(3)]


def test_globs_are_read_in_order_of_names() -> None:
    for index, name in enumerate(("b/2.parquet", "a/1.parquet", "c/3.parquet")):
        write(f"shards/{name}", [{"prompt": f"{name}?", "answer": index}])
    assert pairs(load_prompts("shards/*/*.parquet")) == [("a/1.parquet?", "1"), ("b/2.parquet?", "0"), ("c/3.parquet?", "2")]
    assert len(load_prompts("shards/[ab]/?.parquet")) == 2
    assert len(load_prompts("**/*.parquet")) == 3


@pytest.mark.parametrize("extension", ["parquet", "json", "jsonl"])
def test_folders_have_the_splits_that_their_files_are_named_for(extension: str) -> None:
    write(f"set/data/train-00000-of-00001.{extension}", FLAT)
    write(f"set/data/test-00000-of-00001.{extension}", FLAT[:1])
    Path("set/dataset_infos.json").write_text("{}")  # as in a snapshot of a hub repository
    Path("set/README.md").write_text("# A set")
    assert pairs(load_prompts("set")) == [("1+1?", "2"), ("2+3?", "5")]
    assert pairs(load_prompts("set", split="test")) == [("1+1?", "2")]
    with pytest.raises(
        ValueError, match=r"`source` 'set' cannot be read: Unknown split .dev.. Should be one of \['train', 'test'\]"
    ):
        load_prompts("set", split="dev")


def test_a_folder_of_files_without_splits() -> None:
    write("set/x.jsonl", FLAT[:1])
    write("set/y.json", FLAT)
    assert pairs(load_prompts("set")) == [("1+1?", "2"), ("2+3?", "5")]


def test_what_save_to_disk_wrote() -> None:
    Dataset.from_list(FLAT).with_format("numpy").save_to_disk("one")
    assert pairs(load_prompts("one")) == [("1+1?", "2"), ("2+3?", "5")]
    DatasetDict(train=Dataset.from_list(FLAT), test=Dataset.from_list(FLAT[1:])).save_to_disk("two")
    assert pairs(load_prompts("two")) == [("1+1?", "2"), ("2+3?", "5")]
    assert pairs(load_prompts("two", split="test")) == [("2+3?", "5")]
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', 'test'; got 'dev'"):
        load_prompts("two", split="dev")


def test_what_is_loaded_can_be_saved_and_loaded_again() -> None:
    for number, rows in enumerate((FLAT, DAPO_MATH)):
        first = load_prompts(write(f"{number}.jsonl", rows))
        first.save_to_disk(f"disk{number}")
        first.to_parquet(f"again{number}.parquet")
        first.to_json(f"again{number}.jsonl")
        for source in (f"disk{number}", f"again{number}.parquet", f"again{number}.jsonl"):
            assert pairs(load_prompts(source)) == pairs(first)
            assert load_prompts(source).features == first.features


def test_hub_ids_are_left_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments: Any, **options: Any) -> Dataset:
        calls.append((arguments, options))
        return Dataset.from_list(DAPO_MATH)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [answer for _, answer in pairs(load_prompts("BytedTsinghua-SIA/DAPO-Math-17k"))] == ["1", "2", "3"]
    load_prompts("some_one/v1.5-set", config="main", split="test")
    with pytest.raises(ValueError, match="`config` is for hub datasets, got 'main' with `source` 'mixed:20'"):
        load_prompts("mixed:20", config="main")
    assert calls == [
        (("BytedTsinghua-SIA/DAPO-Math-17k",), {"name": None, "split": "train"}),
        (("some_one/v1.5-set",), {"name": "main", "split": "test"}),
    ]


@pytest.mark.parametrize(
    "name", ["./data", "../data", "/data", "~/data", "a/b/c", "a/*", "*.parquet", "x.jsonl", "a/x.parquet"]
)
def test_a_missing_path_is_no_hub_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=re.escape(f"`source` {name!r}: no such file or folder")):
        load_prompts(name)


@pytest.mark.parametrize("name", ["", "arithmetc", "mixed:many", "mixed:1:2:3", "mixed:-1", "owner/name:config", "data.csv"])
def test_a_source_of_no_known_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape("`source` must be an existing .parquet, .json or .jsonl file")) as error:
        load_prompts(name)
    assert str(error.value).endswith(f"got {name!r}")


def test_generated_sets_by_name() -> None:
    assert pairs(load_prompts("arithmetic")) == pairs(generate_problems("arithmetic"))
    assert pairs(load_prompts("algebra:64")) == pairs(generate_problems("algebra", 64))
    assert pairs(load_prompts("mixed:64:3", limit=9)) == pairs(generate_problems("mixed", 64, 3))[:9]
    assert load_prompts("mixed:8", template="Q {problem}")[0]["prompt"] == "Q " + generate_problems("mixed", 8)[0]["prompt"]
    with pytest.raises(ValueError, match="`size` must be an int >= 1, got 0"):
        load_prompts("mixed:0")


def test_what_exists_comes_before_names() -> None:
    write("mixed/x.jsonl", FLAT)
    write("owner/name/x.jsonl", FLAT)
    assert len(load_prompts("mixed")) == len(load_prompts("owner/name")) == 2


@pytest.mark.parametrize("source", ["a.jsonl", "*.jsonl", "saved", "mixed:8"])
def test_sources_without_splits_are_the_training_split(source: str) -> None:
    write("a.jsonl", FLAT)
    Dataset.from_list(FLAT).save_to_disk("saved")
    with pytest.raises(ValueError, match="`split` must be one of 'train'; got 'test'"):
        load_prompts(source, split="test")


def test_files_that_are_no_data() -> None:
    Path("notes.txt").write_text("1+1?")
    with pytest.raises(ValueError, match=r"'notes.txt': files must end in .parquet, .json, .jsonl, got notes.txt"):
        load_prompts("notes.txt")
    with pytest.raises(ValueError, match=r"'notes.\*': files must end in"):
        load_prompts("notes.*")
    Path("empty/.hidden").mkdir(parents=True)
    write("empty/.hidden/x.jsonl", FLAT)
    with pytest.raises(FileNotFoundError, match=r"`source` 'empty': the folder holds no .parquet, .json or .jsonl file"):
        load_prompts("empty")
    write("both/a.jsonl", FLAT)
    write("both/b.parquet", FLAT)
    for source in ("both", "both/*"):
        with pytest.raises(ValueError, match=r"must hold files of one format, got Parquet and JSON: name some with a glob"):
            load_prompts(source)
    assert len(load_prompts("both/*.jsonl")) == 2


@pytest.mark.parametrize("content", ["", '{"prompt": "a", ', "PAR1"])
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.parquet"])
def test_broken_files(name: str, content: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(ValueError, match=f"`source` '{name}' cannot be read: .+"):
        load_prompts(name)


# Formats


@pytest.mark.parametrize("column", ["prompt", "problem", "question"])
@pytest.mark.parametrize("gold", ["answer", "solution"])
def test_flat_columns(column: str, gold: str) -> None:
    assert pairs(load_prompts(write("a.jsonl", [{"id": 1, column: " 1+1? ", gold: " 2\n"}]))) == [(" 1+1? ", "2")]


def test_worked_solutions_give_their_results() -> None:
    rows = [
        {"question": "1?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
        {"question": "1?", "answer": "1+3 = <<1+3=4>>4\n#### 4"},
        {"question": "2?", "answer": r"Therefore $\boxed{\frac12}$."},
    ]
    assert pairs(load_prompts(write("a.jsonl", rows))) == [("1?", "4"), ("2?", r"\frac12")]


def test_the_order_of_columns() -> None:
    row = {"solution": "s", "answer": "a", "gold": "g", "question": "q", "problem": "p", "reward_model": {"ground_truth": "r"}}
    write("a.parquet", [row])
    assert pairs(load_prompts("a.parquet")) == [("p", "r")]
    assert pairs(load_prompts("a.parquet", answer_column="gold")) == [("p", "g")]
    write("b.parquet", [{**row, "reward_model": {"style": "rule"}, "prompt": "x"}])
    assert pairs(load_prompts("b.parquet")) == [("x", "a")]
    del row["answer"], row["reward_model"]
    assert pairs(load_prompts(write("c.parquet", [row]))) == [("p", "s")]
    assert pairs(load_prompts("c.parquet", answer_column="problem")) == [("p", "p")]


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_reward_models_as_json(extension: str) -> None:
    golds = ["34", 12345678901234567890123, 0.5, 34.0]
    rows = [{"prompt": f"{i}?", "reward_model": json.dumps({"ground_truth": gold})} for i, gold in enumerate(golds)]
    expected = ["34", "12345678901234567890123", "0.5", "34"]
    assert [answer for _, answer in pairs(load_prompts(write(f"a.{extension}", rows)))] == expected


def test_chats_keep_their_messages() -> None:
    system = {"role": "system", "content": ""}
    prompts = [[system, *chat("1+1?", "No.", "2+2?")], [*chat("1+1?", "It is")], chat("1+1?")]
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(prompts)]
    for name in ("a.parquet", "a.jsonl"):
        assert pairs(load_prompts(write(name, rows))) == [(prompt, str(i)) for i, prompt in enumerate(prompts)]


def test_types_that_parquet_has_more_of() -> None:
    chats = pa.array([chat("1+1?"), chat("2+2?")]).cast(
        pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.string())]))
    )
    pq.write_table(pa.table({"prompt": chats, "answer": pa.array(["2", "4"]).dictionary_encode()}), "a.parquet")
    assert pairs(load_prompts("a.parquet")) == [(chat("1+1?"), "2"), (chat("2+2?"), "4")]


@pytest.mark.parametrize(
    ("golds", "expected"),
    [
        (["007", "1/2", " x = 3 "], ["007", "1/2", "x = 3"]),
        ([34, -3, 2**62], ["34", "-3", str(2**62)]),
        ([34.0, 0.5, -0.0, 1e-7, -2.25, 0.1, 2.0**53 - 1], ["34", "0.5", "0", "0.0000001", "-2.25", "0.1", "9007199254740991"]),
        (np.array([0.1, 3, 2.5], np.float32), ["0.1", "3", "2.5"]),
        (np.array([0.1, 3, 2.5], np.float16), ["0.1", "3", "2.5"]),
        (np.array([200, 3], np.uint8), ["200", "3"]),
    ],
)
def test_golds_become_strings(golds: Any, expected: list[str]) -> None:
    answers = pa.array(golds)
    prompts = [f"{i}?" for i in range(len(answers))]
    pq.write_table(pa.table({"prompt": prompts, "answer": answers}), "a.parquet")
    nested = pa.StructArray.from_arrays([answers], ["ground_truth"])
    pq.write_table(pa.table({"prompt": prompts, "reward_model": nested}), "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        assert [answer for _, answer in pairs(load_prompts(name))] == expected


def test_json_golds_of_several_types() -> None:
    golds = ["x", 34, 0.5, 34.0]
    write("a.jsonl", [{"prompt": f"{i}?", "answer": gold} for i, gold in enumerate(golds)])
    assert [answer for _, answer in pairs(load_prompts("a.jsonl"))] == ["x", "34", "0.5", "34"]


USABLE = {"prompt": "1+1?", "answer": "2"}
NO_TEXT = "the prompt is empty: its last user message has no text, or there is none"
NOT_NESTED = "`reward_model` must be a struct or JSON with ground_truth, got "


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (USABLE, {"answer": None}, "the answer is null"),
        (USABLE, {"answer": " \n"}, "the answer is empty"),
        ({**USABLE, "answer": 1}, {"answer": None}, "the answer is null"),
        ({**USABLE, "answer": True}, {}, "the answer must be a string or a number, got True"),
        ({**USABLE, "answer": 0.5}, {"answer": math.inf}, "the answer must be exact, got the float inf"),
        ({**USABLE, "answer": 0.5}, {"answer": 2.0**53}, "the answer must be exact, got the float 9007199254740992.0"),
        ({**USABLE, "answer": ["2"]}, {}, "the answer must be a string or a number, got ['2']"),
        ({**USABLE, "answer": date(2020, 1, 1)}, {}, "the answer must be a string or a number, got datetime.date(2020, 1, 1)"),
        (USABLE, {"prompt": None}, "the prompt is empty"),
        (USABLE, {"prompt": "\t"}, "the prompt is empty"),
        ({**USABLE, "prompt": 5}, {}, "the prompt must be a string or a list of messages, got int"),
        ({**USABLE, "prompt": chat("1")}, {"prompt": []}, "the prompt is empty"),
        ({**USABLE, "prompt": chat("1")}, {"prompt": chat("")}, NO_TEXT),
        ({**USABLE, "prompt": chat("1")}, {"prompt": chat("1", "2", " ")}, NO_TEXT),
        ({**USABLE, "prompt": chat("1")}, {"prompt": chat("1", "2")[1:]}, NO_TEXT),
        ({**USABLE, "prompt": ["1"]}, {}, "messages must have role and content, got '1'"),
        ({**USABLE, "prompt": [{"content": "1"}]}, {}, "messages must have role and content, got {'content': '1'}"),
        (
            {**USABLE, "prompt": chat("1")},
            {"prompt": [{"role": "user", "content": None}]},
            "role and content of messages must be strings, got {'role': 'user', 'content': None}",
        ),
        (
            {**USABLE, "prompt": [{"role": "user", "content": "1", "name": None}]},
            {"prompt": [{"role": "user", "content": "1", "name": "Ann"}]},
            "messages must have nothing but role and content, got {'role': 'user', 'content': '1', 'name': 'Ann'}",
        ),
        (
            {"prompt": "1?", "reward_model": {"ground_truth": "1"}},
            {"reward_model": {"ground_truth": None}},
            "the answer is null",
        ),
        ({"prompt": "1?", "reward_model": {"ground_truth": "1"}}, {"reward_model": None}, NOT_NESTED + "None"),
        ({"prompt": "1?", "reward_model": '{"ground_truth": 1}'}, {"reward_model": "1"}, NOT_NESTED + "1"),
        ({"prompt": "1?", "reward_model": '{"ground_truth": 1}'}, {"reward_model": "{"}, NOT_NESTED + "'{'"),
        ({"prompt": "1?", "reward_model": '{"ground_truth": 1}'}, {"reward_model": "{}"}, NOT_NESTED + "{}"),
    ],
)
def test_rows_that_cannot_be_used(good: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    first = 2 if bad else 0  # without a bad one, the good one is bad already
    rows = [good, good, {**good, **bad}, good, {**good, **bad}]
    count = 2 if bad else 5
    expected = f"`source` 'a.parquet': {count} of 5 rows cannot be used; the first is row {first} (from 0): {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_prompts(write("a.parquet", rows))


def test_json_that_would_be_read_as_another_gold_is_refused() -> None:
    """A column of integers beyond 64 bits is read as floats, and one of dates as dates."""
    write("a.jsonl", [{"prompt": "1?", "answer": 10**30}, {"prompt": "2?", "answer": 1}])
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be used; .* must be exact, got the float 1e\+30"):
        load_prompts("a.jsonl")
    with pytest.raises(ValueError, match=r"must be a string or a number, got datetime.datetime\(2020, 1, 2"):
        load_prompts(write("b.jsonl", [{"prompt": "1?", "answer": "2020-01-02"}]))


def test_strings_and_chats_do_not_mix() -> None:
    write("a.jsonl", [USABLE, {"prompt": chat("1?"), "answer": "2"}])
    with pytest.raises(ValueError, match=r"'a.jsonl' mixes prompts that are strings with prompts that are chats"):
        load_prompts("a.jsonl")


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (
            {"text": "1?", "answer": "1"},
            {},
            "`reward_model` with ground_truth, or answer or solution; its columns are text, answer",
        ),
        (
            {"prompt": "1?", "gold": "1"},
            {},
            "`reward_model` with ground_truth, or answer or solution; its columns are prompt, gold",
        ),
        ({"prompt": "1?", "reward_model": {"style": "1"}}, {}, "or answer or solution; its columns are prompt, reward_model"),
        ({"prompt": "1?", "answer": "1"}, {"answer_column": "gold"}, "`gold`; its columns are prompt, answer"),
    ],
)
def test_missing_columns(row: dict[str, Any], options: dict[str, str], expected: str) -> None:
    with pytest.raises(
        ValueError, match=r"`source` 'a.parquet' must have a column prompt or problem or question, and"
    ) as error:
        load_prompts(write("a.parquet", [row]), **options)
    assert str(error.value).endswith(expected)


def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Dataset.from_list([USABLE]).select([]))
    with pytest.raises(ValueError, match="'owner/name' has 0 rows, and no prompt with a single answer among them"):
        load_prompts("owner/name")


# One row per prompt


@pytest.mark.parametrize("as_chat", [False, True])
def test_repeated_rows_are_kept_once_and_contradictions_not_at_all(as_chat: bool, caplog: pytest.LogCaptureFixture) -> None:
    numbers = [(3, 3), (1, 1), (3, 3), (2, 2), (7, 1), (1, 1), (2, 5), (7, 2), (7, 1), (2, 2), (0, 0)]
    rows = [{"prompt": chat(f"{a}") if as_chat else f"{a}", "answer": b} for a, b in numbers]
    caplog.set_level(logging.INFO, "dppo_kernels.trainers.data.prompts")
    data = load_prompts(write("a.parquet", rows))
    assert data["answer"][:] == ["3", "1", "0"]
    assert data["prompt"][:] == [chat(a) if as_chat else a for a in ("3", "1", "0")]
    first = (("user", "2"),) if as_chat else "2"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "a.parquet: 11 rows, 5 distinct prompts"),
        ("WARNING", f"a.parquet: dropped 2 prompts that come with different answers, such as {first!r}"),
    ]


def test_only_the_same_messages_are_the_same_prompt(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [
        chat("1", "2", "3"),
        chat("1", "2"),
        chat("1"),
        chat("12", "3"),
        [{"role": "system", "content": "1"}, *chat("1")],
    ]
    data = load_prompts(write("a.jsonl", [{"prompt": prompt, "answer": i} for i, prompt in enumerate(prompts)]))
    assert data["prompt"][:] == prompts
    assert not caplog.records


def test_repeats_are_found_across_batches_and_files() -> None:
    for shard in range(3):
        write(f"{shard}.parquet", [{"prompt": f"{i % 30}?", "answer": i % 30} for i in range(7000)])
    assert pairs(load_prompts("*.parquet")) == [(f"{i}?", str(i)) for i in range(30)]


def test_nothing_but_contradictions() -> None:
    write("a.jsonl", [USABLE, {**USABLE, "answer": "3"}])
    with pytest.raises(ValueError, match=r"'a.jsonl' has 2 rows, and no prompt with a single answer among them"):
        load_prompts("a.jsonl")


def test_a_limit_counts_distinct_prompts() -> None:
    write("a.jsonl", [{"prompt": f"{i // 3}?", "answer": str(i // 3)} for i in range(12)])
    assert load_prompts("a.jsonl", limit=2)["answer"][:] == ["0", "1"]
    assert len(load_prompts("a.jsonl", limit=100)) == 4


# Templates


def test_the_template_surrounds_the_problem() -> None:
    write("a.jsonl", [{"prompt": "{x} in {problem} \\1 %s", "answer": "1"}])
    (row,) = load_prompts("a.jsonl", template="Set {0} %d {{y}}: {problem}!")
    assert row["prompt"] == "Set {0} %d {{y}}: {x} in {problem} \\1 %s!"


def test_the_template_goes_into_the_last_user_message() -> None:
    prompts = [[{"role": "system", "content": "S"}, *chat("1?", "No.", "2?")], chat("3?", "It is")]
    write("a.jsonl", [{"prompt": prompt, "answer": i} for i, prompt in enumerate(prompts)])
    data = load_prompts("a.jsonl", template="<{problem}>")
    assert data[0]["prompt"] == [{"role": "system", "content": "S"}, *chat("1?", "No.", "<2?>")]
    assert data[1]["prompt"] == chat("<3?>", "It is")


def test_the_math_template_asks_for_what_the_verifier_reads() -> None:
    (row,) = load_prompts(write("a.jsonl", FLAT[:1]), template=MATH_TEMPLATE)
    assert row["prompt"].endswith(": 1+1?")
    assert "Answer: <the answer>" in row["prompt"].splitlines()


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": Path("a.jsonl")}, TypeError, "`source` must be a string, got PosixPath"),
        ({"split": None}, TypeError, "`split` must be a string, got NoneType"),
        ({"answer_column": 1}, TypeError, "`answer_column` must be a string or None, got int"),
        ({"template": 1}, TypeError, "`template` must be a string or None, got int"),
        ({"template": "Solve:"}, ValueError, "`template` must contain {problem} exactly once, got 'Solve:'"),
        ({"template": "{problem}{problem}"}, ValueError, "`template` must contain {problem} exactly once, got"),
        ({"limit": 0}, ValueError, "`limit` must be an int >= 1, got 0"),
        ({"limit": 1.0}, TypeError, "`limit` must be an int or None, got float"),
        ({"limit": True}, TypeError, "`limit` must be an int or None, got bool"),
    ],
)
def test_bad_arguments_fail_before_anything_is_read(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        load_prompts(**{"source": "no such file.jsonl", **options})


def test_prompts_alone(tmp_path) -> None:
    """For rewards that need no gold answers, a file without any will do."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "chosen": "x"}) + "\n" for text in ("one", "two", "one")))
    found = load_prompts(str(file), with_answers=False, template="<{problem}>")
    assert found.column_names == ["prompt"]
    assert found["prompt"][:] == ["<one>", "<two>"]
    with pytest.raises(ValueError, match="must have a column prompt or problem or question, and"):
        load_prompts(str(file))
    with pytest.raises(ValueError, match="`answer_column` 'chosen' would not be read"):
        load_prompts(str(file), with_answers=False, answer_column="chosen")
    file.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"prompt": " "}) + "\n")
    with pytest.raises(ValueError, match=r"row 1 \(from 0\) cannot be used: the prompt is empty"):
        load_prompts(str(file), with_answers=False)
    file.write_text(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(ValueError, match="must have a column prompt or problem or question; its columns are text"):
        load_prompts(str(file), with_answers=False)


def test_further_columns_are_those_of_the_first_row_with_a_prompt(caplog) -> None:
    """Prompts in rows 0 and 2, 1, 3 (whose answers differ) and 5."""
    rows = [
        {"problem": text, "answer": answer, "level": {"n": n, "of": [n]}, "tag": "t"}
        for text, answer, n in (("a", 1, 0), ("b", 2, 1), ("a", 1, 2), ("c", 3, 3), ("c", 4, 3), ("d", 5, 5))
    ]
    write("a.jsonl", rows)
    found = load_prompts("a.jsonl", columns=["level"], optional_columns=["tag", "nothing"])
    assert found.column_names == ["prompt", "answer", "level", "tag"]
    assert found["prompt"][:] == ["a", "b", "d"]
    assert found["level"][:] == [{"n": n, "of": [n]} for n in (0, 1, 5)]
    assert found["tag"][:] == ["t"] * 3
    assert "1 prompts come with different level or tag, of which the first is kept, such as 'a'" in caplog.text
    caplog.clear()
    alone = load_prompts("a.jsonl", with_answers=False, columns=("answer", "answer"), limit=2)
    assert (alone.column_names, alone["answer"][:]) == (["prompt", "answer"], [1, 2])
    assert "1 prompts come with different answer, of which the first is kept, such as 'c'" in caplog.text
    caplog.clear()
    load_prompts("a.jsonl", columns=["tag"])
    assert "of which the first is kept" not in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"columns": ["level"]}, ValueError, "must have a column 'level'; its columns are problem, answer"),
        ({"columns": ["answer"]}, ValueError, "`columns` holds 'answer', which is there in any case"),
        ({"optional_columns": ["prompt"], "with_answers": False}, ValueError, "`columns` holds 'prompt'"),
        ({"columns": "level"}, TypeError, "`columns` must be a list of strings, got 'level'"),
        ({"optional_columns": [1]}, TypeError, "`optional_columns` must be a list of strings"),
    ],
)
def test_what_are_no_further_columns(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_prompts(write("a.jsonl", FLAT), **options)
