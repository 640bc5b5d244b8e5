"""``import qitos_mlflow.auto``: what the start-up line does, where start-up files do not run.

For ``python -I``, ``-S``, ``pip install --target`` and zip applications. May be imported before
or after qitos.
"""

from __future__ import annotations

from qitos_mlflow._startup import install

install()
