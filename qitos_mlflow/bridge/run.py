"""One agent run as a branch of a trace: which spans are open, one inside the other.

Receives calls from the wrappers and the hook. Everything opened here is closed in reverse order,
whatever happens. `here` is the place in a run that the current thread or task has.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from qitos_mlflow import tracing
from qitos_mlflow._guard import shield
from qitos_mlflow.bridge import extract
from qitos_mlflow.bridge.live import LiveTrace
from qitos_mlflow.bridge.outcome import outcome_of


class Place(NamedTuple):
    """A position in a trace: new spans and nested agents go below `span`.

    It is immutable, so that a copied context (a pool, ``asyncio``) keeps the parent that it was
    copied with.
    """

    run: AgentRun
    span: Any
    """The host's `Span`, or one of ours."""
    tool: bool = False
    """Whether `span` is that of a tool call."""
    detached: bool = False
    """Whether work started here is meant to outlive the run."""

    @property
    def starts_trace(self) -> bool:
        """Whether an agent started here gets a linked trace of its own."""
        return self.detached or self.run.live.closed


here: ContextVar[Place | None] = ContextVar("qitos_mlflow_place", default=None)
"""The current place; None outside of any traced run."""


class AgentRun:
    """One call of ``Engine.run`` or one session of ``Engine.step``, as an AGENT subtree.

    Used by the thread that runs the agent; tools on other threads use `live` only.
    """

    def __init__(
        self, engine: Any, task: Any, before: Place | None, resumed_from: Any = None
    ) -> None:
        """Begin: a subtree at `before` if its trace has not ended, else a trace of its own.

        If that fails once the trace has begun, this run is the current place, for `end`.
        """
        self.engine = weakref.ref(engine)
        self.before = before
        self.began = False
        """Whether the Engine has reported anything yet."""
        self.state: Any = None
        self.ending: Mapping[str, Any] = {}
        """What the host's END event says."""
        self.failure: BaseException | None = None
        """What the Engine tries to recover from in the current step."""
        self.cache_hits: int | None = None
        self.critics: list[tuple[Any, Any]] = []
        """The critics that were asked last, each with its span."""
        self.verdicts: list[tuple[Any, bool]] = []
        """What the host made of its critics' dicts, in order, and whether each had a score."""
        self.acts_with_tools: set[str] = set()
        self.ended = False
        self.stack: list[Any] = []
        self._innermost: dict[str, Any] = {}  # By type: `find` in `stack` takes 0.6 µs.
        self._session_failure: dict[str, Any] | None = None
        self._metadata = extract.run_metadata(engine, task)
        if isinstance(resumed_from, str):
            self._metadata["resumed_from"] = resumed_from
        self._parent: Any = None
        """The span that the root is below; None: the trace is this run's own."""
        if before is None or before.starts_trace:
            self.live = self._new_trace(before)
        else:
            self.live, self._parent = before.run.live, before.span
        here.set(Place(self, self._parent))
        data = tracing.AgentSpanData(
            self._metadata["agent_name"],
            model=self._metadata.get("model_name"),
            tools=self._metadata.get("tools"),
        )
        if self._parent is not None and hasattr(data, "task"):  # a host's own would not export it
            data.task = self._metadata.get("task")
        self.open(data)

    @property
    def qitos_run_id(self) -> Any:
        """The host's id of the run; None if it is not known."""
        return self._metadata.get("qitos_run_id")

    @property
    def root(self) -> Any:
        """The AGENT span while it is open, then None."""
        return self.stack[0] if self.stack else None

    def open(self, data: Any, parent: Any = None) -> Any:
        """Open a span below `parent`, by default the innermost open one; it becomes the place."""
        if self.live.closed:
            self._outlive()
        if parent is None:
            parent = self.stack[-1] if self.stack else self._parent
        span = self.live.start(data, parent)
        self.stack.append(span)
        self._innermost[data.type] = span
        here.set(Place(self, span))
        return span

    def close(self, span: Any, error: BaseException | str | None = None) -> None:
        """Close a span after whatever is still open above it, all with `error`."""
        while span in self.stack:
            top = self.stack.pop()
            self._innermost.pop(top.data.type, None)
            self.live.finish(top, error)
            if self.stack:
                here.set(Place(self, self.stack[-1]))

    def close_innermost(self, span_type: str, output: Any = None) -> None:
        """Close the innermost open span of this type, if there is one, with its output."""
        span = self.find(span_type)
        if span is not None:
            if output is not None:  # Not every host's data has an output.
                span.data.output_content = output
            self.close(span)

    def close_above(self, span: Any, error: BaseException | str | None = None) -> None:
        """Close everything that was opened after `span`."""
        while span in self.stack and self.stack[-1] is not span:
            self.close(self.stack[-1], error)

    def find(self, span_type: str) -> Any:
        """The innermost open span of this type, or None."""
        return self._innermost.get(span_type)

    def annotate(self, metadata: Mapping[str, Any]) -> None:
        """Add to the metadata of the trace, if it is this run's own."""
        self._metadata.update(metadata)
        if self._parent is None:
            self.live.annotate(metadata)

    def session_began(self, engine: Any) -> None:
        """Take what a session has instead of an INIT event, and leave this context."""
        self.began = True
        here.set(self.before)
        self.state = extract.first(engine, "_active_state")
        protocol = extract.first(extract.first(engine, "_resolved_protocol"), "id")
        run_id = extract.first(engine, "_active_run_id")
        self.annotate(extract.present({"qitos_run_id": run_id or None, "protocol": protocol}))

    def session_stepped(self, error: BaseException | None) -> None:
        """Close what the step left open; `error` is what left it, and the session may go on.

        The session may have ended: a new one may begin in the middle of its step. Never raises
        `Exception`.
        """
        with shield("bridge.step"):
            self.close_above(self.root, error)
            self._session_failure = None
            if error is not None:
                self._session_failure = outcome_of(self.state, self.ending, error=error)

    def end(
        self,
        *,
        error: BaseException | None = None,
        result: Any = None,
        stop_reason: str | None = None,
        run_id: str | None = None,
    ) -> None:
        """Close every span and, if it is this run's own, the trace. Once; never raises Exception.

        Args:
            error: what left the run; call inside its handler.
            result: the host's result, when the run returned one.
            stop_reason: the host's word, if it is not on the result's state.
            run_id: the host's id of the run, if it failed before its INIT event.
        """
        if self.ended:
            return
        if run_id:
            self._metadata.setdefault("qitos_run_id", run_id)
        outcome: dict[str, Any] = {"status": "error" if error is not None else "ok"}
        with shield("bridge.outcome"):
            if error is None and self._session_failure is not None:
                outcome = self._session_failure
            else:
                outcome = outcome_of(
                    extract.first(result, "state") or self.state,
                    self.ending,
                    stop_reason,
                    result=result,
                    error=error,
                    failure=self.failure,
                )
        with shield("bridge.end"):
            self._close_all(error, outcome)
            if self._parent is None:
                self.live.annotate({**self._metadata, **outcome})
        with shield("bridge.end"):  # Whatever failed above, the trace ends.
            if self._parent is None:
                self.live.end(error)
        self.ended = True
        here.set(self.before)
        # Contexts copied within the run keep this object, and the next run may begin in one of
        # them: the object must hold no content, nor the place before it, from now on.
        self.failure = self.state = self.before = None
        self.stack, self.critics, self.verdicts, self.ending = [], [], [], {}
        self._innermost.clear()

    def _close_all(self, error: BaseException | None, outcome: dict[str, Any]) -> None:
        if not self.stack:
            return
        root = self.root
        if error is not None and self.critics:
            # All were opened at once; only the one that raised failed.
            failed = extract.critics_in_traceback([critic for critic, _ in self.critics], error)
            for critic, span in reversed(self.critics):
                self.close(span, error if any(critic is one for one in failed) else None)
        self.close_above(root, error)
        root.output = outcome.get("final_result")
        why: BaseException | str | None = error
        if error is None and outcome["status"] != "ok":
            # Handed back as an ordinary result: the reason is the last exception, if there was one.
            why = self.failure or outcome.get("error")
        self.close(root, why)

    def _new_trace(self, before: Place | None) -> LiveTrace:
        metadata = dict(self._metadata)
        if before is not None:
            metadata["linked_trace_id"] = before.run.live.trace.trace_id
            metadata["linked_span_id"] = before.span.span_id
        return LiveTrace(metadata["agent_name"], metadata)

    def _outlive(self) -> None:
        """Continue in a trace of its own: the trace it was part of has ended, with its spans."""
        stale = self.stack
        if not stale:
            return
        self.live = self._new_trace(Place(self, stale[0]))
        self.stack, self._parent = [], None
        for span in stale:
            self.open(span.data)
