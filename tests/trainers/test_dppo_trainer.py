"""DPPOTrainer: its loss against full logits and against stock TRL, and the settings users combine."""

import math
import operator
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from dppo_kernels import DIVERGENCES, Stat
from dppo_kernels.trainers import DPPOTrainer, _trl_seam
from dppo_kernels.trainers.dropout import active_dropout, disable_dropout
from dppo_kernels.trainers.resume import ExactResumeMixin
from dppo_kernels.trainers.rollout import RolloutCaptureMixin
from tests.trainers.conftest import history, small_config, weights


class Recording(DPPOTrainer):
    """Keeps every micro-batch with its loss, its stats and the weights it was computed with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded: list[dict[str, Any]] = []
        self.recorded_stats: list[Mapping[str, Stat]] = []
        super().__init__(*args, **kwargs)

    def record(self, stats: Mapping[str, Stat]) -> None:
        self.recorded_stats.append(stats)
        super().record(stats)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        state = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.recorded.append({"inputs": dict(inputs), "loss": loss.detach().clone(), "state": state})
        return loss


def full_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, T, V] in float64, those that completion tokens were drawn from."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits.double()
    return logits[:, -inputs["completion_ids"].shape[1] - 1 : -1]


def loss_of_logits(logits: Tensor, inputs: dict[str, Any], args: Any) -> Tensor:
    """The paper's formula on full distributions, sharing no code with the library; differentiable."""
    log_pi = torch.log_softmax(logits / args.temperature, -1)
    logp = log_pi.gather(2, inputs["completion_ids"][..., None]).squeeze(2)
    logm = inputs["sampling_per_token_logps"].double()
    p, m = logp.detach().exp(), logm.exp()
    kind = args.divergence_type
    if kind == "binary_tv":
        d = (m - p).abs()
    elif kind == "binary_kl":
        d = m * (m / p).log() + (1 - m) * ((1 - m) / (1 - p)).log()
    else:
        valid = inputs["rollout_topk_valid"]
        mu = inputs["rollout_topk_logprobs"].double().exp() * valid
        pi = log_pi.detach().gather(2, inputs["rollout_topk_ids"].clamp(min=0)).exp() * valid
        mu = torch.cat([mu, 1 - mu.sum(-1, keepdim=True)], -1)
        pi = torch.cat([pi, 1 - pi.sum(-1, keepdim=True)], -1)
        d = (mu - pi).abs().sum(-1) / 2 if kind == "topk_tv" else torch.where(mu > 0, mu * (mu / pi).log(), 0.0).sum(-1)
    a = inputs["advantages"][:, None]
    delta = 0.15 if kind.endswith("tv") else 0.05
    keep = ~((d > delta) & ((a > 0) & (p > m) | (a < 0) & (p < m)))
    per_token = -a * (p / m).clamp(max=args.clip_ratio_c) * keep * logp
    active = inputs["completion_mask"].bool()
    if "tool_mask" in inputs:
        active &= inputs["tool_mask"].bool()
    windows = args.steps_per_generation / args.gradient_accumulation_steps
    return per_token[active].sum() * windows / inputs["num_items_in_batch"]


def loss_from_full_logits(trainer: Recording, record: dict[str, Any]) -> float:
    """The loss of a recorded micro-batch, on the weights it was computed with."""
    model = trainer.model
    current = {name: p.clone() for name, p in model.state_dict().items()}
    model.load_state_dict(record["state"])
    with torch.no_grad():
        logits = full_logits(model, record["inputs"])
    model.load_state_dict(current)
    return loss_of_logits(logits, record["inputs"], trainer.args).item()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_equals_one_from_full_logits(make_trainer, kind: str) -> None:
    trainer = make_trainer(
        Recording, divergence_type=kind, divergence_topk=4, temperature=0.8, learning_rate=3e-2, gradient_accumulation_steps=2,
        steps_per_generation=4, max_steps=6, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.recorded) == 12
    for record in trainer.recorded:
        assert record["loss"].item() == pytest.approx(loss_from_full_logits(trainer, record), rel=1e-6, abs=1e-6)
    masked = history(trainer, "masked/all")
    assert masked[0] == 0
    assert max(masked) > 0  # the learning rate is large enough to leave the trust region
    parts = zip(history(trainer, "masked/positive_advantage"), history(trainer, "masked/negative_advantage"), strict=True)
    assert [a + b for a, b in parts] == pytest.approx(masked)


