"""Inputs of the fused preference loss as frozen cases; the same ones go through every implementation."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import PREFERENCE_LOSSES, LoraWeight, PreferenceSpec, linear_preference_loss
from dppo_kernels.preference_formulas import Pairs, pair_slopes
from dppo_kernels.preference_spec import MARGIN_LOSSES

TRAINED = ("hidden", "weight", "bias", "a", "b")  # names of what can be trained
LORA_RANK, LORA_SCALE = 5, 0.75
# Every loss, every f-divergence where it means something, and what is not the loss of one pair.
SPECS = (
    *(PreferenceSpec(name, beta=0.3, label_smoothing=0.1) for name in PREFERENCE_LOSSES),
    *(
        PreferenceSpec(name, f_divergence_type=kind, label_smoothing=0.2, f_alpha_divergence_coef=0.7)
        for name in (*MARGIN_LOSSES, "sft")
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    PreferenceSpec(("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
    PreferenceSpec(("aot", "sft", "sigmoid"), label_smoothing=0.1, ld_alpha=0.3),
    *(PreferenceSpec(("ipo", "sft"), ld_alpha=alpha) for alpha in (0.0, 0.4, 1.0)),
    PreferenceSpec(("sigmoid", "sft"), loss_weights=(1.0, -0.5), use_weighting=True, ld_alpha=0.5),
)


@dataclass(frozen=True)
class PreferenceCase:
    """Pairs [2P, T] and two models; `dtype` is that of everything, rounded to once."""

    spec: PreferenceSpec = SPECS[0]
    pairs: int = 3
    t: int = 7
    hidden_size: int = 12
    ref_size: int = 9
    vocab: int = 53
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    layout: str = "contiguous"  # contiguous | strided
    temperature: str = "one"  # one | cold | per_row
    masked: str = "some"  # none | some | prompt: a first part of each row | all
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: bool = False
    trained: tuple[str, ...] = TRAINED
    reference: str = "model"  # model | given | same: the policy itself
    packed: bool = False
    poison: bool = True  # NaN behind the mask
    seed: int = 0

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + offset)

    def shape(self) -> tuple[int, int]:
        return 2 * self.pairs, self.t

    def mask(self) -> Tensor:
        if self.masked == "prompt":
            first = torch.randint(0, self.t, (2 * self.pairs, 1), generator=self.generator(1))
            return torch.arange(self.t) >= first
        return torch.rand(self.shape(), generator=self.generator(1)) < {"none": 1.0, "some": 0.7, "all": 0.0}[self.masked]

    def ids(self) -> Tensor:
        ids = torch.randint(0, self.vocab, self.shape(), generator=self.generator(2))
        return torch.where(self.mask(), ids, 10**6)

    def per_token_temperature(self) -> float | Tensor:
        if self.temperature != "per_row":
            return {"one": 1.0, "cold": 0.2}[self.temperature]
        values = torch.rand(self.shape(), generator=self.generator(3)) + 0.5
        return torch.where(self.mask(), values, torch.nan) if self.poison else values

    def model(self, width: int, offset: int) -> dict[str, Tensor]:
        g, step = self.generator(offset), 2 if self.layout == "strided" else 1
        weight = (torch.randn(width, self.vocab, generator=g) * self.scale / width**0.5).to(self.dtype)
        model = {
            "hidden": torch.randn(*self.shape(), step * width, generator=g).to(self.dtype)[..., ::step],
            "weight": weight.t() if step == 2 else weight.t().contiguous(),
        }
        if self.bias:
            model["bias"] = torch.randn(step * self.vocab, generator=g).to(self.dtype)[::step]
        if self.lora:
            model["a"] = (torch.randn(LORA_RANK, width, generator=g) / width**0.5).to(self.dtype)
            model["b"] = (torch.randn(self.vocab, LORA_RANK, generator=g) * self.scale / LORA_RANK**0.5).to(self.dtype)
        if self.poison:
            model["hidden"][~self.mask()] = torch.nan
        return model

    def leaves(self) -> dict[str, Tensor]:
        return self.model(self.hidden_size, 4)

    def reference_model(self) -> dict[str, Tensor]:
        return self.leaves() if self.reference == "same" else self.model(self.ref_size, 5)

    def largest_logit(self) -> float:
        x = {name: value.double() for name, value in self.leaves().items()}
        weight = x["weight"] + LORA_SCALE * x["b"] @ x["a"] if self.lora else x["weight"]
        z = self.logit_scale * (x["hidden"][self.mask()] @ weight.t() + x.get("bias", 0.0))
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return (z.abs().max().item() if z.numel() else 0.0) / {"one": 1.0, "cold": 0.2, "per_row": 0.5}[self.temperature]


def head(model: dict[str, Tensor]) -> Tensor | LoraWeight:
    return LoraWeight(model["weight"], model["a"], model["b"], LORA_SCALE) if "a" in model else model["weight"]


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]


def run(
    case: PreferenceCase, dtype: torch.dtype, backend: str, device: str = "cpu", *, upstream: float = 1.0, **changes: Any
) -> Found:
    """(loss and what was scored, gradients, the rest), inputs rounded to the case's dtype, then cast to `dtype`."""
    leaves = {name: x.to(device, dtype).requires_grad_(name in case.trained) for name, x in case.leaves().items()}
    rows: dict[str, Any] = {"hidden": leaves["hidden"], "ids": case.ids(), "loss_mask": case.mask()}
    rows["temperature"] = case.per_token_temperature()
    if case.reference == "given":
        rows["ref_logprobs"] = -10 * torch.rand(2 * case.pairs, generator=case.generator(6))
    else:
        other = {name: x.to(device, dtype) for name, x in case.reference_model().items()}
        rows |= {"ref_hidden": other["hidden"], "ref_weight": head(other), "ref_bias": other.get("bias")}
    if case.packed:
        # Rows of all sequences in any order, those of one in theirs.
        n, length = case.shape()
        sequence = torch.arange(n).repeat_interleave(length)[torch.randperm(n * length, generator=case.generator(7))]
        order = torch.empty_like(sequence)
        for s in range(n):
            order[sequence == s] = torch.arange(s * length, (s + 1) * length)
        rows |= {"sequence_ids": sequence, "n_pairs": case.pairs}
        for name in ("hidden", "ids", "loss_mask", "temperature", "ref_hidden"):
            if isinstance(rows.get(name), Tensor):
                rows[name] = rows[name].flatten(0, 1)[order.to(rows[name].device)]
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in rows.items()}
    asked = {"outputs": ("entropy", "is_top1", "mean_logits"), "return_aux": True}
    asked |= {"softcap": case.softcap, "logit_scale": case.logit_scale, "bias": leaves.get("bias")}
    hidden, ids, mask = (arguments.pop(name) for name in ("hidden", "ids", "loss_mask"))
    loss, stats, aux = linear_preference_loss(
        hidden, head(leaves), ids, mask, spec=case.spec, backend=backend, **(arguments | asked | changes)
    )
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(loss * upstream, list(trained.values())) if trained else ()
    found = {name: x.cpu() for name, x in aux._asdict().items() if x is not None}
    values = {"loss": loss.detach().cpu(), **{name: found[name] for name in found if name not in ("lengths", "is_top1")}}
    moved = {name: tuple(x.cpu() for x in stat) for name, stat in stats.items()}
    rest = {"stats": moved, "lengths": found["lengths"], "is_top1": found.get("is_top1")}
    return values, {name: grad.cpu() for name, grad in zip(trained, grads, strict=True)}, rest


