"""The accesses of the CPU while it delivers an event: IDT, GDT, TSS, pushes. SDM 6.12, APM volume 2, 8.7 to 8.9.

With IDT and stack on the guest's own page, as they are unless a case moves them, only the first of these accesses can
exit. Wherever one does, the CPU starts the delivery anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from shadowkvm.kvm.layout import CODE, LABELS, RT

__all__ = ["BP", "DF", "GP", "PF", "SYS", "Delivery", "Frame"]

BP, DF, GP, PF, SYS = 3, 8, 13, 14, 0x80
SS: Final = 0x10
USER_CODE: Final = {64: 0x23, 32: 0x33}
USER_SS: Final = 0x1B
SOFT: Final = frozenset({BP, SYS})
WITH_CODE: Final = frozenset({DF, GP, PF})
CONTRIBUTORY: Final = frozenset({GP, PF})
RF: Final = 1 << 16


@dataclass(slots=True)
class Frame:
    """Where and from where an event is delivered."""

    bits: int
    idt: int
    stack: int
    """RSP at CPL 0; RSP0 of the TSS lies 16 bytes above."""
    user: bool
    rip: int
    ac: bool = False


class Delivery:
    """Delivers one event of a vCPU, and whatever that leads to."""

    def __init__(self, cpu: Any, frame: Frame) -> None:
        self.cpu, self.frame = cpu, frame
        self.code = self.address = self.top = 0

    def deliver(self, vector: int, code: int) -> int | None:
        """The event at whose handler the CPU arrives: this one, a #PF of its delivery, or #DF; None: shutdown."""
        while (fault := self._accesses(vector, code)) is not None:
            if vector == DF or fault.status == "shutdown":
                return None
            if vector in CONTRIBUTORY:
                vector, code = DF, 0
            else:  # the INT instruction itself faults
                vector, code = PF, fault.error_code
                self.code, self.address = fault.error_code, fault.address
        return vector

    def pop(self, rip: int) -> None:
        """The handler takes error code and RIP off the stack; on the guest's own page that cannot exit."""
        if self.top >> 12 != RT >> 12:
            self.cpu.read(self.top, self.frame.bits // 8, False, rip=rip)  # noqa: FBT003 - CPL 0

    def _accesses(self, vector: int, code: int) -> Any:
        """All accesses of one delivery; the outcome of the first that the guest's tables forbid."""
        f, word = self.frame, self.frame.bits // 8
        labels = LABELS[f.bits]
        how = {"delivery": True, "soft": vector in SOFT, "rip": f.rip}
        stack = self._stack(vector)
        tables = [f.idt + vector * 2 * word, LABELS[64]["gdt"] + CODE[f.bits]]
        if f.user or (f.bits == 64 and vector == DF):
            tables.append(labels["tss"] + 4)
        for at in tables:
            out = self.cpu.read(at, word, f.user, **how)
            if out.status != "done":
                return out
        for value in self._values(vector, code):
            stack -= word
            out = self.cpu.write(stack, value, word, f.user, **how)
            if out.status != "done":
                return out
        self.top = stack
        return None

    def _stack(self, vector: int) -> int:
        f = self.frame
        if f.bits == 64 and vector == DF:
            return RT + 0xF80  # IST1
        top = f.stack + 0x10 if f.user else f.stack
        return top & ~0xF if f.bits == 64 else top

    def _values(self, vector: int, code: int) -> list[int]:
        """What is pushed, first to last."""
        f = self.frame
        cs = USER_CODE[f.bits] if f.user else CODE[f.bits]
        flags = 2 | f.ac << 18 | (0 if vector in SOFT else RF)
        outer = [USER_SS if f.user else SS, f.stack] if f.user or f.bits == 64 else []
        rip = f.rip + {BP: 1, SYS: 2}.get(vector, 0)
        return [*outer, flags, cs, rip, *([code] if vector in WITH_CODE else [])]
