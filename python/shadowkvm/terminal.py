"""The terminal: data to stdout or a file, progress and messages to stderr."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import Parameter
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from shadowkvm import report
from shadowkvm._core import MODEL_VERSION
from shadowkvm.output import write_atomically

__all__ = [
    "Format",
    "FormatOption",
    "OutputOption",
    "QuietOption",
    "UsageError",
    "check_folder",
    "choose_format",
    "emit",
    "part_progress",
    "rows_progress",
    "say",
    "show_list",
]

Format = Literal["table", "json", "csv", "html"]

FormatOption = Annotated[
    Format | None,
    Parameter(name="--format", help="table (for people), json or csv; else what the suffix of -o says, else table."),
]
OutputOption = Annotated[
    Path | None, Parameter(name=["--output", "-o"], help="Write to this file instead of stdout: whole, or not at all.")
]
QuietOption = Annotated[
    bool, Parameter(name=["--quiet", "-q"], negative="", show_default=False, help="No progress on stderr.")
]

# Of what is printed to a file or a pipe.
_WIDTH: Final = 100
_SUFFIXES: Final[dict[str, Format]] = {
    ".json": "json",
    ".csv": "csv",
    ".html": "html",
    ".htm": "html",
    ".txt": "table",
    "": "table",
}


class UsageError(Exception):
    """A command line that cannot be; exit status 2."""


def choose_format(format_: Format | None, output: Path | None, allowed: Sequence[Format]) -> Format:
    """What was asked for, else what the suffix of the file says, else tables; UsageError if it is none of allowed."""
    suffix = output.suffix.lower() if output else ""
    if format_ is None and suffix not in _SUFFIXES:
        known = [key for key, name in _SUFFIXES.items() if key and name in allowed]
        raise UsageError(f"{output}: no format has the suffix {suffix} ({', '.join(known)} have); say --format")
    chosen = format_ or _SUFFIXES[suffix]
    if chosen not in allowed:
        raise UsageError(f"format {chosen} is not there for this command: {', '.join(allowed)}")
    return chosen


def check_folder(output: Path | None) -> None:
    """Refuse a file that cannot be written before the work is done, not after."""
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"the folder of {output} is not there")
    if output is not None and output.is_dir():
        raise UsageError(f"{output} is a folder")
    if output is not None and output.exists() and not output.is_file():
        raise UsageError(f"{output} is no file: it would be replaced")


def emit(what: str | RenderableType, output: Path | None) -> None:
    """Print, or write the file; people get colours and their own width on a terminal only."""
    if not isinstance(what, str):
        if output is None and sys.stdout.isatty():
            console = Console()
            console.width = max(console.width, _least_width(console, what))
            console.print(what)
            return
        plain = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        plain.width = max(_WIDTH, _least_width(plain, what))
        plain.print(what)
        text = plain.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
        what = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    if output is None:
        sys.stdout.write(what)
        sys.stdout.flush()
        return
    try:
        write_atomically(output, what)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from error


def _least_width(console: Console, what: RenderableType) -> int:
    """So wide that no number is cut in two."""
    return Measurement.get(console, console.options.update(max_width=1000), what).minimum


def show_list(
    title: str,
    fields: Sequence[str],
    rows: list[list[str]],
    *,
    schema: str,
    format_: Format | None,
    output: Path | None,
) -> None:
    """Show rows of text in the chosen format; in JSON under the title in lower case."""
    chosen = choose_format(format_, output, ("table", "json", "csv"))
    check_folder(output)
    if chosen == "json":
        key = title.lower()
        items = [dict(zip(fields, row, strict=True)) for row in rows]
        emit(json.dumps({"schema": schema, "model_version": MODEL_VERSION, key: items}, indent=1) + "\n", output)
    elif chosen == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([fields, *rows])
        emit(out.getvalue(), output)
    else:
        heads = [field if field != "doc" else "what" for field in fields]
        emit(report.table(f"{title} ({MODEL_VERSION})", heads, rows, left=len(fields)), output)


class _Speed(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


def _bar(*, quiet: bool, rows: bool) -> Progress:
    shown = [MofNCompleteColumn(), _Speed()] if rows else []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *shown, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty(), transient=True)


@contextmanager
def rows_progress(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of rows on stderr, if that is a terminal; gives what to call with the rows so far and in all."""
    with _bar(quiet=quiet, rows=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, _: bar.update(task, completed=done)


@contextmanager
def part_progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """A bar on stderr, if that is a terminal; gives what to call with a count and the part that is done."""
    with _bar(quiet=quiet, rows=False) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda _, part: bar.update(task, completed=part)


def say(message: str) -> None:
    """A message on stderr, under the program's name."""
    sys.stderr.write(f"shadowkvm: {message}\n")
