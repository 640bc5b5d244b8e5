"""Code, model and prompts of a trace's records, under MLflow's names."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from qitos_mlflow.mlflow_plugin.mapping.entities import PromptRef
from qitos_mlflow.mlflow_plugin.mapping.limits import TRACE_TAG_CHARS
from qitos_mlflow.mlflow_plugin.mapping.lineage import PROMPTS, prompts_in, prompts_tag
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import without_ids
from tests.mlflow_plugin.folding import fold, info_of
from tests.mlflow_plugin.records import Records

CODE = {"commit": "abc", "branch": None, "repository": "https://git.example.test/a", "dirty": False}
TAGS = {
    "mlflow.source.git.commit": "abc",
    "mlflow.source.git.repoURL": "https://git.example.test/a",
    "mlflow.source.git.dirty": "false",
}


@pytest.mark.parametrize("position", [0, 1, 2])
def test_run_and_trace_have_the_code_whichever_record_has_it(position: int) -> None:
    """What is not known is left out."""
    records = Records()
    trace = [records.start(), records.span("step"), records.end()]
    trace[position]["code"] = CODE
    state = fold(*trace)
    assert TAGS.items() <= dict(state.waiting.tags).items()
    assert TAGS.items() <= info_of(state)["trace_metadata"].items()
    assert "mlflow.source.git.branch" not in info_of(state)["trace_metadata"]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_tag_that_is_given_stays(position: int) -> None:
    records = Records()
    given = {"tags": {"mlflow.source.git.commit": "given"}}
    trace = [records.start(settings=given), records.span("step"), records.end()]
    trace[position]["code"] = CODE
    tags = dict(fold(*trace).waiting.tags)
    assert tags == {**tags, **TAGS, "mlflow.source.git.commit": "given"}


def test_the_model_is_one_of_the_server_it_was_recorded_for() -> None:
    """On another server its id says nothing, or names another model."""
    start = Records().start(settings={"model_id": "m-1"})
    assert info_of(fold(start))["trace_metadata"]["mlflow.modelId"] == "m-1"
    without_ids(start)
    assert "mlflow.modelId" not in info_of(fold(start))["trace_metadata"]


def test_a_resumed_run_names_the_one_before() -> None:
    """QitOS's ids, of the run itself and of the one to look for its checkpoint in."""
    ids = {"qitos_run_id": "run_2", "resumed_from": "run_1"}
    state = fold(Records().start(metadata=ids))
    expected = {"qitos.run_id": "run_2", "qitos.resumed_from": "run_1"}
    assert expected.items() <= dict(state.waiting.tags).items()
    assert expected.items() <= info_of(state)["tags"].items()


def test_prompts_are_a_tag_of_run_and_trace() -> None:
    records, prompt = Records(), PromptRef("greeting", "3")
    tag = prompts_tag([prompt])
    state = fold(records.start(), records.end(added={"tags": {PROMPTS: tag}}))
    assert dict(state.waiting.tags)[PROMPTS] == info_of(state)["tags"][PROMPTS] == tag
    assert orjson.loads(tag) == [{"name": "greeting", "version": "3"}]
    assert prompts_in(state.facts.trace_tags) == [prompt]


def test_more_prompts_than_there_is_room_for() -> None:
    """The first ones stay, and the text stays JSON."""
    prompts = [PromptRef(f"{number}" * 200, "1") for number in range(50)]
    tag = prompts_tag(prompts)
    assert len(tag) <= TRACE_TAG_CHARS
    found = prompts_in({PROMPTS: tag})
    assert 10 < len(found) < 50
    assert found == prompts[: len(found)]


@pytest.mark.parametrize("damaged", ["[", "{}", '["a"]', '[{"name": "a"}]', "[1]", "null"])
def test_a_damaged_tag_links_nothing(damaged: Any) -> None:
    assert prompts_in({PROMPTS: damaged}) == []
