"""A comparison as a page of its own, that reads well without explanation and needs nothing beside it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from typing import Final

from shadowkvm.compare.charts import crossover_chart, time_chart
from shadowkvm.compare.runs import Comparison
from shadowkvm.compare.words import (
    CROSSED,
    EXACT,
    REACH,
    called,
    causes,
    crossing_lines,
    per_unit,
    sentence,
    time_rows,
    what_ran,
)
from shadowkvm.costs import COST_INFO

__all__ = ["as_html"]

# Of each cost, the crossings nearest to it.
_CROSSINGS: Final = 12
_STYLE: Final = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c2733;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em;margin-bottom:.2em}h2{font-size:1.2em;margin:2em 0 .4em}
.answer{font-size:1.15em;background:#eef4fa;border-left:4px solid #0072b2;padding:.7em 1em}
table{border-collapse:collapse;font-size:.88em;margin:.6em 0}
td,th{padding:.25em .8em;border-bottom:1px solid #d8dee4;text-align:right;vertical-align:top}
td:first-child,th:first-child,td.t,th.t{text-align:left}
figure{margin:1em 0;overflow-x:auto}figcaption{color:#5b6770;font-size:.9em}
svg{max-width:100%;min-width:640px;height:auto}
.wide{overflow-x:auto}code{background:#f3f5f7;padding:.1em .3em}dt{font-weight:600}dd{margin:0 0 .4em 1.5em}
"""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    mark = " class=t" if text else ""
    head = "".join(f"<th{mark}>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td{mark}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def as_html(comparison: Comparison, command: Sequence[str] = ()) -> str:
    """The page. ``command``: the words that made it, shown at its end.

    Raises:
        ImportError: matplotlib is not there; the message names the extra.
    """
    title = f"{comparison.about['name']}: {len(comparison.runs)} ways to translate its addresses"
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(what_ran(comparison))}",
        f"; {escape(comparison.common())}</p>" if comparison.common() else "</p>",
        f"<p class=answer>{escape(sentence(comparison))}</p>",
        _exact(),
        _time(comparison),
        _crossings(comparison) if len(comparison.runs) > 1 else "",
        _counted(comparison),
        _costs(comparison),
        _again(command),
    ]
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _exact() -> str:
    rows = "".join(f"<dt>{escape(kind)}</dt><dd>{escape(what)}</dd>" for kind, what in EXACT)
    return f"<h2>What is exact, and what is modelled</h2><dl>{rows}</dl>"


def _time(comparison: Comparison) -> str:
    shown, (unit, found) = causes(comparison), time_rows(comparison)
    each = [] if per_unit(comparison, 1) is None else [f"exits per {comparison.about['unit']}"]
    heads = ["", "exits", *each, f"time, {unit}", "vs first", *(cause.label for cause in shown)]
    rows = [cells + [f"{part:.1%}" for part in parts] for cells, parts in found]
    meaning = "".join(f"<dt>{escape(cause.label)}</dt><dd>{escape(cause.what)}</dd>" for cause in shown)
    caption = "Modelled time by cause; each exit is counted where it belongs."
    return (
        f"<h2>Where the time goes</h2>{_figure(time_chart(comparison), caption)}{_table(heads, rows)}<dl>{meaning}</dl>"
    )


def _crossings(comparison: Comparison) -> str:
    parts = []
    for cost in CROSSED:
        lines = list(crossing_lines(comparison, cost, _CROSSINGS))
        none = f"the order is the same from {REACH[0]:,.0f} to {REACH[1]:,.0f} cycles"
        told = "".join(f"<li>{escape(line)}</li>" for line in lines or [none])
        parts.append(f"<p>As {escape(called(comparison, cost))} takes more or less:</p><ul>{told}</ul>")
    caption = (
        "Each line is one variant, all other costs as in the table below; dashed: what the table says. Where two lines "
        "cross (dots), the answer changes."
    )
    return f"<h2>When would the answer be another?</h2>{_figure(crossover_chart(comparison), caption)}{''.join(parts)}"


def _counted(comparison: Comparison) -> str:
    names = dict.fromkeys(name for run in comparison.runs for name in run.account.events.counts)
    rows = []
    for name in names:
        counts = [run.account.events.counts.get(name, 0) for run in comparison.runs]
        if any(counts):
            rows.append([name, *(f"{count:,}" if count else "-" for count in counts)])
    rows += [["TLB misses", *(f"{run.walk_misses:,}" for run in comparison.runs)]]
    counters = ""
    if comparison.shadow_runs:
        heads = ["", *(n for n, run in zip(comparison.names(), comparison.runs, strict=True) if run.nested is None)]
        body = [[name, *(f"{value:,}" for value in values)] for name, values in comparison.counters().items()]
        counters = f"<p>KVM's own counters under shadow paging:</p>{_table(heads, body)}"
    return f"<h2>What was counted</h2>{_table(['event', *comparison.names()], rows)}{counters}"


def _costs(comparison: Comparison) -> str:
    costs = comparison.costs
    rows = [
        [name, f"{cost.cycles:,.0f}", cost.given, COST_INFO[name], cost.source] for name, cost in costs.costs.items()
    ]
    heads = ["event", "cycles", "as given", "what", "source"]
    return (
        f"<h2>What an event takes: {escape(costs.name)}</h2><p>{escape(costs.title)}. A cycle is "
        f"{1 / costs.ghz:.3g} ns ({costs.ghz:g} GHz: {escape(costs.clock_source)}).</p>{_table(heads, rows, text=True)}"
    )


def _again(command: Sequence[str]) -> str:
    words = f"<p>This page again: <code>{escape(shlex.join(command))}</code></p>" if command else ""
    return f"{words}<p>shadowkvm {escape(version('shadowkvm'))}</p>"
