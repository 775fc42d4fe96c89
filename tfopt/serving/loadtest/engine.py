"""Sends requests on time.

One thread sends and never waits for an answer: answers arrive on a thread of the transport. An open loop sends what
is due at once, however late it is, and leaves nothing out, so that a stall of the server, or of this process, is in the
latencies of all requests that were due meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from tfopt.serving.loadtest import arrivals
from tfopt.serving.loadtest.plan import CLOSED, Plan, Request
from tfopt.serving.loadtest.transport import Transport

NOT_SENT, WRONG_ANSWER, LOST = "NOT_SENT", "WRONG_ANSWER", "LOST"
_SWITCH_S = 0.0005  # Python's own 5 ms would be seen in the latencies

# Index of the request among those given, and the answer; returns what is wrong with it, or None.
Check = Callable[[int, bytes], str | None]


@dataclass
class Record:
    """What happened, request by request; times in seconds after the start, NaN where it never happened.

    Attributes:
      due: when it should be sent; in a closed loop when it was.
      sent, done: when it was sent and answered.
      code: its error, or None.
      size: bytes of its answer.
      messages: code -> what the server said the first time.
      seconds, cpu_seconds: of the whole run, and of this process in it.
    """

    due: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    code: list[str | None] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def grow(self, due: list[float]) -> None:
        """Makes room for requests."""
        self.due += due
        self.sent += [math.nan] * len(due)
        self.done += [math.nan] * len(due)
        self.code += [LOST] * len(due)
        self.size += [0] * len(due)


class Sender:
    """Sends requests and keeps the record."""

    def __init__(
        self, transport: Transport, requests: Sequence[Request], plan: Plan, timeout_s: float, check: Check | None
    ):
        self.record = Record()
        self._transport, self._requests, self._plan, self._check = transport, requests, plan, check
        self._patience = timeout_s + 5
        self._lock = threading.Condition()
        self._outstanding = 0
        self._start = 0.0

    def run(self, progress: bool = True) -> Record:
        """Sends everything, and waits for the last answer."""
        with _undisturbed(), _bar(self._plan, progress) as bar:
            cpu = time.process_time()
            self._start = time.monotonic() + 0.01
            (self._closed if self._plan.mode == CLOSED else self._open)(bar)
            self._drain()
            self.record.seconds = time.monotonic() - self._start
            self.record.cpu_seconds = time.process_time() - cpu
        return self.record

    def _open(self, bar: tqdm) -> None:
        due = arrivals.times(self._plan).tolist()
        self.record.grow(due)
        clock, start, limit = time.monotonic, self._start, self._plan.max_outstanding
        for index, at in enumerate(due):
            wait = start + at - clock()
            if wait > 0:
                time.sleep(wait)
                _advance(bar, at)
            if self._outstanding >= limit:
                self.record.code[index] = NOT_SENT
                self.record.messages.setdefault(
                    NOT_SENT, f"{limit} requests wait for their answers (--max_outstanding)"
                )
            else:
                self._send(index)

    def _closed(self, bar: tqdm) -> None:
        end = self._start + self._plan.warmup_s + self._plan.duration_s
        time.sleep(max(0.0, self._start - time.monotonic()))
        most = self._plan.requests or sys.maxsize
        index = 0
        while index < most:
            with self._lock:
                while self._outstanding >= self._plan.concurrency and time.monotonic() < end:
                    self._lock.wait(end - time.monotonic())
            now = time.monotonic()
            if now >= end:
                break
            self.record.grow([now - self._start])
            self._send(index)
            index += 1
            _advance(bar, now - self._start)

    def _send(self, index: int) -> None:
        with self._lock:
            self._outstanding += 1
        which = index % len(self._requests)
        start, record = self._start, self.record

        def done(code: str | None, body: bytes, message: str) -> None:
            now = time.monotonic()
            record.done[index] = now - start
            record.size[index] = len(body)
            if code is None and self._check is not None and (wrong := self._check(which, body)):
                code, message = WRONG_ANSWER, wrong
            record.code[index] = code
            if code is not None and code not in record.messages:
                record.messages[code] = " ".join(message.split())[:300]
            with self._lock:
                self._outstanding -= 1
                self._lock.notify()

        record.sent[index] = time.monotonic() - start
        self._transport.send(self._requests[which], done)

    def _drain(self) -> None:
        end = time.monotonic() + self._patience
        with self._lock:
            while self._outstanding and time.monotonic() < end:
                self._lock.wait(end - time.monotonic())


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps Python's own pauses out of the latencies: no garbage collection, short turns of its threads."""
    interval, collected = sys.getswitchinterval(), gc.isenabled()
    gc.collect()
    gc.disable()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collected:
            gc.enable()


def _bar(plan: Plan, progress: bool) -> tqdm:
    name = f"{plan.rate:g}/s" if plan.mode != CLOSED else f"{plan.concurrency} clients"
    return tqdm(
        total=round(plan.warmup_s + plan.duration_s, 1),
        desc=name,
        unit="s",
        mininterval=1,
        leave=False,
        disable=None if progress else True,
    )


def _advance(bar: tqdm, seconds: float) -> None:
    if seconds - bar.n >= 1:
        bar.update(int(seconds - bar.n))
