"""What stands for traces and spans where tracing is off, so that nobody has to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qitos_mlflow.tracing.config import TracingMode
from qitos_mlflow.tracing.span_data import SpanData, SpanType

if TYPE_CHECKING:
    from qitos_mlflow.tracing.models import Span


class NoOpSpan:
    """Stands for a span where tracing is off: takes everything, does nothing."""

    def __init__(self) -> None:
        self.trace_id = ""
        self.span_id = ""
        self.parent_span_id: str | None = None
        self.data: SpanData | None = None
        self.mode = TracingMode.DISABLED
        self.started_at: str | None = None
        self.ended_at: str | None = None
        self.error: str | None = None
        self.exception: BaseException | None = None
        self.output: Any = None

    def start(self) -> NoOpSpan:
        """Nothing."""
        return self

    def finish(self, error: str | BaseException | None = None) -> None:
        """Nothing."""

    def set_output(self, output: Any) -> None:
        """Nothing."""

    def export(self) -> dict[str, Any]:
        """An empty dict."""
        return {}


class NoOpTrace:
    """Stands for a trace where tracing is off; `metadata` is its own, so that writing is safe."""

    def __init__(self) -> None:
        self.trace_id = ""
        self.name = ""
        self.group_id: str | None = None
        self.metadata: dict[str, Any] = {}
        self.mode = TracingMode.DISABLED
        self.error: BaseException | None = None

    def __enter__(self) -> NoOpTrace:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def create_span(
        self,
        span_type: SpanType,
        data: SpanData,
        span_id: str | None = None,
        parent: Span | NoOpSpan | str | None = None,
    ) -> NoOpSpan:
        """A span that does nothing, and has `data` for those who add to it."""
        span = NoOpSpan()
        span.data = data
        return span

    @property
    def spans(self) -> list[Span]:
        """An empty list."""
        return []

    def export(self) -> dict[str, Any]:
        """An empty dict."""
        return {}
