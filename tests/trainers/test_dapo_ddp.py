"""DAPO on two processes: one gradient however a step is split, and the same groups chosen on both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.trainers.ranks import run
from tests.trainers.dapo_worker import KINDS, main, one_step
from tests.trainers.test_train import tags

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `dapo_worker` wrote."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    ranks = run(main, "ddp", out)
    assert all(rank["world"] == 2 and rank["sampling"]["wrapped"] for rank in ranks)
    return ranks


@pytest.mark.parametrize("kind", ["plain", "filtered"])
def test_the_gradient_does_not_depend_on_how_a_step_is_split(ranks, tmp_path, kind: str) -> None:
    """16 completions of 1 to 9 tokens: as one micro-batch, as 2, 4 and 8, and as two on each of two processes."""
    filtered = kind == "filtered"
    whole = one_step(tmp_path, 16, 1, filtered)
    [total] = whole["tokens"]
    assert whole["step_tokens"] == [total]
    largest = max(float(g.abs().max()) for g in whole["gradient"].values())
    assert largest > 0.01
    splits = [one_step(tmp_path, 16 // n, n, filtered) for n in (2, 4, 8)] + [rank["steps"][kind] for rank in ranks]
    for split in splits:
        assert set(split["step_tokens"]) == {total}
        assert len(set(split["tokens"])) > 1  # dividing by the tokens of each micro-batch would show
        for name, g in split["gradient"].items():
            torch.testing.assert_close(g, whole["gradient"][name], rtol=0, atol=1e-6 * max(1.0, largest), msg=name)
    assert all(sum(split["tokens"]) == total for split in splits[:3])
    assert sum(splits[3]["tokens"]) + sum(splits[4]["tokens"]) == total


def test_two_ranks_choose_the_same_groups(ranks) -> None:
    """One rank makes five of six mixed groups: some are trained by the other one. With carried groups, and resumed."""
    first, second = (rank["sampling"] for rank in ranks)
    assert first["resumed_equal"]
    assert second["resumed_equal"]
    assert first["weights"] == second["weights"]
    assert first["logged"] == second["logged"]
    assert first["logged"]["frac_reward_zero_std"] == [0] * 4
    # Without shuffling, rounds are prompts 0 to 11, 12 to 23, ...; each rank generates half of them.
    rounds = [a + b for a, b in zip(first["generated"], second["generated"], strict=True)]
    assert [row % 72 for rows in rounds for row in rows] == [row % 72 for row in range(12 * len(rounds))]
    waiting: list[int] = []
    remaining = iter(rounds)
    moved = 0
    for step in range(4):
        fresh: list[int] = []
        while len(waiting) + len(fresh) < 4:
            fresh += [row for row in next(remaining) if KINDS[row] == "mixed"]
        good = waiting + fresh
        trained = first["trained"][step] + second["trained"][step]
        assert sorted(trained) == sorted(good[:4])
        assert len(first["trained"][step]) == len(second["trained"][step]) == 2
        stale = first["stale"][step] + second["stale"][step]
        assert {row for row, is_stale in zip(trained, stale, strict=True) if is_stale} == set(waiting[:4])
        assert first["items"][step] == second["items"][step] == first["tokens"][step] + second["tokens"][step]
        moved += sum(row % 12 < 6 for row in second["trained"][step])
        waiting = fresh[max(0, 4 - len(waiting)) :][:4]
    assert moved >= 2
    assert next(remaining, None) is None


def test_accuracy_that_one_rank_alone_reports(ranks) -> None:
    """Rounds are prompts 0 and 1, 2 and 3, ...: the first rank's are kept, and the second one trains two of them."""
    assert [rank["one_rank_reports"] for rank in ranks] == [[0, 2], [4, 6]]


def test_the_command_trains_on_two_ranks(ranks, out) -> None:
    assert sorted(rank["said"].count("held-out answers that are right: ") for rank in ranks) == [0, 1]
    assert len(tags(out / "cli")["eval/answers/correct"]) == 2
    assert (out / "cli" / "model.safetensors").is_file()
