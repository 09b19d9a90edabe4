"""The verb ``shadowkvm bench``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from cyclopts import App, Parameter
from rich.console import Group
from rich.text import Text

from shadowkvm import bench, report
from shadowkvm.terminal import FormatOption, OutputOption, QuietOption, check_folder, choose_format, emit, part_progress

__all__ = ["add_verbs"]

_MARKS: Final = {True: "yes", False: "no", None: ""}


def add_verbs(parent: App) -> None:
    """Hang the verb into the command line."""
    parent.command(
        bench_,
        name="bench",
        help_epilogue="""Examples:

    shadowkvm bench
    shadowkvm bench replay calls --quick
    shadowkvm bench events -o events.json""",
    )


def bench_(
    *sections: str,
    quick: Annotated[
        bool, Parameter(negative="", show_default=False, help="A tenth of the work: a look, no figures to quote.")
    ] = False,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> int:
    """Measure what the package costs on this machine, beside what real KVM and other tools take.

    A few minutes for all of it. What is asked is what the project asks of itself; a machine may be slower than that.
    Instructions (section events) are counted in a clone of the repository, with Rust and valgrind. docs/performance.md
    explains the figures.

    Parameters
    ----------
    sections
        events, replay, walker, calls, scaling, switches. [default: all]
    """
    chosen = choose_format(format_, output, ("table", "json"))
    check_folder(output)
    with part_progress("bench", quiet=quiet) as progress:
        done = bench.run(sections or None, quick=quick, progress=lambda _, part: progress(0, part))
    emit(json.dumps(done.to_dict(), indent=1) + "\n" if chosen == "json" else _tables(done), output)
    return 0


def _tables(done: bench.Report) -> Group:
    parts: list[Any] = [Text("  ".join(f"{key} {value}" for key, value in done.machine.items()))]
    if done.quick:
        parts.append(Text("--quick: not to be quoted"))
    for name, rows in done.rows.items():
        compared = any(row.other for row in rows)
        other = "KVM" if name in {"events", "scaling"} else "other"
        heads = ["", "here", *([other, "ratio"] if compared else []), "asked", "met", ""]
        lines = []
        for row in rows:
            cells = [row.name, f"{_figure(row.value)} {_unit(row.unit)}".rstrip()]
            if compared:
                cells += [_figure(row.other), f"{row.ratio:.3f}" if row.ratio is not None else ""]
            sign = ">=" if row.at_least else "<="
            cells += [f"{sign} {_figure(row.asked)}" if row.asked is not None else "", _MARKS[row.met], row.note]
            lines.append(cells)
        parts += [
            Text(),
            report.table(bench.SECTIONS[name].title, heads, lines),
            Text(" ".join(bench.SECTIONS[name].doc.split())),
        ]
    for name, why in done.skipped.items():
        parts += [Text(), Text(f"{bench.SECTIONS[name].title}: not measured. {why}")]
    return Group(*parts)


def _unit(unit: str) -> str:
    return "" if unit == "instructions" else unit


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"
