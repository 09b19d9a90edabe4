"""Asks KVM, replays in the engine, and says how far they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shadowkvm.errors import TraceError
from shadowkvm.kvm.agreement import Agreement, compare, engine_events
from shadowkvm.kvm.case import Answer, Case
from shadowkvm.kvm.record import Backend, batches, usable

__all__ = ["Events", "Verdict", "events_at", "judge", "judge_recorded"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out for one case."""

    agreement: Agreement
    answers: list[Answer]
    runs: int = 1
    """How often KVM was asked."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Events:
    """The events of one operation on both sides; None: KVM's are not known."""

    kvm: list[str] | None
    engine: list[str]


def judge_recorded(case: Case, model: str | None = None) -> Verdict:
    """Hold the engine against the answers that stand in the case.

    Raises:
        TraceError: there are none.
    """
    if case.answers is None:
        raise TraceError(f"{case.title} holds no recorded answers; ask for them: --backend qemu")
    return Verdict(compare(case, case.answers, model=model), case.answers)


def judge(
    backend: Backend, cases: Sequence[Case], *, events: bool = False, model: str | None = None
) -> Iterator[Verdict]:
    """Ask KVM about these cases and hold the engine against its answers.

    A case with a difference is asked again, since the host may reschedule in the middle of an operation (then a page
    fault is taken twice): only what KVM does in every run counts against the engine.

    Args:
        backend: who is asked.
        cases: any number; they are asked in batches.
        events: compare the tracepoints of every operation too.
        model: the kernel whose rules the engine follows; default: the backend's.
    """
    asked_of = [replace(case, kernel=backend.kernel, profile=backend.profile) for case in cases]
    for group in batches(asked_of, backend.batch):
        again: list[Verdict] = []
        for case, (answers, traced) in zip(group, backend.ask(group, trace=events), strict=True):
            verdict = _hold(case, answers, traced if events else None, model)
            if verdict.agreement.whole:
                yield verdict
            else:
                again.append(verdict)
        if again:
            asked = backend.ask([v.agreement.case for v in again], trace=events)
            for verdict, (answers, traced) in zip(again, asked, strict=True):
                yield _settle(verdict, answers, traced if events else None, model)


def _hold(case: Case, answers: list[Answer], traced: list[list[str]] | None, model: str | None) -> Verdict:
    n, why = usable(answers, case)
    note = f"{n} of {len(case.ops)} operations: {why or 'no more answers'}" if n < len(case.ops) else ""
    agreement = compare(case, answers[:n], events=traced, model=model)
    return Verdict(agreement, answers[:n], note=note)


def _settle(first: Verdict, answers: list[Answer], traced: list[list[str]] | None, model: str | None) -> Verdict:
    """The verdict after a second run: where the two runs differ, the one that the engine agrees with stands."""
    case, doubtful = first.agreement.case, set(first.agreement.disagreed)
    n = min(usable(answers, case)[0], len(first.answers))
    merged = [answers[i] if i in doubtful else first.answers[i] for i in range(n)]
    second = _hold(case, merged, traced, model)
    changed = sum(answers[i] != first.answers[i] for i in doubtful if i < n)
    note = f"the host rescheduled in {changed} operations" if changed else ""
    return replace(second, runs=2, note="; ".join(filter(None, (first.note, note))))


def events_at(case: Case, index: int, backend: Backend | None, model: str | None = None) -> Events:
    """The events of one operation of a case, the engine's and, if a backend can trace, KVM's."""
    kvm = None
    if backend is not None and backend.name == "qemu":
        traced = backend.ask([replace(case, ops=case.ops[: index + 1])], trace=True)[0][1]
        kvm = traced[index] if index < len(traced) else []
    return Events(kvm, engine_events(case, index, model))
