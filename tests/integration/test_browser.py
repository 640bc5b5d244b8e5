"""The browser of the harness sees MLflow's pages; what they show of ours is tested elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.entities import Metric, RunTag

from tests.integration.browser import Browser, Pages
from tests.integration.server import MlflowServer

pytestmark = pytest.mark.browser


def test_a_run_page_is_rendered_and_photographed(
    browser: Browser, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The text of a run's page has its name, tag and metric, and the picture is a PNG."""
    client = mlflow_server.client
    experiment = client.create_experiment(experiment_name)
    run = client.create_run(experiment, run_name="photographed").info.run_id
    client.log_batch(run, [Metric("harness/metric", 0.25, 1, 0)], [], [RunTag("harness", "yes")])
    client.set_terminated(run)

    pages = Pages(mlflow_server.uri, experiment)
    text = browser.page_shot(
        pages.run(run),
        tmp_path / "run.png",
        wait_for_text=["photographed", "Finished", "harness/metric"],
    )
    assert "0.25" in text
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    charts = browser.page_shot(
        pages.run(run), click=["Model metrics"], wait_for_text=["Auto-refresh", "photographed"]
    )
    assert "harness\n(1)" in charts
    assert browser.errors == []


def test_other_machines_are_out_of_reach(browser: Browser, tmp_path: Path) -> None:
    """A page that wants something from another machine does not get it, and the test can see."""
    page = tmp_path / "page.html"
    page.write_text("<p>here</p><img src=http://192.0.2.1/pixel.png>")
    assert browser.page_shot(page.as_uri(), wait_for_text=["here"]) == "here"
    assert "http://192.0.2.1/pixel.png" in browser.refused
