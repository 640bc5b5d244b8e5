"""Real processes: killed, forked, out of disk, idle, ending."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qitos_mlflow.delivery import (
    Outcome,
    find_segments,
    inspect_segment,
    waiting_records,
)
from tests.fakes.sink import FakeServer, deliver, numbered

ROOT = Path(__file__).parents[2]
PREAMBLE = """
import logging, os, sys, threading, time
from pathlib import Path
from qitos_mlflow import _guard
from qitos_mlflow.delivery import RetryLater, waiting_records
from tests.fakes.sink import FakeServer, FakeSink, left_behind, make_pipeline, numbered
spool = Path(sys.argv[1])
server = FakeServer()
logging.getLogger("qitos_mlflow").setLevel(logging.ERROR)  # Outages are no news here.
_guard.watchers.append(lambda where, error: print("swallowed", where, repr(error), file=sys.stderr))
"""
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, signals or resource limits")


def start(
    code: str, spool: Path, *flags: str, arguments: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Run `code` with a spool of its own; warnings are errors there too."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", *flags, "-c", PREAMBLE + code, str(spool), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, spool: Path, *flags: str) -> list[str]:
    """What `code` printed; it has to end well and say nothing on stderr."""
    with start(code, spool, *flags) as process:
        try:
            out, err = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


STREAM = """
server.down = RetryLater("503")
pipeline = make_pipeline(spool, server if sys.argv[2:] != ["offline"] else None)
n = 0
while True:
    for _ in range(20):
        pipeline.offer(b"%d" % n)
        n += 1
    os.write(1, b"%d %d\\n" % (n, time.monotonic_ns()))
    time.sleep(0.001)
"""
"""Offers records without end and prints how many they are at which time."""


FORKED = """
import json, random, signal, traceback
for n in range(int(sys.argv[2])):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        try:
            exec(sys.argv[3], {**globals(), "spool": spool / str(n)})
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        printed = pipe.readline()
        time.sleep(random.uniform(0, 0.3))
        killed_ns = time.monotonic_ns()
        os.kill(child, signal.SIGKILL)
        printed += pipe.read()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print(json.dumps([killed_ns, printed]), flush=True)
"""
"""Kills so many processes, one after another, that need not import anything any more: prints when
each one was killed, and what it had printed. In a spool each, which is numbered."""


def kill_once(spool: Path, after_s: float) -> float:
    """Kill a process at work; returns what `lost_s` does."""
    with start(STREAM, spool) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(after_s)
        killed_ns = time.monotonic_ns()
        process.kill()
        printed = first + process.stdout.read()
        process.wait()
    return lost_s(spool, killed_ns, printed)


def kill_forked(spools: Path, number: int) -> list[float]:
    """Kill so many forked processes at random moments; returns what `lost_s` does for each."""
    with start(FORKED, spools, arguments=(str(number), STREAM)) as process:
        out, err = process.communicate()  # To look at one would keep the next one from its work.
    assert (process.returncode, err) == (0, "")
    return [lost_s(spools / str(n), *json.loads(line)) for n, line in enumerate(out.splitlines())]


def lost_s(spool: Path, killed_ns: int, printed: str) -> float:
    """The age of the oldest record that a killed process lost, in seconds; delivers the others."""
    steps = [tuple(map(int, line.split())) for line in printed.splitlines() if line.count(" ") == 1]
    found = find_segments(spool)
    if not found:  # Killed before the first append.
        return (killed_ns - steps[0][1]) / 1e9
    [paths] = found
    assert not inspect_segment(paths).owner_alive
    records = [int(record) for record in waiting_records(paths)]
    assert records == list(range(len(records)))  # A beginning of what was offered, in order.
    lost = [when for n, when in steps if n > len(records)]
    server = FakeServer()
    assert deliver(paths, server.sink) is Outcome.FINISHED
    assert server.accepted[: len(records)] == [b"%d" % n for n in records]
    # Killed before the first record, perhaps before the header, there may be nothing to end.
    assert server.accepted[len(records) :] == [b"killed"] or not (records or server.accepted)
    return max(0.0, (killed_ns - min(lost)) / 1e9) if lost else 0.0


@posix
def test_a_killed_process_loses_its_last_records_only(tmp_path: Path) -> None:
    """After SIGKILL at random moments all but the last is there, in order, and delivered."""
    for n in range(5):
        kill_once(tmp_path / str(n), random.uniform(0, 0.15))


@posix
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_200_kills(tmp_path: Path) -> None:
    """200 times, and for 95 of 100 what was recorded more than 50 ms before the kill is there."""
    spools = [tmp_path / "a", tmp_path / "b"]
    with ThreadPoolExecutor(2) as pool:  # They sleep for most of the time.
        found = pool.map(lambda spool: kill_forked(spool, 100), spools)
        kills = [age for ages in found for age in ages]
    assert len(kills) == 200
    assert sorted(kills)[190] <= 0.05


@posix
def test_fork_gives_the_child_its_own_segment(tmp_path: Path) -> None:
    """Parent and child go on side by side: nothing lost, nothing twice, the parent's lock kept."""
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Forking with threads is the point here.
server.down = RetryLater("503")
pipeline = make_pipeline(spool, server)
for record in numbered(10):
    pipeline.offer(record)