def steepness(case: PreferenceCase, exact: dict[str, Tensor], lengths: Tensor) -> float:
    """How much the loss moves, at most, with the log-prob of a sequence."""
    halves = (x.double().view(2, -1) for x in (exact["logprobs"], exact["ref_logprobs"], lengths.clamp(min=1)))
    slopes = pair_slopes(Pairs(*(half for both in halves for half in both)), 1.0, case.spec)
    return max(1.0, *(x.abs().max().item() for x in slopes))


def preference_cases(*, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> st.SearchStrategy[PreferenceCase]:
    return st.builds(
        PreferenceCase,
        st.sampled_from(SPECS),
        pairs=st.sampled_from([1, 2, 5]),
        t=st.sampled_from([1, 7, 11]),
        hidden_size=st.sampled_from([1, 12, 33]),
        ref_size=st.sampled_from([1, 9, 40]),
        vocab=st.sampled_from([2, 17, 53, 123]),
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.1, 3.0, 10.0]),
        layout=st.sampled_from(["contiguous", "strided"]),
        temperature=st.sampled_from(["one", "cold", "per_row"]),
        masked=st.sampled_from(["none", "some", "prompt", "all"]),
        bias=st.booleans(),
        softcap=st.sampled_from([None, 5.0]),
        logit_scale=st.sampled_from([1.0, 0.25]),
        lora=st.booleans(),
        trained=st.sampled_from([TRAINED, TRAINED, ("hidden", "a", "b"), ("hidden",), ("weight", "bias", "b"), ()]),
        reference=st.sampled_from(["model", "given", "same"]),
        packed=st.booleans(),
        seed=st.integers(0, 2**20),
    )
