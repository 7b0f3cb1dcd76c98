"""Rows cut out of GRPO's batches and put together again: nothing that counts changes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels.trainers import rollout_groups
from dppo_kernels.trainers.rollout_groups import blank_rows, concatenate, hand_over, take_rows

PAD = 7


def batch(seed: int, rows: int, prompt: int, width: int) -> dict[str, Any]:
    """What GRPO returns: prompts padded on the left, completions on the right, some completions masked out altogether."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    prompt_mask = (torch.arange(prompt) >= draw(prompt, rows, 1)).long()
    completion_mask = (torch.arange(width) <= draw(width, rows, 1)).long() * (draw(5, rows, 1) > 0)
    topk = (draw(3, rows, width, 2) > 0) & completion_mask[..., None].bool()
    return {
        "prompt_ids": torch.where(prompt_mask > 0, draw(50, rows, prompt) + 10, PAD),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.where(completion_mask > 0, draw(50, rows, width) + 10, PAD),
        "completion_mask": completion_mask,
        "advantages": torch.randn(rows, generator=generator),
        "stale": draw(2, rows).bool(),
        "old_per_token_logps": -torch.rand(rows, width, generator=generator) * completion_mask,
        "rollout_topk_ids": torch.where(topk, draw(50, rows, width, 2), -1),
        "rollout_topk_valid": topk,
        "importance_sampling_ratio": torch.rand(rows, 1, generator=generator),
        "num_items_in_batch": completion_mask.sum(),
    }


def row_contents(x: dict[str, Tensor], row: int) -> dict[str, Any]:
    """What a row says, padding left out."""
    prompt, completion = x["prompt_mask"][row].bool(), x["completion_mask"][row].bool()
    contents: dict[str, Any] = {}
    for name, values in x.items():
        if values.dim() < 2 or name == "importance_sampling_ratio":
            contents[name] = values[row].tolist()
        elif name.startswith("prompt"):
            contents[name] = values[row][prompt].tolist()
        else:
            contents[name] = values[row][completion].tolist()
    return contents


shapes = st.tuples(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@given(st.lists(shapes, min_size=1, max_size=4))
def test_rows_survive_being_cut_and_joined(cases: list[tuple[int, int, int, int]]) -> None:
    batches = [batch(*case) for case in cases]
    groups = [take_rows(x, slice(1, None) if len(x["advantages"]) > 1 else slice(0, 1), per_sequence=SEQUENCE) for x in batches]
    joined = concatenate(groups, pad_token_id=PAD, per_sequence=SEQUENCE)
    assert "num_items_in_batch" not in joined  # a scalar is of a batch, not of rows
    expected = [row_contents(x, row) for x in groups for row in range(len(x["advantages"]))]
    assert [row_contents(joined, row) for row in range(len(joined["advantages"]))] == expected
    for x in batches:
        first = 1 if len(x["advantages"]) > 1 else 0
        for row in range(first, len(x["advantages"])):
            original = row_contents({k: v for k, v in x.items() if v.dim()}, row)
            assert original == expected.pop(0)
    # No column without a use, and padding is what GRPO pads with.
    assert joined["prompt_mask"].any(0).all()
    assert joined["completion_mask"].any(0)[1:].all()
    assert (joined["completion_ids"][joined["completion_mask"] == 0] == PAD).all()
    assert (joined["prompt_ids"][joined["prompt_mask"] == 0] == PAD).all()
    assert (joined["rollout_topk_ids"][~joined["rollout_topk_valid"]] == -1).all()
    widths = {
        joined[name].shape[1] for name in ("completion_ids", "completion_mask", "old_per_token_logps", "rollout_topk_ids")
    }
    assert len(widths) == 1
    assert joined["importance_sampling_ratio"].shape[1] == 1


SEQUENCE = ("importance_sampling_ratio",)


def test_blank_rows_have_nothing_to_train_on() -> None:
    rows = take_rows(batch(0, 3, 4, 5), slice(0, 3), per_sequence=SEQUENCE)
    blank = blank_rows(rows, 2)
    assert not blank["completion_mask"].any()
    assert not blank["advantages"].any()
    assert not blank["stale"].any()
    assert blank["prompt_mask"].any(1).all()  # a row without any token would give NaN in attention
    assert {name: x.shape[1:] for name, x in blank.items()} == {name: x.shape[1:] for name, x in rows.items()}
    assert rows["completion_mask"].any()  # the template is as it was


def test_groups_move_to_who_trains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other; what one sends is what the other is told."""
    owners, takers = [0, 0, 0, 1], [0, 0, 1, 1]
    groups = [take_rows(batch(seed, 2, 3, 4), slice(0, 2)) for seed in range(4)]
    sent: list[Any] = []
    monkeypatch.setattr(rollout_groups, "gather_object", lambda mine: sent.extend(mine) or sent)
    first = hand_over({0: groups[0], 1: groups[1], 2: groups[2]}, takers, owners, 0)
    second = hand_over({3: groups[3]}, takers, owners, 1)
    assert [place for place, _ in sent] == [2]
    assert sorted(first) == [0, 1]
    assert sorted(second) == [2, 3]
    for place, rows in (*first.items(), *second.items()):
        assert all(torch.equal(rows[name], groups[place][name]) for name in rows)


def test_nothing_is_sent_where_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_groups, "gather_object", lambda mine: pytest.fail("a collective without need"))
    rows = take_rows(batch(0, 2, 3, 4), slice(0, 2))
    assert hand_over({1: rows}, [0, 1], [0, 1], 1) == {1: rows}