pipeline.flush(0.1)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.close(read)
    assert pipeline.stats.recorded == 0
    for record in numbered(10, 100):
        assert pipeline.offer(record)
    server.down = None
    assert pipeline.close(30), pipeline.stats
    os.write(write, b",".join(server.accepted))
    os._exit(0)
os.close(write)
with os.fdopen(read, "rb") as pipe:
    from_child = pipe.read().split(b",{")
assert os.waitpid(child, 0)[1] == 0
print(len(from_child))
from qitos_mlflow.delivery import find_segments, inspect_segment
[mine] = find_segments(spool)
info = inspect_segment(mine)
print(info.owner_alive, info.head.pid == os.getpid(), info.waiting)
for record in numbered(10, 10):
    pipeline.offer(record)
server.down = None
print(pipeline.close(30), server.accepted == numbered(20))
"""
    assert run(code, tmp_path / "spool") == ["10", "True True 10", "True True"]
    assert list((tmp_path / "spool").iterdir()) == []


@posix
def test_a_parents_lock_ends_with_the_parent(tmp_path: Path) -> None:
    """A forked child that lives on does not keep a dead parent's segment from being delivered."""
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
pipeline = make_pipeline(spool, None)
pipeline.offer(b"parent's")
pipeline.flush(30)
if os.fork() == 0:
    os.close(2)
    print("child", os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        child = int(parent.stdout.readline().split()[1])
        [paths] = find_segments(tmp_path)
        assert inspect_segment(paths).owner_alive
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        assert not inspect_segment(paths).owner_alive
        parent.stdin.close()
    assert list(waiting_records(paths)) == [b"parent's"]


@posix
def test_fork_while_threads_are_at_work(tmp_path: Path) -> None:
    """Forking at any moment of a busy pipeline leaves a child that works."""
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
# The child has a server of its own: the locks of this one may be held as it forks.
pipeline = make_pipeline(spool, server, open_sink=lambda: server.sink())
go_on = True
def offer():
    while go_on:
        pipeline.offer(b"x" * 100)
threads = [threading.Thread(target=offer, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for n in range(20):
    child = os.fork()
    if child == 0:
        server = FakeServer()
        pipeline.offer(b"child")
        ok = pipeline.flush(30) and server.accepted == [b"child"] and pipeline.close(30)
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0, n
go_on = False
for thread in threads:
    thread.join()
print(pipeline.close(60))
"""
    assert run(code, tmp_path / "spool") == ["True"]
    # They offer faster than a busy machine may take: what is left is the count of that at most.
    left = [inspect_segment(paths) for paths in find_segments(tmp_path / "spool")]
    assert all(info.losses.keys() == {"queue_full"} and not info.size_bytes for info in left)


@posix
def test_a_fork_does_not_split_an_import(tmp_path: Path) -> None:
    """A module that a sink is importing during a fork can be imported in the child."""
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(0.5); done = True")
    code = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
sys.path.insert(0, {str(tmp_path)!r})
opening = threading.Event()
def open_sink():
    opening.set()
    import slow_module
    return server.sink()
pipeline = make_pipeline(spool, server, open_sink=open_sink)
pipeline.offer(b"one", urgent=True)
opening.wait(30)
child = os.fork()
if child == 0:
    import slow_module
    os._exit(0 if slow_module.done else 1)
print(os.waitpid(child, 0)[1], pipeline.close(30), server.accepted)
"""
    assert run(code, tmp_path / "spool") == ["0 True [b'one']"]


@posix
def test_a_fork_does_not_split_a_later_import(tmp_path: Path) -> None:
    """The same of what a sink imports once it is open; and the child may import as well."""
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(0.5); done = True")
    code = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
sys.path.insert(0, {str(tmp_path)!r})
import signal
from qitos_mlflow.delivery import importing
sending = threading.Event()
class Sink(type(server.sink())):
    def state(self):
        if self.mapped:
            with importing():
                sending.set()
                import slow_module
        return super().state()
pipeline = make_pipeline(spool, server, open_sink=lambda: Sink(server))
pipeline.offer(b"one", urgent=True)
sending.wait(30)
child = os.fork()
if child == 0:
    signal.alarm(60)
    with importing():
        import slow_module
    os._exit(0 if slow_module.done else 1)
print(os.waitpid(child, 0)[1], pipeline.close(30), server.accepted)
"""
    assert run(code, tmp_path / "spool") == ["0 True [b'one']"]


@posix
def test_a_fork_leaves_the_parents_sinks_alone(tmp_path: Path) -> None:
    """What the parent is sending for a dead process goes on; the child closes none of it."""
    code = """
import gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from qitos_mlflow.delivery import leftovers, segment_transfer
leftovers.FIRST_LOOK_S, leftovers.BATCH_PAUSE_S, segment_transfer.BATCH_RECORDS = 0, 60, 1
class Sink(FakeSink):
    def close(self):
        if self is not own:
            os.write(1, b"closed by parent\\n" if os.getpid() == parent else b"by child\\n")
own, parent = Sink(server), os.getpid()
left_behind(spool, numbered(2))
pipeline = make_pipeline(
    spool, server, open_sink=lambda: own, open_leftovers=lambda header: lambda: Sink(server)
)
pipeline.offer(b"own", urgent=True)
while numbered(1)[0] not in server.accepted:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    gc.collect()
    pipeline.offer(b"child", urgent=True)
    os._exit(0 if pipeline.close(30) else 1)
print(os.waitpid(child, 0)[1], flush=True)
pipeline.close(30)
"""
    assert run(code, tmp_path / "spool") == ["0", "closed by parent"]


@posix
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    """Processes of multiprocessing deliver for themselves, however they are started."""
    script = tmp_path / "workers.py"
    script.write_text(
        "import warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        + PREAMBLE
        + f"""
import multiprocessing
pipeline = make_pipeline(spool, server)
def work(n):
    pipeline.offer(b"from %d" % n)
    assert pipeline.close(30)
    assert server.accepted[-1:] == [b"from %d" % n], server.accepted
if __name__ == "__main__":
    pipeline.offer(b"parent's")
    assert pipeline.flush(30)
    context = multiprocessing.get_context({method!r})
    workers = [context.Process(target=work, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print([worker.exitcode for worker in workers], pipeline.close(30), server.accepted)
"""
    )
    out = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "spool")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    assert (out.stdout, out.stderr) == ('[0, 0, 0] True [b"parent\'s"]\n', "")
    assert list((tmp_path / "spool").iterdir()) == []


@posix
def test_a_full_disk_goes_on_from_memory(tmp_path: Path) -> None:
    """When the disk takes no more, delivery continues in order; offline, losses are counted."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
records = [b"%05d" % n + b"x" * 95 for n in range(1000)]
pipeline = make_pipeline(spool, server)
for record in records:
    assert pipeline.offer(record)
print(pipeline.flush(30), server.accepted == records, pipeline.stats.dropped)
assert pipeline.close(30)
offline = make_pipeline(spool, None)
for record in records:
    assert offline.offer(record)
offline.close(30)
stats = offline.stats
print(list(stats.dropped), stats.recorded == 1000)
print(stats.recorded == len(list(waiting_records(offline.paths))) + stats.dropped["disk_full"])
"""
    assert run(code, tmp_path / "spool") == ["True True {}", "['disk_full'] True", "True"]
    [paths] = find_segments(tmp_path / "spool")
    records = list(waiting_records(paths))
    assert records == [b"%05d" % n + b"x" * 95 for n in range(len(records))]
    assert len(records) > 100


@posix
def test_a_sidecar_delivers_more_segments_than_it_may_have_files(tmp_path: Path) -> None:
    """A segment a task, a thousand tasks: their number is no reason to stand still."""
    code = """
import resource
from qitos_mlflow.delivery import Counts, follow
class Sink(FakeSink):
    connection = None
    def prepare(self, records):
        if self.connection is None:
            self.connection = os.open(os.devnull, os.O_RDONLY)
        super().prepare(records)
    def close(self):
        if self.connection is not None:
            os.close(self.connection)
for n in range(40):
    left_behind(spool, numbered(6))
used = len(os.listdir("/dev/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, used + 20))
for pause_s in follow(spool, lambda paths: lambda header: Sink(server), Counts()):
    if not any(spool.iterdir()):
        break
    time.sleep(pause_s)
print(len(server.accepted))
"""
    assert run(code, tmp_path / "spool") == [str(40 * 7)]


@posix
@pytest.mark.parametrize("answers", [True, False])
def test_idle_costs_nothing(tmp_path: Path, answers: bool) -> None:
    """A pipeline with nothing to do does not wake up to look for something to do."""
    code = f"""
import resource
pipeline = make_pipeline(spool, server)
if not {answers}:
    server.down = RetryLater("503", after_s=60)
pipeline.offer(b"one", keep=True)
pipeline.flush(30 if {answers} else 0.2)
time.sleep(0.2)
woken = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
time.sleep(2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - woken)
"""
    [woken] = run(code, tmp_path / "spool")
    assert int(woken) < 10


def test_an_exit_without_close_is_quiet(tmp_path: Path) -> None:
    """The interpreter ends at once and without noise while both threads are at work."""
    code = """
server.answers.clear()
pipeline = make_pipeline(spool, server)
for record in numbered(1000):
    pipeline.offer(record, keep=True)
server.attempted.wait(30)
"""
    assert run(code, tmp_path / "spool") == []


def test_close_at_exit_delivers_what_was_recorded_last(tmp_path: Path) -> None:
    """A pipeline first used by an exit handler, when no thread may start, still delivers."""
    code = """
import atexit
pipeline = make_pipeline(spool, server)
def at_exit():
    pipeline.offer(b"last words")
    print(pipeline.close(30), server.accepted)
atexit.register(at_exit)
"""
    assert run(code, tmp_path / "spool") == ["True [b'last words']"]


def test_sinks_can_import_at_exit(tmp_path: Path) -> None:
    """What a sink needs of concurrent.futures is importable even in a script's last moments."""
    code = """
import atexit
def open_sink():
    import concurrent.futures.thread
    return server.sink()
pipeline = make_pipeline(spool, server, open_sink=open_sink)
pipeline.offer(b"one")
server.attempted.wait(30)
atexit.register(lambda: print(pipeline.close(30)))
"""
    assert run(code, tmp_path / "spool") == ["True"]


@posix
def test_sigterm_ends_the_process_as_ever(tmp_path: Path) -> None:
    """Nothing of ours handles signals, and what was recorded is in the spool."""
    with start(STREAM, tmp_path) as process:
        assert process.stdout is not None
        while not find_segments(tmp_path):
            process.stdout.readline()
        process.terminate()
        process.stdout.read()
        assert process.wait() == -signal.SIGTERM
    [paths] = find_segments(tmp_path)
    info = inspect_segment(paths)
    assert not info.owner_alive
    assert info.dead_letters == {}


@posix
def test_setting_the_clock_back_changes_no_deadline(tmp_path: Path) -> None:
    """Only the monotonic clock counts: with the wall clock far off everything goes its way."""
    code = """
real = time.time_ns
for offset in (0, -10**18, 10**18):
    time.time_ns = lambda: real() + offset
    time.time = lambda: (real() + offset) / 1e9
    pipeline = make_pipeline(spool, server)
    for record in numbered(10):
        pipeline.offer(record)
    assert pipeline.flush(30)
    server.down = RetryLater("503")
    pipeline.offer(b"x")
    assert not pipeline.flush(0.1)
    server.down = None
    assert pipeline.close(30)
print(len(server.accepted))
"""
    assert run(code, tmp_path / "spool") == ["33"]


def test_numbered_records_differ() -> None:
    """What these tests compare are records that differ."""
    assert len(set(numbered(100))) == 100
