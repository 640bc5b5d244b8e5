"""No record, however odd, stops the mapping: what it cannot use it leaves out."""

from __future__ import annotations

from typing import Any

import orjson
from google.protobuf.json_format import ParseDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.protos.service_pb2 import TraceInfoV3

from qitos_mlflow.mlflow_plugin.mapping.limits import KEY_CHARS, PARAM_CHARS, TAG_CHARS
from qitos_mlflow.mlflow_plugin.mapping.span_tree import locate
from qitos_mlflow.mlflow_plugin.sink.trace_state import Waiting
from qitos_mlflow.redaction.redact import redact
from qitos_mlflow.redaction.trim import trim_fields
from tests.mlflow_plugin.folding import fold, info_of, new_state

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_data_keys = st.sampled_from(
    [
        *("name", "model", "tools", "step_number", "observation", "decision", "tool_args"),
        *("input_content", "output_content", "model_response", "token_usage", "action_name"),
        *("tool_name", "server_name", "critic_name", "score", "data", "input_count"),
    ]
)
_metadata_keys = st.sampled_from(
    [
        *("agent_name", "task", "task_id", "benchmark_name", "tools", "success", "stop_reason"),
        *("final_result", "error", "linked_trace_id", "linked_span_id", "user", "x"),
    ]
)
_added = st.dictionaries(st.sampled_from(["attributes", "metrics", "tags", "x"]), _json) | _json
_types = st.sampled_from(
    ["agent", "step", "decide", "generation", "act", "tool", "mcp", "reduce", "critic", "handoff"]
)


def _record(kind: str, **fields: Any) -> Any:
    return st.fixed_dictionaries({"kind": st.just(kind), "trace_id": st.just("t")}, optional=fields)


_records = st.one_of(
    _record(
        "span",
        span_id=_json,
        parent_id=_json,
        type=_types | _json,
        step=_json,
        start_ns=_json,
        end_ns=_json,
        error=_json,
        exception=_json,
        output=_json,
        data=st.dictionaries(_data_keys, _json, max_size=5) | _json,
        added=_added,
    ),
    _record(
        "trace_start",
        name=_json,
        group_id=_json,
        time_ns=_json,
        user=_json,
        source=_json,
        parent_run_id=_json,
        metadata=st.dictionaries(_metadata_keys, _json, max_size=4) | _json,
        added=_added,
    ),
    _record(
        "trace_end",
        time_ns=_json,
        status=st.sampled_from(["FINISHED", "FAILED", "KILLED"]),
        error=_json,
        recorded=_json,
        dropped=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=2),
        metadata=st.dictionaries(_metadata_keys, _json, max_size=4) | _json,
    ),
)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=100)
@given(st.lists(_records, min_size=1, max_size=6))
def test_any_record_can_be_mapped(records: list[dict[str, Any]]) -> None:
    """Fields of any type in any order: the mapping goes on, and keeps to MLflow's limits."""
    state = new_state()
    written: set[str] = set()
    for record in records:
        state.waiting = Waiting()
        state = fold(redact(trim_fields(record, 1_000)), state=state)
        run = state.waiting
        orjson.dumps([metric.value for metric in run.metrics])
        assert all(isinstance(metric.value, float) for metric in run.metrics)
        assert all(len(metric.key) <= KEY_CHARS for metric in run.metrics)
        assert all(len(key) <= KEY_CHARS and len(value) <= PARAM_CHARS for key, value in run.params)
        assert all(len(key) <= KEY_CHARS and len(value) <= TAG_CHARS for key, value in run.tags)
        assert not written.intersection(key for key, _ in run.params)
        written.update(key for key, _ in run.params)
        for span in run.spans:
            assert len(span.SerializeToString()) > 0
            assert span.parent_span_id != span.span_id
        ParseDict(locate(info_of(state), "1", "r"), TraceInfoV3())
