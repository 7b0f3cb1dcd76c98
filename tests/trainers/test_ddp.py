"""Two processes under DistributedDataParallel: ranks agree, and each one's loss has GRPO's global normaliser."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("binary_tv", "transformers"), ("topk_kl", "transformers"), ("topk_tv", "server")],
)
def test_two_ranks_stay_equal(tmp_path, kind: str, sampler: str) -> None:
    """With a vLLM server, one process generates for all, and TRL deals the completions out again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    result = subprocess.run(
        [*command, "-m", "tests.trainers.ddp_worker", str(tmp_path), kind, sampler],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    ranks = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2)]
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