def test_metrics_are_exact_over_micro_batches_and_logging_windows(make_trainer) -> None:
    trainer = make_trainer(
        Recording, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=6, logging_steps=3, learning_rate=3e-2,
        clip_ratio_c=1.5,
    )  # fmt: skip
    trainer.train()
    for window in range(2):
        stats = trainer.recorded_stats[6 * window : 6 * window + 6]  # 3 steps of 2 micro-batches
        for key, (name, read) in trainer.stat_metrics.items():
            if name not in stats[-1]:
                continue
            if read == "max":
                expected = max(s[name].max.item() for s in stats)
            else:
                expected = sum(s[name].sum.item() for s in stats) / sum(s[name].count.item() for s in stats)
            assert history(trainer, key)[window] == pytest.approx(expected, rel=1e-5, abs=1e-7), key
    assert max(history(trainer, "ratio/above_cap")) > 0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_unchanged_weights_have_zero_divergence(make_trainer, kind: str) -> None:
    trainer = make_trainer(
        divergence_type=kind, num_iterations=1, steps_per_generation=1, max_steps=2, temperature=0.7, score_inactive=True
    )  # fmt: skip
    trainer.train()
    assert max(history(trainer, "divergence/max")) <= 1e-5
    assert history(trainer, "masked/all") == [0, 0]
    assert max(history(trainer, "engine_mismatch/prob_gap_max")) <= 1e-5
    assert history(trainer, "ratio/mean") == pytest.approx([1, 1], abs=1e-4)


