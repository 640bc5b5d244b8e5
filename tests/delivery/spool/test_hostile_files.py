"""Files of the spool that are none, and files that lie: each costs its own segment at most."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from qitos_mlflow.cli import main
from qitos_mlflow.delivery import (
    Counts,
    Delivery,
    Paths,
    find_segments,
    inspect_segment,
    purge,
    send_again,
    take,
)
from qitos_mlflow.delivery.leftovers import Deliveries, Leftovers
from qitos_mlflow.delivery.spool import files
from tests.fakes.hostile import CALLER, PLANTS, left_alone
from tests.fakes.sink import FakeServer, FakeSink, left_behind

if sys.platform == "win32":
    pytest.skip("POSIX has these files", allow_module_level=True)

GOOD = [b'{"n":1}', b'{"n":2}']
STEPS = 3000
"""More than all segments of a test take, also if each of their records is sent by itself."""


class Tolerant(FakeSink):
    """It has any state restored: what a state says is the real sink's to judge."""

    def restore(self, state: bytes) -> None:
        pass


def plant(spool: Path, kind: str) -> Paths:
    """A segment that is not as it should be, between two good ones."""
    left_behind(spool, GOOD[:1], CALLER)
    bad = left_behind(spool, [b"bad 1", b"bad 2"], CALLER, part_bytes=5000)
    left_behind(spool, GOOD[1:], CALLER)
    PLANTS[kind](bad)
    return bad


def plant_all(spool: Path) -> dict[str, Paths]:
    """A bad segment of each kind, with a good one before and behind them all."""
    bad = {}
    left_behind(spool, GOOD[:1], CALLER)
    for kind, make in PLANTS.items():
        bad[kind] = left_behind(spool, [b"bad 1", b"bad 2"], CALLER, part_bytes=5000)
        make(bad[kind])
    left_behind(spool, GOOD[1:], CALLER)
    return bad


def delivered(server: FakeServer) -> list[bytes]:
    return [record for record in server.accepted if record in GOOD]


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture(autouse=True)
def _server_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nowhere.db")


def test_status_goes_on_and_names_what_is_none_of_ours(spool: Path) -> None:
    """The good segments are shown whole; what cannot be a segment's file is named with its path."""
    bad = plant_all(spool)
    for command in (["status"], ["status", "--json"]):
        done = CliRunner().invoke(main, command)
        assert isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == 1
    found = json.loads(done.stdout)
    errors = {segment["segment"]: segment["error"] for segment in found["segments"]}
    waiting = {segment["segment"]: segment["waiting"] for segment in found["segments"]}
    good = waiting.keys() - {paths.stem for paths in bad.values()}
    assert [(waiting[stem], errors[stem]) for stem in good] == [(1, None)] * 2
    unnamed = [
        kind
        for kind, paths in bad.items()
        if left_alone(kind) and str(spool / paths.stem) not in (errors[paths.stem] or "")
    ]
    assert unnamed == []


@pytest.mark.parametrize("way", ["agent", "sync", "follow"])
def test_the_others_are_delivered(spool: Path, way: str) -> None:
    """A living agent, `sync` and its sidecar deliver all that is good, once and whole."""
    bad = plant_all(spool)
    server = FakeServer()

    def open_sink(header: bytes = b"") -> FakeSink:
        return Tolerant(server)

    if way == "agent":
        with closing(Leftovers(spool, lambda header: open_sink)) as leftovers:
            for _ in range(STEPS):
                leftovers.step()
                if len(delivered(server)) == len(GOOD):
                    break
    elif way == "follow":
        taking = Deliveries(spool, lambda paths: _taken(take(paths, open_sink, Counts())))
        with closing(taking):
            for _ in range(5):
                list(taking.round())
    else:
        for paths in find_segments(spool):
            with suppress(OSError):
                for one in filter(None, (paths, send_again(paths))):
                    _finish(take(one, open_sink, Counts(), b"{}"))
    assert sorted(delivered(server)) == GOOD
    stay = {paths.stem for paths in find_segments(spool) if paths.parts()}
    assert {paths.stem for kind, paths in bad.items() if left_alone(kind)} - stay == set()


