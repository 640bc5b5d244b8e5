"""A record goes to the server, workspace and experiment it was recorded for, or to none."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import sqlite3
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.utils.file_utils import path_to_local_sqlite_uri
from sqlalchemy.engine import make_url

from qitos_mlflow.cli import main
from qitos_mlflow.delivery import find_segments
from qitos_mlflow.mlflow_plugin.server.mlflow_client import StoreTransport
from qitos_mlflow.mlflow_plugin.sink import operations
from qitos_mlflow.settings import Settings
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, answer, toolbox
from tests.fakes.https import RecordingServer, recording_server
from tests.integration.agents import Agent
from tests.integration.faults import execute, leftover
from tests.integration.logged import AGENT, logged, run_script, runs_of
from tests.integration.made_store import make_store
from tests.integration.proxy import Proxy, Refuse
from tests.integration.server import MlflowServer
from tests.waiting import eventually

HEADER = "X-MLFLOW-WORKSPACE"
TEAMS = ("team-a", "team-b")
SECRET = "s3cr3t-of-a-user"
FLUSH_S = 45.0

Start = Callable[..., Agent]


def invoke(*arguments: str, **environ: str) -> str:
    """Run ``qitos-mlflow`` in this process, which has mlflow imported; returns what it says."""
    done = CliRunner().invoke(main, arguments, env=environ)
    assert done.exit_code == 0, done.output
    return done.output


# -- workspaces ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with a workspace for each team, beside the one called ``default``."""
    pytest.importorskip("mlflow.utils.workspace_context")
    server = MlflowServer(tmp_path_factory.mktemp("tenants"), "--enable-workspaces")
    server.start()
    for team in TEAMS:
        made = requests.post(f"{server.uri}/api/3.0/mlflow/workspaces", json={"name": team})
        assert made.ok, made.text
    yield server
    server.kill()


