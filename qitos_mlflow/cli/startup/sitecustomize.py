"""Turns logging on when Python starts, where the start-up line of this package does not run.

`qitos-mlflow run` puts this directory first on PYTHONPATH, also for the processes that the script
starts. Python imports `sitecustomize` before the script's directory is on `sys.path`, so the
package is looked for where this file is, too. Another Python than the script's, such as that of
another virtual environment, is left alone: it has other packages. Nothing is said where the package
cannot be imported. A `sitecustomize` that this one hides is run as usual.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_here = os.path.dirname(__file__)  # noqa: PTH120 - pathlib costs a few ms
sys.path[:] = [entry for entry in sys.path if entry != _here]
_python = f"{sys.prefix} {sys.implementation.cache_tag}"
try:
    if os.environ.setdefault("_QITOS_MLFLOW_PYTHON", _python) == _python:  # The script is first.
        if PathFinder.find_spec("qitos_mlflow") is None:
            sys.path.append(_here.rsplit(os.sep, 3)[0])
        import qitos_mlflow.auto  # noqa: F401
except Exception:
    pass
_hidden = PathFinder.find_spec("sitecustomize")
if _hidden is not None and _hidden.loader is not None:
    # The import system hands on what is in `sys.modules` in the end.
    sys.modules[__name__] = module_from_spec(_hidden)
    _hidden.loader.exec_module(sys.modules[__name__])
