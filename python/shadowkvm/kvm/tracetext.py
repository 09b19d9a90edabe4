"""Events in the kernel's text form, made comparable: what differs from one run to the next is taken out.

A host frame becomes "#n", the n-th frame seen behind that guest frame; a shadow table becomes its number in the order
of appearance, counted afresh after each zap, since a freed page may come back as another table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from shadowkvm.kvm.case import Case

__all__ = ["KINDS", "Normaliser", "comparable", "same_event"]

KINDS: Final = frozenset(
    [
        "kvm_mmu_pagetable_walk",
        "kvm_mmu_paging_element",
        "kvm_mmu_set_accessed_bit",
        "kvm_mmu_set_dirty_bit",
        "kvm_mmu_walker_error",
        "kvm_mmu_get_page",
        "kvm_mmu_sync_page",
        "kvm_mmu_unsync_page",
        "kvm_mmu_prepare_zap_page",
        "mark_mmio_spte",
        "handle_mmio_page_fault",
        "check_mmio_spte",
        "fast_page_fault",
        "kvm_mmu_spte_requested",
        "kvm_mmu_set_spte",
        "kvm_mmu_zap_all_fast",
        "kvm_exit",
        "kvm_page_fault",
        "kvm_emulate_insn",
        "kvm_inj_exception",
        "vcpu_match_mmio",
        "kvm_mmio",
        "kvm_unmap_hva_range",
        "kvm_set_spte_hva",
    ]
)
"""All of system kvmmmu, and of system kvm what the harness records."""
# A [reinjected] line also appears whenever a host's interrupt ends the delivery of a #PF.
NOISE: Final = re.compile(r"kvm_exit: .* reason interrupt |.*\[reinjected\]\s*$")
PFN_BITS: Final = 0x000F_FFFF_FFFF_F000
NO_SLOT: Final = 1 << 63


def comparable(text: str) -> bool:
    """Is this event one that both sides raise, and no noise of the host?"""
    return text.partition(":")[0] in KINDS and not NOISE.match(text)


def same_event(kvm: str, engine: str) -> bool:
    """Equal, or equal but for a RIP that the engine was not told (accesses of an event delivery carry none)."""
    if kvm == engine:
        return True
    return engine.startswith(("kvm_page_fault", "kvm_exit")) and re.sub(r"rip 0x\w+", "rip 0x0", kvm) == engine


def moves_frames(case: Case) -> bool:
    """May the host put other pages behind the guest's memory during the case? Which ones is its own affair."""
    return any(s.gpa + s.size > case.memory for s in case.slots) or any(
        op.op in ("unmap", "slot_add") for op in case.ops
    )


class Normaliser:
    """Makes the lines of one side comparable; it must see all of them, in order.

    Args:
        case: the case that was run.
        frames: number the host's frames; False: all are alike (for cases in which the host moves pages).
    """

    def __init__(self, case: Case | None = None, *, frames: bool = True) -> None:
        self.frames = frames and not (case is not None and moves_frames(case))
        self.of_gfn: dict[int, list[int]] = {}
        self.tables: dict[int, int] = {}

    def lines(self, texts: Iterable[str]) -> list[str]:
        """The comparable ones of these events."""
        return [self.line(text) for text in texts if comparable(text)]

    def line(self, text: str) -> str:
        """One event."""
        text = text.rstrip(" \0")
        name, _, rest = text.partition(": ")
        convert = getattr(self, f"_{name}", None)
        return f"{name}: {convert(rest)}" if convert else text

    def _frame(self, gfn: int, pfn: int) -> str:
        if pfn == NO_SLOT:
            return "none"
        known = self.of_gfn.setdefault(gfn, [])
        if pfn not in known:
            known.append(pfn)
        return f"#{known.index(pfn)}" if self.frames else "#"

    def _kvm_mmu_spte_requested(self, rest: str) -> str:
        _, gfn, _, pfn, _, level = rest.split()
        return f"gfn {gfn} pfn {self._frame(int(gfn, 16), int(pfn, 16))} level {level}"

    def _kvm_mmu_set_spte(self, rest: str) -> str:
        _, gfn, _, text, rights, _, level, _, at = rest.split()
        spte, address = int(text, 16), int(at, 16)
        flags = f"{spte & 0xFFF:x}" + (" nx" if spte >> 63 else "")
        table = self.tables.setdefault(address >> 12, len(self.tables))
        frame = self._frame(int(gfn, 16), (spte & PFN_BITS) >> 12)
        return f"gfn {gfn} spte {frame} {flags} {rights} level {level} at table {table} [{(address & 0xFFF) // 8}]"

    def _kvm_mmu_prepare_zap_page(self, rest: str) -> str:
        self.tables.clear()
        return rest

    def _fast_page_fault(self, rest: str) -> str:
        """Without the host's pointer; with paging off the address is the frame's."""
        words = re.sub(r" sptep \S+", "", rest).split()
        gfn = int(words[words.index("gva") + 1], 16) >> 12
        for name in ("old", "new"):
            spte = int(words[at := words.index(name) + 1], 16)
            words[at] = f"{self._frame(gfn, (spte & PFN_BITS) >> 12)} {spte & 0xFFF:x}" if spte & 1 else f"{spte:x}"
        return " ".join(words)

    def _mark_mmio_spte(self, rest: str) -> str:
        return re.sub(r"sptep:\S+ ", "", rest)

    def _kvm_emulate_insn(self, rest: str) -> str:
        """Only the address: the engine is not told the instruction's bytes."""
        return rest.split(":")[1] + (" failed" if rest.endswith(" failed") else "")

    def _kvm_exit(self, rest: str) -> str:
        """Without info1: it repeats the error code of a #PF and is SVM's own affair otherwise."""
        return rest.partition(" info1")[0]

    def _kvm_mmio(self, rest: str) -> str:
        """Values of writes only: what a read gets is the device's choice."""
        return rest if rest.startswith("mmio write") else rest.partition(" val")[0]

    def _kvm_unmap_hva_range(self, rest: str) -> str:
        """Host virtual addresses: only that it happened."""
        del rest
        return ""

    _kvm_set_spte_hva = _kvm_unmap_hva_range
