"""DPO's loss from hidden states of policy and reference, forward and backward: ours, TRL, Liger, full logits, compiled.

Four pairs whose first half is prompt. The reference is next to the policy, as after the first steps, so that no pair is
saturated. One variant computes what TRL's trainer logs as well (entropies, mean logits, accuracy), as that always does: ours
and TRL's are asked for the same in every variant. On CPU TRL scores every row, prompts too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import OURS, PREFERENCE_LOSSES
from benchmarks.cases.linear_logprobs import KEEPS_LOGITS, with_tf32
from benchmarks.shapes import Shape

PAIRS = 4
BETA = 0.1
METRICS = ("entropy", "mean_logits", "is_top1")


class Inputs(NamedTuple):
    hidden: Tensor  # [2 PAIRS, T, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [2 PAIRS, T]
    mask: Tensor  # bool [2 PAIRS, T]
    ref_hidden: Tensor  # [2 PAIRS, T, H]
    ref_weight: Tensor  # [V, H]
    upstream: Tensor  # scalar


def ours(x: Inputs, outputs: tuple[str, ...]) -> Tensor:
    from dppo_kernels import PreferenceSpec, linear_preference_loss

    reference = {"ref_hidden": x.ref_hidden, "ref_weight": x.ref_weight}
    spec = PreferenceSpec(beta=BETA)
    return linear_preference_loss(x.hidden, x.weight, x.ids, x.mask, spec=spec, **reference, outputs=outputs)[0]


def trl(x: Inputs, outputs: tuple[str, ...]) -> Tensor:
    """What DPOTrainer's forwards and loss do."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprobs(hidden: Tensor, weight: Tensor, outputs: tuple[str, ...]) -> Tensor:
        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", *outputs))
        if hidden.is_cuda:
            scored = ChunkedLogProbFunction.apply(hidden[x.mask], weight, None, x.ids[x.mask], *options)[0]
            return scored.new_zeros(x.ids.shape).masked_scatter(x.mask, scored)
        rows = hidden.reshape(-1, hidden.shape[-1])
        scored = ChunkedLogProbFunction.apply(rows, weight, None, x.ids.flatten(), *options)[0]
        return scored.view_as(x.ids).masked_fill(~x.mask, 0)

    policy = logprobs(x.hidden, x.weight, outputs)
    with torch.no_grad():
        reference = logprobs(x.ref_hidden, x.ref_weight, ())
    return dpo(policy, reference)


def liger(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False, use_ref_model=True)
    labels = x.ids.masked_fill(~x.mask, -100)
    return loss(x.weight, x.hidden, labels, ref_input=x.ref_hidden, ref_weight=x.ref_weight)[0]


def naive(x: Inputs) -> Tensor:
    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        scores = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        return scores.gather(-1, x.ids[..., None]).squeeze(-1) * x.mask

    with torch.no_grad():
        reference = logprobs(x.ref_hidden, x.ref_weight)
    return dpo(logprobs(x.hidden, x.weight), reference)


def dpo(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Of per-token log-probs that are 0 behind the mask, as it is usually written."""
    chosen, rejected = (logprobs - ref_logprobs).sum(1).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


@functools.cache
def _compiled_naive():  # type: ignore[no-untyped-def]
    return torch.compile(naive, dynamic=False)


def compiled(x: Inputs) -> Tensor:
    return _compiled_naive()(x)


@dataclass(frozen=True)
class Variant:
    """A case: the same loss with a head that is trained or frozen, and with what is logged or without."""

    trains_head: bool = True
    metrics: bool = False

    MODES: ClassVar = ("forward+backward",)
    MAX_ERROR: ClassVar = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
    MAX_GRADIENT_ERROR: ClassVar = {torch.float32: 1e-5, torch.bfloat16: 5e-3}

    @functools.cached_property
    def PROVIDERS(self) -> dict[str, Callable[[Inputs], Tensor]]:
        outputs = METRICS if self.metrics else ()
        asked = {name: functools.partial(provider, outputs=outputs) for name, provider in ((OURS, ours), ("trl", trl))}
        # The others compute the loss alone.
        return {**asked, "liger": liger, "liger tf32": with_tf32(liger), "naive": naive, "torch.compile": compiled}

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        lead = (2 * PAIRS, shape.n // (2 * PAIRS))

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device)

        hidden, weight = randn(*lead, shape.h), 4 / shape.h**0.5 * randn(shape.v, shape.h)
        reference = hidden + 0.01 * randn(*lead, shape.h)
        mask = torch.arange(lead[1], device=device).expand(lead) >= lead[1] // 2
        return Inputs(
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(self.trains_head),
            torch.randint(0, shape.v, lead, generator=g, device=device),
            mask.contiguous(),
            reference.to(dtype),
            weight.detach().to(dtype, copy=True),
            torch.ones((), device=device),
        )

    def rows(self, x: Inputs, n: int) -> Inputs:
        """Of every sequence the last tokens."""

        def cut(per_token: Tensor) -> Tensor:
            return per_token[:, -max(1, n // (2 * PAIRS)) :]

        return Inputs(
            *(part if name in ("weight", "ref_weight", "upstream") else cut(part) for name, part in x._asdict().items())
        )

    def exact(self, x: Inputs) -> Tensor:
        return naive(x)

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        """2 NHV a product: a projection of each model, the policy's again where nothing is kept, and a gradient each.

        Prompts enter no GEMM of ours, nor of TRL's on CUDA.
        """
        counted = 0.5 if provider == OURS or (provider == "trl" and torch.cuda.is_available()) else 1.0
        projected_again = provider == "trl"
        gradients = 1 + (self.trains_head or provider.startswith("liger"))
        return 2 * counted * (2 + projected_again + gradients) * shape.n * shape.h * shape.v, "flop"

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        return 5 * 4 * shape.n * shape.v if provider in KEEPS_LOGITS else 0


VARIANTS = dict(zip(PREFERENCE_LOSSES, (Variant(), Variant(metrics=True), Variant(trains_head=False)), strict=True))
