"""The hierarchical reward: its formula, the gate, what it reports, and that it ranks real rows above corrupted ones."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from dppo_kernels.trainers.rewards import HierarchicalReward, hierarchical_reward
from dppo_kernels.trainers.tabular import CORRUPTIONS, Discriminators, Scores, Split, Table, corruptions_for
from tests.trainers.tabular.conftest import auc_of, write


class Fixed:
    """Stands for discriminators: gives set scores and keeps what it was asked."""

    def score(self, texts: list[str], starts: list[int]) -> Scores:
        self.asked = (texts, starts)
        token, sentence, row = np.array([0.5, 1.0]), np.array([0.25, 1.0]), np.array([0.75, 0.0])
        features = {"one": np.array([0.2, 1.0]), "other": np.array([0.4, 0.0])}
        return Scores(token, sentence, row, features, np.array([True, False]))


def test_formula_gate_and_metrics() -> None:
    reward, logged = HierarchicalReward(Fixed()), {}
    rewards = reward(prompts=["a,", "bc,"], completions=[" d", " e"], log_metric=logged.__setitem__, answer=["x", "y"])
    assert rewards == [pytest.approx(0.2 * 0.5 + 0.3 * 0.25 + 0.3 * 0.75 + 0.2 * 0.3), 0.0]
    assert reward.discriminators.asked == (["a, d", "bc, e"], [2, 3])
    means = {"token": 0.75, "sentence": 0.625, "row": 0.375, "valid": 0.5, "features/one": 0.6, "features/other": 0.2}
    assert logged == {f"tabular/{name}": pytest.approx(value) for name, value in means.items()}


def test_other_weights() -> None:
    assert HierarchicalReward(Fixed(), (0, 0, 1, 0))(["", ""], ["a", "b"]) == [0.75, 0.0]
    assert hierarchical_reward(0.1, 0.2, 0.4, {"g": 0.8}, weights=(1, 1, 1, 1)) == pytest.approx(1.5)
    for weights in ((1, 2, 3), (1, 1, 1, -1), (1, 1, 1, float("nan"))):
        with pytest.raises(ValueError, match="`weights` must be four finite numbers >= 0"):
            HierarchicalReward(Fixed(), weights)
    with pytest.raises(ValueError, match="`features` must hold a score"):
        hierarchical_reward(0.1, 0.2, 0.4, {})
    with pytest.raises(ValueError, match="`weights` must be four numbers"):
        hierarchical_reward(0.1, 0.2, 0.4, {"g": 1.0}, weights=(1,))
    with pytest.raises(TypeError, match="`completions` must be strings, the two parts of a row's text; got list"):
        HierarchicalReward(Fixed())(["a"], [[{"role": "assistant", "content": "b"}]])


def test_real_rows_are_worth_more_than_corrupted_ones(fitted: Discriminators, cancer: Table, cancer_split: Split) -> None:
    reward = HierarchicalReward(fitted)

    def of(texts: list[str]) -> np.ndarray:
        parts = [text.partition(",") for text in texts]
        return np.array(reward([first + comma for first, comma, _ in parts], [rest for _, _, rest in parts]))

    rows = cancer_split.held_out
    real = of(write(cancer.schema, rows))
    assert real.min() > 0
    for kind in corruptions_for(cancer.schema):
        corrupted = of(write(cancer.schema, CORRUPTIONS[kind].corrupt(cancer.schema, rows, np.random.default_rng(3)).frame))
        assert corrupted.min() > 0  # rows, if bad ones
        assert auc_of(real, corrupted) > 0.9, kind
        assert real.mean() > corrupted.mean() + 0.2, kind
    assert of([text + ", and so on" for text in write(cancer.schema, rows)]).max() == 0


def test_it_can_be_sent_to_another_process(fitted: Discriminators, cancer: Table, cancer_split: Split) -> None:
    reward = HierarchicalReward(fitted)
    sent = pickle.loads(pickle.dumps(reward))
    assert sent.__name__ == "hierarchical_reward"
    texts = write(cancer.schema, cancer_split.held_out.iloc[:5])
    assert sent([""] * 5, texts) == reward([""] * 5, texts)
    assert reward([], []) == []


def test_without_scikit_learn_rewards_import_and_tables_say_what_to_install() -> None:
    code = """
import sys
sys.modules["sklearn"] = None
from dppo_kernels.trainers.rewards import HierarchicalReward
try:
    import dppo_kernels.trainers.tabular
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "dppo_kernels.trainers.tabular needs scikit-learn: pip install 'dppo-kernels[tabular]'"
