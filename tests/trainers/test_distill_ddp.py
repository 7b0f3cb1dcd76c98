"""PPO with a teacher on two processes gives the gradients of one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.trainers.ranks import run
from tests.trainers.distill_worker import DATA, main, one_update

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    return run(main, "ddp", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("data", DATA)
def test_two_processes_give_the_gradients_of_one(ranks, tmp_path: Path, data: str) -> None:
    """16 completions: as one micro-batch, as four, and as two on each of two processes, of whatever lengths."""
    whole = one_update(tmp_path, data, 16, 16, 1)
    splits = [one_update(tmp_path, data, 16, 4, 4), *(rank[data] for rank in ranks)]
    assert [split["processes"] for split in splits] == [1, 2, 2]
    largest = max(float(change.abs().max()) for change in whole["change"].values())
    assert largest > 1e-4
    for split in splits:
        for name, change in whole["change"].items():
            torch.testing.assert_close(split["change"][name], change, rtol=0, atol=2e-5 * largest, msg=name)
        for name, values in whole["logged"].items():
            assert split["logged"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert splits[1]["moments"] == splits[2]["moments"]  # to the bit
    for name, change in splits[1]["change"].items():
        assert torch.equal(change, splits[2]["change"][name]), name
