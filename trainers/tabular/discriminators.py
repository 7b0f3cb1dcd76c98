"""Discriminators at four levels of a row's text: tokens, clauses, the row, its feature groups.

Real is 1, synthetic 0. They learn from real rows against corrupted ones and the generator's, stop early on rows set apart, and
have their probabilities brought to scale there. Later rounds add what the generator writes by then, and replay what it wrote.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dppo_kernels.trainers.tabular.encoders import Encoded, RowEncoder
from dppo_kernels.trainers.tabular.examples import (
    Batch,
    Pool,
    draw_batch,
    group_examples,
    row_examples,
    sentence_examples,
    token_examples,
    token_inputs,
)
from dppo_kernels.trainers.tabular.networks import GroupNet, RowNet, SentenceNet, TokenNet
from dppo_kernels.trainers.tabular.schema import Schema
from dppo_kernels.trainers.tabular.training import Examples, TrainingOptions, calibrate, predict, train

LEVELS = ("token", "sentence", "row")
PARTS = ("train", "tuning", "held_out")
FRESH_EPOCHS = 4  # with corruptions of their own; later epochs have theirs again
REPEATS = 2  # draws of corruptions that tuning and held-out rows are judged on
GENERATED_SHARES = (0.7, 0.15)  # of a round's generated texts, for training and tuning


@dataclass(frozen=True)
class Scores:
    """Probabilities of being real, [N] each.

    token: mean over the completion's tokens. sentence: mean over clauses, 0 for what is none or comes again.
    row: 0 unless the text is a whole row. features: by group, 0 unless all its columns can be read.
    valid: bool, whether the text is a whole row. tokens and spans: of each text's tokens, if asked for: [T] and int [T, 2].
    """

    token: np.ndarray
    sentence: np.ndarray
    row: np.ndarray
    features: dict[str, np.ndarray]
    valid: np.ndarray
    tokens: list[np.ndarray] = field(default_factory=list)
    spans: list[np.ndarray] = field(default_factory=list)


class Discriminators:
    """The discriminators of one table.

    Args:
        schema: of the table.
        target_first: whether generated texts begin with the target's clause, the prompt; real ones are written likewise.
        options: of training.
        rows_per_epoch: how many real rows an epoch takes at most, beside as many synthetic ones.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        target_first: bool = True,
        options: TrainingOptions | None = None,
        rows_per_epoch: int = 1024,
    ) -> None:
        if rows_per_epoch < 1:
            raise ValueError(f"`rows_per_epoch` must be at least 1, got {rows_per_epoch}")
        self.schema = schema
        self.target_first = target_first
        self.options = options or TrainingOptions()
        self.rows_per_epoch = rows_per_epoch
        self._real: dict[str, pd.DataFrame] = {}
        self._rounds: list[dict[str, list[str]]] = []
        self._encoder: RowEncoder | None = None
        self._nets: dict[str, nn.Module] = {}
        self._report: dict[str, dict[str, Any]] = {}

    def fit(
        self,
        train: pd.DataFrame,
        tuning: pd.DataFrame,
        held_out: pd.DataFrame,
        *,
        generated: Sequence[str] = (),
        seed: int,
    ) -> None:
        """Learn from nothing.

        Args:
            train, tuning, held_out: disjoint real rows: to learn from, to stop and calibrate on, to report on.
            generated: whole texts (prompt and completion) of the generator, if there is one.
            seed: of weights, corruptions and order; the same seed gives the same discriminators.

        Raises:
            ValueError: fewer than two rows in a part, or columns missing.
            TypeError: texts that are no strings.
        """
        _check_texts(generated)
        parts = dict(zip(PARTS, (train, tuning, held_out), strict=True))
        for name, frame in parts.items():
            missing = [column for column in self.schema.columns if column not in frame]
            if missing or len(frame) < 2:
                raise ValueError(f"`{name}` must have two rows or more of all columns, got {len(frame)} without {missing}")
        self._real = {name: frame[list(self.schema.columns)].reset_index(drop=True) for name, frame in parts.items()}
        self._rounds = []
        self._encoder = RowEncoder.fit(self.schema, self._real["train"])
        self._learn(self._encoder, generated, seed)

    def update(self, generated: Sequence[str], seed: int) -> None:
        """Learn anew, against what the generator writes now too, with a replay of what it wrote in earlier rounds.

        From new weights: confident networks are slow to see what they have taken for real so far.

        Raises:
            ValueError: no texts.
            TypeError: texts that are no strings.
            RuntimeError: not fitted.
        """
        encoder = self._fitted()
        _check_texts(generated)
        if not len(generated):
            raise ValueError("`generated` must hold texts of the generator, got none")
        self._learn(encoder, generated, seed)

    def score(self, texts: Sequence[str], starts: Sequence[int] | None = None, *, per_token: bool = False) -> Scores:
        """Calibrated probabilities that `texts` are real.

        Args:
            texts: whole texts, prompt and completion. Of each, the order of its clauses matters to the token level alone.
            starts: where each completion starts, in characters; by default at 0.
            per_token: whether to return every token's score, the prompt's too.

        Raises:
            ValueError: `starts` of another length.
            RuntimeError: not fitted.
        """
        encoder = self._fitted()
        if starts is not None and len(starts) != len(texts):
            raise ValueError(f"`starts` must have one place for each of {len(texts)} texts, got {len(starts)}")
        if not texts:
            nothing = np.zeros(0)
            return Scores(nothing, nothing, nothing, dict.fromkeys(self.schema.groups, nothing), np.zeros(0, dtype=bool))
        encoded = encoder.encode(texts)
        tokens = self._probabilities("token", token_inputs(encoded))
        first = torch.tensor(starts if starts is not None else [0] * len(texts))
        # Where a token ends tells whether it is the completion's: one may begin in the prompt.
        ends = torch.zeros_like(encoded.ids)
        for row, spans in enumerate(encoded.spans):
            ends[row, : len(spans)] = torch.from_numpy(spans[:, 1])
        clauses = self._probabilities("sentence", {"values": encoded.alone})
        features = {}
        for group in self.schema.groups:
            chosen = self._columns_of(group)
            values = self._probabilities(_level_of(group), {"values": encoded.alone[:, chosen]})
            features[group] = (values * encoded.present[:, chosen].all(1)).numpy()
        readable = encoded.present.sum(1)
        return Scores(
            token=_mean(tokens, encoded.is_token & (ends > first[:, None])).numpy(),
            sentence=((clauses * encoded.present).sum(1) / (readable + encoded.unreadable).clamp(min=1)).numpy(),
            row=(self._probabilities("row", {"values": encoded.values}) * encoded.valid).numpy(),
            features=features,
            valid=encoded.valid.numpy(),
            tokens=[tokens[i, : len(spans)].numpy() for i, spans in enumerate(encoded.spans)] if per_token else [],
            spans=encoded.spans if per_token else [],
        )

    def report(self) -> dict[str, dict[str, Any]]:
        """By level ("token", "sentence", "row", "features/<group>"), of held-out real rows against synthetic ones.

        auc, ece (expected calibration error) and how many examples they are of; temperature; epochs until the best.
        """
        self._fitted()
        return {level: dict(values) for level, values in self._report.items()}

    def save(self, folder: str | Path) -> None:
        """Write all that `load` and a later `update` need, real rows included, to `folder`."""
        encoder = self._fitted()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "schema": self.schema.as_dict(),
            "target_first": self.target_first,
            "options": asdict(self.options),
            "rows_per_epoch": self.rows_per_epoch,
            "means": encoder.means.tolist(),
            "scales": encoder.scales.tolist(),
            "precision": encoder.precision.tolist(),
            "real": {name: frame.to_dict("list") for name, frame in self._real.items()},
            "rounds": self._rounds,
            "report": self._report,
        }
        (folder / "discriminators.json").write_text(json.dumps(state))
        torch.save({level: net.state_dict() for level, net in self._nets.items()}, folder / "weights.pt")

    @classmethod
    def load(cls, folder: str | Path) -> "Discriminators":
        """What `save` wrote.

        Raises:
            FileNotFoundError: nothing was saved there.
        """
        path = Path(folder) / "discriminators.json"
        if not path.is_file():
            raise FileNotFoundError(f"`folder` must hold saved discriminators, got {str(folder)!r} without {path.name}")
        state = json.loads(path.read_text())
        loaded = cls(
            Schema.from_dict(state["schema"]),
            target_first=state["target_first"],
            options=TrainingOptions(**state["options"]),
            rows_per_epoch=state["rows_per_epoch"],
        )
        loaded._encoder = RowEncoder(loaded.schema, *(np.array(state[name]) for name in ("means", "scales", "precision")))
        loaded._real = {name: pd.DataFrame(columns) for name, columns in state["real"].items()}
        loaded._rounds = state["rounds"]
        loaded._report = state["report"]
        with _seeded(0):
            loaded._nets = loaded._new_nets(loaded._encoder)
        for level, weights in torch.load(Path(folder) / "weights.pt", weights_only=True).items():
            loaded._nets[level].load_state_dict(weights)
        return loaded

    def _fitted(self) -> RowEncoder:
        if self._encoder is None or not self._report:
            raise RuntimeError("the discriminators must be fitted first: call `fit` or `load`")
        return self._encoder

    def _new_nets(self, encoder: RowEncoder) -> dict[str, nn.Module]:
        columns, features = len(self.schema.columns), encoder.width
        nets: dict[str, nn.Module] = {
            "token": TokenNet(encoder.text.size, columns, features),
            "sentence": SentenceNet(columns, features - 1),
            "row": RowNet(columns, features),
        }
        groups = {_level_of(group): GroupNet(len(names), features - 1) for group, names in self.schema.groups.items()}
        return nets | groups

    def _columns_of(self, group: str) -> list[int]:
        return [self.schema.columns.index(column) for column in self.schema.groups[group]]

    def _probabilities(self, level: str, inputs: dict[str, Tensor]) -> Tensor:
        return (predict(self._nets[level], inputs) / self._report[level]["temperature"]).sigmoid()

    def _learn(self, encoder: RowEncoder, generated: Sequence[str], seed: int) -> None:
        with _seeded(seed):
            self._nets = self._new_nets(encoder)
        rng = np.random.default_rng(seed)
        if len(generated):
            shuffled = [generated[i] for i in rng.permutation(len(generated))]
            first, second = np.cumsum([round(share * len(shuffled)) for share in GENERATED_SHARES])
            parts = (shuffled[:first], shuffled[first:second], shuffled[second:])
            self._rounds.append(dict(zip(PARTS, parts, strict=True)))
        judged = {part: self._draw(encoder, part, rng, REPEATS) for part in ("tuning", "held_out")}
        # All levels learn from the same texts, which take longer to write and read than most of them to train.
        fresh = [self._draw(encoder, "train", rng, 1) for _ in range(min(FRESH_EPOCHS, self.options.epochs))]

        def at(level: str, epoch: int) -> Examples:
            return self._examples(level, *fresh[(epoch - 1) % len(fresh)])

        for level, net in self._nets.items():
            tuning, held_out = (self._examples(level, *judged[part]) for part in ("tuning", "held_out"))
            epochs = self.options.token_epochs if level == "token" else self.options.epochs
            best = train(net, partial(at, level), tuning, seed, epochs, self.options)
            self._report[level] = {**calibrate(net, tuning, held_out), "epochs": best}

    def _draw(self, encoder: RowEncoder, part: str, rng: np.random.Generator, repeats: int) -> tuple[Encoded, Batch]:
        pool = Pool(
            real=self._real[part],
            current=self._rounds[-1][part] if self._rounds else (),
            older=[text for texts in self._rounds[:-1] for text in texts[part]],
        )
        count = min(len(pool.real), self.rows_per_epoch)
        batches = [draw_batch(self.schema, pool, count, rng, target_first=self.target_first) for _ in range(repeats)]
        batch = Batch.join(batches)
        return encoder.encode(batch.texts), batch

    def _examples(self, level: str, encoded: Encoded, batch: Batch) -> Examples:
        if level not in LEVELS:
            return group_examples(encoded, batch, self._columns_of(level.removeprefix("features/")))
        make = {"token": token_examples, "sentence": sentence_examples, "row": row_examples}[level]
        return make(encoded, batch)


def _level_of(group: str) -> str:
    return f"features/{group}"


def _check_texts(generated: Sequence[str]) -> None:
    for text in generated:
        if not isinstance(text, str):
            raise TypeError(f"`generated` must hold strings, got {type(text).__name__}")


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator for this block; the caller's goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
