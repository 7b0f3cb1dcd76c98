"""Preference pairs from files, folders and the hub, in the columns of TRL's DPOTrainer."""

from datasets import Dataset

from dppo_kernels.trainers.data.prompts import is_generated, load_rows

_PAIR = ("chosen", "rejected")
# What TRL's trainer reads besides; the rest of the columns is left behind.
_READ = ("prompt", *_PAIR, "tools", "chat_template_kwargs")
_VISION = ("image", "images")


def load_preferences(
    source: str, *, config: str | None = None, split: str = "train", limit: int | None = None
) -> Dataset | None:
    """The pairs of a source; None if it holds prompts and no pairs.

    Args:
        source: as in `load_prompts`. Pairs are strings or chats in `chosen` and `rejected`, with their `prompt` or beginning
            with it, as TRL's DPOTrainer takes them.
        config: configuration of a hub dataset.
        split: as in `load_prompts`.
        limit: at most so many pairs, the first ones.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `load_prompts` for sources and limits; one of the two columns is missing,
            no pair is there, or pairs come with images.
    """
    if limit is not None and type(limit) is not int:
        raise TypeError(f"`limit` must be an int or None, got {type(limit).__name__}")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be an int >= 1, got {limit}")
    if is_generated(source):
        return None
    rows = load_rows(source, config, split)
    found = [name for name in _PAIR if name in rows.column_names]
    if not found:
        return None
    if len(found) == 1:
        raise ValueError(f"`source` {source!r} has a column {found[0]!r} and not both of {', '.join(_PAIR)}")
    for name in _VISION:
        if name in rows.column_names:
            raise ValueError(
                f"`source` {source!r} has a column {name!r}: pairs with images are not supported, only those of text"
            )
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"`source` {source!r} holds no pair")
    return rows.select_columns([name for name in rows.column_names if name in _READ])
