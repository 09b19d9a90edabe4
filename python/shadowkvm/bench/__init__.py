"""What the package costs: the benches behind ``shadowkvm bench`` and docs/performance.md.

Each section measures one thing and gives rows; the rows carry what real KVM or another tool takes, and what is asked of
this package, where there is such a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from shadowkvm.bench import calls, events, replays, scaling, switches, walkers
from shadowkvm.bench.model import Report, Row, Section, Skipped, machine
from shadowkvm.checks import choice

__all__ = ["SECTIONS", "Report", "Row", "Section", "Skipped", "run"]

SECTIONS: Final[Mapping[str, Section]] = MappingProxyType(
    {
        section.name: section
        for section in (
            Section("events", "Instructions of one event", events.DOC, events.rows),
            Section("replay", "Trace replay", replays.DOC, replays.rows),
            Section("walker", "Addresses through an image", walkers.DOC, walkers.rows),
            Section("calls", "One call from Python", calls.DOC, calls.rows),
            Section("scaling", "Larger guests, more threads, memory", scaling.DOC, scaling.rows),
            Section("switches", "What is asked for besides", switches.DOC, switches.rows),
        )
    }
)
"""Every section by its name."""


def run(
    sections: Iterable[str] | None = None, *, quick: bool = False, progress: Callable[[str, float], None] | None = None
) -> Report:
    """Run benches.

    Args:
        sections: names in `SECTIONS`; None runs all.
        quick: a tenth of the work: for a look, not for figures to quote.
        progress: called with what is under way and the part of the whole that is done.

    Raises:
        ConfigError: an unknown section; the message has the nearest.

    >>> report = run(["calls"], quick=True)
    >>> report.rows["calls"][0].unit
    'ns'
    """
    names = [choice("section", name, SECTIONS) for name in (SECTIONS if sections is None else sections)]
    report = Report(machine(), quick)
    for done, name in enumerate(names):
        if progress:
            progress(SECTIONS[name].title, done / len(names))
        try:
            report.rows[name] = tuple(SECTIONS[name].rows(quick))
        except Skipped as why:
            report.skipped[name] = str(why)
    return report
