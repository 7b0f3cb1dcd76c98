"""Dynamic sampling with a real vLLM engine: several rounds on the same weights, merged with their log-probs."""

from typing import Any

import pytest

from tests.trainers.conftest import history
from tests.trainers.test_dynamic_sampling import SETTINGS, Answers, Recording, problems, rows_of
from tests.vllm.test_colocate import CLOSE, VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("engine")]
__all__ = ["problems"]  # a fixture


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"divergence_type": "topk_tv", "divergence_topk": 3, "mismatch_action": "stop"}, id="dppo"),
        pytest.param({"filter_surplus": "carry"}, id="clip-higher, with TRL's correction of the engine's log-probs"),
    ],
)
def test_batches_are_refilled(make_trainer, problems, changes: dict[str, Any]) -> None:
    trainer = make_trainer(
        Recording, reward=Answers(), train_dataset=problems, learning_rate=2e-2, **SETTINGS, **VLLM, **changes
    )
    trainer.train()
    kinds = problems["kind"][:]
    assert all(kinds[row] == "mixed" for batch in trainer.batches for row in rows_of(trainer, batch))
    assert all(len(rows_of(trainer, batch)) == 4 for batch in trainer.batches)
    assert max(history(trainer, "dapo/num_gen_batches")) > 1
    assert history(trainer, "frac_reward_zero_std") == [0, 0, 0]
    if "divergence_type" in changes:
        assert max(history(trainer, "engine_mismatch/prob_gap_max")) < CLOSE
    else:
        assert history(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1, 1, 1], abs=1e-3)
