"""Records cases: every case is run twice, and what a host's whim has changed is cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from shadowkvm.kvm.case import Answer, Case
from shadowkvm.kvm.generate import generate

__all__ = ["Backend", "batches", "record", "record_random", "usable"]


class Backend(Protocol):
    """Somebody who knows what KVM does."""

    name: str
    profile: str
    batch: int
    kernel: str

    def about(self) -> dict[str, str]:
        """What to note beside answers."""

    def ask(self, cases: Sequence[Case], *, trace: bool = False) -> list[tuple[list[Answer], list[list[str]]]]:
        """Answers and events, case by case."""


def usable(answers: Sequence[Answer], case: Case) -> tuple[int, str]:
    """How many answers can be kept, and why not more."""
    for i, (a, op, bits) in enumerate(zip(answers, case.ops, case.modes(), strict=False)):
        if a.status == "stopped":
            return i, f"the guest stopped ({a.error_code:#x})"
        if a.counters.get("insn_emulation_fail"):
            return i, "KVM could not emulate"
        # A jump needs no emulation but that of the HLT behind it, and of INT 0x80 if its delivery faulted. More means
        # an invalid opcode: the bytes of a page to which only a stale translation led, where KVM then emulates what
        # the current tables lead to.
        emulated = a.counters.get("insn_emulation", 0) - a.counters.get("pf_emulate", 0)
        again = a.counters.get("pf_fixed", 0) + a.counters.get("pf_spurious", 0) if bits == 32 else 0
        strayed = a.status == "page_fault" and a.address != op.addr
        if op.op == "fetch" and (strayed or (a.status == "done" and emulated > 1 + again)):
            return i, "the guest ran the bytes of another page"
    return len(answers), ""


def steady(first: Sequence[Answer], second: Sequence[Answer], case: Case) -> tuple[int, str]:
    """How many answers of two runs can be kept, and why not more."""
    n, why = usable(first, case)
    for i in range(n):
        if i >= len(second) or first[i] != second[i]:
            return i, "two runs differ: the host rescheduled"
    return n, why


def batches(cases: Iterable[Case], size: int) -> Iterator[list[Case]]:
    """The cases in groups."""
    group: list[Case] = []
    for case in cases:
        group.append(case)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def record(backend: Backend, cases: Sequence[Case], log: Callable[[str], None] | None = None) -> list[Case]:
    """The cases with KVM's answers, each cut where the recording stops being worth anything.

    Args:
        backend: who is asked.
        cases: what; they go into one boot.
        log: told of every case that is cut.
    """
    results = backend.ask([c for c in cases for _ in range(2)])
    out = []
    for i, case in enumerate(cases):
        first = results[2 * i][0]
        n, why = steady(first, results[2 * i + 1][0], case)
        if n < len(case.ops) and log:
            log(f"{case.title}: {n} of {len(case.ops)} operations; {why or 'no answer'}")
        kernel, profile = backend.kernel, backend.profile
        out.append(replace(case, ops=case.ops[:n], answers=first[:n], kernel=kernel, profile=profile))
    return out


def record_random(
    backend: Backend,
    cases: int,
    ops: int,
    seed: int,
    *,
    group: str = "64-bit",
    least: float = 0.8,
    log: Callable[[str], None] | None = None,
) -> list[Case]:
    """Random cases from this seed on, recorded; one that keeps less than the share `least` is left out for the next."""
    kept: list[Case] = []
    while len(kept) < cases:
        n = min(max(1, backend.batch // 2), cases - len(kept))
        made = [generate(s, ops, group=group) for s in range(seed, seed + n)]
        seed += n
        kept += [c for c in record(backend, made, log) if len(c.ops) >= least * ops]
    return kept
