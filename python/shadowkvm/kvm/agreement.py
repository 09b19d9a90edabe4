"""Two answers to a case held against each other: KVM's and the engine's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from shadowkvm.kvm.case import Answer, Case, Op
from shadowkvm.kvm.driver import COMPARED, Driver
from shadowkvm.kvm.tracetext import Normaliser, comparable, same_event

__all__ = ["Agreement", "Difference", "compare", "differences", "engine_answers", "engine_events"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first operation in which KVM and the engine differ."""

    index: int
    op: Op
    kvm: Answer
    engine: Answer
    what: tuple[str, ...]
    """Names of what differs: "status", "value", "cr2", counters, "events", or the engine's own error."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far KVM and the engine agree on a case."""

    case: Case
    model: str
    """The kernel whose rules the engine followed."""
    ops: int
    """Operations that were compared."""
    disagreed: tuple[int, ...]
    """Their numbers, as far as they differ."""
    first: Difference | None

    @property
    def agreed(self) -> int:
        """Operations that agree."""
        return self.ops - len(self.disagreed)

    @property
    def whole(self) -> bool:
        """Do they agree on everything?"""
        return self.first is None


def differences(kvm: Answer, engine: Answer) -> tuple[str, ...]:
    """Names of what differs between two answers; empty: they agree."""
    out = []
    if kvm.status != engine.status:
        out.append("status")
    if kvm.value != engine.value:
        out.append("value")
    if kvm.status == engine.status == "mmio" and engine.address not in {kvm.address, *(m[0] for m in kvm.mmio)}:
        out.append("address")
    if kvm.status == engine.status == "page_fault" and kvm.address != engine.address:
        out.append("cr2")
    if kvm.status == engine.status and kvm.status in ("page_fault", "general_protection"):
        out += ["error_code"] if kvm.error_code != engine.error_code else []
    names = {k for k in (*kvm.counters, *engine.counters) if k in COMPARED}
    return (*out, *sorted(k for k in names if kvm.counters.get(k, 0) != engine.counters.get(k, 0)))


def compare(
    case: Case,
    answers: Sequence[Answer],
    *,
    events: Sequence[Sequence[str]] | None = None,
    model: str | None = None,
    to_the_end: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Agreement:
    """Replay a case in the engine and hold each operation against KVM's answer.

    After a difference the two machines are in different states, so later differences mean little; the replay goes on
    all the same, to count.

    Args:
        case: the case.
        answers: KVM's, as many as there are; operations without one are not run.
        events: KVM's tracepoints of each operation; then the order and fields of events are compared too.
        model: the kernel whose rules the engine follows; default: that of the kernel which answered.
        to_the_end: False: stop at the first difference.
        progress: called with the number of operations done.
    """
    driver = Driver(case, events=events is not None, model=model)
    pair = (Normaliser(case), Normaliser(case))
    disagreed: list[int] = []
    done, first = 0, None
    for i, (op, kvm) in enumerate(zip(case.ops, answers, strict=False)):
        if kvm.status == "stopped":
            break
        try:
            mine = driver.step(op)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises here is a difference, and is shown
            mine = Answer("error")
            done += 1
            disagreed.append(i)
            first = first or Difference(i, op, kvm, mine, (f"{type(error).__name__}: {error}",))
            break
        what = differences(kvm, mine)
        if events is not None:
            what = (*what, *_event_difference(pair, events[i], driver.events))
        done += 1
        if what:
            disagreed.append(i)
            first = first or Difference(i, op, kvm, mine, what)
        if progress and not i % 64:
            progress(done)
        if first and not to_the_end:
            break
    return Agreement(case, driver.vm.model_version, done, tuple(disagreed), first)


def _event_difference(pair: tuple[Normaliser, Normaliser], kvm: Sequence[str], mine: Sequence[str]) -> tuple[str, ...]:
    rows = zip_longest(
        (pair[0].line(t) for t in kvm if comparable(t)), (pair[1].line(t) for t in mine if comparable(t))
    )
    # A list, not any(): both normalisers must see every line, also those after the first difference.
    differ = [one is None or other is None or not same_event(one, other) for one, other in rows]
    return ("events",) if any(differ) else ()


def engine_answers(case: Case, model: str | None = None) -> list[Answer]:
    """What the engine answers to a case."""
    driver = Driver(case, model=model)
    return [driver.step(op) for op in case.ops]


def engine_events(case: Case, index: int, model: str | None = None) -> list[str]:
    """The engine's events of one operation of a case."""
    driver = Driver(case, events=True, model=model)
    for op in case.ops[: index + 1]:
        driver.step(op)
    return driver.events
