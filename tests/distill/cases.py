"""Inputs of the distillation losses as frozen cases; the same ones go through every implementation."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import LoraWeight, distill_loss, linear_distill_loss, topk_distill_loss
from dppo_kernels.distill import DISTILL_KINDS, DistillAux

STUDENT = ("hidden", "weight", "bias", "a", "b")  # names of what can be trained
LORA_RANK, LORA_SCALE = 5, 0.75
# A kind with every beta that is another formula.
KINDS = (("forward_kl", 0.5), ("reverse_kl", 0.5), ("tv", 0.5), *(("jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)))


@dataclass(frozen=True)
class DistillCase:
    """A batch [b, t] and two models; `dtype` is that of everything the student has, rounded to once."""

    kind: str = "jsd"
    beta: float = 0.5
    b: int = 3
    t: int = 7
    student_size: int = 12
    teacher_size: int = 17
    vocab: int = 53
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    scale: float = 3.0
    layout: str = "contiguous"  # contiguous | strided
    temperature: str = "one"  # one | cold | per_row
    masked: str = "some"  # none | some | all
    bias: bool = False
    banned: str = "none"  # none | both | teacher: tokens whose bias is -inf; needs `bias`
    softcap: float | None = None
    teacher_softcap: float | None = None
    logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    t_squared: bool = False
    lora: str = "none"  # none | student | teacher | both
    trained: tuple[str, ...] = STUDENT
    teacher: str = "apart"  # apart | close: the student's head on hidden states next to the student's | same: the student
    poison: bool = True  # NaN and infinity behind the mask, in the temperature too
    seed: int = 0

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + offset)

    def mask(self) -> Tensor:
        return torch.rand(self.b, self.t, generator=self.generator(1)) < {"none": 1.0, "some": 0.7, "all": 0.0}[self.masked]

    def per_token_temperature(self) -> float | Tensor:
        if self.temperature != "per_row":
            return {"one": 1.0, "cold": 0.1}[self.temperature]
        values = torch.rand(self.b, self.t, generator=self.generator(2)) + 0.5
        return torch.where(self.mask(), values, torch.nan) if self.poison else values

    def leaves(self) -> dict[str, Tensor]:
        """What the student has, by the names of `STUDENT`."""
        return self._poisoned(self._model(self.student_size, self.dtype, 3, self.lora in ("student", "both")), torch.nan)

    def teacher_leaves(self) -> dict[str, Tensor]:
        if self.teacher == "apart":
            model = self._model(self.teacher_size, self.teacher_dtype, 4, self.lora in ("teacher", "both"))
        else:
            model = self._model(self.student_size, self.dtype, 3, self.lora in ("student", "both"))
            if self.teacher == "close":
                model = {name: x.to(self.teacher_dtype) for name, x in model.items()}
                noise = torch.randn(model["hidden"].shape, generator=self.generator(4))
                model["hidden"] = (model["hidden"].float() + 1e-3 * noise).to(self.teacher_dtype)
        if self.banned == "teacher" and "bias" in model and self.teacher != "same":
            model["bias"][self._few_tokens(6)] = -torch.inf
        return self._poisoned(model, torch.inf)

    def _model(self, width: int, dtype: torch.dtype, offset: int, lora: bool) -> dict[str, Tensor]:
        g, step = self.generator(offset), 2 if self.layout == "strided" else 1
        weight = (torch.randn(width, self.vocab, generator=g) * self.scale / width**0.5).to(dtype)
        model = {
            "hidden": torch.randn(self.b, self.t, step * width, generator=g).to(dtype)[..., ::step],
            "weight": weight.t() if step == 2 else weight.t().contiguous(),
        }
        if self.bias:
            model["bias"] = torch.randn(step * self.vocab, generator=g).to(dtype)[::step]
            if self.banned == "both":
                model["bias"][self._few_tokens(5)] = -torch.inf
        if lora:
            model["a"] = (torch.randn(LORA_RANK, width, generator=g) / width**0.5).to(dtype)
            model["b"] = (torch.randn(self.vocab, LORA_RANK, generator=g) * self.scale / LORA_RANK**0.5).to(dtype)
        return model

    def _few_tokens(self, offset: int) -> Tensor:
        """Less than half of the vocabulary, its last token included."""
        few = torch.randperm(self.vocab - 1, generator=self.generator(offset))[: (self.vocab - 1) // 3]
        return torch.cat([few, torch.tensor([self.vocab - 1])]) if self.vocab > 2 else few

    def _poisoned(self, model: dict[str, Tensor], poison: float) -> dict[str, Tensor]:
        if self.poison:
            model["hidden"][~self.mask()] = poison
        return model

    def options(self) -> dict[str, Any]:
        """What all three losses take."""
        return {
            "kind": self.kind,
            "beta": self.beta,
            "temperature": self.per_token_temperature(),
            "t_squared": self.t_squared,
        }

    def arguments(self) -> dict[str, Any]:
        """Of `linear_distill_loss`, but for hidden states, heads and biases."""
        alike = self.teacher != "apart"
        return {
            "loss_mask": self.mask(),
            **self.options(),
            "student_softcap": self.softcap,
            "teacher_softcap": self.softcap if alike else self.teacher_softcap,
            "student_logit_scale": self.logit_scale,
            "teacher_logit_scale": self.logit_scale if alike else self.teacher_logit_scale,
        }

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both models' logits [b, t, V] in float64, before the temperature; NaN behind the mask."""
        arguments = self.arguments()
        found = []
        for model, prefix in ((self.leaves(), "student"), (self.teacher_leaves(), "teacher")):
            x = {name: value.double() for name, value in model.items()}
            weight = x["weight"] + LORA_SCALE * x["b"] @ x["a"] if "a" in x else x["weight"]
            z = arguments[f"{prefix}_logit_scale"] * (x["hidden"] @ weight.t() + x.get("bias", 0.0))
            softcap = arguments[f"{prefix}_softcap"]
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            found.append(torch.where(self.mask()[..., None], z, torch.nan))
        return found[0], found[1]

    def final_logits(self) -> tuple[Tensor, Tensor]:
        temperature = self.per_token_temperature()
        divisor = temperature[..., None].double() if isinstance(temperature, Tensor) else temperature
        student, teacher = self.logits()
        return student / divisor, teacher / divisor

    def largest_logit(self) -> float:
        values = torch.cat([z[z.isfinite()] for z in self.final_logits()])
        return values.abs().max().item() if values.numel() else 0.0

    def coldest(self) -> float:
        return {"one": 1.0, "cold": 0.1, "per_row": 0.5}[self.temperature]


