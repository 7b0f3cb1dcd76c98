"""Dynamic sampling's bookkeeping against a plain oracle, over thousands of batches."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_kernels.trainers.resume import EpochRepeatSampler
from dppo_kernels.trainers.sampling import Collected, Group, PromptStream, RefillRule, collect, judge, share_out

VERDICTS = ("mixed", "all_correct", "all_wrong", "no_signal")


class Oracle:
    """Draws one prompt at a time from a written-out list of epochs, and remembers every group by the number of its draw."""

    def __init__(self, size: int, rows: Iterator[int], verdicts: list[str], rule: RefillRule) -> None:
        self.size, self.rows, self.verdicts, self.rule = size, rows, verdicts, rule
        self.drawn: list[int] = []  # dataset row of every draw
        self.waiting: list[int] = []  # draws carried over

    def next_round(self, good: int, fresh_from: int, rounds: int) -> int:
        if not self.rule.fitted or self.rule.max_rounds == rounds + 1:
            return self.rule.per_round
        seen = self.verdicts[fresh_from : len(self.drawn)]
        p = (seen.count("mixed") + 1) / (len(seen) + 2)
        missing = self.rule.need - good
        for size in range(self.rule.multiple, self.rule.per_round, self.rule.multiple):
            if size * p >= missing + (missing * (1 - p)) ** 0.5:  # enough, even one deviation below what is expected
                return size
        return self.rule.per_round

    def batch(self) -> tuple[list[int], list[int], int] | None:
        """(draws to train on, draws carried over, rounds), or None where the rule gives up."""
        fresh_from = len(self.drawn)
        good, bad, rounds = list(self.waiting), [], 0
        found_at = fresh_from  # draws made when the last good group was found, to the end of its round
        while len(good) < self.rule.need:
            if self.rule.max_rounds > 0 and rounds == self.rule.max_rounds:
                break
            round_from = len(self.drawn)
            for _ in range(self.next_round(len(good), fresh_from, rounds)):
                draw = len(self.drawn)
                self.drawn.append(next(self.rows))
                (good if self.verdicts[draw] == "mixed" else bad).append(draw)
            rounds += 1
            if good and good[-1] >= round_from:
                found_at = len(self.drawn)
            if self.rule.max_rounds == 0 and len(good) < self.rule.need and len(self.drawn) - found_at >= self.size:
                return None
        while len(good) < self.rule.need:
            if self.rule.exhausted == "error":
                return None
            if self.rule.exhausted == "train" or not bad:
                break
            good.append(bad.pop(0))
        if not good:
            return None
        train, left = good[: self.rule.need], good[self.rule.need :]
        self.waiting = [draw for draw in left if draw >= fresh_from][: self.rule.need] if self.rule.surplus == "carry" else []
        return train, self.waiting, rounds


def epochs(size: int, seed: int, shuffle: bool) -> Iterator[int]:
    """TRL's own order, which no code of ours makes."""
    sampler = EpochRepeatSampler(range(size), mini_repeat_count=1, batch_size=size, shuffle=shuffle, seed=seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from sampler


class Run:
    """The library's side: only a position and the number of carried groups survive from one batch to the next."""

    def __init__(self, size: int, seed: int, shuffle: bool, verdicts: list[str], rule: RefillRule) -> None:
        self.size, self.seed, self.shuffle, self.verdicts, self.rule = size, seed, shuffle, verdicts, rule
        self.position, self.carried = 0, []
        self.drawn: list[int] = []

    def batch(self) -> tuple[Collected, list[int], list[int]]:
        stream = PromptStream(self.size, seed=self.seed, shuffle=self.shuffle)  # as after every resume
        stream.position = self.position
        starts: list[int] = []

        def generate(rows: list[int]) -> list[Any]:
            start = len(self.drawn)
            starts.append(start)
            assert len(rows) % self.rule.multiple == 0
            assert 0 < len(rows) <= self.rule.per_round
            self.drawn += rows
            return [self.verdicts[draw] for draw in range(start, start + len(rows))]

        collected = collect(stream, self.rule, generate, carried=len(self.carried))

        def draw(group: Group) -> int:
            return self.carried[group.place] if group.round < 0 else starts[group.round] + group.place

        trained, carried = ([draw(group) for group in groups] for groups in (collected.trained, collected.carried))
        self.position, self.carried = stream.position, carried
        return collected, trained, carried


def test_ten_thousand_batches_equal_the_oracle() -> None:
    """Order, counts, carried groups and errors; resumed before every batch."""
    rng, batches, gave_up, carried_over = random.Random(0), 0, 0, 0
    while batches < 10_000:
        need, share = rng.randint(1, 6), rng.choice([0.1, 0.4, 0.9])
        rule = RefillRule(
            need=need,
            per_round=rng.randint(1, 5) * (multiple := rng.choice([1, 2])),
            fitted=rng.random() < 0.5,
            multiple=multiple,
            max_rounds=rng.choice([0, 1, 2, 5]),
            exhausted=rng.choice(["error", "train", "top_up"]),
            surplus=rng.choice(["drop", "carry"]),
        )
        size, seed, shuffle = rng.randint(40, 90), rng.randrange(2**31), rng.random() < 0.8
        verdicts = ["mixed" if rng.random() < share else rng.choice(VERDICTS[1:]) for _ in range(20_000)]
        oracle = Oracle(size, epochs(size, seed, shuffle), verdicts, rule)
        run = Run(size, seed, shuffle, verdicts, rule)
        for _ in range(50):
            drawn = len(oracle.drawn)
            expected, before = oracle.batch(), len(oracle.drawn)
            batches += 1
            if expected is None:
                with pytest.raises(RuntimeError):
                    run.batch()
                gave_up += 1
                break
            collected, trained, carried = run.batch()
            assert (trained, carried, collected.rounds) == expected
            assert run.drawn == oracle.drawn
            assert len(run.drawn) == run.position == before
            generated = before - drawn
            assert collected.verdicts.total() == generated
            assert rule.fitted or generated == collected.rounds * rule.per_round
            if generated:
                assert sum(collected.share(v) for v in VERDICTS) == pytest.approx(1)
                mixed = sum(verdicts[draw] == "mixed" for draw in range(before - generated, before))
                assert collected.share("mixed") == mixed / generated
            else:
                assert math.isnan(collected.share("mixed"))
            carried_over += len(carried)
        for start in range(0, len(run.drawn) - size, size):
            assert sorted(run.drawn[start : start + size]) == list(range(size))  # none lost, none repeated in an epoch
    assert gave_up > 20
    assert carried_over > 1000


def test_an_endless_search_is_an_error() -> None:
    stream = PromptStream(10, seed=0, shuffle=True)
    with pytest.raises(RuntimeError, match=r"a whole pass over 10 prompts gave no group .*12 all wrong"):
        collect(stream, RefillRule(need=2, per_round=4), lambda rows: ["all_wrong"] * len(rows))
    # Groups found before do not make it endless; the pass is counted from the last of them.
    rounds = itertools.count()

    def once(rows: list[int]) -> list[Any]:
        return ["mixed" if next(rounds) == 1 else "all_wrong", *["all_wrong"] * (len(rows) - 1)]

    with pytest.raises(RuntimeError, match=r"a whole pass over 10 prompts gave no group .*19 all wrong, 1 mixed"):
        collect(stream, RefillRule(need=3, per_round=4), once, carried=1)


def test_errors_say_what_was_found_and_what_to_do() -> None:
    def generate(rows: list[int]) -> list[Any]:
        return ["mixed", *["all_correct"] * (len(rows) - 1)]

    rule = RefillRule(need=4, per_round=3, max_rounds=2)
    with pytest.raises(RuntimeError, match=r"2 of 4 groups .* after 2 rounds \(4 all correct, 2 mixed\): raise"):
        collect(PromptStream(10, seed=0, shuffle=True), rule, generate)
    nothing = RefillRule(need=4, per_round=3, max_rounds=1, exhausted="train")
    with pytest.raises(RuntimeError, match="nothing to train on"):
        collect(PromptStream(10, seed=0, shuffle=True), nothing, lambda rows: ["no_signal"] * len(rows))
    with pytest.raises(ValueError, match="at least 1 prompt, got 0"):
        PromptStream(0, seed=0, shuffle=True)


@given(st.integers(1, 30), st.integers(0, 100), st.booleans(), st.lists(st.integers(0, 40), max_size=8))
def test_the_stream_does_not_depend_on_how_it_is_cut(size: int, seed: int, shuffle: bool, cuts: list[int]) -> None:
    stream = PromptStream(size, seed=seed, shuffle=shuffle)
    drawn = [row for cut in cuts for row in stream.take(cut)]
    whole = PromptStream(size, seed=seed, shuffle=shuffle)
    assert drawn == whole.take(sum(cuts))
    assert stream.position == sum(cuts)
    assert stream.epochs == sum(cuts) / size
    stream.position = 0  # a second run: back to the first permutation
    assert stream.take(size) == PromptStream(size, seed=seed, shuffle=shuffle).take(size)


@given(st.integers(1, 5).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, w - 1), min_size=1, max_size=20))))
def test_groups_are_shared_out_evenly_and_move_little(case: tuple[int, list[int]]) -> None:
    processes, owners = case
    takers = share_out(owners, processes)
    room = math.ceil(len(owners) / processes)
    assert len(takers) == len(owners)
    assert max(takers.count(p) for p in range(processes)) <= room
    moved = sum(taker != owner for taker, owner in zip(takers, owners, strict=True))
    assert moved == sum(max(0, owners.count(p) - room) for p in range(processes))


