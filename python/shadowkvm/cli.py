"""The command line: `shadowkvm VERB ...`.

Data go to stdout, progress and messages to stderr. Exit status: 0 fine; 1 the replay differs from what was recorded;
2 usage; 3 a bad input file; 4 an invariant of the engine broke; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError
from rich.console import Console, Group
from rich.text import Text

from shadowkvm import bench_verb, costs_verb, explain_verb, report, translate_verb, verify, workload_verbs
from shadowkvm._core import MODEL_VERSION, MODEL_VERSIONS
from shadowkvm.compare import verb as compare_verb
from shadowkvm.counters import COUNTER_INFO
from shadowkvm.errors import CostError, InvariantError, ShadowKvmError, TraceError
from shadowkvm.output import event_file
from shadowkvm.policy import POLICIES
from shadowkvm.replay import open_trace, replay
from shadowkvm.terminal import (
    Format,
    FormatOption,
    OutputOption,
    QuietOption,
    UsageError,
    check_folder,
    choose_format,
    emit,
    part_progress,
    rows_progress,
    say,
    show_list,
)
from shadowkvm.trace import Recording, import_raw

__all__ = ["main"]


_FIRST_FACTS: Final = ("name", "guest", "made", "mode", "memory", "vcpus", "sregs", "rows", "instructions", "faults")
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _examples(*lines: str) -> str:
    """What stands under the help of a verb."""
    return "\n".join(["Examples:", "", *(f"    {line}" for line in lines)])


app = App(
    name="shadowkvm",
    help="""Linux KVM's x86 shadow MMU as a library and a command.

Replay a recorded guest and see what shadow paging makes of it:

    shadowkvm run examples/recordings/fork20-demote64.npz
    shadowkvm run guest.npz --policy no_unsync --format json -o no_unsync.json
    shadowkvm run guest.npz --events events.parquet
    shadowkvm compare fork_exit --mmu shadow,nested,agile
    shadowkvm compare guest.npz --policy kvm,no_unsync
    shadowkvm workload list
    shadowkvm workload run fork_exit --scale 0.5
    shadowkvm explain demo unsync
    shadowkvm counters
    shadowkvm policy list

