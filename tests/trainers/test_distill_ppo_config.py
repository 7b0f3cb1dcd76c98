"""Settings of PPO with a teacher: the request's, what they derive, and what they refuse."""

from typing import Any

import pytest

from dppo_kernels import PRESETS
from dppo_kernels.control import AdaptiveKLController, FixedKLController
from dppo_kernels.trainers import DistillPPOConfig
from tests.trainers.distill_runs import settings

CPU = {"use_cpu": True, "bf16": False}


def test_the_configuration_of_the_request() -> None:
    config = DistillPPOConfig(
        **CPU,
        learning_rate=1e-5,
        batch_size=8,
        mini_batch_size=4,
        gradient_accumulation_steps=1,
        optimize_cuda_cache=True,
        early_stopping=True,
        target_kl=0.1,
        ppo_epochs=4,
        max_grad_norm=1.0,
        init_kl_coef=0.2,
        adap_kl_ctrl=True,
        use_score_scaling=True,
        use_score_norm=True,
        score_clip=None,
    )
    assert (config.per_device_train_batch_size, config.num_mini_batches, config.num_ppo_epochs) == (4, 2, 4)
    assert (config.generation_batch_size, config.num_iterations, config.steps_per_generation) == (8, 4, 2)
    assert config.target_kl == 0.1
    controller = config.kl_controller()
    assert isinstance(controller, AdaptiveKLController)
    assert (controller.coef, controller.target, controller.horizon) == (0.2, 6.0, 10_000)
    assert config.policy_loss_spec() == PRESETS["ppo"].replace(kl_ratio_weighted=True)


def test_the_defaults_of_trls_early_trainer() -> None:
    config = DistillPPOConfig(**CPU)
    expected = {
        "learning_rate": 1.41e-5,
        "batch_size": 128,
        "mini_batch_size": 128,
        "ppo_epochs": 4,
        "init_kl_coef": 0.2,
        "adap_kl_ctrl": True,
        "target": 6.0,
        "horizon": 10_000,
        "early_stopping": False,
        "target_kl": None,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "use_score_scaling": False,
        "use_score_norm": False,
        "score_clip": None,
        "whiten_rewards": False,
        "optim": config.default_optim,
        "lr_scheduler_type": "linear",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert "adamw" in config.optim
    assert DistillPPOConfig(**CPU, early_stopping=True).target_kl == 1.0


def test_controllers() -> None:
    assert isinstance(DistillPPOConfig(**CPU, adap_kl_ctrl=False).kl_controller(), FixedKLController)
    none = DistillPPOConfig(**CPU, init_kl_coef=0.0)
    assert (none.kl_coef, none.kl_target) == (0.0, None)
    adaptive = DistillPPOConfig(
        **CPU, init_kl_coef=0.1, target=2.0, horizon=100, batch_size=8, mini_batch_size=8
    ).kl_controller()
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.1, 2.0, 100)


