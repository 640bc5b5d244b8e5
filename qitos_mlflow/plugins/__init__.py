"""Trace plugins: receives trace and span events, hands them on as hook calls to each plugin.

`hookspecs` has the hooks, `adapter` calls the plugins and isolates their failures, `loader` finds
the installed ones. Nothing here knows any plugin by name.
"""

# Before all else: this may import qitos, the start-up line then uses the adapter, and nothing of
# this package may be half-imported at that point.
from qitos_mlflow.tracing import host_has_tracing as _settled  # noqa: F401
