"""The comparison itself: one trace or workload, run once for each variant on a fresh VM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import sub
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from shadowkvm import feed
from shadowkvm._core import MODEL_VERSION
from shadowkvm.costs import Account, CostTable, account, load_costs
from shadowkvm.costs.account import nested_events, shadow_events
from shadowkvm.counters import COUNTER_INFO, Counters
from shadowkvm.errors import ConfigError
from shadowkvm.mmus import Mmu
from shadowkvm.nested import NestedStatistics
from shadowkvm.ops import Op
from shadowkvm.policy import Policy, described
from shadowkvm.replay import fresh_vm, open_trace, told_of
from shadowkvm.tlb import TlbStatistics
from shadowkvm.trace import Recording
from shadowkvm.vm import Vm
from shadowkvm.workloads import START, Scenario, Step, rows_by_op

__all__ = ["Comparison", "Progress", "Ran", "Variant", "compare"]

Progress = Callable[[float], None]
# The order of interest; every other counter that is not zero follows in KVM's order.
_FIRST: Final = ("exits", "pf_taken", "pf_fixed", "pf_emulate", "pf_guest", "remote_tlb_flush_requests", "tlb_flush")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run it. Policy and kernel are those of shadow paging, and say nothing under another MMU."""

    model_version: str = MODEL_VERSION
    policy: str | Policy = "kvm"
    """A built-in one by its name, or one of your own: the same object is asked in every run of the variant."""
    profile: str = "zen"
    mmu: Mmu = field(default_factory=Mmu)

    @property
    def policy_name(self) -> str:
        """What the policy is called; one of your own by its class."""
        return described(self.policy)[0]

    def __str__(self) -> str:
        if self.mmu.kind != "shadow":
            return f"{self.mmu}, {self.profile}"
        return ", ".join(
            [*([] if self.mmu == Mmu() else [str(self.mmu)]), self.model_version, self.policy_name, self.profile]
        )


@dataclass(frozen=True, slots=True)
class Ran:
    """What one variant came to."""

    variant: Variant
    rows: int
    ops: dict[str, int]
    """Rows by op."""
    counters: Counters
    """KVM's at the end; under another MMU those of its instructions only."""
    tlb: TlbStatistics | None
    nested: NestedStatistics | None
    mismatches: int
    """Accesses that went otherwise than the recording or the workload's own tables say."""
    account: Account
    """Modelled time by cause."""

    @property
    def exits(self) -> int:
        """All VM exits."""
        return self.account.events.exits

    @property
    def walk_misses(self) -> int:
        """Accesses for which tables were walked."""
        found = self.nested or self.tlb
        return found.misses if found else 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """What each variant came to. The first is the one that the others are held against."""

    about: dict[str, Any]
    """name, mode, memory, rows; of a workload also unit, units, parameters, seed, scale."""
    costs: CostTable
    runs: tuple[Ran, ...]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """In the order of the runs."""
        return tuple(run.variant for run in self.runs)

    @property
    def shadow_runs(self) -> tuple[Ran, ...]:
        """Those under shadow paging."""
        return tuple(run for run in self.runs if run.nested is None)

    @property
    def mismatches(self) -> int:
        """Over all runs: 0, or something is wrong."""
        return sum(run.mismatches for run in self.runs)

    def counters(self) -> dict[str, list[int]]:
        """Of the runs under shadow paging, each counter that is not zero everywhere."""
        names = [*_FIRST, *(name for name in COUNTER_INFO if name not in _FIRST)]
        rows = {name: [int(run.counters[name]) for run in self.shadow_runs] for name in names}
        return {name: row for name, row in rows.items() if any(row)}

    def names(self) -> list[str]:
        """What tells the variants apart: MMU, then the settings of shadow paging in which they differ."""
        fields = [field for field in ("model_version", "policy_name") if len(_values(self.shadow_runs, field)) > 1]
        profiles = ["profile"] if len(_values(self.runs, "profile")) > 1 else []
        mixed = len({run.variant.mmu for run in self.runs}) > 1
        out = []
        for run in self.runs:
            words = [str(run.variant.mmu)] if mixed else []
            words += [getattr(run.variant, field) for field in (fields if run.nested is None else []) + profiles]
            out.append(" ".join(words) or (run.variant.policy_name if run.nested is None else str(run.variant.mmu)))
        return out

    def common(self) -> str:
        """The settings that are the same everywhere."""
        shadow = [
            values.pop()
            for field in ("model_version", "policy_name")
            if len(values := _values(self.shadow_runs, field)) == 1
        ]
        profiles = _values(self.runs, "profile")
        return ", ".join(shadow + ([f"profile {profiles.pop()}"] if len(profiles) == 1 else []))

    def crossings(self, cost: str) -> list[tuple[int, int, float]]:
        """Where two variants take the same time, were a cost another.

        ``cost`` is "exit" or a name of `COST_INFO`.

        Returns:
            (i, j, x): run i is the cheaper one while an event takes fewer than x cycles, j from there on.
        """
        lines = [run.account.line(cost) for run in self.runs]
        out = []
        for i, (a, slope) in enumerate(lines):
            for j, (b, other) in enumerate(lines):
                # Where slopes differ by nothing to speak of there is no crossing that means anything.
                if slope > other and b > a:
                    out.append((i, j, (b - a) / (slope - other)))
        return out


