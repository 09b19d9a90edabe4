"""From events and from the shadow before and after to a story."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm import feed
from shadowkvm.errors import ConfigError
from shadowkvm.events import ALL_EVENTS, EVENT_INFO, event_array
from shadowkvm.explain import words
from shadowkvm.explain.story import Change, Entry, Step, Story
from shadowkvm.ops import Op
from shadowkvm.result import OUTCOME_DTYPE, STATUS_NAMES
from shadowkvm.shadow import Page, ShadowTree
from shadowkvm.trace import Recording
from shadowkvm.vm import Vm

if TYPE_CHECKING:
    from shadowkvm._core import Outcome

__all__ = ["explain", "explain_row", "explain_rows"]

_NAMES: Final = {info.code: info.name for info in EVENT_INFO.values()}
_SHIFTS: Final = {8: 9, 4: 10}


def explain(vm: Vm, call: Callable[[], Outcome], title: str = "", *, vcpu: int = 0) -> Story:
    """Do something on a VM, and tell what it did.

    Args:
        vm: the machine. Events are recorded meanwhile, whatever it was made with; those that it had stay.
        call: one operation, such as ``lambda: vm.vcpus[0].write(0x1000, 1)``; it is carried out.
        title: what the story is about; "" says nothing of it.
        vcpu: the vCPU whose walk of the shadow is told.

    Raises:
        whatever ``call`` raises; the VM's choice of events is as it was.

    >>> from shadowkvm.explain import demo
    >>> vm, acts = demo("first_touch")
    >>> story = explain(vm, acts[0].call, acts[0].title)
    >>> print(story.steps[2].text)
    VM exit: #PF. Under shadow paging every page fault is KVM's first: address 0x100000, error code W
    """
    before, counters = vm.shadow(), vm.counters
    registers = vm.vcpus[vcpu].sregs
    old = vm.set_event_mask(ALL_EVENTS)
    first = len(vm.event_records()) // 40
    try:
        outcome = call()
    finally:
        vm.set_event_mask(old)
    events = event_array(vm.event_records())[first:]
    if old == 0 and first == 0:
        vm.clear_events()
    after = vm.shadow()
    changes = tuple(_changes(before, after))
    teller = _Teller(before, after, registers, vcpu)
    exits = np.flatnonzero(events["kind"] == EVENT_INFO["kvm_exit"].code)
    entry = int(exits[0]) if len(exits) else len(events)
    steps = [*teller.tell(events[:entry]), *teller.cpu_walk(events), *teller.tell(events[entry:])]
    steps.append(teller.end(outcome, events))
    return Story(title, tuple(steps), changes, vm.counters - counters, outcome.status, teller.tables)


def explain_row(
    source: NDArray[np.void] | Recording, number: int, *, memory: int = 128 << 20, **settings: Any
) -> Story:
    """Tell what one row of a trace does, after all rows before it were run on a fresh VM.

    Args:
        source: a trace, or a recording.
        number: the row, from 0.
        memory: bytes of guest memory for a trace; a recording says it itself.
        settings: policy, profile, ...: see `Vm`.

    Raises:
        ConfigError: there is no such row.
        TraceError: a row cannot be run.
    """
    return explain_rows(source, number, 1, memory=memory, **settings)[0]


def explain_rows(
    source: NDArray[np.void] | Recording, first: int, count: int, *, memory: int = 128 << 20, **settings: Any
) -> list[Story]:
    """The same for ``count`` rows, as many as there are: the rows before the first are run once."""
    feed.check_trace(source)
    if not 0 <= first < len(source):
        raise ConfigError(f"row {first:,}: the trace has rows 0 to {len(source) - 1:,}")
    vm = Vm(source.meta["memory"] if isinstance(source, Recording) else memory, **settings)
    if isinstance(source, Recording):
        feed.prepare(vm, source)
    stories: list[Story] = []
    for piece in feed.pieces(source):
        before = min(max(first - piece.first, 0), len(piece.rows))
        vm.run_rows(piece.rows[:before].view(np.uint8).data, piece.first, piece.pages)
        for at in range(before, min(first + count - piece.first, len(piece.rows))):
            row, number = piece.rows[at : at + 1], piece.first + at
            call = partial(_step, vm, row, number, piece.pages)
            stories.append(explain(vm, call, _row_title(row, number), vcpu=int(row["vcpu"][0])))
        if piece.first + len(piece.rows) >= first + count:
            break
    return stories


class _Ended:
    """What a row came to, as an Outcome tells it."""

    def __init__(self, packed: bytes) -> None:
        row = np.frombuffer(packed, OUTCOME_DTYPE)[0]
        self.status = STATUS_NAMES[int(row["status"])]
        self.value, self.address, self.error_code = (int(row[name]) for name in ("value", "address", "error_code"))


def _step(vm: Vm, row: NDArray[np.void], number: int, pages: bytes) -> Any:
    packed = vm.run_rows(row.view(np.uint8).data, number, pages, outcomes=True)[5]
    return _Ended(packed or b"")


def _row_title(row: NDArray[np.void], number: int) -> str:
    op = Op(int(row["op"][0]))
    addr, value, size = (int(row[name][0]) for name in ("addr", "value", "size"))
    return f"Row {number:,}: {op.name} addr {addr:#x} value {value:#x} size {size}, vCPU {int(row['vcpu'][0])}"


def _name(page: Page) -> str:
    return words.page_words(page.id, page.gfn, page.role.level, direct=page.role.direct)


def _changes(before: ShadowTree, after: ShadowTree) -> Iterator[Change]:
    """What is otherwise: pages, entries, marks."""
    old, new = ({(p.id, p.gfn, p.role.word): p for p in tree.pages} for tree in (before, after))
    for identity, page in old.items():
        if identity not in new:
            yield Change("page zapped", _name(page), None, None, None, f"zapped: shadow page {_name(page)}")
    empty: dict[int, int] = {}
    for identity, page in new.items():
        was = old.get(identity)
        if was is None:
            yield Change("page made", _name(page), None, None, None, f"made: shadow page {_name(page)}")
        for index in sorted(set(page.entries) | set(was.entries if was else empty)):
            one, two = (was.entries if was else empty).get(index, 0), page.entries.get(index, 0)
            if one != two:
                level = page.role.level
                text = f"{_name(page)}[{index}]: {words.spte(one, level)} -> {words.spte(two, level)}"
                yield Change("entry", _name(page), index, one, two, text)
        if was is not None and was.unsync != page.unsync:
            how = "out of sync" if page.unsync else "back in step"
            yield Change("unsync", _name(page), None, int(was.unsync), int(page.unsync), f"{_name(page)}: {how}")
        if was is not None and was.flood != page.flood:
            text = f"{_name(page)}: {page.flood} stores counted against it (before: {was.flood})"
            yield Change("flood", _name(page), None, was.flood, page.flood, text)


class _Teller:
    """Tells events one after the other."""

    def __init__(self, before: ShadowTree, after: ShadowTree, registers: dict[str, int], vcpu: int) -> None:
        self.before, self.after, self.vcpu = before, after, vcpu
        self.cr3, self.width = registers["cr3"], 8 if registers["cr4"] & 0x20 else 4
        self.tables: dict[str, Any] = {"guest": [], "shadow": []}
        self.gva: int | None = None
        self.reason = 0
        self.emulating = self.device = False

    # -- the CPU ---------------------------------------------------------------------------------------------------

    def cpu_walk(self, events: NDArray[np.void]) -> Iterator[Step]:
        """The CPU's own walk, if it ended in a fault."""
        faults = events[events["kind"] == EVENT_INFO["kvm_page_fault"].code]
        if not len(faults):
            if not (events["kind"] == EVENT_INFO["kvm_exit"].code).any():
                yield Step("cpu", "The CPU walks the shadow tables, and nothing stops it: no fault, no exit.")
            return
        self.gva, code = int(faults[0]["b"]), int(faults[0]["code"])
        entries = tuple(self._shadow_walk(self.gva))
        self.tables["shadow"] = list(entries)
        end = entries[-1] if entries else None
        why = "the new root is empty"
        if end is not None:
            why = (
                f"the entry of level {end.level} is {end.meaning}" if end.value == 0 else f"of the entry: {end.meaning}"
            )
        fault = f"#PF, error code {words.error_code(code)}"
        text = f"The CPU walks the shadow tables for {self.gva:#x} and must stop: {fault}."
        yield Step("cpu", text, entries=entries, why=why)

    def _shadow_walk(self, gva: int) -> Iterator[Entry]:
        root = self.before.roots[self.vcpu]
        page = root.page if root.page is not None else (root.quarters[gva >> 30 & 3] if root.quarters else None)
        while page is not None:
            level = page.role.level
            index = gva >> (12 + 9 * (level - 1)) & 511
            value = page.entries.get(index, 0)
            yield Entry(level, f"#{page.id}", index, value, words.spte(value, level))
            page = page.children.get(index)

    # -- KVM -------------------------------------------------------------------------------------------------------

    def tell(self, events: NDArray[np.void]) -> Iterator[Step]:
        """A step for each event, neighbours of a kind in one."""
        rest: list[Any] = list(events)
        while rest:
            event = rest.pop(0)
            name = _NAMES[int(event["kind"])].removeprefix("kvm_mmu_").removeprefix("kvm_")
            tell = getattr(self, f"_{name}", None)
            if tell is not None:
                yield from tell(event, rest)

    def _exit(self, event: Any, rest: list[Any]) -> Iterator[Step]:
        reason = self.reason = int(event["code"])
        if reason == 0 and rest and _NAMES[int(rest[0]["kind"])] == "kvm_page_fault":
            fault = rest.pop(0)
            self.gva = int(fault["b"])
            text = (
                f"VM exit: #PF. Under shadow paging every page fault is KVM's first: address {self.gva:#x}, error code "
                f"{words.error_code(int(fault['code']))}"
            )
            yield Step("kvm", text, "kvm_mmu_page_fault")
        else:
            yield Step("kvm", f"VM exit: {words.REASONS.get(reason, f'reason {reason}')}.", "svm_handle_exit")

    def _pagetable_walk(self, event: Any, rest: list[Any]) -> Iterator[Step]:
        gva, code = int(event["a"]), int(event["code"])
        entries, table = [], f"gfn {self.cr3 >> 12:#x}"
        while rest and _NAMES[int(rest[0]["kind"])] == "kvm_mmu_paging_element":
            element = rest.pop(0)
            level, value = int(element["level"]), int(element["a"])
            bits = _SHIFTS[self.width]
            index = gva >> (12 + bits * (level - 1)) & ((1 << bits) - 1)
            entries.append(Entry(level, table, index, value, words.gpte(value, level)))
            table = f"gfn {(value & 0x000F_FFFF_FFFF_F000) >> 12:#x}"
        self.tables["guest"] = self.tables["guest"] or entries
        text = f"KVM walks the guest's own tables for {gva:#x} ({words.error_code(code)})."
        yield Step("kvm", text, "FNAME(walk_addr_generic)", tuple(entries))

    def _set_accessed_bit(self, event: Any, rest: list[Any]) -> Iterator[Step]:
        marks = {"kvm_mmu_set_accessed_bit": "A", "kvm_mmu_set_dirty_bit": "D"}
        set_at = [f"{marks[_NAMES[int(event['kind'])]]} at gpa {int(event['a']):#x}"]
        while rest and _NAMES[int(rest[0]["kind"])] in marks:
            more = rest.pop(0)
            set_at.append(f"{marks[_NAMES[int(more['kind'])]]} at gpa {int(more['a']):#x}")
        text = f"It sets what the CPU would have set in the guest's entries: {', '.join(set_at)}."
        yield Step("kvm", text, "FNAME(update_accessed_dirty_bits)")

    _set_dirty_bit = _set_accessed_bit

    def _walker_error(self, event: Any, _: list[Any]) -> Iterator[Step]:
        code = words.error_code(int(event["code"]))
        yield Step("kvm", f"The guest's tables forbid the access: the fault is the guest's own, error code {code}.",
                   "FNAME(page_fault)")  # fmt: skip

    def _get_page(self, event: Any, _: list[Any]) -> Iterator[Step]:
        gfn, level, made = int(event["a"]), int(event["code"]) & 15, bool(event["flag"] & 2)
        how = "makes a shadow page for" if made else "finds the shadow page of"
        why = "" if not made else self._protected(level)
        yield Step("kvm", f"KVM {how} the guest's table in gfn {gfn:#x}, level {level}.", "kvm_mmu_get_page", why=why)

    @staticmethod
    def _protected(level: int) -> str:
        if level > 1:
            return "no page stands for that table yet; from now on the table is write-protected (kvm_page_track)"
        return (
            "no page stands for that table yet; as a last-level table it is write-protected until it goes out of sync"
        )

    def _unsync_page(self, event: Any, _: list[Any]) -> Iterator[Step]:
        gfn = int(event["a"])
        why = "it is a last-level table only; as a TLB may, the shadow may keep old entries until the guest flushes"
        text = f"The guest's last-level table gfn {gfn:#x} is to be written: it goes out of sync, and may be."
        yield Step("kvm", text, "mmu_try_to_unsync_pages", why=why)

    def _sync_page(self, event: Any, _: list[Any]) -> Iterator[Step]:
        text = f"The table gfn {int(event['a']):#x} is compared entry by entry, and is in step again."
        yield Step("kvm", text, "kvm_sync_page", why="the guest flushes: the shadow may not lag behind any longer")

    def _prepare_zap_page(self, event: Any, _: list[Any]) -> Iterator[Step]:
        gfn, level = int(event["a"]), int(event["code"]) & 15
        flooded = [page for page in self.before.of(gfn) if page.role.level == level and page.flood]
        why = ""
        if flooded and self.emulating:
            why = f"{flooded[0].flood + 1} stores in a row without a use in between: it seems to be a table no more"
        yield Step(
            "kvm", f"The shadow page of gfn {gfn:#x}, level {level}, is zapped.", "kvm_mmu_prepare_zap_page", why=why
        )

    def _spte_requested(self, event: Any, rest: list[Any]) -> Iterator[Step]:
        gfn, level = int(event["a"]), int(event["level"])
        yield Step("kvm", f"The leaf is to map gfn {gfn:#x} at level {level}.", "FNAME(fetch)")
        if rest and _NAMES[int(rest[0]["kind"])] == "kvm_mmu_unsync_page":
            yield from self._unsync_page(rest.pop(0), rest)
        if rest and _NAMES[int(rest[0]["kind"])] == "kvm_mmu_set_spte" and int(rest[0]["a"]) == gfn:
            yield from self._leaf(rest.pop(0))
        yield from self._neighbours(rest)

    def _leaf(self, event: Any) -> Iterator[Step]:
        value, level, gfn = int(event["b"]), int(event["level"]), int(event["a"])
        why = ""
        if not value & 2 and self._tables_in(gfn):
            why = f"gfn {gfn:#x} holds {self._tables_in(gfn)}: it is mapped read-only, so that KVM hears of stores"
        yield Step("kvm", f"The entry is written: {words.spte(value, level)}.", "make_spte", why=why)

    def _neighbours(self, rest: list[Any]) -> Iterator[Step]:
        count = 0
        while rest and _NAMES[int(rest[0]["kind"])] == "kvm_mmu_set_spte":
            rest.pop(0)
            count += 1
        if count:
            text = f"{count} neighbours that the guest has used before are filled in with it."
            yield Step(
                "kvm", text, "FNAME(pte_prefetch)", why="the guest is likely to want them next, and a fault is dear"
            )

    def _set_spte(self, event: Any, rest: list[Any]) -> Iterator[Step]:
        if words.REASONS.get(self.reason) == "INVLPG":
            made = words.spte(int(event["b"]), int(event["level"]))
            text = f"The table is out of sync: the entry of this address is made again, {made}."
            yield Step("kvm", text, "FNAME(invlpg)", why="no other entry was flushed")
            return
        yield from self._leaf(event)
        yield from self._neighbours(rest)

    def _tables_in(self, gfn: int) -> str:
        levels = sorted({page.role.level for page in (*self.before.of(gfn), *self.after.of(gfn))})
        return f"a shadowed table of level {', '.join(map(str, levels))}" if levels else ""

    def _emulate_insn(self, event: Any, _: list[Any]) -> Iterator[Step]:
        del event
        gva, why = self.gva, "it is a device, not memory" if self.device else "this CPU does not decode it for KVM"
        if gva is not None and self.tables["guest"]:
            last = self.tables["guest"][-1]
            inside = gva & ((1 << (12 + 9 * (last.level - 1))) - 1)
            gfn = ((last.value & 0x000F_FFFF_FFFF_F000) + inside) >> 12
            tables = self._tables_in(gfn)
            why = (
                f"gfn {gfn:#x} holds {tables}, and upper-level tables stay protected"
                if tables
                else "no memory is there"
            )
        self.emulating = True
        text = "The access cannot be let through: KVM carries the instruction out itself."
        yield Step("kvm", text, "x86_emulate_instruction", why=why)

    def _inj_exception(self, event: Any, _: list[Any]) -> Iterator[Step]:
        vector, code = int(event["level"]), int(event["code"])
        what = f"#PF, error code {words.error_code(code)}" if vector == 14 else f"exception {vector}"
        yield Step("kvm", f"The guest gets {what}; its handler runs next.", "kvm_inject_emulated_page_fault")

    def _mark_mmio_spte(self, event: Any, rest: list[Any]) -> Iterator[Step]:
        text = f"gfn {int(event['b']):#x} has no memory: an entry is written that faults on purpose and remembers that."
        self.device = True
        yield Step("kvm", text, "mark_mmio_spte")
        yield from self._neighbours(rest)

    def _handle_mmio_page_fault(self, event: Any, _: list[Any]) -> Iterator[Step]:
        text = f"The entry says that gfn {int(event['b']):#x} is a device: no walk is needed."
        self.device = True
        yield Step("kvm", text, "handle_mmio_page_fault")

    def _mmio(self, event: Any, _: list[Any]) -> Iterator[Step]:
        how = ("a read that user space must answer", "a read", "a write")[int(event["flag"]) % 3]
        yield Step("kvm", f"Access to a device at gpa {int(event['a']):#x}: {how}.", "kernel_mmio")

    def end(self, outcome: Any, events: NDArray[np.void]) -> Step:
        """How it goes on."""
        exits = (events["kind"] == EVENT_INFO["kvm_exit"].code).any()
        texts = {
            "done": "The access is made." if not exits else "The guest is entered again, and the instruction is done.",
            "page_fault": "The guest is entered again, at its own #PF handler.",
            "general_protection": "The guest is entered again, at its #GP handler.",
            "mmio": "User space plays the device; then the guest is entered again.",
            "livelock": "The instruction runs again and again: nothing that KVM does lets it through.",
            "shutdown": "The guest shuts down: no handler could be reached.",
        }
        return Step("guest", texts.get(outcome.status, f"It ends with {outcome.status}."))
