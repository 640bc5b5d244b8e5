"""MLflow's endpoints in memory, behind a `Requester`: for runs by the hundred.

What it does with a request that comes a second time is what MLflow on sqlite does.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from qitos_mlflow.mlflow_plugin.server.http import Request
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.fakes.raw_server import KEPT, http

HEADER = b'{"experiment_name": "qitos"}'

Fault = str
"""``"reset"``: the connection breaks before the request arrives. ``"cut"``: it breaks once the
request is carried out. ``"page"``: a router in front of MLflow answers it."""


class MlflowRest:
    """A server of one process. `fails` says which request fails, and how, by its number."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """Method and path of each request, without ids."""
        self.fails: Callable[[int], Fault | None] = lambda number: None
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.spans: Counter[tuple[str, str]] = Counter()
        self.traces: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, bytes] = {}
        self._numbers = itertools.count()

    def __call__(self, request: Request) -> requests.Response:
        path = request.path.partition("?")[0]
        number = len(self.requests)
        self.requests.append(f"{request.method} {re.sub('/artifacts/.*', '/artifacts', path)}")
        fault = self.fails(number)
        if fault == "reset":
            raise requests.ConnectionError("Connection reset by peer")
        if fault == "page":
            return _response(404, b"404 page not found\n", "text/plain; charset=utf-8")
        status, answer = self._carry_out(request, path)
        if fault == "cut":
            raise requests.ConnectionError("Connection aborted")
        kind = "application/x-protobuf" if path == "/v1/traces" else "application/json"
        return _response(status, b"" if answer is None else orjson.dumps(answer), kind)

    def sink(self, header: bytes = HEADER, *, resumed: bool = False) -> MlflowSink:
        """A sink that delivers to it."""
        return MlflowSink(header, RestTransport("http://mlflow.test", self), resumed=resumed)

    def over_http(self, request: Request) -> Iterator[bytes]:
        """What it answers, as `raw_server` sends it."""
        found = self(request)
        yield http(found.content, f"{found.status_code} X", found.headers["Content-Type"])
        yield KEPT

    def logged(self) -> dict[str, Any]:
        """What a person sees: runs that are not deleted, by their trace, and traces."""
        names = {run_id: run["tags"]["qitos.trace_id"] for run_id, run in self.runs.items()}
        runs = [
            (names[run_id], {**run, "metrics": sorted(run["metrics"])})
            for run_id, run in self.runs.items()
            if not run["deleted"]
        ]
        assert len(runs) == len(dict(runs)), "a run was logged twice"
        infos = {key: orjson.dumps(info).decode() for key, info in self.traces.items()}
        for run_id, name in names.items():
            infos = {key: info.replace(run_id, name) for key, info in infos.items()}
        artifacts = {_named(path, names): data for path, data in self.artifacts.items()}
        return {
            "runs": dict(runs),
            "spans": sorted(self.spans),
            "traces": {key: orjson.loads(info) for key, info in infos.items()},
            "artifacts": artifacts,
        }

    def _carry_out(self, request: Request, path: str) -> tuple[int, Any]:
        if path == "/v1/traces":
            message = ExportTraceServiceRequest.FromString(request.body or b"")
            for resource in message.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self.spans[span.trace_id.hex(), span.span_id.hex()] += 1
            return 200, None
        if request.method == "PUT":
            self.artifacts[path] = request.body or b""
            return 200, {}
        body = orjson.loads(request.body) if request.body else {}
        answer = getattr(self, "_" + re.sub(r".*/mlflow/|\W", "", path.replace("/traces/m", "/m")))
        return answer(body, request.path)

    def _version(self, body: Any, path: str) -> tuple[int, Any]:
        return 404, {}  # A router keeps it to itself.

    def _experimentsget(self, body: Any, path: str) -> tuple[int, Any]:
        return 200, {"experiment": {"experiment_id": "0"}}

    def _experimentsgetbyname(self, body: Any, path: str) -> tuple[int, Any]:
        name = path.rpartition("=")[2]
        if name not in self.experiments:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": name}
        found = {"experiment_id": self.experiments[name], "lifecycle_stage": "active", "name": name}
        return 200, {"experiment": found}

    def _experimentscreate(self, body: Any, path: str) -> tuple[int, Any]:
        if body["name"] in self.experiments:
            return 400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": body["name"]}
        self.experiments[body["name"]] = f"{len(self.experiments) + 1}"
        return 200, {"experiment_id": self.experiments[body["name"]]}

    def _runscreate(self, body: Any, path: str) -> tuple[int, Any]:
        run_id = f"{next(self._numbers):032x}"
        tags = {tag["key"]: tag["value"] for tag in body["tags"]}
        self.runs[run_id] = {
            "name": body["run_name"],
            "experiment": body["experiment_id"],
            "deleted": False,
            "tags": tags,
            "params": {},
            "metrics": set(),
            "status": "RUNNING",
        }
        return 200, {"run": {"info": self._info(run_id), "data": {"tags": _pairs(tags)}}}

    def _runssearch(self, body: Any, path: str) -> tuple[int, Any]:
        wanted = re.split("['\"]", body["filter"])[1]
        found = [
            {"info": self._info(run_id), "data": {"tags": _pairs(run["tags"])}}
            for run_id, run in self.runs.items()
            if run["tags"]["qitos.trace_id"] == wanted and not run["deleted"]
        ]
        return 200, {"runs": found}

    def _runsdelete(self, body: Any, path: str) -> tuple[int, Any]:
        self.runs[body["run_id"]]["deleted"] = True
        return 200, {}

    def _runslogbatch(self, body: Any, path: str) -> tuple[int, Any]:
        run = self.runs[body["run_id"]]
        for param in body["params"]:
            assert run["params"].setdefault(param["key"], param["value"]) == param["value"]
        run["tags"].update({tag["key"]: tag["value"] for tag in body["tags"]})
        run["metrics"] |= {
            (metric["key"], metric["timestamp"], metric["step"], metric["value"])
            for metric in body["metrics"]
        }
        return 200, {}

    def _runsupdate(self, body: Any, path: str) -> tuple[int, Any]:
        self.runs[body["run_id"]].update(status=body["status"], end=body["end_time"])
        return 200, {"run_info": self._info(body["run_id"])}

    def _traces(self, body: Any, path: str) -> tuple[int, Any]:
        info = body["trace"]["trace_info"]
        self.traces[info["trace_id"]] = info
        return 200, body

    def _metrics(self, body: Any, path: str) -> tuple[int, Any]:
        return 200, {"data_points": []}

    def _info(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        return {
            "run_id": run_id,
            "run_name": run["name"],
            "experiment_id": run["experiment"],
            "artifact_uri": f"mlflow-artifacts:/1/{run_id}/artifacts",
        }


def _pairs(tags: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": text} for key, text in tags.items()]


def _named(path: str, names: dict[str, str]) -> str:
    for run_id, name in names.items():
        path = path.replace(run_id, name)
    return path


def _response(status: int, content: bytes, kind: str) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    response._content = content
    response.headers.update({"Content-Length": str(len(content)), "Content-Type": kind})
    return response
