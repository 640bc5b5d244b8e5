"""One HTTP request and its answer, without a network."""

from __future__ import annotations

import requests

from qitos_mlflow.mlflow_plugin.server.http import Request

MLFLOW = b'{"experiment": {"experiment_id": "0"}}'
SECRET = "s3cr3t-of-a-user"


class FakeRequester:
    """A `Requester` with one answer for every path, kept in `paths`.

    `hops` are the statuses of the redirects that were followed on the way to the answer.
    """

    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.answer = (status, body, headers)
        self.hops: tuple[int, ...] = ()
        self.paths: list[str] = []

    def __call__(self, request: Request) -> requests.Response:
        self.paths.append(request.path)
        status, content, given = self.answer
        response = requests.Response()
        response.status_code = status
        response._content = content
        response.headers.update({"Content-Length": str(len(content)), **given})
        response.url = f"https://sso.example/login?token={SECRET}"
        for hop in self.hops:
            response.history.append(requests.Response())
            response.history[-1].status_code = hop
        return response
