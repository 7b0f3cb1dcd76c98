"""Launches that work on chunks of rows [chunk_rows, COLS]: sizes and tiles of one call, and the gradient GEMMs of a chunk."""

from typing import Any

import torch
import triton
from torch import Tensor

from dppo_kernels._tiling import GradPlan, pick_grad_plan
from dppo_kernels._triton import INTERPRET, can_describe, capability, descriptor_obstacle, operand
from dppo_kernels.linear_logprobs.kernels_bwd import accumulate_gemm_kernel, gemm_columns
from dppo_kernels.linear_logprobs.projection import Projection


class ChunkGemms:
    """What launches of one call share.

    `plan` and `descriptors` override what the device and the strides would choose.
    """

    def __init__(self, x: Projection, chunk_rows: int, *, plan: GradPlan | None, descriptors: bool | None) -> None:
        self.x = x
        self.weight = x.weight.to(x.compute_dtype)
        self.vocab, self.width = self.weight.shape
        self.device = x.hidden.device
        aligned = torch.empty(1, self.width, dtype=x.compute_dtype, device=self.device)  # compacted rows are contiguous
        self.described = can_describe(self.device, aligned, self.weight, wanted=descriptors)
        chosen = pick_grad_plan(capability(self.device), x.compute_dtype, self.described, narrow=x.narrow)
        self.plan = plan = plan or chosen
        self.chunk_rows = triton.cdiv(min(chunk_rows, x.hidden.shape[0]), plan.block_n) * plan.block_n
        self.cols = triton.cdiv(self.vocab, plan.block_v) * plan.block_v
        # Kernels of an interpreter round bfloat16 wrongly, so there everything stays in fp32.
        self.stored = torch.float32 if INTERPRET else x.compute_dtype
        self.tile = {"DESCRIPTOR": self.described, "UPCAST": INTERPRET}
        self.launch = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}

    def new(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def rows_gradient(self, e: Tensor, weight: Tensor, count: Tensor) -> Tensor:
        """``e @ weight`` [chunk_rows, width of weight] in fp32; rows beyond `count` are 0."""
        width = weight.shape[1]
        product = torch.zeros((self.chunk_rows, width), dtype=torch.float32, device=self.device)
        self._gemm(e, weight, product, count, self.chunk_rows, transposed=False)
        return product

    def add_weight_gradient(self, e: Tensor, rows: Tensor, out: Tensor, count: Tensor) -> None:
        """``out [V, width] += e^T @ rows``, over `count` of at most chunk_rows rows [., width]; `out` in fp32."""
        self._gemm(e, rows, out, count, self.vocab, transposed=True)

    def _gemm(self, e: Tensor, other: Tensor, out: Tensor, count: Tensor, m: int, *, transposed: bool) -> None:
        plan, size, width = self.plan, self.chunk_rows, other.shape[1]
        block_h = gemm_columns(plan, width)
        described = self.described and descriptor_obstacle(self.device, other) is None
        accumulate_gemm_kernel[(triton.cdiv(m, plan.gemm_m), triton.cdiv(width, block_h))](
            operand(e, (plan.gemm_k, plan.gemm_m) if transposed else (plan.gemm_m, plan.gemm_k), described),
            operand(other, (plan.gemm_k, block_h), described),
            out,
            out,
            *(count, 0, 0, size, other.shape[0] if transposed else size, self.vocab, width),
            *other.stride(),
            0,
            0,
            TRANSPOSED=transposed,
            FIRST=not transposed,  # rows' gradients are done with a chunk, those of the head are added up
            LAST=False,
            COLS=self.cols,
            BLOCK_M=plan.gemm_m,
            BLOCK_H=block_h,
            BLOCK_K=plan.gemm_k,
            DESCRIPTOR=described,
            UPCAST=INTERPRET,
            **self.launch,
        )
