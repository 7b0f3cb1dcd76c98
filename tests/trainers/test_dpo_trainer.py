"""DPOTrainer against TRL's own on the same batches: every loss, its gradient, metrics, training; what it refuses."""

import copy
import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer as TRLTrainer

from dppo_kernels import PreferenceSpec
from dppo_kernels.preference_spec import F_DIVERGENCES
from dppo_kernels.trainers import DPOConfig, DPOTrainer
from dppo_kernels.trainers.dpo import METRICS
from tests.trainers.conftest import history, weights


@pytest.fixture
def pairs() -> Dataset:
    rows = [(a, b) for a in range(0, 60, 7) for b in range(1, 4)]
    return Dataset.from_list(
        [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a + b + 1} or {a * 7}"} for a, b in rows]
    )


@pytest.fixture
def make(tmp_path, model, tokenizer, pairs) -> Any:
    """Ours or TRL's trainer of a copy of one model, with a reference that is another."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    made = iter(range(100))

    def build(trainer: type = DPOTrainer, config: type = DPOConfig, *, reference: bool = True, **changes: Any) -> Any:
        settings = {
            "output_dir": str(tmp_path / f"out{next(made)}"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
        }
        names = ("peft_config", "train_dataset", "eval_dataset", "compute_metrics")
        passed = {name: changes.pop(name) for name in names if name in changes}
        policy = changes.pop("model", None) or type(model).from_pretrained(folder)
        other = None
        if reference:
            other = type(policy)(policy.config)
            torch.manual_seed(7)
            other.load_state_dict({name: x + 0.005 * torch.randn_like(x) for name, x in policy.state_dict().items()})
        args = config(**(settings | changes))
        torch.manual_seed(5)
        return trainer(policy, other, args, **{"train_dataset": pairs, "processing_class": tokenizer} | passed)

    return build


def loss_and_gradient(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def random_batch(seed: int, vocab: int, pairs: int = 4) -> dict[str, Tensor]:
    """Tokens of pairs with prompts and completions of any length, padded as TRL's collator does."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, generator=generator)
    prompts, completions = draw(1, 8, (pairs,)).repeat(2)[:, None], draw(1, 9, (2 * pairs, 1))
    place = torch.arange(int((prompts + completions).max()))
    ids = draw(8, vocab, (2 * pairs, len(place)))
    ids[pairs:] = torch.where(place < prompts[pairs:], ids[:pairs], ids[pairs:])
    attention = (place < prompts + completions).long()
    return {"input_ids": ids * attention, "attention_mask": attention, "completion_mask": attention * (place >= prompts)}


def disturb(trainers: Sequence[Any], noise: float) -> None:
    """Give all of them one reference: the first one's policy with noise."""
    generator = torch.Generator().manual_seed(11)
    state = trainers[0].model.state_dict()
    state = {name: x + noise * torch.randn(x.shape, generator=generator) for name, x in state.items()}
    for trainer in trainers:
        trainer.ref_model.load_state_dict(state)


def exact(model: Any) -> Any:
    """In float64, and with nothing that a trainer put into its forward."""
    copied = type(model)(model.config).double()
    copied.load_state_dict(model.state_dict())
    return copied


