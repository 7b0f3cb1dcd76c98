"""Prompts as tokens and completions as texts, of which TRL's DPOTrainer makes the same tokens again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

_ANSWER = "\ue000"  # for private use: in no template


class TokenizedPrompt(NamedTuple):
    """A prompt for the model.

    Args:
        ids: its tokens; a chat's end with the template's generation prompt.
        lead: what the template puts between those and an answer, such as a space.
    """

    ids: list[int]
    lead: str


def tokenized_prompts(tokenizer: PreTrainedTokenizerBase, data: Dataset) -> list[TokenizedPrompt]:
    """Of all rows.

    Raises:
        ValueError: a prompt has no tokens.
    """
    prompts = data["prompt"][:]
    if isinstance(prompts[0], str):
        tokenized = [TokenizedPrompt(ids, "") for ids in tokenizer(prompts)["input_ids"]]
    else:
        tokenized = [_tokenized_chat(tokenizer, prompt) for prompt in prompts]
    for row, (ids, _) in enumerate(tokenized):
        if not ids:
            raise ValueError(f"`prompts`: row {row} has no tokens: {prompts[row]!r:.200}")
    return tokenized


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: TokenizedPrompt, completions: Sequence[list[int]]
) -> list[str]:
    """What follows the prompt's text, without special tokens.

    Tokenizers of sentencepiece's kind drop a space at the beginning of what they decode: it must not be the completion's.
    """
    start = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    texts = []
    for ids in completions:
        whole = tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)
        # No prefix where decoding tidies up spaces across the boundary.
        text = whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids, skip_special_tokens=True)
        texts.append(text.removeprefix(prompt.lead))
    return texts


def _tokenized_chat(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, Any]]) -> TokenizedPrompt:
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    answer = {"role": "assistant", "content": _ANSWER}
    answered = tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
    lead = answered[len(asked) :].partition(_ANSWER)[0] if answered.startswith(asked) else ""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return TokenizedPrompt(ids, lead)