def test_verdicts() -> None:
    nan = math.nan
    cases = [  # metric, rewards, verdict
        ([1, 0, 1, 0], [1, -1, 1, -1], "mixed"),
        ([1, 1, 1, 1], [1, 1, 0.5, 1], "all_correct"),
        ([0, 0, 0, 0], [0, 0, 0, 0], "all_wrong"),
        ([-1, -1, -1, -1], [-1, -1, -1, -1], "all_wrong"),
        ([1, nan, 0, nan], [1, nan, 0, nan], "mixed"),
        ([1, nan, 1, 1], [1, nan, 1, 1], "all_correct"),
        ([nan, nan, nan, 1], [nan, nan, nan, 1], "no_signal"),
        ([0, 1, 0, 0], [0.3, 0.3, 0.3, 0.3], "no_signal"),  # there are right answers, but no advantage
    ]
    metric, rewards = (torch.tensor([case[i] for case in cases]) for i in (0, 1))
    assert judge(metric, rewards) == [verdict for _, _, verdict in cases]


def test_a_shaped_reward_does_not_keep_a_group_that_is_all_right() -> None:
    """The reason for a metric apart from the reward: a length penalty varies where nothing is to be learnt about answers."""
    rewards = torch.tensor([[1.0, 0.5, 1.0, 0.75]])
    assert judge(torch.ones(1, 4), rewards) == ["all_correct"]
    assert judge(rewards, rewards) == ["mixed"]


def test_fitted_rounds_leave_fewer_groups_over() -> None:
    """At the keep rates of a real run, against rounds as large as a batch."""
    rng = random.Random(1)
    for rate in (0.35, 0.6, 0.8, 0.95):
        made = {}
        for fitted in (False, True):
            rule = RefillRule(need=512, per_round=512, fitted=fitted, multiple=8)
            stream = PromptStream(17_000, seed=0, shuffle=True)
            rounds = []
            for _ in range(20):
                collected = collect(
                    stream, rule, lambda rows, rate=rate: ["mixed" if rng.random() < rate else "all_wrong" for _ in rows]
                )
                rounds.append(collected.rounds)
            made[fitted] = stream.position
            assert max(rounds) <= math.ceil(1 / rate) + 2
        assert made[True] <= made[False]
        assert made[True] < 1.06 * 20 * 512 / rate  # what it takes if every group is used
