"""DAPO's dynamic sampling as pure bookkeeping: which prompts are drawn, which groups are trained on, where their rows go.

A group is the completions of one prompt. Rounds of prompts are generated until a training batch of groups with mixed answers
is full. Everything here is a function of what all processes know, so that they decide alike without talking.

Source: DAPO, arXiv 2503.14476, section 3.2, and the recipe of verl.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Verdict = Literal["mixed", "all_correct", "all_wrong", "no_signal"]

EXHAUSTED_POLICIES = ("error", "train", "top_up")
SURPLUS_POLICIES = ("drop", "carry")


class PromptStream:
    """An endless stream of dataset rows; every epoch is a permutation, the one that TRL's sampler draws for it.

    Its whole state is `position`, the number of rows drawn so far.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool) -> None:
        if size < 1:
            raise ValueError(f"`size` must be at least 1 prompt, got {size}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.position = 0
        self._order: list[int] = []
        self._epoch = -1  # of `_order`

    @property
    def epochs(self) -> float:
        """Passes over the dataset so far."""
        return self.position / self.size

    def take(self, count: int) -> list[int]:
        """The next `count` rows; across the end of an epoch into the next one."""
        rows = []
        while count:
            epoch, start = divmod(self.position, self.size)
            part = self._permutation(epoch)[start : start + count]
            rows += part
            self.position += len(part)
            count -= len(part)
        return rows

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        if epoch != self._epoch:
            if epoch < self._epoch or self._epoch < 0:  # a permutation depends on all before it: start over
                self._generator = torch.Generator().manual_seed(self.seed)
                self._epoch = -1
            for _ in range(epoch - self._epoch):
                order = torch.randperm(self.size, generator=self._generator)
            self._order, self._epoch = order.tolist(), epoch
        return self._order


class Group(NamedTuple):
    """Where a group was generated. `round` -1: carried over from the batch before."""

    round: int
    place: int  # among the groups of its round over all processes


@dataclass(frozen=True)
class RefillRule:
    """How a training batch is filled.

    Args:
        need: groups that a training batch holds.
        per_round: prompts generated at a time, or at most where rounds are fitted.
        fitted: make rounds as large as what is missing asks for, by the share of groups kept so far, rather than `per_round`
            always; the last one allowed is not.
        multiple: rounds are multiples of it, as `per_round` is; the number of processes.
        max_rounds: rounds before giving up; 0 or less = no limit.
        exhausted: what then: "error"; "train" on the groups found; "top_up" with groups that were filtered out.
        surplus: "drop" groups beyond `need`, or "carry" them over to the next batch, once.
    """

    need: int
    per_round: int
    fitted: bool = False
    multiple: int = 1
    max_rounds: int = 0
    exhausted: str = "error"
    surplus: str = "drop"

    def round_size(self, missing: int, kept: int, generated: int, rounds: int) -> int:
        """Prompts of the next round.

        A fitted round expects the share (kept + 1) / (generated + 2) of its groups to be kept, and allows for one standard
        deviation less, so that it is seldom followed by a tiny one: a round takes as long as its longest completion.

        Args:
            missing: groups that the batch lacks.
            kept: groups with mixed answers, of the `generated` ones of this batch.
            rounds: how many there were.
        """
        if not self.fitted or rounds + 1 == self.max_rounds:
            return self.per_round
        share = (kept + 1) / (generated + 2)
        wanted = math.ceil((missing + math.sqrt(missing * (1 - share))) / share)
        return min(math.ceil(wanted / self.multiple) * self.multiple, self.per_round)


@dataclass
class Collected:
    """One training batch, in the order in which its prompts were drawn."""

    trained: list[Group] = field(default_factory=list)
    carried: list[Group] = field(default_factory=list)  # for the next batch
    rounds: int = 0
    surplus: int = 0  # groups with mixed answers beyond what the batch holds
    verdicts: Counter[Verdict] = field(default_factory=Counter)  # of all groups generated for it

    def share(self, verdict: Verdict) -> float:
        """Of the groups generated for this batch; NaN where none were."""
        total = self.verdicts.total()
        return self.verdicts[verdict] / total if total else math.nan


def collect(
    prompts: PromptStream,
    rule: RefillRule,
    generate: Callable[[list[int]], Sequence[Verdict]],
    carried: int = 0,
) -> Collected:
    """Generate rounds of new prompts until a training batch is full.

    Args:
        prompts: advanced by the size of every round.
        rule: how many, and what to do when they do not suffice or are too many.
        generate: completes the prompts of these dataset rows; returns one verdict a group.
        carried: groups left over from the batch before; they come first, and cannot be carried again.

    Raises:
        RuntimeError: the rounds are used up under "error", or gave nothing to train on; or, without a limit of rounds, a whole
            pass over the prompts gave no group to keep.
    """
    kept = [Group(-1, index) for index in range(carried)]
    filtered: list[Group] = []
    result = Collected()
    kept_at = prompts.position  # where a group was found last
    while len(kept) < rule.need and not 0 < rule.max_rounds <= result.rounds:
        seen = result.verdicts
        size = rule.round_size(rule.need - len(kept), seen["mixed"], seen.total(), result.rounds)
        verdicts = generate(prompts.take(size))
        result.verdicts.update(verdicts)
        for index, verdict in enumerate(verdicts):
            (kept if verdict == "mixed" else filtered).append(Group(result.rounds, index))
        result.rounds += 1
        if "mixed" in verdicts:
            kept_at = prompts.position
        if rule.max_rounds <= 0 and len(kept) < rule.need and prompts.position - kept_at >= prompts.size:
            raise RuntimeError(
                f"a whole pass over {prompts.size} prompts gave no group with mixed answers ({_describe(result)}): they are "
                "too easy or too hard, or the reward never varies. `max_filter_gen_batches` bounds the search"
            )
    missing = rule.need - len(kept)
    if missing > 0:
        found = f"{len(kept)} of {rule.need} groups with mixed answers after {result.rounds} rounds"
        if rule.exhausted == "error":
            raise RuntimeError(
                f"{found} ({_describe(result)}): raise `max_filter_gen_batches` or `filter_gen_batch_size`, filter the prompts "
                "by difficulty, or choose `filter_exhausted`='train' or 'top_up'"
            )
        if rule.exhausted == "top_up":
            kept += filtered[:missing]
        if not kept:
            raise RuntimeError(f"{found} ({_describe(result)}): there is nothing to train on")
    result.trained, beyond = kept[: rule.need], kept[rule.need :]
    result.surplus = len(beyond)
    if rule.surplus == "carry":
        # What was carried already would be two batches old; what the next batch cannot hold would be too.
        result.carried = [group for group in beyond if group.round >= 0][: rule.need]
    return result


def _describe(result: Collected) -> str:
    return ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in sorted(result.verdicts.items()))


