"""The verbs that ask real KVM: ``shadowkvm verify`` and ``shadowkvm doctor``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cyclopts import App, Parameter
from rich.console import Group, RenderableType
from rich.text import Text

from shadowkvm import report
from shadowkvm._core import MODEL_VERSIONS
from shadowkvm.checks import choice
from shadowkvm.kvm import Native, Qemu, generate, load, save
from shadowkvm.kvm.agreement import Difference
from shadowkvm.kvm.case import Answer, Case
from shadowkvm.kvm.doctor import command, examine, ready
from shadowkvm.kvm.driver import COMPARED
from shadowkvm.kvm.record import Backend
from shadowkvm.kvm.referee import Events, Verdict, events_at, judge, judge_recorded
from shadowkvm.kvm.tracetext import Normaliser, same_event
from shadowkvm.terminal import (
    Format,
    OutputOption,
    QuietOption,
    UsageError,
    check_folder,
    choose_format,
    emit,
    rows_progress,
    say,
)

__all__ = ["add_verbs", "doctor", "verify"]

BackendName = Literal["recorded", "qemu", "kvm"]
SCHEMA: Final = "shadowkvm.verify/1"
FormatOption = Annotated[Format | None, Parameter(name="--format", help="table (for people) or json.")]
KernelRootOption = Annotated[
    Path | None,
    Parameter(
        help="Folder with boot/ and lib/modules/ of the kernel to ask, such as an unpacked package."
        " [default: $SHADOWKVM_KERNEL_ROOT, else /]",
        show_default=False,
    ),
]


def add_verbs(app: App) -> None:
    """Hang the verbs of this module into the command line."""
    examples = (
        "shadowkvm verify tests/conformance/data/random-pae.json.xz",
        "shadowkvm verify --random 20 --seed 1",
        "shadowkvm verify --random 20 --group PAE",
        "shadowkvm verify --backend qemu --events case.json",
        "shadowkvm verify --random 20 --kernel-root linux-6.12",
    )
    app.command(verify, help_epilogue="\n".join(["Examples:", "", *(f"    {line}" for line in examples)]))
    app.command(doctor)


def verify(
    *cases: Path,
    backend: Annotated[
        BackendName | None,
        Parameter(help="Who says what KVM does: the files (recorded), QEMU, or this machine's /dev/kvm (kvm)."),
    ] = None,
    random: Annotated[int, Parameter(help="Make this many random cases.", show_default=False)] = 0,
    group: Annotated[
        Literal["64-bit", "PAE", "two-level", "off", "vcpus", "host", "all"],
        Parameter(help="What guests: their paging, or several vCPUs, or busy hosts."),
    ] = "64-bit",
    seed: Annotated[int, Parameter(help="Seed of the first of them; the others have the next ones.")] = 1,
    ops: Annotated[int, Parameter(help="Operations in each of them.")] = 500,
    events: Annotated[
        bool, Parameter(negative="", show_default=False, help="Compare the tracepoints, too (only --backend qemu).")
    ] = False,
    kernel_root: KernelRootOption = None,
    model_version: Annotated[
        str | None,
        Parameter(help="The kernel whose rules the engine follows. [default: that of the kernel which answers]"),
    ] = None,
    save_to: Annotated[
        Path | None, Parameter(name="--save", help="Keep the cases with KVM's answers in this file (.json, .json.xz).")
    ] = None,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> int:
    """Hold the engine against real KVM: every outcome, every counter, operation by operation.

    The first operation that differs is shown with both answers and both event lists. docs/verify.md explains cases
    and backends; `shadowkvm doctor` says what QEMU needs here. Exit status 1: there is a difference.

    Parameters
    ----------
    cases
        Files of cases (schema shadowkvm.case/1).
    """
    chosen = choose_format(format_, output, ("table", "json"))
    for path in (output, save_to):
        check_folder(path)
    backend = backend or ("qemu" if random else "recorded")
    if not cases and random <= 0:
        raise UsageError("name a file of cases, or ask for some: --random 20")
    if backend == "recorded" and random:
        raise UsageError("random cases have no recorded answers: --backend qemu")
    if events and backend != "qemu":
        raise UsageError("only --backend qemu records events")
    if ops < 1 or seed < 0 or random < 0:
        raise UsageError("--ops must be at least 1, --random and --seed at least 0")
    if kernel_root and backend != "qemu":
        raise UsageError("only --backend qemu boots a kernel: --kernel-root is for it")
    model = model_version and choice("--model-version", model_version, MODEL_VERSIONS)
    made = [case for path in cases for case in load(path)] + [
        generate(seed + i, ops, group=group) for i in range(random)
    ]
    with asking(backend, sum(len(c.ops) for c in made), kernel_root, quiet=quiet) as (referee, tick):
        verdicts = []
        for verdict in judge(referee, made, events=events, model=model) if referee else recorded(made, model):
            verdicts.append(verdict)
            tick(sum(v.agreement.ops for v in verdicts))
        bad = next((v for v in verdicts if not v.agreement.whole), None)
        shown = None
        if bad and bad.agreement.first:
            shown = events_at(bad.agreement.case, bad.agreement.first.index, referee, bad.agreement.model)
    if save_to:
        keep(save_to, verdicts, referee)
    if chosen == "json":
        emit(json.dumps(as_dict(backend, verdicts, shown), indent=1) + "\n", output)
    else:
        emit(as_tables(verdicts, bad, shown, backend), output)
    return int(bad is not None)


def recorded(cases: Sequence[Case], model: str | None) -> Iterator[Verdict]:
    """The verdicts on what stands in the cases."""
    return (judge_recorded(case, model) for case in cases)


@contextmanager
def asking(
    backend: BackendName, total: int, kernel_root: Path | None, *, quiet: bool
) -> Iterator[tuple[Backend | None, Callable[[int], None]]]:
    """The backend (None: the files themselves) and what tells people how far it is."""
    with rows_progress("verify", total, quiet=quiet) as progress:
        finished = 0

        def tick(done: int) -> None:
            nonlocal finished
            finished = done
            progress(done, 0)

        if backend == "recorded":
            yield None, tick
        elif backend == "qemu":
            yield Qemu(lambda done: progress(min(finished + done, total), 0), kernel_root=kernel_root), tick
        else:
            yield Native(), tick


def keep(path: Path, verdicts: Sequence[Verdict], backend: Backend | None) -> None:
    """Write the cases with KVM's answers."""
    about = backend.about() if backend else {}
    kept = []
    for v in verdicts:
        case, n = v.agreement.case, len(v.answers)
        kept.append(replace(case, ops=case.ops[:n], answers=v.answers))
    save(path, kept, meta=about)
    say(f"{path}: {len(kept)} cases with answers")


