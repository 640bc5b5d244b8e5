"""`qitos_mlflow.context`: what the caller says of the agents that are started inside a block.

Taken on the agent's thread as a trace starts (`plugin`), and carried there by `carried`. Nothing
here connects to a server.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from qitos_mlflow._guard import warn
from qitos_mlflow.mlflow_plugin.fluent.carried import current
from qitos_mlflow.mlflow_plugin.fluent.origins import watch
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.server.pages import run_page, trace_page
from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http

MAX_TRACES = 1000
"""Traces that a context remembers: the latest ones. A block may last as long as the process."""

MAX_ID_CHARS = 1000
"""Longest session, user or run name that is kept (characters). MLflow shows 250."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
"""W3C Trace Context: version, trace, span, flags. Later versions may have more fields."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Begun(NamedTuple):
    """A trace that has begun inside.

    Attributes:
        qitos_trace_id: its id in QitOS and in the records.
        trace_id: MLflow's id of its tree; None if the tree is not logged.
        run: its run.
        uri: where it is logged.
        workspace: MLflow's workspace there.
    """

    qitos_trace_id: str
    trace_id: str | None
    run: PendingRun
    uri: str | None
    workspace: str | None


class context:  # noqa: N801 - reads as a statement
    """Says for whom and for what the agents work that are started in a block or a function.

    It holds for this thread and task and for those that are started inside, also in thread pools. A
    process that is started inside is outside of it. Inside another context, what is given here adds
    to that, and comes first. Agents that are called by an agent belong to that agent's trace.

        with qitos_mlflow.context(session=chat_id, user=user_id, tags={"plan": "pro"}) as request:
            answer = agent.run(question)
        return {"answer": answer, "trace": request.trace_ids}

    As a decorator of a function or a coroutine function, each call is inside a context of its own.

    Args:
        session: of the conversation; MLflow's Sessions page shows its traces together.
        user: the user's id, as MLflow's traces have it.
        tags: tags of the runs and of the traces.
        run_name: name of the runs.
        metadata: logged as the trace's own metadata is, as params. The trace's own come first.
        parent_run_id: MLflow's id of the run that each run is a child of.
        traceparent: the W3C header of the request that caused this, or all headers. The trace is
            linked to the caller's, and the tag ``qitos.traceparent`` has the header. A header that
            is not valid is ignored, with one line in the log.

    Raises:
        TypeError: a value cannot be used; the text names it.
    """

    def __init__(
        self,
        *,
        session: str | int | None = None,
        user: str | int | None = None,
        tags: Mapping[str, Any] | None = None,
        run_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        parent_run_id: str | None = None,
        traceparent: str | Mapping[str, str] | None = None,
    ) -> None:
        self.session = _name("session", session)
        self.user = _name("user", user)
        self.run_name = _name("run_name", run_name)
        self.parent_run_id = _name("parent_run_id", parent_run_id)
        self.tags = {key: str(value) for key, value in _mapping("tags", tags).items()}
        self.metadata = _mapping("metadata", metadata)
        self.traceparent = _traceparent(traceparent)
        self._entered = False
        self._outer: context | None = None
        self._begun: deque[Begun] = deque(maxlen=MAX_TRACES)

    # -- what has begun inside ---------------------------------------------------------------

    @property
    def trace_ids(self) -> list[str]:
        """MLflow's ids of the traces that have begun inside so far, known at once."""
        return list(dict.fromkeys(one.trace_id for one in self.begun if one.trace_id))

    @property
    def run_ids(self) -> list[str]:
        """MLflow's ids of their runs. One is missing until the server has created it.

        `force_flush()` of the processor waits for them.
        """
        return list(dict.fromkeys(one.run.ref.run_id for one in self.begun if one.run.ref))

    @property
    def url(self) -> str | None:
        """The page of the first trace, or of its run if no trace is logged.

        None until the run is created, and for a destination that is no http(s) server.
        """
        for _, trace_id, run, uri, workspace in self.begun:
            if uri is not None and is_http(uri) and run.ref is not None:
                experiment_id = run.ref.experiment_id
                if trace_id is None:
                    return run_page(uri, experiment_id, run.ref.run_id, workspace)
                return trace_page(uri, experiment_id, trace_id, workspace)
        return None

    @property
    def begun(self) -> list[Begun]:
        """The traces that have begun inside, at most the last `MAX_TRACES`."""
        return list(self._begun)

    def begin(self, trace: Begun) -> None:
        """Note a trace that begins inside; so do the contexts around."""
        around: context | None = self
        while around is not None:
            around._begun.append(trace)
            around = around._outer

    # -- what its traces are logged with -----------------------------------------------------

    def run_settings(self) -> Any:
        """What it adds to the settings of a trace's run, as a dict."""
        found = {"run_name": self.run_name, "user_id": self.user, "traceparent": self.traceparent}
        return {key: value for key, value in found.items() if value is not None}

    def start_fields(self) -> dict[str, Any]:
        """What it adds to the record of a trace's start."""
        fields: dict[str, Any] = {"more_metadata": self.metadata}
        if self.session is not None:
            fields["group_id"] = self.session
        if self.tags:
            fields["added"] = {"tags": self.tags}
        return fields

    # -- as a block and a decorator ----------------------------------------------------------

    def __enter__(self) -> context:
        if self._entered:
            raise RuntimeError(
                "a qitos_mlflow.context is entered once; make another one for each block"
            )
        self._entered = True
        watch()
        outer = self._outer = current.get()
        if outer is not None:
            for name in ("session", "user", "run_name", "parent_run_id", "traceparent"):
                if getattr(self, name) is None:
                    setattr(self, name, getattr(outer, name))
            self.tags = {**outer.tags, **self.tags}
            self.metadata = {**outer.metadata, **self.metadata}
        current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        around = current.get()
        # A generator may not have left a context inside, or be left after this one.
        while around is not None and around is not self:
            around = around._outer
        if around is self:
            current.set(self._outer)
        else:
            warn(
                "context.exit",
                "a qitos_mlflow.context was left on another thread, task or process than it was "
                "entered on, so agents may not have been inside; use it around what starts them",
            )

    def __call__(self, function: Function) -> Function:
        """Decorate a function: each call of it is inside a context like this one."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"qitos_mlflow.context cannot decorate the generator {function.__qualname__}: use "
                "`with qitos_mlflow.context(...)` around what starts the agents"
            )

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self._another():
                return function(*args, **kwargs)

        @functools.wraps(function)
        async def inside_async(*args: Any, **kwargs: Any) -> Any:
            with self._another():
                return await function(*args, **kwargs)

        decorated: Any = inside_async if inspect.iscoroutinefunction(function) else inside
        found: Function = decorated
        return found

    def _another(self) -> context:
        made = copy.copy(self)
        made._entered, made._begun = False, deque(maxlen=MAX_TRACES)
        return made


def _name(argument: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(
            f"{argument}={value!r:.200} of qitos_mlflow.context is a {type(value).__name__}; "
            "give a text"
        )
    return str(value)[:MAX_ID_CHARS]


def _mapping(argument: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{argument} of qitos_mlflow.context is a {type(value).__name__}; "
            'give a dict, such as {"plan": "pro"}'
        )
    for key in value:
        if not isinstance(key, str):
            raise TypeError(
                f"{argument} of qitos_mlflow.context has the key {key!r:.200}; give texts as keys"
            )
    return {key: item for key, item in value.items() if item is not None}


def _traceparent(value: Any) -> str | None:
    """The header, if it is there and valid; a request must not fail for what its client sends."""
    get = getattr(value, "get", None)
    if get is not None:  # Headers, as frameworks have them.
        value = get("traceparent") or get("Traceparent") or get("HTTP_TRACEPARENT")
    elif value is not None and not isinstance(value, (str, bytes)):
        raise TypeError(
            f"traceparent of qitos_mlflow.context is a {type(value).__name__}; "
            "give the header's text or the request's headers"
        )
    if not value:
        return None
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    found = _TRACEPARENT.fullmatch(text.strip()[:200])
    if found is not None:
        version, trace, span, more = found.groups()
        if version != "ff" and int(trace, 16) and int(span, 16) and (version > "00" or not more):
            return found.group(0)[:55]
    warn("context.traceparent", "a traceparent that is not valid is ignored: %.80r", text)
    return None
