"""Cpu: what one CPU of the guest has loaded, and the rows of its ways into and out of the kernel.

Rules of Linux 6.1: arch/x86/mm/tlb.c (ASIDs, lazy switching), arch/x86/entry/calling.h (CR3 switches of KPTI).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.guest.task import Mm, Process
from shadowkvm.ops import PAGE_SIZE, Flag, Op
from shadowkvm.pagetables import make_rows

__all__ = ["NOFLUSH", "Cpu"]

NOFLUSH: Final = 1 << 63
"""CR3: keep what the TLB has of this PCID."""
_USER_PCID: Final = 1 << 11
# Linux gives the last six address spaces of a CPU a PCID each (TLB_NR_DYN_ASIDS).
_ASIDS: Final = 6
_CPU_ENTRY: Final = 3 * PAGE_SIZE


class Cpu:
    """One CPU: its address space, its PCIDs, the task that it runs."""

    def __init__(self, number: int, *, entry: int, text: int, word: int, kpti: bool, pcid: bool) -> None:
        self.number = number
        self.kpti, self.pcid = kpti, pcid
        self.mm: Mm | None = None
        self.task: Process | None = None
        self.inside = True
        """It is in the kernel."""
        # Which address space, in which generation, each PCID stands for: (Mm.number, Mm.generation).
        self._asids: list[tuple[int, int]] = [(0, 0)] * _ASIDS
        self._asid = self._next = 0
        self._stale_user: set[int] = set()
        self._ways_in: dict[tuple[int, int, int], NDArray[np.void]] = {}
        self._text, self._word, self._idt = text, word, entry
        self._entry_stack = entry + PAGE_SIZE + number * _CPU_ENTRY + PAGE_SIZE - 8 * word

    # -- CR3 ------------------------------------------------------------------------------------------------------

    def cr3(self, mm: Mm, *, user: bool = False, noflush: bool = False) -> int:
        """The value for CR3 that runs ``mm`` here."""
        value = mm.space.user_root if user else mm.space.root
        if self.pcid:
            value |= self._asid + 1
            value |= (_USER_PCID if user and self.kpti else 0) | (NOFLUSH if noflush else 0)
        return value

    def load(self, mm: Mm) -> NDArray[np.void]:
        """Switch to another address space: the CR3 load, or no row if it is loaded (``switch_mm_irqs_off``)."""
        if self.mm is mm:
            return make_rows([])
        if self.mm is not None:
            self.mm.cpus.pop(self.number, None)
        self.mm = mm
        mm.cpus[self.number] = None
        noflush = self._choose(mm)
        if not noflush:
            self._stale_user.add(self._asid)
        return make_rows([Op.CR3], value=self.cr3(mm, noflush=noflush), vcpu=self.number)

    def _choose(self, mm: Mm) -> bool:
        """Pick the PCID (``choose_new_asid``); whether its TLB entries are still good."""
        if not self.pcid:
            return False
        for asid, (number, generation) in enumerate(self._asids):
            if number == mm.number:
                self._asid = asid
                self._asids[asid] = (number, mm.generation)
                return generation == mm.generation
        self._asid, self._next = self._next, (self._next + 1) % _ASIDS
        self._asids[self._asid] = (mm.number, mm.generation)
        return False

    def flushed(self, mm: Mm) -> None:
        """The entries of ``mm``, which is loaded, were flushed up to its generation; user code's are next."""
        self._asids[self._asid] = (mm.number, mm.generation)
        self._stale_user.add(self._asid)

    def reload(self) -> NDArray[np.void]:
        """Load the same CR3 again, to flush (``native_flush_tlb_local``)."""
        if self.mm is None:
            return make_rows([])
        return make_rows([Op.CR3], value=self.cr3(self.mm), vcpu=self.number)

    # -- in and out -----------------------------------------------------------------------------------------------

    def delivery(self, vector: int) -> NDArray[np.void]:
        """What the CPU itself does when an exception or interrupt hits user code: IDT, entry stack."""
        flags = Flag.IMPLICIT | Flag.DELIVERY | Flag.USER
        idt = self._idt + vector * 2 * self._word
        rows = make_rows([Op.READ, Op.WRITE], [idt, self._entry_stack], size=self._word, vcpu=self.number)
        rows["flags"] = [flags, flags | Flag.KEEP]
        return rows

    def enter(self, stack: int, handler: int) -> NDArray[np.void]:
        """From user code into the kernel: entry code, CR3 under KPTI, the handler's first page, the kernel stack.

        Args:
            stack: gva of the task's kernel stack.
            handler: which page of the kernel's code.
        """
        value = self.cr3(self.mm, noflush=True) if self.kpti and self.mm is not None else 0
        if (stack, handler, value) not in self._ways_in:
            entry = make_rows([Op.FETCH, Op.CR3] if value else [Op.FETCH], [self._text, 0][: 1 + bool(value)], value)
            self._ways_in[stack, handler, value] = np.concatenate((entry, self.handler(stack, handler)))
        return self._ways_in[stack, handler, value].copy()

    def handler(self, stack: int, number: int) -> NDArray[np.void]:
        """In the kernel: page ``number`` of its code, and the stack."""
        addrs = [self._text + (1 + number) * PAGE_SIZE, stack]
        rows = make_rows([Op.FETCH, Op.WRITE], addrs, size=self._word, vcpu=self.number)
        rows["flags"][1] = Flag.KEEP
        return rows

    def leave(self) -> NDArray[np.void]:
        """Back to user code: under KPTI the entry code and the user's CR3, which flushes if something asked for it."""
        if not self.kpti or self.mm is None:
            return make_rows([])
        stale = self._asid in self._stale_user
        self._stale_user.discard(self._asid)
        value = self.cr3(self.mm, user=True, noflush=not stale)
        return make_rows([Op.FETCH, Op.CR3], [self._text, 0], [0, value], vcpu=self.number)
