"""The shadow tables as a tree of frozen views, taken at one moment."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from shadowkvm._core import Vm

__all__ = ["Page", "Role", "Root", "ShadowTree", "shadow_tree"]

_WRITABLE: Final = 1 << 1
# A text tree is for reading: of a table with more sub-tables than this the rest is counted.
_SHOWN: Final = 16


@dataclass(frozen=True, slots=True)
class Role:
    """What a shadow page was made for; two pages of one guest frame differ in it."""

    level: int
    """1: entries map 4K pages, 2: 2M, 3: 1G, 4: the top."""
    direct: bool
    """No guest table is behind it: it cuts a large guest page into small ones."""
    access: str
    """The rights that the guest's upper entries grant, as KVM prints them: "wux", "-u-", ..."""
    invalid: bool
    """Zapped, and kept only because it is still a root somewhere."""
    word: int
    """KVM's ``kvm_mmu_page_role.word``."""

    @property
    def quadrant(self) -> int:
        """Which part of a 32-bit guest's table the page stands for; 0 for 64-bit guests."""
        return self.word >> 5 & 3


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """One shadow page: 512 entries for one guest table, or for a large guest page, in one role."""

    id: int
    """The engine's number; a number is used again once its page is freed."""
    gfn: int
    """Frame number of the guest table (of the large guest page, if the role is direct)."""
    role: Role
    unsync: bool
    """The guest may write its table freely; it is compared at the next flush."""
    root_count: int
    """How many times it is held as a root."""
    unsync_children: int
    """Entries whose sub-tree may hold unsync pages."""
    flood: int
    """Writes to the guest table since the last fault through it; the third zaps the page."""
    generation: int
    """Pages of an older generation are obsolete."""
    entries: Mapping[int, int]
    """The entries in use: index (0 to 511) -> the 64-bit spte. Read-only."""
    children: Mapping[int, Page] = field(repr=False)
    """The entries that lead to another shadow page: index -> that page. Read-only."""

    @property
    def sptes(self) -> NDArray[np.uint64]:
        """All 512 entries, 0 where there is none: uint64, shape (512,), read-only."""
        out = np.zeros(512, np.uint64)
        out[list(self.entries)] = np.fromiter(self.entries.values(), np.uint64, len(self.entries))
        out.flags.writeable = False
        return out

    def __str__(self) -> str:
        """One line: number, frame, role, what is in it."""
        role = self.role
        words = [f"#{self.id} gfn {self.gfn:#x} l{role.level} {role.access}"]
        words += [name for name in ("direct", "invalid") if getattr(role, name)]
        if self.unsync:
            words.append("unsync")
        leaves = [spte for index, spte in self.entries.items() if index not in self.children]
        if leaves:
            writable = sum(1 for spte in leaves if spte & _WRITABLE)
            words.append(f"maps {len(leaves)} ({writable} writable)")
        if self.children:
            words.append(f"{len(self.children)} below")
        if self.unsync_children:
            words.append(f"{self.unsync_children} unsync below")
        if self.flood:
            words.append(f"flood {self.flood}")
        return " ".join(words)


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """The roots of one vCPU."""

    vcpu: int
    page: Page | None
    """What the CPU's CR3 points to; None while nothing is loaded, and for a PAE root."""
    quarters: tuple[Page | None, ...]
    """The four pages of a PAE root, one a GiB, as it is used for PAE, 32-bit and unpaged guests; else empty."""
    previous: tuple[Page | None, ...]
    """The cached roots, the last one used first."""