def head(model: dict[str, Tensor]) -> Tensor | LoraWeight:
    return LoraWeight(model["weight"], model["a"], model["b"], LORA_SCALE) if "a" in model else model["weight"]


def cast(case: DistillCase, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both models on `device`: the student in `dtype`, and so the teacher unless that is the case's own."""
    student = {name: x.to(device, dtype).requires_grad_(name in case.trained) for name, x in case.leaves().items()}
    kept = dtype == case.dtype
    return student, {name: x.to(device, x.dtype if kept else dtype) for name, x in case.teacher_leaves().items()}


def _moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values())) if trained else ()
    return {name: grad.cpu() for name, grad in zip(trained, found, strict=True)}


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]


def _found(loss: Tensor, grads: dict[str, Tensor], stats: dict[str, Any], aux: DistillAux) -> Found:
    per_token = {name: x.cpu() for name, x in aux._asdict().items() if x is not None}
    values = {"loss": loss.detach().cpu(), **{name: x for name, x in per_token.items() if name != "agrees"}}
    moved = {name: tuple(x.cpu() for x in stat) for name, stat in stats.items()}
    return values, grads, {"stats": moved, "agrees": per_token.get("agrees")}


def run(
    case: DistillCase, dtype: torch.dtype, backend: str, device: str = "cpu", *, upstream: float = 1.0, **changes: Any
) -> Found:
    """(loss and per-token values, gradients, statistics), inputs rounded to the case's dtype, then cast to `dtype`."""
    student, teacher = cast(case, dtype, device)
    asked = {"with_entropy": True, "with_agreement": True, "return_aux": True}
    loss, stats, aux = linear_distill_loss(
        student["hidden"],
        head(student),
        teacher["hidden"],
        head(teacher),
        **_moved(case.arguments() | asked | changes, device),
        student_bias=student.get("bias"),
        teacher_bias=teacher.get("bias"),
        backend=backend,
    )
    return _found(loss, _gradients(loss * upstream, student), stats, aux)


def run_logits(case: DistillCase, dtype: torch.dtype, backend: str, device: str = "cpu", **changes: Any) -> Found:
    """The same of `distill_loss`; strided logits are views of ones with a token more at the end."""
    own, other = (z.to(to) for z, to in zip(case.logits(), (case.dtype, case.teacher_dtype), strict=True))
    student, teacher = own.to(device, dtype), other.to(device, other.dtype if dtype == case.dtype else dtype)
    source = torch.nn.functional.pad(student, (0, 0, 0, 1)).requires_grad_()
    logits = source[:, :-1] if case.layout == "strided" else source[:, :-1].contiguous()
    teacher = torch.nn.functional.pad(teacher, (0, 0, 1, 0))[:, 1:] if case.layout == "strided" else teacher
    asked = {"with_entropy": True, "with_agreement": True, "return_aux": True, "loss_mask": case.mask()}
    loss, stats, aux = distill_loss(logits, teacher, **_moved(case.options() | asked | changes, device), backend=backend)
    grads = _gradients(loss, {"logits": source})
    return _found(loss, {name: grad[:, :-1] for name, grad in grads.items()}, stats, aux)


