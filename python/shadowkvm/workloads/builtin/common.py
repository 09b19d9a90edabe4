"""What the workloads share: a process to begin with, and steps."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.guest import Linux, Process, Program, Vma, pages
from shadowkvm.workloads.step import START, HostAct, Step

__all__ = ["MIB", "PAGE", "begin", "host_step", "resident", "run_program", "some", "step", "use"]

PAGE: Final = 4096
MIB: Final = 1 << 20


def step(guest: Linux, phase: str, units: float = 0) -> Step:
    """What the guest did since the last step."""
    return Step(phase, guest.take(), units=units)


def host_step(guest: Linux, phase: str, method: str, *arguments: object, units: float = 0) -> Step:
    """An act of the host, after what the guest did since the last step."""
    rows = guest.take()
    if len(rows):
        raise ValueError(f"{phase}: take the guest's {len(rows)} rows first")
    return Step(phase, act=HostAct(method, arguments), units=units)


def begin(guest: Linux, program: Program | None = None, *, start: bool = True) -> Process:
    """A process that runs and has used its code, data and stack; then, with ``start``, the trace begins."""
    shell = guest.spawn(program or guest.program(text=16, data=8, bss=8, heap=4))
    guest.switch(shell)
    run_program(guest, shell)
    if start:
        guest.start()
    return shell


def use(guest: Linux, process: Process, gvas: NDArray[np.uint64] | None = None) -> Step:
    """The first step: the process goes once more over its program and over ``gvas``, so that the shadow has them."""
    run_program(guest, process)
    if gvas is not None:
        guest.touch(process, gvas)
    return step(guest, START)


def run_program(guest: Linux, process: Process) -> None:
    """A run of the process's program: its code fetched, its data, bss and heap written, its stack used."""
    if process.program is None:
        return
    for area in process.program.vmas(guest.layout.program):
        guest.touch(process, pages(area.start, area.pages), write=area.write, fetch=area.execute)
    guest.touch(process, [process.mm.stack_top - 64], write=True)


def resident(guest: Linux, process: Process, count: int) -> Vma:
    """Anonymous memory of so many pages, all of them written."""
    area = guest.mmap(process, count * PAGE)
    guest.touch(process, pages(area.start, count), write=True)
    return area


def some(guest: Linux, area: Vma, count: int) -> NDArray[np.uint64]:
    """Addresses of ``count`` pages of a mapping, chosen by chance, none twice; all of them if there are no more."""
    chosen = guest.random.permutation(area.pages)[:count].astype(np.uint64)
    return np.uint64(area.start) + chosen * np.uint64(PAGE)