def completion_logprobs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By hand: of the tokens of completions, 0 elsewhere, and the logarithm of the chance that two draws there are the same."""
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logprobs = model(**plain).logits[:, :-1].log_softmax(-1)
    own = logprobs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["completion_mask"][:, 1:]
    return own * mask, (2 * logprobs).logsumexp(-1) * mask


def follow(ours: Any, theirs: Any, **changes: Any) -> None:
    """Give both trainers one loss."""
    spec = PreferenceSpec(**{"beta": 0.3, "label_smoothing": 0.1, **changes})
    ours.spec = spec
    theirs.loss_types, theirs.loss_weights = list(spec.loss_type), list(spec.loss_weights or [1.0] * len(spec.loss_type))
    for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting"):
        setattr(theirs, name, getattr(spec, name))
    theirs.args.discopop_tau = spec.discopop_tau


OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
OTHERS = ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
ACCEPTED = [
    *({"loss_type": name, "f_divergence_type": kind} for name in OF_DIFFERENCES for kind in F_DIVERGENCES),
    *({"loss_type": name} for name in OTHERS),
    *({"loss_type": name, "ld_alpha": 0.4} for name in ("sigmoid", "ipo", "aot", "sft", "sigmoid_norm")),
    *({"loss_type": name, "use_weighting": True} for name in (*OF_DIFFERENCES, *OTHERS) if not name.startswith("aot")),
    {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    {"loss_type": ("apo_zero", "sigmoid"), "ld_alpha": 0.2, "use_weighting": True},
    {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]


# Its in-place product with the weights meets the output of relu, or an expanded scalar.
TRL_CANNOT_WEIGH = ("hinge", "sft")


NEAR, FAR = 0.004, 0.5  # noise of the reference's weights: log-ratios of about 1/2, and of tens


def agree(ours: Any, theirs: Any, changes: dict[str, Any], seed: int, noise: float) -> None:
    """On loss and gradient, of a random batch."""
    follow(ours, theirs, **changes)
    named = functools.partial("{}: {}".format, changes)
    batch = random_batch(seed, ours.model.config.vocab_size)
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 1
    disturb((ours, theirs), noise)
    loss, grads = loss_and_gradient(ours, batch)
    assert max(g.abs().max() for g in grads) > (1e-4 if noise == NEAR else 0), changes
    if changes.get("use_weighting") and changes["loss_type"] in TRL_CANNOT_WEIGH:
        with pytest.raises(RuntimeError):
            loss_and_gradient(theirs, batch)
        return
    expected, expected_grads = loss_and_gradient(theirs, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, msg=named)
    # The slope of "discopop" changes by 1 / tau = 20 where that of the others changes by 1.
    steep = 1e-4 if "discopop" in changes["loss_type"] else 1e-5
    scale = max(1.0, *(g.abs().max().item() for g in expected_grads))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=steep * scale, msg=named)


@pytest.mark.parametrize("weighting", [False, True])
def test_every_combination_that_trl_accepts(make, weighting: bool) -> None:
    ours, theirs = make(), make(TRLTrainer, TRLConfig, use_weighting=weighting)
    for seed, changes in enumerate(ACCEPTED):
        if changes.get("use_weighting", False) == weighting:
            agree(ours, theirs, changes, seed, NEAR)
            if changes.get("f_divergence_type") not in ("forward_kl", "alpha_divergence"):  # exponentials of log-ratios
                agree(ours, theirs, changes, seed + 100, FAR)


def random_options(draw: random.Random) -> dict[str, Any]:
    """A mixture of losses and all that may change it."""
    weighting, kind = draw.random() < 0.4, draw.choice(F_DIVERGENCES)
    names = OF_DIFFERENCES if kind != "reverse_kl" else (*OF_DIFFERENCES, *OTHERS)
    names = [name for name in names if not (weighting and name in (*TRL_CANNOT_WEIGH, "aot", "aot_unpaired"))]
    mixture = tuple(draw.sample(names, draw.randint(1, 3)))
    return {
        "loss_type": mixture,
        "loss_weights": draw.choice([None, tuple(round(draw.uniform(0.1, 2), 3) for _ in mixture)]),
        "f_divergence_type": kind,
        "f_alpha_divergence_coef": draw.choice([0.3, 0.5, 1.0, 2.0]),
        "ld_alpha": draw.choice([None, 0.0, 0.3, 1.0]),
        "beta": draw.choice([0.05, 0.1, 0.3]),
        "label_smoothing": draw.choice([0.01, 0.1, 0.3]),
        "use_weighting": weighting,
    }


def test_random_products_of_options(make) -> None:
    ours, theirs = make(), make(TRLTrainer, TRLConfig, use_weighting=True)
    draw = random.Random(0)
    for seed in range(24):
        agree(ours, theirs, random_options(draw), seed, NEAR)


@pytest.mark.parametrize("name", TRL_CANNOT_WEIGH)
def test_weighted_losses_by_hand(make, name: str) -> None:
    """Where TRL fails: loss and gradient in float64."""
    trainer = make(loss_type=name, beta=0.3, use_weighting=True)
    disturb([trainer], 0.02)
    batch = random_batch(1, trainer.model.config.vocab_size)
    policy = exact(trainer.model)
    logprobs, squares = completion_logprobs(policy, batch)
    reference, _ = completion_logprobs(exact(trainer.ref_model), batch)
    lengths = batch["completion_mask"].sum(1)
    weights = ((logprobs - squares).sum(1) / lengths).exp().detach()
    chosen, rejected = (logprobs - reference).sum(1).chunk(2)
    if name == "hinge":
        losses = (1 - 0.3 * (chosen - rejected)).clamp(min=0)
        assert 0 < (losses > 0).sum() < len(losses)  # its kink is between them
    else:
        losses = -logprobs[: len(chosen)].sum() / lengths[: len(chosen)].sum()
    expected = (losses * weights[: len(chosen)] * weights[len(chosen) :]).mean()
    expected.backward()
    trainer.model.double()
    trainer.ref_model.double()
    loss, grads = loss_and_gradient(trainer, batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, [p.grad for p in policy.parameters()], rtol=1e-9, atol=1e-12)


def test_the_others_are_refused_with_the_same_kind_of_error(make) -> None:
    refused = [
        *({"loss_type": [name], "f_divergence_type": "forward_kl"} for name in OTHERS),
        {"loss_type": ["aot"], "use_weighting": True},
        {"loss_type": ["aot_unpaired", "sigmoid"], "use_weighting": True},
        {"loss_type": ["exo_pair"]},
        {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]},
    ]
    for changes in refused:
        with pytest.raises((ValueError, NotImplementedError)) as theirs:
            make(TRLTrainer, TRLConfig, **changes)
        with pytest.raises((ValueError, NotImplementedError)) as ours:
            make(**changes)
        assert ours.type is theirs.type, changes


def test_the_first_step_is_log_2_and_the_boundary_of_prompts_counts(make) -> None:
    trainer = make(reference=False)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, _ = loss_and_gradient(trainer, batch)
    assert loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()
    precomputed = make(reference=False, precompute_ref_log_probs=True)
    batch = next(iter(precomputed.get_train_dataloader()))
    assert batch["ref_chosen_logps"].dtype == torch.float64
    assert loss_and_gradient(precomputed, batch)[0].item() == loss.item()

    other = make(loss_type="bco_pair", beta=2.0)  # in "sigmoid" what both completions begin with, and prompts, would cancel
    batch = next(iter(other.get_train_dataloader()))
    right, _ = loss_and_gradient(other, batch)
    for moved in (-1, 1):  # the first token of every completion left out, or the last one of every prompt scored
        starts = batch["completion_mask"].argmax(1, keepdim=True) - moved
        mask = (torch.arange(batch["input_ids"].shape[1]) >= starts).long() * batch["attention_mask"]
        wrong, _ = loss_and_gradient(other, {**batch, "completion_mask": mask})
        assert abs(wrong - right) > 1e-4


def test_a_precomputed_reference_is_of_the_same_settings(make, pairs, tmp_path) -> None:
    """TRL keeps it beside the dataset, for later runs with the same model: not for those that score something else."""
    pairs.save_to_disk(tmp_path / "pairs")
    common = {"reference": False, "precompute_ref_log_probs": True, "truncation_mode": "keep_end"}

    def build(*kinds: type, **changes: Any) -> Any:
        return make(*kinds, train_dataset=load_from_disk(tmp_path / "pairs"), **common, **{"max_length": 64, **changes})

    build(TRLTrainer, TRLConfig)
    for changes in ({}, {"ld_alpha": 0.0}, {"max_length": 6}, {"bf16": True}):
        trainer = build(**changes)
        batch = next(iter(trainer.get_train_dataloader()))
        with trainer.accelerator.autocast():
            loss, _ = loss_and_gradient(trainer, batch)
        assert loss.item() == pytest.approx(math.log(2), abs=2e-4 if "bf16" in changes else 1e-7), changes
    files = sorted((tmp_path / "pairs").glob("cache-*"))
    build(ld_alpha=0.0)
    assert sorted((tmp_path / "pairs").glob("cache-*")) == files  # found again


def test_log_probs_are_of_completions_alone(make, pairs, tokenizer) -> None:
    """Sums by hand, of texts: from the first token behind the prompt to the end token."""
    trainer = make()
    rows = range(5)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    found = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    reference, expected = exact(trainer.ref_model), []
    for side in ("chosen", "rejected"):
        for pair in map(pairs.__getitem__, rows):
            start, ids = (tokenizer(text)["input_ids"] for text in (pair["prompt"], pair["prompt"] + pair[side] + "<eos>"))
            logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(logprobs[place - 1, ids[place]].item() for place in range(len(start), len(ids))))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


TRAININGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "ld_alpha": 0.5},
    "checkpointed": {"gradient_checkpointing": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "weighted": {"use_weighting": True},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_it_trains_as_trls_does(make, name: str) -> None:
    """Weights after four steps, and every metric of every step."""
    runs = []
    for kinds in ((DPOTrainer, DPOConfig), (TRLTrainer, TRLConfig)):
        trainer = make(*kinds, **TRAININGS[name])
        trainer.train()
        runs.append(trainer)
    ours, theirs = runs
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-6, atol=2e-6)
    own, other = (set().union(*run.state.log_history) for run in runs)
    timings = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "step_time"}
    assert own - timings == other - timings
    assert set(METRICS) - own == {"aux_loss"}
    # Where micro-batches are accumulated, TRL logs the mean of their means over tokens, and this the mean over tokens.
    by_token = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"} if name == "accumulated" else set()
    for metric in (*(own & set(METRICS) - by_token), "loss", "grad_norm", "num_tokens"):
        assert history(ours, metric) == pytest.approx(history(theirs, metric), rel=2e-5, abs=2e-5), metric


def test_metrics_are_means_over_the_logging_window(make) -> None:
    """Of tokens, where they are per token: windows of several micro-batches of unequal length."""
    trainer = make(logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    seen = []
    real = trainer._compute_loss

    def recording(model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].double()
        mask = inputs["completion_mask"][:, 1:].bool()
        seen.append(torch.distributions.Categorical(logits=logits).entropy()[mask].detach())
        return real(model, inputs, return_outputs)

    trainer._compute_loss = recording
    trainer.train()
    assert len(seen) == 8
    expected = [torch.cat(seen[i : i + 4]).mean().item() for i in (0, 4)]
    assert history(trainer, "entropy") == pytest.approx(expected, rel=1e-5)


def test_token_metrics_can_be_left_out(make) -> None:
    plain, bare = make(max_steps=2), make(max_steps=2, token_metrics=False)
    for trainer in (plain, bare):
        trainer.train()
    assert not {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"} & set().union(*bare.state.log_history)
    assert history(bare, "rewards/margins") == history(plain, "rewards/margins")
    torch.testing.assert_close(weights(plain), weights(bare), rtol=0, atol=0)


def test_it_learns_and_evaluates(make, pairs) -> None:
    trainer = make(reference=False, max_steps=40, learning_rate=5e-3, eval_dataset=pairs, logging_steps=10)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2))
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/accuracies"] == 1.0
    assert after["eval_rewards/margins"] > 1.0 > before["eval_rewards/margins"]
    assert after["eval_loss"] < 0.3


def test_own_losses(make) -> None:
    """cDPO and the paper's IPO, which TRL's constructor has never heard of, with an f-divergence too."""
    smoothed = make(loss_type="sigmoid_smoothed", label_smoothing=0.2, f_divergence_type="js_divergence")
    assert smoothed.args.loss_type == smoothed.loss_types == ["sigmoid_smoothed"]
    smoothed.train()
    assert len(history(smoothed, "loss")) == 4
    summed, averaged = make(loss_type="ipo_sum"), make(loss_type="ipo")
    batch = next(iter(summed.get_train_dataloader()))
    assert loss_and_gradient(summed, batch)[0] != loss_and_gradient(averaged, batch)[0]


def test_lora_trains_and_its_reference_is_the_base(make) -> None:
    adapter = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "reference": False}
    ours, theirs = make(**adapter), make(TRLTrainer, TRLConfig, **adapter)
    start = {name: x.clone() for name, x in ours.model.named_parameters()}
    theirs.model.load_state_dict(ours.model.state_dict())
    for trainer in (ours, theirs):
        trainer.train()
    assert history(ours, "loss")[0] == pytest.approx(math.log(2), abs=1e-7)
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        assert torch.equal(a, start[name]) == ("lora" not in name)


def test_a_trained_adapter_is_its_own_reference(make, model) -> None:
    """TRL keeps a copy of it, under a name of its own: the base alone is another model."""
    base = exact(model)
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ours = make(model=copy.deepcopy(adapted), reference=False)
    theirs = make(TRLTrainer, TRLConfig, model=adapted, reference=False)
    batch = next(iter(ours.get_train_dataloader()))
    for trainer in (ours, theirs):
        trainer.train()
    assert history(ours, "loss")[0] == pytest.approx(math.log(2), abs=1e-7)
    assert history(ours, "loss") == pytest.approx(history(theirs, "loss"), rel=2e-5)
    moved = 0
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        copied = ours.model.get_parameter(name.replace(".default.", ".ref."))
        moved += not torch.equal(a, copied)
    assert moved > 0
    reference = torch.cat(ours.compute_ref_log_probs(ours.model, batch))
    assert (reference - completion_logprobs(base, batch)[0].sum(1)).abs().max() > 0.1


EXPERTS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.5,
}


def test_mixtures_of_experts_balance_their_load(make, tokenizer) -> None:
    runs = []
    for kinds in ((DPOTrainer, DPOConfig), (TRLTrainer, TRLConfig)):
        torch.manual_seed(0)
        config = Qwen3MoeConfig(**EXPERTS, head_dim=16, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
        trainer = make(*kinds, model=Qwen3MoeForCausalLM(config), max_steps=2)
        trainer.train()
        runs.append(trainer)
    ours, theirs = runs
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=2e-6)
    for name in ("aux_loss", "loss", "grad_norm"):
        assert history(ours, name) == pytest.approx(history(theirs, name), rel=2e-5), name
    assert all(value > 1 for value in history(ours, "aux_loss"))
    assert history(ours, "loss")[0] > 0.5 * history(ours, "aux_loss")[0]


def test_soft_capped_tied_heads(make, tokenizer) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "final_logit_softcapping": 3.0}
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=1))
    state = {name: x.clone() for name, x in gemma.state_dict().items()}
    runs = []
    for kinds in ((DPOTrainer, DPOConfig), (TRLTrainer, TRLConfig)):
        gemma.load_state_dict(state)
        trainer = make(*kinds, model=gemma)
        trainer.train()
        runs.append((weights(trainer), history(trainer, "logits/chosen")))
        gemma = Gemma2ForCausalLM(gemma.config)
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=2e-6)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)


def test_resuming_gives_the_same_bits(make) -> None:
    whole = make(save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert history(resumed, "loss") == history(whole, "loss")


def test_logits_for_compute_metrics(make, pairs) -> None:
    seen = []
    metric = {"compute_metrics": lambda prediction: seen.append(prediction.predictions.shape) or {"seen": 1.0}}
    trainer = make(eval_dataset=pairs, per_device_eval_batch_size=8, **metric)
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert seen[0][-1] == trainer.model.config.vocab_size


def test_lengths_are_of_scored_tokens(make) -> None:
    """Where no prompt is left, nothing predicts the first token, which TRL counts all the same."""
    trainer = make(loss_type="ipo", max_length=4, truncation_mode="keep_end")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["completion_mask"].bool().all(1).any()
    loss, _ = loss_and_gradient(trainer, batch)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    ref_chosen, ref_rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    counts = batch["completion_mask"][:, 1:].sum(1).double().chunk(2)
    gap = (chosen - ref_chosen) / counts[0] - (rejected - ref_rejected) / counts[1]
    assert loss.item() == pytest.approx((gap - 5).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"padding_free": True}, ValueError, "`padding_free`=True would be ignored"),
        ({"workspace_bytes": -1}, ValueError, "`workspace_bytes` must be an int >= 0"),
        ({"loss_type": "dpo"}, ValueError, "`loss_type` must be one of"),
        ({"beta": 0.0}, ValueError, "`beta` must be positive"),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, ValueError, "prompt-learning PEFT"),
        ({"config": TRLConfig}, TypeError, "`args` must be a DPOConfig of dppo_kernels, got DPOConfig"),
    ],
)
def test_refused(make, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**changes)


def test_images_are_refused(make, monkeypatch) -> None:
    trainer = make(reference=False)
    monkeypatch.setattr(trainer, "_is_vlm", True)
    with pytest.raises(ValueError, match="vision-language models are not supported"):
        trainer._check_setup()


def test_ignored_label_smoothing_warns(make, caplog) -> None:
    make(label_smoothing=0.1)
    assert "'sigmoid_smoothed' is the loss of cDPO" in caplog.text


def test_a_dataset_is_needed(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        DPOTrainer(model, args=DPOConfig(use_cpu=True, bf16=False), processing_class=tokenizer)
