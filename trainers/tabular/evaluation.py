"""What synthetic rows are worth: what a model learns from them, and how near to real rows they are, or too near."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from dppo_kernels.trainers.tabular.encoders import RowEncoder, joint_dimensions
from dppo_kernels.trainers.tabular.negatives import permute_columns
from dppo_kernels.trainers.tabular.schema import Schema
from dppo_kernels.trainers.tabular.text import to_frame

BINS = 10
CLOSE = 5  # per cent of real held-out rows that are as near to a training row
LEAST_ROWS = 10  # synthetic rows from which anything is estimated
PERMUTATIONS = 20
MOST_PAIRED = 1000  # rows whose pairwise distances are taken
# Of synthetic rows, in the order of their fields.
MEASURES = (
    *("utility", "marginal_tv", "correlation_error", "dcr"),
    *("too_close_share", "copied_share", "distinct_share", "spread"),
)
CLASSIFIERS: dict[str, Callable[[int], Any]] = {
    "logistic": lambda seed: LogisticRegression(max_iter=2000, random_state=seed),
    "boosting": lambda seed: HistGradientBoostingClassifier(max_iter=100, random_state=seed),
}


@dataclass(frozen=True)
class Evaluation:
    """Measures of synthetic rows; None where one cannot be taken, and why in `reasons`.

    Names that end in `_real` are what real evaluation rows measure: synthetic ones need not do better.

    Args:
        rows, invalid_share: how many of the texts are rows, and the share that is none.
        utility: AUC, on evaluation rows, of a classifier trained on the synthetic rows.
        utility_real, utility_marginals: of one trained on the real training rows, and on these with permuted columns: the
            ceiling and the floor.
        marginal_tv, correlation_error: as the functions of these names say, against the training rows.
        dcr: median distance to the closest training row, standardised.
        too_close_share: as close to a training row as the closest 5 % of evaluation rows, or closer; about 0.05 of real rows.
        copied_share: exact copies of training rows.
        distinct_share: how many are different.
        spread: mean distance between two rows, as a multiple of that between two training rows.
        reasons: by measure.
    """

    rows: int
    invalid_share: float | None
    utility: float | None
    utility_real: float | None
    utility_marginals: float | None
    marginal_tv: float | None
    marginal_tv_real: float
    correlation_error: float | None
    correlation_error_real: float
    dcr: float | None
    dcr_real: float
    too_close_share: float | None
    too_close_share_real: float
    copied_share: float | None
    copied_share_real: float
    distinct_share: float | None
    spread: float | None
    reasons: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Evaluator:
    """Compares synthetic rows with the real ones they imitate (`train`) and with ones that nothing has seen (`evaluation`).

    Args:
        schema: of the table.
        train, evaluation: disjoint real rows.
        classifier: "logistic" (on standardised numbers, with indicators of special codes) or "boosting" (histogram gradient
            boosting); both predict the target from the other columns.
        seed: of classifier, permutation and the rows whose pairwise distances are taken.

    Raises:
        ValueError: an unknown classifier, or real rows that lack columns, classes, or are fewer than 10.
    """

    def __init__(
        self, schema: Schema, train: pd.DataFrame, evaluation: pd.DataFrame, *, classifier: str = "logistic", seed: int = 0
    ) -> None:
        if classifier not in CLASSIFIERS:
            raise ValueError(f"`classifier` must be one of {list(CLASSIFIERS)}, got {classifier!r}")
        for name, frame in (("train", train), ("evaluation", evaluation)):
            missing = [column for column in schema.columns if column not in frame]
            if missing or len(frame) < LEAST_ROWS or frame[schema.target].nunique() < 2:
                raise ValueError(
                    f"`{name}` must have {LEAST_ROWS} rows of all columns and two classes, got {len(frame)} without {missing}"
                )
        self.schema, self.train, self.evaluation, self.classifier, self.seed = schema, train, evaluation, classifier, seed
        self._space = _Space(schema, train)
        distances = self._space.to_closest(evaluation)
        self._close = float(np.percentile(distances, CLOSE))
        rng = np.random.default_rng(seed)
        self._spread = self._space.spread(train, rng)
        # One permutation is noise where the target is what moves: their mean is the floor.
        floors = [self._utility(permute_columns(schema, train, rng).frame) for _ in range(PERMUTATIONS)]
        known = [auc for auc in floors if auc is not None]
        self._real: dict[str, Any] = {
            "utility_real": self._utility(train),
            "utility_marginals": float(np.mean(known)) if known else None,
            "marginal_tv_real": marginal_tv(schema, evaluation, train),
            "correlation_error_real": correlation_error(schema, evaluation, train),
            "dcr_real": float(np.median(distances)),
            "too_close_share_real": float((distances <= self._close).mean()),
            "copied_share_real": _copied(schema, evaluation, train),
        }

    def measure(self, synthetic: Sequence[str] | pd.DataFrame) -> Evaluation:
        """Of whole texts, of which the invalid ones are counted and left out, or of rows."""
        schema, train = self.schema, self.train
        if isinstance(synthetic, pd.DataFrame):
            rows, invalid = synthetic[list(schema.columns)], 0.0 if len(synthetic) else None
        else:
            rows, valid = to_frame(schema, synthetic)
            invalid = float(1 - valid.mean()) if len(valid) else None
        reasons: dict[str, str] = {}
        if len(rows) < LEAST_ROWS:
            found: dict[str, float | None] = dict.fromkeys(MEASURES)
            reasons = dict.fromkeys(MEASURES, f"{len(rows)} synthetic rows, fewer than {LEAST_ROWS}")
        else:
            distances = self._space.to_closest(rows)
            found = {
                "utility": self._utility(rows),
                "marginal_tv": marginal_tv(schema, rows, train),
                "correlation_error": correlation_error(schema, rows, train),
                "dcr": float(np.median(distances)),
                "too_close_share": float((distances <= self._close).mean()),
                "copied_share": _copied(schema, rows, train),
                "distinct_share": 1 - float(rows.duplicated().mean()),
                "spread": self._space.spread(rows, np.random.default_rng(self.seed)) / self._spread,
            }
            if found["utility"] is None:
                reasons["utility"] = f"synthetic rows of one class: {rows[schema.target].iloc[0]!r}"
        if self._real["utility_marginals"] is None:
            reasons["utility_marginals"] = "permuted rows of one class"
        values: dict[str, Any] = {**self._real, **found}
        return Evaluation(rows=len(rows), invalid_share=invalid, reasons=reasons, **values)

    def _utility(self, rows: pd.DataFrame) -> float | None:
        return utility(self.schema, rows, self.evaluation, self.classifier, self.seed)


def evaluate(
    schema: Schema,
    synthetic: Sequence[str] | pd.DataFrame,
    train: pd.DataFrame,
    evaluation: pd.DataFrame,
    *,
    classifier: str = "logistic",
    seed: int = 0,
) -> Evaluation:
    """`Evaluator.measure` of one set of synthetic rows."""
    return Evaluator(schema, train, evaluation, classifier=classifier, seed=seed).measure(synthetic)


def utility(
    schema: Schema, rows: pd.DataFrame, test: pd.DataFrame, classifier: str = "logistic", seed: int = 0
) -> float | None:
    """AUC on `test` of a classifier trained on `rows`: the mean over classes, each against the rest.

    A class that `rows` lack has probability 0; None where they have but one.
    """
    if rows[schema.target].nunique() < 2:
        return None
    encoder = RowEncoder.fit(schema, rows)
    model = CLASSIFIERS[classifier](seed).fit(_flat(encoder, rows, target=False), rows[schema.target])
    scores = pd.DataFrame(model.predict_proba(_flat(encoder, test, target=False)), columns=model.classes_)
    present = sorted(test[schema.target].unique())
    scores = scores.reindex(columns=present, fill_value=0.0)
    return float(np.mean([roc_auc_score(test[schema.target] == category, scores[category]) for category in present]))


def marginal_tv(schema: Schema, rows: pd.DataFrame, real: pd.DataFrame) -> float:
    """Total variation between the values of a column, mean over columns: 0 the same, 1 nothing in common.

    Numbers are counted in bins between the deciles of the real ones; special codes and classes are counted one by one.
    """
    codes = list(schema.special_values)
    distances = []
    for column in schema.columns:
        if column == schema.target:
            cells = [frame[column] for frame in (rows, real)]
        else:
            numbers = real[column][~real[column].isin(codes)]
            inner = np.linspace(0, 1, BINS + 1)[1:-1]
            edges = np.unique(np.quantile(numbers, inner)) if len(numbers) else np.zeros(0)
            binned = [pd.Series(np.digitize(frame[column], edges), frame.index, dtype=float) for frame in (rows, real)]
            # Codes are negative here, and bins are not.
            cells = [
                bins.mask(frame[column].isin(codes), -1.0 - frame[column].map({code: i for i, code in enumerate(codes)}))
                for bins, frame in zip(binned, (rows, real), strict=True)
            ]
        ours, theirs = (cell.value_counts(normalize=True) for cell in cells)
        distances.append(ours.sub(theirs, fill_value=0).abs().sum() / 2)
    return float(np.mean(distances))


def correlation_error(schema: Schema, rows: pd.DataFrame, real: pd.DataFrame) -> float:
    """Mean absolute difference of correlations, over pairs of numeric columns and class indicators that vary in `real`.

    Special codes are missing values here. What is constant in `rows` correlates with nothing.
    """
    ours, theirs = (pd.DataFrame(joint_dimensions(schema, frame)).corr().to_numpy() for frame in (rows, real))
    pairs = np.triu_indices(len(ours), 1)
    return float(np.nanmean(np.abs(np.nan_to_num(ours[pairs]) - theirs[pairs])))


class _Space:
    """Distances between rows, standardised by the training rows; a code or class is a dimension of its own."""

    def __init__(self, schema: Schema, train: pd.DataFrame) -> None:
        self.encoder = RowEncoder.fit(schema, train)
        self.neighbours = NearestNeighbors(n_neighbors=1).fit(_flat(self.encoder, train))

    def to_closest(self, rows: pd.DataFrame) -> np.ndarray:
        """[N], from each row to the closest training row."""
        return self.neighbours.kneighbors(_flat(self.encoder, rows))[0][:, 0]

    def spread(self, rows: pd.DataFrame, rng: np.random.Generator) -> float:
        """Mean distance between two rows."""
        points = _flat(self.encoder, rows)
        points = points[rng.permutation(len(points))[:MOST_PAIRED]]
        return float(pairwise_distances(points).sum() / (len(points) * (len(points) - 1)))


def _flat(encoder: RowEncoder, rows: pd.DataFrame, *, target: bool = True) -> np.ndarray:
    """Standardised numbers and indicators of codes, with or without those of the target: [N, features]."""
    values = encoder.encode_values(rows)[0].numpy()[:, 0 if target else 1 :, :-1]
    return values.reshape(len(rows), -1)


def _copied(schema: Schema, rows: pd.DataFrame, train: pd.DataFrame) -> float:
    known = set(train[list(schema.columns)].itertuples(index=False, name=None))
    columns = rows[list(schema.columns)]
    return float(np.mean([row in known for row in columns.itertuples(index=False, name=None)]))
