"""Pictures that agents look at: MLflow's page shows them, and its judges open them."""

from __future__ import annotations

import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Span, Trace
from mlflow.tracing.attachments import Attachment
from mlflow.tracing.client import TracingClient

from qitos_mlflow.cli import main
from qitos_mlflow.tracing import create_trace
from tests.integration.browser import Browser, Pages
from tests.integration.logged import logged, run_script
from tests.integration.made_store import make_store
from tests.integration.server import MlflowServer
from tests.pictures import base64, data_url, generation, png

FLUSH_S = 90.0
IMAGE = "css=img[src^='blob:']"
"""A picture that the page has fetched."""
LARGE = 400
"""Side of a picture that is too large to be inlined (pixels)."""


def only_trace(client: MlflowClient, experiment_name: str) -> Trace:
    experiment = client.get_experiment_by_name(experiment_name)
    (found,) = client.search_traces(locations=[experiment.experiment_id])
    return found


def generations(trace: Trace) -> list[Span]:
    return sorted(trace.search_spans(span_type="CHAT_MODEL"), key=lambda span: span.start_time_ns)


def addresses(span: Span) -> list[str]:
    """The addresses of the pictures in the span's one message."""
    _, *parts = span.inputs["messages"][0]["content"]
    assert {part["type"] for part in parts} <= {"image_url"}
    return [part["image_url"]["url"] for part in parts]


def opened(trace: Trace, address: str, uri: str) -> bytes:
    """The content of an attachment, as MLflow's judges open it."""
    parsed = Attachment.parse_ref(address)
    assert parsed is not None
    assert (parsed["trace_id"], parsed["content_type"]) == (trace.info.trace_id, "image/png")
    repository = TracingClient(uri)._get_artifact_repo_for_trace(trace.info)
    content: bytes = repository.download_trace_attachment(parsed["attachment_id"])
    assert parsed["size"] == len(content)
    return content


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """A server, which is also MLflow's own one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    return mlflow_server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local store; each test has an experiment of its own."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_store(database)
    return f"sqlite:///{database}"


@pytest.fixture(params=["server", "sqlite"])
def uri(request: pytest.FixtureRequest, mlflow_server: MlflowServer, store: str) -> str:
    """A server, and a local store."""
    return mlflow_server.uri if request.param == "server" else store


@pytest.fixture
def tracking_uri(uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also MLflow's own one, where its judges look."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_every_form_of_a_picture_is_an_attachment(
    tracking_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """QitOS's blocks, base64 or data URL, and those of providers; small ones and large ones.

    The server's page gets them, and the tool that MLflow gives its judges (MLflow 3.15) finds each.
    """
    pictures = [png(n, LARGE if n % 2 else 8, compressed=False) for n in range(6)]
    file = tmp_path / "screen.png"
    file.write_bytes(pictures[5])
    source = {"type": "base64", "media_type": "image/png", "data": base64(pictures[3])}
    blocks: list[dict[str, Any]] = [
        {"type": "image_base64", "data": base64(pictures[0]), "mime_type": "image/png"},
        {"type": "image_base64", "data": data_url(pictures[1]), "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": data_url(pictures[2])}},
        {"type": "image", "source": source},
        {"inline_data": {"mime_type": "image/png", "data": base64(pictures[4])}},
        {"type": "image_file", "path": str(file), "detail": "high"},
    ]
    with logged(tracking_uri, experiment_name=experiment_name) as processor:
        with create_trace("looks") as trace:
            generation(trace, *blocks)
        assert processor.force_flush(FLUSH_S) is True
    found = only_trace(MlflowClient(tracking_uri), experiment_name)
    (span,) = generations(found)
    assert [opened(found, address, tracking_uri) for address in addresses(span)] == pictures
    if tracking_uri.startswith("http"):
        wanted = {"request_id": found.info.trace_id, "path": addresses(span)[0][20:56]}
        page = f"{tracking_uri}/ajax-api/3.0/mlflow/get-trace-artifact"
        assert requests.get(page, params=wanted, timeout=30).content == pictures[0]
    if find_spec("mlflow.genai.judges.tools.get_span_image"):
        tool = import_module("mlflow.genai.judges.tools.get_span_image").GetSpanImageTool()
        seen = [tool.invoke(found, span.span_id, attachment_index=n).data_url for n in range(6)]
        assert seen == [data_url(one) for one in pictures]


def test_a_file_that_is_overwritten_shows_each_step_its_own(
    server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A desktop's screenshots are one file; what a step saw is what it shows."""
    screens, uri = [png(shade, LARGE) for shade in range(4)], server.uri
    file = tmp_path / "screen.png"
    with logged(uri, experiment_name=experiment_name) as processor:
        with create_trace("looks") as trace:
            for screen in (*screens, screens[-1]):
                file.write_bytes(screen)
                generation(trace, {"type": "image_file", "path": str(file)})
            file.unlink()
        assert processor.force_flush(FLUSH_S) is True
    found = only_trace(server.client, experiment_name)
    shown = [addresses(span)[0] for span in generations(found)]
    assert [opened(found, address, uri) for address in shown] == [*screens, screens[-1]]
    assert shown[-1] == shown[-2]


