"""Which experiment the run of a trace goes to, and which run it is a child of, as the server knows.

Receives `TraceFacts` from `Operations`, and asks the server what only that knows. If a run or an
experiment that was named does not exist, one warning says so, and the run is logged all the same.
"""

from __future__ import annotations

import time

from qitos_mlflow._guard import warn
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TraceFacts
from qitos_mlflow.mlflow_plugin.server.transport import Transport


class Experiments:
    """The experiments of one server. Used by one thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._known: dict[tuple[str, str], tuple[str, float]] = {}

    def of(self, facts: TraceFacts, timeout_s: float, fresh_at: float) -> str:
        """MLflow's id of the trace's experiment, which is created if it is missing.

        Args:
            facts: learn from the server which run is the trace's parent.
            timeout_s: longest wait for one answer (seconds).
            fresh_at: what was known before this time is asked again (monotonic clock).
        """
        if run_id := facts.run_to_ask:
            found = self._transport.stored_run(run_id, timeout_s)
            if found is None:
                warn(
                    "experiments.parent",
                    "%s has no run %r, so it cannot be the parent of a QitOS run; check "
                    "MLFLOW_RUN_ID and QITOS_MLFLOW_PARENT_RUN_ID",
                    self._transport.address,
                    run_id,
                )
            facts.place(found)
        key = facts.experiment_id, facts.experiment_name
        experiment_id, known_at = self._known.get(key, ("", 0.0))
        if known_at <= fresh_at:
            self._known = {one: at for one, at in self._known.items() if at[1] > fresh_at}
            experiment_id = self.ask(facts, timeout_s)
            self._known[key] = experiment_id, time.monotonic()
        return experiment_id

    def ask(self, facts: TraceFacts, timeout_s: float) -> str:
        """Like `of`, but always asks the server."""
        if wanted := facts.experiment_id:
            if self._transport.has_experiment(wanted, timeout_s):
                return wanted
            warn(
                "experiments.id",
                "%s has no experiment with the id %r, so runs go to the experiment %r; check "
                "mlflow.set_experiment and MLFLOW_EXPERIMENT_ID",
                self._transport.address,
                wanted,
                facts.experiment_name,
            )
        return self._transport.experiment_id(facts.experiment_name, timeout_s)

    def forget(self, facts: TraceFacts) -> bool:
        """Forget the trace's experiment, so that `of` asks again; whether it was known."""
        return self._known.pop((facts.experiment_id, facts.experiment_name), None) is not None
