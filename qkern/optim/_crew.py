"""Crew: threads that do jobs for one other, which may be interrupted anywhere.

Ctrl-C raises ``KeyboardInterrupt`` in the main thread between any two steps of the interpreter, so
also within ``threading.Thread.start``, ``Future.result`` or a ``Condition``: whose own locks are
then held for ever, by nobody. So the main thread takes no lock here that a worker needs. What it
asks for is one call of C each (start a thread, put a job, wait), and all it is told is a flag that
is never taken back; after an interrupt it can ask again.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable
from queue import SimpleQueue


class Latch:
    """Set once, by one thread; waited for by one other, as often as it likes."""

    def __init__(self) -> None:
        self.is_set = False
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let `wait` return."""
        self.is_set = True
        self._lock.release()

    def wait(self) -> None:
        """Return once it is set."""
        # Where an interrupt comes right after the lock was had, the flag says so the next time.
        while not self.is_set:
            self._lock.acquire()


class Job:
    """A call that a thread makes."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call: Callable[[], object] | None = call
        self._error: BaseException | None = None
        self._done = Latch()

    def run(self) -> None:
        """Make the call, in the thread."""
        assert self._call is not None
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        self._call = None
        self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done.is_set

    def wait(self) -> None:
        """Return once the call has; raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class Crew:
    """Threads that do jobs in the order given, from `start` to `stop`.

    They hold nothing of the crew but its queue, and end with it at the latest.

    Args:
        count: Number of threads.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._stop = Latch()
        self._ends: list[Latch] = []

    def start(self) -> None:
        """Start all threads; ``RuntimeError`` where the system gives no more."""
        for _ in range(self._count):
            end = Latch()
            # By `threading` an interrupt might leave a thread half started.
            _thread.start_new_thread(_work, (self._jobs, self._stop, end))
            self._ends.append(end)

    def submit(self, call: Callable[[], object]) -> Job:
        """Give a thread a call to make."""
        job = Job(call)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        """Begin no other job, and return when those that have begun are done."""
        if not self._stop.is_set:
            self._stop.set()
        self._jobs.put(None)
        for end in self._ends:
            end.wait()

    def __del__(self) -> None:
        if hasattr(self, "_jobs"):  # else its construction was interrupted
            self._jobs.put(None)


def _work(jobs: SimpleQueue[Job | None], stop: Latch, end: Latch) -> None:
    try:
        job = jobs.get()
        while job is not None and not stop.is_set:
            job.run()
            job = None  # before the next comes: it holds a chunk's memory
            job = jobs.get()
    finally:
        jobs.put(None)  # for the next thread
        end.set()
