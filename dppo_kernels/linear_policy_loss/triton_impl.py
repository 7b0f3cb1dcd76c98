"""The fused policy loss of single rows on Triton kernels; sequence-level ratios need no more than `groups_triton`.

Active rows are compacted once; chunk by chunk they are projected, the row kernel finds the coefficients, and the gradient GEMMs
follow.
"""

import torch
import triton
from torch import Tensor

from dppo_kernels._shard import pipelined
from dppo_kernels._tiling import GradPlan, chunks
from dppo_kernels._triton import launch_on
from dppo_kernels.linear_logprobs.groups import GroupResult, GroupTask
from dppo_kernels.linear_logprobs.groups_triton import Group, GroupLauncher, Operands
from dppo_kernels.linear_logprobs.kernels_exp import ROW_BLOCK, Projecting, Sums
from dppo_kernels.linear_policy_loss.kernels_rows import policy_row_kernel
from dppo_kernels.linear_policy_loss.rows import PolicyRows
from dppo_kernels.linear_policy_loss.task import Task, Totals
from dppo_kernels.policy import Stat


def linear_policy_loss_fwd(
    task: Task, group: GroupTask, totals: Totals, plan: GradPlan | None = None, descriptors: bool | None = None
) -> GroupResult:
    """Statistics and gradients; loss and metrics go to `totals`. The last two override what device and strides would choose."""
    result = GroupResult.empty(group)
    if group.ids.shape[0]:
        with launch_on(group.projection.hidden.device):
            _Launcher(task, group, totals, result, plan, descriptors).run()
        result.gradients = result.gradients.sum_over_ranks(group.projection.shard)
    return result


class _Launcher(GroupLauncher):
    def __init__(
        self,
        task: Task,
        group: GroupTask,
        totals: Totals,
        result: GroupResult,
        plan: GradPlan | None,
        descriptors: bool | None,
    ) -> None:
        super().__init__(group, result, plan, descriptors)
        self.policy, self.totals = task, totals
        self.rows = PolicyRows(*(None if v is None else v.contiguous() for v in task.rows))  # type: ignore[arg-type]

    def run(self) -> None:
        n = self.task.ids.shape[0]
        group, parts, names = self.group(slice(0, n)), chunks(n, self.chunk_rows), self.policy.stat_names
        programs = triton.cdiv(self.chunk_rows, ROW_BLOCK)
        losses = self.new(programs * len(parts), torch.float64)
        stats = self.new((programs * len(parts), len(names), 2), torch.float64)

        def start(number: int, part: slice) -> Projecting:
            return self.project(group, part, self.slots[number % len(self.slots)])

        def finish(part: slice, projecting: Projecting) -> None:
            sums = projecting.settle()
            operands = self.row_stage(group, part, sums, part.start // self.chunk_rows * programs, losses, stats)
            self.gradients(group, part, projecting.slot, sums, operands)

        pipelined(parts, start, finish, len(self.slots))
        count = self.task.scored.sum()
        sums_of, maxima = stats[..., 0].sum(0), stats[..., 1].amax(0)
        self.totals.loss += losses.sum()
        self.totals.stats = {name: Stat(sums_of[i], count, maxima[i]) for i, name in enumerate(names)}

    def row_stage(self, group: Group, part: slice, sums: Sums, first_program: int, losses: Tensor, stats: Tensor) -> Operands:
        rows, spec, x, or_nothing = self.rows, self.policy.spec, self.x, self.or_nothing
        operands = self.new_operands()
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
            self.result.logprobs,
            or_nothing(self.result.rows.get("entropy")),
            *operands,
            losses,
            stats,
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
            SURROGATE=spec.surrogate,
            DIVERGENCE=spec.divergence or "",
            N_STATS=stats.shape[1],
            HAS_CAP=spec.ratio_cap is not None,
            HAS_ANCHOR=rows.anchor is not None,
            HAS_REF=rows.ref_logprobs is not None,
            KL=spec.beta != 0,
            KL_WEIGHTED=spec.kl_ratio_weighted,
            HAS_TOKEN_WEIGHTS=rows.token_weights is not None,
            HAS_VALID=rows.topk_valid is not None,
            HAS_SOFTCAP=x.softcap is not None,
            ENTROPY=self.with_dot,
            ENTROPY_GRADIENT=self.task.entropy_weight is not None,
            BLOCK_N=ROW_BLOCK,
            num_warps=1,
        )
        return operands
