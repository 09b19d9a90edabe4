"""Scheduler: which process runs where, system calls, switches from one process to another."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shadowkvm.errors import ConfigError
from shadowkvm.guest.cpu import Cpu
from shadowkvm.guest.machine import Settings
from shadowkvm.guest.task import Process
from shadowkvm.guest.tlb import Tlb
from shadowkvm.ops import PAGE_SIZE, Flag, Op

__all__ = ["Scheduler"]

_TIMER: Final = 0xEC
_HANDLERS: Final = 128
_SCHEDULE: Final = 210


class Scheduler(Tlb):
    """A machine that runs processes."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.processes: dict[int, Process] = {}
        """Those that live, by pid."""
        self._next_pid = 1

    def switch(self, process: Process, cpu: int | None = None) -> None:
        """Have a process run on a CPU (None: where it ran last); who ran there waits from now on.

        Both are in user code before and after: the old one goes into the kernel (a system call that sleeps), CR3 is
        loaded if the address spaces differ, the new one comes out.
        """
        number = process.last_cpu if cpu is None else cpu
        if not 0 <= number < len(self.cpus):
            raise ConfigError(f"cpu {number}: the guest has {len(self.cpus)}")
        where = self.cpus[number]
        if process.pid not in self.processes:
            raise ConfigError(f"{process!r} is gone")
        if process.cpu is not None and process.cpu != number:
            self.idle(process.cpu)
        self.cpu = where
        if where.task is process:
            return
        if where.task is not None:
            self._enter(where.task, _SCHEDULE)
            where.task.cpu = None
        self._resume(process)

    def _enter(self, process: Process, handler: int) -> None:
        """From the user code of a process, which runs on this CPU, into the kernel."""
        self.emit(self.cpu.enter(process.kernel_stack, handler))
        self.cpu.inside = True

    def _leave(self) -> None:
        """Back to the user code of who runs on this CPU."""
        self.emit(self.cpu.leave())
        self.cpu.inside = False

    def _resume(self, process: Process) -> None:
        """In the kernel of this CPU: switch to a process and go to its user code (``context_switch``)."""
        cpu = self.cpu
        self.emit(cpu.load(process.mm))
        self.act(Op.WRITE, process.kernel_stack, size=self.memory.mode.word, flags=Flag.KEEP)
        cpu.task = process
        process.cpu = process.last_cpu = cpu.number
        self._leave()

    def idle(self, cpu: int) -> None:
        """Whoever runs on that CPU waits from now on; the CPU keeps its address space (lazy TLB)."""
        where, before = self.cpus[cpu], self.cpu
        if where.task is not None:
            self.cpu = where
            self._enter(where.task, _SCHEDULE)
            self.cpu = before
            where.task.cpu = None
            where.task = None

    def run(self, process: Process) -> Cpu:
        """Make sure that the process runs; the CPU it is on."""
        if process.cpu is None or process.cpu != self.cpu.number:
            self.switch(process, process.cpu)
        return self.cpu

    @contextmanager
    def syscall(self, process: Process, name: str) -> Iterator[Cpu]:
        """A system call: the way in, what the ``with`` block does in the kernel, the way out."""
        cpu = self.run(process)
        self._enter(process, zlib.crc32(name.encode()) % _HANDLERS)
        yield cpu
        self._leave()

    @contextmanager
    def in_kernel(self) -> Iterator[Cpu]:
        """What the ``with`` block does is done in the kernel of this CPU.

        If user code runs there, a kernel thread takes the CPU for a while; the address space stays loaded (lazy TLB).
        """
        cpu = self.cpu
        task = None if cpu.inside else cpu.task
        if task is not None:
            self._enter(task, _SCHEDULE)
        yield cpu
        if task is not None:
            self._leave()

    def interrupt(self, process: Process, vector: int = _TIMER) -> None:
        """An interrupt hits the process: delivery, handler, return."""
        cpu = self.run(process)
        self.act(Op.INTR, value=vector)
        self.emit(cpu.delivery(vector))
        self._enter(process, _HANDLERS + vector % 64)
        self._leave()

    def pid(self) -> int:
        """A new process number."""
        self._next_pid += 1
        return self._next_pid - 1

    def kernel_data(self, index: int, *, write: bool = False) -> None:
        """The kernel touches page ``index`` of its own data."""
        gva = self.layout.data + (index * PAGE_SIZE) % self.layout.image_size
        self.act(Op.WRITE if write else Op.READ, gva, size=self.memory.mode.word, flags=Flag.KEEP if write else 0)
