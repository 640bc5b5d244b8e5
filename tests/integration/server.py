"""A real `mlflow server` on sqlite, which tests may stop, kill, freeze, lock and restart."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

from tests.integration.made_store import make_store

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05

# Below the ports that Linux and macOS hand out to clients: a stopped server's port must still
# be free when the test restarts it. So each worker of pytest-xdist ("gw0", "gw1", …) has its own.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = range(18_000 + WORKER % 12 * 1_000, 19_000 + WORKER % 12 * 1_000)


def free_port() -> int:
    """A port of 127.0.0.1 without a listener."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class MlflowServer:
    """One `mlflow server` process group; its port and its database survive `restart`.

    Args:
        directory: where database, artifacts and log are kept.
        options: of its command line.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.options = options
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = directory / "server.db"
        self.log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> MlflowClient:
        """A client for reading back; it never goes through a proxy."""
        return MlflowClient(self.uri)

    @property
    def running(self) -> bool:
        """Whether the process is there (it may be frozen)."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, and return as soon as the server answers.

        Raises:
            RuntimeError: it ended, or did not answer in time; the text ends with its log.
        """
        assert not self.running, "already running"
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.database.exists():
            make_store(self.database)
        command = [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.database}"),
            *("--artifacts-destination", str(self.directory / "artifacts")),
            *self.options,
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if "MLFLOW" not in name},
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # Else it looks prices up on the internet while a span waits to be stored: 7 s offline.
            "MLFLOW_MODEL_CATALOG_URI": "",
            "QITOS_TRACE_PLUGINS": "none",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until_healthy()

    def ensure_running(self) -> MlflowServer:
        """Start or thaw it if it does not run; returns itself."""
        if self.running:
            self.thaw()
        else:
            self.start()
        return self

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            time.sleep(POLL_S)
        self.kill()
        raise RuntimeError(f"mlflow server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """End it as an operator would, by SIGTERM; what is left after a while is killed."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the whole process group at once."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Stop and start again on the same port and database."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop its processes (SIGSTOP): the kernel accepts connections, and no answer comes."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after `freeze`; it answers what came in meanwhile."""
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def locked_database(self) -> Iterator[None]:
        """Hold the database's write lock, as another process in a long transaction would."""
        connection = sqlite3.connect(self.database, timeout=30, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            yield
        finally:
            connection.close()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
