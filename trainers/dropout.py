"""Randomness inside a forward: with any of it the rollout policy and the trained policy differ on unchanged weights."""

from torch import nn
from transformers import PreTrainedModel

# Models keep probabilities in two places: dropout modules, and float attributes handed to functional dropout. (Mixtral's
# `jitter_noise` acts in train mode only; PhiMoE's `router_jitter_noise` is a threshold in eval mode too, and stays.)
_ATTRIBUTE_WORDS = ("dropout", "layerdrop", "drop_prob", "drop_path", "pdrop")
_ATTRIBUTES = ("jitter_noise",)


def active_dropout(model: nn.Module) -> list[str]:
    """Names of dropout modules, and of modules' float attributes named like one, that drop or jitter in train mode."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.append(name)
        found += [f"{name}.{attribute}" for attribute in _random_attributes(module)]
    return found


def disable_dropout(model: nn.Module) -> None:
    """Set every probability that `active_dropout` finds to 0; configs, which are saved, stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute in _random_attributes(module):
            setattr(module, attribute, 0.0)


def check_deterministic(model: PreTrainedModel) -> None:
    """Raise ValueError if two forwards of `model` in train mode would differ."""
    if model.config.get_text_config().model_type == "phimoe":
        raise ValueError("PhiMoE draws its experts at random in train mode: rollout and training policies would differ")
    dropout = active_dropout(model)
    if dropout:
        raise ValueError(f"`disable_dropout=False`, but {dropout[0]} drops: rollout and training policies would differ")


def _random_attributes(module: nn.Module) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, float) and value > 0 and (name in _ATTRIBUTES or any(word in name for word in _ATTRIBUTE_WORDS))
    ]
