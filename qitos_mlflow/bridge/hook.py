"""The Engine's callbacks become spans: hook calls open and close spans of one `AgentRun`.

Hosts call hooks by keyword. They swallow what a hook raises, but call it again on ``TypeError``,
and pass ``BaseException`` on; so every callback here catches its own exceptions. One Engine may run
in several threads, or inside its own tools, and then calls every hook for every run; so a callback
does nothing unless its run is the current one on this thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import contain, shield
from qitos_mlflow.bridge import extract
from qitos_mlflow.bridge.run import AgentRun, Place, here


def _callback(method: Callable[..., None]) -> Callable[..., None]:
    where = f"bridge.{method.__name__}"

    @functools.wraps(method)
    def guarded(self: BridgeHook, *args: Any, **kwargs: Any) -> None:
        try:
            place = here.get()
            if place is not None and place.run is self._run:
                method(self, *args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - the agent's thread
            contain(where, error)

    return guarded


def attach(run: AgentRun, engine: Any, *, in_session: bool = False) -> None:
    """Put a hook in ``engine.hooks``, for one run or for one call of ``step``."""
    with shield("bridge.attach"):  # A trace without steps is better than none.
        engine.hooks.append(BridgeHook(run, in_session))


def detach(run: AgentRun, engine: Any) -> None:
    """Take the run's hook, if there is one, out of whatever list the Engine has by now."""
    with shield("bridge.detach"):
        for index, hook in enumerate(engine.hooks):
            if isinstance(hook, BridgeHook) and hook._run is run:
                del engine.hooks[index]
                return