def test_optimiser_and_schedule_are_told_to_transformers_too() -> None:
    """As JSON, as on the command line."""
    config = DistillPPOConfig(
        **CPU,
        optimizer_name="adamw_torch",
        optimizer_kwargs='{"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1}',
        scheduler_name="cosine_with_min_lr",
        scheduler_kwargs='{"num_warmup_steps": 3, "min_lr_rate": 0.1}',
    )
    assert (config.optim, config.weight_decay, config.adam_beta1, config.adam_beta2) == ("adamw_torch", 0.1, 0.8, 0.9)
    assert (config.adam_epsilon, config.lr_scheduler_type, config.warmup_steps) == (1e-6, "cosine_with_min_lr", 3)
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    constant = DistillPPOConfig(**CPU, scheduler_name="constant", scheduler_kwargs={"num_warmup_steps": 2})
    assert constant.lr_scheduler_type == "constant_with_warmup"  # transformers' constant has no warm-up
    same = DistillPPOConfig(**CPU, optim="sgd", optimizer_name="sgd", num_ppo_epochs=4, warmup_steps=5)
    assert (same.optim, same.warmup_steps) == ("sgd", 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_device_train_batch_size": 4},
            "`per_device_train_batch_size`=4 is what .* derives: set `mini_batch_size` instead",
        ),
        ({"num_mini_batches": 3}, "`num_mini_batches`=3 is what DistillPPOConfig derives: set `batch_size` instead"),
        ({"num_ppo_epochs": 3}, "`num_ppo_epochs`=3 is what .* set `ppo_epochs` instead"),
        ({"num_iterations": 3}, "`num_iterations`=3 is what PPO derives: set `ppo_epochs` instead"),
        ({"steps_per_generation": 3}, "`steps_per_generation`=3 is what PPO derives: set `batch_size` instead"),
        ({"kl_coef": 0.3}, "`kl_coef`=0.3 is what .* set `init_kl_coef` instead"),
        ({"kl_target": 3.0}, "`kl_target`=3.0 is what .* set `target` instead"),
        ({"kl_horizon": 9}, "`kl_horizon`=9 is what .* set `horizon` instead"),
        ({"optim": "sgd"}, "`optim`='sgd' is what .* set `optimizer_name` instead"),
        ({"optim_args": "a=1"}, "`optim_args`='a=1' is what .* set `optimizer_kwargs` instead"),
        ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type`='cosine' is what .* set `scheduler_name` instead"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "set `scheduler_kwargs` instead"),
        ({"warmup_steps": 4, "scheduler_kwargs": {"num_warmup_steps": 2}}, "`warmup_steps`=4 is what .* `scheduler_kwargs`"),
        ({"weight_decay": 0.2, "optimizer_kwargs": {"weight_decay": 0.1}}, "`weight_decay`=0.2 .* `optimizer_kwargs`"),
        ({"adam_beta2": 0.5, "optimizer_kwargs": {"betas": [0.9, 0.95]}}, "`adam_beta2`=0.5 .* `optimizer_kwargs`"),
        ({"batch_size": 7}, "`batch_size`=7 must be a multiple of the 4 completions of a step, `mini_batch_size`"),
        ({"batch_size": 1}, "`batch_size` must be an int of at least 2, got 1"),
        ({"mini_batch_size": 2.0}, "`mini_batch_size` must be an int of at least 1, got 2.0"),
        ({"ppo_epochs": 0}, "`ppo_epochs` must be an int of at least 1, got 0"),
        ({"init_kl_coef": -0.1}, "`init_kl_coef` must not be negative"),
        ({"init_kl_coef": 0.0, "target": 3.0}, "`target`=3.0 would be ignored with `init_kl_coef`=0"),
        ({"adap_kl_ctrl": False, "horizon": 99}, "`horizon`=99 would be ignored without `adap_kl_ctrl`"),
        ({"horizon": 1}, "`horizon`=1 is too short for rollouts of 8 completions"),
        ({"target": 0}, "`target` must be positive, got 0"),
        ({"beta": 0.1}, "`beta` would penalise the KL a second time: leave one of it and `init_kl_coef` at 0"),
        ({"target_kl": 0.1}, "`target_kl`=0.1 would be ignored without `early_stopping`"),
        ({"early_stopping": True, "target_kl": 0}, "`target_kl` must be positive, got 0"),
        ({"use_score_norm": True}, "`use_score_norm`=True would be ignored without `use_score_scaling`"),
        ({"score_clip": -1}, "`score_clip` must be positive, got -1"),
        ({"optimizer_name": "adam"}, "`optimizer_name` must be one of 'adamw', 'adamw_torch'"),
        ({"optimizer_kwargs": {"lr": 1.0}}, "`optimizer_kwargs` holds 'lr': set `learning_rate` instead"),
        ({"optimizer_kwargs": "betas"}, "`optimizer_kwargs` must be a dict or JSON of one, got 'betas'"),
        ({"scheduler_name": "straight"}, "`scheduler_name` must be one of 'linear'"),
        ({"scheduler_kwargs": {"num_cycles": 2}}, "`scheduler_kwargs` holds 'num_cycles', which 'constant' would ignore"),
        ({"scheduler_kwargs": {"num_warmup_steps": -1}}, "num_warmup_steps'\\]` must be an int of at least 0, got -1"),
        ({"kd_coef": -1}, "`kd_coef` must not be negative"),
        ({"kd_coef": 0.0}, "`kd_coef`=0 without `teacher_as_reference` leaves nothing for a teacher to do"),
        ({"kd_coef": 0.0, "teacher_as_reference": True, "kd_kind": "tv"}, "`kd_kind`='tv' would be ignored with `kd_coef`=0"),
        ({"kd_kind": "kl"}, "`kd_kind` must be one of 'forward_kl', 'reverse_kl', 'jsd', 'tv'; got 'kl'"),
        ({"kd_beta": 0.3}, "`kd_beta`=0.3 would be ignored with `kd_kind`='reverse_kl'"),
        ({"kd_kind": "jsd", "kd_beta": 1.5}, "`kd_beta` must be in \\[0, 1\\], got 1.5"),
        ({"kd_temperature": 0}, "`kd_temperature` must be positive, got 0"),
        ({"kd_data": "teacher"}, "`kd_data` must be one of 'rollouts', 'dataset'; got 'teacher'"),
        ({"kd_data": "dataset", "remove_unused_columns": True}, "`remove_unused_columns` drops the column `completion`"),
        ({"teacher_as_reference": True, "init_kl_coef": 0.0}, "`teacher_as_reference` would be ignored with `init_kl_coef`=0"),
        ({"teacher_as_reference": True, "sync_ref_model": True}, "`sync_ref_model` would move the teacher"),
        ({"loss_type": "grpo"}, "`loss_type`='grpo' would be ignored by DistillPPO"),
    ],
)
def test_what_is_refused(make_config, changes: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in settings().items() if name not in changes}
    if "per_device_train_batch_size" not in changes:
        given["per_device_train_batch_size"] = changes.get("mini_batch_size", 2)
    with pytest.raises(ValueError, match=message):
        make_config(DistillPPOConfig, **given, **changes)


def test_keywords_that_are_no_dict_are_refused() -> None:
    with pytest.raises(TypeError, match="`scheduler_kwargs` must be a dict or None, got list"):
        DistillPPOConfig(**CPU, scheduler_kwargs=[1])
