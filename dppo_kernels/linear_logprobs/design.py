"""Which design serves a call of `linear_logprobs`: a pure function of what is asked, what is trained, and the byte budget."""

from collections.abc import Collection
from typing import NamedTuple

from dppo_kernels._tiling import MIN_ROWS
from dppo_kernels.linear_logprobs.projection import Needs

# What the unit gradient can be the gradient of, and what a chunk of exponentials yields.
_UNIT = frozenset(("logprobs", "lse", "gathered"))
_FROM_EXPONENTIALS = _UNIT | {"entropy"}


class Design(NamedTuple):
    """How log-probs and their gradient are computed."""

    name: str  # "score" | "recompute" | "unit" | "keep"
    rows: int = 0  # "unit": rows of exponentials at one time; "keep": rows of logits kept for the backward
    why: str = ""

    def explain(self) -> str:
        """In words, with GEMM FLOPs in units of H V for n rows that are scored and m of them with a gradient."""
        if self.name == "score":
            return f"scored only ({self.why}): 2 n"
        if self.name == "unit":
            return (
                f"head frozen, the gradient of a log-prob is saved as U = P W, made from {self.rows} rows of exponentials at a "
                "time: 4 n, and only gathers in the backward (2 n + 4 m more if a gradient arrives at the entropy)"
            )
        if self.name == "keep":
            return (
                f"the logits of up to {self.rows} rows are kept for the backward, the rest recomputed: 2 n, and 2 m for each "
                "of hidden and head that is trained; 2 m more for rows not kept"
            )
        return f"logits recomputed in the backward ({self.why}): 2 n + 2 m, and 2 m for each of hidden and head that is trained"


def choose_design(
    *,
    needs: Needs,
    outputs: Collection[str],
    vocab: int,
    element_size: int,
    exponent_range: bool,
    keeps: bool,
    lora: bool,
    workspace_bytes: int | None,
    default_bytes: int,
    target_rows: int,
) -> Design:
    """The design of a call.

    Args:
        needs: of which inputs a gradient is wanted.
        outputs: names of what is asked for, "gathered" among them.
        vocab: V.
        element_size: bytes of an exponential or a logit.
        exponent_range: whether exponentials fit their dtype (float16's range is too small).
        keeps: whether the backend can keep logits.
        lora: whether the head has a low-rank update.
        workspace_bytes: the caller's; None = `default_bytes` for exponentials, nothing for logits that are kept.
        default_bytes: for exponentials.
        target_rows: rows of exponentials above which GEMMs gain nothing.
    """
    if not any(needs):
        return Design("score", why="no gradient is wanted")
    if not _FROM_EXPONENTIALS.intersection(outputs):
        return Design("score", why="no output has a gradient")
    if workspace_bytes == 0:
        return Design("recompute", why="workspace_bytes=0")
    row_bytes = max(vocab * element_size, 1)
    others = sorted(set(outputs) - _FROM_EXPONENTIALS)
    head_trained = needs.weight or needs.bias or needs.low_weight
    if head_trained:
        why = "the head is trained and no workspace_bytes are given to keep logits"
    elif lora:
        why = "the head has a LoRA"
    elif not _UNIT.intersection(outputs):
        why = "only the entropy is asked for"
    elif others:
        why = f"{', '.join(others)} need the logits"
    elif not exponent_range:
        why = "exponentials need the exponent range of bfloat16 or float32"
    else:
        rows = (default_bytes if workspace_bytes is None else workspace_bytes) // row_bytes
        if rows >= MIN_ROWS:
            return Design("unit", min(rows, target_rows))
        return Design("recompute", why=f"the workspace holds fewer than {MIN_ROWS} rows")
    if workspace_bytes is None:
        return Design("recompute", why=why)
    if not keeps:
        none_kept = "this backend keeps no logits"
        return Design("recompute", why=none_kept if head_trained else f"{why}; {none_kept}")
    if workspace_bytes < row_bytes:
        return Design("recompute", why="the workspace holds no row")
    return Design("keep", workspace_bytes // row_bytes)
