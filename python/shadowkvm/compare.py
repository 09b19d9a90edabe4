"""Compare: one trace under several kernels, policies and CPUs, and what each of them makes of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import App, Parameter
from rich.console import Group, RenderableType
from rich.text import Text

from shadowkvm import report
from shadowkvm._core import MODEL_VERSION
from shadowkvm.counters import COUNTER_INFO
from shadowkvm.errors import ConfigError
from shadowkvm.replay import Replay, open_trace, replay
from shadowkvm.terminal import Format, UsageError, check_folder, choose_format, emit, rows_progress
from shadowkvm.trace import Recording

__all__ = ["Comparison", "Variant", "add_verbs", "compare"]

SCHEMA: Final = "shadowkvm.compare/1"
# The order of interest; every other counter that is not zero follows in KVM's order.
_FIRST: Final = ("exits", "pf_taken", "pf_fixed", "pf_emulate", "pf_guest", "remote_tlb_flush_requests", "tlb_flush")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the trace."""

    model_version: str = MODEL_VERSION
    policy: str = "kvm"
    profile: str = "zen"

    def __str__(self) -> str:
        return f"{self.model_version}, {self.policy}, {self.profile}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What each variant came to. The first is the one that the others are held against."""

    name: str
    variants: tuple[Variant, ...]
    runs: tuple[Replay, ...]

    def counters(self) -> dict[str, list[int]]:
        """Each counter that is not zero everywhere: its value at the end in each variant."""
        names = [*_FIRST, *(name for name in COUNTER_INFO if name not in _FIRST)]
        rows = {name: [int(run.result.counters[name]) for run in self.runs] for name in names}
        return {name: row for name, row in rows.items() if any(row)}

    def heads(self) -> list[str]:
        """What tells the variants apart, a line each: only the settings in which they differ."""
        fields = [field for field in Variant.__slots__ if len({getattr(v, field) for v in self.variants}) > 1]
        return ["\n".join(getattr(v, field) for field in fields) or v.policy for v in self.variants]


