"""What can be run, and with what installed: `./dev` lists it, `./dev NAME` runs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OLDEST = PYTHONS[0]
"""Runs with every dependency at the floor that pyproject.toml declares, the rest at the newest."""
BUILT: list[Path] = []
"""The wheel, once it is built."""
WITH_PIP = ["--seed"]
"""Some tests install and download packages as a user does, with pip, which uv leaves out."""

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.sessions = ["lint", "types", "test"]

# uv takes the interpreters that are there; it never fetches one.
os.environ["UV_PYTHON_DOWNLOADS"] = "never"
# Servers and agents are started by the dozen: without bytecode `import mlflow` takes 5 s, not 1.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def build(session: nox.Session, directory: Path) -> Path:
    """Build the sdist, and from it the wheel; returns the wheel.

    One wheel is for all sessions of a call: the first that needs it builds it.
    """
    if BUILT:
        return BUILT[0]
    shutil.rmtree(directory, ignore_errors=True)
    session.install("build[uv]")
    session.run(
        "python", "-m", "build", "--installer=uv", f"--outdir={directory}", str(ROOT), silent=True
    )
    BUILT.extend(directory.glob("*.whl"))
    return BUILT[0]


def run_suite(
    session: nox.Session, marks: str = "not soak and not browser", *arguments: str
) -> None:
    """Run the tests with these marks against the built wheel, out of reach of the checkout.

    Up to four at a time, each worker with an MLflow server of its own, and two more than there are
    cores: tests wait for deadlines and processes for half of their time. One that measures time
    compares it with what an idle agent takes beside it.
    """
    workers = min(4, (os.cpu_count() or 1) + 2)
    scratch = Path(session.create_tmp()).resolve()
    wheel = build(session, scratch / "dist")
    if session.python == OLDEST:
        floors = ("--resolution=lowest-direct", "--requirements=pyproject.toml", "--extra=test")
        session.install(*floors)
        session.install("--no-deps", str(wheel))
    else:
        session.install(f"{wheel}[test]")

    # Deadlines and kills on a machine with few cores: a test that fails once and then passes is
    # reported as rerun, a broken one fails every time. A record that is lost or stored twice is
    # never chance, so that is not run again.
    session.install("pytest-rerunfailures")

    tree = scratch / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    unwanted = shutil.ignore_patterns(
        ".*", "qitos_mlflow", "startup", "__pycache__", "build", "dist"
    )
    shutil.copytree(ROOT, tree, ignore=unwanted)
    session.chdir(tree)
    session.run("uv", "pip", "list", external=True)
    where = "from qitos_mlflow import __file__ as f; print(f); assert 'site-packages' in f"
    session.run("python", "-c", where)
    session.run(
        *(
            "python",
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"--numprocesses={workers}",
            "--dist=worksteal",
            "--durations=15",
            "-raR",  # Names what was rerun: a test that fails once in twenty is a bug.
            "--reruns=2",
            "--rerun-except=NotExactlyOnce",
            "-m",
            marks,
        ),
        *arguments,
        *session.posargs,
        # What tests/packaging installs: the wheel under test, and the tree it was made from.
        env={"WHEEL_UNDER_TEST": str(wheel), "SOURCE_TREE": str(ROOT)},
    )


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo: agents without a key or a network, logged to MLflow's local store."""
    session.install(".[qitos]")
    session.run("qitos-mlflow", "demo", *session.posargs)


@nox.session(venv_params=WITH_PIP)
def test(session: nox.Session) -> None:
    """Run the tests on the Python that runs this."""
    run_suite(session)


@nox.session(python=PYTHONS, venv_params=WITH_PIP)
def tests(session: nox.Session) -> None:
    """Run the tests on one Python; the oldest has every dependency at its declared floor."""
    run_suite(session)


@nox.session(venv_params=WITH_PIP)
def soak(session: nox.Session) -> None:
    """Run the endurance tests."""
    run_suite(session, "soak", "--timeout=1800", "--numprocesses=2")


@nox.session(venv_params=WITH_PIP)
def browser(session: nox.Session) -> None:
    """Look at MLflow's pages in a headless Chromium, which must be installed."""
    session.install("playwright")
    run_suite(session, "browser", "--numprocesses=0")


OTLP = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
"""What the benchmarks compare with; it must have the versions that mlflow's own parts have."""


@nox.session
def bench(session: nox.Session) -> None:
    """Measure all that the package costs, beside other ways: some minutes, or `-- --gate`."""
    session.install("--editable", ".[qitos]", *OTLP, "wandb", "matplotlib")
    session.run("python", "-m", "benchmarks.suite", *(session.posargs or ["--report"]))


@nox.session
def gate(session: nox.Session) -> None:
    """Measure only what has a bound: ratios to other ways within one run."""
    session.install("--editable", ".[qitos]", *OTLP)
    session.run("python", "-m", "benchmarks.suite", "--gate", *session.posargs)


@nox.session
def redaction(session: nox.Session) -> None:
    """Measure what redaction finds and what it takes wrongly, beside detect-secrets."""
    session.install("--editable", ".", "detect-secrets")
    session.run("python", "-m", "benchmarks.redaction", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff==0.17.*")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types."""
    session.install("--editable", ".[dev]")
    session.run("mypy", "--strict")


@nox.session(name="build")
def build_session(session: nox.Session) -> None:
    """Build sdist and wheel into dist/, and check what a package index would."""
    BUILT.clear()
    wheel = build(session, ROOT / "dist")
    session.install("twine")
    session.run("twine", "check", "--strict", *map(str, wheel.parent.iterdir()))
