"""Lifecycle: processes are made, fork, execute programs, exit.

Rules of Linux 6.1: kernel/fork.c (``dup_mmap``), mm/memory.c (``copy_page_range``, ``vma_needs_copy``), fs/exec.c
(``exec_mmap``), mm/mmap.c (``exit_mmap``).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from shadowkvm.errors import ConfigError
from shadowkvm.guest.calls import Gather
from shadowkvm.guest.faults import HUGE
from shadowkvm.guest.kernelmaps import KernelMaps
from shadowkvm.guest.machine import Settings
from shadowkvm.guest.task import Mm, Process, Program, Vma
from shadowkvm.ops import PAGE_SIZE, Flag, Op

__all__ = ["Lifecycle"]

_STACK_PAGES: Final = 4
_USER_STACK: Final = 33
_CACHED_STACKS: Final = 2
# Pages that the end of the stack is moved down, at most: 32-bit, 64-bit (STACK_RND_MASK).
_STACK_SHIFT: Final = (0x7FF, 0x3FFFFF)
_EXIT: Final = 60


class Lifecycle(KernelMaps):
    """A machine on which processes come and go."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._stacks: list[int] = []

    def program(self, *, text: int = 64, data: int = 16, bss: int = 16, heap: int = 0) -> Program:
        """A program in the page cache, with so many pages (4 KiB) of code, data, zeroed memory and heap."""
        return Program(self.file(text, "text"), self.file(data, "data"), bss, heap)

    def spawn(self, program: Program | None = None) -> Process:
        """A process out of nothing, as the first one at boot; it does not run yet."""
        process = Process(self.pid(), self.new_mm(), self._stack(), program)
        process.mm.users = 1
        self.processes[process.pid] = process
        self._load(process.mm, program)
        return process

    def thread(self, process: Process) -> Process:
        """One more thread: a task with the same address space. It waits."""
        with self.syscall(process, "clone"):
            thread = Process(self.pid(), process.mm, self._stack(), process.program)
            process.mm.users += 1
            self.processes[thread.pid] = thread
        return thread

    def fork(self, parent: Process) -> Process:
        """A copy of a process; it waits, and the parent goes on.

        Mapping by mapping, table by table: the parent's entry is write-protected, the child's stored. What can be
        faulted in again (files of which nothing was written) is not copied. Then the parent's TLB entries are flushed.
        """
        with self.syscall(parent, "fork"):
            stack = self._stack()
            with self.stores():
                mm = self.new_mm()
            mm.stack_top = parent.mm.stack_top
            for vma in parent.mm.vmas:
                copy = Vma(
                    vma.start, vma.end, vma.read, vma.write, vma.execute, vma.file, vma.offset,
                    shared=vma.shared, huge=vma.huge,
                )  # fmt: skip
                mm.insert(copy)
                if vma.file is None or (vma.write and not vma.shared):
                    self._copy_mapping(parent.mm, mm, vma)
            self.flush_user(parent.mm, 0, self.memory.mode.user_half)
            child = Process(self.pid(), mm, stack, parent.program)
            mm.users = 1
            child.last_cpu = parent.last_cpu
            self.processes[child.pid] = child
        return child

    def _copy_mapping(self, parent: Mm, child: Mm, vma: Vma) -> None:
        found = parent.space.leaves(vma.start, vma.end, hidden=True)
        gfns = found["gpa"] >> np.uint64(12)
        small = found["size"] == PAGE_SIZE
        np.add.at(self.refs, gfns[small & (gfns != self.zero)].astype(np.int64), 1)
        for gfn in gfns[~small].tolist():
            self.refs[gfn : gfn + HUGE // PAGE_SIZE] += 1
        self.emit(self.note_pages(gfns))
        with self.stores():
            parent.space.clone_range(child.space, vma.start, vma.end, cow=not vma.shared)

    def exec(self, process: Process, program: Program) -> None:
        """Replace what a process runs: a new address space, then the old one is taken down.

        Raises:
            ConfigError: other threads share the address space.
        """
        old = process.mm
        if old.users > 1:
            raise ConfigError(f"exec: {old.users} tasks share the address space")
        with self.syscall(process, "execve"):
            with self.stores():
                mm = self.new_mm()
            mm.users = 1
            self._arguments(mm)
            process.mm = mm
            # activate_mm: from here on the old one is loaded nowhere.
            self.emit(self.cpu.load(mm))
            self._exit_mm(old)
            process.program = program
            self._load(mm, program)
            self._shift_stack(mm)
        self.touch(process, [mm.stack_top - 64])

    def _arguments(self, mm: Mm) -> None:
        """The kernel writes a program's arguments to the page where its stack will end (``copy_strings``)."""
        gva = self.layout.stack_top - PAGE_SIZE
        gfn = self.memory.frames.take()
        self.refs[gfn] = 1
        word = self.memory.mode.word
        self.act(Op.STORE, self.direct(gfn << np.uint64(12)), size=word, flags=Flag.KEEP)
        self.emit(self.note_pages(gfn))
        with self.stores():
            mm.space.map(gva, gfn << np.uint64(12), PAGE_SIZE, nx=self.memory.mode.nx)
        self.act(Op.WRITE, self.direct(gfn << np.uint64(12)), size=word, flags=Flag.KEEP)

    def _shift_stack(self, mm: Mm) -> None:
        """Move the stack to its place (``shift_arg_pages``): the entry moved, flushed, the old tables freed."""
        source = self.layout.stack_top - PAGE_SIZE
        with self.stores():
            self._move_entries(mm.space, source, mm.stack_top - PAGE_SIZE, PAGE_SIZE)
        self.flush_user(mm, source, source + PAGE_SIZE)
        gather = Gather(self, mm)
        gather.free_tables(source, source + PAGE_SIZE)
        span = self.memory.mode.level(2).size
        gather.finish(source // span * span, source // span * span + span)

    def exit(self, process: Process, then: Process | None = None) -> None:
        """End a process: its memory goes, and ``then`` runs on its CPU (None: nobody, the CPU idles).

        The CPU leaves the dying address space for the kernel's own before tables are freed (lazy TLB).
        """
        cpu = self.run(process)
        if then is not None and (then.pid not in self.processes or then is process):
            raise ConfigError(f"exit: {then!r} cannot run then")
        self._enter(process, _EXIT)
        mm = process.mm
        mm.users -= 1
        cpu.task = process.cpu = None
        if not mm.users:
            self._exit_mm(mm)
        del self.processes[process.pid]
        self._free_stack(process.kernel_stack)
        if then is not None:
            if then.cpu is not None:
                self.idle(then.cpu)
            self._resume(then)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _load(self, mm: Mm, program: Program | None) -> None:
        """Map a program and a stack; nothing is there before it is touched."""
        shift = int(self.random.integers(1, _STACK_SHIFT[self.memory.mode.address_bits > 32]))
        top = mm.stack_top = self.layout.stack_top - shift * PAGE_SIZE
        mm.insert(Vma(top - _USER_STACK * PAGE_SIZE, top, read=True, write=True, execute=False))
        if program is not None:
            for vma in program.vmas(self.layout.program):
                mm.insert(vma)

    def _exit_mm(self, mm: Mm) -> None:
        """exit_mmap: entries cleared by plain stores, tables unlinked, frames freed; the top table last."""
        gather = Gather(self, mm, final=True)
        gone = list(mm.vmas)
        for vma in gone:
            gather.zap(vma.start, vma.end)
        for vma in gone:
            mm.remove(vma)
        if gone:
            gather.free_tables(gone[0].start, gone[-1].end)
        for number in list(mm.cpus):
            # Lazily loaded still: tables were freed, so the CPU must not walk them any more.
            cpu = self.cpus[number]
            self.emit(cpu.load(self.init_mm), cpu)
        gather.finish(0, 0)
        self.forget(gone)
        self.free_tables(mm.space.detach().tolist())

    def _stack(self) -> int:
        """A kernel stack: one that is cached, or a new one from vmalloc. The address of the page used first."""
        base = self._stacks.pop() if self._stacks else self.vmalloc(_STACK_PAGES)
        return base + (_STACK_PAGES - 1) * PAGE_SIZE + PAGE_SIZE - 256

    def _free_stack(self, stack: int) -> None:
        base = stack + 256 - _STACK_PAGES * PAGE_SIZE
        if len(self._stacks) < _CACHED_STACKS * len(self.cpus):
            self._stacks.append(base)
        else:
            self.vfree(base, _STACK_PAGES)
