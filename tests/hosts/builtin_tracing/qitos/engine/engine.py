"""The loop. Callbacks and events come in the order of a later host."""

from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any
from uuid import uuid4

from qitos.core import State
from qitos.engine.action_executor import ActionExecutor
from qitos.engine.critic_result import CriticResult
from qitos.engine.interrupt import EngineInterrupt

Phase = Enum(
    "Phase",
    {
        name: name
        for name in [
            "INIT",
            "DECIDE",
            "ACT",
            "REDUCE",
            "CRITIC",
            "CHECK_STOP",
            "END",
            "DECIDE_ERROR",
            "ACT_ERROR",
            "RECOVER",
            "HANDOFF_START",
            "HANDOFF_END",
            "INTERRUPT",
        ]
    },
    type=str,
)


@dataclass
class Event:
    step_id: int
    phase: Phase
    payload: dict
    ok: bool = True
    error: str | None = None
    ts: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())


@dataclass
class Record:
    step_id: int
    agent_id: str | None = None
    observation: Any = None
    decision: Any = None
    model_response: dict = field(default_factory=dict)
    actions: list = field(default_factory=list)
    action_results: list = field(default_factory=list)
    tool_invocations: list = field(default_factory=list)
    critic_outputs: list = field(default_factory=list)
    state_diff: dict = field(default_factory=dict)


@dataclass
class Ctx:
    task: str
    step_id: int
    phase: Phase
    state: Any
    observation: Any = None
    decision: Any = None
    action_results: list = field(default_factory=list)
    record: Any = None
    error: Any = None
    stop_reason: str | None = None
    payload: dict = field(default_factory=dict)


@dataclass
class Result:
    state: Any
    records: list
    events: list
    run_id: str
    step_count: int
    task_result: Any = None


@dataclass
class StepResult:
    step_id: int
    observation: Any
    stop: bool
    stop_reason: str | None = None
    error: Any = None