# -- what is shown ----------------------------------------------------------------------------------------------------


def models(verdicts: Sequence[Verdict]) -> str:
    """The kernels whose rules the engine followed."""
    return ", ".join(sorted({v.agreement.model for v in verdicts}))


def as_dict(backend: str, verdicts: Sequence[Verdict], shown: Events | None) -> dict[str, Any]:
    """Everything, for programs."""
    rows = []
    for v in verdicts:
        a = v.agreement
        row: dict[str, Any] = {"case": a.case.title, "kernel": a.case.kernel, "model_version": a.model}
        row |= {"ops": a.ops, "agreed": a.agreed, "runs": v.runs, "note": v.note}
        if a.first:
            row["first"] = asdict(a.first)
        rows.append(row)
    out = {"schema": SCHEMA, "model_version": models(verdicts), "backend": backend, "cases": rows}
    return {**out, "events": asdict(shown)} if shown else out


def as_tables(verdicts: Sequence[Verdict], bad: Verdict | None, shown: Events | None, backend: str) -> RenderableType:
    """Agreement case by case (many that agree: by theme), and the first difference."""
    parts: list[RenderableType] = []
    rows = []
    if len(verdicts) > 40:
        themes = dict.fromkeys(v.agreement.case.theme or v.agreement.case.title for v in verdicts)
        groups = {t: [v for v in verdicts if (v.agreement.case.theme or v.agreement.case.title) == t] for t in themes}
    else:
        groups = {f"{i} {v.agreement.case.title}": [v] for i, v in enumerate(verdicts)}
    for name, group in [*groups.items(), ("all", list(verdicts))]:
        ops, agreed = sum(v.agreement.ops for v in group), sum(v.agreement.agreed for v in group)
        whole = sum(v.agreement.whole for v in group)
        rows.append(
            [name, f"{whole} of {len(group)}", f"{agreed:,}", f"{ops:,}", f"{100 * agreed / max(ops, 1):.3f} %"]
        )
    heads = ("case", "whole", "agree", "operations", "")
    parts.append(report.table(f"KVM ({backend}) and the engine ({models(verdicts)})", heads, rows))
    parts += [Text(f"{v.agreement.case.title}: {v.note}") for v in verdicts if v.note]
    if bad and bad.agreement.first:
        parts += difference(bad.agreement.case, bad.agreement.first, shown)
    return Group(*parts)


