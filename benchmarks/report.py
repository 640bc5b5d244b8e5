"""Writes what the suite found into docs/: tables into benchmarks.md, and a plot of each axis."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.ticker import LogFormatter, NullFormatter

from benchmarks.contenders import CONTENDERS
from benchmarks.one_run import ROOT, Run
from benchmarks.suite import Axis, Samples, figure

PAGE = ROOT / "docs" / "benchmarks.md"
FOLDER = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- written by ./dev bench -->\n", "<!-- up to here -->"
COLOURS = {
    "plugin": "#c2410c",
    "batch": "#64748b",
    "otlp": "#1d4ed8",
    "mlflow": "#0f766e",
    "wandb": "#a16207",
    "blocking": "#7e22ce",
}


def plot(samples: Samples, axis: Axis) -> Path:
    """A line for each contender, named at its end; white behind, for light and dark pages."""
    drawn, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    ends = []
    for name in axis.contenders:
        values = [
            figure(samples, Run(name, row.load), axis.field, axis.added) for row in axis.rows()
        ]
        width = 2.5 if name == "plugin" else 1.5
        axes.plot(axis.values, values, color=COLOURS[name], marker="o", linewidth=width)
        ends.append((values[-1], name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(axis.values, [f"{value:,}" for value in axis.values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.set_xlabel(axis.label)
    axes.set_ylabel(axis.what)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0")
    # Names that would lie on each other are moved apart; the axis is logarithmic.
    low, high = axes.get_ylim()
    apart, last = (high / low) ** 0.06, 0.0
    for value, name in sorted(ends):
        last = max(value, last * apart)
        axes.annotate(
            CONTENDERS[name].title,
            (axis.values[-1], last),
            xytext=(8, 0),
            textcoords="offset points",
            color=COLOURS[name],
            va="center",
        )
    path = FOLDER / f"{axis.file}.png"
    drawn.savefig(path, dpi=110, facecolor="white")
    pyplot.close(drawn)
    return path


def write(samples: Samples, axes: Iterable[Axis], tables: Iterable[str]) -> None:
    """Replace the tables between the markers of the page, and the plots."""
    mpl.use("agg")
    FOLDER.mkdir(exist_ok=True)
    parts = list(tables)
    for axis in axes:
        name = plot(samples, axis).relative_to(PAGE.parent)
        parts.append(f"![{axis.what} against {axis.label}]({name})")
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after, "utf-8")
