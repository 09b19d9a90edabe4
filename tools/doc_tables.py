"""Print docs/reference.md: every counter, event, operation, flag and policy, from the engine's own tables.

python tools/doc_tables.py > docs/reference.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import shadowkvm as sk
from shadowkvm._core import OPS, STATUSES
from shadowkvm.policy import POLICIES

HEAD = """# Reference

Made by `tools/doc_tables.py` from the engine's tables; a test holds it to them. Names that begin with `x_` are
not KVM's.
"""
COUNTERS = """`vm.counters`, `cpu.counters`. A cumulative counter only rises, an instant one says how many there are
now, a peak is the greatest so far. Those of scope vcpu are summed over the vCPUs (of peaks the greatest)."""
EVENTS = """`vm.events` has the fields op, a, b, c, code, kind, vcpu, level, flag; `vm.event_text()` is the kernel's
text."""
FLAGS = """`shadowkvm.Flag`: bits of the field flags (SLOT_ADD has bits of its own). docs/recordings.md says when a
recording has them."""
OUTCOMES = """`outcome.status`; by its code in the array of `run(..., outcomes=True)`."""


def table(title: str, text: str, heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A section with a table."""
    lines = [f"## {title}", "", text, "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    counters = ((f"`{info.name}`", info.scope, info.kind, info.doc) for info in sk.COUNTER_INFO.values())
    events = ((info.code, f"`{info.name}`", info.doc) for info in sk.EVENT_INFO.values())
    ops = ((code, f"`{name}`", doc) for code, name, doc in OPS)
    flags = ((flag.value, f"`{flag.name}`") for flag in sk.Flag)
    outcomes = ((code, f"`{name}`") for code, name in enumerate(STATUSES))
    policies = ((f"`{p.name}:N`" if p.parameter else f"`{p.name}`", p.doc, p.source) for p in POLICIES.values())
    sections = [
        table("Counters", COUNTERS, ("name", "scope", "kind", "what moves it"), counters),
        table("Events", EVENTS, ("kind", "name", "when, and what its fields hold"), events),
        table("Operations", "`shadowkvm.Op`: the field op of a trace's rows.", ("code", "name", "what it does"), ops),
        table("Flags", FLAGS, ("bit", "name"), flags),
        table("Outcomes", OUTCOMES, ("code", "name"), outcomes),
        table(
            "Policies",
            "`Vm(policy=...)`, `shadowkvm run --policy`.",
            ("name", "what it does otherwise than KVM", "source"),
            policies,
        ),
    ]
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    sys.stdout.write(page())