def teacher_topk(case: DistillCase, k: int) -> tuple[Tensor, Tensor]:
    """What was recorded of the teacher: ids [b, t, K] in any order, padding, garbage behind the mask; and log-probs."""
    logp = torch.log_softmax(case.final_logits()[1].nan_to_num(nan=0.0), -1)
    top = logp.topk(k, -1)
    g = case.generator(7)
    present = case.mask()[..., None] & (torch.rand(top.indices.shape, generator=g) < 0.8)
    ids = torch.where(present, top.indices, -1)
    return torch.where(case.mask()[..., None], ids, 10**6), torch.where(present, top.values, torch.nan).float()


def run_topk(case: DistillCase, dtype: torch.dtype, backend: str, device: str = "cpu", k: int = 4, **changes: Any) -> Found:
    """The same of `topk_distill_loss`."""
    student, _ = cast(case, dtype, device)
    ids, logprobs = (x.to(device) for x in teacher_topk(case, min(k, case.vocab)))
    own = {"student_softcap": case.softcap, "student_logit_scale": case.logit_scale, "loss_mask": case.mask()}
    loss, stats, aux = topk_distill_loss(
        student["hidden"],
        head(student),
        ids,
        logprobs,
        **_moved(case.options() | own | {"with_entropy": True, "return_aux": True} | changes, device),
        student_bias=student.get("bias"),
        backend=backend,
    )
    return _found(loss, _gradients(loss, student), stats, aux)


def distill_cases(*, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> st.SearchStrategy[DistillCase]:
    """Of any kind; the teacher's dtype is one of them that may meet the student's."""

    def build(kind: tuple[str, float], teacher_dtype: torch.dtype, **values: Any) -> DistillCase:
        double = torch.float64 in (teacher_dtype, values["dtype"])
        case = DistillCase(*kind, teacher_dtype=values["dtype"] if double else teacher_dtype, **values)
        if case.kind == "tv":  # which has no derivative where the models agree: what rounds decides there
            case = replace(case, teacher="apart")
        if case.bias and case.banned != "none":  # a soft-cap makes -inf finite, so that one model alone would ban
            case = replace(case, softcap=None, teacher_softcap=None)
        infinite = case.banned == "teacher" and (case.kind == "reverse_kl" or (case.kind, case.beta) == ("jsd", 1.0))
        return replace(case, banned="both") if infinite else case

    return st.builds(
        build,
        st.sampled_from(KINDS),
        st.sampled_from(dtypes),
        b=st.sampled_from([1, 2, 3]),
        t=st.sampled_from([1, 7, 11]),
        student_size=st.sampled_from([1, 12, 33]),
        teacher_size=st.sampled_from([1, 17, 40]),
        vocab=st.sampled_from([2, 17, 53, 123]),
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.1, 3.0, 30.0]),
        layout=st.sampled_from(["contiguous", "strided"]),
        temperature=st.sampled_from(["one", "cold", "per_row"]),
        masked=st.sampled_from(["none", "some", "all"]),
        bias=st.booleans(),
        banned=st.sampled_from(["none", "both", "teacher"]),
        softcap=st.sampled_from([None, 5.0]),
        teacher_softcap=st.sampled_from([None, 5.0]),
        logit_scale=st.sampled_from([1.0, 0.25]),
        teacher_logit_scale=st.sampled_from([1.0, 0.25]),
        t_squared=st.booleans(),
        lora=st.sampled_from(["none", "student", "teacher", "both"]),
        trained=st.sampled_from([STUDENT, STUDENT, ("hidden", "a", "b"), ("hidden",), ("weight", "bias", "b"), ()]),
        teacher=st.sampled_from(["apart", "apart", "close", "same"]),
        seed=st.integers(0, 2**20),
    )


__all__ = [
    "DISTILL_KINDS",
    "KINDS",
    "STUDENT",
    "DistillCase",
    "Found",
    "cast",
    "distill_cases",
    "head",
    "run",
    "run_logits",
    "run_topk",
    "teacher_topk",
]
assert {kind for kind, _ in KINDS} == set(DISTILL_KINDS)
