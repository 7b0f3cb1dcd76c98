"""Ranks as forks of a process that has imported everything: a run of two costs what it computes."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WRAPPERS = ("ddp", "fsdp2", "zero2", "zero3")
PATIENCE = 240  # seconds that a run may take


def run(function: Callable[..., Any], wrapper: str | None, *arguments: Any, processes: int = 2) -> list[Any]:
    """What ``function(wrapper, *arguments)`` returned on every rank; fails with the first traceback.

    None as `wrapper` is one process without a group.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.trainers.preload"])
    world = processes if wrapper else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_main, args=(rank, world, port, folder, function, wrapper, arguments))
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(PATIENCE)
        late = [i for i, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
            rank.join()
        failures = [path.read_text() for i in range(world) if (path := Path(folder, f"failed{i}")).exists()]
        assert not failures, "\n".join(failures)
        assert not late, f"ranks {late} of {world} did not end within {PATIENCE} s"
        return [torch.load(Path(folder, f"rank{i}.pt"), weights_only=False) for i in range(world)]


def _main(
    rank: int, world: int, port: int, folder: str, function: Callable[..., Any], wrapper: str | None, arguments: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        os.chdir(folder)
        if wrapper:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.save(function(wrapper, *arguments), Path(folder, f"rank{rank}.pt"))
    except BaseException:
        Path(folder, f"failed{rank}").write_text(f"rank {rank} of {world}, {wrapper}:\n{traceback.format_exc()}")
        raise
    os._exit(0)  # without the engines' own endings, which may wait for ranks that are gone
