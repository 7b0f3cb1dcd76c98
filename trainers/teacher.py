"""Teachers: what they may be, what they know of a sequence, and whether student and teacher speak of the same tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from dppo_kernels.trainers.distillation import own_logits
from dppo_kernels.trainers.head import gathered, head_shape
from dppo_kernels.trainers.scoring import IGNORE_INDEX, logit_transform

logger = get_logger(__name__)


def gives_logits(teacher: Any) -> bool:
    """Whether it is asked for logits, instead of hidden states that its head is applied to."""
    return callable(getattr(teacher, "get_teacher_logits", None))


def check_teacher(teacher: Any) -> None:
    """Raise TypeError unless `teacher` is a path, a causal LM or an object with `get_teacher_logits`."""
    if isinstance(teacher, str) or gives_logits(teacher):
        return
    if not isinstance(teacher, PreTrainedModel) or teacher.get_output_embeddings() is None:
        raise TypeError(
            "`teacher` must be a causal LM, its path, or an object with a method `get_teacher_logits(input_ids, "
            f"attention_mask)`, got {type(teacher).__name__}"
        )


def check_tokenizer(path: str, tokenizer: Any) -> None:
    """Refuse a teacher whose tokenizer, which lies beside it, writes other ids than the student's.

    Raises:
        ValueError: with both sizes, and a token that differs.
    """
    # AutoTokenizer makes an empty one up where there is none.
    if cached_file(path, TOKENIZER_CONFIG_FILE, _raise_exceptions_for_missing_entries=False) is None:
        logger.warning(f"{path} holds no tokenizer: whether the teacher's ids mean the same was not checked")
        return
    own, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(path).get_vocab()
    if own != theirs:
        differs = next(token for token in [*own, *theirs] if own.get(token) != theirs.get(token))
        raise ValueError(
            f"`teacher` has a tokenizer of {len(theirs)} tokens, the student one of {len(own)}: the id of {differs!r} is "
            f"{theirs.get(differs)} there and {own.get(differs)} here"
        )


class Teacher:
    """What the student is compared with.

    Args:
        model: a causal LM in eval mode that `install_scoring` was called on, or an object with `get_teacher_logits`.
        vocab: V of the student.
    """

    def __init__(self, model: Any, vocab: int) -> None:
        self.model, self.vocab = model, vocab
        self.gives_logits = gives_logits(model)

    @property
    def width(self) -> int:
        """H of its hidden states; 0 where it gives logits."""
        return 0 if self.gives_logits else head_shape(self.model)[1]

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Hidden states [B, T, H] before the last T = `length` positions, in the dtype of its head."""
        nothing = input_ids.new_full((input_ids.shape[0], length), IGNORE_INDEX)
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, scored_ids=nothing, with_hidden=True).hidden
        return found.to(self.model.get_output_embeddings().weight.dtype)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor | None:
        """Its logits at the last T = `length` positions, of one that gives them."""
        if not self.gives_logits:
            return None
        return own_logits(self.model.get_teacher_logits, input_ids, attention_mask, length, self.vocab).detach()

    @contextmanager
    def side(self, hidden: Tensor | None, logits: Tensor | None) -> Iterator[Mapping[str, Any]]:
        """Its half of `compare`, from its hidden states or its logits; its head is whole while this is open."""
        if logits is not None:
            yield {"logits": logits}
            return
        softcap, logit_scale = logit_transform(self.model.config)
        with gathered(self.model.get_output_embeddings()) as (weight, bias):
            yield {"hidden": hidden, "weight": weight, "bias": bias, "logit_scale": logit_scale, "softcap": softcap}
