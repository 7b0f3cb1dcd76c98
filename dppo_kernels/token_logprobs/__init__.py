"""logits -> log-prob, entropy, LSE, gathered log-probs, and top-K with the sampled token injected."""

from dppo_kernels.token_logprobs.op import TokenLogprobs, token_logprobs
from dppo_kernels.token_logprobs.topk import TopKLogprobs, topk_logprobs

__all__ = ["TokenLogprobs", "TopKLogprobs", "token_logprobs", "topk_logprobs"]