def _taken(found: object) -> Delivery | None:
    return found if isinstance(found, Delivery) else None


def _finish(found: object) -> None:
    if isinstance(found, Delivery):
        with closing(found):
            for _ in range(STEPS):
                if found.step() is not None or found.circuit.problem:
                    return


@pytest.mark.parametrize("kind", [kind for kind in PLANTS if left_alone(kind)])
def test_what_is_planted_is_neither_read_nor_written(spool: Path, kind: str) -> None:
    """Nothing behind a link changes, and `spool purge` deletes the link or says what to remove."""
    bad = plant(spool, kind)
    elsewhere = spool.parent / "elsewhere"
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    for paths in (bad, *find_segments(spool)):
        for act in (inspect_segment, send_again, purge):
            with suppress(OSError):
                act(paths)
    assert before is None or elsewhere.read_bytes() == before
    assert all(path.name.startswith(bad.stem) for path in spool.iterdir())


@pytest.mark.parametrize("name", ["ack.tmp", "lost.tmp", "dead", "own"])
def test_a_hard_link_to_a_file_of_this_users_is_not_written(spool: Path, name: str) -> None:
    """It is a regular file of this user, whoever made the link. The good segments are delivered."""
    bad = plant(spool, "ack: zz")
    elsewhere = spool.parent / "elsewhere"
    elsewhere.write_bytes(b"of the user's")
    path = bad.directory / f"{bad.stem}.{name}"
    path.unlink(missing_ok=True)
    os.link(elsewhere, path)
    server, counts = FakeServer(), Counts()
    server.refuses = lambda record: "no" if record.startswith(b"bad") else None
    with closing(Deliveries(spool, lambda p: _taken(take(p, server.sink, counts)))) as taking:
        for _ in range(3):
            list(taking.round())
    for paths in find_segments(spool):
        counts.drop("queue_full")
        counts.save_losses(paths)
    assert elsewhere.read_bytes() == b"of the user's"
    assert sorted(delivered(server)) == GOOD


def test_a_refused_file_stays_until_a_person_removes_it(spool: Path) -> None:
    """Once it is gone, the segment is delivered like any other one."""
    bad = plant(spool, "fifo as own")
    server = FakeServer()
    with closing(Deliveries(spool, lambda p: _taken(take(p, server.sink, Counts())))) as taking:
        list(taking.round())
        assert b"bad 1" not in server.accepted
        bad.own.unlink()
        list(taking.round())
    assert server.accepted.count(b"bad 1") == 1
    assert list(spool.iterdir()) == []


@pytest.fixture
def owned_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Gives a file to another user: root does, others only see it so."""
    others: dict[tuple[int, int], int] = {}
    real = files._is_trusted

    def give(path: Path, uid: int) -> None:
        if os.geteuid() == 0:
            os.chown(path, uid, -1, follow_symlinks=False)
        status = path.lstat()
        others[status.st_dev, status.st_ino] = uid

    def is_trusted(status: os.stat_result) -> bool:
        uid = others.get((status.st_dev, status.st_ino))
        return real(status) if uid is None else uid in files._trusted

    monkeypatch.setattr(files, "_is_trusted", is_trusted)
    monkeypatch.setattr(files, "_trusted", set())
    return give


@pytest.mark.parametrize("name", ["seg", "ack", "own", "ship", "dead", "lost"])
def test_a_file_of_another_user_has_its_segment_left_alone(
    spool: Path, owned_by: Callable[[Path, int], None], name: str
) -> None:
    """`status` names it and its owner; the setting `spool_owners` has it delivered."""
    bad = plant(spool, "ack: zz")
    path = bad.part(0) if name == "seg" else bad.directory / f"{bad.stem}.{name}"
    path.touch()
    owned_by(path, 12_345)
    looked = inspect_segment(bad)
    assert looked.error is not None
    assert looked.error.filename == str(path)
    server = FakeServer()
    with closing(Deliveries(spool, lambda p: _taken(take(p, server.sink, Counts())))) as taking:
        list(taking.round())
        assert sorted(delivered(server)) == GOOD
        assert b"bad 1" not in server.accepted
        files.trust([12_345])
        list(taking.round())
    assert server.accepted.count(b"bad 1") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_agent_leaves_what_another_user_recorded_to_sync(
    spool: Path, owned_by: Callable[[Path, int], None]
) -> None:
    """Also of a user that is trusted: it would go with this user's credentials, to any place."""
    theirs = left_behind(spool, [b"theirs"], CALLER)
    left_behind(spool, GOOD, CALLER)
    for path in theirs.files():
        owned_by(path, 12_345)
    files.trust([12_345])
    server = FakeServer()
    with closing(Leftovers(spool, lambda header: lambda: Tolerant(server))) as leftovers:
        for _ in range(100):
            leftovers.step()
    assert delivered(server) == GOOD
    assert b"theirs" not in server.accepted


