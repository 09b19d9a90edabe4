"""Story: steps in their order, and what they changed."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass, field
from typing import Any, Final

from shadowkvm.counters import Counters

__all__ = ["Change", "Entry", "Step", "Story"]

_WIDTH: Final = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that a walk read."""

    level: int
    table: str
    """Whose it is: "gfn 0x3" of the guest, "#2" of the shadow."""
    index: int
    value: int
    meaning: str
    """What it says, in words."""

    def __str__(self) -> str:
        return f"level {self.level}  {self.table}[{self.index}] = {self.value:#x}  {self.meaning}"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens."""

    who: str
    """"cpu", "kvm" or "guest"."""
    text: str
    function: str = ""
    """The function of KVM (Linux 6.1) that does it; "" for the CPU and the guest."""
    entries: tuple[Entry, ...] = ()
    """What was read."""
    why: str = ""
    """The reason of a decision."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is otherwise than before."""

    what: str
    """"page made", "page zapped", "entry", "unsync", "flood"."""
    page: str
    """The shadow page: number, frame, level."""
    index: int | None
    before: int | None
    after: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Story:
    """What one operation did.

    ``str(story)`` tells it; `html` makes a page with the tables side by side.
    """

    title: str
    steps: tuple[Step, ...]
    changes: tuple[Change, ...]
    """Of the shadow tables."""
    counters: Counters
    """What it added to the counters."""
    outcome: str
    tables: dict[str, Any] = field(repr=False)
    """For pictures: the guest's and the shadow's entries on the way."""

    def __str__(self) -> str:
        lines = [self.title, ""]
        for number, step in enumerate(self.steps, 1):
            name = f"  [{step.function}]" if step.function else ""
            lines += _wrapped(f"{step.text}{name}", f"{number:>2}. {step.who:<5} ")
            lines += [f"           {entry}" for entry in step.entries]
            if step.why:
                lines += _wrapped(f"because {step.why}", "           ")
        lines += ["", "What changed in the shadow:"]
        lines += [f"  {change.text}" for change in self.changes] or ["  nothing"]
        moved = {name: value for name, value in self.counters.nonzero().items() if not name.startswith("max_")}
        told = ", ".join(f"{name} {value:+d}" for name, value in moved.items())
        lines += ["", *_wrapped(told or "none moved", "Counters: ")]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything in the types of JSON; "schema" is shadowkvm.explain/1."""
        return {
            "schema": "shadowkvm.explain/1",
            "title": self.title,
            "outcome": self.outcome,
            "steps": [
                {
                    "who": step.who,
                    "text": step.text,
                    "function": step.function,
                    "why": step.why,
                    "entries": [
                        {
                            "level": entry.level,
                            "table": entry.table,
                            "index": entry.index,
                            "value": f"{entry.value:#x}",
                            "meaning": entry.meaning,
                        }
                        for entry in step.entries
                    ],
                }
                for step in self.steps
            ],
            "changes": [
                {
                    "what": change.what,
                    "page": change.page,
                    "index": change.index,
                    "before": None if change.before is None else f"{change.before:#x}",
                    "after": None if change.after is None else f"{change.after:#x}",
                    "text": change.text,
                }
                for change in self.changes
            ],
            "counters": self.counters.nonzero(),
        }


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=start, subsequent_indent=" " * max(len(start), 11), break_on_hyphens=False
    )


def escape(text: object) -> str:
    """For HTML."""
    return html.escape(str(text))
