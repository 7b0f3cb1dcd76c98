"""Scores computed inside the forward equal those from the model's own logits, whatever the model does to them."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from dppo_kernels.trainers.scoring import install_scoring, logit_transform

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "gemma2 soft-cap": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0),
    "cohere logit scale": CohereConfig(**SIZES, logit_scale=0.25),
    "granite logits scaling": GraniteConfig(**SIZES, logits_scaling=4.0),
    "gpt2 absolute positions": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_the_models_own_logits(name: str, temperature: float) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.get_output_embeddings().weight.data *= 8
    install_scoring(model, temperature=temperature)
    ids = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left-padded prompt
    ids[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    scored, gather = ids[:, -5:].clone(), torch.randint(0, 97, (3, 5, 4))
    scored[1, -2:] = -100
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, scored_ids=scored, scored_gather_ids=gather)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logp = torch.log_softmax(logits[:, -6:-1].double() / temperature, -1)
    active = scored != -100
    expected = logp.gather(2, scored.clamp(min=0)[..., None]).squeeze(2)
    torch.testing.assert_close(out.logprobs[active].double(), expected[active], rtol=0, atol=2e-5)
    assert not out.logprobs[~active].any()
    torch.testing.assert_close(out.entropy[active].double(), -(logp.exp() * logp).sum(-1)[active], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.gathered[active].double(), logp.gather(2, gather)[active], rtol=0, atol=2e-5)


def test_gradients_equal_those_of_the_logits() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma2 soft-cap"]).eval()
    install_scoring(model, temperature=0.8)
    ids = torch.randint(3, 97, (2, 8))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), scored_ids=ids[:, -4:]).logprobs.sum().backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -5:-1] / 0.8
    torch.log_softmax(logits, -1).gather(2, ids[:, -4:, None]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(fused[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_other_calls_run_the_forward_that_was_there() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    ids = torch.randint(3, 97, (2, 8))
    before = model(input_ids=ids).logits
    install_scoring(model, temperature=0.5)
    assert torch.equal(model(input_ids=ids).logits, before)
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= 11


def test_head_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    ids = torch.randint(3, 97, (2, 8))
    scores = {}
    for cast in (False, True):
        install_scoring(model, temperature=1.0, cast_lm_head_to_fp32=cast)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            scores[cast] = model(input_ids=ids, attention_mask=torch.ones_like(ids), scored_ids=ids[:, -4:]).logprobs
            hidden = model.base_model(input_ids=ids).last_hidden_state[:, -5:-1].float()
    logp = torch.log_softmax(hidden @ model.lm_head.weight.t(), -1).gather(2, ids[:, -4:, None]).squeeze(2)
    torch.testing.assert_close(scores[True], logp.detach(), rtol=0, atol=1e-5)
    assert scores[False].dtype == torch.float32
    assert (scores[False] - scores[True]).abs().max() > 1e-5


def test_logit_transform_reads_every_convention() -> None:
    for name, expected in {"llama": (None, 1.0), "gemma2 soft-cap": (3.0, 1.0), "cohere logit scale": (None, 0.25)}.items():
        assert logit_transform(CONFIGS[name]) == expected
    assert logit_transform(CONFIGS["granite logits scaling"]) == (None, 0.25)
    for attribute, value in (("output_multiplier", 0.5), ("lm_head_multiplier", 0.125)):
        config = LlamaConfig(**SIZES)
        setattr(config, attribute, value)
        assert logit_transform(config) == (None, value)
    config = LlamaConfig(**SIZES)
    config.logits_scaling, config.model_type = 4.0, "hyperclovax"
    assert logit_transform(config) == (None, 4.0)
