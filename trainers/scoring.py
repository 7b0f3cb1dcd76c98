"""Scoring inside the model's forward: ``model(..., scored_ids=...)`` returns log-probs, or a policy loss, instead of logits.

The head is applied inside the (possibly wrapped) forward, so that DDP sees every parameter used and autocast applies. Calls
without `scored_ids` (generation, TRL's own scoring) run the forward that was there before.
"""

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from dppo_kernels import Stat, linear_logprobs, linear_policy_loss
from dppo_kernels.trainers._trl_seam import load_balancing_loss_func
from dppo_kernels.trainers.distillation import compare, own_logits
from dppo_kernels.trainers.head import head_shape, in_head

IGNORE_INDEX = -100


@dataclass
class ScoredOutput(ModelOutput):
    """Per-token statistics of the scored positions, and a policy loss of them."""

    logprobs: Tensor | None = None  # [B, T]; 0 where ignored or not scored; detached where there is a loss
    entropy: Tensor | None = None  # [B, T]
    gathered: Tensor | None = None  # [B, T, K]
    loss: Tensor | None = None  # scalar
    stats: dict[str, Stat] | None = None
    aux_loss: Tensor | None = None  # scalar, mixture-of-experts load balancing
    hidden: Tensor | None = None  # [B, T, H], what the head is applied to
    distill_loss: Tensor | None = None  # scalar
    distill_stats: dict[str, Stat] | None = None


def logit_transform(config: PretrainedConfig) -> tuple[float | None, float]:
    """(soft-cap, scale) that the model applies between its head and the logits."""
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    # Cohere / Muse Glimmer / Falcon-H1 multiply the logits, Granite and MiniCPM3 divide them, HyperCLOVA X multiplies.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return softcap, float(getattr(text, name))
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return softcap, 1.0
    return softcap, float(scaling if text.model_type == "hyperclovax" else 1 / scaling)


def install_scoring(
    model: PreTrainedModel, *, temperature: float, cast_lm_head_to_fp32: bool = False, derive_positions: bool = True
) -> None:
    """Teach ``model.forward`` (a causal LM, without PEFT or DDP wrapper) to score ids instead of returning logits.

    Args:
        model: patched in place.
        temperature: divides the logits, as in the rollout.
        cast_lm_head_to_fp32: run the head in float32, outside autocast.
        derive_positions: pass the position ids that generate() uses on left-padded rows, where the caller passes none.

    The patched forward scores the last T positions of its input. `scored_ids` [B, T] are the ids at those positions (-100 =
    ignore); `scored_gather_ids` [B, T, K] are further ids to score there (negative = padding). With `policy_loss`, keyword
    arguments of `linear_policy_loss`, it returns that loss of the scored ids, its gradient computed on the way.
    `with_hidden` adds the hidden states before the scored ids, for a value head. With `distill`, arguments of `compare` but for
    the student's (`teacher` is called for a context that gives it), it adds the loss of being unlike a teacher at the scored
    positions, or at the last ones of other `sequences` (ids and attention mask), which then run through the backbone too.
    """
    previous_forward = model.forward
    softcap, logit_scale = logit_transform(model.config)
    derive_positions = derive_positions and "position_ids" in inspect.signature(type(model).forward).parameters

    # generate() validates its keywords against the class's signature, which `wraps` preserves.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        scored_ids: Tensor | None = None,
        scored_gather_ids: Tensor | None = None,
        policy_loss: dict[str, Any] | None = None,
        with_hidden: bool = False,
        distill: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if scored_ids is None:
            return previous_forward(*args, **kwargs)
        head = self.get_output_embeddings()
        device = head.weight.device

        def run_backbone(length: int, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
            """What it returns, and the hidden states before the last `length` positions."""
            if derive_positions and "position_ids" not in kwargs:  # models with absolute positions are wrong without it
                kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            backbone = self.base_model(*args, **kwargs, use_cache=False)
            hidden = backbone.last_hidden_state[:, -length - 1 : -1].to(device)
            return backbone, hidden.float() if cast_lm_head_to_fp32 else hidden

        backbone, hidden = run_backbone(scored_ids.shape[1], *args, **kwargs)
        states, student_logits = [hidden], None
        if distill is not None:
            distill = dict(distill)
            length, sequences, teacher = distill["loss_mask"].shape[1], distill.pop("sequences", None), distill.pop("teacher")
            ids, attention = sequences or (kwargs["input_ids"], kwargs["attention_mask"])
            if hasattr(self, "get_student_logits"):
                student_logits = own_logits(self.get_student_logits, ids, attention, length, head_shape(self)[0])
            elif sequences is not None:
                states.append(run_backbone(length, input_ids=ids, attention_mask=attention)[1])

        def apply(weight: Tensor, bias: Tensor | None, hidden: Tensor, compared: Tensor | None = None) -> Any:
            """What is scored, and the distillation loss with its stats: all that the head is used for, in one go."""
            own: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
            scored: Any
            if policy_loss is None:
                scored = linear_logprobs(
                    hidden,
                    weight,
                    scored_ids,
                    gather_ids=scored_gather_ids,
                    ignore_index=IGNORE_INDEX,
                    outputs=("logprobs", "entropy"),
                    temperature=temperature,
                    **own,
                )
            else:
                scored = linear_policy_loss(
                    hidden,
                    weight,
                    scored_ids,
                    rollout_topk_ids=scored_gather_ids,
                    return_aux=True,
                    temperature=temperature,
                    **policy_loss,
                    **own,
                )
            if distill is None:
                return scored, None
            student = {"logits": student_logits} if student_logits is not None else {"weight": weight, **own}
            if student_logits is None:
                student["hidden"] = hidden if compared is None else compared
            with teacher() as side:
                return scored, compare(student, side, **distill)

        precision: Any = torch.autocast(hidden.device.type, enabled=False) if cast_lm_head_to_fp32 else nullcontext()
        output = ScoredOutput(hidden=hidden if with_hidden else None)
        with precision:
            scored, distilled = in_head(head, apply, *states)
        if policy_loss is None:
            output.logprobs, output.entropy, output.gathered = scored.logprobs, scored.entropy, scored.gathered
        else:
            output.loss, output.stats, aux = scored
            output.logprobs, output.entropy = aux.logprobs, aux.entropy
        if distilled is not None:
            output.distill_loss, output.distill_stats = distilled
        if kwargs.get("output_router_logits"):
            output.aux_loss = load_balancing_loss(self.config, backbone.router_logits, kwargs.get("attention_mask"))
        return output

    model.forward = types.MethodType(forward, model)


@contextmanager
def scoring_installed(model: PreTrainedModel, **settings: Any) -> Iterator[None]:
    """`install_scoring` for the duration of a block; afterwards the model has the forward it had."""
    own = model.__dict__.get("forward")
    install_scoring(model, **settings)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def load_balancing_loss(config: PretrainedConfig, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    text = config.get_text_config()
    experts = text.num_experts if hasattr(text, "num_experts") else text.num_local_experts
    return load_balancing_loss_func(router_logits, experts, text.num_experts_per_tok, attention_mask)
