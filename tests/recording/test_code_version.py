"""The version of the code in a trace's records, from real repositories."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow.recording import code_version
from qitos_mlflow.recording.code_version import CodeVersion
from tests.integration.logged import run_script

EXIT_S = 100.0
AUTHOR = ("-c", "user.name=A", "-c", "user.email=a@example.test")


def git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(where), *AUTHOR, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """git is asked once a process."""
    monkeypatch.setattr(code_version, "_lookup", None)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the program that runs, in its directory ``work/src``."""
    root = tmp_path / "work"
    script = root / "src" / "agent.py"
    script.parent.mkdir(parents=True)
    script.write_text("print(1)\n")
    git(tmp_path, "init", "-q", "-b", "topic/one", str(root))
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    monkeypatch.setattr(sys, "argv", [str(script)])
    return root


def found(version: CodeVersion | None = None) -> Any:
    """The version that a trace's records get: in its end, if not before."""
    version = version or CodeVersion()
    records = [{"kind": kind, "trace_id": "t"} for kind in ("trace_start", "span", "trace_end")]
    for record in records:
        version.complete(record, EXIT_S)
    code = [record["code"] for record in records if "code" in record]
    assert len(code) < 2, "each trace has it once"
    return code[0] if code else None


def test_a_clean_and_a_changed_checkout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit, branch, and whether files of the commit are changed; files beside it do not count."""
    (repository / "notes.txt").write_text("untracked")
    clean = {"commit": git(repository, "rev-parse", "HEAD"), "branch": "topic/one", "dirty": False}
    assert found() == clean
    (repository / "src" / "agent.py").write_text("print(2)\n")
    assert found() == clean, "asked once a process"
    monkeypatch.setattr(code_version, "_lookup", None)
    assert found() == {**clean, "dirty": True}


@pytest.mark.parametrize(("reference", "known"), [({"id": "E"}, True), ({"run_id": "r"}, False)])
def test_an_evaluation_has_it_unless_its_run_is_the_users(
    reference: dict[str, str], known: bool, repository: Path
) -> None:
    """What is compared says which code was evaluated."""
    version, settings = CodeVersion(), {"evaluation": reference}
    kinds = ("evaluation_start", "evaluation_end")
    records: list[dict[str, Any]] = [
        {"kind": kind, "trace_id": "evaluation E", "settings": settings} for kind in kinds
    ]
    for record in records:
        version.complete(record, EXIT_S)
    assert any("code" in record for record in records) is known


def test_the_first_remote_without_credentials(repository: Path) -> None:
    """Its URL is that of the remote that is configured first, as MLflow's own."""
    git(repository, "remote", "add", "up", "https://me:s3cr3t@git.example.test/team/agent.git")
    git(repository, "remote", "add", "origin", "git@example.test:team/fork.git")
    assert found()["repository"] == "https://git.example.test/team/agent.git"


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    git(repository, "checkout", "-q", "--detach")
    assert found()["branch"] is None
    assert found(CodeVersion())["commit"]


