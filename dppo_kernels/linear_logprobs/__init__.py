"""hidden x lm_head -> log-prob, entropy, LSE and gathered log-probs, without logits."""

from dppo_kernels.linear_logprobs.op import LinearLogprobs, explain_linear_logprobs, linear_logprobs

__all__ = ["LinearLogprobs", "explain_linear_logprobs", "linear_logprobs"]
