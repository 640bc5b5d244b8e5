"""What an agent knows at each of its steps, recorded where it changes. Agent's thread.

An agent's state grows with every step, and each step has it several times: in what the step and its
decision got, and before and after the reduction. Here, parts of such a record that the page of
another span shows become notes such as ``[74 items as at step 37]``. Numbers, short texts and the
form stay, and what is new or changed stays as it is. A reader needs no more than the step that the
note names; if that step was lost, this shows.

Nothing depends on which objects the host hands out: agents change a state in place, replace it,
or give a copy. What the last step showed is kept as a copy with nothing but what JSON has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qitos_mlflow._guard import let_through
from qitos_mlflow.recording.differences import MORE, Note, Shorter, unchanged
from qitos_mlflow.recording.simpler import SlowTexts
from qitos_mlflow.recording.to_json import Snapshot, encode

SMALL_BYTES = 2048
"""As long as the records of an agent's steps are no larger, they show everything (bytes)."""

_FIELDS = {"step": "observation", "decide": "input_content", "reduce": "output_content"}
"""Which field of a span's data has the state, by the span's type."""

_NEW = ("decision", "action_results")
"""What is new in each observation."""


@dataclass
class _Shown:
    """The last step of an agent that was recorded."""

    given: Any
    """The host's observation."""
    kept: Any
    """A copy of it without `_NEW`, as it was at the step's end."""
    step: str
    whole: str
    """The last step that shows everything."""
    whole_bytes: int = 0
    later_bytes: int = 0
    """Sizes of the record of that step, and of those of the steps after it."""


class StepStates:
    """The agents of one trace, each with the last step that was recorded. Any thread."""

    def __init__(self) -> None:
        self._shown: dict[str, _Shown] = {}

    def encode(self, agent: str, record: dict[str, Any], slow: SlowTexts) -> Snapshot:
        """The record as `to_json.encode` makes it, without what the page of another span shows.

        Args:
            agent: id of the agent's span.
            record: of a span in the agent's own run. Its data is changed, but no value in it.
            slow: the trace's.

        Raises:
            MemoryError: there is too little memory, and nothing else.
        """
        kind = record["type"]
        if kind not in _FIELDS or _FIELDS[kind] not in record["data"]:
            if kind == "agent":
                self._shown.pop(agent, None)
            return encode(record, slow)
        if agent not in self._shown:
            whole = encode(record, slow)
            if kind == "decide" or whole.json_bytes <= SMALL_BYTES:
                return whole
        self._shorten(agent, kind, record["data"], Shorter(slow))
        return encode(record, slow)

    def _shorten(self, agent: str, kind: str, data: dict[str, Any], shorter: Shorter) -> None:
        field = _FIELDS[kind]
        try:
            if kind == "step":
                data[field] = self._step(agent, data, shorter)
            elif kind == "reduce":
                data[field] = _reduction(data[field], shorter)
            else:
                shown = self._shown[agent]
                shorter.note = _as_at(shown.step)
                # The host's decision gets the very object that the step before it ended with.
                got = _fields(data[field])
                same = type(got) is dict and data[field] is shown.given
                data[field] = shorter.value(got, got if same else shown.kept)
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 - a cycle, a class's own comparison, …
            let_through(error)
            self._shown.pop(agent, None)

    def recorded(self, agent: str, record: dict[str, Any], size: int | None) -> None:
        """The record has this size, or is lost (None): then the next step shows everything."""
        if record["type"] == "step" and (shown := self._shown.get(agent)):
            if size is None:
                del self._shown[agent]
            elif not shown.whole_bytes:
                shown.whole_bytes = size
            else:
                shown.later_bytes += size

    def _step(self, agent: str, data: dict[str, Any], shorter: Shorter) -> Any:
        given, step = data["observation"], f"step {data.get('step_number')}"
        last, kept, new = self._shown.get(agent), _fields(given), {}
        if type(kept) is dict:
            new = {key: kept.pop(key) for key in _NEW if key in kept}
        now = shorter.plain(kept, last and last.kept)
        before = None
        if last is None:
            self._shown[agent] = _Shown(given, now, step, step)
        else:
            before, shorter.note = last.kept, _as_at(last.step)
            last.given, last.kept, last.step = given, now, step
            # Everything again now and then, so that no reader has far to go. It adds as much as
            # the steps since then did, so all that is recorded grows with the steps only.
            if last.later_bytes >= last.whole_bytes:
                last.whole, last.whole_bytes, last.later_bytes, before = step, 0, 0, None
        brief = now if before is None else shorter.value(now, before)
        if type(brief) is not dict:
            return brief
        more = {} if last is None or brief is now else {MORE: f"[in full at {last.whole}]"}
        return {**more, **_once(brief, shorter), **new}


def _fields(observation: Any) -> Any:
    """A later host's observation, which is a kind of dict, as a dict; always another one."""
    kind = type(observation)
    return dict(dict.items(observation)) if issubclass(kind, dict) else observation


def _as_at(step: str) -> Note:
    def note(count: int, of: int, what: str) -> str:
        return f"[{count if count == of else f'{count} of {of}'} {what} as at {step}]"

    return note


def _as_in_env(count: int, of: int, what: str) -> str:
    return f"[{count} {what} as in env.observation]"


def _reduction(changes: Any, shorter: Shorter) -> Any:
    """The host's ``{field: {"before": …, "after": …}}`` without what is the same in both."""
    if type(changes) is not dict:
        return changes
    shorter.note, shown = unchanged, {}
    for name, change in changes.items():
        if type(change) is dict and change.keys() == {"before", "after"}:
            before, after = change["before"], change["after"]
            shorter.or_grown = True
            change = {"before": shorter.value(before, after), "after": after}
            shorter.or_grown = False
            change["after"] = shorter.value(after, before)
        shown[name] = change
    return shown


def _once(observation: dict[str, Any], shorter: Shorter) -> dict[str, Any]:
    """`observation` without what the environment's last result has of it, too."""
    env: Any = observation.get("env")
    last = env.get("last_result") if type(env) is dict else None
    if type(last) is not dict or "observation" not in last:
        return observation
    shorter.note = _as_in_env
    seen = shorter.value(last["observation"], env.get("observation"))
    return {**observation, "env": {**env, "last_result": {**last, "observation": seen}}}
