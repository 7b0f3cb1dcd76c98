"""PPO on two processes gives the gradients of one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.trainers.ranks import run
from tests.trainers.ppo_worker import KINDS, main, one_update

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    return run(main, "ddp", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_gradients_of_one(ranks, tmp_path: Path, kind: str) -> None:
    """16 completions: as one micro-batch, as four, and as two on each of two processes; policy, values and figures."""
    whole = one_update(tmp_path, kind, 16, 1)
    splits = [one_update(tmp_path, kind, 4, 4), *(rank[kind] for rank in ranks)]
    assert [split["wrapped"] for split in splits] == [False, True, True]
    for part in ("", "values."):
        named = [name for name in whole["change"] if name.startswith("values.") == bool(part)]
        largest = max(float(whole["change"][name].abs().max()) for name in named)
        assert largest > 1e-4
        for split in splits:
            for name in named:
                torch.testing.assert_close(split["change"][name], whole["change"][name], rtol=0, atol=2e-5 * largest, msg=name)
    for split in splits:
        for name, values in whole["logged"].items():
            assert split["logged"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
        assert split["coef"] == pytest.approx(whole["coef"], rel=1e-9)
    assert splits[1]["coef"] == splits[2]["coef"]  # to the bit
    for name, change in splits[1]["change"].items():
        assert torch.equal(change, splits[2]["change"][name]), name


def test_both_processes_stop_at_the_same_step(ranks) -> None:
    assert ranks[0]["stops"] == ranks[1]["stops"] == [1, 0, 0, 0]
