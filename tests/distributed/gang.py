"""Processes that stay: a gloo group whose ranks run one function after the other, so that a case costs milliseconds."""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds that a case may take before the gang is given up


class Gang:
    """`ranks` processes; `run` has all of them call a function of a module, on the same arguments or on their own."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._start()

    def _start(self) -> None:
        ranks = self.ranks
        context = multiprocessing.get_context("spawn")
        self.meeting = tempfile.TemporaryDirectory()
        self.ends, self.processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, f"{self.meeting.name}/store", theirs), daemon=True)
            process.start()
            theirs.close()
            self.ends.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returned on every rank; fails with the first rank's traceback if it raised."""
        for end in self.ends:
            end.send((function, arguments))
        replies = []
        for rank, end in enumerate(self.ends):
            if not end.poll(PATIENCE):
                self._restart()
                raise AssertionError(f"rank {rank} of {self.ranks} did not answer within {PATIENCE} s")
            replies.append(end.recv())
        if any(error is not None for error, _ in replies):
            self._restart()  # ranks may be out of step now
        for rank, (error, _) in enumerate(replies):
            assert error is None, f"rank {rank} of {self.ranks}:\n{error}"
        return [value for _, value in replies]

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()
        self.meeting.cleanup()


def _serve(rank: int, ranks: int, store: str, end: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((None, function(*arguments)))
        except BaseException:
            end.send((traceback.format_exc(), None))