def share_out(owners: Sequence[int], processes: int) -> list[int]:
    """Which process trains each group: its owner while that has room, so that few groups move; every process gets as many.

    Args:
        owners: process that generated each group of the batch.
        processes: how many there are; each takes at most ``ceil(len(owners) / processes)`` groups.
    """
    room = [math.ceil(len(owners) / processes)] * processes
    takers: list[int | None] = []
    for owner in owners:
        takers.append(owner if room[owner] else None)
        room[owner] -= bool(room[owner])
    shared = []
    for taker in takers:
        if taker is None:
            taker = next(process for process, free in enumerate(room) if free)
            room[taker] -= 1
        shared.append(taker)
    return shared


def judge(metric: Tensor, rewards: Tensor) -> list[Verdict]:
    """What a group is good for.

    "mixed": the metric varies in it, and the reward too, so that there are advantages. "all_correct", "all_wrong": the metric
    is the same everywhere, above 0 or not. "no_signal": the reward does not vary, or the metric is known of one completion at
    most.

    Args:
        metric: [groups, G], accuracy or what stands for it; NaN = unknown, left out.
        rewards: [groups, G], what advantages are made of; NaN = left out.
    """
    known = ~metric.isnan()
    highest = torch.where(known, metric, -torch.inf).amax(1)
    varies = highest > torch.where(known, metric, torch.inf).amin(1)
    scored = ~rewards.isnan()
    count = scored.sum(1)
    mean = torch.where(scored, rewards, 0.0).sum(1) / count.clamp(min=1)
    spread = torch.where(scored, rewards - mean[:, None], 0.0).square().sum(1) / (count - 1).clamp(min=1)
    moves = ~torch.isclose(spread.sqrt(), torch.zeros_like(spread))  # TRL's test for a standard deviation of 0
    verdicts: list[Verdict] = []
    for group in range(len(metric)):
        if varies[group]:
            verdicts.append("mixed" if moves[group] else "no_signal")
        elif known[group].sum() < 2:
            verdicts.append("no_signal")
        else:
            verdicts.append("all_correct" if highest[group] > 0 else "all_wrong")
    return verdicts
