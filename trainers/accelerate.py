"""`accelerate_trl`: TRL's own trainers, scoring through the ops of `linear_logprobs`.

The forward that TRL gives a model with a fused lm_head looks up the function it scores with on every call; that function is
replaced, by one with the same arguments and results. TRL's forward stays TRL's. GRPOTrainer's loss is replaced as well.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dppo_kernels import _backend
from dppo_kernels._numerics import autocast_dtype
from dppo_kernels._shard import encode
from dppo_kernels.linear_logprobs.op import FIELDS
from dppo_kernels.trainers import _trl_seam, accelerate_grpo

IGNORE_INDEX = -100


class LinearLogprobFunction(torch.autograd.Function):
    """TRL's ``ChunkedLogProbFunction`` on the ops of `linear_logprobs`.

    An autograd function of its own around them, because ZeRO-3 empties the weight after the forward: the backward gathers it
    again, as TRL's does, and `linear_logprobs` knows nothing of that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Log-probs, and those asked for of entropy, log_sum_sq_probs, mean_logits and is_top1: each [N].

        `chunk_size` is ignored: the ops choose their tiles.
        """
        compute_dtype = autocast_dtype(hidden.device) or hidden.dtype
        backend = _backend.resolve("linear_logprobs", None, hidden.device, compute_dtype)
        if backend == "reference":
            raise ValueError(f"{_backend.ENVIRONMENT_VARIABLE}='reference' has no op for TRL's trainers: use 'torch'")
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        asked = ("logprobs", *(name for name in names if name in outputs))
        of_logits = (float(temperature), float(logit_scale), final_logit_softcapping, IGNORE_INDEX, compute_dtype)
        scalars = (*of_logits, *encode(None))  # the head is whole
        design = ("recompute", 0)
        results = torch.ops.dppo_kernels.linear_logprobs(
            hidden, weight, bias, None, None, targets, None, None, *scalars, ",".join(asked), *design, False, backend
        )
        by_name = dict(zip(FIELDS, results, strict=True))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(by_name[name] for name in names[1:] if name in asked))
        ctx.save_for_backward(hidden, weight, bias, targets, *(by_name[name] for name in ("row_max", "log_sum", "entropy")))
        ctx.scalars = (*scalars, backend)
        return by_name["logprobs"], *(by_name[name] if name in asked else None for name in names)

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *statistics = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with getattr(_trl_seam.trainer_utils, _trl_seam.GATHER_HEAD)(weight, bias):
            gradients = torch.ops.dppo_kernels.linear_logprobs_backward(
                dlogprobs,
                None,
                dentropy,
                None,
                hidden,
                weight,
                bias,
                None,
                None,
                targets,
                None,
                None,
                *statistics,
                None,
                *ctx.scalars,
                (*needs, False, False),
            )
        return (*(g if need else None for g, need in zip(gradients[:3], needs, strict=True)), *(None,) * 6)


class Acceleration:
    """What `accelerate_trl` returns: a context manager that undoes it, or `undo` to call."""

    def undo(self) -> None:
        """Give TRL its own functions back, unless another call of `accelerate_trl` is still in force; again does nothing."""
        if self in _in_force:
            _in_force.remove(self)
            if not _in_force:
                _restore()

    def __enter__(self) -> "Acceleration":
        if self not in _in_force:
            raise RuntimeError("this acceleration was undone: call accelerate_trl() again")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.undo()


_in_force: list[Acceleration] = []
_replaced: list[tuple[Any, str, Any]] = []  # owner, name, what it held: in the order of replacement


def accelerate_trl() -> Acceleration:
    """Make TRL's trainers score through the kernels of `linear_logprobs`, in this process.

    GRPO, RLOO, SFT, DPO and KTO, trainers that exist already included. Results are TRL's up to rounding: under bfloat16 and
    float16, TRL rounds logits to that dtype and the kernels keep them in float32. Positions without a label are not scored on
    CPU either, where TRL scores every position. GRPOTrainer trains through `linear_policy_loss` where its settings allow it;
    `fused_loss_obstacle` says why not where they do not.

    Returns:
        A handle: ``with accelerate_trl(): ...`` undoes it at the end of the block, ``.undo()`` at any time. Calls may be nested
        or repeated: TRL's functions come back when each call has been undone.

    Raises:
        ImportError: TRL is missing, of an untested version, or scores through other functions than expected.
    """
    if not _in_force:
        _trl_seam.check_scoring()
        for owner, name, replacement in _replacements():
            _replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
    handle = Acceleration()
    _in_force.append(handle)
    return handle


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of everything that is replaced and restored together."""
    utils = _trl_seam.trainer_utils
    scores_labels_only: Callable[[torch.device], bool] = getattr(utils, _trl_seam.SCORES_LABELS_ONLY)
    return [
        (utils, _trl_seam.SCORING_FUNCTION, LinearLogprobFunction),
        # Off CUDA, TRL keeps shapes static for devices that would recompile (Neuron); a CPU does not.
        (utils, _trl_seam.SCORES_LABELS_ONLY, lambda device: device.type == "cpu" or scores_labels_only(device)),
        (_trl_seam.GRPOTrainer, "_compute_loss", accelerate_grpo.fused(_trl_seam.GRPOTrainer._compute_loss)),
    ]


def _restore() -> None:
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)
