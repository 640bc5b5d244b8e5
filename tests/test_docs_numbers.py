"""The numbers in the documentation are those of the code: constants, settings, limits of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
)

from qitos_mlflow import _guard
from qitos_mlflow.cli.sync import sync
from qitos_mlflow.delivery import backoff, leftovers, segment_transfer, spooling_thread
from qitos_mlflow.delivery.spool import files, line_format, locks, paths, reader, writer
from qitos_mlflow.mlflow_plugin.fluent import mlflow_tree
from qitos_mlflow.mlflow_plugin.mapping import run_totals
from qitos_mlflow.mlflow_plugin.server import connections, http, verdict
from qitos_mlflow.mlflow_plugin.sink import assessments, call_list, children, operations
from qitos_mlflow.recording import code_version, picture_files, recorder
from qitos_mlflow.redaction import trim
from qitos_mlflow.settings import Settings
from tests.integration import faults
from tests.redaction import corpus

DOCS = Path(__file__).parent.parent / "docs"
MIB = 1024 * 1024
DEFAULTS = Settings()
PATIENCE_S = {option.name: option.default for option in sync.params}["patience_s"]
WORDS = {3: "three", 4: "four", 5: "five", 7: "seven", 10: "ten"}

SENTENCES = {
    "spool.md": [
        f"A record waits at most {spooling_thread.APPEND_EVERY_S * 1000:g} ms in memory",
        f"The disk is tried again every {writer.DISK_RETRY_S:g} s",
        f"cannot be read for {reader.READ_S:g} s and {WORDS[reader.READ_TRIES]} tries",
        f"`too_many_params` (a run has {run_totals.MAX_PARAMS} at most)",
        f"once a processor remembers more than {recorder.ENDED_TRACES:,} traces",
        f"at least {WORDS[operations.SIGHTINGS]} times in a row over {operations.SIGHTINGS_S:g} s",
        f"For {WORDS[operations.FILES_PAUSE]} times as long as the last failure took",
        f"`spool_bytes` ({DEFAULTS.spool_bytes // MIB // 1024} GiB) bounds the segments",
        f"first trace may wait up to {code_version.WAIT_S:g} s in memory, for git",
        f"line of more than {line_format.LINE_BYTES // MIB} MiB",
        f"not larger than {files.FILE_BYTES // MIB} MiB",
        f"up to {writer.KEEP_SHARE:.0%} of the cap".replace("%", " %"),
        f"cut into parts of {writer.SegmentWriter.part_bytes // MIB} MiB",
        f"Once they take {reader.ASIDE_BYTES // MIB} MiB together",
        f"size of the directory at most every {paths.SCAN_S:g} s",
        f"no trace and no record for {spooling_thread.REST_S:g} s",
        f"after {leftovers.FIRST_LOOK_S:g} s and then every {leftovers.LOOK_EVERY_S:g} s",
        f"Each turn has about {leftovers.Leftovers.timeout_s:g} s",
        f"until its lock file is {locks.STALE_S / 3600:g} hours old",
        f"within the same {locks.SETTLE_S * 1000:g} ms",
        f"at growing intervals of {backoff.MAX_DELAY_S:g} s at most "
        f"({backoff.MAX_RETRY_AFTER_S:g} s",
    ],
    "transport.md": [
        f"hangs, the request fails after {http.REQUEST_TIMEOUT_S:g} s",
        f"{WORDS[MLFLOW_HTTP_REQUEST_MAX_RETRIES.default]} times, with growing pauses and a "
        f"timeout of {MLFLOW_HTTP_REQUEST_TIMEOUT.default} s each",
        f"is repeated for {call_list.FAILING_S:g} s and at least "
        f"{WORDS[call_list.FAILING_TRIES]} times",
        f"After {WORDS[operations.SIGHTINGS]} of them in a row over at least "
        f"{operations.SIGHTINGS_S:g} s",
        f"tried again every {WORDS[operations.LOOK_AGAIN_S / 60]} minutes",
        f"up to {verdict.NEVER_TOO_LARGE // 1024} KiB is not too large",
        f"alone at least {WORDS[segment_transfer.MAPPING_TRIES]} times over at least a second",
        f"redirects included | {http.REQUEST_TIMEOUT_S:g} s, or",
        f"a request beyond {http.SMALL_BYTES // 1024} KiB | 1 s more for every "
        f"{http.SLOWEST // 1024} KiB",
        f"| time to connect | {http.CONNECT_TIMEOUT_S:g} s for each address",
        f"as it arrives and unpacked | {connections.ANSWER_BYTES // MIB} MiB",
        f'"100 Continue" included | {connections.HEAD_BYTES // 1024} KiB',
        f"objects and lists in an answer | {verdict.MOST_PARTS:,} |",
        f"compared | {children.MOST_RUNS:,}, with {children.MOST_CHARS // MIB} MiB of text",
        f"a page of {children.PAGE} runs",
    ],
    "faults.md": [
        f"no callback takes more than {faults.ELSEWHERE_MS:g} ms",
        f"`sys.getswitchinterval()`, which is {faults.SWITCH_MS:g} ms",
        f"(`multiprocessing`), it is {faults.CROWDED_MS:g} ms",
        f"the start waits up to {DEFAULTS.start_timeout_s:g} s",
        f"exits up to {DEFAULTS.exit_timeout_s:g} s (`exit_timeout_s`) later",
        f"up to {DEFAULTS.local_exit_timeout_s:g} s (`local_exit_timeout_s`)",
        f"waits up to {mlflow_tree.STALL_S:g} s for MLflow's exporter",
        f"waits up to {assessments.WAIT_S:g} s for the trace, at most once a minute",
        f"first trace's end waits up to {code_version.WAIT_S:g} s in memory",
        f"up to {picture_files.WAIT_S:g} s, once while it hangs, and once in "
        f"{picture_files.PAUSE_S:g} s",
    ],
    "plugins.md": ["at most once a minute"],
    "../SECURITY.md": [
        f"{len(corpus.MAIN | corpus.OTHERS)} kinds of vendors' keys",
        f"main vendors in {len(corpus.PLACES)} places ({len(corpus.MAIN) * len(corpus.PLACES)})",
        f"it leaves {trim.MARGIN_CHARS:,} more characters",
    ],
    "cli.md": [f"[default: {PATIENCE_S};"],
}


@pytest.mark.parametrize(
    ("page", "sentence"),
    [(page, sentence) for page, sentences in SENTENCES.items() for sentence in sentences],
)
def test_a_number_is_that_of_the_code(page: str, sentence: str) -> None:
    """The page has the number that the code has now."""
    assert sentence in " ".join((DOCS / page).read_text("utf-8").split())


def test_once_a_minute_is_a_minute() -> None:
    """What docs/plugins.md and docs/faults.md call a minute is one."""
    assert _guard.LOG_EVERY_S == assessments.PAUSE_S == 60.0


def test_the_tests_allow_what_faults_md_says() -> None:
    """The limit of a trace's start in the tests is its setting, and a tenth of a second."""
    start_ms = DEFAULTS.start_timeout_s * 1000
    assert start_ms <= faults.START_MS <= start_ms + 100
