"""Scenario: a workload with its parameters chosen: an image, registers, and steps; and what running it came to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shadowkvm.counters import COUNTER_INFO, Counters
from shadowkvm.errors import ConfigError
from shadowkvm.guest import Linux
from shadowkvm.ops import Op
from shadowkvm.pagetables import make_rows
from shadowkvm.result import RunResult
from shadowkvm.trace import RecordingWriter
from shadowkvm.vm import Vm
from shadowkvm.workloads.parameter import Values
from shadowkvm.workloads.step import Step

if TYPE_CHECKING:
    from shadowkvm.workloads.workload import Workload

__all__ = ["Phase", "Scenario", "ScenarioResult", "rows_by_op"]

Progress = Callable[[float, float], None]


class Scenario:
    """What a guest has at the start and what it then does, the same each time.

    Made by `Workload.build`. Every call of `steps` builds the guest anew from the seed, so a scenario can be run on any
    number of VMs, and nothing of it need be held in memory but the step under way.

    Attributes:
        workload: what it was made of.
        values: every parameter, the guest's settings included.
        seed, scale: as given.
        memory: bytes of guest memory.
        vcpus: number of CPUs.
        image: (gpa, content) of each page that is not zero at the start.
        sregs: cr0, cr3, cr4, efer of each CPU at the start.
        host: what the host has behind the guest's memory at the start, see `Vm.set_host_pages`.
        total: how much work there is, in the workload's unit.
    """

    def __init__(self, workload: Workload, values: Values, *, seed: int, scale: float) -> None:
        self.workload, self.values, self.seed, self.scale = workload, values, seed, scale
        guest, first = self._begin()
        # The guest that is built to see what the image is does for the first run, too.
        self._ready: Iterator[Step] | None = first
        self.memory, self.vcpus = guest.settings.memory, len(guest.cpus)
        self.image, self.sregs = guest.image, guest.start_sregs
        self.host: str = values.host
        self.total = workload.work(values)

    def _begin(self) -> tuple[Linux, Iterator[Step]]:
        """A fresh guest at its start, and the steps that follow."""
        settings = {name: self.values[name] for name in self.workload.guest_settings}
        guest = Linux(seed=self.seed, **settings | dict(self.workload.settings(self.values)))
        steps = self.workload.body(guest, self.values)
        first = next(steps, None)
        if first is None or not guest.started:
            raise ConfigError(f"workload {self.workload.name!r}: it never starts its guest, or has no step")

        def all_of_them() -> Iterator[Step]:
            yield first
            yield from steps

        return guest, all_of_them()

    def steps(self) -> Iterator[Step]:
        """The steps from the first on."""
        ready, self._ready = self._ready, None
        return self._begin()[1] if ready is None else ready

    def trace(self) -> NDArray[np.void]:
        """All steps as one trace, acts of the host included: TRACE_DTYPE. For scenarios that fit into memory."""
        return np.concatenate([step.trace() for step in self.steps()])

    # -- running ------------------------------------------------------------------------------------------------------

    def vm(self, **options: Any) -> Vm:
        """A fresh `Vm` at the scenario's start.

        Args:
            options: policy, profile, model_version, events, ...: see `Vm`.
        """
        vm = Vm(self.memory, vcpus=self.vcpus, **options)
        if self.host != "writable":
            vm.set_host_pages(0, self.memory, self.host)
        for gpa, content in self.image:
            vm.write_memory(gpa, content)
        for cpu, sregs in zip(vm.vcpus, self.sregs, strict=True):
            cpu.set_sregs(cr0=sregs["cr0"], cr3=sregs["cr3"], cr4=sregs["cr4"], efer=sregs["efer"])
        return vm

    def run(
        self,
        vm: Vm | None = None,
        *,
        progress: Progress | None = None,
        each: Callable[[Vm, Step], None] | None = None,
        **options: Any,
    ) -> ScenarioResult:
        """Run all steps.

        Args:
            vm: a VM at the scenario's start, from `vm`; None: a fresh one with ``options``.
            progress: called after each step with the work done so far and all of it, in the workload's unit.
            each: called after each step with the VM and the step.
            options: policy, profile, model_version, events, ...: see `Vm`.

        Returns:
            Counters in all and for each phase. ``result.mismatches`` is 0, or the guest saw something that its own
            tables do not say.
        """
        if vm is not None and options:
            raise ConfigError(f"run: {next(iter(options))} is for a fresh VM, and one was given")
        machine = self.vm(**options) if vm is None else vm
        result = ScenarioResult(
            self, policy=machine.policy, profile=machine.profile, model_version=machine.model_version
        )
        start, done = time.perf_counter(), 0.0
        for step in self.steps():
            before = machine.counter_values()
            answer = 0 if step.act is None else step.act.apply(machine)
            ran = machine.run(step.rows)
            done += step.units
            change = Counters(machine.counter_values()) - Counters(before)
            result.phases.setdefault(step.phase, Phase()).add(step, ran, answer, change)
            if each is not None:
                each(machine, step)
            if progress is not None:
                progress(done, self.total)
        result.elapsed = time.perf_counter() - start
        return result

    def record(self, path: str | os.PathLike[str]) -> None:
        """Write it as a recording: `shadowkvm run` then shows every fault by kind of page and address space.

        The image becomes PAGE rows before the first row. A recording has no VM state but registers of vCPU 0: those of
        the others are rows, and ``host`` must be "writable".

        Raises:
            ConfigError: ``host`` is not "writable".
        """
        if self.host != "writable":
            raise ConfigError(f"host {self.host!r}: a recording cannot hold that, only 'writable'")
        meta = {
            "name": self.workload.name,
            "guest": f"workload {self.workload.name}: {self.workload.summary}",
            "made": f"shadowkvm workload record, scale {self.scale:g}, seed {self.seed}",
            "memory": self.memory,
            "vcpus": self.vcpus,
            "sregs": self.sregs[0],
        }
        with RecordingWriter(path, meta) as writer:
            writer.add_pages(b"".join(content for _, content in self.image))
            gpas = np.array([gpa for gpa, _ in self.image], np.uint64)
            writer.append(make_rows(Op.PAGE, gpas, np.arange(len(gpas))))
            for number, sregs in enumerate(self.sregs[1:], 1):
                # A CPU starts in 64-bit mode: the top table first, then the bits that read it.
                order = [(Op.CR3, "cr3"), (Op.CR4, "cr4"), (Op.EFER, "efer"), (Op.CR0, "cr0")]
                rows = make_rows([op for op, _ in order], value=[sregs[name] for _, name in order], vcpu=number)
                writer.append(rows)
            for step in self.steps():
                writer.append(step.trace())

    def to_dict(self) -> dict[str, Any]:
        """What was chosen, in the types of JSON."""
        return {
            "workload": self.workload.name,
            "seed": self.seed,
            "scale": self.scale,
            "parameters": dict(self.values),
            "unit": self.workload.unit,
            "units": self.total,
        }

    def __repr__(self) -> str:
        size = f"{self.memory >> 20} MiB, {self.vcpus} vCPU, {self.total:,g} x {self.workload.unit}"
        return f"<Scenario {self.workload.name}: {size}, scale {self.scale:g}, seed {self.seed}>"


@dataclass(slots=True)
class Phase:
    """The sums over the steps of one phase."""

    steps: int = 0
    units: float = 0
    rows: int = 0
    seconds: float = 0.0
    """In the engine."""
    guest_faults: int = 0
    """Accesses that took the guest #PF that the model expected."""
    mismatches: int = 0
    """Accesses that took another one, or none, or one unexpectedly."""
    answer: int = 0
    """What the host was told: frames in dirty logs."""
    ops: dict[str, int] = field(default_factory=dict)
    """Rows by op."""
    counters: Counters = field(default_factory=lambda: Counters(dict.fromkeys(COUNTER_INFO, 0)))

    def add(self, step: Step, ran: RunResult, answer: int, change: Mapping[str, int]) -> None:
        """Take a step in."""
        self.steps += 1
        self.units += step.units
        self.rows += ran.rows
        self.seconds += ran.seconds
        self.guest_faults += ran.faults_matched
        self.mismatches += ran.faults_missed + ran.faults_unexpected
        self.answer += answer
        for code, count in enumerate(np.bincount(step.rows["op"]).tolist()):
            if count:
                self.ops[Op(code).name] = self.ops.get(Op(code).name, 0) + count
        self.counters = _sum(self.counters, change)

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON."""
        names = ("steps", "units", "rows", "guest_faults", "mismatches", "answer")
        return {**{name: getattr(self, name) for name in names}, "ops": self.ops, "counters": dict(self.counters)}


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> Counters:
    """Counters added up; of peaks the greater."""
    return Counters(
        {
            name: max(value, other[name]) if COUNTER_INFO[name].kind == "peak" else value + other[name]
            for name, value in one.items()
        }
    )


def rows_by_op(phases: Iterable[Phase]) -> dict[str, int]:
    """The rows of several phases by op."""
    out: dict[str, int] = {}
    for phase in phases:
        for name, count in phase.ops.items():
            out[name] = out.get(name, 0) + count
    return out


@dataclass(slots=True)
class ScenarioResult:
    """What `Scenario.run` came to."""

    scenario: Scenario
    policy: str
    profile: str
    model_version: str
    phases: dict[str, Phase] = field(default_factory=dict)
    """By name, in the order of their first step."""
    elapsed: float = 0.0
    """Wall-clock seconds of it all: making the rows, running them."""

    @property
    def counters(self) -> Counters:
        """The sums over all phases."""
        out = Counters(dict.fromkeys(COUNTER_INFO, 0))
        for phase in self.phases.values():
            out = _sum(out, phase.counters)
        return out

    @property
    def rows(self) -> int:
        """Rows that were run."""
        return sum(phase.rows for phase in self.phases.values())

    @property
    def ops(self) -> dict[str, int]:
        """Rows by op."""
        return rows_by_op(self.phases.values())

    @property
    def units(self) -> float:
        """Work that was done, in the workload's unit."""
        return sum(phase.units for phase in self.phases.values())

    @property
    def seconds(self) -> float:
        """Wall-clock seconds in the engine."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def mismatches(self) -> int:
        """Accesses of the guest that went otherwise than its own tables say: 0, or something is wrong."""
        return sum(phase.mismatches for phase in self.phases.values())

    def per_unit(self, name: str) -> float:
        """A counter's total for each unit of work."""
        return self.counters[name] / self.units if self.units else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything in the types of JSON."""
        return {
            **self.scenario.to_dict(),
            "settings": {"policy": self.policy, "profile": self.profile},
            "rows": self.rows,
            "ops": self.ops,
            "mismatches": self.mismatches,
            "counters": dict(self.counters),
            "phases": {name: phase.to_dict() for name, phase in self.phases.items()},
            "time": {"seconds": self.elapsed, "engine_seconds": self.seconds},
        }

    def __repr__(self) -> str:
        what = f"{self.units:,g} x {self.scenario.workload.unit}, {self.rows:,} rows in {self.elapsed:.3g} s"
        return f"<ScenarioResult {self.scenario.workload.name}: {what}, {self.counters!r}>"

    def _repr_html_(self) -> str:
        unit = self.scenario.workload.unit
        lines = "".join(
            f"<tr><td style='text-align:left'>{name}</td><td>{value:,}</td><td>{self.per_unit(name):,.3g}</td></tr>"
            for name, value in self.counters.nonzero().items()
        )
        head = f"<p>{self.scenario.workload.name}: {self.units:,g} x {unit}, {self.rows:,} rows</p>"
        return f"{head}<table><tr><th>counter</th><th>total</th><th>per {unit}</th></tr>{lines}</table>"
