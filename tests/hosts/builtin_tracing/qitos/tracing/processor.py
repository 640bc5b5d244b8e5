"""Processors, notified one after another from a list that others may change meanwhile (FLAW)."""

import logging
from abc import ABC, abstractmethod

log = logging.getLogger(__name__)


class TraceProcessor(ABC):
    @abstractmethod
    def on_trace_start(self, trace): ...

    @abstractmethod
    def on_trace_end(self, trace): ...

    @abstractmethod
    def on_span_start(self, span): ...

    @abstractmethod
    def on_span_end(self, span): ...

    def shutdown(self):  # noqa: B027
        pass

    def force_flush(self):  # noqa: B027
        pass


class SynchronousMultiTraceProcessor(TraceProcessor):
    def __init__(self, processors=None):
        self._processors = list(processors or [])

    @property
    def processors(self):
        return list(self._processors)

    def add_processor(self, processor):
        self._processors.append(processor)

    def remove_processor(self, processor):
        if processor in self._processors:
            self._processors.remove(processor)

    def _tell(self, method, *args):
        for processor in self._processors:
            try:
                getattr(processor, method)(*args)
            except Exception:
                log.exception("%s.%s failed", type(processor).__name__, method)

    def on_trace_start(self, trace):
        self._tell("on_trace_start", trace)

    def on_trace_end(self, trace):
        self._tell("on_trace_end", trace)

    def on_span_start(self, span):
        self._tell("on_span_start", span)

    def on_span_end(self, span):
        self._tell("on_span_end", span)

    def shutdown(self):
        self._tell("shutdown")

    def force_flush(self):
        self._tell("force_flush")


class NoOpTraceProcessor(TraceProcessor):
    def on_trace_start(self, trace):
        pass

    def on_trace_end(self, trace):
        pass

    def on_span_start(self, span):
        pass

    def on_span_end(self, span):
        pass
