"""Stories as pages: the steps, and the guest's and the shadow's tables side by side with what changed marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shadowkvm.explain.story import Entry, Story, escape

__all__ = ["body", "html"]

_STYLE: Final = """
.skvm{font:15px/1.45 system-ui,sans-serif;color:#1c2733;max-width:1180px}
.skvm h2{font-size:1.25em;margin:1.4em 0 .5em}
.skvm ol{padding-left:2.2em}.skvm li{margin:.45em 0}
.skvm .who{display:inline-block;min-width:3.2em;font-weight:600}
.skvm .cpu .who{color:#8a4b00}.skvm .kvm .who{color:#0b5394}.skvm .guest .who{color:#38761d}
.skvm code{font:13px ui-monospace,monospace;color:#5b6770}
.skvm .why{color:#5b6770;font-style:italic}
.skvm table{border-collapse:collapse;font:13px ui-monospace,monospace;margin:.3em 0}
.skvm td,.skvm th{padding:.15em .7em;border-bottom:1px solid #d8dee4;text-align:left}
.skvm .changed td{background:#fff3c4}
.skvm .side{display:flex;gap:2.5em;flex-wrap:wrap}
"""


def _entries(title: str, entries: Sequence[Entry], changed: set[tuple[str, int]]) -> str:
    rows = "".join(
        f"<tr{' class=changed' if (entry.table, entry.index) in changed else ''}><td>{entry.level}</td>"
        f"<td>{escape(entry.table)}[{entry.index}]</td><td>{entry.value:#x}</td><td>{escape(entry.meaning)}</td></tr>"
        for entry in entries
    )
    heads = "<tr><th>level</th><th>entry</th><th>value</th><th>says</th></tr>"
    return (
        f"<div><b>{escape(title)}</b><table>{heads}{rows or '<tr><td colspan=4>none was read</td></tr>'}</table></div>"
    )


def body(story: Story) -> str:
    """The story as HTML, to be put into a page."""
    steps = []
    for step in story.steps:
        function = f" <code>{escape(step.function)}</code>" if step.function else ""
        why = f"<div class=why>because {escape(step.why)}</div>" if step.why else ""
        steps.append(f"<li class={step.who}><span class=who>{step.who}</span> {escape(step.text)}{function}{why}</li>")
    changed = {(change.page.split()[0], change.index) for change in story.changes if change.index is not None}
    rows = "".join(
        f"<tr class=changed><td>{escape(change.what)}</td><td>{escape(change.text)}</td></tr>"
        for change in story.changes
    )
    counters = "".join(
        f"<tr><td>{name}</td><td>{value:+,}</td></tr>" for name, value in story.counters.nonzero().items()
    )
    return (
        f"<div class=skvm><style>{_STYLE}</style><h2>{escape(story.title)}</h2><ol>{''.join(steps)}</ol>"
        f"<div class=side>{_entries('Guest tables on the way', story.tables['guest'], set())}"
        f"{_entries('Shadow tables before (marked: changed)', story.tables['shadow'], changed)}</div>"
        f"<h2>What changed in the shadow</h2><table>{rows or '<tr><td>nothing</td></tr>'}</table>"
        f"<h2>Counters</h2><table>{counters}</table></div>"
    )


def html(stories: Sequence[Story], title: str = "shadowkvm explain") -> str:
    """A page of its own, with nothing to load."""
    parts = "<hr>".join(body(story) for story in stories)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<body style='margin:2em'>{parts}</body></html>\n"
    )
