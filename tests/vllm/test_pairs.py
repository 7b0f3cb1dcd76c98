"""Preference pairs by a real vLLM engine: greedy tokens are the model's own, ends and budget hold, seeds repeat."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset

from dppo_kernels.trainers import PairsConfig, make_pairs

pytestmark = pytest.mark.vllm

ENDS = [1, *range(40, 60)]
COLD = 0.01


def test_pairs_by_an_engine(start_engine, model, model_path: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in reach, also where no trainer has started it
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(tmp_path / "model")  # the same weights, with more end tokens
    llm = start_engine(
        model=str(model_path), logprobs_mode="processed_logprobs", max_model_len=64, gpu_memory_utilization=0.3, seed=0
    )
    # The run's one engine: tests before this one have trained it.
    engine_model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    engine_model.load_weights(list(model.state_dict().items()))
    llm.reset_prefix_cache()
    rows = Dataset.from_dict({"prompt": [f"{10**i}+{i}=" for i in range(6)], "row": range(6)})
    seen: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float]:
        seen.append(columns)
        return [float(i % 3 == r % 3) - (i % 3 == (r + 1) % 3) for i, r in enumerate(columns["row"])]

    def make(name: str, **changes: Any) -> Any:
        settings = {"temperatures": [COLD, 1.0, 1.5], "max_completion_length": 8, "use_vllm": True, **changes}
        config = PairsConfig(output_file=str(tmp_path / f"{name}.parquet"), **settings)
        return make_pairs(str(tmp_path / "model"), tokenizer, rows, reward, config, engine=llm)

    pairs, statistics = make("first")
    completions = seen[0]["completion_ids"]
    for row, prompt in enumerate(rows["prompt"]):
        ids, written = tokenizer(prompt)["input_ids"], completions[3 * row]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
        lost = logits.max(-1).values - logits[range(len(written)), written]
        assert lost.max() < 20 * COLD  # e^-20
    cut = [ids[-1] not in ENDS for ids in completions]
    assert 0 < sum(cut) == statistics.truncated < 18
    assert all(len(ids) == 8 for ids, truncated in zip(completions, cut, strict=True) if truncated)
    assert not any(token in ENDS for ids in completions for token in ids[:-1])
    assert statistics.generated_tokens == sum(map(len, completions))
    assert statistics.chosen_by_temperature == statistics.rejected_by_temperature == (2, 2, 2)
    for row, (prompt, chosen) in enumerate(zip(rows["prompt"], pairs["chosen"], strict=True)):
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(ids) + chosen == tokenizer.decode(
            ids + completions[3 * row + row % 3], skip_special_tokens=True
        )
    loaded = load_dataset("parquet", data_files=str(tmp_path / "first.parquet"), split="train", cache_dir=str(tmp_path))
    assert loaded.to_list() == pairs.to_list()

    again, _ = make("again", batch_size=2)
    assert again.to_list() == pairs.to_list()  # each request has a seed of its own
    other, _ = make("other", seed=1)
    assert other["chosen"][:] != pairs["chosen"][:]