def difference(case: Case, first: Difference, shown: Events | None) -> list[RenderableType]:
    """The first operation that differs: what was done, both answers, both event lists."""
    out: list[RenderableType] = [Text(), Text(f"First difference: {case.title}, operation {first.index}: {first.op}")]
    out += [Text(f"  before it {i}: {case.ops[i]}") for i in range(max(0, first.index - 3), first.index)]
    facts = [["status", first.kvm.status, first.engine.status]]
    for field in ("error_code", "value", "address"):
        pair = [f"{getattr(a, field):#x}" for a in (first.kvm, first.engine)]
        facts += [[field, *pair]] if pair != ["0x0", "0x0"] else []
    facts += [["mmio", mmio_text(first.kvm), ""]] if first.kvm.mmio else []
    names = sorted({k for k in (*first.kvm.counters, *first.engine.counters) if k in COMPARED})
    facts += [[n, *(f"{a.counters.get(n, 0):+d}" for a in (first.kvm, first.engine))] for n in names]
    rows = [[*fact, "<--" if fact[0] in first.what else ""] for fact in facts]
    out += [Text(), report.table("", ("", "KVM", "engine", ""), rows)]
    out += [Text(w) for w in first.what if " " in w]  # the engine's own error
    if shown is None:
        return out
    if shown.kvm is None:
        out += [Text(), Text("Events of the engine (KVM's: ask with --backend qemu):")]
        return [*out, *(Text(f"  {line}") for line in shown.engine)]
    return [*out, Text(), side_by_side(case, shown.kvm, shown.engine)]


def mmio_text(answer: Answer) -> str:
    """The MMIO exits in short: address:bytes and r or w."""
    return " ".join(f"{g:#x}:{n}{'w' if w else 'r'}" for g, n, w in answer.mmio)


def side_by_side(case: Case, kvm: Sequence[str], engine: Sequence[str]) -> RenderableType:
    """Both event lists, made comparable; lines that differ are marked."""
    pairs = zip_longest(Normaliser(case).lines(kvm), Normaliser(case).lines(engine), fillvalue="")
    rows = [["" if same_event(one, other) else "->", one, other] for one, other in pairs]
    return report.table(
        "Events (# is a host frame, tables by order of appearance)", ("", "KVM", "engine"), rows, left=3
    )


def doctor(*, kernel_root: KernelRootOption = None, format_: FormatOption = None, output: OutputOption = None) -> int:
    """Say what is missing to ask real KVM (`shadowkvm verify`), and the command that installs it.

    Exit status 1: no backend can be used.
    """
    chosen = choose_format(format_, output, ("table", "json"))
    check_folder(output)
    checks = examine(root=kernel_root)
    backends, install = ready(checks), command(checks)
    if chosen == "json":
        what = {"schema": "shadowkvm.doctor/1", "ready": backends, "install": install}
        emit(json.dumps({**what, "checks": [asdict(c) for c in checks]}, indent=1) + "\n", output)
        return int(not backends)
    rows = [[c.backend, c.what, "good" if c.good else "MISSING", c.found] for c in checks]
    parts: list[RenderableType] = [
        report.table("What asking real KVM needs", ("backend", "what", "", "found"), rows, left=4)
    ]
    parts.append(Text(f"\nReady: {', '.join(f'--backend {b}' for b in backends) or 'no backend'}"))
    if install:
        parts.append(Text(f"To install what is missing: {install}"))
    emit(Group(*parts), output)
    return int(not backends)
