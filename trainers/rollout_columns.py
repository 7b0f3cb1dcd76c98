"""Top-K columns of a rollout: how they are ranked, checked and kept aligned with their tokens."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Engines round: a log-prob may end up this much above 0.
MAX_LOGPROB = 1e-3
# vLLM's server writes this for -inf, which JSON lacks.
IMPOSSIBLE = -9999.0


class CapturedLogprob(float):
    """A sampled token's log-prob that remembers its row in the store of top-K columns.

    TRL slices, concatenates and interleaves the lists of log-probs (tool turns, truncation); carrying the row number in the
    list keeps columns and tokens aligned through all of it. Tokens the policy did not write are plain floats.
    """

    row: int

    def __new__(cls, value: float, row: int) -> "CapturedLogprob":
        captured = super().__new__(cls, value)
        captured.row = row
        return captured


class RolloutStore:
    """Top-K columns of all tokens of one call of `generate and score`, one row per token; row 0 stands for "not captured"."""

    def __init__(self, k: int) -> None:
        self.k = k
        nothing = torch.full((1, k + 1), -1), torch.zeros(1, k + 1), torch.zeros(1, k + 1, dtype=torch.bool)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = [nothing]  # ids, logprobs, valid, each [rows, K+1]
        self._rows = 1

    def add(self, ids: Tensor, logprobs: Tensor, valid: Tensor) -> int:
        """Append rows; returns the number of the first."""
        first, self._rows = self._rows, self._rows + ids.shape[0]
        self._parts.append((ids, logprobs, valid))
        return first

    def columns(self, logprobs: Sequence[Sequence[float]], width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, logprobs, valid [B, width, K+1] for per-token lists of log-probs; id -1 and valid False where not captured."""
        rows = torch.zeros(len(logprobs), width, dtype=torch.long)
        for b, sequence in enumerate(logprobs):
            rows[b, : len(sequence)] = torch.tensor([getattr(value, "row", 0) for value in sequence], dtype=torch.long)
        rows = rows.to(device)
        ids, values, valid = (torch.cat([x.to(device) for x in parts])[rows] for parts in zip(*self._parts, strict=True))
        return ids, values, valid


def ranked_columns(
    sampled_ids: Sequence[int],
    ids: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float | None]],
    *,
    k: int,
    vocab: int,
    place: str,
) -> tuple[list[float], tuple[Tensor, Tensor, Tensor]]:
    """The sampled tokens' log-probs, found by id, and the K+1 columns of one completion's top entries.

    Entries may come in any order, repeat an id (the first counts) and be fewer than K; columns 0..K-1 are the K largest by
    (log-prob descending, id ascending), column K is the sampled token where it is not among them. A token without entries has
    log-prob 0 and no valid column: the policy did not write it.

    Args:
        sampled_ids: [T].
        ids: [T][any number] token ids.
        logprobs: the same shape; -inf is an impossible token.
        k: K, may be 0.
        vocab: ids must be in [0, vocab).
        place: which completion of which source, for messages.

    Returns:
        [T] floats, and ids (-1 where invalid), logprobs (0 where invalid), valid: each [T, K+1].

    Raises:
        ValueError: shapes, ids or values that do not fit, a sampled token without entry or impossible; with its position.
    """
    if not len(sampled_ids) == len(ids) == len(logprobs):
        raise ValueError(
            f"{place} has {len(sampled_ids)} tokens, {len(ids)} rows of top-K ids and {len(logprobs)} rows of top-K log-probs"
        )
    for t, (row, values) in enumerate(zip(ids, logprobs, strict=True)):
        if len(row) != len(values):
            raise ValueError(f"{place}, token {t}: {len(row)} top-K ids and {len(values)} top-K log-probs")
    width = max([k + 1, *map(len, ids)])
    absent = torch.iinfo(torch.int64).max  # sorts behind every id
    id_rows = torch.tensor([[*row, *[absent] * (width - len(row))] for row in ids], dtype=torch.long).view(-1, width)
    value_rows = torch.tensor(
        [[*(math.nan if v is None else v for v in row), *[-math.inf] * (width - len(row))] for row in logprobs],
        dtype=torch.float64,
    ).view(-1, width)
    entry = id_rows != absent
    wrong = entry & ((id_rows < 0) | (id_rows >= vocab))
    if wrong.any():
        t = int(wrong.any(1).int().argmax())
        raise ValueError(f"{place}, token {t}: ids must be in [0, {vocab}), the trained model's vocabulary, got {list(ids[t])}")
    wrong = ~(value_rows <= MAX_LOGPROB)  # NaN compares False
    if wrong.any():
        t = int(wrong.any(1).int().argmax())
        value = logprobs[t][int(wrong[t].int().argmax())]
        raise ValueError(f"{place}, token {t} holds log-prob {value}; log-probs are numbers of at most 0")

    id_rows, order = id_rows.sort(dim=1, stable=True)
    value_rows, entry = value_rows.gather(1, order), entry.gather(1, order)
    entry[:, 1:] &= id_rows[:, 1:] != id_rows[:, :-1]
    # Stable, so that equal values stay in the order of their ids; an impossible token is still before an absent one.
    order = torch.where(entry, value_rows.clamp(min=-1e300), -math.inf).argsort(dim=1, descending=True, stable=True)
    id_rows, value_rows, entry = (x.gather(1, order) for x in (id_rows, value_rows, entry))

    is_sampled = entry & (id_rows == torch.tensor(sampled_ids, dtype=torch.long)[:, None])
    written, position = entry.any(1), is_sampled.int().argmax(1, keepdim=True)
    sampled = torch.where(written, value_rows.gather(1, position).squeeze(1), 0.0)
    wrong = written & ~(is_sampled.any(1) & (sampled > IMPOSSIBLE))
    if wrong.any():
        t = int(wrong.int().argmax())
        has = f"has log-prob {sampled[t]}" if is_sampled[t].any() else f"is not among the returned ids {list(ids[t])}"
        raise ValueError(f"{place}, token {t}: the sampled id {sampled_ids[t]} {has}, so its probability is unknown")

    outside = written & (position.squeeze(1) >= k)
    valid = torch.cat([entry[:, :k], outside[:, None]], 1)
    columns = (torch.cat([x[:, :k], x.gather(1, position)], 1) for x in (id_rows, value_rows))
    ids_, values_ = (torch.where(valid, x, nothing) for x, nothing in zip(columns, (-1, 0.0), strict=True))
    return sampled.tolist(), (ids_, values_.float(), valid)
