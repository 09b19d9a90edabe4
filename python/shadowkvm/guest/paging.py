"""Paging: user code touches memory, and the kernel provides it; the page cache."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.guest.classify import Batch, Kind, Mappings, next_batch
from shadowkvm.guest.faults import HUGE, REMOTE, Handlers
from shadowkvm.guest.machine import PAGE_FAULT
from shadowkvm.guest.task import ABSENT, File, Process, Vma
from shadowkvm.ops import PAGE_SIZE, Flag, Op
from shadowkvm.pagetables import AddressSpace, Weave, make_rows
from shadowkvm.pagetables.entries import D
from shadowkvm.pagetables.walk import addresses

__all__ = ["Paging"]

_MOST: Final = 1 << 16
_LEAST: Final = 1 << 8


class Paging(Handlers):
    """A machine whose processes can use memory."""

    def touch(
        self, process: Process, gvas: ArrayLike, *, write: bool | NDArray[np.bool_] = False, fetch: bool = False
    ) -> None:
        """User code of a process uses memory; what is not there yet, or only to be read, faults and is provided.

        Args:
            process: who; it is switched to if it does not run.
            gvas: addresses in the order of use, shape (n,); each is one access of a machine word.
            write: stores, not loads: for all, or for each.
            fetch: instruction fetches.

        Raises:
            ConfigError: an address that is not mapped or that the mapping forbids (`trap` is for those).
        """
        self.run(process)
        used = addresses(gvas)
        written = np.broadcast_to(np.asarray(write, np.bool_), used.shape)
        if fetch and written.any():
            raise ConfigError("touch: a fetch does not write")
        mappings = Mappings.of(process.mm)
        at, size = 0, _MOST
        while at < len(used):
            batch = next_batch(process, mappings, used[at : at + size], written[at : at + size], fetch=fetch)
            if self._split_first(batch):
                continue
            self._settle(batch, fetch=fetch)
            at += len(batch.gvas)
            size = max(_LEAST, min(_MOST, 4 * len(batch.gvas)))

    def _settle(self, batch: Batch, *, fetch: bool) -> None:
        user = self._user_rows(batch.gvas, batch.written, fetch=fetch)
        if len(batch.events):
            self.enter_faults(batch, user)
            self.anonymous(batch)
            self.file_reads(batch)
            self.file_writes(batch)
            self.huge(batch)
            self.leave_faults(batch, self.write_protected(batch))
        batch.weave.add(user)
        if self.started:
            rows = batch.weave.rows()
            remote = rows["vcpu"] >= REMOTE
            rows["vcpu"] = np.where(remote, rows["vcpu"] - np.uint8(REMOTE), np.uint8(self.cpu.number))
            self.add(rows)
        self._mark(batch)

    def _mark(self, batch: Batch) -> None:
        """Set A and D where the CPU does: pages that a fault brought have them already."""
        found = batch.found
        clean = batch.written & (found.entry & np.uint64(D) == 0)
        need = found.present & (clean | ~found.accessed)
        if need.any():
            batch.process.space.touch(batch.gvas[need], write=batch.written[need])

    def _split_first(self, batch: Batch) -> bool:
        """Split the huge page that the first fault is about, if others have it, too (``__split_huge_pmd``)."""
        events = batch.events
        if not len(events) or batch.kind[events[0]] != Kind.HUGE_WP:
            return False
        found, process = batch.found, batch.process
        gva = int(batch.gvas[events[0]]) & -HUGE
        gfn = int(found.gpa[events[0]]) // HUGE * (HUGE // PAGE_SIZE)
        if self.refs[gfn] == 1:
            return False
        # Done before the fault here, not inside it: the guest makes the same stores.
        with self.syscall(process, "split_huge_page"):
            with self.stores():
                process.space.split(process.space.mode.level(2), int(found.slot[events[0]]), gva)
            self.flush_user(process.mm, gva, gva + HUGE, HUGE)
        return True

    def split_ends(self, space: AddressSpace, start: int, end: int, *, all_of_them: bool = False) -> None:
        """Split the huge pages that reach out of [start, end), or all of them (``vma_adjust_trans_huge``)."""
        found = space.leaves(start, end, hidden=True)
        last = found["gva"] + found["size"]
        out = (found["gva"] < np.uint64(start)) | (last > np.uint64(end)) | all_of_them
        for row in found[out & (found["size"] > PAGE_SIZE)]:
            with self.stores():
                space.split(space.mode.level(2), int(row["slot"]), int(row["gva"]))

    def _user_rows(self, gvas: NDArray[np.uint64], written: NDArray[np.bool_], *, fetch: bool) -> NDArray[np.void]:
        op = np.where(written, int(Op.WRITE), int(Op.FETCH if fetch else Op.READ))
        flags = np.where(written, int(Flag.USER | Flag.KEEP), int(Flag.USER))
        size = self.memory.mode.word
        return make_rows(op, gvas & ~np.uint64(size - 1), size=size, flags=flags, vcpu=self.cpu.number)

    def trap(self, process: Process, gvas: ArrayLike, *, write: bool = False, fetch: bool = False) -> None:
        """Accesses that the process's mappings forbid: each takes its fault and is told to the process by a signal.

        The kernel writes the signal frame to the process's stack, whose top page must be there and writable; the
        process's handler returns by a system call. What it does about it is the caller's business.

        Raises:
            ConfigError: the access is allowed, or would be after a page fault.
        """
        cpu = self.run(process)
        used = addresses(gvas)
        mappings = Mappings.of(process.mm)
        index = mappings.index(process, used)
        allowed = (mappings.execute if fetch else mappings.write if write else mappings.read)[index]
        if allowed.any():
            raise ConfigError(f"trap: process {process.pid} may do so at {int(used[int(np.argmax(allowed))]):#x}")
        found = process.space.walk(used, user_root=True)
        weave, user = Weave(len(used)), self._user_rows(used, np.full(used.shape, write), fetch=fetch)
        user["flags"] |= int(Flag.FAULTS)
        user["value"] = 4 + 2 * write + found.present + (16 if fetch and self.memory.mode.nx else 0)
        weave.add(user)
        way_in = (*cpu.delivery(PAGE_FAULT), *cpu.enter(process.kernel_stack, PAGE_FAULT))
        frame = make_rows(Op.WRITE, process.mm.stack_top - 512, size=self.memory.mode.word, flags=Flag.AC | Flag.KEEP)
        first = [*way_in, *frame, *cpu.leave()]
        back = [*cpu.enter(process.kernel_stack, 15), *cpu.leave()]
        for row in (*first, *back):
            weave.add(np.atleast_1d(row))
        rows = weave.rows()
        rows["vcpu"] = cpu.number
        if self.started:
            self.add(rows)

    # -- files --------------------------------------------------------------------------------------------------------

    def file(self, pages: int, name: str = "file", *, cached: bool = True) -> File:
        """A file of so many pages; ``cached``: all of them are in the page cache already."""
        if pages < 1:
            raise ConfigError(f"file {name!r}: {pages} pages")
        file = File(name, np.full(pages, ABSENT, np.uint64))
        if cached:
            self.bring(file, np.arange(pages))
        return file

    def put(self, gfns: NDArray[np.uint64]) -> None:
        """One holder less for each frame; those that nobody holds are free (``put_page``)."""
        at = gfns[gfns != np.uint64(self.zero)].astype(np.int64)
        np.subtract.at(self.refs, at, 1)
        gone = at[self.refs[at] == 0]
        _, first = np.unique(gone, return_index=True)
        self.memory.frames.give(gone[np.sort(first)].astype(np.uint64))

    def forget(self, gone: list[Vma]) -> None:
        """Free the pages of shared anonymous memory that nobody maps any more."""
        for vma in gone:
            if vma.file is not None and vma.file.unnamed and not vma.file.maps:
                self.put(vma.file.frames[vma.file.frames != ABSENT])
                vma.file.frames[:] = ABSENT

    def put_huge(self, gfn: int) -> None:
        """One holder less for a 2 MiB page."""
        at = np.arange(gfn, gfn + HUGE // PAGE_SIZE)
        self.refs[at] -= 1
        if not self.refs[at].any():
            self.memory.frames.give_huge(gfn)
        else:
            gone = at[self.refs[at] == 0]
            self.memory.frames.give(gone.astype(np.uint64))
