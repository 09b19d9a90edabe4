"""What the random cases are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["GROUPS", "STEPS", "THEMES", "Theme"]

STEPS: Final[dict[str, float]] = {
    "access": 30,
    "edit": 25,
    "flood": 2,
    "alias_edit": 6,
    "invlpg": 5,
    "cr3": 6,
    "crs": 1.5,
    "mmio": 3,
    "scan": 1.5,
    "switch": 2,
    "cow": 2,
    "cross": 1.5,
    "reuse": 1,
    "host": 1.5,
    "tour": 0.1,
    "dirty": 0,
    "unmap": 0,
    "slots": 0,
    "quota": 0.2,
    "rom": 0,
    **dict.fromkeys(("pdpt", "paging", "sregs", "move", "clear", "look", "idt", "stack", "int3", "run"), 0.0),
}
"""How often each kind of step is taken, before the case's theme and its dice."""


@dataclass(frozen=True)
class Theme:
    """What a case is about."""

    group: str
    """One of `GROUPS`."""
    about: str
    weights: dict[str, float]
    """The steps that it takes more often."""
    guests: tuple[str, ...]
    """The paging that the guest may run with, each a key of `PAGING`; one is drawn."""
    vcpus: int = 0
    """How many; 0: drawn."""


ABOUT: Final[dict[str, dict[str, float]]] = {
    "everything": {"dirty": 1, "unmap": 1, "slots": 0.6, "quota": 0.6, "host": 2},
    "unsync": {"edit": 60, "alias_edit": 15, "cr3": 12, "invlpg": 10, "switch": 5},
    "flood": {"flood": 20, "reuse": 4, "edit": 30},
    "mmio": {"mmio": 25, "edit": 15, "slots": 0.5},
    "user": {"access": 60, "cow": 6},
    "roots": {"cr3": 25, "switch": 10, "crs": 2},
    "control": {"crs": 12, "access": 45},
    "dirty": {"dirty": 6, "host": 3, "access": 50},
    "slots": {"slots": 4, "mmio": 8},
    "unmap": {"unmap": 8, "host": 4, "edit": 30},
    "quota": {"quota": 2, "scan": 4, "switch": 8, "alias_edit": 10, "tour": 12, "crs": 4},
    "instructions": {"edit": 40, "flood": 4, "alias_edit": 12},
    "self": {"alias_edit": 30, "edit": 10},
    "huge": {"access": 45, "dirty": 2, "slots": 0.3, "reuse": 2, "quota": 0.3},
    "readonly": {"rom": 20, "access": 40, "mmio": 4, "slots": 0.4, "host": 3},
    "vcpus": {"edit": 40, "invlpg": 8, "cr3": 8, "flood": 3, "unmap": 0.5, "quota": 0.3},
    "devices": {"mmio": 20, "rom": 10, "edit": 15, "slots": 0.5, "cross": 4},
    "partial": {"edit": 45, "cross": 12, "flood": 5, "alias_edit": 15},
}
MORE: Final[dict[str, dict[str, dict[str, float]]]] = {
    "64-bit": {},
    "PAE": {"pdpt": {"pdpt": 15, "cr3": 10, "crs": 4}, "nx": {"crs": 10, "access": 50}},
    "two-level": {
        "pse": {"crs": 10, "access": 40, "edit": 30},
        "quadrants": {"edit": 40, "alias_edit": 10, "flood": 6},
    },
    "off": {"switching": {"paging": 15, "edit": 20}, "wp": {"crs": 12, "paging": 8}},
}
ALWAYS: Final[dict[str, dict[str, float]]] = {"64-bit": {}, "PAE": {"pdpt": 2}, "two-level": {}, "off": {"paging": 4}}
"""Steps that every theme of a guest takes."""
SHARED: Final = ("everything", "unsync", "flood", "user", "roots", "control", "dirty", "quota", "self", "partial")
"""What cases with several vCPUs are about."""
HOST: Final[dict[str, dict[str, float]]] = {
    "registers": {"sregs": 15, "edit": 30, "cr3": 8},
    "move": {"move": 4, "slots": 1, "mmio": 6},
    "clear": {"dirty": 5, "clear": 8, "access": 50},
    "pages": {"unmap": 8, "look": 8, "host": 4, "access": 40},
    "quota": {"quota": 6, "tour": 12, "scan": 4, "switch": 8},
    "delivery": {"idt": 10, "stack": 10, "int3": 6, "dirty": 2, "access": 40},
    "code": {"run": 15, "int3": 3, "edit": 30, "dirty": 1},
    "memory": {"move": 2, "slots": 2, "unmap": 3, "look": 2, "dirty": 2, "clear": 2, "rom": 6, "sregs": 2, "quota": 1},
}
"""What cases of the host's actions are about."""
PAGING: Final = ("64-bit", "PAE", "two-level", "off", "switched")
"""Of a guest: "off" starts often without paging, "switched" is a guest whose mode the host changes."""


def _themes() -> dict[str, Theme]:
    out = {}
    for guest, more in MORE.items():
        for about, weights in {**ABOUT, **more}.items():
            name = about if guest == "64-bit" else f"{guest} {about}"
            out[name] = Theme(guest, about, {**ALWAYS[guest], **weights}, (guest,))
    for guest in MORE:
        for about in SHARED:
            weights = {**ALWAYS[guest], **ABOUT[about]}
            out[f"vcpus {guest} {about}"] = Theme("vcpus", about, weights, (guest,), 2)
    for about, weights in HOST.items():
        guests = ("switched",) if about == "registers" else PAGING
        out[f"host {about}"] = Theme("host", about, weights, guests)
    return out


THEMES: Final = _themes()
"""By the name that a case bears. A seed's theme is its remainder among those of its group."""
GROUPS: Final = ("64-bit", "PAE", "two-level", "off", "vcpus", "host")
