"""Preference pairs with transformers: what is generated, what is kept, and that TRL's DPOTrainer trains on it."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from trl import DPOConfig, DPOTrainer

from dppo_kernels.trainers import PairsConfig, make_pairs
from tests.trainers.conftest import reward_length

BUDGET = 8


class Recording:
    """Rewards from a function of row and place in the group (temperature by temperature); keeps what it was called with."""

    def __init__(self, rule: Callable[[int, int], float | None], group: int = 4) -> None:
        self.rule, self.group = rule, group
        self.seen: dict[str, list[Any]] = {}

    def __call__(self, **columns: Any) -> list[float | None]:
        for name, column in columns.items():
            self.seen.setdefault(name, []).extend(column)
        return [self.rule(row, i % self.group) for i, row in enumerate(columns["row"])]


@pytest.fixture
def rows() -> Dataset:
    """Prompts of unequal length, with their place."""
    return Dataset.from_dict({"prompt": [f"{10**i}+{i}=" for i in range(6)], "row": list(range(6)), "other": ["x"] * 6})


def make(model: Any, tokenizer: Any, rows: Any, reward: Any, **changes: Any) -> Any:
    settings = {"max_completion_length": BUDGET, "batch_size": 4, **changes}
    return make_pairs(model, tokenizer, rows, reward, PairsConfig(**settings))


def test_rows_stay_together_when_prompts_are_dropped(model, tokenizer, rows) -> None:
    """Row r: its completion r % 4 is the best by r; none of rows 1 and 4."""
    reward = Recording(lambda row, place: float(row if place == row % 4 else 0.5) if row not in (1, 4) else 3.0)
    pairs, statistics = make(model, tokenizer, rows, reward, extra_columns=["row", "other"])
    assert pairs["row"][:] == [0, 2, 3, 5]
    assert pairs.column_names == [
        *("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "chosen_temperature", "rejected_temperature"),
        *("row", "other"),
    ]
    for pair in pairs:
        row = pair["row"]
        completions = reward.seen["completions"][4 * row : 4 * row + 4]
        assert pair["prompt"] == rows[row]["prompt"]
        assert len(set(completions)) == 4
        best, worst = {0: (1, 0), 2: (2, 0), 3: (3, 0), 5: (1, 0)}[row]  # of equals, the first
        assert (pair["chosen"], pair["rejected"]) == (completions[best], completions[worst])
        assert pair["chosen_temperature"] == [0.6, 0.8, 1.0, 1.2][best]
        assert pair["rejected_temperature"] == [0.6, 0.8, 1.0, 1.2][worst]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(row, 0.5), min(row, 0.5))
    assert statistics.chosen_by_temperature == (0, 2, 1, 1)
    assert statistics.rejected_by_temperature == (4, 0, 0, 0)
    assert (statistics.pairs, statistics.dropped_gap, statistics.dropped_unscored) == (4, 2, 0)
    assert statistics.generated_tokens == sum(map(len, reward.seen["completion_ids"]))
    assert reward.seen["prompts"] == [prompt for prompt in rows["prompt"] for _ in range(4)]
    assert reward.seen["other"] == ["x"] * 24


def test_none_is_left_out(model, tokenizer, rows) -> None:
    """The best and the worst place have none in some rows, and row 5 has a single reward."""
    reward = Recording(lambda row, place: None if place in (0, 3) or (row == 5 and place == 1) else float(place))
    pairs, statistics = make(model, tokenizer, rows, reward)
    assert set(pairs["chosen_temperature"]) == {1.0}
    assert set(pairs["rejected_temperature"]) == {0.8}
    assert pairs["prompt"][:] == rows["prompt"][:5]
    assert (statistics.unscored, statistics.dropped_unscored, statistics.pairs) == (13, 1, 5)


def test_the_gap_is_strict(model, tokenizer, rows) -> None:
    reward = Recording(lambda row, place: 0.5 if place == row % 4 else 0.25)
    assert make(model, tokenizer, rows, reward, min_gap=0.25)[1].pairs == 0
    assert make(model, tokenizer, rows, reward, min_gap=0.125)[1].pairs == 6


def greedy(model: Any, tokenizer: Any, prompt: str, **settings: Any) -> list[int]:
    """Of one prompt alone, without padding."""
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    config = GenerationConfig(do_sample=False, max_new_tokens=BUDGET, eos_token_id=1, pad_token_id=0, **settings)
    return model.generate(**ids, generation_config=config)[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 20.0])
def test_completions_are_those_of_each_prompt_alone(model, tokenizer, rows, penalty: float) -> None:
    """Left padding, the cache, a repetition penalty (padding is no repetition), and settings that the model would add."""
    # The pad and the end token are what some prompts begin with, unless padding was counted as their repetition.
    favourites = [greedy(model.eval(), tokenizer, prompt)[0] for prompt in rows["prompt"]]
    for token, favourite in enumerate(list(dict.fromkeys(favourites))[:2]):
        model.lm_head.weight.data[token] = 1.05 * model.lm_head.weight.data[favourite]
    expected = [greedy(model, tokenizer, prompt, repetition_penalty=penalty) for prompt in rows["prompt"]]
    assert {0, 1} <= {ids[0] for ids in expected[:-1]}  # the last prompt is the longest
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=3, temperature=3.0, min_new_tokens=BUDGET, no_repeat_ngram_size=1, repetition_penalty=1.5,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    reward = Recording(lambda row, place: 1.0 - place, group=2)
    make(model, tokenizer, rows, reward, temperatures=[1e-4, 20.0], repetition_penalty=penalty)
    assert reward.seen["completion_ids"][::2] == expected
    assert all(hot != cold for hot, cold in zip(reward.seen["completion_ids"][1::2], expected, strict=True))


def test_options_reach_the_sampler(model, tokenizer, rows) -> None:
    expected = [greedy(model.eval(), tokenizer, prompt) for prompt in rows["prompt"]]
    for option in ({"top_k": 1}, {"top_p": 1e-6}):
        reward = Recording(lambda row, place: float(place), group=2)
        make(model, tokenizer, rows, reward, temperatures=[2.0], samples_per_temperature=2, **option)
        assert reward.seen["completion_ids"] == [ids for ids in expected for _ in range(2)]


def test_several_samples_at_each_temperature(model, tokenizer, rows) -> None:
    """Places of a group: 0.5, 0.5, 0.5, 2, 2, 2."""
    reward = Recording(lambda row, place: {1: 1.0, 3 + row % 3: -1.0}.get(place, 0.0), group=6)
    pairs, statistics = make(model, tokenizer, rows, reward, temperatures=[0.5, 2.0], samples_per_temperature=3)
    assert statistics.completions == 36
    assert len(set(reward.seen["completions"])) > 30  # nearly all differ
    for row, pair in enumerate(pairs):
        assert (pair["chosen_temperature"], pair["rejected_temperature"]) == (0.5, 2.0)
        assert pair["chosen"] == reward.seen["completions"][6 * row + 1]
        assert pair["rejected"] == reward.seen["completions"][6 * row + 3 + row % 3]


@pytest.mark.parametrize("peft", [False, True])
def test_the_model_is_left_as_it_was(model, tokenizer, rows, peft: bool) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5  # acts in train mode only
    inner = model
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    reward = Recording(lambda row, place: float(place))
    make(model.eval(), tokenizer, rows, reward)
    model.train()
    inner.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    settings, state = (model.generation_config, inner.generation_config), torch.random.get_rng_state()
    again = Recording(lambda row, place: float(place))
    make(model, tokenizer, rows, again)
    assert again.seen == reward.seen  # the same seed, and no dropout
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings[0]
    assert inner.generation_config is settings[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    other = Recording(lambda row, place: float(place))
    make(model, tokenizer, rows, other, seed=1)
    assert other.seen["completions"] != reward.seen["completions"]


def test_ends_and_truncation(model, tokenizer, rows) -> None:
    """A third of the tokens end a completion; those that none ended are counted, and left out on request."""
    ends = [1, *range(8, 40)]
    model.generation_config.eos_token_id = ends[1:]  # the tokenizer's own counts too
    reward = Recording(lambda row, place: float(place))
    _, statistics = make(model, tokenizer, rows, reward, max_completion_length=3)
    ids = reward.seen["completion_ids"]
    cut = [i for i, tokens in enumerate(ids) if tokens[-1] not in ends]
    assert 2 < len(cut) < 22
    assert all(len(ids[i]) == 3 for i in cut)
    assert not any(token in ends for tokens in ids for token in tokens[:-1])
    assert statistics.truncated == len(cut)
    assert statistics.generated_tokens == sum(map(len, ids))

    seen = []

    def by_text(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[float]:
        seen.extend(zip(row, completion_ids, strict=True))
        return [float(sum(tokens)) for tokens in completion_ids]

    pairs, dropped = make(model, tokenizer, rows, by_text, max_completion_length=3, drop_truncated=True)
    complete = [(i // 4, tokens) for i, tokens in enumerate(ids) if i not in cut]
    assert seen == complete
    assert (dropped.truncated, dropped.generated_tokens) == (statistics.truncated, statistics.generated_tokens)
    assert (dropped.unscored, dropped.chosen_truncated, dropped.rejected_truncated) == (0, 0, 0)
    scores = [[sum(tokens) for row, tokens in complete if row == wanted] for wanted in range(6)]
    assert dropped.dropped_unscored == sum(len(group) < 2 for group in scores)
    kept = [group for group in scores if len(group) > 1 and max(group) > min(group)]
    assert pairs["chosen_reward"][:] == [max(group) for group in kept]
    assert pairs["rejected_reward"][:] == [min(group) for group in kept]


def test_budget_of_reference_texts(model, tokenizer, rows) -> None:
    reward = Recording(lambda row, place: float(place))
    config = PairsConfig(temperatures=[0.9, 1.0])
    make_pairs(model, tokenizer, rows, reward, config, budget_texts=["12", "12345", ""])
    assert max(map(len, reward.seen["completion_ids"])) == 6  # five characters and the end


def chats() -> Dataset:
    return Dataset.from_dict(
        {"prompt": [[{"role": "system", "content": "s"}, {"role": "user", "content": f"{i}?"}] for i in range(6)]}
    )


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_the_file_trains_trls_dpo(model, tokenizer, rows, tmp_path: Path, caplog, chat: bool) -> None:
    file = tmp_path / "pairs.parquet"
    settings = {"max_completion_length": 5, "batch_size": 4, "output_file": str(file)}
    data = chats() if chat else rows
    with caplog.at_level(logging.INFO, "dppo_kernels.trainers.pairs"):
        pairs, statistics = make_pairs(model, tokenizer, data, reward_length, PairsConfig(**settings))
    assert statistics.summary() in caplog.text
    assert json.loads(file.with_suffix(".statistics.json").read_text()) == json.loads(json.dumps(statistics.as_dict()))
    loaded = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == pairs.features
    assert loaded.to_list() == pairs.to_list()
    assert len(loaded) > 3
    if chat:
        assert [m["role"] for m in loaded[0]["prompt"] + loaded[0]["chosen"]] == ["system", "user", "assistant"]
    in_memory, same = make_pairs(model, tokenizer, data, reward_length, PairsConfig(**{**settings, "output_file": None}))
    assert (in_memory.to_list(), same) == (pairs.to_list(), statistics)
    args = DPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1, report_to=[],
        per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(model, ref_model=copy.deepcopy(model), args=args, train_dataset=loaded, processing_class=tokenizer)
    before = model.lm_head.weight.clone()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert not torch.equal(model.lm_head.weight, before)


def test_prompts_as_a_list(model, tokenizer, rows) -> None:
    as_list, _ = make(model, tokenizer, rows["prompt"][:], reward_length)
    as_dataset, _ = make(model, tokenizer, rows, reward_length)
    assert as_list.to_list() == as_dataset.to_list()


def test_no_pair_at_all(model, tokenizer, rows, tmp_path: Path, caplog) -> None:
    file = tmp_path / "pairs.parquet"
    pairs, _ = make(model, tokenizer, rows, Recording(lambda row, place: 1.0), output_file=str(file))
    assert len(pairs) == 0
    assert "no prompt gave a pair" in caplog.text
    table = pq.read_table(file)  # `load_dataset` takes no empty file
    assert (table.num_rows, table.column_names) == (0, pairs.column_names)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperatures": [0.5, 0.0]}, ValueError, "`temperatures` must be positive, got 0.0"),
        ({"temperatures": [0.5, 0.5]}, ValueError, "`temperatures` must be distinct"),
        ({"temperatures": [0.5]}, ValueError, "at least two completions"),
        ({"temperatures": ["hot", 1.0]}, TypeError, "`temperatures` must be a number, got str"),
        ({"samples_per_temperature": 0}, ValueError, "`samples_per_temperature` must be an int of at least 1, got 0"),
        ({"top_p": 1.5}, ValueError, r"`top_p` must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, ValueError, "`top_k` must be an int of at least 0"),
        ({"repetition_penalty": 0.0}, ValueError, "`repetition_penalty` must be positive"),
        ({"max_completion_length": 0}, ValueError, "`max_completion_length` must be an int of at least 1"),
        ({"min_gap": -0.1}, ValueError, "`min_gap` must not be negative"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"output_file": "pairs.json"}, ValueError, "`output_file` must end in .parquet, got 'pairs.json'"),
        ({"extra_columns": ["chosen"]}, ValueError, "`extra_columns` holds 'chosen'"),
        ({"extra_columns": "answer"}, TypeError, "`extra_columns` must be a list of strings, got 'answer'"),
        ({"extra_columns": [1]}, TypeError, "`extra_columns` must hold strings, got 1"),
        ({"temperatures": 5}, TypeError, "`temperatures` must be a list of numbers, got 5"),
        ({"temperatures": "0.51"}, TypeError, "`temperatures` must be a list of numbers, got '0.51'"),
        ({"reward_weights": 1.0}, TypeError, "`reward_weights` must be a list of numbers, got 1.0"),
        ({"reward_weights": ["1"]}, TypeError, "`reward_weights` must be a number, got str"),
        ({"drop_truncated": "no"}, TypeError, "`drop_truncated` must be True or False, got 'no'"),
        ({"use_vllm": 1}, TypeError, "`use_vllm` must be True or False, got 1"),
        ({"output_file": 3}, TypeError, "`output_file` must be a path or None, got int"),
        ({"vllm_gpu_memory_utilization": 7.0}, ValueError, r"`vllm_gpu_memory_utilization` must be in \(0, 1\], got 7.0"),
        ({"vllm_gpu_memory_utilization": 0.0}, ValueError, "`vllm_gpu_memory_utilization` must be positive"),
        ({"vllm_max_model_length": -3}, ValueError, "`vllm_max_model_length` must be an int of at least 1, got -3"),
        ({"vllm_tensor_parallel_size": 0}, ValueError, "`vllm_tensor_parallel_size` must be an int of at least 1"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PairsConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "a/path"}, TypeError, "`model` must be a causal LM of transformers, got str"),
        ({"use_vllm": True}, TypeError, "`model` must be the path or hub id of a model, with `use_vllm=True`, got Qwen3"),
        ({"engine": object()}, ValueError, "`engine` is for `use_vllm=True`"),
        ({"revision": "v1"}, ValueError, "`revision` is for `use_vllm=True`"),
        ({"dtype": "float16"}, ValueError, "`dtype` is for `use_vllm=True`"),
        ({"model": "a/path", "use_vllm": True, "dtype": torch.half}, TypeError, "`dtype` must be a string or None, got dtype"),
        (
            {"model": "a/path", "use_vllm": True, "dtype": "half", "engine": object()},
            ValueError,
            "`dtype`='half' is for an engine that is made here",
        ),
        ({"rows": "1+1="}, TypeError, "`prompts` must be a Dataset or a list of prompts, got str"),
        ({"rows": []}, ValueError, "`prompts` must not be empty"),
        ({"rows": [1, 2]}, ValueError, "row 0 must hold a string or a list of messages, got 1"),
        ({"rows": ["1", ""]}, ValueError, "row 1 has no tokens"),
        ({"rows": ["1", "1" * 121]}, ValueError, "row 1 has 121 tokens, which with a completion of 8 are more than the 128"),
        ({"rows": [[{"role": "assistant", "content": "so"}]]}, ValueError, "row 0 ends with a message of the assistant"),
        ({"rows": Dataset.from_dict({"text": ["1"]})}, ValueError, "must have a column 'prompt'; its columns are text"),
        ({"extra_columns": ["answer"]}, ValueError, "must have a column 'answer'"),
        ({"max_completion_length": None}, ValueError, "one of `max_completion_length` and `budget_texts` must be given"),
        (
            {"budget_texts": ["1"]},
            ValueError,
            "one of `max_completion_length` and `budget_texts` must be given, got 8 and texts",
        ),
        ({"budget_texts": [], "max_completion_length": None}, ValueError, "`budget_texts` must be a list of strings"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "a weight for each of 1 functions"),
    ],
)
def test_bad_arguments_fail_before_any_work(
    model, tokenizer, rows, monkeypatch, tmp_path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(model, "generate", lambda **kwargs: pytest.fail("generated"))
    settings = {"max_completion_length": BUDGET, "output_file": str(tmp_path / "pairs.parquet"), **changes}
    arguments = {"model": model, "rows": rows, "budget_texts": None, "engine": None, "revision": None, "dtype": None}
    arguments = {name: settings.pop(name, value) for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        make_pairs(
            arguments["model"], tokenizer, arguments["rows"], reward_length, PairsConfig(**settings),
            **{name: arguments[name] for name in ("budget_texts", "engine", "revision", "dtype")},
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_without_an_end_token(model, tokenizer, rows) -> None:
    model.generation_config.eos_token_id = None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`tokenizer` must have an end token"):
        make(model, tokenizer, rows, reward_length)