def test_a_worktree_and_a_submodule(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the commit that is checked out there; changes within a submodule are its own."""
    allow = ("-c", "protocol.file.allow=always")
    git(repository, "worktree", "add", "-q", "-b", "two", str(tmp_path / "tree"))
    git(tmp_path, "init", "-q", str(tmp_path / "outer"))
    git(tmp_path / "outer", *allow, "submodule", "add", "-q", str(repository), "inner")
    git(tmp_path / "outer", "commit", "-q", "-m", "outer")
    (tmp_path / "outer" / "inner" / "src" / "agent.py").write_text("changed")
    states = {}
    for place in ("tree/src/agent.py", "outer/inner/src/agent.py", "outer/.gitmodules"):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / place)])
        monkeypatch.setattr(code_version, "_lookup", None)
        states[place] = found()
    commit = git(repository, "rev-parse", "HEAD")
    tree, inner, outer = states.values()
    assert (tree["commit"], tree["branch"], tree["dirty"]) == (commit, "two", False)
    assert (inner["commit"], inner["dirty"]) == (commit, True)
    assert outer["commit"] == git(tmp_path / "outer", "rev-parse", "HEAD")
    assert outer["dirty"] is False


def test_an_installed_command_belongs_to_the_working_directory(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that its repository ignores, as one in an environment, is not the program."""
    command = tmp_path / "other" / ".venv" / "bin" / "qit"
    command.parent.mkdir(parents=True)
    command.write_text("#!python\n")
    git(tmp_path, "init", "-q", str(tmp_path / "other"))
    (tmp_path / "other" / ".gitignore").write_text(".venv\n")
    git(tmp_path / "other", "add", ".")
    git(tmp_path / "other", "commit", "-q", "-m", "other")
    monkeypatch.setattr(sys, "argv", [str(command)])
    monkeypatch.chdir(repository)
    assert found()["commit"] == git(repository, "rev-parse", "HEAD")


def test_variables_of_a_hook_name_no_other_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert found()["branch"] == "topic/one"


def test_a_directory_that_is_gone(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program was started as `python agent.py`, in a directory that it has removed."""
    monkeypatch.setattr(sys, "argv", ["agent.py"])
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert found() is None


def test_git_asks_nobody_and_connects_to_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that has only a part of its files would get the others, with a password."""
    commands, said = tmp_path / "commands", tmp_path / "said"
    commands.mkdir()
    (commands / "git").write_text(
        f'#!/bin/sh\necho "$GIT_TERMINAL_PROMPT $GIT_NO_LAZY_FETCH" >> {said}\nexit 1\n'
    )
    (commands / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    assert found() is None
    assert {*said.read_text().splitlines()} == {"0 1"}


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is known, and nothing is reported."""
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert found() is None
    monkeypatch.setattr(code_version, "_lookup", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found() is None


@pytest.fixture
def git_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A git that waits for a file system that is gone: a FIFO; opening it for writing ends this."""
    commands = tmp_path / "commands"
    commands.mkdir()
    fifo = commands / "gone"
    os.mkfifo(fifo)
    (commands / "git").write_text(f"#!/bin/sh\nread line < {fifo}\nexit 1\n")
    (commands / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    yield fifo
    for thread in threading.enumerate():
        if thread.name == "qitos-mlflow-code-version":
            thread.join(20)
            assert not thread.is_alive()


def test_a_git_that_hangs_holds_no_record(
    git_that_hangs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace's end waits no longer than its bound; git is ended; a later trace goes without."""
    monkeypatch.setattr(code_version, "WAIT_S", 0.0)
    monkeypatch.setattr(code_version, "LOOKUP_S", 0.5)
    version = CodeVersion()
    assert found(version) is None
    lookup = code_version._lookup
    assert lookup is not None
    assert lookup.known.wait(20)
    assert found(version) is None


def test_a_git_that_hangs_ends_with_the_process(tmp_path: Path) -> None:
    """Short scripts on a slow disk would leave one each."""
    commands, pid = tmp_path / "commands", tmp_path / "pid"
    commands.mkdir()
    (commands / "git").write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 100\n")
    (commands / "git").chmod(0o755)
    script = """
        import pathlib, time
        from qitos_mlflow.recording import code_version
        lookup, pid = code_version._lookup_of_process(), pathlib.Path("pid")
        while lookup.child is None or not (pid.exists() and pid.read_text().strip()):
            time.sleep(0.01)
    """
    run_script(script, PATH=f"{commands}{os.pathsep}{os.environ['PATH']}")
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    until = time.monotonic() + 20
    while state.exists() and ") Z " not in state.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_takes_too_long_is_left_out(
    repository: Path, git_that_hangs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If git is too slow to compare all files, commit and branch are known all the same."""
    real = subprocess.run(["which", "-a", "git"], capture_output=True, text=True, check=True)
    slow = git_that_hangs.with_name("git")
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *status*) read line < {git_that_hangs};; esac\n'
        f'exec {real.stdout.split()[-1]} "$@"\n'
    )
    monkeypatch.setattr(code_version, "WAIT_S", 20.0)
    monkeypatch.setattr(code_version, "LOOKUP_S", 2.0)
    code = found()
    assert code["branch"] == "topic/one"
    assert code["dirty"] is None


def test_a_trace_that_begins_later_has_it_from_its_start(repository: Path) -> None:
    """A trace that is going when it becomes known gets it with its next record."""
    version = CodeVersion()
    first = {"kind": "trace_start", "trace_id": "first"}
    version.complete(first, EXIT_S)
    lookup = code_version._lookup
    assert lookup is not None
    assert lookup.known.wait(20)
    later = [{"kind": "span", "trace_id": "first"}, {"kind": "trace_start", "trace_id": "second"}]
    for record in later:
        version.complete(record, EXIT_S)
    assert ["code" in record for record in later] == ["code" not in first, True]


def test_a_fork_while_the_answer_comes(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the child its lock may be held for ever: a trace that began before does not wait."""
    version = CodeVersion()
    version.complete({"kind": "trace_start", "trace_id": "t"}, EXIT_S)
    lookup = code_version._lookup
    assert lookup is not None
    assert lookup.known.wait(20)
    version._without.add("t")
    monkeypatch.setattr(code_version, "WAIT_S", 20.0)
    end = {"kind": "trace_end", "trace_id": "t"}
    with lookup.known._cond:  # type: ignore[attr-defined]
        child = threading.Thread(target=version.complete, args=(end, EXIT_S), daemon=True)
        child.start()
        child.join(5)
        assert not child.is_alive()
    assert end["code"]


def test_a_forked_child_asks_for_itself(
    repository: Path, git_that_hangs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that had asked is the parent's."""
    monkeypatch.setattr(code_version, "LOOKUP_S", 0.5)
    code_version._lookup_of_process()
    if (pid := os.fork()) == 0:
        os._exit(int(code_version._lookup is not None))
    assert os.waitpid(pid, 0)[1] == 0
