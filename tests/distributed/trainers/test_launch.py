"""Jobs as users start them: the launch lines of `examples`, and one of which a process dies."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.trainers import runs
from tests.distributed.trainers.ranks import run

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "examples" / "accelerate_configs"
RUN_AS = {
    "ddp": "DistributedDataParallel, MULTI_CPU",
    "fsdp2": "FSDPQwen3ForCausalLM, FSDP",
    "deepspeed_zero2": "DeepSpeedEngine, DEEPSPEED",
    "deepspeed_zero3": "DeepSpeedEngine, DEEPSPEED",
}
SETTINGS = [
    *("--config", "cpu_quick_test", "--max_steps", "2", "--offline_warmup_steps", "3", "--per_device_train_batch_size", "8"),
    *(
        "--num_generations",
        "4",
        "--eval_strategy",
        "no",
        "--eval_on_start",
        "false",
        "--eval_size",
        "0",
        "--log_completions",
        "false",
    ),
]


def started(*command: str) -> tuple[int, str, float]:
    """Exit status, output and seconds of a command of this Python's environment."""
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begun


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RUN_AS)


@pytest.mark.parametrize("name", RUN_AS)
def test_launch_lines(name: str, tmp_path: Path) -> None:
    """As many processes as asked for, under the wrapper that the file is named after."""
    launch = ("accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2")
    module = ("-m", "tests.distributed.trainers.launched", "dppo", *SETTINGS, "--output_dir", str(tmp_path))
    status, output, _ = started(*launch, *module)
    assert status == 0, output[-4000:]
    found = sorted(re.findall(r"ran rank (\d) of (\d): (.+), (\d+) steps", output))
    assert found == [("0", "2", RUN_AS[name], "2"), ("1", "2", RUN_AS[name], "2")], output[-4000:]
    assert (tmp_path / "model.safetensors").stat().st_size > 100_000  # whole


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_job_which_resumes(wrapper: str, tmp_path: Path) -> None:
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    status, output, seconds = started(*launch, "-m", "tests.distributed.trainers.killed", wrapper, str(tmp_path / "killed"))
    assert status != 0
    assert seconds < 120
    assert "SIGKILL" in output
    assert "trained to the end" not in output
    options = {"save_strategy": "steps", "save_steps": 3}
    [checkpoint] = tmp_path.glob("killed/**/checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    resumed = run(runs.train, wrapper, "dppo", options, str(tmp_path / "resumed"), str(checkpoint))
    whole = run(runs.train, wrapper, "dppo", options, str(tmp_path / "whole"))
    assert all(torch.equal(resumed[0]["weights"][name], weight) for name, weight in whole[0]["weights"].items())
