"""Value models: what they may be, where they come from, and the values of a completion's tokens."""

import copy
import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

FOLDER = "value_model"  # in checkpoints and beside the saved policy
HEAD_FILE = "value_head.safetensors"


class TokenValues(nn.Module):
    """Values of completion tokens by a model of its own, with one output a token.

    Args:
        model: a transformers model for token classification with one label, or one for sequence classification, whose `score`
            head is then applied to every token; with or without a PEFT adapter.

    Raises:
        TypeError, ValueError: another kind of model, or another number of labels.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not (isinstance(model, PreTrainedModel) or is_peft_model(model)):
            raise TypeError(f"`value_model` must be a transformers or PEFT model or a path, got {type(model).__name__}")
        base = _unadapted(model)
        self.pooled = type(base).__name__.endswith("ForSequenceClassification")
        if not self.pooled and not type(base).__name__.endswith("ForTokenClassification"):
            raise TypeError(
                f"`value_model` must be a model for token or sequence classification, got {type(base).__name__}: "
                "AutoModelForTokenClassification.from_pretrained(path, num_labels=1) makes one"
            )
        if self.pooled and not isinstance(getattr(base, "score", None), nn.Module):
            raise TypeError(f"`value_model` of type {type(base).__name__} has no `score` head that could value every token")
        if base.config.num_labels != 1:
            raise ValueError(f"`value_model` must have one label, got {base.config.num_labels}: pass num_labels=1")
        self.model = model
        self.takes = set(inspect.signature(type(base).forward).parameters)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Value before each of the last `length` tokens: what is expected from there on.

        Args:
            input_ids: [B, S] prompts and completions.
            attention_mask: [B, S].
            length: T, tokens of the completions.

        Returns:
            [B, T], float32.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in self.takes:  # of left-padded rows, as generate() counts them
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in self.takes:
            inputs["use_cache"] = False
        before = slice(-length - 1, -1)
        if not self.pooled:
            return self.model(**inputs).logits[:, before, 0].float()
        base = _unadapted(self.model)
        return base.score(base.base_model(**inputs).last_hidden_state[:, before])[..., 0].float()

    def save(self, folder: str) -> None:
        """Write the model as `from_pretrained` reads it."""
        self.model.save_pretrained(folder)

    def load(self, folder: str) -> None:
        """Take the weights that `save` wrote."""
        if is_peft_model(self.model):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.model, load_peft_weights(folder, device="cpu"))
            return
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())


class SharedHead(nn.Module):
    """A scalar head on the policy's hidden states; starts at value 0. Statistics are float32.

    Args:
        width: H, the policy's hidden size.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        _zero(self.linear)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H] to values [B, T]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float())[..., 0]

    def save(self, folder: str) -> None:
        """Write the head to ``value_head.safetensors``."""
        os.makedirs(folder, exist_ok=True)
        save_file(self.linear.state_dict(), os.path.join(folder, HEAD_FILE))

    def load(self, folder: str) -> None:
        """Take the weights that `save` wrote."""
        self.linear.load_state_dict(load_file(os.path.join(folder, HEAD_FILE)))


def make_value_model(given: Any, policy: Any, **load_options: Any) -> TokenValues:
    """The value model that a trainer was given, or a new one on a copy of the policy's backbone that values everything at 0.

    Args:
        given: a model for `TokenValues`, a path or hub id of one, or None.
        policy: the policy, without wrappers other than PEFT's.
        load_options: for `from_pretrained`, where a path is read.

    Raises:
        TypeError, ValueError: as `TokenValues`; an architecture that transformers has no classifier for.
    """
    if isinstance(given, str):
        config = AutoConfig.from_pretrained(given, num_labels=1, trust_remote_code=load_options.get("trust_remote_code"))
        return TokenValues(_classifier(config, given).from_pretrained(given, num_labels=1, **load_options))
    if given is not None:
        return TokenValues(given)
    base = _unadapted(policy)
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    classifier = _classifier(config, type(base).__name__)
    if is_peft_model(policy) and not config._name_or_path:
        raise ValueError(
            "the backbone of a PEFT policy is loaded again from its path, and this one has none: pass a `value_model`"
        )
    with torch.random.fork_rng():  # rollouts do not depend on who values them
        if is_peft_model(policy):  # its backbone holds adapters: the weights come from where it was loaded
            model = classifier.from_pretrained(config._name_or_path, num_labels=1, **load_options)
        else:
            model = classifier.from_config(config, dtype=base.dtype)
            model.base_model.load_state_dict(base.base_model.state_dict())
    _zero(model.score if hasattr(model, "score") else model.classifier)
    return TokenValues(model)


def _classifier(config: PretrainedConfig, name: str) -> Any:
    """Which auto class has a model with a head for this architecture."""
    for auto, mapping in (
        (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
        (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    ):
        if type(config) in mapping:
            return auto
    raise ValueError(
        f"transformers has neither token nor sequence classification for {name}: pass a `value_model` of another architecture "
        "with the same tokenizer"
    )


def check_disjoint(name: str, values: nn.Module, others: Iterable[tuple[str, Any]]) -> None:
    """Refuse a value model that would train, or be trained by, another model.

    Raises:
        ValueError: a parameter of `values` lies in the same memory as one of `others`, which are named models.
    """
    for other_name, other in others:
        memory = set(map(_memory, other.parameters())) - {None}
        shared = [n for n, p in values.named_parameters() if _memory(p) in memory]
        if shared:
            raise ValueError(
                f"`{name}` shares {len(shared)} parameters with {other_name} (the first is {shared[0]!r}): training one would "
                "change the other. Pass a copy, or a model loaded a second time"
            )


def _memory(parameter: Any) -> int | None:
    """Where it lies on this process, if anything of it does."""
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return own.untyped_storage().data_ptr() if own.numel() else None


def _unadapted(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _zero(head: nn.Module) -> None:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