def compare(
    trace: Path | str,
    variants: Sequence[Variant],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Replay a trace once for each variant, each on a fresh VM.

    Args:
        trace: a recording (.npz) or a trace (.npy).
        variants: at least one; the first is what the others are compared with.
        progress: called with the number of rows so far and of all rows, over all variants.

    Raises:
        ConfigError: no variant, one that is there twice, or a setting that cannot be.
        TraceError: as `replay`.

    >>> from shadowkvm.compare import Variant, compare
    >>> both = compare("examples/recordings/fork20-demote64.npz", [Variant(), Variant(policy="no_unsync")])
    >>> unsync = both.counters()["pf_emulate"]
    >>> unsync[1] > 3 * unsync[0]
    True
    """
    if not variants:
        raise ConfigError("there is nothing to compare: name at least one variant")
    if twice := next((v for i, v in enumerate(variants) if v in variants[:i]), None):
        raise ConfigError(f"variant {twice} is there twice")
    runs = []
    for number, variant in enumerate(variants):
        source = open_trace(trace)
        total = len(source) * len(variants)
        before = len(source) * number

        def step(done: int, _: int, before: int = before, total: int = total) -> None:
            if progress is not None:
                progress(before + done, total)

        try:
            runs.append(
                replay(
                    source,
                    name=Path(trace).stem,
                    policy=variant.policy,
                    profile=variant.profile,
                    model_version=variant.model_version,
                    progress=step,
                )
            )
        finally:
            if isinstance(source, Recording):
                source.close()
    return Comparison(str(runs[0].trace["name"]), tuple(variants), tuple(runs))


# -- as text ----------------------------------------------------------------------------------------------------------


def _change(base: int, value: int) -> str:
    """How a value stands to the first variant's."""
    if value == base:
        return "="
    if not base:
        return "new"
    if not value:
        return "gone"
    ratio = value / base
    return f"{ratio:.3g}x" if ratio >= 2 else f"{ratio - 1:+.1%}"


def as_tables(comparison: Comparison) -> RenderableType:
    """A table of the counters, with how each stands to the first variant's."""
    first, *others = comparison.heads()
    heads = ["", first, *(head for name in others for head in (name, "vs 1st"))]
    rows = []
    for name, values in comparison.counters().items():
        cells = [f"{values[0]:,}"]
        for value in values[1:]:
            cells += [f"{value:,}", _change(values[0], value)]
        rows.append([name, *cells])
    run = comparison.runs[0]
    lines = [f"{comparison.name}: {run.result.rows:,} rows, {run.trace['mode']}"]
    lines += [f"the same everywhere: {same}"] if (same := _common(comparison)) else []
    return Group(*map(Text, lines), Text(), report.table("Counters", heads, rows))


def _common(comparison: Comparison) -> str:
    fields = [f for f in Variant.__slots__ if len({getattr(v, f) for v in comparison.variants}) == 1]
    return ", ".join(str(getattr(comparison.variants[0], f)) for f in fields)


def as_json(comparison: Comparison) -> str:
    """The comparison with the schema ``shadowkvm.compare/1``."""
    variants: list[dict[str, Any]] = [
        {**{f: getattr(v, f) for f in Variant.__slots__}, "counters": dict(run.result.counters)}
        for v, run in zip(comparison.variants, comparison.runs, strict=True)
    ]
    about = {"schema": SCHEMA, "trace": comparison.runs[0].trace, "rows": comparison.runs[0].result.rows}
    return json.dumps({**about, "variants": variants}, indent=1) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line a counter, one column a variant."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["counter", *map(str, comparison.variants)])
    writer.writerows([name, *values] for name, values in comparison.counters().items())
    return out.getvalue()


# -- the verb ---------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{text!r}: names are expected, with a comma between two")
    return words


def add_verbs(app: App) -> None:
    """Hang the verb of this module into the command line."""
    lines = (
        "Examples:",
        "",
        "    shadowkvm compare examples/recordings/fork20-demote64.npz --policy kvm,no_unsync,no_prefetch",
        "    shadowkvm compare guest.npz --model-version linux-6.1,linux-6.12 -o compare.json",
    )
    app.command(compare_verb, name="compare", help_epilogue="\n".join(lines))


def compare_verb(
    trace: Path,
    /,
    *,
    policy: Annotated[str, Parameter(help="Policies, see: shadowkvm policy list.")] = "kvm",
    model_version: Annotated[str, Parameter(help="Kernels whose rules hold.")] = MODEL_VERSION,
    profile: Annotated[str, Parameter(help="CPUs: zen, qemu-tcg.")] = "zen",
    format_: Annotated[Format | None, Parameter(name="--format", help="table, json or csv.")] = None,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="Write to this file: whole, or not at all.")
    ] = None,
    quiet: Annotated[
        bool, Parameter(name=["--quiet", "-q"], negative="", show_default=False, help="No progress on stderr.")
    ] = False,
) -> int:
    """Replay one trace under several policies, kernels or CPUs, and set their counters side by side.

    Each option takes several names with a comma between two; every combination is run. The first one is what the others
    are held against: "+3.0%" is 3 percent more, "=" the same.

    Parameters
    ----------
    trace
        A recording (.npz), or a trace saved by numpy.save (.npy).
    """
    chosen = choose_format(format_, output, ("table", "json", "csv"))
    check_folder(output)
    variants = [Variant(*words) for words in product(_words(model_version), _words(policy), _words(profile))]
    source = open_trace(trace)
    rows = len(source)
    if isinstance(source, Recording):
        source.close()
    with rows_progress("compare", rows * len(variants), quiet=quiet) as progress:
        done = compare(trace, variants, progress=progress)
    texts = {"json": as_json, "csv": as_csv}
    emit(texts[chosen](done) if chosen in texts else as_tables(done), output)
    return 0
