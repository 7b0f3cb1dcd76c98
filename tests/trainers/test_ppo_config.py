"""Settings of PPO: what they derive, and what they refuse."""

from typing import Any

import pytest

from dppo_kernels import PRESETS
from dppo_kernels.control import AdaptiveKLController, FixedKLController
from dppo_kernels.trainers import DecoupledPPOConfig, PPOConfig
from tests.trainers.ppo_runs import SETTINGS


def test_what_is_derived(make_config) -> None:
    config = make_config(PPOConfig, **SETTINGS)
    assert config.num_generations == config.num_generations_eval == 1
    assert (config.num_iterations, config.steps_per_generation) == (2, 4)
    assert config.generation_batch_size == 2 * 2 * 2
    assert config.policy_loss_spec() == PRESETS["ppo"].replace(kl_ratio_weighted=True)
    groups = make_config(PPOConfig, **{**SETTINGS, "num_generations": 4})
    assert groups.num_generations == 4


def test_the_defaults_of_trls_removed_trainer() -> None:
    config = PPOConfig(use_cpu=True, bf16=False)
    expected = {
        "learning_rate": 3e-6,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "cliprange": 0.2,
        "vf_coef": 0.1,
        "cliprange_value": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "missing_eos_penalty": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_clip_widths(make_config) -> None:
    spec = make_config(PPOConfig, **SETTINGS, cliprange=0.1).policy_loss_spec()
    assert (spec.epsilon_low, spec.epsilon_high) == (0.1, 0.1)
    spec = make_config(PPOConfig, **SETTINGS, epsilon_high=0.28).policy_loss_spec()
    assert (spec.epsilon_low, spec.epsilon_high) == (0.2, 0.28)
    spec = make_config(PPOConfig, **SETTINGS, epsilon=0.1, delta=3.0).policy_loss_spec()
    assert (spec.epsilon_low, spec.epsilon_high, spec.ratio_cap) == (0.1, 0.1, 3.0)
    spec = make_config(PPOConfig, **SETTINGS, kl_coef=0.0, beta=0.1).policy_loss_spec()
    assert spec.beta == 0.1
    spec = make_config(PPOConfig, **SETTINGS, divergence_type="topk_tv").policy_loss_spec()
    assert spec.divergence == "topk_tv"


def test_controllers(make_config) -> None:
    assert isinstance(make_config(PPOConfig, **SETTINGS).kl_controller(), FixedKLController)
    adaptive = make_config(PPOConfig, **SETTINGS, kl_coef=0.2, kl_target=6.0, kl_horizon=500).kl_controller()
    assert isinstance(adaptive, AdaptiveKLController)
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.2, 6.0, 500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 2}, "`num_iterations`=2 is what PPO derives: set `num_ppo_epochs` instead"),
        ({"steps_per_generation": 2}, "`steps_per_generation`=2 is what PPO derives: set `num_mini_batches` instead"),
        ({"generation_batch_size": 8}, "`generation_batch_size`=8 is what PPO derives"),
        ({"num_ppo_epochs": 0}, "`num_ppo_epochs` must be an int of at least 1, got 0"),
        ({"num_mini_batches": 1.5}, "`num_mini_batches` must be an int of at least 1, got 1.5"),
        ({"cliprange": -0.1}, "`cliprange` must be positive, got -0.1"),
        ({"cliprange_value": 0}, "`cliprange_value` must be positive, got 0"),
        ({"gamma": 1.1}, r"`gamma` must be in \[0, 1\], got 1.1"),
        ({"lam_value": -0.5}, r"`lam_value` must be in \[0, 1\], got -0.5"),
        ({"kl_coef": -1}, "`kl_coef` must not be negative, got -1"),
        ({"missing_eos_penalty": -1}, "`missing_eos_penalty` must not be negative"),
        ({"missing_eos_penalty": 1.0, "mask_truncated_completions": True}, "masks what `missing_eos_penalty` would punish"),
        ({"kl_estimator": "k4"}, "`kl_estimator` must be one of 'k1', 'k2', 'k3'; got 'k4'"),
        ({"beta": 0.1}, "`beta` would penalise the KL to the reference a second time"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "`kl_target` needs a `kl_coef` above 0"),
        ({"kl_target": 6.0, "kl_horizon": 1}, "`kl_horizon`=1 is too short for rollouts of 8 completions"),
        ({"loss_type": "grpo"}, "`loss_type`='grpo' would be ignored by PPO"),
        ({"scale_rewards": "none"}, "`scale_rewards`='none' would be ignored by PPO"),
        ({"divergence_type": "binary_tv", "cliprange": 0.1}, "`cliprange`=0.1 would be ignored by PPO"),
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_mini_batches": 1},
            "a rollout of one completion per process",
        ),
    ],
)
def test_what_is_refused(make_config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(PPOConfig, **{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vf_learning_rate": 0}, "`vf_learning_rate` must be positive, got 0"),
        ({"num_vf_epochs": 0}, "`num_vf_epochs` must be an int of at least 1, got 0"),
        ({"vf_update_frequency": 0}, "`vf_update_frequency` must be an int of at least 1"),
        ({"vf_pretrain_updates": -1}, "`vf_pretrain_updates` must be an int of at least 0, got -1"),
        ({"vf_lr_scheduler_type": "straight"}, "`vf_lr_scheduler_type` must be one of 'linear'"),
        ({"vf_max_grad_norm": -1}, "`vf_max_grad_norm` must not be negative"),
        ({"vf_coef": 0.5}, "`vf_coef`=0.5 would be ignored by DecoupledPPO"),
        ({"share_value_backbone": True}, "`share_value_backbone` cannot be decoupled"),
    ],
)
def test_what_decoupling_refuses(make_config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(DecoupledPPOConfig, **{**SETTINGS, **changes})


def test_one_completion_a_prompt_whatever_the_batch(make_config) -> None:
    for rows, accumulation, mini_batches in ((1, 3, 1), (1, 1, 5), (7, 1, 1), (3, 2, 2)):
        config = make_config(
            PPOConfig,
            **{
                **SETTINGS,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": accumulation,
                "num_mini_batches": mini_batches,
            },
        )
        assert config.num_generations == 1
        assert config.generation_batch_size == rows * accumulation * mini_batches