INSIDE = """
import mlflow
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.tracing import create_trace, set_trace_processors
from tests.pictures import data_url, generation, png

large = data_url(png(5, {large}, compressed=False))
spool, spooled = RecordPipeline.normalize, []
RecordPipeline.normalize = lambda *args: spooled.append(spool(*args)) or spooled[-1]
for uri in {uris!r}:
    spooled.clear()
    mlflow.set_tracking_uri(uri)
    set_trace_processors([processor := MlflowTraceProcessor()])
    mlflow.set_experiment({experiment!r})
    with mlflow.start_span("the user's"), create_trace("looks") as trace:
        for _ in range(3):
            blocks = [{{"type": "image_url", "image_url": {{"url": url}}}}
                      for url in (large, data_url(png(6)))]
            generation(trace, *blocks, {{"type": "image_file", "path": "screen.png"}})
    mlflow.flush_trace_async_logging()
    assert processor.force_flush(90.0)
    assert spooled and not [one for one in spooled if large[30:100].encode() in one]
"""


def test_inside_a_span_of_mlflow_they_are_in_its_trace(
    server: MlflowServer, store: str, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow's tracer sends them, each once; the spool has none. To a server, and locally."""
    pictures = [png(5, LARGE, compressed=False), png(6), png(8, LARGE, compressed=False)]
    Path("screen.png").write_bytes(pictures[2])
    uris = [server.uri, store]
    run_script(
        INSIDE.format(experiment=experiment_name, large=LARGE, uris=uris),
        _MLFLOW_SERVER_ARTIFACT_ROOT=str(tmp_path),
    )
    for uri in uris:
        found = only_trace(MlflowClient(uri), experiment_name)
        assert {span.name for span in found.data.spans} >= {"the user's", "m"}
        seen = [addresses(span) for span in generations(found)]
        assert seen == seen[:1] * 3
        assert [opened(found, address, uri) for address in seen[0]] == pictures


def test_a_conversation_sends_each_picture_once(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A model gets all pictures with each step; spool and server get each of them once."""
    screens: list[dict[str, Any]] = []
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        with create_trace("looks") as trace:
            for shade in range(12):
                side = 8 if shade < 4 else LARGE
                picture = base64(png(shade, side, compressed=False))
                screens.append({"type": "image_base64", "data": picture, "mime_type": "image/png"})
                generation(trace, *screens)
        assert processor.force_flush(FLUSH_S) is True
    found = only_trace(mlflow_server.client, experiment_name)
    assert [len(addresses(span)) for span in generations(found)] == [*range(1, 13)]
    assert len({*addresses(generations(found)[-1])}) == 12
    names = [path for path in mlflow_server.directory.rglob("attachments/*") if path.is_file()]
    of_trace = [path for path in names if found.info.trace_id in str(path)]
    assert len(of_trace) == 12


def test_what_is_no_picture_is_not_read(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A FIFO, a directory, a text and a file that is gone stay names; none holds the agent up."""
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "text.png").write_text("the secret of another program")
    names = ["fifo.png", "directory.png", "text.png", "gone.png"]
    paths = [str(tmp_path / name) for name in names]
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        with create_trace("looks") as trace:
            generation(trace, *({"type": "image_file", "path": path} for path in paths))
        assert processor.force_flush(FLUSH_S) is True
    found = only_trace(mlflow_server.client, experiment_name)
    (span,) = generations(found)
    lines = [f"[image: {path}]" for path in paths]
    assert span.inputs["messages"][0]["content"] == "\n".join(["Look.", *lines])


SCRIPT = """
import os
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.tracing import add_trace_processor, create_trace
from tests.pictures import generation

add_trace_processor(processor := MlflowTraceProcessor({experiment!r}, exit_timeout_s=0.5))
with create_trace("looks") as trace:
    generation(trace, {{"type": "image_file", "path": "screen.png"}})
    open("screen.png", "wb").close()
{end}
"""


@pytest.mark.parametrize(
    "end", ["", "processor.force_flush(1.0); os._exit(9)"], ids=["ended", "killed"]
)
def test_what_was_seen_survives_the_process(
    end: str, server: MlflowServer, experiment_name: str
) -> None:
    """Pictures are in the spool: another process delivers them, twice if it must."""
    picture = png(7, LARGE, compressed=False)
    Path("screen.png").write_bytes(picture)
    script = SCRIPT.format(experiment=experiment_name, end=end)
    run_script(script, MLFLOW_TRACKING_URI="http://127.0.0.1:9", check=False)
    synced = CliRunner().invoke(main, ["sync", "--tracking-uri", server.uri])
    assert synced.exit_code == 0, synced.output
    found = only_trace(server.client, experiment_name)
    (span,) = generations(found)
    assert opened(found, addresses(span)[0], server.uri) == picture


def test_without_content_there_are_none(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Neither inlined ones nor files leave the process, nor the names of files."""
    file = tmp_path / "screen.png"
    file.write_bytes(png(1, LARGE))
    with logged(
        mlflow_server.uri, experiment_name=experiment_name, capture_content=False
    ) as processor:
        with create_trace("looks") as trace:
            picture = {"type": "image_url", "image_url": {"url": data_url(png(2))}}
            generation(trace, picture, {"type": "image_file", "path": str(file)})
        assert processor.force_flush(FLUSH_S) is True
    found = only_trace(mlflow_server.client, experiment_name)
    text = found.to_json()
    assert not any(word in text for word in ("attachment", "picture", "screen.png", "base64"))
    directories = [path for path in mlflow_server.directory.rglob("attachments") if path.is_dir()]
    assert not [path for path in directories if found.info.trace_id in str(path)]


def test_they_can_be_left_inlined(
    mlflow_server: MlflowServer, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own variable for this: small ones stay, large ones become notes."""
    monkeypatch.setenv("MLFLOW_TRACE_EXTRACT_ATTACHMENTS", "false")
    small, large = (data_url(png(1, side, compressed=False)) for side in (8, LARGE))
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        with create_trace("looks") as trace:
            generation(
                trace, *({"type": "image_url", "image_url": {"url": u}} for u in (small, large))
            )
        assert processor.force_flush(FLUSH_S) is True
    (span,) = generations(only_trace(mlflow_server.client, experiment_name))
    _, first, second = span.inputs["messages"][0]["content"]
    assert first == {"type": "image_url", "image_url": {"url": small}}
    assert re.fullmatch(r"\[image/png, \d+ characters\]", second["text"])


@pytest.mark.browser
def test_the_page_shows_them(
    browser: Browser, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """In the conversation of a model call; the page has fetched it as an attachment."""
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        with create_trace("looks") as trace:
            picture = {"data": base64(png(90, LARGE)), "mime_type": "image/png"}
            generation(trace, {"type": "image_base64", **picture})
        assert processor.force_flush(FLUSH_S) is True
    found = only_trace(mlflow_server.client, experiment_name)
    pages = Pages(mlflow_server.uri, found.info.experiment_id)
    (span,) = generations(found)
    text = browser.page_shot(
        pages.trace(found.info.trace_id),
        tmp_path / "picture.png",
        click=[f"css=[data-testid='timeline-tree-node-{span.span_id}']", IMAGE],
        wait_for_text=["Seen."],
    )
    assert "mlflow-attachment" not in text
    assert browser.errors == []
