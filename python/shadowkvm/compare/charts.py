"""A comparison as pictures: where modelled time goes, and where variants change places."""

from __future__ import annotations

import importlib
import io
import re
import textwrap
from typing import Any, Final

import numpy as np

from shadowkvm.compare.runs import Comparison
from shadowkvm.compare.words import CROSSED, called, causes, time_unit

__all__ = ["crossover_chart", "pyplot", "time_chart"]

# Okabe and Ito's eight: told apart by people who see colours otherwise, too.
_COLOURS: Final = ("#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#009e73", "#d55e00", "#999999", "#f0e442")
_DASHES: Final = ("-", "--", "-.", ":")
_POINTS: Final = 200
# The costs that are looked at: an exit from a fraction of today's to nested virtualisation, an entry from L1 to memory.
_RANGES: Final = {"exit": (100, 100_000), "walk_reference": (1, 300)}


def pyplot() -> Any:
    """Matplotlib, without a window.

    Raises:
        ImportError: it is not there; the message names the extra.
    """
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError('charts need matplotlib: pip install "shadowkvm[plot]"', name="matplotlib") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _settings() -> dict[str, Any]:
    # Text stays text, so that it can be read and searched; the same picture gives the same bytes.
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "shadowkvm",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _svg(plt: Any, figure: Any, prefix: str) -> str:
    """The picture as SVG; its names begin with a prefix, since a page holds several."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    text = out.getvalue()
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", text[text.index("<svg") :])


def time_chart(comparison: Comparison) -> str:
    """Modelled time of each variant, by cause: horizontal bars, as SVG."""
    plt = pyplot()
    runs, shown = comparison.runs, causes(comparison)
    size, unit = time_unit(max(run.account.seconds for run in runs))
    with plt.rc_context(_settings()):
        figure, axes = plt.subplots(figsize=(9, 1.4 + 0.45 * len(runs)))
        left = np.zeros(len(runs))
        where = np.arange(len(runs))
        colours = {cause.name: colour for cause, colour in zip(shown, _COLOURS, strict=False)}
        for cause in shown:
            widths = np.array([run.account.share(cause.name) * run.account.seconds / size for run in runs])
            axes.barh(where, widths, left=left, color=colours[cause.name], label=cause.label, height=0.7)
            left += widths
        for at, total in zip(where, left, strict=True):
            axes.text(total, at, f" {total:.3g} {unit}", va="center")
        axes.set_yticks(where, comparison.names())
        axes.invert_yaxis()
        axes.set_xlabel(f"modelled time, {unit}")
        axes.set_xlim(0, max(left.max(), 1e-12) * 1.14)
        if shown:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25 - 0.5 / len(runs)), ncols=4, frameon=False)
        return _svg(plt, figure, "time")


def crossover_chart(comparison: Comparison) -> str:
    """Modelled time of each variant over the cost of an exit and of an entry that a walk reads: lines, as SVG."""
    plt = pyplot()
    runs, names = comparison.runs, comparison.names()
    with plt.rc_context(_settings()):
        figure, panels = plt.subplots(1, len(CROSSED), figsize=(10.5, 4.2))
        for axes, cost in zip(panels, CROSSED, strict=True):
            x = np.geomspace(*_RANGES[cost], _POINTS)
            seen: list[float] = []
            for number, (run, name) in enumerate(zip(runs, names, strict=True)):
                fixed, slope = run.account.line(cost)
                y = np.array([comparison.costs.ns(fixed + slope * value) / 1e9 for value in x])
                style = {"color": _COLOURS[number % 7], "linestyle": _DASHES[number // 7 % 4]}
                axes.plot(x, np.where(y > 0, y, np.nan), label=name, **style)
                seen += y.tolist()
            for i, _, at in comparison.crossings(cost):
                fixed, slope = runs[i].account.line(cost)
                height = comparison.costs.ns(fixed + slope * at) / 1e9
                if _RANGES[cost][0] <= at <= _RANGES[cost][1] and height > 0:
                    axes.plot([at], [height], "o", color="black", markersize=4)
            axes.axvline(comparison.costs[cost], color="#888888", linewidth=0.8, linestyle="--")
            here = (comparison.costs[cost], 1.01)
            axes.annotate(
                comparison.costs.name, here, xycoords=("data", "axes fraction"), ha="center", parse_math=False
            )
            found = [value for value in seen if value > 0] or [1.0]
            low, high = min(found), max(found)
            axes.set(xscale="log", yscale="log", ylim=(max(low * 0.7, high * 1e-6), high * 1.5))
            axes.set_xlabel("\n".join(textwrap.wrap(f"{called(comparison, cost)}, cycles", 48)), parse_math=False)
        panels[0].set_ylabel("modelled time, s")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, frameon=False)
        return _svg(plt, figure, "crossover")
