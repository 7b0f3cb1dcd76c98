"""Preference losses inside the model's forward: ``model(..., preference=...)`` returns the loss of pairs, or their log-probs.

As in `scoring`, the head is applied inside the (possibly wrapped) forward, so that DDP sees every parameter used and autocast
applies. Calls without `preference` run the forward that was there before.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dppo_kernels import Stat, linear_preference_loss, linear_sequence_logprobs
from dppo_kernels.trainers.head import in_head
from dppo_kernels.trainers.scoring import load_balancing_loss, logit_transform


@dataclass
class PreferenceOutput(ModelOutput):
    """A loss of pairs, or what is scored of them for one."""

    loss: Tensor | None = None  # scalar
    stats: dict[str, Stat] | None = None
    sequence_logprobs: Tensor | None = None  # float64 [2P], without a gradient: where no loss is asked for
    aux_loss: Tensor | None = None  # scalar, mixture-of-experts load balancing


def install_preference_scoring(model: PreTrainedModel) -> None:
    """Teach ``model.forward`` (a causal LM, without PEFT or DDP wrapper) to score pairs instead of returning logits.

    With ``preference={"completion_mask": [2P, L], ...}`` it runs the backbone over `input_ids` [2P, L], P chosen and then the P
    rejected sequences, and returns `linear_preference_loss` of the tokens where the mask is not 0, whose further arguments are
    those of the dictionary (`spec` among them); with `reference_of` in place of `spec`, `linear_sequence_logprobs` for it.
    """
    previous_forward = model.forward
    softcap, logit_scale = logit_transform(model.config)

    # generate() validates its keywords against the class's signature, which `wraps` preserves.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, preference: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if preference is None:
            return previous_forward(*args, **kwargs)
        options = dict(preference)
        head = self.get_output_embeddings()
        device = head.weight.device  # of a model that is split over several, the last
        mask, ids = options.pop("completion_mask")[:, 1:].bool().to(device), kwargs["input_ids"][:, 1:].to(device)
        backbone = self.base_model(*args, **kwargs, use_cache=False)
        hidden = backbone.last_hidden_state[:, :-1].to(device)
        if "reference_of" not in options:
            options["ref_logprobs"] = options["ref_logprobs"].to(device)

        def apply(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Any:
            transform: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap, **options}
            if "reference_of" in options:
                return linear_sequence_logprobs(
                    hidden, weight, ids, mask, spec=transform.pop("reference_of"), **transform
                ).logprobs
            return linear_preference_loss(hidden, weight, ids, mask, **transform)

        found = in_head(head, apply, hidden)
        if "reference_of" in options:
            return PreferenceOutput(sequence_logprobs=found)
        output = PreferenceOutput(*found)
        if kwargs.get("output_router_logits"):
            output.aux_loss = load_balancing_loss(self.config, backbone.router_logits, kwargs.get("attention_mask"))
        return output

    model.forward = types.MethodType(forward, model)
