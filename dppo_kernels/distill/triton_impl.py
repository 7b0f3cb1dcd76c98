"""The fused distillation loss on Triton kernels: launches, in the order of `torch_impl`, with all counts on the device.

Rows that count are compacted once. Chunk by chunk both models are projected, compared, and the gradient GEMMs follow; the host
launches for as many chunks as there could be, and kernels of a chunk without rows return at once.
"""

import triton
from torch import Tensor

from dppo_kernels._shard import VocabShard, greatest, summed
from dppo_kernels._tiling import GradPlan, chunks, pick_comparison_plan
from dppo_kernels._triton import capability, launch_on, operand
from dppo_kernels.distill.kernels import N_SAVED, divergence_gradient_kernel, divergence_row_kernel, logits_kernel
from dppo_kernels.distill.task import Result, Task
from dppo_kernels.linear_logprobs.kernels import CompactRows, compact_rows
from dppo_kernels.linear_logprobs.kernels_bwd import column_sums_kernel
from dppo_kernels.linear_logprobs.kernels_gemm import ChunkGemms


def linear_distill_loss_fwd(task: Task, plan: GradPlan | None = None, descriptors: bool | None = None) -> Result:
    """Loss and gradients; `plan` and `descriptors` override what the device and the strides would choose."""
    result = Result.empty(task)
    if task.mask.shape[0]:
        with launch_on(task.student.hidden.device):
            _Launcher(task, result, plan, descriptors).run()
        result.gradients = result.gradients.sum_over_ranks(task.student.shard)
    return result


