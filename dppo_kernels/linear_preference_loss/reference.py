"""Definition of the fused preference loss: the loss of what `linear_logprobs` scores in its reference."""

import torch

from dppo_kernels._shard import arguments
from dppo_kernels.linear_logprobs import LinearLogprobs, linear_logprobs
from dppo_kernels.linear_preference_loss.call import Call, Model

IGNORED = -100  # stands for ids behind the mask, whatever they are


def score_rows_ref(model: Model, call: Call, outputs: frozenset[str]) -> LinearLogprobs:
    """Statistics of the call's rows under a model, 0 behind the mask; `Task.loss` makes the loss of them."""
    mask, temperature = call.mask, call.row_temperature
    return linear_logprobs(
        torch.where(mask[:, None], model.hidden, 0.0),  # NaN behind the mask would reach the head's gradient
        model.weight,
        call.ids.masked_fill(~mask, IGNORED),
        bias=model.bias,
        temperature=call.temperature if temperature is None else torch.where(mask, temperature, 1.0),
        logit_scale=call.logit_scale,
        softcap=call.softcap,
        ignore_index=IGNORED,
        outputs=sorted(outputs | {"logprobs"}),
        backend="reference",
        **arguments(call.shard),
    )
