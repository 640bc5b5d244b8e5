"""Replaces methods of the host.

Each replacement is decided on its own by what the host has, never by a version number. One that
does not fit is left out, with one line in the log.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper` around a method that `owner` itself defines, if it takes arguments.

    Args:
        owner: the host's class.
        name: of the method.
        wrapper: called instead, with the bound original, the object it is bound to, and the
            arguments as a tuple and a dict.
    """
    original: Any = vars(owner).get(name)
    function = getattr(original, "__func__", original)  # a class method is not callable itself
    try:
        fits = len(inspect.signature(function).parameters) > 1
    except (TypeError, ValueError):  # Not a function, or one without a signature.
        fits = False
    if not fits:
        from qitos_mlflow._guard import warn

        warn(f"bridge.{name}", "cannot trace %s.%s of this QitOS", owner.__name__, name)
        return

    of_class = isinstance(original, classmethod)

    # A plain function: bound to an Engine, it can be pickled (a process pool's
    # `submit(engine.run)`), copied, and be in a `weakref.WeakMethod`.
    @functools.wraps(function)
    def method(bound_to: Any, /, *args: Any, **kwargs: Any) -> Any:
        at = (None, bound_to) if of_class else (bound_to, type(bound_to))
        return wrapper(original.__get__(*at), bound_to, args, kwargs)

    setattr(owner, name, classmethod(method) if of_class else method)
