"""Pairs from a vLLM engine that a transformers model plays: requests, seeds, ends, and the same pairs as without vLLM."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from dppo_kernels.trainers import PairsConfig, make_pairs

ENDS = [1, *range(8, 40)]  # a third of the tokens: completions end in the middle


class FakeLLM:
    """What pairs touch of `vllm.LLM`: each request is drawn by its own settings and seed, up to an end token or the limit."""

    def __init__(self, weights: Any, **settings: Any) -> None:
        self.weights, self.settings = weights.eval(), settings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=settings.get("max_model_len") or 128))
        self.requests: list[tuple[list[int], SimpleNamespace]] = []

    def generate(self, prompts: list[dict], sampling_params: list[SimpleNamespace], use_tqdm: bool) -> list[SimpleNamespace]:
        assert len(prompts) == len(sampling_params)
        assert not use_tqdm
        self.requests += [(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]
        return [self.complete(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def complete(self, prompt: list[int], settings: SimpleNamespace) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(settings.seed)
        ids = list(prompt)
        while len(ids) - len(prompt) < settings.max_tokens:
            with torch.no_grad():
                logits = self.weights(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(torch.multinomial((logits / settings.temperature).softmax(-1), 1, generator=generator)))
            if ids[-1] in settings.stop_token_ids:
                break
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=tuple(ids[len(prompt) :]))])


@pytest.fixture
def engines(monkeypatch, model) -> list[FakeLLM]:
    """Those that were made; `import vllm` gives them."""
    made: list[FakeLLM] = []

    def start(**settings: Any) -> FakeLLM:
        made.append(FakeLLM(model, **settings))
        return made[-1]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = start, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


@pytest.fixture
def model_path(model, tokenizer, tmp_path: Path) -> str:
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict({"prompt": [f"{10**i}+{i}=" for i in range(5)]})


def by_place(group: int) -> Callable[..., list[float]]:
    """The first of a group is the best, the last the worst."""
    return lambda completions, **kwargs: [float(-(i % group)) for i in range(len(completions))]


def test_requests(engines, model_path: str, tokenizer, rows) -> None:
    config = PairsConfig(
        temperatures=[0.7, 1.3], samples_per_temperature=2, top_p=0.9, top_k=20, repetition_penalty=1.1,
        max_completion_length=4, batch_size=3, seed=5, use_vllm=True, vllm_gpu_memory_utilization=0.5,
        vllm_max_model_length=64,
    )  # fmt: skip
    pairs, statistics = make_pairs(model_path, tokenizer, rows, by_place(4), config)
    [engine] = engines
    assert engine.settings == {
        "model": model_path, "gpu_memory_utilization": 0.5, "max_model_len": 64, "tensor_parallel_size": 1
    }  # fmt: skip
    assert [prompt for prompt, _ in engine.requests] == [tokenizer(p)["input_ids"] for p in rows["prompt"] for _ in range(4)]
    assert [settings.temperature for _, settings in engine.requests] == [0.7, 0.7, 1.3, 1.3] * 5
    for _, settings in engine.requests:
        assert (settings.n, settings.max_tokens, settings.stop_token_ids) == (1, 4, ENDS)
        assert (settings.top_p, settings.top_k, settings.repetition_penalty, settings.min_p) == (0.9, 20, 1.1, 0.0)
    seeds = [settings.seed for _, settings in engine.requests]
    assert len(set(seeds)) == 20
    assert statistics.chosen_by_temperature == (5, 0)
    assert statistics.rejected_by_temperature == (0, 5)
    config.batch_size = 5  # seeds belong to prompts: batches do not matter here
    again, _ = make_pairs(model_path, tokenizer, rows, by_place(4), config)
    assert again.to_list() == pairs.to_list()


def test_the_same_pairs_as_without_vllm(engines, model, model_path: str, tokenizer, rows) -> None:
    """Next to greedy, so that both draw alike: some end, and some are truncated."""
    ids: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        ids.append(completion_ids)
        return by_place(2)(completion_ids)

    settings: dict[str, Any] = {"temperatures": [1e-5, 2e-5], "max_completion_length": 3, "batch_size": 8}
    expected = make_pairs(model, tokenizer, rows, reward, PairsConfig(**settings))
    found = make_pairs(model_path, tokenizer, rows, reward, PairsConfig(**settings, use_vllm=True))
    assert ids[0] == ids[1]
    assert found[0].to_list() == expected[0].to_list()
    assert found[1] == expected[1]
    assert 0 < found[1].truncated < found[1].completions


def test_a_given_engine_and_a_finished_run(engines, model, model_path: str, tokenizer, rows, tmp_path: Path) -> None:
    engine = FakeLLM(model)
    file = str(tmp_path / "pairs.parquet")
    config = PairsConfig(max_completion_length=3, use_vllm=True, output_file=file)
    first, _ = make_pairs(model_path, tokenizer, rows, by_place(4), config, engine=engine)
    assert len(engine.requests) == 20
    reward = by_place(4)
    again, _ = make_pairs(model_path, tokenizer, rows, reward, config)
    assert not engines  # none is started for a run that is complete
    assert again.to_list() == first.to_list()
    (Path(model_path) / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds shards of another run: model was"):
        make_pairs(model_path, tokenizer, rows, reward, config)


def test_the_revision_of_a_hub_id(engines, model_path: str, tokenizer, rows, tmp_path: Path, monkeypatch) -> None:
    """It has other end tokens than the main one; a branch that has moved on is another model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--own--model"
    for commit, ends in (("a" * 40, [1]), ("b" * 40, ENDS), ("c" * 40, ENDS)):
        shutil.copytree(model_path, repository / "snapshots" / commit)
        settings = repository / "snapshots" / commit / "generation_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": ends}))

    def point(**branches: str) -> None:
        for branch, commit in branches.items():
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / branch).write_text(commit * 40)

    def make(**which: Any) -> Any:
        config = PairsConfig(max_completion_length=3, use_vllm=True, output_file=str(tmp_path / "pairs.parquet"))
        return make_pairs("own/model", tokenizer, rows, reward, config, **which)

    reward = by_place(4)
    point(main="a", v1="b")
    make(revision="v1", dtype="float16")
    assert engines[0].settings.items() >= {"revision": "v1", "tokenizer_revision": "v1", "dtype": "float16"}.items()
    assert engines[0].requests[0][1].stop_token_ids == ENDS
    make(revision="v1", dtype="float16")
    with pytest.raises(ValueError, match=r"holds shards of another run: dtype was \"float16\", is \"auto\"\. Remove"):
        make(revision="v1")
    with pytest.raises(ValueError, match=r"another run: eos_ids was .*; model was"):
        make(dtype="float16")
    point(v1="c")
    with pytest.raises(ValueError, match=r"another run: model was [^;]*\. Remove"):
        make(revision="v1", dtype="float16")
    assert len(engines) == 1


def test_prompts_too_long_for_the_engine(engines, model_path: str, tokenizer, rows) -> None:
    config = PairsConfig(max_completion_length=4, use_vllm=True, vllm_max_model_length=10)
    with pytest.raises(ValueError, match="row 4 has 8 tokens, which with a completion of 4 are more than the 10"):
        make_pairs(model_path, tokenizer, rows, by_place(4), config)
    assert not engines[0].requests


def test_other_prompts_than_asked(engines, model, model_path: str, tokenizer, rows, monkeypatch) -> None:
    engine = FakeLLM(model)
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *args, **kwargs: generate(*args, **kwargs)[::-1])
    config = PairsConfig(max_completion_length=2, use_vllm=True)
    with pytest.raises(ValueError, match="their order or their tokens changed"):
        make_pairs(model_path, tokenizer, rows, by_place(4), config, engine=engine)


def test_without_vllm(model_path: str, tokenizer, rows, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"needs vLLM, which cannot be imported here .*: pip install vllm"):
        make_pairs(model_path, tokenizer, rows, by_place(4), PairsConfig(max_completion_length=2, use_vllm=True))
