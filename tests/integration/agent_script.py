"""What an agent process of the tests runs: real QitOS agents with a scripted model and a tool.

``python -m tests.integration.agent_script CONFIG`` (JSON of `Config`). It tells its parent each
point it reaches as a JSON line on stdout, and at the points named as gates it waits for a line on
stdin. How long callbacks held the agents' threads, and what they were given, is written down on
the way.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

CALLBACKS = ("on_trace_start", "on_span_start", "on_span_end", "on_trace_end")
SLOW_MS = 1.0
"""Holds longer than this are listed one by one."""
MAX_LISTED = 1000


@dataclass(frozen=True)
class Config:
    """What the agents do. The points are described at `Gates`."""

    traces: int = 1
    """Agent runs, one after another in each thread."""
    steps: int = 2
    """Steps of each run that call the tool; one more step gives the answer."""
    threads: int = 1
    way: str = "code"
    """How the package comes in: code (`MlflowTraceProcessor`), autolog, auto (`import
    qitos_mlflow.auto`), installed (nothing: its start-up file), control (a processor that does
    nothing in our place: what callbacks cost on this machine now), off."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the processor or of `autolog`."""
    gevent: bool = False
    """gevent has replaced threads, sockets and fork before anything was imported."""
    import_mlflow: bool = False
    """The script uses mlflow itself, so that the start of a trace may wait for its run."""
    also: dict[str, Any] = field(default_factory=dict)
    """Arguments of a second processor, which logs the same once more."""
    then: list[dict[str, Any]] = field(default_factory=list)
    """Arguments of processors that take each other's place after all runs, which are done again."""
    clock_back_s: float = 0.0
    """The wall clock is set back by this much for Python,"""
    clock_back_at: str = "mid"
    """behind this point."""
    fork_at: str = ""
    """Behind this point a child is forked and waited for: `mid` is within an open trace."""
    child_traces: int = 1
    """Agent runs of the forked child, which are numbered from 1000."""
    child_exits: bool = False
    """It leaves by `sys.exit`; otherwise it flushes and leaves by `os._exit`."""
    workers: int = 0
    """At last so many processes of multiprocessing are started and waited for, of one run each,
    numbered from 2000."""
    start_method: str = "spawn"
    payload_bytes: int = 200
    """Length of each tool result, which also makes the messages grow."""
    tool_sleep_s: float = 0.0
    tool_cpu_s: float = 0.0
    failing_steps: list[int] = field(default_factory=list)
    """Steps, from 0, in which the tool raises; the agent goes on."""
    interrupted_step: int | None = None
    """The step in which the model raises `KeyboardInterrupt`, which leaves the run."""
    scores: list[float] = field(default_factory=list)
    """A critic gives these, step by step, the last one from then on; empty: no critic."""
    task_name: str = "task"
    """Task texts are this name and the number of the run."""
    run_dirs: bool = False
    """QitOS writes its own run directories below the working directory."""
    gates: list[str] = field(default_factory=list)
    flush: bool = False
    """Flush once all runs have ended; the `done` event says with what result."""
    truth: str = "truth.jsonl"
    """File for what the callbacks were given, written before they are called; it survives a
    SIGKILL. Empty: none."""


class Gates:
    """The points of interest: reported when reached, and waited at if the test asks for that.

    ready: everything is imported and attached, no run has begun.
    start, mid, end: in the first run: in its first and its middle tool call, and before its answer.
    next: the first run has ended.
    over: all runs of this process have ended.
    child, joined: a forked child is about to leave, and has left.
    worker-2000, worker-2001, …, workers: so for processes of multiprocessing.
    done: the last thing before the interpreter exits.

    When the runs are done again for the n-th time, their points are called so: ready-1, mid-1.
    """

    def __init__(self, config: Config, holds: Holds) -> None:
        self._config = config
        self._holds = holds
        self._lock = threading.Lock()
        self.again = 0

    def reach(self, point: str, **facts: Any) -> None:
        name = f"{point}-{self.again}" if self.again else point
        fact = {"point": name, "time_s": time.monotonic(), "worst_ms": self._holds.worst_ms}
        with self._lock:
            os.write(1, json.dumps({**fact, **facts}).encode() + b"\n")
        if point in self._config.gates:
            sys.stdin.readline()
        if point == self._config.clock_back_at:
            set_clock_back(self._config.clock_back_s)
        if point == self._config.fork_at:
            fork(self._config, self._holds)


