"""What the stand-in Engine and its agents exchange."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class ActionStatus(str, Enum):
    SUCCESS = "success"
    ERROR = "error"
    SKIPPED = "skipped"
    TIMED_OUT = "timed_out"


@dataclass
class Action:
    name: str
    args: dict = field(default_factory=dict)
    action_id: str | None = None
    timeout_s: float | None = None


@dataclass
class ActionResult:
    name: str
    status: ActionStatus
    output: Any = None
    error: str | None = None
    action_id: str | None = None
    attempts: int = 1
    latency_ms: float = 0.0
    metadata: dict = field(default_factory=dict)


@dataclass
class Decision:
    mode: str
    actions: list = field(default_factory=list)
    final_answer: str | None = None
    rationale: str | None = None
    meta: dict = field(default_factory=dict)


@dataclass
class State:
    task: str = ""
    current_step: int = 0
    final_result: str | None = None
    stop_reason: str | None = None
    metadata: dict = field(default_factory=dict)


class Tools:
    """Functions by name; those in `parallel` may run at once, those in `limits` so many seconds."""

    def __init__(self, parallel=(), limits=None, **functions):
        self.functions, self.parallel, self.limits = functions, set(parallel), dict(limits or {})

    def list_tools(self):
        return list(self.functions)

    def get(self, name):
        return self.functions.get(name)