def modes(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o2775, 0o720])
def test_a_directory_of_this_user_is_taken_from_the_others(spool: Path, mode: int) -> None:
    """A spool that an older version has made under umask 000 is private from the next record on."""
    spool.mkdir()
    spool.chmod(mode)
    left_behind(spool, GOOD)
    assert modes(spool) == mode & ~0o022


def test_one_that_is_named_to_a_command_is_refused_and_not_changed(spool: Path) -> None:
    """The error says what to do. This user's own spool is repaired instead."""
    left_behind(spool, GOOD)
    spool.chmod(0o777)
    for command in ("status", "sync", "spool purge --yes"):
        done = CliRunner().invoke(main, [*command.split(), str(spool)])
        assert (done.exit_code, "chmod go-w" in done.output) == (2, True)
    assert modes(spool) == 0o777
    assert CliRunner().invoke(main, ["status"]).exit_code == 0
    assert modes(spool) == 0o755
    assert CliRunner().invoke(main, ["status", str(spool)]).exit_code == 0


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_all_directories_that_are_made_are_private(tmp_path: Path, umask: int) -> None:
    """The state directory is, too: else another user may put a spool in the place of ours."""
    before = os.umask(umask)
    try:
        files.make_directory(tmp_path / "state" / "qitos-mlflow" / "spool")
    finally:
        os.umask(before)
    made = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert [modes(path) for path in made] == [0o700] * 3


@pytest.mark.parametrize("owner", ["another", "root's, for all", "link of another"])
def test_a_directory_that_others_control_is_refused(
    spool: Path, owned_by: Callable[[Path, int], None], owner: str
) -> None:
    """The error names owner, mode and the setting; with that, it is accepted."""
    spool.mkdir()
    if owner == "link of another":
        link = spool.parent / "link"
        link.symlink_to(spool)
        spool = link
        owned_by(link, 12_345)
    elif owner == "another":
        owned_by(spool, 12_345)
    else:
        spool.chmod(0o1777)
    with pytest.raises(files.Untrusted) as refused:
        files.check_directory(spool)
    assert refused.value.filename == str(spool)
    assert "QITOS_MLFLOW_SPOOL_OWNERS" in str(refused.value)
    assert ("uid 12345" in str(refused.value)) == (owner != "root's, for all")
    files.trust([12_345])
    files.check_directory(spool)


def test_the_setting_names_users_of_a_shared_spool(
    spool: Path, owned_by: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume that its group may write is accepted by each command; ids and names are users."""
    left_behind(spool, GOOD)
    spool.chmod(0o2775)
    owned_by(spool, 12_345)
    assert CliRunner().invoke(main, ["status", str(spool)]).exit_code == 2
    monkeypatch.setenv("QITOS_MLFLOW_SPOOL_OWNERS", "root, 12345")
    assert CliRunner().invoke(main, ["status", str(spool)]).exit_code == 0
    assert modes(spool) == 0o2775
    monkeypatch.setenv("QITOS_MLFLOW_SPOOL_OWNERS", "no-such-user")
    refused = CliRunner().invoke(main, ["status", str(spool)])
    assert (refused.exit_code, "no-such-user" in refused.output) == (2, True)
