"""What trainers refuse of FSDP and DeepSpeed, and heads behind wrappers; the engines run in `tests/distributed`."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from dppo_kernels.trainers.head import head_shape, in_head
from dppo_kernels.trainers.sharding import EngineMixin, check_engine, keep_precision
from tests.trainers.ppo_runs import make_ppo, value_model


def engine(kind: str, processes: int = 2, **state: Any) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=DistributedType(kind), num_processes=processes, state=SimpleNamespace(**state))


def test_fsdp_that_is_none_is_refused(monkeypatch) -> None:
    """accelerate makes DDP of it on CPUs, without a word."""
    check_engine(engine("MULTI_CPU"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_engine(engine("NO", processes=1))
    check_engine(engine("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=2)))
    with pytest.raises(ValueError, match="FSDP was asked for, and accelerate made MULTI_CPU of it"):
        check_engine(engine("MULTI_CPU"))
    with pytest.raises(ValueError, match="FSDP 1 is not supported: set `fsdp_version` to 2"):
        check_engine(engine("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=1)))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("DEEPSPEED", {"target_kl": 0.1}, "`target_kl` ends an update before a step is made, and DeepSpeed makes it"),
        ("FSDP", {"fp16": True}, "`fp16` with FSDP and DeepSpeed scales the loss for the policy alone"),
    ],
)
def test_settings_that_engines_cannot_honour(
    make_trainer, monkeypatch, kind: str, settings: dict[str, Any], message: str
) -> None:
    trainer = make_ppo(make_trainer)
    for name, value in settings.items():
        object.__setattr__(trainer.args, name, value)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", kind == "DEEPSPEED")
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", property(lambda self: DistributedType(kind)))
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
    with pytest.raises(ValueError, match=message):
        trainer._check_model(trainer.model)
    del trainer.accelerator.state.fsdp_plugin


@pytest.mark.parametrize(
    ("precision", "settings", "message"),
    [
        ("no", {"sync_ref_model": True}, "`sync_ref_model` is not supported with FSDP and DeepSpeed"),
        ("bf16", {"cast_lm_head_to_fp32": True}, "`cast_lm_head_to_fp32` is not supported with FSDP and DeepSpeed in mixed"),
        ("no", {"cast_lm_head_to_fp32": True}, None),
    ],
)
def test_settings_are_checked_with_the_engine(precision: str, settings: dict[str, Any], message: str | None) -> None:
    class Trainer:
        accelerator = engine("DEEPSPEED", deepspeed_plugin=None)
        args = SimpleNamespace(**{"sync_ref_model": False, **settings})

        def create_accelerator_and_postprocess(self) -> None:
            self.accelerator.mixed_precision = precision

    class Checked(EngineMixin, Trainer):
        pass

    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        Checked().create_accelerator_and_postprocess()


def test_fsdp_casts_neither_inputs_nor_outputs() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    found = engine("FSDP", fsdp_plugin=SimpleNamespace(mixed_precision_policy=policy))
    keep_precision(found)
    kept = found.state.fsdp_plugin.mixed_precision_policy
    assert (kept.param_dtype, kept.reduce_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (kept.output_dtype, kept.cast_forward_inputs) == (None, False)


def test_an_optimiser_of_both_models_is_refused_beside_a_sharded_policy(make_trainer, monkeypatch) -> None:
    trainer = make_ppo(make_trainer)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", property(lambda self: DistributedType.FSDP))
    both = torch.optim.SGD([*trainer.model.parameters(), *trainer.value_model.parameters()])
    with pytest.raises(ValueError, match="the value model has an optimiser of its own: leave its parameters out"):
        trainer._optimize_values(both)


def test_checkpoints_of_another_engine_are_refused(make_trainer, tmp_path) -> None:
    """In which the policy's optimiser held the value model."""
    trainer = make_ppo(make_trainer, save_strategy="steps", save_steps=1, max_steps=1, output_dir=str(tmp_path))
    trainer.train()
    trainer.value_optimizer = torch.optim.SGD(trainer.value_model.parameters())
    with pytest.raises(ValueError, match=r"holds no value_optimizer\.pt: its value model was stepped by the policy's"):
        trainer._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-1"))


def test_models_that_zero_3_has_divided_are_refused(make_trainer, model, monkeypatch) -> None:
    divided = value_model(108)
    next(divided.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="`value_model` was loaded under ZeRO-3"):
        make_ppo(make_trainer, value_model=divided)
    monkeypatch.setattr(next(model.parameters()), "ds_id", 0, raising=False)
    with pytest.raises(ValueError, match="ZeRO-3 has divided `model`, which cannot be copied"):
        make_ppo(make_trainer, kl_coef=0.1)


def test_the_head_is_used_inside_its_own_forward(model) -> None:
    head, calls = model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    hidden = torch.randn(2, 3, 32, requires_grad=True)

    def function(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> dict[str, Any]:
        assert weight is head.weight
        assert bias is None
        return {"sum": (hidden @ weight.T).sum()}

    in_head(head, function, hidden)["sum"].backward()
    assert calls == [(2, 3, 32)]
    torch.testing.assert_close(hidden.grad, head.weight.sum(0).expand(2, 3, -1))
    assert torch.equal(head(hidden), nn.functional.linear(hidden, head.weight))  # as before
    assert head_shape(model) == tuple(head.weight.shape)


def test_a_head_that_is_trained_whole_under_peft(model) -> None:
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2))
    head = wrapped.get_output_embeddings()
    trained = head.modules_to_save["default"].weight
    trained.data += 1
    hidden = torch.randn(2, 32)
    assert torch.equal(in_head(head, lambda weight, bias, x: x @ weight.T, hidden), hidden @ trained.T)
    with wrapped.disable_adapter():
        assert torch.equal(in_head(head, lambda weight, bias, x: x @ weight.T, hidden), hidden @ head.original_module.weight.T)
