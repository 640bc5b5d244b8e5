"""Why an agent's run stopped, in the host's words, and what each reason means. Pure."""

from __future__ import annotations

SUCCESS_STOPS = frozenset({"success", "final", "env_terminal"})
"""Stop reasons of a run that has reached its end."""

ERROR_STOPS = frozenset({
    "unrecoverable_error", "task_validation_failed", "env_capability_mismatch",
    "context_overflow", "empty_model_response", "error",
})  # fmt: skip
"""Stop reasons of a run that could not go on (QitOS `core/errors.py`: StopReason), of all hosts."""