@pytest.fixture
def tenants(shared_tenants: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    return shared_tenants


def search(server: MlflowServer, workspace: str) -> list[dict[str, Any]]:
    """All runs of a workspace, each with its experiment's name and its tags."""
    found = []
    send = {"headers": {HEADER: workspace}, "timeout": 20}
    url = f"{server.uri}/api/2.0/mlflow"
    everything = {"max_results": 1000, "view_type": "ALL"}
    answer = requests.post(f"{url}/experiments/search", json=everything, **send).json()
    for experiment in answer.get("experiments", []):
        asked = {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}
        for run in requests.post(f"{url}/runs/search", json=asked, **send).json().get("runs", []):
            tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
            found.append({**run["info"], "experiment": experiment["name"], "tags": tags})
    return found


def in_experiment(server: MlflowServer, name: str) -> dict[str, list[str]]:
    """The status of each run in an experiment of this name, by workspace."""
    return {
        workspace: [run["status"] for run in search(server, workspace) if run["experiment"] == name]
        for workspace in ("default", *TEAMS)
    }


def test_a_workspace_that_is_set_in_between(tenants: MlflowServer, experiment_name: str) -> None:
    """Each run is in the workspace in which it was started, with one processor for all."""
    run_script(
        "import mlflow",
        AGENT,
        f"""
        from qitos_mlflow import MlflowTraceProcessor
        from qitos_mlflow.tracing import add_trace_processor
        add_trace_processor(MlflowTraceProcessor({experiment_name!r}))
        for workspace in ("team-a", "team-b", "team-a"):
            mlflow.set_workspace(workspace)
            agent.run(task="task", return_state=True)
        """,
        MLFLOW_TRACKING_URI=tenants.uri,
    )
    runs = in_experiment(tenants, experiment_name)
    assert runs == {"default": [], "team-a": ["FINISHED"] * 2, "team-b": ["FINISHED"]}


@pytest.mark.parametrize("workspace", ["", "team-b"])
@pytest.mark.parametrize("recorded", ["", "team-a"])
def test_what_was_recorded_offline_keeps_its_workspace(
    tenants: MlflowServer,
    run_agent: Start,
    experiment_name: str,
    monkeypatch: pytest.MonkeyPatch,
    recorded: str,
    workspace: str,
) -> None:
    """Whatever the variable says when it is delivered."""
    options = {
        "tracking_uri": tenants.uri,
        "experiment_name": experiment_name,
        "offline": True,
    }
    run_agent(options=options, env={"MLFLOW_WORKSPACE": recorded}).finish()
    monkeypatch.setenv("MLFLOW_WORKSPACE", workspace)
    invoke("sync")
    wanted: dict[str, list[str]] = {"default": [], "team-a": [], "team-b": []}
    wanted[recorded or "default"] = ["FINISHED"]
    assert in_experiment(tenants, experiment_name) == wanted


def test_another_teams_agent_leaves_what_a_killed_one_left(
    tenants: MlflowServer, run_agent: Start, experiment_name: str
) -> None:
    """Its own team's next agent delivers it, or `sync`."""
    options = {"tracking_uri": tenants.uri, "experiment_name": experiment_name}

    def start(workspace: str, **config: Any) -> Agent:
        return run_agent(options=options, env={"MLFLOW_WORKSPACE": workspace}, **config)

    killed = start("team-a", gates=["mid"])
    killed.wait_for("mid")
    eventually(lambda: [*find_segments(Settings.resolve().spool_dir)])
    killed.signal(signal.SIGKILL)
    killed.finish()
    other = start("team-b", gates=["over"])
    other.wait_for("over")
    eventually(lambda: in_experiment(tenants, experiment_name)["team-b"] == ["FINISHED"])
    other.go()
    other.finish()
    runs = in_experiment(tenants, experiment_name)
    assert runs["default"] == []
    assert runs["team-a"] in ([], ["RUNNING"])
    assert f"{HEADER}: team-a" in CliRunner().invoke(main, ["status"]).output.replace("\n", " ")
    same = start("team-a", gates=["over"])
    same.wait_for("over")
    eventually(lambda: "KILLED" in in_experiment(tenants, experiment_name)["team-a"])
    same.go()
    same.finish()
    runs = in_experiment(tenants, experiment_name)
    assert sorted(runs["team-a"]) == ["FINISHED", "KILLED"]
    assert runs["team-b"] == ["FINISHED"]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_tenants_with_one_spool_never_meet(
    tenants: MlflowServer, run_agent: Start, experiment_name: str, seed: int
) -> None:
    """Agents of random tenants, killed at random, on one spool: each record is its tenant's."""
    chance = random.Random(seed)
    started: list[tuple[str, str, Agent]] = []
    for _ in range(6):
        workspace = chance.choice(("default", *TEAMS))
        experiment = f"{experiment_name} {chance.choice('xy')}"
        agent = run_agent(
            options={
                "tracking_uri": tenants.uri,
                "experiment_name": experiment,
                "exit_timeout_s": chance.choice([0.0, 5.0]),
                "offline": chance.random() < 0.3,
            },
            env={"MLFLOW_WORKSPACE": "" if workspace == "default" else workspace},
            traces=2,
            tool_sleep_s=0.05,
            gates=["mid"],
        )
        started.append((workspace, experiment, agent))
        if len(started) % 2:
            continue
        for _, _, one in started[-2:]:
            one.wait_for("mid")
            one.go()
            if chance.random() < 0.5:
                one.wait_for(chance.choice(["end", "next"]))
                one.signal(signal.SIGKILL)
    wanted = {}
    for workspace, experiment, agent in started:
        for trace_id in agent.finish().trace_ids():
            wanted[trace_id] = (workspace, experiment)
    invoke("sync")
    found: dict[str, tuple[str, str]] = {}
    for workspace in ("default", *TEAMS):
        for run in search(tenants, workspace):
            if run["experiment"].startswith(experiment_name):
                assert run["tags"]["qitos.trace_id"] not in found
                assert run["status"] in ("FINISHED", "KILLED"), run
                found[run["tags"]["qitos.trace_id"]] = workspace, run["experiment"]
    lost = wanted.keys() - found.keys()  # Killed within milliseconds of their start.
    assert found == {key: place for key, place in wanted.items() if key not in lost}
    assert len(lost) <= 2


# -- another database ----------------------------------------------------------------------------


def test_a_server_that_comes_back_empty(
    mlflow_server: MlflowServer,
    tenants: MlflowServer,
    proxy: Proxy,
    experiment_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later runs go to their experiment by its name, not to a stranger's that has the old id.

    Another server behind the same address has another database.
    """
    monkeypatch.setattr(operations, "FRESH_S", 0.0)  # A server that is started takes longer.
    proxy.upstream_port = tenants.port
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        agent = ModelAgent(Model(answer(ADD), answer(FINAL)), toolbox())
        agent.run(task="task", return_state=True)
        assert processor.force_flush(FLUSH_S)
        [run] = runs_of(tenants.client, experiment_name)
        proxy.set(Refuse())
        proxy.upstream_port = mlflow_server.port
        proxy.set(None)
        # Its ids are numbers in a row.
        strangers = "0"
        while int(strangers) < int(run.experiment_id):
            strangers = mlflow_server.client.create_experiment(f"a stranger's {uuid.uuid4().hex}")
        before = where_all_is(mlflow_server)
        agent.run(task="task", return_state=True)
        assert processor.force_flush(FLUSH_S)
    [run_again] = runs_of(mlflow_server.client, experiment_name)
    ours = int(run_again.experiment_id)
    assert ours != int(run.experiment_id)
    added = where_all_is(mlflow_server) - before
    assert added == Counter({("runs", ours): 1, ("trace_info", ours): 1})


def where_all_is(server: MlflowServer) -> Counter[tuple[str, int]]:
    """How many runs and traces there are in each experiment, by its id."""
    tables = ("runs", "trace_info")
    found = [(name, ask(server.database, f"SELECT experiment_id FROM {name}")) for name in tables]
    return Counter((name, int(experiment)) for name, rows in found for (experiment,) in rows)


def a_strangers(directory: Path) -> Path:
    """A store whose first experiment, with the id that ours has in a new store, is a stranger's."""
    database = directory / "stranger.db"
    make_store(database)
    MlflowClient(f"sqlite:///{database}").create_experiment("a stranger's")
    return database


def stored(database: Path) -> list[tuple[str, str]]:
    """Experiment and status of each run in a store, as is on the disk now."""
    return ask(database, "SELECT e.name, status FROM runs JOIN experiments e USING (experiment_id)")


def ask(database: Path, question: str) -> list[Any]:
    """The rows of an answer."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(question).fetchall()


@pytest.mark.parametrize("fate", ["deleted", "deleted with its directory", "replaced"])
def test_a_local_store_that_is_another_one_now(tmp_path: Path, fate: str) -> None:
    """In a notebook that goes on, later runs go to the new store, in their own experiment."""
    database = tmp_path / "store" / "m.db"
    database.parent.mkdir()
    make_store(database)
    with logged(f"sqlite:///{database}", experiment_name="ours") as processor:
        agent = ModelAgent(Model(answer(ADD), answer(FINAL)), toolbox())
        agent.run(task="task", return_state=True)
        assert processor.force_flush(FLUSH_S)
        assert stored(database) == [("ours", "FINISHED")]
        if fate == "replaced":
            a_strangers(tmp_path).replace(database)
        elif fate == "deleted":
            database.unlink()
        else:
            shutil.rmtree(database.parent)
            database.parent.mkdir()
        for _ in range(2):
            agent.run(task="task", return_state=True)
            assert processor.force_flush(FLUSH_S)
    assert stored(database) == [("ours", "FINISHED")] * 2


def test_a_run_whose_store_is_replaced_is_in_no_other_one(run_agent: Start, tmp_path: Path) -> None:
    """The new store refuses what is left of it, and takes the next run of the process."""
    database, strangers = tmp_path / "m.db", a_strangers(tmp_path)
    make_store(database)
    options = {"tracking_uri": f"sqlite:///{database}", "experiment_name": "ours"}
    agent = run_agent(options=options, traces=2, gates=["mid"])
    agent.wait_for("mid")
    eventually(lambda: stored(database) == [("ours", "RUNNING")])
    strangers.replace(database)
    agent.go()
    agent.finish()
    assert stored(database) == [("ours", "FINISHED")]
    question = "SELECT e.name FROM trace_info JOIN experiments e USING (experiment_id)"
    assert ask(database, question) == [("ours",)]
    found = json.loads(invoke("status", "--json"))
    assert found["waiting"] == 0
    assert any("RESOURCE_DOES_NOT_EXIST" in reason for reason in found["dead_letters"])


def test_a_store_that_is_deleted_while_sync_delivers(
    run_agent: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs that it has not created yet go to the new store, and it ends in order."""
    database = tmp_path / "m.db"
    make_store(database)
    options = {"tracking_uri": f"sqlite:///{database}", "offline": True}
    run_agent(options=options, traces=3).finish()
    create_run = StoreTransport.create_run

    def create_and_delete(self: StoreTransport, *args: Any) -> Any:
        made = create_run(self, *args)
        monkeypatch.setattr(StoreTransport, "create_run", create_run)
        database.unlink()
        return made

    monkeypatch.setattr(StoreTransport, "create_run", create_and_delete)
    invoke("sync", os.environ["QITOS_MLFLOW_SPOOL_DIR"])
    assert [status for _, status in stored(database)] == ["FINISHED"] * 2


# -- credentials ---------------------------------------------------------------------------------


@pytest.fixture
def another() -> Iterator[RecordingServer]:
    """A server that no one has configured credentials for; it takes nothing."""
    with recording_server() as server:
        server.status, server.body = 401, b"{}"
        yield server


@pytest.mark.parametrize("configured", ["", "http://127.0.0.1:9"])
@pytest.mark.parametrize("command", [["sync", "--patience", "0"], ["status"]])
def test_a_segment_sends_no_credentials_anywhere(
    run_agent: Start,
    another: RecordingServer,
    monkeypatch: pytest.MonkeyPatch,
    configured: str,
    command: list[str],
) -> None:
    """A segment is data from a disk; who wrote it may want the environment's token."""
    run_agent(options={"tracking_uri": another.uri, "offline": True}).finish()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    if configured:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", configured)
    CliRunner().invoke(main, command)
    assert another.heads
    assert all("authorization" not in head for head in another.heads)


@pytest.mark.parametrize("by", ["variable", "option"])
def test_the_server_that_is_named_gets_them(
    run_agent: Start, another: RecordingServer, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """By ``MLFLOW_TRACKING_URI``, whatever slash it ends in, or on the command line."""
    run_agent(options={"tracking_uri": another.uri, "offline": True}).finish()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    if by == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{another.uri}/")
    option = ["--tracking-uri", another.uri] if by == "option" else []
    done = CliRunner().invoke(main, ["sync", "--patience", "0", *option])
    assert another.heads[0]["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in done.output


def test_a_running_agent_delivers_to_no_server_that_a_segment_names(
    run_agent: Start, mlflow_server: MlflowServer, another: RecordingServer, experiment_name: str
) -> None:
    """Leftovers for other servers wait until someone asks for them."""
    killed = run_agent(options={"tracking_uri": another.uri, "exit_timeout_s": 0.0})
    killed.finish()
    another.heads.clear()
    options = {"tracking_uri": mlflow_server.uri, "experiment_name": experiment_name}
    agent = run_agent(options=options, gates=["over"])
    agent.wait_for("over")
    eventually(lambda: len(runs_of(mlflow_server.client, experiment_name)) == 1)
    agent.go()
    agent.finish()
    assert another.heads == []


def test_the_command_that_is_shown_delivers(
    run_agent: Start, monkeypatch: pytest.MonkeyPatch, another: RecordingServer
) -> None:
    """Also if the server was named in code and asks for credentials."""
    report = run_agent(
        options={"tracking_uri": another.uri, "exit_timeout_s": 0.5},
        env={"MLFLOW_TRACKING_TOKEN": SECRET},
    ).finish()
    command = leftover(report)[2]
    assert SECRET not in command
    another.heads.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with pytest.raises(AssertionError):
        execute(f"{command} --patience 0")
    assert another.heads[0]["authorization"] == f"Bearer {SECRET}"
    assert os.environ.get("MLFLOW_TRACKING_URI") is None


# -- places on disk ------------------------------------------------------------------------------


@pytest.mark.usefixtures("made_at_once")
@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("token=abcdef123456", None),
        ("auth=[a, b],secret=ü d", "sqlite:///{}/mlflow.db"),
    ],
)
def test_a_directory_that_is_called_like_a_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, uri: str | None
) -> None:
    """Runs go to its store, from the process and by the command that is shown, and nowhere else."""
    directory = tmp_path / "a" / name
    directory.mkdir(parents=True)
    monkeypatch.chdir(directory)
    database = directory / "mlflow.db"
    if uri is not None:
        make_store(database)
    else:  # It is made where MLflow would: with SQLAlchemy 2.0, in ``token%3D…`` beside.
        database = Path(make_url(path_to_local_sqlite_uri(str(database))).database or "")
    options = {
        "QITOS_TRACE_PLUGINS": "mlflow",
        "MLFLOW_TRACKING_URI": uri and uri.format(directory),
        "QITOS_MLFLOW_SPOOL_DIR": str(directory / "spool"),
    }
    offline = run_script(
        AGENT, 'agent.run("sum", render=False)', QITOS_MLFLOW_OFFLINE="1", **options
    )
    monkeypatch.chdir(tmp_path)
    words = shlex.split(offline.stderr.rpartition("deliver with: ")[2])
    begin = words.index("qitos-mlflow")
    invoke(*words[begin + 1 :], **dict(word.split("=", 1) for word in words[:begin]))
    client = MlflowClient(f"sqlite:///{database}")
    assert len(runs_of(client, "qitos")) == 1
    monkeypatch.chdir(directory)
    run_script(AGENT, 'agent.run("sum", render=False, trace=False)', **options)
    assert [run.status for run in runs_of(client, "qitos")] == ["FINISHED"] * 2
    assert [*tmp_path.rglob("mlflow.db")] == [database]


def test_a_tenant_whose_secret_is_in_the_path_gets_its_own_or_nothing(
    run_agent: Start, another: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the secret, the address may be another tenant's: it has to be named."""
    uri = f"{another.uri}/token={SECRET}"
    run_agent(options={"tracking_uri": uri, "offline": True}).finish()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{another.uri}/token=of-another-tenant")
    done = CliRunner().invoke(main, ["sync", "--patience", "0"])
    assert "--tracking-uri" in done.output
    assert another.heads == []
    done = CliRunner().invoke(main, ["sync", "--patience", "0", "--tracking-uri", uri])
    assert another.heads
    assert SECRET not in done.output
