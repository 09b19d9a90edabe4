"""The verb ``shadowkvm explain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from shadowkvm.explain import DEMOS, Story, demo, explain, explain_rows, html
from shadowkvm.replay import open_trace
from shadowkvm.terminal import OutputOption, UsageError, check_folder, emit
from shadowkvm.trace import Recording

__all__ = ["add_verbs"]

_SUFFIXES = {".html": "html", ".json": "json"}
_AT_ONCE = 100


def add_verbs(parent: App) -> None:
    """Hang the verb into the command line."""
    names = "\n".join(f"    {name:<12} {what.doc}" for name, what in DEMOS.items())
    parent.command(
        explain_,
        name="explain",
        help_epilogue=f"""Demonstrations:

{names}

Examples:

    shadowkvm explain demo unsync
    shadowkvm explain demo flood -o flood.html
    shadowkvm explain examples/recordings/fork20-demote64.npz 5000
    shadowkvm explain guest.npz 1200 --count 3 --policy no_unsync""",
    )


def explain_(
    what: str,
    which: str,
    /,
    *,
    count: Annotated[int, Parameter(help="How many rows, one story each.")] = 1,
    policy: Annotated[str | None, Parameter(help="Decisions of KVM to replace, see: shadowkvm policy list.")] = None,
    format_: Annotated[
        Literal["text", "html", "json"] | None,
        Parameter(name="--format", help="text, html (a page of its own) or json; else what the suffix of -o says."),
    ] = None,
    output: OutputOption = None,
) -> int:
    """Tell what one operation does: the CPU's walk, the exit, the decision, what changed, how it goes on.

    Of a demonstration (a small guest that shows one thing), or of a row of a trace, after all rows before it were run.
    docs/explain.md shows some.

    Parameters
    ----------
    what
        "demo", or a recording (.npz) or trace (.npy).
    which
        The demonstration's name, or the row's number, from 0.
    """
    check_folder(output)
    chosen = format_ or (_SUFFIXES.get(output.suffix) if output else None) or "text"
    if not 1 <= count <= _AT_ONCE:
        raise UsageError(f"--count {count} is not from 1 to {_AT_ONCE}")
    stories = _demo(which, policy) if what == "demo" else _rows(Path(what), which, count, policy)
    texts = {
        "text": lambda: "\n\n".join(map(str, stories)) + "\n",
        "html": lambda: html(stories),
        "json": lambda: json.dumps([story.to_dict() for story in stories], indent=1) + "\n",
    }
    emit(texts[chosen](), output)
    return 0


def _demo(name: str, policy: str | None) -> list[Story]:
    vm, acts = demo(name, policy=policy)
    return [explain(vm, act.call, act.title) for act in acts]


def _rows(path: Path, which: str, count: int, policy: str | None) -> list[Story]:
    if not which.isdecimal():
        raise UsageError(f"row {which!r}: a number from 0 on is expected")
    source = open_trace(path)
    try:
        return explain_rows(source, int(which), count, policy=policy)
    finally:
        if isinstance(source, Recording):
            source.close()
