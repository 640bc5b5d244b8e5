"""Entry points of the installed packages. One package that is broken costs only its own.

`importlib.metadata.entry_points` reads all files of all packages, and raises if one is malformed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qitos_mlflow import _guard

if TYPE_CHECKING:
    from importlib_metadata import Distribution


class Found(NamedTuple):
    """One entry point."""

    name: str
    value: str
    distribution: str
    version: str


def entry_points(group: str) -> list[Found]:
    """The entry points of this group in all installed distributions.

    Of two versions of a distribution on `sys.path` the first one counts, as in an import. What
    cannot be read is left out, with a warning that names it. Reads the files of all distributions,
    which takes tens of milliseconds. Raises only what interrupts it, such as Ctrl-C.
    """
    import importlib_metadata

    found: dict[Found, None] = {}
    with _guard.shield("entry_points"):  # A finder of the program's that cannot list packages.
        for distribution in importlib_metadata.distributions():
            try:
                found.update(dict.fromkeys(_of(distribution, group)))
            except BaseException as error:  # noqa: BLE001 - site-packages may hold anything
                _guard.let_through(error)
                place = getattr(distribution, "_path", None) or distribution.locate_file("")
                message = "entry points in %s are left out, because it cannot be read: %s"
                _guard.warn(f"entry_points.{place}", message, place, _guard.in_words(error))
    return list(found)


def _of(distribution: Distribution, group: str) -> list[Found]:
    # The text first: parsing the entry points of everything installed takes ten times as long, and
    # a file that cannot be parsed matters only if it has the group.
    if group not in (distribution.read_text("entry_points.txt") or ""):
        return []
    import importlib_metadata

    first = importlib_metadata.distribution(distribution.name)
    return [
        Found(entry.name, entry.value, first.name, first.version or "")
        for entry in first.entry_points
        if entry.group == group
    ]
