"""Which design serves a loss of groups of rows: pure functions of the regime, the shapes and the byte budget."""

from typing import NamedTuple

import torch

from dppo_kernels._numerics import stat_dtype
from dppo_kernels._shard import VocabShard, nominal_vocab
from dppo_kernels._tiling import DEFAULT_WORKSPACE_BYTES, MIN_ROWS, ROW_BLOCKS, TARGET_ROWS, balanced, kind_of


class Design(NamedTuple):
    """How the loss and its gradient are computed. n1: rows scored, n2: rows whose coefficient is not 0."""

    name: str  # "score" | "forward" | "keep" | "recompute"
    chunk_rows: int = 0  # rows of exponentials in a slot
    slots: int = 0  # chunks of exponentials that are kept at one time
    recomputed: bool = False  # "keep": whether a sequence may exceed the slots
    why: str = ""  # "recompute"

    def explain(self) -> str:
        """In words, with GEMM FLOPs in units of H V (trained head; a frozen head saves the last 2 n2)."""
        if self.name == "score":
            return "scored only, no gradient is wanted: 2 n1"
        if self.name == "recompute":
            return f"tile by tile, the logits recomputed for the gradient ({self.why}): 2 n1 + 6 n2"
        kept = f"{self.slots} x {self.chunk_rows} rows of exponentials"
        if self.name == "forward":
            return f"gradient in the forward, {kept} at a time: 2 n1 + 4 n2"
        if self.recomputed:
            return f"gradient in the forward, by sequence; {kept}, longer sequences recompute the rest: 2 n1 + 4 to 6 n2"
        return f"gradient in the forward, whole sequences at a time; {kept}: 2 n1 + 4 n2"


def choose_design(
    *,
    n_rows: int,
    longest_sequence: int,
    vocab: int,
    element_size: int,
    needs_gradient: bool,
    by_sequence: bool,
    workspace_bytes: int,
    target_rows: int,
    row_multiple: int = 1,
    exponent_range: bool = True,
    overlapped: bool = False,
) -> Design:
    """The design for `n_rows` rows with exponentials of `element_size` bytes.

    Args:
        longest_sequence: rows of the longest sequence; matters only `by_sequence`.
        by_sequence: whether coefficients are known when all rows of a sequence are scored, or row by row.
        workspace_bytes: what exponentials may take at one time; 0 asks for the strict mode, in tiles.
        target_rows: rows per chunk above which GEMMs gain nothing.
        row_multiple: rows of a kernel's block; chunks are made of whole blocks.
        exponent_range: whether exponentials fit their dtype (float16's range is too small).
        overlapped: whether a chunk's sums travel between ranks while the next chunk is projected, which takes two slots.
    """
    if not needs_gradient:
        return Design("score")
    if not exponent_range:
        return Design("recompute", why="exponentials need the exponent range of bfloat16 or float32")
    fit = workspace_bytes // max(vocab * element_size, 1) // row_multiple * row_multiple
    in_blocks = -(-max(n_rows, 1) // row_multiple) * row_multiple
    if fit < min(max(MIN_ROWS, row_multiple), in_blocks):
        return Design("recompute", why="the workspace holds no chunk of rows")
    if not by_sequence:
        slots = 2 if overlapped and fit >= 2 * row_multiple else 1
        chunk_rows = balanced(n_rows, min(fit // slots, target_rows))
        return Design("forward", -(-chunk_rows // row_multiple) * row_multiple, slots)
    slots = max(1, -(-min(fit, in_blocks) // target_rows))
    chunk_rows = max(1, min(fit, in_blocks) // slots // row_multiple) * row_multiple
    return Design("keep", chunk_rows, slots, longest_sequence > slots * chunk_rows)


def design_on(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    *,
    n_rows: int,
    longest_sequence: int,
    vocab: int,
    needs_gradient: bool,
    by_sequence: bool,
    workspace_bytes: int | None,
    shard: VocabShard | None = None,
) -> Design:
    """`choose_design` with the figures of a device and a backend; a workspace of None is the default.

    `vocab` is that of the head that is here. With a shard it is not what decides: all ranks decide the same.
    """
    kind, on_kernels = kind_of(device), backend == "triton"
    return choose_design(
        n_rows=n_rows,
        longest_sequence=longest_sequence,
        vocab=nominal_vocab(shard, vocab),
        element_size=(dtype if on_kernels else stat_dtype(dtype)).itemsize,
        needs_gradient=needs_gradient,
        by_sequence=by_sequence,
        workspace_bytes=DEFAULT_WORKSPACE_BYTES[kind] if workspace_bytes is None else workspace_bytes,
        target_rows=TARGET_ROWS[kind],
        row_multiple=ROW_BLOCKS[kind] if on_kernels else 1,
        exponent_range=not on_kernels or dtype != torch.float16,
        overlapped=shard is not None,
    )