class CispoOracle(ExactResumeMixin, RolloutCaptureMixin, GRPOTrainer):
    """Binary-TV DPPO said in stock TRL: CISPO against the sampler's log-probs with a per-token off-policy mask."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"] = output["sampling_per_token_logps"]
        return output

    @staticmethod
    def get_off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold) -> Tensor:
        p, m = per_token_logps.detach().exp(), sampling_per_token_logps.exp()
        outwards = (advantages > 0) & (p > m) | (advantages < 0) & (p < m)
        return (~(outwards & ((p - m).abs() > off_policy_threshold))).to(mask.dtype)


def train_oracle(make_trainer: Any, make_config: Any, shared: dict[str, Any], **data: Any) -> Any:
    trl = {"loss_type": "cispo", "epsilon_high": 20.0, "off_policy_mask_threshold": 0.15}
    oracle = make_trainer(CispoOracle, config=make_config(GRPOConfig, **trl, **shared), **data)
    oracle.train()
    return oracle


@pytest.mark.parametrize(("accumulation", "per_generation"), [(1, 2), (2, 4), (2, 2), (4, 2)])
def test_six_steps_equal_stock_trl(make_trainer, make_config, model, tokenizer, accumulation: int, per_generation: int) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    shared = {
        "optim": "sgd",  # Adam would blow up rounding differences of gradients that are nearly zero
        "learning_rate": 0.3,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": per_generation,
        "max_steps": 6,
    }
    ours = make_trainer(divergence_type="binary_tv", score_inactive=True, **shared)
    ours.train()
    if accumulation < 2 * per_generation:  # else every rollout serves one optimiser step, and nothing can be off-policy
        assert max(history(ours, "masked/all")) > 0
    after_ours = weights(ours)
    model.load_state_dict(start)
    oracle = train_oracle(make_trainer, make_config, shared)
    for name, p in weights(oracle).items():
        torch.testing.assert_close(after_ours[name], p, rtol=0, atol=2e-5, msg=name)
    assert history(ours, "loss") == pytest.approx(history(oracle, "loss"), abs=2e-4)
    if accumulation == 1:  # stock TRL averages the means of micro-batches, ours are means over tokens
        assert history(ours, "entropy") == pytest.approx(history(oracle, "entropy"), abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"top_entropy_quantile": 0.4}, id="high-entropy tokens only"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}, id="evaluation"),
        pytest.param({"scale_rewards": "batch", "mask_truncated_completions": True}, id="masked completions"),
    ],
)
def test_options_equal_stock_trl(make_trainer, make_config, model, prompts, changes: dict[str, Any]) -> None:
    model.generation_config.eos_token_id = [1, 2, *range(20, 30)]
    start = {name: p.clone() for name, p in model.state_dict().items()}
    shared = {"optim": "sgd", "learning_rate": 0.3, "gradient_accumulation_steps": 2, "steps_per_generation": 4, **changes}
    data = {"eval_dataset": prompts.select(range(8))} if "eval_strategy" in changes else {}
    ours = make_trainer(divergence_type="binary_tv", **shared, **data)
    ours.train()
    after_ours = weights(ours)
    model.load_state_dict(start)
    oracle = train_oracle(make_trainer, make_config, shared, **data)
    for name, p in weights(oracle).items():
        torch.testing.assert_close(after_ours[name], p, rtol=0, atol=2e-5, msg=name)
    assert any((p - start[name]).abs().max() > 1e-4 for name, p in after_ours.items())
    assert history(ours, "eval_loss") == pytest.approx(history(oracle, "eval_loss"), abs=2e-4)
    assert len(history(ours, "eval_loss")) == (2 if data else 0)


def test_reference_kl_and_entropy_bonus_equal_stock_trl(make_trainer, make_config, model, tokenizer, tmp_path) -> None:
    model.save_pretrained(tmp_path / "start")  # TRL loads the reference model from the policy's path
    model.config._name_or_path = str(tmp_path / "start")
    start = {name: p.clone() for name, p in model.state_dict().items()}
    shared = {
        "optim": "sgd",
        "learning_rate": 0.3,
        "beta": 0.1,
        "entropy_coef": 0.05,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
    }
    ours = make_trainer(**shared)
    ours.train()
    after_ours = weights(ours)
    model.load_state_dict(start)
    oracle = train_oracle(make_trainer, make_config, shared)
    assert history(ours, "kl") == pytest.approx(history(oracle, "kl"), abs=1e-4)
    assert max(history(ours, "kl")) > 1e-4
    for name, p in weights(oracle).items():
        torch.testing.assert_close(after_ours[name], p, rtol=0, atol=2e-5, msg=name)


def test_the_anchor_is_never_recomputed(make_trainer) -> None:
    calls = []

    class Counting(Recording):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            forward = self.model.forward
            self.model.forward = lambda *args, **kwargs: (
                calls.append(kwargs.get("fused_lm_head", False)) or forward(*args, **kwargs)
            )
            try:
                return super()._generate_and_score_completions(inputs)
            finally:
                self.model.forward = forward

    trainer = make_trainer(Counting)
    trainer.train()
    assert calls
    assert not any(calls)  # generation only: GRPO's scoring pass over the rollout did not run
    assert all("old_per_token_logps" not in record["inputs"] for record in trainer.recorded)


def test_lora_trains_its_adapter_only(make_trainer, model) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(divergence_type="topk_kl", divergence_topk=4, peft_config=lora, learning_rate=5e-2, max_steps=8)
    trainer.train()
    assert history(trainer, "engine_mismatch/prob_gap_max")[0] <= 1e-5  # dropout is off: rollout and training agree
    assert max(history(trainer, "divergence/mean")) > 1e-3
    changed = {name for name, p in trainer.model.named_parameters() if "lora" in name and p.abs().sum() > 0}
    assert any("lora_B" in name for name in changed)
    for name, p in before.items():
        module = name.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer.")
        assert torch.equal(trainer.model.get_base_model().get_parameter(module), p), name


def test_lora_with_reference_kl(make_trainer) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(Recording, peft_config=lora, beta=0.1, learning_rate=5e-2, max_steps=6)
    trainer.train()
    assert all("old_per_token_logps" not in record["inputs"] for record in trainer.recorded)
    kl = history(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)  # the adapter starts at the reference
    assert max(kl) > 1e-5


def test_reward_rises(make_trainer) -> None:
    def count_ones(completions: list[str], **kwargs: Any) -> list[float]:
        return [text.count("1") / 6 for text in completions]

    trainer = make_trainer(
        reward=count_ones, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=16, num_generations=8,
        scale_rewards="none", divergence_type="binary_tv",
    )  # fmt: skip
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards


def test_evaluation_scores_fresh_rollouts(make_trainer, prompts) -> None:
    trainer = make_trainer(
        divergence_type="topk_tv", divergence_topk=4, eval_dataset=prompts.select(range(8)), per_device_eval_batch_size=4,
        eval_strategy="steps", eval_steps=3, max_steps=4,
    )  # fmt: skip
    trainer.train()
    assert max(history(trainer, "eval_divergence/max")) <= 1e-5  # sampled from the weights that score it
    assert history(trainer, "eval_reward")[0] > 0
    # The evaluation in the middle of a window did not make the training rollouts look fresh.
    assert len(history(trainer, "engine_mismatch/prob_gap_max")) == 1


def test_conversational_prompts(make_trainer, prompts) -> None:
    chats = prompts.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = make_trainer(train_dataset=chats, divergence_type="topk_tv", divergence_topk=4)
    trainer.train()
    assert history(trainer, "engine_mismatch/prob_gap_max")[0] <= 1e-5
    assert max(history(trainer, "divergence/mean")) > 0


def test_several_eos_ids_and_truncated_completions(make_trainer, model) -> None:
    model.generation_config.eos_token_id = [1, 2, *range(20, 30)]
    trainer = make_trainer(Recording, mask_truncated_completions=True, learning_rate=1e-3)
    trainer.train()
    assert history(trainer, "engine_mismatch/prob_gap_max")[0] <= 1e-5
    assert 0 < history(trainer, "completions/clipped_ratio")[0] < 1
    for record in trainer.recorded:
        assert record["loss"].item() == pytest.approx(loss_from_full_logits(trainer, record), rel=1e-6, abs=1e-6)


def test_absolute_positions_and_left_padding(make_trainer, tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    gpt2.transformer.wpe.weight.data *= 20
    gpt2.save_pretrained(tmp_path / "start")  # TRL loads the reference model from the policy's path
    gpt2.config._name_or_path = str(tmp_path / "start")
    trainer = make_trainer(
        Recording, model=gpt2, num_iterations=1, steps_per_generation=1, max_steps=2, per_device_train_batch_size=32, beta=0.1,
    )  # fmt: skip
    trainer.train()
    assert (trainer.recorded[0]["inputs"]["prompt_mask"] == 0).any()  # prompts of different lengths
    assert max(history(trainer, "engine_mismatch/prob_gap_max")) <= 1e-5
    assert history(trainer, "kl")[0] <= 1e-9  # the reference is the start


@pytest.mark.parametrize("accumulation", [1, 2])
def test_mixture_of_experts_aux_loss_is_trls(make_trainer, tokenizer, accumulation: int) -> None:
    torch.manual_seed(0)
    config = small_config(len(tokenizer)).to_dict() | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    for key in ("model_type", "layer_types", "transformers_version", "architectures"):
        config.pop(key, None)
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, router_aux_loss_coef=0.5))
    trainer = make_trainer(Recording, model=moe, max_steps=1, num_iterations=1, gradient_accumulation_steps=accumulation)
    assert trainer.aux_loss_enabled
    trainer.train()
    assert history(trainer, "aux_loss")[0] > 0
    record = trainer.recorded[0]
    moe.load_state_dict(record["state"])
    inputs = record["inputs"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        _, _, aux = GRPOTrainer._get_per_token_logps_and_entropies(trainer, moe, ids, attention, width, compute_aux_loss=True)
    assert aux > 0
    without = loss_from_full_logits(trainer, record)
    assert record["loss"].item() == pytest.approx(without + 0.5 * aux.item() / accumulation, abs=2e-5)


def test_bf16_autocast_logs_its_mismatch(make_trainer) -> None:
    trainer = make_trainer(bf16=True)
    trainer.train()
    gap = history(trainer, "engine_mismatch/prob_gap_max")[0]
    assert 0 < gap < 0.2
    assert all(math.isfinite(x) for x in history(trainer, "loss"))


def test_no_active_token_logs_nothing_and_does_not_crash(make_trainer) -> None:
    trainer = make_trainer(max_completion_length=1, mask_truncated_completions=True)
    trainer.train()
    assert history(trainer, "loss")[0] == 0
    assert history(trainer, "divergence/mean") == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("typical_p", 0.9),
        ("no_repeat_ngram_size", 2),
        ("min_new_tokens", 2),
        ("bad_words_ids", [[5]]),
        ("temperature", 0.3),
        ("num_beams", 2),
        ("do_sample", False),
    ],
)
def test_generation_kwargs_that_bend_the_distribution_are_refused(make_trainer, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}|temperature 0.3"):
        make_trainer(generation_kwargs={setting: value})


def test_generation_config_of_the_model_is_checked_too(make_trainer, model) -> None:
    model.generation_config.no_repeat_ngram_size = 3  # generate() would merge it in
    with pytest.raises(ValueError, match="`no_repeat_ngram_size`=3 reshapes"):
        make_trainer()


def test_construction_refuses_what_cannot_be_trained(make_trainer, make_config, model, tokenizer) -> None:
    with pytest.raises(ValueError, match="`divergence_topk`=128 exceeds the model's vocabulary of 108"):
        make_trainer(divergence_type="topk_tv", divergence_topk=128)
    with pytest.raises(TypeError, match="`args` must be a DPPOConfig, got GRPOConfig"):
        make_trainer(config=make_config(GRPOConfig))
    model.model.layers[0].self_attn.register_module("dropout", torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"`disable_dropout=False`, but .*dropout drops"):
        make_trainer(disable_dropout=False)
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"prompt-learning PEFT .* is not supported"):
        make_trainer(peft_config=prompt_tuning)


@pytest.mark.parametrize(
    ("owner", "attribute", "value", "message"),
    [
        ("", "_is_vlm", True, "vision-language models are not supported"),
        ("model.config", "model_type", "phimoe", "PhiMoE draws its experts at random"),
    ],
)
def test_refusals_of_what_this_machine_cannot_build(make_trainer, owner: str, attribute: str, value: Any, message: str) -> None:
    trainer = make_trainer()
    holder = operator.attrgetter(owner)(trainer) if owner else trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, attribute, value)
        with pytest.raises(ValueError, match=message):
            trainer._check_model(trainer.model)


def test_topk_rollout_functions_cannot_use_trls_tool_loop(make_trainer) -> None:
    trainer = make_trainer(divergence_type="topk_tv", divergence_topk=3)
    trainer.rollout_func, trainer.tools = lambda prompts, trainer: {}, [print]
    with pytest.raises(ValueError, match="cannot follow `rollout_func` through TRL's tool loop"):
        trainer._check_model(trainer.model)


def test_the_seam_names_what_a_trainer_lacks(make_trainer) -> None:
    trainer = make_trainer()
    _trl_seam.check_attributes(trainer)
    del trainer._buffered_inputs
    with pytest.raises(ImportError, match="sets no _buffered_inputs"):
        _trl_seam.check_attributes(trainer)


def test_dropout_is_found_by_the_names_models_give_it() -> None:
    holder = torch.nn.Module()
    holder.resid_pdrop, holder.attention_dropout, holder.jitter_noise = 0.1, 0.2, 0.3
    holder.router_jitter_noise, holder.dropped = 0.01, 0.5  # a threshold of PhiMoE's routing, and no probability at all
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), holder)
    assert active_dropout(model) == ["0", "1.resid_pdrop", "1.attention_dropout", "1.jitter_noise"]
    disable_dropout(model)
    assert active_dropout(model) == []
    assert (holder.router_jitter_noise, holder.dropped) == (0.01, 0.5)


def test_functional_dropout_is_off_in_train_mode(make_trainer, tokenizer) -> None:
    torch.manual_seed(0)
    dropping = Qwen3ForCausalLM(small_config(len(tokenizer), attention_dropout=0.5))
    with pytest.raises(ValueError, match="attention_dropout drops"):
        make_trainer(model=dropping, disable_dropout=False)
    trainer = make_trainer(model=dropping)
    trainer.train()
    assert history(trainer, "engine_mismatch/prob_gap_max")[0] <= 1e-5
    assert dropping.config.attention_dropout == 0.5  # what is saved stays as it was
