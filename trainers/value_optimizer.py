"""Optimisers of a value model: parameter groups as transformers makes them, a second optimiser and its scheduler."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

# What optimisers that arrange parameters by themselves (GaLore, LOMO, layer-wise ones) hand over instead of parameters.
_OWN_ARRANGEMENT = ("params", "model", "optimizer_dict")


def parameter_groups(trainer: Any, module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay, by transformers' rule; groups without any are left out."""
    decayed = set(trainer.get_decay_parameter_names(module))
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = (
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def optimizer_class(trainer: Any, args: Any, module: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class of `args.optim`, and its options.

    Raises:
        ValueError: an optimiser that arranges parameters by itself.
    """
    kind, options = trainer.get_optimizer_cls_and_kwargs(args, module)
    if any(name in options for name in _OWN_ARRANGEMENT) or not isinstance(kind, type):
        raise ValueError(f"`optim`={str(args.optim)!r} arranges parameters by itself, which leaves a value model's out")
    return kind, options


def total_norm(module: nn.Module) -> Tensor | None:
    """Of its gradients, over all processes that hold a part of them; None without any."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not gradients:
        return None
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_to(module: nn.Module, limit: float, norm: Tensor) -> None:
    """Scale its gradients by `limit` / `norm` where that is less than 1, as `torch.nn.utils.clip_grads_with_norm_`."""
    parameters = list(module.parameters())
    if not any(hasattr(p.grad, "to_local") for p in parameters):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        own: Any = p.grad
        if own is not None:
            own.to_local().mul_(factor)  # a DTensor takes no plain tensor


def make_value_optimizer(trainer: Any, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser class and options of `args.optim`, at the value model's learning rate and weight decay.

    Raises:
        ValueError: an optimiser that arranges parameters by itself; nothing to train.
    """
    args = trainer.args
    rate = args.learning_rate if args.vf_learning_rate is None else args.vf_learning_rate
    decay = args.weight_decay if args.vf_weight_decay is None else args.vf_weight_decay
    kind, options = optimizer_class(trainer, _with_rate(args, rate), module)
    groups = parameter_groups(trainer, module, decay)
    if not groups:
        raise ValueError("`value_model` has no parameter that requires a gradient")
    return kind(groups, **{**options, "lr": rate})


def make_value_scheduler(args: Any, optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """The value model's scheduler; it is stepped once a value update, of which a run has `updates`."""
    kind = args.lr_scheduler_type if args.vf_lr_scheduler_type is None else args.vf_lr_scheduler_type
    options = args.vf_lr_scheduler_kwargs
    if options is None and args.vf_lr_scheduler_type is None:
        options = args.lr_scheduler_kwargs
    return get_scheduler(
        kind,
        optimizer=optimizer,
        num_warmup_steps=args.vf_lr_warmup_updates,
        num_training_steps=updates,
        scheduler_specific_kwargs=options,
    )


def _with_rate(args: Any, rate: float) -> Any:
    """A shallow copy with another learning rate: replacing the field would validate everything again."""
    changed = object.__new__(type(args))
    changed.__dict__.update(vars(args))
    object.__setattr__(changed, "learning_rate", rate)
    return changed