@dataclass(frozen=True, slots=True, eq=False)
class ShadowTree:
    """Every shadow page of a VM, and the roots that lead to them. A copy: it does not change when the VM goes on.

    ``str(tree)`` draws it, and so does a notebook.
    """

    pages: tuple[Page, ...]
    """Every shadow page, in the engine's order."""
    roots: tuple[Root, ...]
    """One for each vCPU."""

    def of(self, gfn: int) -> tuple[Page, ...]:
        """The shadow pages of one guest frame that are not direct: what KVM keeps of the guest table there."""
        return tuple(page for page in self.pages if page.gfn == gfn and not page.role.direct)

    def __len__(self) -> int:
        return len(self.pages)

    def __str__(self) -> str:
        return "\n".join(_drawing(self))

    def __repr__(self) -> str:
        levels = ", ".join(
            f"{sum(1 for page in self.pages if page.role.level == level)} l{level}"
            for level in sorted({page.role.level for page in self.pages}, reverse=True)
        )
        unsync = sum(1 for page in self.pages if page.unsync)
        return f"<ShadowTree: {len(self.pages)} pages ({levels or 'none'}), {unsync} unsync>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _drawing(tree: ShadowTree) -> Iterator[str]:
    seen: set[int] = set()
    for root in tree.roots:
        cached = [f"#{page.id}" for page in root.previous if page is not None]
        note = f" (cached: {', '.join(cached)})" if cached else ""
        yield f"vCPU {root.vcpu}:{'' if root.page or root.quarters else ' no root'}{note}"
        if root.page is not None:
            yield from _branch(root.page, "  ", seen)
        for gib, quarter in enumerate(root.quarters):
            if quarter is not None:
                yield from _branch(quarter, "  ", seen, f"[{gib} GiB] ")
        for page in root.previous:
            if page is not None and page.id not in seen:
                yield from _branch(page, "  ", seen)
    loose = [page for page in tree.pages if page.id not in seen]
    if loose:
        yield "under no root:"
    for page in sorted(loose, key=lambda page: -page.role.level):
        if page.id not in seen:
            yield from _branch(page, "  ", seen)


def _branch(page: Page, indent: str, seen: set[int], label: str = "") -> Iterator[str]:
    if page.id in seen:
        yield f"{indent}{label}#{page.id} as above"
        return
    seen.add(page.id)
    yield f"{indent}{label}{page}"
    children = list(page.children.items())
    for index, child in children[:_SHOWN]:
        yield from _branch(child, indent + "  ", seen, f"[{index}] ")
    if len(children) > _SHOWN:
        yield f"{indent}  ... {len(children) - _SHOWN} more"
        # Counted above, hence not loose.
        seen.update(_all_ids(child for _, child in children[_SHOWN:]))


def _all_ids(pages: Iterable[Page]) -> set[int]:
    out: set[int] = set()
    todo = list(pages)
    while todo:
        page = todo.pop()
        if page.id not in out:
            out.add(page.id)
            todo.extend(page.children.values())
    return out


def shadow_tree(vm: Vm) -> ShadowTree:
    """The shadow tables of a VM as they are now."""
    rows = vm.shadow_pages()
    made: dict[int, Page] = {}
    # From the bottom up: an entry leads to a page one level lower.
    for row in sorted(rows, key=lambda row: row[2]):
        number, gfn, level, access, direct, invalid, unsync, roots, below, flood, generation, word, sptes, ids = row
        pairs = zip(sptes, ids, strict=True)
        children = {index: made[child] for (index, _), child in pairs if child >= 0}
        made[number] = Page(
            id=number,
            gfn=gfn,
            role=Role(level, direct, access, invalid, word),
            unsync=unsync,
            root_count=roots,
            unsync_children=below,
            flood=flood,
            generation=generation,
            entries=MappingProxyType(dict(sptes)),
            children=MappingProxyType(children),
        )
    return ShadowTree(
        pages=tuple(made[row[0]] for row in rows),
        roots=tuple(
            Root(
                vcpu,
                made[current[0]] if len(current) == 1 else None,
                tuple(made.get(page) for page in current) if len(current) > 1 else (),
                tuple(made.get(page) for page in previous),
            )
            for vcpu, (current, previous) in enumerate(vm.roots())
        ),
    )
