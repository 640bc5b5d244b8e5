"""How a run ended, as metadata of its trace. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow._guard import in_words
from qitos_mlflow._stop_reasons import ERROR_STOPS, SUCCESS_STOPS
from qitos_mlflow.bridge.extract import first, mapping, present, text_of


def outcome_of(
    state: Any,
    ending: Mapping[str, Any],
    stop_reason: str | None = None,
    *,
    result: Any = None,
    error: BaseException | None = None,
    failure: BaseException | None = None,
) -> dict[str, Any]:
    """The outcome of a run, without what is not known.

    Args:
        state: the agent's last state.
        ending: what the host's END event says.
        stop_reason: the host's word, if neither of the two has it.
        result: what the run returned; None for a session.
        error: what left the run.
        failure: what the Engine last tried to recover from, in the last step.
    """
    reason = text_of(stop_reason or first(state, "stop_reason") or ending.get("stop_reason"))
    why = failure if error is None else error
    if error is None and reason and (reason.startswith("cancelled") or reason == "interrupt"):
        status = "interrupted"
    elif error is None and reason not in ERROR_STOPS:
        status = "ok"
    elif why is not None and is_interrupt(why):
        status = "interrupted"  # It may wait for a human; ``run()`` calls that unrecoverable.
    else:
        status = "error"
    if error is not None and not reason:
        # An agent that used all steps of its state ends so if its budget allows more.
        exceeded = type(error).__name__ == "StateValidationError" and "exceed" in in_words(error)
        failed = "max_steps" if exceeded else "unrecoverable_error"
        reason = "interrupted" if status == "interrupted" else failed
    verdict = first(first(result, "task_result"), "success")
    success = bool(verdict) if verdict is not None else reason in SUCCESS_STOPS
    text = in_words(why) if why is not None else issues_of(ending) or reason
    found = {
        "stop_reason": reason,
        "final_result": first(state, "final_result"),
        "success": success and status == "ok",
        "status": status,
        "error": None if status == "ok" else text,
    }
    return present(found)


def issues_of(ending: Mapping[str, Any]) -> str | None:
    """What was wrong before the first step, as the host's END event says."""
    found = [mapping(issue).get("message") for issue in ending.get("issues") or ()]
    return "; ".join(str(text) for text in found if text) or None


def is_interrupt(error: BaseException) -> bool:
    """Whether this exception stops a program or waits for a human, and is no failure."""
    return not isinstance(error, Exception) or type(error).__name__ == "EngineInterrupt"
