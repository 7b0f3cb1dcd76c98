"""A run of pairs that can be killed, as a machine is: `test_pairs_resume.py` starts it and goes on with what it left.

It starts fast: TRL and the trainers are not imported.
"""

import os
import signal
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from dppo_kernels.trainers.pairs import make_pairs
from dppo_kernels.trainers.pairs_config import PairsConfig

PROMPTS = [f"{i}+{i * i}=" for i in range(11)]


class Reward:
    """Deterministic; stops at its call number `stop_at`, from 0."""

    def __init__(self, stop_at: int | None = None, kill: bool = False) -> None:
        self._stop_at, self._kill, self._calls = stop_at, kill, 0

    def __call__(self, completions: list[str], row: list[int], **kwargs: Any) -> list[float | None]:
        self._calls += 1
        if self._calls - 1 == self._stop_at:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the reward failed")
        places = enumerate(zip(row, completions, strict=True))
        return [None if (r + i) % 7 == 0 else (len(text) + sum(map(ord, text)) % 5) / 3 for i, (r, text) in places]


def run(folder: str, output_file: str, reward: Any, **changes: Any) -> Any:
    """Pairs by the model saved in `folder`."""
    rows = changes.pop("rows", None) or Dataset.from_dict({"prompt": PROMPTS, "row": range(11)})
    model = changes.pop("model", None) or Qwen3ForCausalLM.from_pretrained(folder)
    settings = {"max_completion_length": 6, "batch_size": 3, "output_file": output_file, "extra_columns": ["row"], **changes}
    return make_pairs(model, PreTrainedTokenizerFast.from_pretrained(folder), rows, reward, PairsConfig(**settings))


def main(folder: str, output_file: str, stop_at: int) -> None:
    run(folder, output_file, Reward(stop_at, kill=True))
