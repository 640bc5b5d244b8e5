"""Trace plugins: receives trace and span events, hands them on as hook calls, each on its own.

`hookspecs` says what a plugin may implement, `adapter` calls the plugins and keeps their failures
apart, `loader` finds the installed ones. Nothing here knows any plugin by name.
"""
