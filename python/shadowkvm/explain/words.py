"""Entries, roles and codes in words."""

from __future__ import annotations

from typing import Final

__all__ = ["REASONS", "error_code", "gpte", "page_words", "spte"]

_P, _W, _U, _A, _D, _PS, _NX = 1, 2, 4, 32, 64, 128, 1 << 63
_SHADOW_PRESENT: Final = 1 << 11
_MMIO: Final = 1 << 51
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_PFN_BASE: Final = 0x40000
_TABLE_PFN: Final = 1 << 37

REASONS: Final = {
    0: "#PF",
    1: "HLT",
    2: "IN or OUT",
    3: "a write to CR0",
    4: "a write to CR0",
    5: "a write to CR3",
    6: "a write to CR4",
    7: "INVLPG",
    8: "WRMSR",
    9: "INVPCID",
}
"""Exit reasons as the engine numbers them."""


def _rights(entry: int) -> str:
    return f"r{'w' if entry & _W else '-'}{'-' if entry & _NX else 'x'}{'u' if entry & _U else '-'}"


def gpte(entry: int, level: int) -> str:
    """A guest's entry."""
    if not entry & _P:
        return "not present"
    marks = "".join(letter for letter, bit in (("A", _A), ("D", _D)) if entry & bit)
    leaf = level == 1 or bool(entry & _PS)
    where = f"maps gfn {(entry & _ADDRESS) >> 12:#x}" if leaf else f"leads to gfn {(entry & _ADDRESS) >> 12:#x}"
    return f"{where}, {_rights(entry)} {marks}".rstrip()


def spte(entry: int, level: int) -> str:
    """A shadow entry."""
    if not entry:
        return "empty"
    if not entry & _SHADOW_PRESENT:
        return "an MMIO entry: it faults on purpose" if entry & _MMIO else "not present"
    frame = (entry & _ADDRESS & ~_MMIO) >> 12
    if level > 1 and not entry & _PS:
        return f"leads to shadow page #{frame - _TABLE_PFN}"
    marks = "".join(letter for letter, bit in (("A", _A), ("D", _D)) if entry & bit)
    return f"maps gfn {frame - _PFN_BASE:#x}, {_rights(entry)} {marks}".rstrip()


def error_code(code: int) -> str:
    """The bits of a page fault's error code."""
    names = ((1, "P"), (2, "W"), (4, "U"), (8, "RSVD"), (16, "F"), (32, "PK"))
    return "|".join(name for bit, name in names if code & bit) or "0"


def page_words(number: int, gfn: int, level: int, *, direct: bool = False) -> str:
    """A shadow page."""
    return f"#{number} (gfn {gfn:#x}, level {level}{', direct' if direct else ''})"
