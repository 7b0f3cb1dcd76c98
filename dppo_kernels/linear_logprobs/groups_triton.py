"""Losses of groups of rows on Triton kernels: launches, in the order of `groups_torch`, with all counts on the device.

Groups of whole sequences are compacted, projected and scored; a function in torch finds the coefficients; gradient GEMMs
follow, and chunks that no longer have a slot are projected again. The host launches for as many chunks as there could be;
kernels of a chunk without rows return at once. Losses of single rows subclass `GroupLauncher` with a row kernel of their own.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dppo_kernels._shard import summed
from dppo_kernels._tiling import GradPlan, chunks
from dppo_kernels._triton import INTERPRET, launch_on
from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.linear_logprobs.groups import GroupResult, GroupTask, runs
from dppo_kernels.linear_logprobs.kernels import CompactRows, compact_rows, gather_logits
from dppo_kernels.linear_logprobs.kernels_bwd import column_sums_kernel
from dppo_kernels.linear_logprobs.kernels_chunk import entropy_gradient_kernel, move_rows_kernel, scale_rows_kernel
from dppo_kernels.linear_logprobs.kernels_exp import ROW_BLOCK, ChunkLauncher, Projecting, Sums, scatter_rows_kernel
from dppo_kernels.linear_logprobs.kernels_rows import row_operands_kernel, row_scores_kernel

COPY_BLOCK = 1024


class Group(NamedTuple):
    """Compacted rows whose coefficients become known together."""

    rows: CompactRows  # `order` holds the caller's rows
    ids: Tensor  # [n] int64 compacted order
    z: Tensor  # [n, 1 + K] logits of the ids and the gathered ids, compacted order


class Operands(NamedTuple):
    """What a row kernel leaves for the gradient stage; [chunk_rows] each."""

    factor: Tensor
    at_target: Tensor
    keep: Tensor  # int32
    on_probs: Tensor
    on_logprobs: Tensor
    offset: Tensor


def run_groups(task: GroupTask, plan: GradPlan | None = None, descriptors: bool | None = None) -> GroupResult:
    """Statistics and gradients; `plan` and `descriptors` override what the device and the strides would choose."""
    task.check_chunked()
    result = GroupResult.empty(task)
    if task.ids.shape[0]:
        with launch_on(task.projection.hidden.device):
            launcher = GroupLauncher(task, result, plan, descriptors)
            assert task.bounds is not None, "rows by themselves have a row kernel"
            for first, last, n in runs(task.rows_of_units(), launcher.chunk_rows * task.design.slots):
                launcher.run_sequences(slice(task.bounds[first], task.bounds[last]), n)
        result.gradients = result.gradients.sum_over_ranks(task.projection.shard)
    return result


class GroupLauncher(ChunkLauncher):
    """Launches of one call: groups, their chunks of exponentials, and the gradients of chunks."""

    def __init__(self, task: GroupTask, result: GroupResult, plan: GradPlan | None, descriptors: bool | None) -> None:
        super().__init__(
            task.projection,
            task.design.chunk_rows,
            with_dot=task.with_entropy,
            fold_slope=task.entropy_weight is None,
            plan=plan,
            descriptors=descriptors,
        )
        self.task, self.result = task, result
        self.slots = [self.new_slot() for _ in range(task.design.slots)]
        self.placeholder = self.new(1)
        entropy_weight = task.entropy_weight
        self.entropy_weight = self.placeholder if entropy_weight is None else entropy_weight.float().reshape(1)

    def run_sequences(self, span: slice, n: int) -> None:
        """Of the span, whose scored rows are at most `n`."""
        task, result = self.task, self.result
        group = self.group(span)
        parts = chunks(n, self.chunk_rows)
        kept: dict[int, tuple[int, Sums]] = {}  # slot -> (chunk, its sums)

        def settle(ahead: tuple[int, Projecting] | None) -> None:
            if ahead is not None:
                chunk, projecting = ahead
                sums = projecting.settle()
                kept[min(chunk, len(self.slots) - 1)] = chunk, sums
                self.score(group, parts[chunk], sums)

        ahead = None
        for i, part in enumerate(parts):
            if i >= len(self.slots):  # its slot is that of the one ahead
                settle(ahead)
                ahead = None
            projecting = self.project(group, part, self.slots[min(i, len(self.slots) - 1)])
            settle(ahead)
            ahead = i, projecting
        settle(ahead)
        scores = Scores(**{name: values[span] for name, values in result.rows.items()})
        dlogprobs = torch.zeros_like(result.logprobs)
        dlogprobs[span] = task.coefficients(span, None, scores)
        if not any(task.needs):
            return
        in_slot = {chunk: (slot, sums) for slot, (chunk, sums) in kept.items()}
        # Last chunk first: its slot is where the others are projected again.
        for i in sorted(range(len(parts)), key=lambda i: (i not in in_slot, -i)):
            slot, sums = in_slot[i] if i in in_slot else (len(self.slots) - 1, None)
            sums = sums or self.project(group, parts[i], self.slots[slot]).settle()
            self.gradients(group, parts[i], self.slots[slot], sums, self.operands(group, parts[i], sums, dlogprobs))

    def group(self, span: slice) -> Group:
        """Scored rows among `span` of the caller's rows, compacted on the device."""
        x, task = self.task.projection.cut(span), self.task
        counted = task.scored[span]
        compacted = compact_rows(x, counted)
        ids = task.ids[span].masked_fill(~counted, -1)
        all_ids = ids[:, None] if task.gather_ids is None else torch.cat([ids[:, None], task.gather_ids[span]], 1)
        (z,) = summed(x.shard, gather_logits(x, self.weight, compacted, all_ids.contiguous()))
        return Group(compacted._replace(order=compacted.order + span.start), ids[compacted.order], z)

    def project(self, group: Group, part: slice, slot: Tensor) -> Projecting:
        return Projecting(self, group.rows, group.ids, group.z[:, 0].contiguous(), part, slot)

    def score(self, group: Group, part: slice, sums: Sums) -> None:
        row_scores_kernel[(triton.cdiv(self.chunk_rows, ROW_BLOCK),)](
            group.z,
            *sums,
            group.rows.order,
            group.rows.n_active,
            self.result.logprobs,
            self.or_nothing(self.result.rows.get("entropy")),
            self.or_nothing(self.result.rows.get("is_top1")),
            part.start,
            self.chunk_rows,
            group.z.shape[1],
            ENTROPY=self.with_dot,
            TOP1=self.task.with_top1,
            BLOCK_N=ROW_BLOCK,
            num_warps=1,
        )

    def operands(self, group: Group, part: slice, sums: Sums, dlogprobs: Tensor) -> Operands:
        """Of the coefficients [N] in the caller's order."""
        x, operands = self.x, self.new_operands()
        row_operands_kernel[(triton.cdiv(self.chunk_rows, ROW_BLOCK),)](
            dlogprobs,
            group.z,
            *sums[:3],
            group.rows.order,
            group.rows.inverse_temperature,
            group.rows.n_active,
            self.entropy_weight,
            *operands,
            part.start,
            self.chunk_rows,
            group.z.shape[1],
            x.logit_scale,
            x.softcap or 1.0,
            HAS_SOFTCAP=x.softcap is not None,
            ENTROPY=self.with_dot,
            ENTROPY_GRADIENT=self.task.entropy_weight is not None,
            BLOCK_N=ROW_BLOCK,
            num_warps=1,
        )
        return operands

    def new_operands(self) -> Operands:
        return Operands(
            *(self.new(self.chunk_rows, torch.int32 if name == "keep" else torch.float32) for name in Operands._fields)
        )

    def or_nothing(self, values: Tensor | None) -> Tensor:
        """What a kernel gets for a tensor that it will not touch."""
        return self.placeholder if values is None else values

    def gradients(self, group: Group, part: slice, e: Tensor, sums: Sums, operands: Operands) -> None:
        """The gradient GEMMs of a chunk, over the rows whose coefficient is not 0."""
        x, rows = self.x, group.rows
        dhidden, dweight, dbias, dlow_hidden, dlow_weight = self.result.gradients
        size = self.chunk_rows
        if self.task.entropy_weight is not None:
            entropy_gradient_kernel[(triton.cdiv(size, ROW_BLOCK), triton.cdiv(self.cols, 128))](
                e,
                sums.anchor,
                operands.on_probs,
                operands.on_logprobs,
                operands.offset,
                rows.inverse_temperature,
                rows.n_active,
                part.start,
                size,
                x.softcap or 1.0,
                HAS_SOFTCAP=x.softcap is not None,
                COLS=self.cols,
                BLOCK_N=ROW_BLOCK,
                BLOCK_V=128,
            )
        source, count = fill_holes(operands.keep)
        move_rows_kernel[(size, triton.cdiv(self.cols, COPY_BLOCK))](e, source, count, COLS=self.cols, BLOCK_V=COPY_BLOCK)
        low_hidden, low_weight = rows.low_rank or (None, None)
        factor = self.new(size)
        for hidden, weight, drows, dcolumns in (
            (rows.hidden, self.weight, dhidden, dweight),
            (low_hidden, low_weight, dlow_hidden, dlow_weight),
        ):
            if hidden is None or weight is None:
                continue
            width = hidden.shape[1]
            scaled = self.new((size, width), self.stored)
            block_h = min(COPY_BLOCK, triton.next_power_of_2(width))
            by_row = (size, triton.cdiv(width, block_h))
            scale_rows_kernel[by_row](
                hidden,
                e,
                group.ids,
                operands.factor,
                operands.at_target,
                source,
                count,
                scaled,
                factor,
                part.start,
                width,
                COLS=self.cols,
                UPCAST=INTERPRET,
                BLOCK_H=block_h,
            )
            if drows is not None:
                product = self.rows_gradient(e, weight, count)
                scatter_rows_kernel[by_row](
                    product, factor, source, rows.order, count, drows, part.start, width, BLOCK_H=block_h
                )
            if dcolumns is not None:
                self.add_weight_gradient(e, scaled, dcolumns, count)
        if dbias is not None:
            column_sums_kernel[(triton.cdiv(self.vocab, 64),)](
                e, factor, dbias, count, 0, 0, size, self.vocab, WEIGHTED=True, COLS=self.cols, BLOCK_N=32, BLOCK_V=64
            )


def fill_holes(keep: Tensor) -> tuple[Tensor, Tensor]:
    """(source [n], count [1]): rows 0 .. count of the compacted order are ``source``; all on the device.

    Rows that are kept stay where they are if that is before `count`; the others fill the holes there, first to first.
    """
    count = keep.sum(dtype=torch.int32)
    place = torch.arange(keep.shape[0], device=keep.device)
    before = place < count
    holes, movers = (keep == 0) & before, (keep != 0) & ~before
    hole_order, mover_order = (torch.sort(x.to(torch.int8), descending=True, stable=True).indices for x in (holes, movers))
    paired = place < holes.sum()
    return torch.empty_like(place).scatter_(0, hole_order, torch.where(paired, mover_order, hole_order)), count.reshape(1)
