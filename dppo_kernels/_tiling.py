"""Tile sizes from shapes alone: pure functions, frozen choices, no autotuning in a training step.

Measured on two Zen 3 cores (fp32, H 64 to 1024): tiles of about a million logits (4 MiB) ran within 5 % of the best of a sweep
over 128..1024 rows x 512..8192 columns; larger tiles fall out of the last-level cache, smaller ones starve the GEMM.
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 20  # logits
TILE_ROWS = 512
WEIGHT_TILE_ELEMENTS = 1 << 22  # of the head: upcast for the tile, and a gradient of the same size

# Rows of exponentials [rows, V] made at one time. Measured on two Zen 3 cores (fp32, N 1024, H 512, V 32000): 256, 512 and 1024
# rows took the same time within the noise of 5 %. The CUDA figures are not measured.
TARGET_ROWS = {"cpu": 256, "cuda": 4096}
DEFAULT_WORKSPACE_BYTES = {"cpu": 40 << 20, "cuda": 512 << 20}
ROW_BLOCKS = {"cpu": 16, "cuda": 128}  # rows of the largest block of the kernels that make them ("cpu": interpreted)
# Fewer rows than this starve the gradient GEMMs and reread the head too often: recomputing in tiles is better then.
MIN_ROWS = 16


def kind_of(device: torch.device) -> str:
    """Key of the figures above."""
    return "cuda" if device.type == "cuda" else "cpu"


class Tile(NamedTuple):
    """Rows x vocabulary columns of logits that exist at one time."""

    rows: int
    cols: int


def pick_linear_tile(n_rows: int, vocab: int, hidden_size: int) -> Tile:
    """Tile for hidden x lm_head projections; columns are balanced so that the last tile is not a sliver.

    Few rows do not widen the tile beyond `WEIGHT_TILE_ELEMENTS`: the workspace is bounded whatever the shape.
    """
    rows = max(1, min(n_rows, TILE_ROWS))
    n_tiles = max(1, -(-vocab * rows // TILE_ELEMENTS), -(-vocab * hidden_size // WEIGHT_TILE_ELEMENTS))
    return Tile(rows, max(1, -(-vocab // n_tiles)))


class LsePlan(NamedTuple):
    """Tile of the LSE kernel. Nothing in it depends on the number of rows: results are batch-invariant."""

    block_n: int
    block_v: int
    block_h: int
    segment_tiles: int  # vocabulary tiles a program walks
    group_blocks: int  # row blocks that walk a segment together
    num_warps: int
    num_stages: int


# By (capability at least, bytes per element, through descriptors), first match. Not measured yet: shapes that compile without
# spills on sm_90. Pointers need registers for addresses, so their tiles are smaller.
_LSE_PLANS: tuple[tuple[tuple[int, int], int, bool, LsePlan], ...] = (
    ((9, 0), 2, True, LsePlan(128, 256, 64, 8, 16, 8, 3)),
    ((8, 0), 2, False, LsePlan(128, 128, 32, 16, 16, 8, 3)),
    ((8, 0), 4, False, LsePlan(64, 64, 32, 32, 32, 4, 2)),
)
INTERPRETER_LSE_PLAN = LsePlan(16, 32, 32, 2, 2, 4, 1)


def pick_lse_plan(capability: tuple[int, int] | None, dtype: torch.dtype, described: bool) -> LsePlan:
    """Tile for a device of this compute capability (None = the interpreter)."""
    if capability is None:
        return INTERPRETER_LSE_PLAN
    return _first(_LSE_PLANS, capability, dtype, described)


class GradPlan(NamedTuple):
    """Strip of recomputed logit gradients and the tiles of the three GEMMs that make and use it."""

    chunk_rows: int
    strip_cols: int
    block_n: int  # of the recomputation: [block_n, block_v] over block_h
    block_v: int
    block_h: int
    gemm_m: int  # of dhidden and dweight: [gemm_m, gemm_h] over gemm_k
    gemm_h: int
    gemm_k: int
    num_warps: int
    num_stages: int


# A strip is written once and read twice: 4096 x 4096 in 16 bits is 32 MiB, which an L2 of 40 to 50 MB holds. Not measured yet.
_GRAD_PLANS: tuple[tuple[tuple[int, int], int, bool, GradPlan], ...] = (
    ((9, 0), 2, True, GradPlan(4096, 4096, 128, 256, 64, 128, 256, 64, 8, 3)),
    ((8, 0), 2, False, GradPlan(4096, 4096, 128, 128, 32, 128, 128, 32, 8, 3)),
    ((8, 0), 4, False, GradPlan(2048, 4096, 64, 64, 32, 64, 64, 32, 4, 2)),
)
INTERPRETER_GRAD_PLAN = GradPlan(32, 64, 16, 32, 32, 16, 32, 16, 4, 1)


def pick_grad_plan(
    capability: tuple[int, int] | None, dtype: torch.dtype, described: bool, *, narrow: bool = False
) -> GradPlan:
    """Strip and tiles for a device of this compute capability (None = the interpreter).

    `narrow`: logits have a soft-cap or a bias.
    """
    if capability is None:
        return INTERPRETER_GRAD_PLAN
    plan = _first(_GRAD_PLANS, capability, dtype, described)
    # A soft-cap's slopes live beside the logits: 256 columns spill 400 bytes and more on sm_90. A bias alone spills 4.
    return plan._replace(block_v=min(plan.block_v, 128)) if narrow else plan


_Plan = TypeVar("_Plan")


def _first(
    plans: tuple[tuple[tuple[int, int], int, bool, _Plan], ...],
    capability: tuple[int, int],
    dtype: torch.dtype,
    described: bool,
) -> _Plan:
    for least, size, needs_descriptors, plan in plans:
        if capability >= least and dtype.itemsize == size and (described or not needs_descriptors):
            return plan
    raise ValueError(f"no tile for {dtype} on compute capability {capability}: kernels need 8.0 or later")


class RowPlan(NamedTuple):
    """Columns of a row that a program of the logits-level kernels holds at one time."""

    block_v: int
    num_warps: int


def pick_row_plan(capability: tuple[int, int] | None) -> RowPlan:
    """16 values a thread: enough loads in flight for the memory, few enough registers for several programs per SM."""
    return RowPlan(64, 4) if capability is None else RowPlan(4096, 8)


def pick_comparison_plan(capability: tuple[int, int] | None) -> RowPlan:
    """Of two models' logits beside each other: half as many of each, or the JSD's logarithms cost 180 registers a thread."""
    plan = pick_row_plan(capability)
    return plan if capability is None else plan._replace(block_v=plan.block_v // 2)


class GaePlan(NamedTuple):
    """Steps of a row that a program scans at one time. Nothing in it depends on the number of rows."""

    block_t: int
    num_warps: int


def pick_gae_plan(capability: tuple[int, int] | None, steps: int) -> GaePlan:
    """8 steps a thread; a short row gets one warp, so that many of them share an SM. Not measured yet."""
    if capability is None:
        return GaePlan(16, 1)
    block = max(64, min(1024, 1 << max(steps - 1, 0).bit_length()))
    return GaePlan(block, max(1, block // 256))


# Of the CUDA top-K: CTAs that live on an SM at one time, how many times over a device is filled, and the shortest segment of a
# row (2 or 4 tiles: its first tile sorts out candidates and costs several others). Not measured yet.
TOPK_CTAS_PER_SM = 5
TOPK_WAVES = 4
TOPK_MIN_SEGMENT = 8192
TOPK_MAX_SPLITS = 32


def pick_topk_splits(n: int, vocab: int, sm_count: int) -> int:
    """CTAs that share a row: 1 where rows alone fill the device several times over, more for the few rows of a decode step."""
    wanted = -(-TOPK_WAVES * TOPK_CTAS_PER_SM * sm_count // max(n, 1))
    return max(1, min(wanted, TOPK_MAX_SPLITS, vocab // TOPK_MIN_SEGMENT))


def pick_row_chunk(vocab: int) -> int:
    """Rows of given logits to upcast at one time, in whole rows."""
    return max(1, TILE_ELEMENTS // max(vocab, 1))


def chunks(total: int, size: int) -> list[slice]:
    """`total` cut into consecutive slices of at most `size`."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def balanced(total: int, limit: int) -> int:
    """Chunk size of at most `limit` so that the last chunk is not a sliver."""
    return max(1, -(-total // max(1, -(-total // limit))))


def matrix(buffer: Tensor, rows: int, cols: int) -> Tensor:
    """The beginning of a flat buffer as [rows, cols]."""
    return buffer[: rows * cols].view(rows, cols)
