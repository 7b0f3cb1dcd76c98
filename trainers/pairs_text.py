"""Prompts as tokens and completions as texts, of which TRL's DPOTrainer makes the same tokens again."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

# Of chats: what TRL's DPOTrainer renders each row's template with.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")

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
    """Of all rows; those of chats by their own `TEMPLATE_COLUMNS`, where the data has them.

    Raises:
        TypeError, ValueError: a prompt has no tokens, or a row other tools or options than a template takes.
    """
    prompts = data["prompt"][:]
    if isinstance(prompts[0], str):
        tokenized = [TokenizedPrompt(ids, "") for ids in tokenizer(prompts)["input_ids"]]
    else:
        names = [name for name in TEMPLATE_COLUMNS if name in data.column_names]
        rows = data.select_columns(["prompt", *names])
        options = [_options(row, columns) for row, columns in enumerate(rows)]
        tokenized = [_tokenized_chat(tokenizer, *chat) for chat in zip(prompts, options, strict=True)]
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


def _options(row: int, columns: dict[str, Any]) -> dict[str, Any]:
    """Of a chat template, as TRL's DPOTrainer reads them."""
    tools, options = columns.get("tools"), columns.get("chat_template_kwargs", {})
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as reason:
            raise ValueError(f"`prompts`: row {row}: `tools` must be a list or JSON of one, got {tools!r:.200}") from reason
    if not isinstance(tools, list | None):
        raise TypeError(f"`prompts`: row {row}: `tools` must be a list or JSON of one, got {type(tools).__name__}")
    if not isinstance(options, dict):
        raise TypeError(f"`prompts`: row {row}: `chat_template_kwargs` must be a dict, got {type(options).__name__}")
    return {"tools": tools, **options}


def _tokenized_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, Any]], options: dict[str, Any]
) -> TokenizedPrompt:
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **options)
    answer = {"role": "assistant", "content": _ANSWER}
    answered = tokenizer.apply_chat_template([*prompt, answer], tokenize=False, **options)
    lead = answered[len(asked) :].partition(_ANSWER)[0] if answered.startswith(asked) else ""
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **options)
    return TokenizedPrompt(encoded["input_ids"], lead)