def merge_ranks(shard: VocabShard, maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(max, sum of exponentials) [rows, 1] of the whole vocabulary, of those [rows, blocks] of this rank's columns."""
    (largest,) = greatest(shard, maxima.amax(1, keepdim=True))
    return largest, summed(shard, (sums * (maxima - largest).exp()).sum(1, keepdim=True))[0]


class _Launcher:
    def __init__(self, task: Task, result: Result, plan: GradPlan | None, descriptors: bool | None) -> None:
        self.task, self.result = task, result
        models = task.student, task.teacher
        self.student, self.teacher = (ChunkGemms(x, task.chunk_rows, plan=plan, descriptors=descriptors) for x in models)
        both = self.student, self.teacher
        # Their tiles may differ, as their dtypes may; sizes of tiles are powers of two.
        size, cols = max(x.chunk_rows for x in both), max(x.cols for x in both)
        for x in both:
            x.chunk_rows, x.cols = size, cols
        self.size, self.cols, new = size, cols, self.student.new
        self.logits = [new((size, cols)) for _ in both]
        self.partials = [(new((size, cols // x.plan.block_v)), new((size, cols // x.plan.block_v))) for x in both]
        self.saved = new((size, N_SAVED.value))
        self.block_v, self.num_warps = pick_comparison_plan(capability(self.student.device))
        self.gradient = new((size, cols), self.student.stored) if any(task.needs) else None

    def run(self) -> None:
        task = self.task
        rows = compact_rows(task.student, task.mask)
        teacher_rows = compact_rows(task.teacher, task.mask, like=rows)
        weights = task.loss_weights()
        in_order = weights[rows.order] if isinstance(weights, Tensor) else weights
        factor = rows.inverse_temperature * (task.student.logit_scale * in_order)
        for part in chunks(task.mask.shape[0], self.size):
            for x, compacted, z, partials in zip(
                (self.student, self.teacher), (rows, teacher_rows), self.logits, self.partials, strict=True
            ):
                self.project(x, compacted, part, z, partials)
            self.compare(rows, part)
            if self.gradient is not None:
                self.differentiate(self.gradient, rows, part, factor)
        self.result.loss_sum += (self.result.rows.divergence.double() * weights).sum()

    def project(self, x: ChunkGemms, rows: CompactRows, part: slice, z: Tensor, partials: tuple[Tensor, Tensor]) -> None:
        plan, projection = x.plan, x.x
        logits_kernel[(self.size // plan.block_n, self.cols // plan.block_v)](
            operand(rows.hidden, (plan.block_n, plan.block_h), x.described),
            operand(x.weight, (plan.block_v, plan.block_h), x.described),
            projection.bias if projection.bias is not None else x.weight,
            rows.inverse_temperature,
            rows.n_active,
            z,
            *partials,
            part.start,
            self.size,
            rows.hidden.shape[0],
            x.vocab,
            x.width,
            projection.logit_scale,
            projection.softcap or 1.0,
            *x.weight.stride(),
            **rows.low_rank_arguments(),
            HAS_BIAS=projection.bias is not None,
            HAS_SOFTCAP=projection.softcap is not None,
            COLS=self.cols,
            BLOCK_N=plan.block_n,
            BLOCK_V=plan.block_v,
            BLOCK_H=plan.block_h,
            **x.tile,
            **x.launch,
        )

    def compare(self, rows: CompactRows, part: slice) -> None:
        task, found = self.task, self.result.rows
        shard = task.student.shard
        n = part.stop - part.start
        # Of the part's rows alone: the rest of a block depends on tiles, which may differ from rank to rank.
        partials = self.partials if shard is None else [merge_ranks(shard, *(x[:n] for x in both)) for both in self.partials]
        n_blocks = [maxima.shape[1] for maxima, _ in partials]
        divergence_row_kernel[(part.stop - part.start,)](
            *self.logits,
            *partials[0],
            *partials[1],
            rows.inverse_temperature,
            task.mask,
            rows.order,
            rows.n_active,
            *found,
            self.saved,
            part.start,
            1,
            self.student.vocab,
            *n_blocks,
            task.kind.beta,
            *(self.cols, 0, 1) * 2,
            KIND=task.kind.name,
            PARTIALS=True,
            COMPACTED=True,
            TEMPERED=False,
            ENTROPY=task.with_entropy,
            AGREEMENT=task.with_agreement,
            SHARDED=shard is not None,
            BLOCK_P=triton.next_power_of_2(max(n_blocks)),
            BLOCK_V=self.block_v,
            num_warps=self.num_warps,
        )
        if shard is not None:
            self.add_up(shard, rows.order[part])

    def add_up(self, shard: VocabShard, rows: Tensor) -> None:
        """What the columns of each rank contributed to a chunk's rows."""
        found, centre = self.result.rows, self.saved[: rows.shape[0], 4]
        agrees = found.agrees[rows].float() if self.task.with_agreement else None
        entropy = found.entropy[rows] if self.task.with_entropy else None
        divergence, whole_centre, entropy, agrees = summed(shard, found.divergence[rows], centre, entropy, agrees)
        found.divergence[rows] = divergence.clamp_(min=0.0)
        centre.copy_(whole_centre)
        if entropy is not None:
            found.entropy[rows] = entropy
        if agrees is not None:
            found.agrees[rows] = agrees > 0

    def differentiate(self, dz: Tensor, rows: CompactRows, part: slice, factor: Tensor) -> None:
        """The gradient of a chunk, and its GEMMs."""
        task, x = self.task, self.student
        dhidden, dweight, dbias, dlow_hidden, dlow_weight = self.result.gradients
        # Rows beyond the part are read by the GEMMs as well: zeros are written there.
        divergence_gradient_kernel[(self.size, triton.cdiv(self.cols, self.block_v))](
            *self.logits,
            rows.inverse_temperature[part],
            task.mask,
            rows.n_active,
            self.saved,
            factor[part],
            dz,
            part.start,
            1,
            x.vocab,
            self.cols,
            task.kind.beta,
            task.student.softcap or 1.0,
            *(self.cols, 0, 1) * 2,
            KIND=task.kind.name,
            COMPACTED=True,
            TEMPERED=False,
            HAS_SOFTCAP=task.student.softcap is not None,
            BLOCK_V=self.block_v,
            num_warps=self.num_warps,
        )
        count = (rows.n_active - part.start).clamp(0, part.stop - part.start)
        low_hidden, low_weight = rows.low_rank or (None, None)
        for hidden, weight, drows, dcolumns in (
            (rows.hidden, x.weight, dhidden, dweight),
            (low_hidden, low_weight, dlow_hidden, dlow_weight),
        ):
            if hidden is None or weight is None:
                continue
            if drows is not None:
                product = x.rows_gradient(dz, weight, count)
                drows.index_copy_(0, rows.order[part], product[: part.stop - part.start])
            if dcolumns is not None:
                x.add_weight_gradient(dz, hidden[part], dcolumns, count)
        if dbias is not None:
            column_sums_kernel[(triton.cdiv(x.vocab, 64),)](
                dz, dz, dbias, count, 0, 0, self.size, x.vocab, WEIGHTED=False, COLS=self.cols, BLOCK_N=32, BLOCK_V=64
            )
