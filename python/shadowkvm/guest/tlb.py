"""Tlb: flushes, local and on other CPUs, and stores to tables through the direct map.

Rules of Linux 6.1: ``flush_tlb_mm_range``, ``flush_tlb_kernel_range``, ``native_flush_tlb_multi``,
``native_flush_tlb_one_user`` (arch/x86/mm/tlb.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.guest.cpu import Cpu
from shadowkvm.guest.machine import Machine, Settings
from shadowkvm.guest.task import Mm
from shadowkvm.ops import PAGE_SIZE, Op
from shadowkvm.pagetables import make_rows

__all__ = ["Tlb"]

_IPI_VECTOR: Final = 0xFB
_PGE: Final = 1 << 7
_HANDLER: Final = 200


class Tlb(Machine):
    """A machine whose kernel can change its tables and flush."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._idle_stacks = [self.layout.data + number * PAGE_SIZE for number in range(settings.cpus)]

    # -- stores -----------------------------------------------------------------------------------------------------

    @contextmanager
    def stores(self) -> Iterator[None]:
        """Stores to tables inside the ``with`` block join the trace when it ends, through the direct map."""
        if not self.started:
            yield
            return
        with self.memory.logging() as log:
            yield
        self.emit(self.through_direct_map(log.rows()))

    # -- flushes ----------------------------------------------------------------------------------------------------

    def flush_rows(self, cpu: Cpu, gvas: NDArray[np.uint64] | None) -> NDArray[np.void]:
        """What one CPU does to flush pages of the address space that it has loaded; None: all of it."""
        if gvas is None:
            return cpu.reload()
        return make_rows(Op.INVLPG, gvas, vcpu=cpu.number)

    def flush_user(self, mm: Mm, start: int, end: int, stride: int = PAGE_SIZE) -> None:
        """Flush a range of a process's addresses on every CPU that has it loaded (``flush_tlb_mm_range``)."""
        pages = (end - start) // stride
        gvas = None
        if pages <= self.settings.flush_ceiling:
            gvas = np.uint64(start) + np.arange(pages, dtype=np.uint64) * np.uint64(stride)
        mm.generation += 1
        if self.cpu.mm is mm:
            self.emit(self.flush_rows(self.cpu, gvas))
            self.cpu.flushed(mm)
        for number in list(mm.cpus):
            if number != self.cpu.number:
                self.cpus[number].flushed(mm)
                self.emit_all(self.remote_flush(self.cpus[number], gvas))

    def remote_flush(self, cpu: Cpu, gvas: NDArray[np.uint64] | None) -> list[tuple[Cpu, NDArray[np.void]]]:
        """Have another CPU flush: the interrupt that this one sends, and what the other one does."""
        hit = [make_rows([Op.INTR], value=_IPI_VECTOR)]
        if cpu.inside or cpu.task is None:
            # No way in: an idle CPU is in the kernel.
            hit += [cpu.handler(self._idle_stacks[cpu.number], _HANDLER), self.flush_rows(cpu, gvas)]
        else:
            hit += [cpu.delivery(_IPI_VECTOR), cpu.enter(cpu.task.kernel_stack, _HANDLER), self.flush_rows(cpu, gvas)]
            hit.append(cpu.leave())
        # The sender writes to its interrupt controller, which the host emulates: an exit, no matter for the MMU.
        return [(self.cpu, make_rows([Op.IO])), *((cpu, rows) for rows in hit)]

    def emit_all(self, parts: list[tuple[Cpu, NDArray[np.void]]]) -> None:
        """Add rows of several CPUs, in this order."""
        for cpu, rows in parts:
            self.emit(rows, cpu)

    def flush_kernel(self, gvas: NDArray[np.uint64]) -> None:
        """Flush pages of the kernel's half on all CPUs: one by one, or everything if there are many."""
        few = len(gvas) <= self.settings.flush_ceiling
        for cpu in [self.cpu, *(other for other in self.cpus if other is not self.cpu)]:
            # Many pages: CR4.PGE off and on (__native_tlb_flush_global), which drops global entries, too.
            flush = make_rows(Op.INVLPG, gvas) if few else make_rows(Op.CR4, value=[self.cr4 ^ _PGE, self.cr4])
            if cpu is self.cpu:
                self.emit(flush)
                continue
            parts = self.remote_flush(cpu, gvas[:0])
            # The flush comes before the way back to user code, if there is one.
            at = len(parts) - (not cpu.inside)
            self.emit_all([*parts[:at], (cpu, flush), *parts[at:]])
