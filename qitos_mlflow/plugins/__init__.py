"""Trace plugins: receives trace and span events, hands them on as hook calls, each on its own.

`hookspecs` says what a plugin may implement, `adapter` calls the plugins and keeps their failures
apart, `loader` finds the installed ones. Nothing here knows any plugin by name.
"""

# First of all, because it may import qitos, at which the start-up line loads plugins: nothing of
# this package may be half-imported then.
from qitos_mlflow.tracing import host_has_tracing as _settled  # noqa: F401
