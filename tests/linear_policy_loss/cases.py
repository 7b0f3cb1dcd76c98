"""Inputs of the fused policy loss as frozen cases; the same ones go through every implementation."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import PRESETS, PolicyLossSpec, linear_logprobs, linear_policy_loss
from tests.strategies import probabilities


@dataclass(frozen=True)
class PolicyCase:
    """A batch [b, t]; `dtype` is that of hidden, head and bias."""

    preset: str
    b: int = 3
    t: int = 7
    hidden_size: int = 12
    vocab: int = 53
    k: int = 4
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    layout: str = "contiguous"
    temperature: str = "one"  # one | cold | per_row
    masked: str = "some"  # none | some | all
    advantages: str = "sequence"  # sequence | token | half | none
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    on_policy: bool = False
    weighted: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = field(default=())

    def spec(self) -> PolicyLossSpec:
        return PRESETS[self.preset].replace(**dict(self.changes))

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + offset)

    def leaves(self) -> list[Tensor | None]:
        """hidden [b, t, H], head [V, H], bias, rounded to the case's dtype."""
        g, width = self.generator(), self.hidden_size * (2 if self.layout == "strided" else 1)
        hidden = torch.randn(self.b, self.t, width, generator=g).to(self.dtype)[..., :: width // self.hidden_size]
        weight = (torch.randn(self.hidden_size, self.vocab, generator=g) * self.scale / self.hidden_size**0.5).to(self.dtype)
        bias = torch.randn(self.vocab, 2, generator=g).to(self.dtype)[:, 0] if self.bias else None
        bias = bias if bias is None or self.layout == "strided" else bias.contiguous()
        return [hidden, weight.t() if self.layout == "strided" else weight.t().contiguous(), bias]

    def arguments(self) -> dict[str, Any]:
        """Everything but hidden, head and bias."""
        g, shape, spec = self.generator(1), (self.b, self.t), self.spec()
        mask = torch.rand(shape, generator=g) < {"none": 1.0, "some": 0.7, "all": 0.0}[self.masked]
        temperature: float | Tensor = {"one": 1.0, "cold": 0.3, "per_row": 1.0}[self.temperature]
        if self.temperature == "per_row":
            temperature = torch.rand(shape, generator=g) + 0.5
        head = {"temperature": temperature, "softcap": self.softcap, "logit_scale": self.logit_scale}
        ids = torch.randint(0, self.vocab, shape, generator=g)
        hidden, weight, bias = (None if x is None else x.double() for x in self.leaves())
        exact = linear_logprobs(hidden, weight, ids, bias=bias, **head).logprobs
        anchor = (exact + 0.4 * torch.randn(shape, generator=g)).clamp(max=-1e-3).float()
        advantages = torch.randn(shape[:1] if self.advantages != "token" else shape, generator=g)
        if self.advantages == "none":
            advantages = torch.zeros_like(advantages)
        elif self.advantages == "half":
            advantages[::2] = 0
        elif self.advantages == "token":
            advantages[torch.rand(shape, generator=g) < 0.4] = 0
        found: dict[str, Any] = {
            "ids": torch.where(mask, ids, -7 if self.b % 2 else 10**6),  # whatever stands behind the mask
            "anchor_logprobs": None if self.on_policy else torch.where(mask, anchor, torch.nan),
            "advantages": advantages,
            "loss_mask": mask,
            "spec": spec,
            "max_length": self.t + 2,
            **head,
        }
        if spec.beta:
            found["ref_logprobs"] = torch.where(mask, anchor + 0.5 * torch.randn(shape, generator=g), torch.nan)
        if self.weighted:
            found["token_weights"] = torch.rand(shape, generator=g) * (torch.rand(shape, generator=g) < 0.8)
        if spec.needs_topk:
            log_mu, _ = probabilities(self.vocab, self.b * self.t, self.seed)
            top = log_mu.topk(self.k, -1)
            valid = torch.rand(self.b * self.t, self.k, generator=g) < 0.8
            found["rollout_topk_ids"] = top.indices.masked_fill(~valid, -1).view(*shape, -1)
            found["rollout_topk_logprobs"] = top.values.float().view(*shape, -1)
            found["topk_valid"] = valid.view(*shape, -1)
        return found


def run(
    case: PolicyCase, dtype: torch.dtype, backend: str, device: str = "cpu", upstream: float = 1.0, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(loss and stats, gradients, aux) with inputs rounded to the case's dtype, then cast to `dtype`."""
    leaves = [None if x is None else x.to(device, dtype).requires_grad_() for x in case.leaves()]
    hidden, weight, bias = leaves
    arguments = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in (case.arguments() | changes).items()}
    loss, stats, aux = linear_policy_loss(
        hidden, weight, **arguments, bias=bias, backend=backend, return_aux=True, **dict(case.options)
    )
    used = {name: leaf for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True) if leaf is not None}
    grads = torch.autograd.grad(loss * upstream, list(used.values()))
    return {"loss": loss.detach().cpu()}, {name: grad.cpu() for name, grad in zip(used, grads, strict=True)}, {
        "stats": {name: tuple(x.cpu() for x in stat) for name, stat in stats.items()},
        "aux": aux,
    }  # fmt: skip


VARIANTS = ((), (("beta", 0.1),), (("beta", 0.1), ("kl_ratio_weighted", True)), (("entropy_coef", 0.05),))


def policy_cases(*, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> st.SearchStrategy[PolicyCase]:
    def build(preset: str, **values: Any) -> PolicyCase:
        return PolicyCase(preset, **values)

    return st.builds(
        build,
        st.sampled_from(sorted(PRESETS)),
        b=st.sampled_from([1, 2, 3]),
        t=st.sampled_from([1, 7, 11]),
        hidden_size=st.sampled_from([1, 12, 33]),
        vocab=st.sampled_from([17, 53, 123]),
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.1, 3.0, 30.0]),
        layout=st.sampled_from(["contiguous", "strided"]),
        temperature=st.sampled_from(["one", "cold", "per_row"]),
        masked=st.sampled_from(["none", "some", "all"]),
        advantages=st.sampled_from(["sequence", "token", "half", "none"]),
        bias=st.booleans(),
        softcap=st.sampled_from([None, 5.0]),
        logit_scale=st.sampled_from([1.0, 0.25]),
        on_policy=st.booleans(),
        weighted=st.booleans(),
        changes=st.sampled_from(VARIANTS),
        seed=st.integers(0, 2**20),
    )


def with_options(case: PolicyCase, **options: Any) -> PolicyCase:
    return replace(case, options=tuple(options.items()))
