"""What the host of a case does between two runs of the guest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from shadowkvm.kvm.case import Op, Slot

__all__ = ["HostOps"]


class HasMode(Protocol):
    """A vCPU as the driver keeps it."""

    cpu: Any
    stack: int

    def mode(self, efer: int) -> None:
        """The host has set the registers."""


class HostOps:
    """The host's side of the driver: one method for each operation of `case.HOST_OPS`."""

    def __init__(self, vm: Any, slots: Sequence[Slot]) -> None:
        self.vm = vm
        self.first = {s.slot: s.gpa >> 12 for s in slots}
        self.moved: dict[int, tuple[int, int]] = {}  # slot -> (where its memory was when it came, bytes)

    def place(self, addr: int) -> int:
        """Where memory is now that came at this address: with its slot."""
        for slot, (home, size) in self.moved.items():
            if home <= addr < home + size:
                return addr - home + (self.first[slot] << 12)
        return addr

    def do(self, op: Op, guest: HasMode) -> int:
        """Do it; the number that the answer holds."""
        answer: int | None = getattr(self, op.op)(op, guest)
        return answer or 0

    def hwrite(self, op: Op, _guest: HasMode) -> None:
        """A store of user space."""
        self.vm.write_memory(self.place(op.addr), op.value.to_bytes(8, "little")[: op.size])

    def hread(self, op: Op, _guest: HasMode) -> None:
        """User space looks at pages; absent ones become the zero page."""
        self.vm.read_memory(self.place(op.addr), op.value, touch=True)

    def dirty(self, op: Op, _guest: HasMode) -> None:
        """A slot's dirty log is switched."""
        self.vm.set_dirty_log(op.slot, bool(op.flags & 1))

    def dirtylog(self, op: Op, _guest: HasMode) -> int:
        """KVM_GET_DIRTY_LOG; how many pages."""
        return len(self.vm.get_dirty_log(op.slot))

    def cleardirty(self, op: Op, _guest: HasMode) -> None:
        """KVM_CLEAR_DIRTY_LOG, the same word for every 64 pages."""
        first = self.first[op.slot] + op.addr
        self.vm.clear_dirty_log(op.slot, [first + i for i in range(op.value) if op.expected >> i % 64 & 1])

    def unmap(self, op: Op, _guest: HasMode) -> None:
        """MADV_DONTNEED."""
        self.vm.notifier_unmap(self.place(op.addr), op.value)

    def quota(self, op: Op, _guest: HasMode) -> None:
        """KVM_SET_NR_MMU_PAGES."""
        self.vm.set_page_quota(op.value)

    def slot_add(self, op: Op, _guest: HasMode) -> None:
        """A memslot comes."""
        self.first[op.slot] = op.addr >> 12
        self.vm.add_slot(op.slot, op.addr, op.value, readonly=bool(op.flags & 2), dirty_log=bool(op.flags & 1))

    def slot_del(self, op: Op, _guest: HasMode) -> None:
        """A memslot goes."""
        self.vm.delete_slot(op.slot)

    def slot_move(self, op: Op, _guest: HasMode) -> None:
        """A memslot moves to another address."""
        self.vm.move_slot(op.slot, op.addr)
        self.moved.setdefault(op.slot, (self.first[op.slot] << 12, op.value))
        self.first[op.slot] = op.addr >> 12

    def set_sregs(self, op: Op, guest: HasMode) -> None:
        """KVM_SET_SREGS; segments and IDT follow the mode."""
        guest.cpu.set_sregs(cr0=op.value, cr3=op.addr, cr4=op.expected, efer=op.flags)
        guest.mode(op.flags)

    def stack(self, op: Op, guest: HasMode) -> None:
        """Where the supervisor's stack begins: RSP of the next runs and in the TSS."""
        guest.stack = op.addr
