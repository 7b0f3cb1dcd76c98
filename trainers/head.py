"""Using a model's output head where its weights are whole: inside its own forward, also where they are sharded over processes.

FSDP2 and ZeRO-3 gather a module's parameters in hooks around its forward and its backward, and nowhere else. Code that reads
``head.weight`` beside the forward finds a shard, or nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dppo_kernels.trainers.shadow import shadowed

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # a torch that was built without distributed
    FSDPModule = None  # type: ignore[assignment, misc]


@torch.compiler.disable  # a module's forward is replaced for a while; the ops inside are compiled already
def in_head(head: nn.Module, function: Callable[..., Any], *hidden: Tensor) -> Any:
    """``function(weight, bias, *hidden)`` as the forward of `head`, whose hooks run as if it had computed logits.

    What is returned must be a tensor or tuples, lists and dictionaries of them: engines look for gradients there. Outside of a
    graph the weights are let go at once; in one, they stay for the backward, which comes next.
    """
    owner = _owner(head)
    with shadowed(owner, "forward", lambda *hidden: function(owner.weight, owner.bias, *hidden)):
        found = owner(*hidden)
    if _is_fsdp(owner) and not torch.is_grad_enabled():
        owner.reshard()
    return found


@contextmanager
def gathered(head: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the head of a frozen model, whole for the duration, without its forward."""
    owner = _owner(head)
    if is_partitioned(owner.weight):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(owner.parameters(recurse=False))):
            yield _weights(owner)
    elif _is_fsdp(owner):
        owner.unshard()
        try:
            yield _weights(owner)
        finally:
            owner.reshard()
    else:
        yield _weights(owner)


def head_shape(model: nn.Module) -> tuple[int, int]:
    """(V, H) of the whole head, of which this process may hold a part."""
    weight: Any = model.get_output_embeddings().weight  # type: ignore[operator]
    vocab, width = getattr(weight, "ds_shape", weight.shape)
    return vocab, width


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 has it."""
    return hasattr(parameter, "ds_id")


def _weights(owner: Any) -> tuple[Tensor, Tensor | None]:
    return owner.weight.detach(), None if owner.bias is None else owner.bias.detach()


def _is_fsdp(module: nn.Module) -> bool:
    return FSDPModule is not None and isinstance(module, FSDPModule)


def _owner(head: Any) -> Any:
    """The module that holds the weights: PEFT puts a head that is trained whole (`modules_to_save`) behind a wrapper."""
    if not hasattr(head, "modules_to_save"):
        return head
    active = head.active_adapters
    return head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
