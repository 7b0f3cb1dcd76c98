"""A head whose rows, the vocabulary, are shared out over the ranks of a process group: what is here, and sums over all ranks.

Every rank has the same hidden states and some rows of the head. Log-sum-exps, sums of ``p log p`` and logits of chosen ids are
sums over ranks of a few numbers per row, so a chunk of n rows costs one all-reduce of c n numbers, c a handful; the gradient of
the hidden states is one more sum, of [N, H], and that of the head is local. Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._lora import LoraWeight

_Part = TypeVar("_Part")
_Started = TypeVar("_Started")

# Stands for an id that another rank holds: no column has this number, and unlike a negative id it is no padding.
ELSEWHERE = 1 << 40


@dataclass(frozen=True)
class VocabShard:
    """Rows ``start .. start + rows`` of a head of `vocab` rows; the other ranks of the group hold the others."""

    group: str  # name of the process group
    start: int
    rows: int
    vocab: int
    ranks: int

    @classmethod
    def decode(cls, group: str, span: Sequence[int]) -> "VocabShard | None":
        """Of what an op's schema can take, see `encode`."""
        return cls(group, *span) if group else None

    @property
    def nominal_rows(self) -> int:
        """The same on all ranks: all cut their work into the same chunks, however uneven the shards are."""
        return -(-self.vocab // self.ranks)

    def local_targets(self, ids: Tensor) -> Tensor:
        """Columns of this shard; ids before it become ``-ELSEWHERE``, those after it `ELSEWHERE`."""
        columns = ids - self.start
        return torch.where(columns < 0, -ELSEWHERE, torch.where(columns < self.rows, columns, ELSEWHERE))

    def local_picks(self, ids: Tensor) -> Tensor:
        """Columns of this shard; negative ids, padding, stay what they are, all others become `ELSEWHERE`."""
        columns = ids - self.start
        here = (columns >= 0) & (columns < self.rows)
        return torch.where(ids < 0, ids, torch.where(here, columns, ELSEWHERE))


def check_ranks(shard: VocabShard | None, n_rows: int, device: torch.device) -> None:
    """Raises ValueError, on every rank, unless the shards tile the vocabulary and all ranks have as many hidden rows."""
    if shard is None:
        return
    group = _group(shard.group)
    every = torch.zeros((shard.ranks, 4), dtype=torch.int64)
    every[dist.get_rank(group)] = torch.tensor([shard.start, shard.rows, shard.vocab, n_rows])
    every = every.to(device)
    dist.all_reduce(every, group=group)
    found = every.tolist()
    if any(x[2:] != found[0][2:] for x in found):
        raise ValueError(f"ranks of `process_group` differ in [vocab_size, rows of hidden]: {[x[2:] for x in found]}")
    end = 0
    for start, rows, *_ in sorted(found):
        if start != end or rows < 1:
            break
        end = start + rows
    if end != shard.vocab:
        got = [x[:2] for x in found]
        raise ValueError(f"shards of the head must tile the vocabulary of {shard.vocab}, got [start, rows] {got}")


def local_ids(
    shard: VocabShard | None, ids: Tensor, gather_ids: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None, int]:
    """Target ids, ids to gather and what marks an ignored row, in columns of the head that is here."""
    if shard is None:
        return ids, gather_ids, ignore_index
    targets = shard.local_targets(ids).masked_fill(ids == ignore_index, -1)
    return targets, None if gather_ids is None else shard.local_picks(gather_ids), -1


def arguments(shard: VocabShard | None) -> dict[str, Any]:
    """What a public function takes for it."""
    if shard is None:
        return {}
    return {"process_group": _group(shard.group), "vocab_start": shard.start, "vocab_size": shard.vocab}


def encode(shard: VocabShard | None) -> tuple[str, list[int]]:
    """As an op's schema can take it."""
    return ("", []) if shard is None else (shard.group, [shard.start, shard.rows, shard.vocab, shard.ranks])


def nominal_vocab(shard: VocabShard | None, rows: int) -> int:
    """Columns of logits that a rank's workspace is measured by: the head's `rows` where it is whole."""
    return rows if shard is None else shard.nominal_rows


class Reduction:
    """Sums (or maxima) of tensors over the ranks, on their way: one all-reduce for all of them. Nothing to do for one rank."""

    def __init__(self, shard: VocabShard | None, parts: Sequence[Tensor | None], *, greatest: bool = False) -> None:
        self.parts, self.work = parts, None
        given = [x for x in parts if x is not None]
        if shard is None or not sum(x.numel() for x in given):
            return
        # A tensor alone, perhaps a large gradient, is not copied.
        alone = len(given) == 1 and given[0].is_contiguous()
        self.flat = given[0].view(-1) if alone else torch.cat([x.reshape(-1) for x in given])
        op = dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM
        self.work = dist.all_reduce(self.flat, op, group=_group(shard.group), async_op=True)

    def wait(self) -> list[Any]:
        """The results in the order of the parts. On a GPU its stream waits, not the host."""
        if self.work is None:
            return list(self.parts)
        self.work.wait()
        found: list[Tensor | None] = []
        place = 0
        for part in self.parts:
            size = 0 if part is None else part.numel()
            found.append(None if part is None else self.flat[place : place + size].view(part.shape))
            place += size
        return found


def summed(shard: VocabShard | None, *parts: Tensor | None) -> list[Any]:
    """Sums over the ranks."""
    return Reduction(shard, parts).wait()


def greatest(shard: VocabShard | None, *parts: Tensor | None) -> list[Any]:
    """Maxima over the ranks."""
    return Reduction(shard, parts, greatest=True).wait()


def pipelined(
    parts: Iterable[_Part],
    start: Callable[[int, _Part], _Started],
    finish: Callable[[_Part, _Started], None],
    depth: int,
) -> None:
    """Start and finish all parts in order; at `depth` 2 a part's sums travel between ranks while the next one is computed."""
    ahead: list[tuple[_Part, _Started]] = []
    for number, part in enumerate(parts):
        ahead.append((part, start(number, part)))
        if len(ahead) == depth:
            finish(*ahead.pop(0))
    for part, started in ahead:
        finish(part, started)


def take_shard(
    weight: Tensor | LoraWeight,
    bias: Tensor | None,
    process_group: Any,
    vocab_start: int | None,
    vocab_size: int | None,
    *,
    prefix: str = "",
) -> tuple[Tensor | LoraWeight, Tensor | None, VocabShard | None]:
    """(head, bias, shard): this rank's rows as plain tensors, without padding; no shard where the head is whole.

    Raises TypeError or ValueError for a group, a place or a DTensor that do not fit; `prefix` is of the arguments' names.
    """
    name = f"{prefix}weight"
    lora = weight if isinstance(weight, LoraWeight) else None
    base: Any = weight if lora is None else lora.base
    _checks.check_tensor(name, base)
    if process_group is None:
        for argument, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
            if value is not None:
                raise ValueError(f"`{argument}` is of a head that is shared out over a `process_group`, which is None")
        for argument, part in ((name, base), (f"{prefix}bias", bias)):
            if is_dtensor(part):
                raise ValueError(f"`{argument}` is a DTensor: pass the `process_group` it is sharded over, or full_tensor()")
        return weight, bias, None
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(f"`process_group` must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}")
    if base.dim() != 2:
        raise ValueError(f"`{name}` must be [V, H], got shape {list(base.shape)}")
    whole = None  # rows of all ranks together, where they are known
    if is_dtensor(base):
        if vocab_start is not None:
            raise ValueError(f"`{name}` is a DTensor, which knows where its rows lie: `vocab_start` must be None")
        vocab_size = base.shape[0] if vocab_size is None else vocab_size
        whole = base.shape[0]
        base, vocab_start = _local_rows(name, base, process_group)
    elif vocab_start is None or vocab_size is None:
        raise ValueError(f"`{name}` is a shard of a head: `vocab_start` and `vocab_size` must say which")
    for argument, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{argument}` must be an int, got {type(value).__name__}")
    given, ranks = base.shape[0], dist.get_world_size(process_group)
    rows = max(min(given, vocab_size - vocab_start), 0)
    # On a CPU, and of DTensors, all ranks find out, together: one that left alone would keep the others waiting.
    empty = rows == 0 and base.device.type != "cpu" if whole is None else (ranks - 1) * -(-whole // ranks) >= vocab_size
    if vocab_start < 0 or empty:
        got = f"{given} rows from {vocab_start} on, and a `vocab_size` of {vocab_size}"
        raise ValueError(f"`{name}` must hold a row of the vocabulary, got {got}")
    if bias is not None:
        bias = _local_rows(f"{prefix}bias", bias, process_group)[0] if is_dtensor(bias) else bias
        _checks.check_shape(f"{prefix}bias", bias, (given,), f"[rows of `{name}`]")
        bias = bias[:rows]
    head: Any = base[:rows]
    if lora is not None:
        b: Any = _local_rows(f"{name}.b", lora.b, process_group)[0] if is_dtensor(lora.b) else lora.b
        a: Any = lora.a
        if is_dtensor(a):
            if not all(placement.is_replicate() for placement in a.placements):
                raise ValueError(f"`{name}.a` must be whole on every rank, got a DTensor with {a.placements}")
            a = a.to_local()
        if b.dim() != 2 or b.shape[0] != given:
            raise ValueError(f"`{name}.b` must have the rows of `{name}.base`, {given}, got shape {list(b.shape)}")
        head = LoraWeight(head, a, b[:rows], lora.scale)
    if ranks == 1 and (vocab_start, rows) != (0, vocab_size):
        got = f"{rows} from {vocab_start} on, of {vocab_size}"
        raise ValueError(f"the only rank of `process_group` must hold all rows of `{name}`, got {got}")
    shard = VocabShard(process_group.group_name, vocab_start, rows, vocab_size, ranks)
    return head, bias, None if ranks == 1 else shard


def whole_head(shard: VocabShard | None, *parts: Tensor | None) -> list[Any]:
    """The rows of all ranks together, differentiable by this rank's: what a definition is written in."""
    return [x if x is None or shard is None else _AllRows.apply(x, shard) for x in parts]


class _AllRows(torch.autograd.Function):
    """Rows of a head from all ranks. Every rank has the loss of them all, so its gradient is the slice of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        whole = rows.new_zeros((shard.vocab, *rows.shape[1:]))
        whole[shard.start : shard.start + shard.rows] = rows
        return summed(shard, whole)[0]

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None]:
        return dwhole[ctx.shard.start : ctx.shard.start + ctx.shard.rows], None


def is_dtensor(value: Any) -> bool:
    """Whether it is a tensor of torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # an import of seconds, without which there is no DTensor
    return module is not None and isinstance(value, module.DTensor)


def _local_rows(name: str, value: Any, process_group: Any) -> tuple[Tensor, int]:
    """(this rank's rows, the number of the first) of a DTensor that is sharded over the group along its rows alone."""
    split = [i for i, placement in enumerate(value.placements) if not placement.is_replicate()]
    fits = len(split) == 1 and value.placements[split[0]].is_shard(0)
    if not fits or value.device_mesh.get_group(split[0]).group_name != process_group.group_name:
        got = f"{value.placements} on {value.device_mesh}"
        raise ValueError(f"`{name}` must be a DTensor with Shard(0) over `process_group` alone, got {got}")
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    return value.to_local(), min(rank * -(-value.shape[0] // ranks), value.shape[0])


def _group(name: Any) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)
