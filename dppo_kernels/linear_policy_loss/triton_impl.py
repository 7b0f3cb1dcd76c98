"""The fused policy loss on Triton kernels: launches, in the order of `torch_impl`, with all counts on the device.

Token-level ratios: active rows are compacted once; chunk by chunk they are projected, the row kernel finds the coefficients,
and the gradient GEMMs follow. Sequence-level ratios: groups of whole sequences are projected first; coefficients come from the
row stage in torch; chunks that no longer have a slot are projected again. The host launches for as many chunks as there could
be; kernels of a chunk without rows return at once.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dppo_kernels._tiling import GradPlan, chunks
from dppo_kernels._triton import INTERPRET, launch_on
from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.linear_logprobs.kernels import CompactRows, compact_rows, gather_logits
from dppo_kernels.linear_logprobs.kernels_bwd import column_sums_kernel
from dppo_kernels.linear_logprobs.kernels_exp import ROW_BLOCK, ChunkLauncher, Sums, scatter_rows_kernel
from dppo_kernels.linear_policy_loss.kernels import entropy_gradient_kernel, move_rows_kernel, scale_rows_kernel
from dppo_kernels.linear_policy_loss.kernels_rows import policy_row_kernel
from dppo_kernels.linear_policy_loss.rows import PolicyRows, row_loss, stat_names
from dppo_kernels.linear_policy_loss.task import Result, Task
from dppo_kernels.policy import Stat

COPY_BLOCK = 1024


class Group(NamedTuple):
    """Compacted rows whose coefficients become known together."""

    rows: CompactRows  # `order` holds the caller's rows
    ids: Tensor  # [n] int64 compacted order
    z: Tensor  # [n, 1 + K] logits of the ids and the gathered ids, compacted order


class Prepared(NamedTuple):
    """What the row kernel leaves for the gradient stage; [chunk_rows] each."""

    factor: Tensor
    at_target: Tensor
    keep: Tensor  # int32
    on_probs: Tensor
    on_logprobs: Tensor
    offset: Tensor


def linear_policy_loss_fwd(task: Task, plan: GradPlan | None = None, descriptors: bool | None = None) -> Result:
    """Loss and gradients; `plan` and `descriptors` override what the device and the strides would choose."""
    result = Result.empty(task)
    if task.rows.mask.shape[0]:
        with launch_on(task.projection.hidden.device):
            _Launcher(task, result, plan, descriptors).run()
    return result


class _Launcher(ChunkLauncher):
    def __init__(self, task: Task, result: Result, plan: GradPlan | None, descriptors: bool | None) -> None:
        super().__init__(
            task.projection,
            task.design.chunk_rows,
            with_dot=task.with_entropy,
            fold_slope=task.entropy_weight is None,
            plan=plan,
            descriptors=descriptors,
        )
        self.task, self.result = task, result
        self.rows = PolicyRows(*(None if v is None else v.contiguous() for v in task.rows))  # type: ignore[arg-type]
        self.slots = [self.new_slot() for _ in range(task.design.slots)]
        self.placeholder = self.new(1)
        entropy_weight = task.entropy_weight
        self.entropy_weight = self.placeholder if entropy_weight is None else entropy_weight.float().reshape(1)

    def run(self) -> None:
        task, n = self.task, self.task.rows.mask.shape[0]
        if task.design.name == "forward":
            self.run_token_level(self.group(slice(0, n)), n)
            return
        length = task.sequence_length
        at_once = max(1, self.chunk_rows * task.design.slots // length) * length
        for part in chunks(n, at_once):
            self.run_sequences(part)

    def run_token_level(self, group: Group, n: int) -> None:
        parts = chunks(n, self.chunk_rows)
        names = stat_names(self.task.spec, ref=self.task.rows.ref_logprobs is not None, entropy=self.task.with_entropy)
        programs = triton.cdiv(self.chunk_rows, ROW_BLOCK)
        losses = self.new(programs * len(parts), torch.float64)
        stats = self.new((programs * len(parts), len(names), 2), torch.float64)
        for i, part in enumerate(parts):
            sums = self.project(group, part, self.slots[0])
            prepared = self.row_stage(
                group, part, sums, self.task.spec.surrogate, first_program=i * programs, losses=losses, stats=stats
            )
            self.gradients(group, part, self.slots[0], sums, prepared)
        self.result.loss += losses.sum()
        count = self.task.scored.sum()
        totals, maxima = stats[..., 0].sum(0), stats[..., 1].amax(0)
        self.result.stats = {name: Stat(totals[i], count, maxima[i]) for i, name in enumerate(names)}

    def run_sequences(self, part: slice) -> None:
        task, result = self.task, self.result
        group = self.group(part)
        parts = chunks(part.stop - part.start, self.chunk_rows)
        kept: dict[int, tuple[int, Sums]] = {}  # slot -> (chunk, its sums)
        for i, rows in enumerate(parts):
            slot = min(i, len(self.slots) - 1)
            kept[slot] = i, self.project(group, rows, self.slots[slot])
            self.row_stage(group, rows, kept[slot][1], "score")
        rows_of = self.rows.take(part)._replace(mask=task.scored[part])
        scores = Scores(result.logprobs[part], None if result.entropy is None else result.entropy[part], None)
        loss = row_loss(rows_of, scores, task.spec, task.entropy_weight, task.sequence_length)
        result.loss += loss.loss
        for name, stat in loss.stats.items():
            result.stats[name] = result.stats[name].merge(stat)
        dlogprobs = torch.zeros_like(result.logprobs)
        dlogprobs[part] = loss.dlogprobs
        in_slot = {chunk: (slot, sums) for slot, (chunk, sums) in kept.items()}
        # Last chunk first: its slot is where the others are projected again.
        for i in sorted(range(len(parts)), key=lambda i: (i not in in_slot, -i)):
            slot, sums = in_slot[i] if i in in_slot else (len(self.slots) - 1, None)
            sums = sums or self.project(group, parts[i], self.slots[slot])
            prepared = self.row_stage(group, parts[i], sums, "given", dlogprobs=dlogprobs)
            self.gradients(group, parts[i], self.slots[slot], sums, prepared)

    def group(self, part: slice) -> Group:
        """Scored rows among `part` of the caller's rows, compacted on the device."""
        x = self.task.projection.cut(part)
        rows, counted = self.rows.take(part), self.task.scored[part]
        compacted = compact_rows(x, counted)
        ids = rows.ids.masked_fill(~counted, -1)
        all_ids = ids[:, None] if rows.topk_ids is None else torch.cat([ids[:, None], rows.topk_ids], 1)
        z = gather_logits(x, self.weight, compacted, all_ids.contiguous())
        return Group(compacted._replace(order=compacted.order + part.start), ids[compacted.order], z)

    def project(self, group: Group, part: slice, slot: Tensor) -> Sums:
        return self.exponentials(group.rows, group.ids, group.z[:, 0].contiguous(), part, slot)

    def row_stage(
        self,
        group: Group,
        part: slice,
        sums: Sums,
        surrogate: str,
        *,
        first_program: int = 0,
        losses: Tensor | None = None,
        stats: Tensor | None = None,
        dlogprobs: Tensor | None = None,
    ) -> Prepared:
        """Scores (``"score"``), or coefficients: of a token-level surrogate, or ``"given"`` by `dlogprobs`."""
        task, rows, spec, nothing = self.task, self.rows, self.task.spec, self.placeholder
        x = task.projection
        prepared = Prepared(
            *(self.new(self.chunk_rows, torch.int32 if name == "keep" else torch.float32) for name in Prepared._fields)
        )

        def or_nothing(values: Tensor | None) -> Tensor:
            return nothing if values is None else values

        policy_row_kernel[(triton.cdiv(self.chunk_rows, ROW_BLOCK),)](
            group.z,
            *sums,
            group.rows.order,
            group.rows.inverse_temperature,
            group.rows.n_active,
            rows.advantages,
            rows.loss_weights,
            or_nothing(rows.anchor),
            or_nothing(rows.ref_logprobs),
            or_nothing(rows.token_weights),
            or_nothing(rows.topk_ids),
            or_nothing(rows.rollout_topk_logprobs),
            or_nothing(rows.topk_valid),
            self.entropy_weight,
            or_nothing(dlogprobs),
            self.result.logprobs,
            or_nothing(self.result.entropy),
            *prepared,
            or_nothing(losses),
            or_nothing(stats),
            part.start,
            first_program,
            self.chunk_rows,
            group.z.shape[1],
            x.logit_scale,
            x.softcap or 1.0,
            spec.epsilon_low,
            spec.epsilon_high,
            spec.ratio_cap or 0.0,
            spec.sapo_temperature_pos,
            spec.sapo_temperature_neg,
            spec.beta,
            SURROGATE=surrogate,
            DIVERGENCE=spec.divergence or "",
            N_STATS=0 if stats is None else stats.shape[1],
            HAS_CAP=spec.ratio_cap is not None,
            HAS_ANCHOR=rows.anchor is not None,
            HAS_REF=rows.ref_logprobs is not None,
            KL=spec.beta != 0,
            KL_WEIGHTED=spec.kl_ratio_weighted,
            HAS_TOKEN_WEIGHTS=rows.token_weights is not None,
            HAS_VALID=rows.topk_valid is not None,
            HAS_SOFTCAP=x.softcap is not None,
            ENTROPY=self.with_dot,
            ENTROPY_GRADIENT=task.entropy_weight is not None,
            BLOCK_N=ROW_BLOCK,
            num_warps=1,
        )
        return prepared

    def gradients(self, group: Group, part: slice, e: Tensor, sums: Sums, prepared: Prepared) -> None:
        """The gradient GEMMs of a chunk, over the rows whose coefficient is not 0."""
        x, rows = self.task.projection, group.rows
        dhidden, dweight, dbias, dlow_hidden, dlow_weight = self.result.gradients
        size = self.chunk_rows
        if self.task.entropy_weight is not None:
            entropy_gradient_kernel[(triton.cdiv(size, ROW_BLOCK), triton.cdiv(self.cols, 128))](
                e,
                sums.anchor,
                prepared.on_probs,
                prepared.on_logprobs,
                prepared.offset,
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
        source, count = fill_holes(prepared.keep)
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
                prepared.factor,
                prepared.at_target,
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
