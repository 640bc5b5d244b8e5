"""States that earlier versions left in acknowledgements, in today's form. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping.run_totals import TOTALS


def of_earlier_version(plain: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A trace's state in the form of version 1 or 2, in today's form.

    Version 1 kept a state only of traces that had started and had not ended.

    Args:
        plain: the state.
        settings: the header's, which were those of each trace in version 1.
    """
    totals, tree = plain["totals"], plain["tree"]
    if "facts" not in plain:  # Version 1.
        start = dict(plain["start_tags"])
        facts = {**plain, **totals, "settings": dict(settings), "start_tags": start, "status": ""}
        if tree:
            later = {key: tag for key, tag in tree["tags"].items() if key not in start}
            facts["later_tags"] = {key: later[key] for key in later if key != "mlflow.traceName"}
            start_ns = None if tree["start_ns"] == totals["start_ns"] else tree["start_ns"]
            own = {"root_name": tree["name"], "root_start_ns": start_ns, "info_ns": tree["told_ns"]}
            tree = {**tree, **own}
        plain = {**plain, "facts": facts, "tree": tree, "has_info": plain["told"]}
    of_run = {**totals, "tokens": totals["total_tokens"]}
    sums = {key: of_run[key.removeprefix("total_")] for key in TOTALS}
    tools = {f"tool/{name}": numbers for name, numbers in totals["tools"].items()}
    models = {f"model/{name}": numbers for name, numbers in totals["models"].items()}
    for tool, (calls, errors, _) in tools.items():
        sums |= {f"{tool}/calls": calls, f"{tool}/errors": errors}
    of_model = ("prompt_tokens", "completion_tokens", "total_tokens", "generations")
    for model, numbers in models.items():
        sums |= {f"{model}/{key}": n for key, n in zip(of_model, numbers, strict=True)}
    latencies = {tool: sample[2] for tool, (*_, sample) in tools.items() if sample[2]}
    scores = [totals[key] for key in ("scores", "score_sum", "score_min", "score_max")]
    known = {"sums": sums, "groups": [*tools, *models], "latencies": latencies}
    found = {**totals, **known, "scores": scores if totals["scores"] else []}
    attempts = max(plain["creations"], plain["maybe_created"])
    return {**plain, "tree": tree, "totals": found, "attempts": attempts}
