"""Lanes: processes of one thread each that run waves side by side on one machine, sharing the base model's memory.

On a CPU a lane is a fork: weights and data are there already and stay shared until written, which nobody does. With several GPUs each lane
is a new process that opens the run's setting on its own. A lane runs whole waves, and a wave gives the same bits in every lane, so their
number changes speed alone. Lanes end with their parent, however it ends.
"""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

PATIENCE = 5.0  # seconds for lanes to end by themselves
log = logging.getLogger("fedpeft")
Work = Callable[[Any], Any]  # what a lane does with one order; both cross a local pipe, so both are plain values and bytes


class Lanes:
    """`count` processes, started when first needed; with one the work is done in this process.

    `opened(lane)` gives a lane's work. With `fresh` it is called in a new process, so it must be a function that can be imported.
    """

    def __init__(self, opened: Callable[[int], Work], count: int, *, fresh: bool = False) -> None:
        self._opened, self._count, self._fresh = opened, count, fresh
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def map(self, orders: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(position, answer) of every order, as they are done. An `OSError` in a lane is raised here; so is a lane's death."""
        if self._count == 1 or (len(orders) < 2 and not self._fresh):
            work = self._opened(0)
            for position, order in enumerate(orders):
                yield position, work(order)
            return
        self._start()
        waiting, running = deque(enumerate(orders)), dict[Connection, int]()
        try:
            for pipe in self._pipes:
                self._hand(pipe, waiting, running)
            while running:
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    answer = self._taken(ready)
                    position = running.pop(ready)
                    self._hand(ready, waiting, running)
                    yield position, answer
        finally:
            if running:  # nobody waits for these answers, and the next orders must not get them
                self.close(at_once=True)

    def close(self, *, at_once: bool = False) -> None:
        """Ends the processes; `at_once` in the middle of their work, which leaves nothing half written."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        until = time.monotonic() + (0 if at_once else PATIENCE)
        for process in self._processes:
            process.join(timeout=max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
        self._pipes, self._processes = [], []

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(at_once=kind is not None)

    def _start(self) -> None:
        if self._pipes:
            return
        context: Any = multiprocessing.get_context("spawn" if self._fresh else "fork")
        for lane in range(self._count):
            ours, theirs = context.Pipe()
            inherited = [] if self._fresh else [*self._pipes, ours]
            process = context.Process(target=_lane, args=(self._opened, lane, theirs, inherited, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _hand(self, pipe: Connection, waiting: deque[tuple[int, Any]], running: dict[Connection, int]) -> None:
        if waiting:
            position, order = waiting.popleft()
            try:
                pipe.send(order)
            except OSError as fault:
                raise self._dead(pipe) from fault
            running[pipe] = position

    def _taken(self, pipe: Connection) -> Any:
        try:
            kind, answer = pipe.recv()
        except (EOFError, OSError) as fault:
            raise self._dead(pipe) from fault
        if kind == "fault":
            raise OSError(*answer)
        return answer

    def _dead(self, pipe: Connection) -> OSError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(timeout=5)
        return OSError(
            f"a lane ended with exit code {process.exitcode}"
            + (", killed, perhaps for want of memory: set engine.lanes=1 or a smaller engine.wave" if process.exitcode == -9 else "")
            + "; continue with `fedpeft run --resume` and the run's folder"
        )


def usual(device: torch.device) -> int:
    """One lane per core that this process may use, or per GPU; one in all where processes cannot fork."""
    if device.type == "cuda":
        return torch.cuda.device_count() if device.index is None else 1
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return 1
    return len(os.sched_getaffinity(0))


def _lane(opened: Callable[[int], Work], lane: int, pipe: Connection, inherited: list[Connection], parent: int) -> None:
    for other in inherited:  # else this lane would hold the pipes of others open and they would outlive their parent
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    _die_with(parent)
    torch.set_num_threads(1)
    work = opened(lane)
    while True:
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("answer", work(order))
        except Exception as fault:  # the parent says it, and ends the run
            log.debug("a lane failed", exc_info=True)
            answer = ("fault", (f"a lane failed: {type(fault).__name__}: {fault}",))
            if isinstance(fault, OSError):
                answer = ("fault", (str(fault),) if fault.errno is None else (fault.errno, fault.strerror, fault.filename))
        try:
            pipe.send(answer)
        except OSError:
            return


def _die_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent ends (PR_SET_PDEATHSIG): a run that goes on must not meet it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
