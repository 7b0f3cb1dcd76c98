"""A run of pairs that is killed, as a machine is: `test_pairs_resume.py` starts it and goes on with what it left."""

import os
import signal
from typing import Any

from dppo_kernels.trainers import PairsConfig, make_pairs
from tests.trainers import conftest


class Reward:
    """Deterministic; stops at its call number `_stop_at`, as told by `_how`."""

    def __init__(self, stop_at: int | None = None, how: str = "raise") -> None:
        self._stop_at, self._how, self._calls = stop_at, how, 0

    def __call__(self, completions: list[Any], row: list[int], **kwargs: Any) -> list[float | None]:
        self._calls += 1
        if self._calls - 1 == self._stop_at:
            if self._how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the reward failed")
        lengths = conftest.reward_length(completions)
        return [None if (r + i) % 7 == 0 else length / 3 for i, (r, length) in enumerate(zip(row, lengths, strict=True))]


def run(output_file: str, reward: Any, model: Any = None, **changes: Any) -> Any:
    from datasets import Dataset

    tokenizer = conftest.tokenizer.__wrapped__()
    rows = changes.pop("rows", None) or Dataset.from_dict({"prompt": [f"{i}+{i * i}=" for i in range(11)], "row": range(11)})
    settings = {"max_completion_length": 6, "batch_size": 3, "output_file": output_file, "extra_columns": ["row"], **changes}
    return make_pairs(model or conftest.model.__wrapped__(tokenizer), tokenizer, rows, reward, PairsConfig(**settings))


def main(output_file: str, stop_at: int) -> None:
    run(output_file, Reward(stop_at, "kill"))
