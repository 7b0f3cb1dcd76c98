"""What vLLM does on CUDA only: sleep mode, and weights sent to a server. Written without a GPU, and not yet run on one."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.conftest import history
from tests.trainers.test_dppo_trainer import Recording, loss_from_full_logits

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]

ROOT = Path(__file__).resolve().parents[2]
# One engine step in fp32 on tensor cores (TF32) and other kernels than the trainer's.
CLOSE = 5e-3


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("sleep", [False, True], ids=["awake", "sleeping"])
def test_colocated_on_a_gpu(make_trainer, monkeypatch, sleep: bool) -> None:
    """Level 2 sleep drops the weights: TRL pushes them again before each rollout, also without a step in between."""
    import vllm

    monkeypatch.setattr("trl.generation.vllm_generation.LLM", functools.partial(vllm.LLM, dtype="float32", enforce_eager=True))
    trainer = make_trainer(
        Recording, use_cpu=False, use_vllm=True, vllm_mode="colocate", vllm_enable_sleep_mode=sleep,
        vllm_max_model_length=64, vllm_gpu_memory_utilization=0.1, divergence_type="topk_kl", divergence_topk=30,
        learning_rate=2e-2, steps_per_generation=1, num_iterations=1, max_steps=3, per_device_train_batch_size=16,
    )  # fmt: skip
    trainer.train()
    gaps = history(trainer, "engine_mismatch/prob_gap_max")
    assert len(gaps) == 3
    assert max(gaps) < CLOSE
    for record in trainer.recorded:
        assert record["loss"].item() == pytest.approx(loss_from_full_logits(trainer, record), abs=20 * CLOSE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a server needs a GPU of its own beside the trainer's")
def test_a_server_gets_every_weight_update(model_path: Path, tmp_path: Path) -> None:
    port, group_port = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_path), "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--gpu-memory-utilization", "0.1"),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "30"),
        *("--weight-transfer-config", json.dumps({"backend": "nccl"})),
    ]
    log = (tmp_path / "server.log").open("w")
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        worker = [sys.executable, "-m", "tests.vllm.server_worker", str(model_path), str(tmp_path), str(port), str(group_port)]
        # The trainer sees one GPU: with two, transformers would replicate the model.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT)}
        run = subprocess.run(worker, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    finally:
        server.terminate()
        server.wait(60)
        log.close()
    assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "server.log").read_text()[-4000:]
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    assert len(result["gaps"]) == 3
    assert max(result["gaps"]) < CLOSE
    assert max(result["loss_errors"]) < 20 * CLOSE
