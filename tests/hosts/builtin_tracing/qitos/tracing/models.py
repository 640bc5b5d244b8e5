"""Traces and spans, with the weaknesses of the real thing: see the comments marked FLAW."""

import uuid
from abc import ABC, abstractmethod
from contextvars import ContextVar
from datetime import datetime, timezone
from enum import Enum

current = ContextVar("standin_current_span", default=None)


def now():
    return datetime.now(timezone.utc).isoformat()


class SpanType(str, Enum):
    AGENT = "agent"
    STEP = "step"
    DECIDE = "decide"
    ACT = "act"
    REDUCE = "reduce"
    CRITIC = "critic"
    TOOL = "tool"
    HANDOFF = "handoff"
    DELEGATE = "delegate"
    FANOUT = "fanout"
    PARSE = "parse"
    GENERATION = "generation"
    GUARDRAIL = "guardrail"
    MCP = "mcp"
    CUSTOM = "custom"


class SpanData(ABC):
    @property
    @abstractmethod
    def type(self): ...

    @abstractmethod
    def export(self): ...


class _Data(SpanData):
    kind = ""

    def __init__(self, **values):
        self.__dict__.update(values)

    @property
    def type(self):
        return self.kind

    def export(self):
        return {"type": self.kind, **self.__dict__}


class AgentSpanData(_Data):
    kind = "agent"

    def __init__(self, name, *, model=None, tools=None, output_type=None):
        super().__init__(name=name, model=model, tools=tools or [], output_type=output_type)


class StepSpanData(_Data):
    kind = "step"

    def __init__(self, step_number, *, observation=None, decision=None):
        super().__init__(step_number=step_number, observation=observation, decision=decision)


class DecideSpanData(_Data):
    kind = "decide"

    def __init__(self, *, input_content=None, output_content=None, model_response=None):
        super().__init__(
            input_content=input_content,
            output_content=output_content,
            model_response=model_response,
        )


class GenerationSpanData(_Data):
    kind = "generation"

    def __init__(
        self,
        *,
        model=None,
        input_content=None,
        output_content=None,
        model_response=None,
        token_usage=None,
    ):
        super().__init__(
            model=model,
            input_content=input_content,
            output_content=output_content,
            model_response=model_response,
            token_usage=token_usage,
        )


class ActSpanData(_Data):
    kind = "act"

    def __init__(self, *, action_name=None, tool_args=None, output_content=None):
        super().__init__(
            action_name=action_name, tool_args=tool_args, output_content=output_content
        )


class ToolSpanData(_Data):
    kind = "tool"

    def __init__(self, *, tool_name, tool_args=None, output_content=None):
        super().__init__(tool_name=tool_name, tool_args=tool_args, output_content=output_content)


class ReduceSpanData(_Data):
    kind = "reduce"

    def __init__(self, *, input_count=0, output_content=None):
        super().__init__(input_count=input_count, output_content=output_content)


class CriticSpanData(_Data):
    kind = "critic"

    def __init__(self, *, critic_name=None, input_content=None, output_content=None, score=None):
        super().__init__(
            critic_name=critic_name,
            input_content=input_content,
            output_content=output_content,
            score=score,
        )


class HandoffSpanData(_Data):
    kind = "handoff"

    def __init__(
        self,
        *,
        from_agent=None,
        to_agent=None,
        output_content=None,
        context_strategy=None,
        messages_passed=None,
    ):
        super().__init__(
            from_agent=from_agent,
            to_agent=to_agent,
            output_content=output_content,
            context_strategy=context_strategy,
            messages_passed=messages_passed,
        )

    def export(self):
        optional = ("context_strategy", "messages_passed")
        return {k: v for k, v in super().export().items() if k not in optional or v is not None}


class MCPSpanData(_Data):
    kind = "mcp"

    def __init__(self, *, server_name=None, tool_name=None, tool_args=None, output_content=None):
        super().__init__(
            server_name=server_name,
            tool_name=tool_name,
            tool_args=tool_args,
            output_content=output_content,
        )


class CustomSpanData(_Data):
    kind = "custom"

    def __init__(self, *, name, data=None):
        super().__init__(name=name, data=data or {})


class Span:
    def __init__(self, trace_id, span_id, data, parent_span_id=None, processor=None):
        self.trace_id = trace_id
        self.span_id = span_id
        self.data = data
        self.parent_span_id = parent_span_id
        self.started_at = self.ended_at = self.error = self.output = None
        self._processor = processor
        self._token = None

    def start(self):
        self.started_at = now()
        self._token = current.set(self)
        if self._processor is not None:
            self._processor.on_span_start(self)
        return self

    def finish(self, error=None):
        self.ended_at = now()
        self.error = error if error is not None else self.error
        if self._token is not None:
            # FLAW: on another thread reset() raises ValueError, and no processor gets the end.
            current.reset(self._token)
            self._token = None
        # FLAW: notified again at every further call.
        if self._processor is not None:
            self._processor.on_span_end(self)

    def set_output(self, output):
        self.output = output

    def export(self):
        names = ("trace_id", "span_id", "parent_span_id", "started_at", "ended_at", "error")
        return {
            **{name: getattr(self, name) for name in names},
            "data": self.data.export(),
            "output": self.output,
        }


class NoOpSpan:
    trace_id = span_id = ""
    parent_span_id = data = started_at = ended_at = error = output = None

    def start(self):
        return self

    def finish(self, error=None):
        pass

    def set_output(self, output):
        pass

    def export(self):
        return {}


class Trace:
    def __init__(self, trace_id, name, group_id=None, metadata=None, processor=None):
        self.trace_id = trace_id
        self.name = name
        self.group_id = group_id
        self.metadata = metadata or {}
        self._processor = processor
        self._spans = []

    def __enter__(self):
        if self._processor is not None:
            self._processor.on_trace_start(self)
        return self

    def __exit__(self, exc_type, exc_val, exc_tb):
        # FLAW: neither is the exception kept, nor are open spans closed.
        if self._processor is not None:
            self._processor.on_trace_end(self)

    def create_span(self, span_type, data, span_id=None):
        # FLAW: the current span may belong to another trace.
        parent = current.get()
        parent_id = parent.span_id if isinstance(parent, Span) else None
        span = Span(self.trace_id, span_id or str(uuid.uuid4()), data, parent_id, self._processor)
        self._spans.append(span)
        return span

    @property
    def spans(self):
        return list(self._spans)

    def export(self):
        return {
            "trace_id": self.trace_id,
            "name": self.name,
            "group_id": self.group_id,
            "metadata": self.metadata,
            "spans": [span.export() for span in self._spans],
        }


class NoOpTrace:
    trace_id = name = ""
    group_id = None
    metadata = {}  # noqa: RUF012 - FLAW: one dict for all

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def create_span(self, span_type, data, span_id=None):
        return NoOpSpan()

    @property
    def spans(self):
        return []

    def export(self):
        return {}