def _values(runs: Sequence[Ran], field_: str) -> set[str]:
    return {getattr(run.variant, field_) for run in runs}


def compare(
    what: Path | str | Scenario,
    variants: Sequence[Variant],
    *,
    costs: CostTable | None = None,
    steady: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Run a trace or a workload once for each variant, each on a fresh VM, TLBs followed.

    Args:
        what: path of a recording (.npz) or a trace (.npy), or a `Scenario`.
        variants: at least one; the first is what the others are compared with.
        costs: what events take; None: the preset "zen3".
        steady: of a workload, leave its phase "start" out, in which tables are first built or mapped.
        progress: called with the part that is done, 0 to 1, over all variants.

    Raises:
        ConfigError: no variant, one that is there twice, or a setting that cannot be; ``steady`` of a trace.
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
    if steady and not isinstance(what, Scenario):
        raise ConfigError("steady is for workloads: a trace has no phase start")
    table = costs or load_costs()
    about: dict[str, Any] = {}
    runs = []
    for number, variant in enumerate(variants):

        def step(part: float, number: int = number) -> None:
            if progress is not None:
                progress((number + part) / len(variants))

        if isinstance(what, Scenario):
            about, ran = _run_scenario(what, variant, table, step, steady=steady)
        else:
            about, ran = _run_trace(what, variant, table, step)
        runs.append(ran)
    return Comparison(about, table, tuple(runs))


def _settings(variant: Variant) -> dict[str, Any]:
    return {"policy": variant.policy, "profile": variant.profile, "model_version": variant.model_version}


def _run_scenario(
    scenario: Scenario, variant: Variant, table: CostTable, progress: Progress, *, steady: bool
) -> tuple[dict[str, Any], Ran]:
    vm = scenario.vm(**_settings(variant))
    variant.mmu.set(vm)
    left_out = _Counts.of(vm)

    def each(vm: Vm, step: Step) -> None:
        nonlocal left_out
        if steady and step.phase == START:
            left_out = _Counts.of(vm)

    result = scenario.run(vm, each=each, progress=lambda done, total: progress(done / total if total else 1.0))
    phases = [phase for name, phase in result.phases.items() if not (steady and name == START)]
    about = {
        **scenario.to_dict(),
        "name": scenario.workload.name,
        "mode": str(scenario.values["mode"]),
        "memory": scenario.memory,
        "rows": sum(phase.rows for phase in phases),
        "steady": steady,
    }
    return about, _ran(_Counts.of(vm) - left_out, variant, table, rows_by_op(phases), result.mismatches)


def _run_trace(path: Path | str, variant: Variant, table: CostTable, progress: Progress) -> tuple[dict[str, Any], Ran]:
    source = open_trace(path)
    try:
        vm = fresh_vm(source, **_settings(variant))
        variant.mmu.set(vm)
        about = told_of(source, Path(path).stem, vm)
        ops = np.zeros(len(Op), np.int64)

        def each(piece: feed.Piece) -> None:
            nonlocal ops
            ops += np.bincount(piece.rows["op"], minlength=len(ops))
            progress((piece.first + len(piece.rows)) / max(len(source), 1))

        result = feed.run(vm, source, each=each)
    finally:
        if isinstance(source, Recording):
            source.close()
    wrong = result.faults_missed + result.faults_unexpected if isinstance(source, Recording) else 0
    counts = {op.name: int(ops[op]) for op in Op if ops[op]}
    return about, _ran(_Counts.of(vm), variant, table, counts, wrong)


@dataclass(frozen=True, slots=True)
class _Counts:
    """All that was counted up to a moment."""

    counters: Counters
    tlb: TlbStatistics | None
    nested: NestedStatistics | None

    @classmethod
    def of(cls, vm: Vm) -> Self:
        return cls(vm.counters, vm.tlb, vm.nested)

    def __sub__(self, before: Self) -> Self:
        tlb, nested = self.tlb, self.nested
        return type(self)(
            self.counters - before.counters,
            TlbStatistics(*map(sub, tlb, before.tlb)) if tlb and before.tlb else None,
            NestedStatistics(*map(sub, nested, before.nested)) if nested and before.nested else None,
        )


def _ran(counts: _Counts, variant: Variant, table: CostTable, ops: dict[str, int], mismatches: int) -> Ran:
    counters, tlb, nested = counts.counters, counts.tlb, counts.nested
    events = shadow_events(counters, ops, tlb) if nested is None else nested_events(nested, ops)
    return Ran(variant, sum(ops.values()), ops, counters, tlb, nested, mismatches, account(events, table))
