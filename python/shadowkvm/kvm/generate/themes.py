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
    "pdpt": 0,
    "paging": 0,
}
"""How often each kind of step is taken, before the case's theme and its dice."""


@dataclass(frozen=True)
class Theme:
    """What a case is about."""

    group: str
    """The guest: "64-bit", "PAE", "two-level", "off" (paging off, and switched)."""
    about: str
    weights: dict[str, float]
    """The steps that it takes more often."""


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
    "two-level": {"pse": {"crs": 10, "access": 40, "edit": 30}, "quadrants": {"edit": 40, "alias_edit": 10, "flood": 6}},
    "off": {"switching": {"paging": 15, "edit": 20}, "wp": {"crs": 12, "paging": 8}},
}
ALWAYS: Final[dict[str, dict[str, float]]] = {"64-bit": {}, "PAE": {"pdpt": 2}, "two-level": {}, "off": {"paging": 4}}
"""Steps that every theme of a group takes."""
GROUPS: Final = tuple(MORE)
THEMES: Final[dict[str, Theme]] = {
    (about if group == "64-bit" else f"{group} {about}"): Theme(group, about, {**ALWAYS[group], **weights})
    for group in GROUPS
    for about, weights in {**ABOUT, **MORE[group]}.items()
}
"""By the name that a case bears. A seed's theme is its remainder among those of its group."""
