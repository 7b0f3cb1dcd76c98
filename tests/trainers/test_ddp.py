"""Two processes under DistributedDataParallel: ranks agree, and each one's loss has GRPO's global normaliser."""

import pytest

from tests.distributed.trainers.ranks import run
from tests.trainers.ddp_worker import main

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("binary_tv", "transformers"), ("topk_kl", "transformers"), ("topk_tv", "server")],
)
def test_two_ranks_stay_equal(tmp_path, kind: str, sampler: str) -> None:
    """With a vLLM server, one process generates for all, and TRL deals the completions out again."""
    ranks = run(main, "ddp", tmp_path, kind, sampler)
    for rank in ranks:
        assert rank["world"] == 2
        assert rank["wrapped"]
        assert rank["loss_error"] < 1e-5
        assert rank["mismatch"] < 1e-5
        assert rank["resumed_equal"]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["prompt_ids"] != ranks[1]["prompt_ids"]
    assert ranks[0]["masked"] == ranks[1]["masked"]  # metrics are reduced over ranks
    assert max(ranks[0]["masked"]) > 0
    assert ranks[0]["local_max"] != ranks[1]["local_max"]
    assert ranks[0]["logged_max"] == [max(pair) for pair in zip(ranks[0]["local_max"], ranks[1]["local_max"], strict=True)]