class BridgeHook:
    """The callbacks of one run, or of one call of ``step``."""

    def __init__(self, run: AgentRun, in_session: bool) -> None:
        self._run = run
        self._in_session = in_session

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in a copied Engine, does nothing: runs of that Engine have their own hooks."""
        return BridgeHook, (None, False)

    # -- step ------------------------------------------------------------------------------

    @_callback
    def on_before_step(self, ctx: Any, engine: Any) -> None:
        """Open the step, after closing one that is still open."""
        self._end_step(None)
        self._begin_step(ctx)

    @_callback
    def on_step_end(self, record: Any, state: Any, engine: Any) -> None:
        """Close a session's step; in a run, more of the step follows."""
        if self._in_session:
            self._end_step(record)

    @_callback
    def on_after_step(self, ctx: Any, engine: Any) -> None:
        """Close the step."""
        self._end_step(ctx.record, ended_by=extract.text_of(ctx.phase))

    def _begin_step(self, ctx: Any) -> None:
        self._run.failure = None  # The run went on; a traceback keeps frames alive.
        number = extract.first(ctx.record, "step_id")
        self._run.open(
            tracing.StepSpanData(
                ctx.step_id if number is None else number, observation=ctx.observation
            )
        )

    def _end_step(self, record: Any, ended_by: str | None = None) -> None:
        run = self._run
        step = run.find("step")
        if step is None:
            return
        self._end_act(record)
        if record is not None:
            seen = extract.first(record, "observation")
            if seen is not None:
                step.data.observation = seen
            step.data.decision = extract.decision(extract.first(record, "decision"))
        if ended_by is not None:
            step.output = {"ended_by": ended_by}
        run.close_above(step)
        run.close(step, run.failure)

    # -- decide ----------------------------------------------------------------------------

    @_callback
    def on_before_decide(self, ctx: Any, engine: Any) -> None:
        """Open the decision, and its step on hosts whose sessions do not announce steps."""
        if self._run.find("step") is None:
            self._begin_step(ctx)
        self._run.open(tracing.DecideSpanData(input_content=ctx.observation))

    @_callback
    def on_after_decide(self, ctx: Any, engine: Any) -> None:
        """Close the decision."""
        self._run.close_innermost("decide", extract.decision(ctx.decision))

    def _begin_generation(self, payload: Mapping[str, Any], engine: Any) -> None:
        unanswered = self._run.find("generation")
        if unanswered is not None:
            self._run.close(unanswered, "asked again without an answer")
        self._run.cache_hits = extract.cache_hits(engine.agent)
        self._run.open(
            tracing.GenerationSpanData(
                model=extract.model_name(engine.agent), input_content=extract.messages(payload)
            )
        )

    def _end_generation(self, payload: Mapping[str, Any], engine: Any) -> None:
        generation = self._run.find("generation")
        if generation is None:
            return
        answer = payload.get("model_response")
        summary = extract.response(answer) or {}
        if extract.cache_hits(engine.agent) != self._run.cache_hits:
            # Answered by a cache: no tokens were used, and the wrapper repeats the last usage.
            summary.pop("usage", None)
            summary["cached"] = True
        data = generation.data
        data.model = summary.get("model_name") or data.model
        data.output_content = payload.get("raw_output")
        data.model_response = summary
        data.token_usage = extract.token_usage(summary.get("usage"), summary.get("provider"))
        self._run.close(generation)

    # -- act -------------------------------------------------------------------------------

    @_callback
    def on_before_act(self, ctx: Any, engine: Any) -> None:
        """Open the action; some hosts announce one for decisions that do not act."""
        if getattr(ctx.decision, "mode", "act") == "act":
            self._run.open(tracing.ActSpanData())

    @_callback
    def on_after_act(self, ctx: Any, engine: Any) -> None:
        """Close the action."""
        self._end_act(ctx.record, ctx.action_results)

    def _end_act(
        self, record: Any, results: Any = None, error: BaseException | None = None
    ) -> None:
        act = self._run.find("act")
        if act is None:
            return
        act.data.output_content = results or extract.first(record, "action_results")
        if act.span_id not in self._run.acts_with_tools:
            taken = [extract.action(item) for item in extract.first(record, "actions") or ()]
            act.data.action_name = ", ".join(str(one.get("name")) for one in taken) or None
            if len(taken) == 1:
                act.data.tool_args = taken[0].get("args")
            elif taken:
                act.data.tool_args = {"actions": taken}
        self._run.acts_with_tools.discard(act.span_id)
        self._run.close(act, error)

    # -- reduce, critics, recovery ---------------------------------------------------------

    @_callback
    def on_before_reduce(self, ctx: Any, engine: Any) -> None:
        """Open the reduction, after an action whose end the host did not announce."""
        self._end_act(ctx.record)
        self._run.open(tracing.ReduceSpanData(input_count=len(ctx.action_results or ())))

    @_callback
    def on_after_reduce(self, ctx: Any, engine: Any) -> None:
        """Close the reduction."""
        self._run.close_innermost("reduce", extract.first(ctx.record, "state_diff"))

    @_callback
    def on_before_critic(self, ctx: Any, engine: Any) -> None:
        """Open a span for each critic: the host announces only when all begin and end."""
        run = self._run
        step = run.find("step")
        given = {"decision": extract.decision(ctx.decision), "results": ctx.action_results}
        run.critics, run.verdicts = [], []
        for critic in engine.critics:
            data = tracing.CriticSpanData(
                critic_name=extract.critic_name(critic), input_content=given
            )
            run.critics.append((critic, run.open(data, parent=step)))
        if len(run.critics) > 1 and step is not None:
            here.set(Place(run, step))  # An agent started now is of any of them.

    @_callback
    def on_after_critic(self, ctx: Any, engine: Any) -> None:
        """Close the critics' spans, each with its result."""
        run = self._run
        outputs = list(extract.first(ctx.record, "critic_outputs") or ())
        scores = extract.critic_scores(outputs, run.verdicts)
        results = zip(run.critics, outputs, scores, strict=False)
        for (critic, span), output, score in reversed(list(results)):
            span.data.critic_name = extract.critic_name(critic, output)
            span.data.output_content = output
            span.data.score = score
            # Its verdict may be a language model's.
            by_model = extract.first(critic, "llm", "model") is not None
            span.output = {"judged_by_model": by_model}
            run.close(span)
        run.critics = []

    @_callback
    def on_recover(self, ctx: Any, engine: Any) -> None:
        """Close what failed; the step stays open until its own end."""
        run = self._run
        run.failure = ctx.error
        step = run.find("step")
        if step is None:
            return
        record = ctx.record or (engine.records[-1] if engine.records else None)
        for span in reversed(run.stack[run.stack.index(step) + 1 :]):
            if span.data.type == "act":
                self._end_act(record, error=ctx.error)
            else:
                run.close(span, ctx.error)

    # -- events ----------------------------------------------------------------------------

    @_callback
    def on_event(self, event: Any, state: Any, record: Any, engine: Any) -> None:
        """Handle events that have no callback of their own."""
        # Most events are none of these. Hosts' phases are strings, which compare fast.
        phase, payload = event.phase, event.payload
        stage = payload.get("stage")
        if phase == "DECIDE":
            if stage == "model_input":
                self._begin_generation(payload, engine)
            elif stage == "model_output":
                self._end_generation(payload, engine)
        elif phase == "INIT" and stage is None:
            self._run.began = True
            self._run.state = state
            self._run.annotate(extract.init_metadata(payload))
        elif phase == "END":
            self._end_step(record)
            self._run.ending = payload
        elif phase == "HANDOFF_START":
            self._run.open(
                tracing.HandoffSpanData(
                    from_agent=payload.get("from"),
                    to_agent=payload.get("to"),
                    context_strategy=payload.get("context_strategy"),
                    messages_passed=payload.get("messages_passed"),
                )
            )
        elif phase == "HANDOFF_END":
            self._run.close_innermost("handoff")