Exit status: 0 fine, 1 the replay differs from what was recorded, 2 usage, 3 bad input file, 4 an invariant of the
engine broke, 130 interrupted.""",
    help_epilogue="docs/ in the repository: reports (replay.md), recordings (recordings.md), workloads (workloads.md).",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    version=lambda: f"shadowkvm {version('shadowkvm')} (model {MODEL_VERSION})",
)
trace_app = App(name="trace", help="Recordings: look into them, import raw ones.")
policy_app = App(name="policy", help="Policies: what replaces decisions of KVM.")
app.command(trace_app)
app.command(policy_app)
verify.add_verbs(app)
compare_verb.add_verbs(app)
costs_verb.add_verbs(app)
workload_verbs.add_verbs(app)
translate_verb.add_verbs(app)
bench_verb.add_verbs(app)
explain_verb.add_verbs(app)


def _bytes(_: Any, tokens: Sequence[Any]) -> int:
    """128M, 1GiB, 0x8000000, 134217728."""
    text = tokens[0].value
    found = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+)\s*([kmgt]?)(i?b)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is no size; write 128M, 1G or a number of bytes")
    return int(found[1], 0) * _UNITS[found[2].lower()]


@app.command(
    help_epilogue=_examples(
        "shadowkvm run examples/recordings/fork20-demote64.npz",
        "shadowkvm run guest.npz --policy no_unsync --quota 1000",
        "shadowkvm run guest.npz --model-version linux-6.12 -o result.json",
        "shadowkvm run guest.npz --events events.txt > report.txt",
        "shadowkvm run guest.npz --format csv | sort",
    )
)
def run(
    trace: Path,
    /,
    *,
    policy: Annotated[str | None, Parameter(help="Decisions of KVM to replace, see: shadowkvm policy list.")] = None,
    profile: Annotated[str, Parameter(help="The CPU: zen, or qemu-tcg.")] = "zen",
    model_version: Annotated[
        str, Parameter(help=f"The kernel whose rules hold: {', or '.join(MODEL_VERSIONS)}.")
    ] = MODEL_VERSION,
    memory: Annotated[
        int | None,
        Parameter(converter=_bytes, help="Guest memory, as 128M or 1G. [default: as recorded; 128M for a trace]"),
    ] = None,
    quota: Annotated[int | None, Parameter(help="Number of shadow pages that KVM may keep, at least 64.")] = None,
    events: Annotated[Path | None, Parameter(help="Write every event to this file: .parquet, or .txt.")] = None,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> int:
    """Replay a recorded guest under KVM's shadow MMU and report what that cost.

    The report has the #PF exits by who and how and by kind of page, tables that went unsync and were brought back in
    step, shadow pages zapped, TLB flushes, rates, a breakdown by address space, and a check against the recorded
    guest: its own faults and its translations. docs/replay.md explains every line.

    Exit status 1: the replay differs from what was recorded. The report is written all the same.

    Parameters
    ----------
    trace
        A recording (.npz), or a trace saved by numpy.save (.npy: an array of TRACE_DTYPE).
    """
    chosen = choose_format(format_, output, ("table", "json", "csv"))
    check_folder(output)
    check_folder(events)
    if events is not None and events == output:
        raise UsageError(f"{events} cannot hold both the events and the report")
    source = open_trace(trace)
    with (
        source if isinstance(source, Recording) else nullcontext(),
        event_file(events, model_version) if events else nullcontext() as sink,
        rows_progress("replay", len(source), quiet=quiet) as progress,
    ):
        done = replay(
            source,
            name=trace.stem,
            policy=policy,
            profile=profile,
            model_version=model_version,
            memory=memory,
            quota=quota,
            sink=sink,
            progress=progress,
        )
    texts: dict[Format, Callable[[], str]] = {"json": lambda: report.as_json(done), "csv": lambda: report.as_csv(done)}
    emit(texts[chosen]() if chosen in texts else report.as_tables(done), output)
    if done.mismatches:
        say(f"the replay differs from the recording in {done.mismatches:,} rows")
    return int(done.mismatches > 0)


@trace_app.command(
    name="import",
    help_epilogue=_examples(
        "shadowkvm trace import guest.rec.zst -o guest.npz",
        'shadowkvm trace import guest.rec guest.pages -o guest.npz --guest "x86-64 Linux 6.1, kernel build"',
    ),
)
def import_(
    rec: Path,
    pages: Path | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The recording to write (.npz).")],
    name: Annotated[str | None, Parameter(help="Its name. [default: from the file name]")] = None,
    guest: Annotated[str, Parameter(help="What the guest was and did, in words.")] = "",
    made: Annotated[str, Parameter(help="How it was recorded, in words.")] = "",
    compression: Annotated[
        Literal["lzma", "deflate", "none"], Parameter(help="lzma is smallest, deflate ten times as fast.")
    ] = "lzma",
    quiet: QuietOption = False,
) -> int:
    """Make a recording of what the recorder wrote: NAME.rec and NAME.pages, plain or compressed by zstd.

    It reads and writes as a stream, so the files may be larger than memory; the recording appears when it is whole.

    Parameters
    ----------
    rec
        The records.
    pages
        The contents of page tables. [default: the name of the records with .pages in place of .rec]
    """
    if pages is None:
        base, dot, rest = rec.name.rpartition(".rec")
        if not dot:
            raise UsageError(f"{rec.name} has no .rec in its name: name the file of pages, too")
        pages = rec.with_name(f"{base}.pages{rest}")
    check_folder(output)
    words = {key: text for key, text in (("guest", guest), ("made", made)) if text}
    with part_progress("import", quiet=quiet) as progress:
        meta = import_raw(rec, pages, output, name=name, meta=words, compression=compression, progress=progress)
    say(f"{output}: {meta['rows']:,} rows, {meta['pages']:,} pages, {output.stat().st_size:,} bytes")
    return 0


@trace_app.command(
    help_epilogue=_examples(
        "shadowkvm trace info examples/recordings/dyn10.npz",
        "shadowkvm trace info guest.npz --verify --format json",
    )
)
def info(
    recording: Path,
    /,
    *,
    verify: Annotated[
        bool, Parameter(negative="", show_default=False, help="Read everything, and compare with the sums in it.")
    ] = False,
    format_: FormatOption = None,
    output: OutputOption = None,
) -> int:
    """What a recording is: the guest, how it was made, registers at the start, rows by op.

    Parameters
    ----------
    recording
        A recording (.npz).
    """
    chosen = choose_format(format_, output, ("table", "json"))
    with Recording.open(recording) as opened:
        if verify:
            opened.verify()
        meta = {key: value for key, value in opened.meta.items() if key not in {"schema", "sites"}}
    meta["sites"] = len(opened.meta["sites"])
    if chosen == "json":
        emit(json.dumps({"schema": "shadowkvm.trace/1", "recording": meta}, indent=1) + "\n", output)
        return 0
    meta["sregs"] = {key: f"{value:#x}" for key, value in meta["sregs"].items()}
    ops = [[key, f"{value:,}"] for key, value in meta.pop("counts").items()]
    order = [*_FIRST_FACTS, *sorted(set(meta) - set(_FIRST_FACTS))]
    facts = [[key, _fact(meta[key])] for key in order if key in meta]
    emit(
        Group(report.table(str(recording), ("", ""), facts, left=2), Text(), report.table("Rows", ("op", ""), ops)),
        output,
    )
    return 0


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command(
    help_epilogue=_examples(
        "shadowkvm counters",
        "shadowkvm counters --format json",
    )
)
def counters(*, format_: FormatOption = None, output: OutputOption = None) -> int:
    """List the counters: KVM's names, their kinds, and what moves them. Names that begin with x_ are not KVM's.

    A cumulative counter only rises, an instant one says how many there are now, a peak is the greatest so far.

    """
    fields = ("name", "scope", "kind", "doc")
    show_list(
        "Counters",
        fields,
        [list(row) for row in COUNTER_INFO.values()],
        schema="shadowkvm.counters/1",
        format_=format_,
        output=output,
    )
    return 0


@policy_app.command(
    name="list",
    help_epilogue=_examples(
        "shadowkvm policy list",
    ),
)
def list_policies(*, format_: FormatOption = None, output: OutputOption = None) -> int:
    """List the built-in policies, for `--policy NAME` (NAME:N where there is a number).

    What each does otherwise than KVM, and where its rule comes from. docs/policies.md has policies of your own.
    """
    show_list(
        "Policies",
        ("name", "doc", "source"),
        [[f"{row.name}:N" if row.parameter else row.name, row.doc, row.source] for row in POLICIES.values()],
        schema="shadowkvm.policies/2",
        format_=format_,
        output=output,
    )
    return 0


# -- the way in and out -----------------------------------------------------------------------------------------------


def _status(error: Exception) -> int:
    """The exit status for an error, after it was told in one line."""
    message = str(error) or type(error).__name__
    if isinstance(error, InvariantError):
        say(f"an invariant broke, which is a bug: {message}")
        if error.replay:
            say(f"to see it again: {error.replay}")
        return 4
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else message
    say(message)
    return 3 if isinstance(error, TraceError | CostError | OSError) else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; None: those that the process was started with.

    Returns:
        The exit status.
    """
    try:
        status = app(
            sys.argv[1:] if arguments is None else arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
            error_console=Console(stderr=True),
        )
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except CycloptsError as error:
        say(f"{str(error).strip()} (see: shadowkvm --help)")
        return 2
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ShadowKvmError, OSError, ImportError, UsageError) as error:
        return _status(error)
    return status if isinstance(status, int) else 0