class GarbageCollection(threading.local):
    """Seconds that collecting garbage has taken: on this thread, and on all threads together.

    It runs on the thread that allocates at that moment, and takes 20 ms for all that qitos and
    mlflow have loaded. All other threads wait for as long: it does not let go of the interpreter.
    """

    spent_s = 0.0
    all_spent_s = 0.0  # Of the class: no thread has one of its own.
    _began_s = 0.0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        """What `gc.callbacks` are called with."""
        if phase == "start":
            self._began_s = time.perf_counter()
        else:
            took_s = time.perf_counter() - self._began_s
            self.spent_s += took_s
            GarbageCollection.all_spent_s += took_s


class RunDelays:
    """For how long each thread of this process could have run, had the machine not been busy.

    All threads: who waits for the interpreter waits as long as the one that has it. Linux.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._files: dict[str, int] = {}

    def __call__(self) -> dict[str, int]:
        """Nanoseconds so far; 0 if the system does not say."""
        if self._pid != os.getpid():  # A forked child has threads of its own.
            self._pid, self._files = os.getpid(), {}
        delays = {}
        with contextlib.suppress(FileNotFoundError):
            for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 - it counts here
                with contextlib.suppress(OSError):  # It has ended.
                    delays[thread] = self._delay_ns(thread)
        return delays

    def since(self, before: dict[str, int]) -> float:
        """Seconds, of all threads together, since `before` was read."""
        now = self()
        return sum(now[thread] - before.get(thread, 0) for thread in now) / 1e9

    def _delay_ns(self, thread: str) -> int:
        if thread not in self._files:
            self._files[thread] = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
        try:
            return int(os.pread(self._files[thread], 100, 0).split()[1])
        except OSError:
            os.close(self._files.pop(thread))
            raise


class Holds:
    """Times every callback on the thread that calls it, whichever processors are attached.

    Without the collection of garbage, and the time in which the machine did something else.
    """

    def __init__(self, truth: str) -> None:
        self._truth = os.open(truth, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if truth else None
        self.counts = dict.fromkeys(CALLBACKS, 0)
        self.worst_ms = dict.fromkeys(CALLBACKS, 0.0)
        self.slow: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._garbage = GarbageCollection()
        gc.callbacks.append(self._garbage)
        self._delays = RunDelays()

    def watch(self) -> None:
        """Wrap the callbacks of the class that hands each event to all processors."""
        from qitos_mlflow.tracing import SynchronousMultiTraceProcessor as FanOut

        for name in CALLBACKS:
            setattr(FanOut, name, self.timed(name, getattr(FanOut, name)))

    def timed(self, name: str, callback: Callable[..., None]) -> Callable[..., None]:
        """The callback, which is timed and written down under this name."""

        def timed(processor: Any, item: Any) -> None:
            self._write_down(name, item)
            own_s, garbage_s = self._garbage.spent_s, self._garbage.all_spent_s
            delays = self._delays()
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            try:
                callback(processor, item)
            finally:
                cpu_s = time.thread_time() - cpu_s
                wall_s = time.perf_counter() - wall_s
                garbage_s = self._garbage.all_spent_s - garbage_s
                cpu_s -= self._garbage.spent_s - own_s
                held_s = wall_s - garbage_s - self._delays.since(delays)
                self._count(name, max(held_s, cpu_s) * 1000, cpu_s * 1000)

        return timed

    def _count(self, name: str, held_ms: float, cpu_ms: float) -> None:
        with self._lock:
            self.counts[name] += 1
            self.worst_ms[name] = max(self.worst_ms[name], held_ms)
            if held_ms > SLOW_MS and len(self.slow) < MAX_LISTED:
                self.slow.append({"callback": name, "held_ms": held_ms, "cpu_ms": cpu_ms})

    def _write_down(self, name: str, item: Any) -> None:
        if self._truth is None:
            return
        data = getattr(item, "data", None)
        known = {
            "callback": name,
            "time_s": time.monotonic(),
            "trace_id": item.trace_id,
            "span_id": getattr(item, "span_id", None),
            "parent_id": getattr(item, "parent_span_id", None),
            "type": str(getattr(data, "type", "")) or None,
        }
        os.write(self._truth, json.dumps(known).encode() + b"\n")


class ScriptedModel:
    """Calls the tool once a step, then answers; tokens are real counts of its own making."""

    model = "scripted-1"

    def __init__(self, config: Config, number: int, gates: Gates) -> None:
        self._config, self._number, self._gates = config, number, gates
        self._calls = 0

    def __call__(self, messages: list[dict[str, Any]]) -> Any:
        from qitos import ModelResponse

        step, self._calls = self._calls, self._calls + 1
        if step == self._config.interrupted_step:
            raise KeyboardInterrupt
        if step < self._config.steps:
            text = f"Thought: go on\nAction: work(step={step})"
        else:
            if self._number == 0:
                self._gates.reach("end")
            text = f"Final Answer: done {self._number}"
        usage = {"prompt_tokens": 100 + step, "completion_tokens": 10, "total_tokens": 110 + step}
        return ModelResponse(text=text, usage=usage, model_name=self.model, provider="scripted")


def make_agent(config: Config, number: int, gates: Gates) -> Any:
    """A QitOS agent for run `number`. qitos is imported here, not when this module is."""
    from qitos import Action, AgentModule, Decision, StateSchema, ToolRegistry, tool
    from qitos.kit.parser import ReActTextParser

    @tool(name="work")
    def work(step: int) -> str:
        """Do one step of the work."""
        if number == 0 and step == 0:
            gates.reach("start")
        if number == 0 and step == config.steps // 2:
            gates.reach("mid")
        until = time.thread_time() + config.tool_cpu_s
        while time.thread_time() < until:
            pass
        time.sleep(config.tool_sleep_s)
        if step in config.failing_steps:
            raise ValueError(f"step {step} fails on purpose")
        return f"{number}.{step} ".ljust(config.payload_bytes, "x")

    class SpoolingThread(AgentModule[StateSchema, dict[str, Any], Action]):
        name = "worker"

        def init_state(self, task: str, **kwargs: Any) -> StateSchema:
            return StateSchema(task=task, max_steps=config.steps + 1)

        def reduce(
            self, state: StateSchema, observation: dict[str, Any], decision: Decision[Action]
        ) -> StateSchema:
            return state

    registry = ToolRegistry()
    registry.register(work)
    model = ScriptedModel(config, number, gates)
    return SpoolingThread(tool_registry=registry, llm=model, model_parser=ReActTextParser())


def set_clock_back(by_s: float) -> None:
    """Let `time.time` and `time.time_ns` return an earlier time from now on."""
    if by_s:
        real_ns, by_ns = time.time_ns, int(by_s * 1e9)
        time.time_ns = lambda: real_ns() - by_ns
        time.time = lambda: (real_ns() - by_ns) / 1e9


def make_critics(config: Config) -> list[Any]:
    """The critic that gives the scores asked for, or none."""
    from qitos.engine.critic import Critic

    class Scorer(Critic):
        def __init__(self) -> None:
            self._given = 0

        def evaluate(self, state: Any, decision: Any, results: list[Any]) -> dict[str, Any]:
            score = config.scores[min(self._given, len(config.scores) - 1)]
            self._given += 1
            return {"action": "continue", "reason": f"score {self._given}", "score": score}

    return [Scorer()] if config.scores else []


def attach(config: Config) -> None:
    """Bring the package in, in the way the configuration names."""
    if config.way == "code":
        from qitos_mlflow import MlflowTraceProcessor
        from qitos_mlflow.tracing import add_trace_processor

        add_trace_processor(MlflowTraceProcessor(**config.options))
        if config.also:
            add_trace_processor(MlflowTraceProcessor(**config.also))
    elif config.way == "autolog":
        import qitos_mlflow

        qitos_mlflow.autolog(**config.options)
    elif config.way == "auto":
        import qitos_mlflow.auto
    elif config.way == "control":
        from qitos_mlflow import bridge
        from qitos_mlflow.tracing import NoOpTraceProcessor, add_trace_processor

        add_trace_processor(NoOpTraceProcessor())
        bridge.install()
    else:
        assert config.way in {"installed", "off"}, config.way


def run(config: Config, number: int, gates: Gates) -> None:
    """One agent run."""
    agent = make_agent(config, number, gates)
    with contextlib.suppress(KeyboardInterrupt):
        agent.run(
            f"{config.task_name} {number}",
            max_steps=config.steps + 1,
            critics=make_critics(config),
            render=False,
            trace=config.run_dirs,
        )
    if number == 0:
        gates.reach("next")


def runs(config: Config, gates: Gates) -> None:
    """All agent runs, in as many threads as are asked for."""
    gates.reach("ready", **memory())
    began_s = time.monotonic()
    with _pool(config.threads) as each:
        each(lambda number: run(config, number, gates), range(config.traces))
    gates.reach("over", wall_s=time.monotonic() - began_s, **memory())


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[Callable[..., Any]]:
    if threads == 1:  # On the main thread, as most scripts do.
        yield lambda work, items: list(map(work, items))
        return
    with ThreadPoolExecutor(threads) as executor:
        yield lambda work, items: list(executor.map(work, items))


def flush_all() -> bool:
    """Flush every processor; whether all of them say that all is delivered."""
    from qitos_mlflow.tracing import processors

    return False not in [processor.force_flush() for processor in processors()]


def fork(config: Config, holds: Holds) -> None:
    """Have a forked child run agents and leave; return when it has."""
    with warnings.catch_warnings():  # Forking with threads is the point here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        Gates(Config(), holds).reach("joined", status=status)
        return
    gates = Gates(Config(), holds)
    for number in range(1000, 1000 + config.child_traces):
        run(config, number, gates)
    if config.child_exits:
        gates.reach("child", pid=os.getpid())
        sys.exit()
    if config.child_traces:
        flush_all()
    gates.reach("child", pid=os.getpid())
    os._exit(0)


def start_workers(config: Config, gates: Gates, holds: Holds) -> None:
    """Have processes of multiprocessing run an agent each; return when they have ended."""
    context = multiprocessing.get_context(config.start_method)
    numbers = range(2000, 2000 + config.workers)
    ours = holds if config.start_method == "fork" else None
    workers = [context.Process(target=work, args=(config, number, ours)) for number in numbers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join()
    gates.reach("workers", codes=[worker.exitcode for worker in workers])


def work(config: Config, number: int, holds: Holds | None) -> None:
    """What a process of multiprocessing does."""
    if holds is None:  # A new interpreter knows nothing of its parent's processors.
        holds = Holds(config.truth)
        attach(config)
        holds.watch()
    gates = Gates(Config(), holds)
    run(config, number, gates)
    gates.reach(f"worker-{number}")


def memory() -> dict[str, int]:
    """Resident memory now and at its highest, in bytes, on Linux; nothing elsewhere.

    Not `getrusage`: what that calls the highest includes the parent's before the exec.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    kib = {
        name: value.strip().split(" ")[0]
        for name, _, value in (line.partition(":") for line in lines)
    }
    return {"rss_bytes": int(kib["VmRSS"]) * 1024, "peak_rss_bytes": int(kib["VmHWM"]) * 1024}


def main() -> None:
    """Run everything the configuration asks for, and report."""
    given = json.loads(sys.argv[1])
    config = Config(
        **{one.name: given.pop(one.name) for one in fields(Config) if one.name in given}
    )
    assert not given, f"not options of an agent: {given}"
    holds = Holds(config.truth)
    gates = Gates(config, holds)

    import qitos  # noqa: F401

    if config.import_mlflow:
        import mlflow  # noqa: F401
    attach(config)
    if config.way != "off":
        holds.watch()
    runs(config, gates)
    for again, options in enumerate(config.then, 1):
        from qitos_mlflow.tracing import set_trace_processors

        gates.again = again
        set_trace_processors([])
        attach(replace(config, options=options))
        runs(config, gates)
    gates.again = 0

    if config.workers:
        start_workers(config, gates, holds)
    gates.reach(
        "done",
        flushed=flush_all() if config.flush else None,
        counts=holds.counts,
        slow=holds.slow,
        mlflow_imported="mlflow" in sys.modules,
        **memory(),
    )


if __name__ == "__main__":
    main()
