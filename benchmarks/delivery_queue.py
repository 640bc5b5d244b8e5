"""What handing a record over costs the agent's thread, beside the least that could do it.

    python benchmarks/delivery_queue.py
    python benchmarks/delivery_queue.py --fsync

The least: append to a deque, set an event that a thread waits on. Two situations: *busy*, records
one after the other, while the spooling thread is awake; *paced*, a pause before each, so that it
sleeps and has to be woken by the kernel. Rounds of both alternate, so that noise hits both.

Then what the spooling thread does with it: an append of one record and of 20, with the setting
`spool_fsync` off and on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from qitos_mlflow.delivery import Pipeline
from qitos_mlflow.delivery.spool.writer import SegmentWriter

RECORD = b'{"kind":"span","data":"' + b"x" * 1000 + b'"}'
ROUNDS = 7
PAUSE_S = 0.03


def least() -> tuple[Callable[[bytes], object], Callable[[], object]]:
    """deque.append and Event.set, with a thread that empties the deque."""
    items: deque[bytes] = deque()
    wake = threading.Event()
    running = True

    def consume() -> None:
        while running:
            wake.wait()
            wake.clear()
            while items:
                items.popleft()

    def offer(payload: bytes) -> None:
        items.append(payload)
        wake.set()

    def stop() -> None:
        nonlocal running
        running = False
        wake.set()

    threading.Thread(target=consume, daemon=True).start()
    return offer, stop


def ours(directory: Path, fsync: bool) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    """A pipeline that writes to a real spool and delivers nothing."""
    pipeline = Pipeline(
        b"{}",
        directory=directory,
        queue_bytes=256 * 1024 * 1024,
        spool_bytes=1024 * 1024 * 1024,
        offline=True,
        fsync=fsync,
    )
    return pipeline.offer, lambda: pipeline.close(30)


def measure(offer: Callable[[bytes], object], count: int, pause_s: float) -> list[float]:
    """Microseconds of each call."""
    times = []
    offer(RECORD)
    for _ in range(count):
        if pause_s:
            time.sleep(pause_s)
        began = time.perf_counter_ns()
        offer(RECORD)
        times.append((time.perf_counter_ns() - began) / 1000)
    return times


def appends(directory: Path, records: int, *, fsync: bool) -> list[float]:
    """Microseconds of each append of so many records to a real spool."""
    segment = SegmentWriter(
        directory, b"{}", offline=True, cap_bytes=2**30, memory_bytes=0, fsync=fsync
    )
    batch = [(RECORD, False)] * records
    times = measure(lambda _: segment.append(batch, time.time_ns()), 100, 0.0)
    segment.close(delete=True)
    return times


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--fsync", action="store_true", help="with the setting spool_fsync")
    fsync = arguments.parse_args().fsync
    print(f"{'':8}{'':>10}{'median µs':>12}{'p99 µs':>10}{'ratio of medians':>20}")
    for name, count, pause_s in (("busy", 20_000, 0.0), ("paced", 60, PAUSE_S)):
        times: dict[str, list[float]] = {"least": [], "offer": []}
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as directory:
                for key, (offer, stop) in (
                    ("least", least()),
                    ("offer", ours(Path(directory), fsync)),
                ):
                    times[key] += measure(offer, count, pause_s)
                    stop()
        medians = {key: statistics.median(values) for key, values in times.items()}
        for key, values in times.items():
            p99 = statistics.quantiles(values, n=100)[98]
            ratio = f"{medians[key] / medians['least']:.2f}"
            print(f"{name:8}{key:>10}{medians[key]:>12.2f}{p99:>10.2f}{ratio:>20}")
    for records in (1, 20):
        with tempfile.TemporaryDirectory() as directory:
            off, on = (
                statistics.median(appends(Path(directory), records, fsync=how))
                for how in (False, True)
            )
        print(f"append of {records:>2} records: {off:.0f} µs, with fsync {on:.0f} µs")


if __name__ == "__main__":
    main()
