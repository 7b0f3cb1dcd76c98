"""DAPOTrainer's loss against stock TRL, its normaliser, overlong shaping, prompt limits and settings."""

from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from dppo_kernels import PRESETS
from dppo_kernels.trainers import DAPOConfig, DAPOTrainer
from dppo_kernels.trainers.resume import ExactResumeMixin
from tests.trainers.conftest import history, weights

SMALL = {"max_completion_length": 6, "overlong_buffer_len": 3}


class Stock(ExactResumeMixin, GRPOTrainer):
    """TRL's own loss."""


class Recording(DAPOTrainer):
    """Keeps the micro-batches that are trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.recorded.append({**inputs, "loss": loss.detach()})
        return loss


def train_both(make_trainer: Any, make_config: Any, model: Any, changes: dict[str, Any], stock: dict[str, Any]) -> Any:
    """DAPOTrainer and stock GRPO from the same weights, on the same rollouts; returns both and our weights."""
    start = {name: p.clone() for name, p in model.state_dict().items()}
    shared = {
        "optim": "sgd",  # Adam would blow up rounding differences of gradients that are nearly zero
        "learning_rate": 0.3,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        **changes,
    }
    ours = make_trainer(Recording, config=make_config(DAPOConfig, score_inactive=True, **shared))
    ours.train()
    after = weights(ours)
    model.load_state_dict(start)
    shared.pop("fused_loss", None)
    theirs = make_trainer(Stock, config=make_config(GRPOConfig, **{**shared, **stock}))
    theirs.train()
    assert any((p - start[name]).abs().max() > 1e-4 for name, p in after.items())
    return ours, theirs, after


WIDTHS = {"epsilon": 0.2, "epsilon_high": 0.28}


@pytest.mark.parametrize(
    ("changes", "stock"),
    [
        pytest.param({}, WIDTHS, id="dapo, clip-higher by default"),
        pytest.param({"fused_loss": False, "delta": 1.5}, {**WIDTHS, "delta": 1.5}, id="dual clip, unfused"),
        pytest.param({"loss_type": "grpo", **WIDTHS, "beta": 0.1}, {}, id="grpo with KL"),
        pytest.param({"loss_type": "dr_grpo", "scale_rewards": "none", **WIDTHS}, {}, id="dr_grpo without std"),
        pytest.param({"loss_type": "bnpo", "entropy_coef": 0.05, **WIDTHS}, {}, id="bnpo with entropy bonus"),
        pytest.param({"loss_type": "cispo"}, {"epsilon_high": 5.0}, id="cispo"),
        pytest.param({"loss_type": "sapo"}, {}, id="sapo"),
        pytest.param(
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
            {"epsilon": 3e-4, "epsilon_high": 4e-4},
            id="gspo's widths with sequence ratios",
        ),
    ],
)
def test_six_steps_equal_stock_trl(make_trainer, make_config, model, tmp_path, changes, stock) -> None:
    model.save_pretrained(tmp_path / "start")  # TRL loads the reference model from the policy's path
    model.config._name_or_path = str(tmp_path / "start")
    ours, theirs, after = train_both(make_trainer, make_config, model, changes, stock)
    for name, p in weights(theirs).items():
        torch.testing.assert_close(after[name], p, rtol=0, atol=2e-5, msg=name)
    assert history(ours, "loss") == pytest.approx(history(theirs, "loss"), abs=2e-4)
    assert history(ours, "reward/mean") == history(ours, "reward") == history(theirs, "reward")
    assert history(ours, "reward/std") == pytest.approx(history(theirs, "reward_std"), rel=1e-6)
    assert max(abs(x - 1) for x in history(ours, "ratio/mean")) > 1e-3  # two iterations: half of the steps are off-policy
    if ours.spec.surrogate == "clip" and ours.spec.ratio_level == "token":
        for name, stock_name in (("low", "low_mean"), ("high", "high_mean")):
            assert history(ours, f"clip_ratio/{name}") == pytest.approx(
                history(theirs, f"clip_ratio/{stock_name}"), abs=0.06
            )  # theirs are means of micro-batches, ours of tokens
        both = zip(history(ours, "clip_ratio/low"), history(ours, "clip_ratio/high"), strict=True)
        assert history(ours, "clip_fraction") == pytest.approx([low + high for low, high in both])
        assert max(history(ours, "clip_fraction")) > 0.01


def test_the_token_level_loss_is_divided_by_the_tokens_of_its_optimiser_step(make_trainer, model) -> None:
    """Mini-batches with other lengths: TRL divides each by their mean."""
    model.generation_config.eos_token_id = [1, 2, *range(20, 40)]  # completions of different lengths
    trainer = make_trainer(
        Recording,
        config_class=DAPOConfig,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        score_inactive=True,
    )
    trainer.train()
    steps = [trainer.recorded[i : i + 2] for i in range(0, 8, 2)]
    counts = []
    for step, surrogate, loss in zip(steps, history(trainer, "surrogate"), history(trainer, "loss"), strict=True):
        tokens = sum(int(x["completion_mask"].sum()) for x in step)
        assert all(x["num_items_in_step"] == tokens for x in step)
        counts.append(tokens)
        if not history(trainer, "clip_fraction")[len(counts) - 1]:  # the mean over tokens, and nothing else
            assert loss == pytest.approx(surrogate, abs=1e-6)
    assert len(set(counts)) > 1
    assert history(trainer, "clip_fraction")[0] == 0
    assert trainer.recorded[0]["num_items_in_batch"] == counts[0] + counts[1]


def test_a_step_of_several_rollouts_takes_trls_estimate(make_trainer) -> None:
    trainer = make_trainer(
        Recording,
        config_class=DAPOConfig,
        steps_per_generation=1,
        gradient_accumulation_steps=2,
        num_iterations=1,
        max_steps=2,
    )
    trainer.train()
    assert all("num_items_in_step" not in x for x in trainer.recorded)
    for x in trainer.recorded:
        assert trainer.step_tokens(x) == x["num_items_in_batch"] * 2


def test_overlong_penalty_is_a_reward_of_its_own(make_trainer, make_config, model) -> None:
    model.generation_config.eos_token_id = [1, 2, *range(20, 40)]
    seen: list[list[int]] = []

    def right(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float("1" in text) for text in completions]

    config = make_config(DAPOConfig, **SMALL, apply_overlong_penalty=True, overlong_penalty_factor=0.5, reward_weights=[2.0])
    given: list[Any] = [right]
    trainer = make_trainer(Recording, reward=given, config=config, reward_processing_classes=[None])
    assert (config.reward_weights, given) == ([2.0], [right])  # what the caller passed is not touched
    assert trainer.reward_weights.tolist() == [2.0, 1.0]
    trainer.train()
    # TRL's own function is the paper's formula; lengths are those of the token ids, the end included.
    formula = get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=3)
    penalties = [0.5 * x for x in formula(seen[:8])]  # of the first rollout
    assert len(set(penalties)) > 2
    assert history(trainer, "rewards/overlong_penalty/mean")[0] == pytest.approx(sum(penalties) / len(penalties), rel=1e-5)
    assert history(trainer, "overlong/mean_penalty")[0] == pytest.approx(sum(penalties) / len(penalties), rel=1e-5)
    assert history(trainer, "overlong/frac")[0] == pytest.approx(sum(x < 0 for x in penalties) / len(penalties))
    assert 0 < history(trainer, "overlong/frac")[0] < 1
    correct = history(trainer, "rewards/right/mean")[0]
    assert history(trainer, "reward")[0] == pytest.approx(2 * correct + sum(penalties) / len(penalties), rel=1e-5)


def test_overlong_filtering_leaves_unfinished_completions_out_of_the_loss(make_trainer, model) -> None:
    model.generation_config.eos_token_id = [1, 2, *range(20, 30)]
    trainer = make_trainer(Recording, config_class=DAPOConfig, mask_truncated_completions=True, max_steps=8)
    trainer.train()
    ends = torch.tensor(trainer.eos_token_ids)
    masked = 0
    for x in trainer.recorded:
        for ids, mask in zip(x["completion_ids"], x["completion_mask"].bool(), strict=True):
            masked += not mask.any()
            assert not mask.any() or ids[mask][-1] in ends
    assert 0 < masked < sum(len(x["completion_ids"]) for x in trainer.recorded)


@pytest.mark.parametrize("overflow", ["left", "drop"])
def test_prompts_that_are_too_long(make_trainer, prompts, tokenizer, overflow: str) -> None:
    mixed = prompts.select([row for pair in zip(range(30, 45), range(45, 60), strict=True) for row in pair])
    texts = mixed["prompt"][:]
    assert {len(text) for text in texts} == {5, 6}
    trainer = make_trainer(
        Recording, config_class=DAPOConfig, max_prompt_length=5, prompt_overflow=overflow, shuffle_dataset=False,
        train_dataset=mixed, per_device_train_batch_size=8, steps_per_generation=6, max_steps=1,
    )  # fmt: skip
    trainer.train()
    trained = {
        tokenizer.decode(ids[mask.bool()]).replace(" ", "")
        for inputs in trainer._buffered_inputs
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    }
    if overflow == "left":
        assert trained == {text[-5:] for text in texts[:12]}
        assert history(trainer, "prompts/truncated")[0] == 0.5
    else:
        fitting = [text for text in texts if len(text) == 5]
        assert trained == set(fitting[:12])
        assert trainer.train_dataset["prompt"][:] == fitting
        assert history(trainer, "prompts/truncated")[0] == 0


def test_prompts_that_an_environment_adds_to_cannot_be_dropped(make_trainer, tool_chats) -> None:
    class Environment:
        def reset(self, **kwargs: Any) -> str:
            return "more of the prompt"

    chats, _ = tool_chats
    with pytest.raises(ValueError, match="`prompt_overflow`='drop' cannot know the prompts that an `environment_factory`"):
        make_trainer(
            Recording, config_class=DAPOConfig, prompt_overflow="drop", train_dataset=chats, environment_factory=Environment
        )


def test_defaults_are_the_recipes(make_config) -> None:
    config = DAPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    assert config.policy_loss_spec() == PRESETS["dapo"].replace(kl_ratio_weighted=True)
    assert (config.num_generations, config.max_completion_length, config.max_prompt_length) == (16, 20480, 2048)
    assert (config.beta, config.entropy_coef, config.delta, config.temperature, config.top_p) == (0, 0, None, 1, 1)
    assert config.learning_rate == 1e-6
    assert config.report_to == ["tensorboard"]
    assert not config.filter_groups_enable
    assert not config.apply_overlong_penalty
    dppo = DAPOConfig(output_dir="unused", use_cpu=True, bf16=False, divergence_type="topk_kl")
    assert dppo.policy_loss_spec() == PRESETS["dppo_topk_kl"].replace(kl_ratio_weighted=True)
    assert dppo.vllm_importance_sampling_correction is False
    assert config.vllm_importance_sampling_correction is True


FILTER = {"filter_groups_enable": True}
ROWS = "`per_device_train_batch_size` * `steps_per_generation` = 6 must be a multiple of `num_generations` = 4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "vespo"}, "`loss_type` must be one of"),
        ({"divergence_type": "tv"}, "`divergence_type` must be one of"),
        ({"divergence_type": "binary_tv", "delta": 2.0}, "`delta`=2.0 would be ignored by DAPO: leave it at None"),
        ({"divergence_type": "binary_tv", "loss_type": "grpo"}, "`loss_type`='grpo' would be ignored by DAPO: leave it"),
        (
            {"divergence_type": "binary_tv", "use_vllm": True, "vllm_importance_sampling_correction": True},
            "would correct twice",
        ),
        ({"clip_ratio_c": 3.0}, "`clip_ratio_c`=3.0 would be ignored by DAPO with `loss_type`='dapo': leave it at 20.0"),
        ({"sapo_temperature_pos": 2.0}, "`sapo_temperature_pos`=2.0 would be ignored"),
        ({"loss_type": "cispo", "epsilon": 0.2}, "`epsilon`=0.2 would be ignored"),
        ({"loss_type": "sapo", "delta": 2.0}, "`delta`=2.0 would be ignored"),
        ({"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold`=0.5 would be ignored"),
        ({"use_adaptive_entropy": True}, "`use_adaptive_entropy`=True would be ignored"),
        ({"epsilon": 0.0}, "`epsilon` must be"),
        ({"use_vllm": True, "top_p": 0.7}, "`top_p`=0.7 reshapes"),
        ({"filter_exhausted": "stop"}, "`filter_exhausted` must be one of"),
        ({"filter_surplus": "keep"}, "`filter_surplus` must be one of"),
        ({"prompt_overflow": "right"}, "`prompt_overflow` must be one of"),
        ({"max_prompt_length": 0}, "`max_prompt_length` must be at least 1 token, got 0"),
        ({"apply_overlong_penalty": True, "overlong_buffer_len": 7}, r"`buffer_len` must be in .* got 7 .*_length=6"),
        ({"apply_overlong_penalty": True, "max_completion_length": None}, "needs a `max_completion_length`, got None"),
        ({**FILTER, "filter_gen_batch_size": 0}, "`filter_gen_batch_size` must be a multiple of the 1 processes, got 0"),
        ({**FILTER, "scale_rewards": "batch"}, "`scale_rewards`='batch' would take the deviation over groups"),
        ({**FILTER, "multi_objective_aggregation": "normalize_then_sum"}, "would normalise over groups"),
        ({**FILTER, "remove_unused_columns": True}, "drops the columns that answers are checked against"),
        ({**FILTER, "filter_exhausted": "train", "loss_type": "bnpo"}, "cannot rescale `loss_type`='bnpo'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_honoured(make_config, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(DAPOConfig, **settings)


def test_groups_must_be_whole_on_every_process(make_config, monkeypatch) -> None:
    monkeypatch.setattr(DAPOConfig, "world_size", 2)
    settings = {"per_device_train_batch_size": 3, "steps_per_generation": 2, "num_generations": 4}
    assert make_config(DAPOConfig, **settings).generation_batch_size == 12  # without filtering a group may span processes
    with pytest.raises(ValueError, match=ROWS.replace("*", r"\*")):
        make_config(DAPOConfig, filter_groups_enable=True, **settings)
    settings["per_device_train_batch_size"] = 4
    with pytest.raises(ValueError, match="must be a multiple of the 2 processes, got 3"):
        make_config(DAPOConfig, filter_groups_enable=True, filter_gen_batch_size=3, **settings)
