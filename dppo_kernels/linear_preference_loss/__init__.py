"""The fused preference loss: from hidden states of chosen and rejected sequences to the loss and its gradient."""

from dppo_kernels.linear_preference_loss.op import (
    PreferenceAux,
    SequenceLogprobs,
    explain_linear_preference_loss,
    linear_preference_loss,
    linear_sequence_logprobs,
)

__all__ = [
    "PreferenceAux",
    "SequenceLogprobs",
    "explain_linear_preference_loss",
    "linear_preference_loss",
    "linear_sequence_logprobs",
]
