"""What FSDP2 and DeepSpeed change for trainers: what may be asked of them, frozen models, and models that stay whole."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model, parse_flag_from_env
from torch import nn

from dppo_kernels.trainers._trl_seam import ACTIVE_ZERO_CONFIG, prepare_deepspeed, zero_config
from dppo_kernels.trainers.head import is_partitioned

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: a trainer of TRL comes after it in the bases


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the policy's parameters, or its optimiser's state at least, are divided over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def zero_stage(accelerator: Accelerator) -> int:
    """Of DeepSpeed; 0 without it."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


def check_engine(accelerator: Accelerator) -> None:
    """Refuse engines that trainers do not know, and one that was asked for and is not there.

    Raises:
        ValueError: FSDP 1; FSDP where accelerate, without a word, makes DDP of it, which it does on CPUs.
    """
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, and accelerate made {accelerator.distributed_type.value} of it, as it shards on GPUs and the "
            "like only: turn `fsdp` off, or train on these"
        )
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 is not supported: set `fsdp_version` to 2")


class EngineMixin(Host):
    """Put before TRL's trainer in the bases: engines are checked as soon as they are known, before models are divided."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        check_engine(self.accelerator)
        keep_precision(self.accelerator)
        if not is_sharded(self.accelerator):
            return
        if self.args.sync_ref_model:
            raise ValueError(
                "`sync_ref_model` is not supported with FSDP and DeepSpeed: checkpoints would not hold the reference"
            )
        if self.accelerator.mixed_precision != "no" and getattr(self.args, "cast_lm_head_to_fp32", False):  # DPO has none
            raise ValueError(
                "`cast_lm_head_to_fp32` is not supported with FSDP and DeepSpeed in mixed precision: all weights have its dtype"
            )


def keep_precision(accelerator: Accelerator) -> None:
    """Under FSDP2, what goes into a model and comes out of it keeps its dtype.

    accelerate's policy casts both to that of the parameters. Log-probs in bfloat16 have two digits: ratios, and sums over
    completions, would be noise. A model's own inputs are ids; what its layers hand on is in the parameters' dtype already.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = None if plugin is None else plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None)


def prepare_frozen(accelerator: Accelerator, model: nn.Module, *, whole: bool = False) -> nn.Module:
    """A model that is scored and not trained, on this device, divided over processes where the policy's parameters are.

    Args:
        accelerator: of the trainer.
        model: a transformers model, or any module where it stays whole.
        whole: do not divide it, as what is called by another method than its forward must not be.
    """
    model.eval()
    if not whole and accelerator.distributed_type == DistributedType.FSDP:
        with _own_layers(accelerator.state.fsdp_plugin):
            return fsdp2_prepare_model(accelerator, model)
    if not whole and zero_stage(accelerator) == 3:
        return prepare_deepspeed(model, accelerator)
    if is_sharded(accelerator):
        return model.to(accelerator.device)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def _own_layers(plugin: Any) -> Iterator[None]:
    """What FSDP2 wraps are the layers of the model at hand: accelerate keeps those of the first, or of the options, for all."""
    kept = {name: getattr(plugin, name) for name in ("auto_wrap_policy", "transformer_cls_names_to_wrap")}
    plugin.transformer_cls_names_to_wrap = None
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(plugin, name, value)


@contextmanager
def unpartitioned(*sources: nn.Module) -> Iterator[None]:
    """Models made inside are whole, also under ZeRO-3, and so are the parameters of `sources`."""
    if not zero_config.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    active = getattr(zero_config, ACTIVE_ZERO_CONFIG)()
    zero_config.unset_hf_deepspeed_config()
    try:
        with deepspeed.zero.GatheredParameters([p for source in sources for p in source.parameters() if is_partitioned(p)]):
            yield
    finally:
        zero_config.set_hf_deepspeed_config(active)