class Engine:
    def __init__(self, agent, hooks=None, critics=None, agents=None, max_steps=10):
        self.agent, self.critics, self.agents = agent, list(critics or []), dict(agents or {})
        self.hooks = list(hooks or [])
        self.max_steps = max_steps
        self.trace_writer = None
        self._cancelled = None
        self._reset()

    @property
    def tool_registry(self):
        return self.agent.tool_registry

    def cancel(self, mode="immediate"):
        self._cancelled = mode

    def _reset(self):
        self.records, self.events = [], []
        self._active_run_id, self._active_state, self._active_task_obj = "", None, None

    # -- hooks -----------------------------------------------------------------------------

    def _dispatch(self, name, ctx):
        for hook in self.hooks:
            method = getattr(hook, name, None)
            if method is None:
                continue
            try:
                method(ctx=ctx, engine=self)
            except TypeError:
                try:
                    method(ctx, self)
                except Exception:
                    pass
            except Exception:
                pass

    def _emit(self, step_id, phase, **payload):
        payload = {"run_id": self._active_run_id, "step_id": step_id, **payload}
        event = Event(step_id, phase, payload)
        self.events.append(event)
        record = self.records[-1] if self.records else None
        for hook in self.hooks:
            method = getattr(hook, "on_event", None)
            if method is None:
                continue
            try:
                method(event=event, state=self._active_state, record=record, engine=self)
            except Exception:
                pass

    def _ctx(self, phase, record, **more):
        state = self._active_state
        return Ctx(state.task, record.step_id, phase, state, record=record, **more)

    # -- phases ----------------------------------------------------------------------------

    def _decide(self, observation, record):
        state = self._active_state
        self._dispatch("on_before_decide", self._ctx(Phase.DECIDE, record, observation=observation))
        self._emit(record.step_id, Phase.DECIDE, stage="start")
        decision = self.agent.decide(state, observation)
        if decision is None:
            messages = [{"role": "user", "content": state.task, "_step_id": record.step_id}]
            self._emit(record.step_id, Phase.DECIDE, stage="model_input", messages=messages)
            text, response, decision = self.agent.llm(messages)
            record.model_response = {"text": text, **response}
            self._emit(
                record.step_id,
                Phase.DECIDE,
                stage="model_output",
                raw_output=text,
                model_response=dict(record.model_response),
            )
        record.decision, record.actions = decision, list(decision.actions)
        ctx = self._ctx(Phase.DECIDE, record, observation=observation, decision=decision)
        self._dispatch("on_after_decide", ctx)
        return decision

    def _act(self, decision, record):
        self._dispatch("on_before_act", self._ctx(Phase.ACT, record, decision=decision))
        self._emit(record.step_id, Phase.ACT, stage="start")
        if any(action.name == "loop" for action in decision.actions):
            self._emit(record.step_id, Phase.ACT, stage="tool_call_loop_detected")
            return ["blocked"]  # and no on_after_act
        executor = ActionExecutor(self.tool_registry, engine=self)
        execution = executor.execute(decision.actions, state=self._active_state)
        record.tool_invocations = [{"tool_name": item.name} for item in execution]
        record.action_results = [item.output or {"error": item.error} for item in execution]
        self._emit(record.step_id, Phase.ACT, stage="action_results")
        ctx = self._ctx(Phase.ACT, record, decision=decision, action_results=record.action_results)
        self._dispatch("on_after_act", ctx)
        return record.action_results

    def _reduce(self, observation, decision, record):
        ctx = self._ctx(Phase.REDUCE, record, action_results=record.action_results)
        self._dispatch("on_before_reduce", ctx)
        self.agent.reduce(self._active_state, observation, decision)
        record.state_diff = {"step": {"before": record.step_id, "after": record.step_id + 1}}
        self._dispatch("on_after_reduce", self._ctx(Phase.REDUCE, record))

    def _judge(self, record):
        if not self.critics:
            return
        self._dispatch("on_before_critic", self._ctx(Phase.CRITIC, record))
        for critic in self.critics:
            out = critic.evaluate(self._active_state, record.decision, record.action_results)
            result = out if isinstance(out, CriticResult) else CriticResult.from_dict(out)
            record.critic_outputs.append({**vars(result), "critic_name": type(critic).__name__})
        self._dispatch("on_after_critic", self._ctx(Phase.CRITIC, record))

    def _check_stop(self, decision, record):
        state = self._active_state
        self._dispatch("on_before_check_stop", self._ctx(Phase.CHECK_STOP, record))
        if decision.mode == "final":
            state.stop_reason, state.final_result = "final", decision.final_answer
        self._dispatch("on_after_check_stop", self._ctx(Phase.CHECK_STOP, record))
        return decision.mode == "final"

    def _recover(self, exc, record, phase):
        ctx = self._ctx(phase, record, error=exc)
        ctx.record = None  # hosts leave it out here
        self._dispatch("on_recover", ctx)
        self._emit(record.step_id, Phase.RECOVER)
        if isinstance(exc, ConnectionError):
            return True
        self._active_state.stop_reason = "unrecoverable_error"
        return False

    def _step_end(self, record):
        for hook in self.hooks:
            method = getattr(hook, "on_step_end", None)
            if method is not None:
                method(record=record, state=self._active_state, engine=self)

    def _handoff(self, decision, record):
        target = decision.meta["handoff_target"]
        if target not in self.agents:
            raise ValueError(f"no agent {target}")
        source, self.agent = self.agent.name, self.agents[target]
        more = {"context_strategy": "full", "messages_passed": 3}
        self._emit(record.step_id, Phase.HANDOFF_START, **{"from": source, "to": target}, **more)
        self._emit(record.step_id, Phase.HANDOFF_END, agent=target)

    # -- entry points ----------------------------------------------------------------------

    def run(self, task, **kwargs):
        self._reset()
        self._active_run_id = f"run_{uuid4().hex[:12]}"
        state = self._active_state = self.agent.init_state(str(task), **kwargs)
        self._emit(0, Phase.INIT, task=str(task), run_meta={"protocol": "native"})
        for hook in self.hooks:
            if hasattr(hook, "on_run_start"):
                hook.on_run_start(task=task, state=state, engine=self)
        observation, step_id = {"task": str(task)}, 0
        while True:
            if self._cancelled == "immediate":
                # One host leaves the state's reason empty here; only the event says it.
                self._emit(step_id, Phase.END, stop_reason="cancelled_immediate")
                break
            if step_id >= self.max_steps:
                state.stop_reason = "budget_steps"
                self._emit(step_id, Phase.END, stop_reason=state.stop_reason)
                break
            record = Record(step_id, agent_id=self.agent.name)
            self.records.append(record)
            ctx = self._ctx(Phase.DECIDE, record, observation=observation)
            self._dispatch("on_before_step", ctx)
            phase = Phase.DECIDE
            try:
                decision = self._decide(observation, record)
                if decision.mode == "handoff":
                    self._handoff_or_raise(decision, record)
                    step_id = state.current_step = step_id + 1
                    continue
                phase = Phase.ACT
                results = self._act(decision, record) if decision.mode == "act" else []
                observation = record.observation = {"action_results": results}
                phase = Phase.REDUCE
                self._reduce(observation, decision, record)
            except _Escaping as escaping:
                raise escaping.error from None
            except Exception as exc:
                goes_on = self._recover(exc, record, phase)
                self._step_end(record)
                if not goes_on:
                    self._emit(step_id, Phase.END, stop_reason=state.stop_reason)
                    break
                self._dispatch("on_after_step", self._ctx(Phase.RECOVER, record))
                step_id = state.current_step = step_id + 1
                continue
            self._judge(record)
            stop = self._check_stop(decision, record)
            self._step_end(record)
            self._dispatch("on_after_step", self._ctx(Phase.CHECK_STOP, record))
            if stop:
                self._emit(step_id, Phase.END, stop_reason=state.stop_reason)
                break
            step_id = state.current_step = step_id + 1
        result = Result(state, self.records, self.events, self._active_run_id, len(self.records))
        for hook in self.hooks:
            if hasattr(hook, "on_run_end"):
                hook.on_run_end(result=result, engine=self)
        self._active_run_id = ""
        return result

    def _handoff_or_raise(self, decision, record):
        try:
            self._handoff(decision, record)
        except Exception as exc:
            raise _Escaping(exc) from None
        self._step_end(record)
        self._dispatch("on_after_step", self._ctx(Phase.HANDOFF_END, record))

    def init_session(self, task, **kwargs):
        self._reset()
        self._active_run_id = f"run_{uuid4().hex[:12]}"
        self._active_state = self.agent.init_state(str(task), **kwargs)
        return self._active_state, {"task": str(task)}

    def step(self, state, observation):
        record = Record(state.current_step, agent_id=self.agent.name)
        self.records.append(record)
        try:
            decision = self._decide(observation, record)
            results = self._act(decision, record) if decision.mode == "act" else []
        except EngineInterrupt as exc:
            self._emit(record.step_id, Phase.INTERRUPT)
            self._step_end(record)
            return StepResult(record.step_id, observation, True, "interrupt", exc)
        except Exception as exc:
            goes_on = self._recover(exc, record, Phase.DECIDE)
            self._step_end(record)
            reason = None if goes_on else "unrecoverable_error"
            return StepResult(record.step_id, observation, not goes_on, reason, exc)
        observation = record.observation = {"action_results": results}
        self._reduce(observation, decision, record)  # what it raises leaves step()
        stop = self._check_stop(decision, record)
        self._step_end(record)
        state.current_step += 1
        return StepResult(record.step_id, observation, stop, state.stop_reason if stop else None)


class _Escaping(Exception):
    """Carries an exception past the recovery, as a host's failed hand-off does."""

    def __init__(self, error):
        self.error = error


class Agent:
    """Follows a script of decisions; an exception in it is raised."""

    llm = None

    def __init__(self, name, tool_registry, *script):
        self.name, self.tool_registry, self.script = name, tool_registry, list(script)

    def init_state(self, task, **kwargs):
        return State(task=task)

    def decide(self, state, observation):
        item = self.script[min(state.current_step, len(self.script) - 1)]
        if isinstance(item, BaseException):
            raise item
        return item() if callable(item) else item

    def reduce(self, state, observation, decision):
        return state
