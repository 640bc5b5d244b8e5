"""How a run ended, as metadata of its trace. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow._guard import in_words
from qitos_mlflow._stop_reasons import ERROR_STOPS, SUCCESS_STOPS
from qitos_mlflow.bridge.extract import first, mapping, present, text_of


def outcome_of(
    result: Any,
    state: Any,
    stop_reason: str | None,
    failure: BaseException | None,
    issues: str | None,
) -> dict[str, Any]:
    """The outcome of a run that returned.

    Args:
        result: what it returned; None for a session.
        state: the agent's last state.
        stop_reason: the host's word; None: it gave none.
        failure: what the Engine last tried to recover from, in the last step.
        issues: what was wrong before the first step.
    """
    if stop_reason and (stop_reason.startswith("cancelled") or stop_reason == "interrupt"):
        status = "interrupted"
    elif stop_reason not in ERROR_STOPS:
        status = "ok"
    elif failure is not None and is_interrupt(failure):
        status = "interrupted"  # It waits for a human; ``run()`` calls that unrecoverable.
    else:
        status = "error"
    verdict = first(first(result, "task_result"), "success")
    success = bool(verdict) if verdict is not None else stop_reason in SUCCESS_STOPS
    error = None
    if status != "ok":
        error = in_words(failure) if failure is not None else issues or stop_reason
    return _known(stop_reason, state, status, success and status == "ok", error)


def outcome_of_exception(error: BaseException, state: Any) -> dict[str, Any]:
    """The outcome of a run that `error` left."""
    text = in_words(error)
    if is_interrupt(error):
        status, reason = "interrupted", "interrupted"
    elif type(error).__name__ == "StateValidationError" and "exceed" in text:
        # An agent that used all steps of its state ends so if its budget allows more.
        status, reason = "error", "max_steps"
    else:
        status, reason = "error", "unrecoverable_error"
    return _known(text_of(first(state, "stop_reason")) or reason, state, status, False, text)


def issues_of(payload: Mapping[str, Any]) -> str | None:
    """What was wrong before the first step, as the host's END event says."""
    found = [mapping(issue).get("message") for issue in payload.get("issues") or ()]
    return "; ".join(str(text) for text in found if text) or None


def is_interrupt(error: BaseException) -> bool:
    """Whether this exception stops a program or waits for a human, and is no failure."""
    return not isinstance(error, Exception) or type(error).__name__ == "EngineInterrupt"


def _known(
    stop_reason: str | None, state: Any, status: str, success: bool, error: str | None
) -> dict[str, Any]:
    found = {
        "stop_reason": stop_reason,
        "final_result": first(state, "final_result"),
        "success": success,
        "status": status,
        "error": error,
    }
    return present(found)
