"""Whether two formulas are equal, by math-verify in processes of their own.

Algebra on what a policy writes may take forever, all memory or the process. math-verify's own time limit is a signal, which
needs the main thread and does not interrupt a single long multiplication.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from enum import StrEnum
from io import FileIO
from multiprocessing.connection import wait
from pathlib import Path
from typing import cast

_WORKER = Path(__file__).resolve().with_name("_verifier_worker.py")
_START_LIMIT = 120.0  # seconds; on a busy machine with files on a network
_REMEMBERED = 4096  # verdicts
# A batch of slow answers must not stop training: after so many timeouts in one call the limit is a tenth, and after so many
# more what is left counts as timed out.
_PATIENCE, _GIVING_UP = 16, 128


class Verdict(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNPARSEABLE = "unparseable"
    GOLD_UNPARSEABLE = "gold_unparseable"
    TIMEOUT = "timeout"
    ERROR = "error"  # the worker died


def require_math_verify() -> None:
    """Raise ImportError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("comparing answers by algebra needs math-verify: pip install 'dppo-kernels[trl]'")


class Verifier:
    """A pool of processes, started at the first call, for POSIX systems.

    It may be called from any thread, one call at a time. Pickled or forked, it starts processes of its own.

    Args:
        processes: at most so many.
        time_limit: seconds for one pair; a process that takes longer is killed.
        memory_bytes: address space of one process, where the platform keeps the limit. Within math-verify, a formula that
            needs more is mostly "different", since it takes a MemoryError for the failure of one method of several.

    Raises:
        ValueError: an argument that is not positive.
    """

    def __init__(self, processes: int = 2, time_limit: float = 5.0, memory_bytes: int = 2 * 1024**3) -> None:
        for name, value in (("processes", processes), ("time_limit", time_limit), ("memory_bytes", memory_bytes)):
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}")
        self.processes = processes
        self.time_limit = time_limit
        self.memory_bytes = memory_bytes
        self._reset()

    def __reduce__(self) -> tuple[type["Verifier"], tuple[int, float, int]]:
        return type(self), (self.processes, self.time_limit, self.memory_bytes)

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdict on every (gold, answer), in order; a pair that occurs twice is compared once.

        However many pairs are slow, a call loses at most about 30 `time_limit` to them, divided by the processes.

        Raises:
            ImportError: math-verify is missing or does not load.
            RuntimeError: processes do not start.
        """
        if self._pid != os.getpid():  # forked: the processes, and perhaps a held lock, are the parent's
            for worker in self._workers:
                worker.abandon()
            self._reset()
        with self._lock:
            verdicts = {pair: self._known[pair] for pair in pairs if pair in self._known}
            waiting = deque(pair for pair in dict.fromkeys(pairs) if pair not in verdicts)
            if waiting:
                require_math_verify()
                timeouts = 0
                try:
                    while waiting or any(worker.pair for worker in self._workers):
                        self._hand_out(waiting, self.time_limit / (10 if timeouts >= _PATIENCE else 1))
                        timeouts += self._collect(verdicts)
                        if timeouts >= _PATIENCE + _GIVING_UP:
                            verdicts.update(dict.fromkeys(waiting, Verdict.TIMEOUT))
                            waiting.clear()
                except BaseException:  # also Ctrl-C: an answer to this call must not be read by the next
                    _kill(self._workers, self._pid)
                    raise
            self._remember(verdicts)
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        """Kill the processes. The next call starts others."""
        with self._lock:
            _kill(self._workers, self._pid)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._known: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        weakref.finalize(self, _kill, self._workers, self._pid)  # also when the interpreter exits

    def _remember(self, verdicts: dict[tuple[str, str], Verdict]) -> None:
        for pair, verdict in verdicts.items():
            if verdict not in (Verdict.TIMEOUT, Verdict.ERROR):  # those depend on the machine's load
                self._known[pair] = verdict
                self._known.move_to_end(pair)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _hand_out(self, waiting: deque[tuple[str, str]], time_limit: float) -> None:
        for worker in list(self._workers):
            if waiting and worker.is_ready and worker.pair is None:
                if worker.ask(waiting[0], time_limit):
                    waiting.popleft()
                else:  # it died while it was idle, which is no pair's fault
                    self._dismiss(worker)
        starting = sum(not worker.is_ready for worker in self._workers)
        for _ in range(min(self.processes - len(self._workers), len(waiting) - starting)):
            self._workers.append(_Worker(self.time_limit, self.memory_bytes))

    def _collect(self, verdicts: dict[tuple[str, str], Verdict]) -> int:
        """Wait for a verdict, a start or a deadline; returns how many pairs timed out."""
        timeouts = 0
        active = [worker for worker in self._workers if worker.pair is not None or not worker.is_ready]
        readable = wait(
            [worker.output.fileno() for worker in active], max(0.0, min(w.deadline for w in active) - time.monotonic())
        )
        for worker in active:
            line = worker.receive() if worker.output.fileno() in readable else None
            if line is None and time.monotonic() < worker.deadline:
                continue
            if worker.pair is None:
                worker.greet(line)
            elif line:
                verdicts[worker.pair], worker.pair = Verdict(line), None
            else:
                verdicts[worker.pair] = Verdict.TIMEOUT if line is None else Verdict.ERROR
                timeouts += line is None
                self._dismiss(worker)
        return timeouts

    def _dismiss(self, worker: "_Worker") -> None:
        worker.kill()
        self._workers.remove(worker)


class _Worker:
    """One process and what it is doing.

    A plain subprocess: multiprocessing's "spawn" runs a user's script again that has no `__main__` guard, and its "fork" copies
    a process that holds locks of other threads and a CUDA context.
    """

    def __init__(self, time_limit: float, memory_bytes: int) -> None:
        self.pair: tuple[str, str] | None = None
        self.is_ready = False
        self.deadline = time.monotonic() + _START_LIMIT
        # By path, since an import of this package loads torch. -P: the worker's folder has a `math_verify` of its own.
        self.command = [sys.executable, "-P", str(_WORKER), str(time_limit), str(memory_bytes)]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        # sympy orders by hashes: without a fixed seed, two processes may disagree.
        env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, bufsize=0, stdin=pipe, stdout=pipe, stderr=nowhere, env=env)
        self.input, self.output = cast(FileIO, self.process.stdin), cast(FileIO, self.process.stdout)
        self._received = b""

    def ask(self, pair: tuple[str, str], time_limit: float) -> bool:
        """Hand over a pair; whether the process was alive to take it."""
        request = memoryview(json.dumps(pair).encode() + b"\n")
        try:
            while request:
                request = request[self.input.write(request) :]
        except OSError:
            return False
        self.pair = pair
        self.deadline = time.monotonic() + time_limit
        return True

    def receive(self) -> str | None:
        """A line, "" where the process has ended, None where the line is incomplete. Only if there is something to read."""
        received = os.read(self.output.fileno(), 65536)
        self._received += received
        if received and not received.endswith(b"\n"):
            return None
        line, self._received = self._received, b""
        return line.decode(errors="replace").strip()

    def greet(self, line: str | None) -> None:
        """Take the first line; raise what it tells if that is not that the process is ready."""
        if line == "ready":
            self.is_ready = True
        elif line:
            raise ImportError(f"math-verify does not load ({line}): pip install 'dppo-kernels[trl]'")
        else:
            problem = f"said nothing for {_START_LIMIT:g} s" if line is None else f"ended with {self.process.wait()}"
            raise RuntimeError(f"the verifier's process {problem}; run it to see why: {shlex.join(self.command)}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.input.close()
        self.output.close()

    def abandon(self) -> None:
        """Forget a process of the parent, in a fork."""
        self.input.close()
        self.output.close()
        self.process.returncode = 0  # so that Popen does not wait for what is no child of this process


def _kill(workers: list[_Worker], pid: int) -> None:
    if os.getpid() == pid:
        while workers:
            workers.pop().kill()
