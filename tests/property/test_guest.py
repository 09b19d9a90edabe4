"""The guest's model against the engine: after every call both say the same of every mapped page.

Hypothesis makes calls in any order. Every row that the model marks as faulting must fault with its error code, no other
may fault; all tables in the VM's memory must be what the model has, bit for bit; what user code may do at each mapped
page, the engine must let it do, with the right frame behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

import shadowkvm as sk
from shadowkvm.guest import File, Linux, Process, Vma, pages
from shadowkvm.pagetables import MODES
from shadowkvm.pagetables.entries import A

PAGE, MIB = 4096, 1 << 20
SIZES = st.sampled_from([PAGE, 3 * PAGE, 20 * PAGE, 40 * PAGE, 600 * PAGE])


class Guest(RuleBasedStateMachine):
    """Processes that map, use, share and drop memory."""

    processes = Bundle("processes")
    stacks = Bundle("stacks")

    def __init__(self) -> None:
        super().__init__()
        self.aged = False

    @initialize(
        options=st.fixed_dictionaries(
            {
                "mode": st.sampled_from(["4-level", "4-level", "4-level", *MODES]),
                "kpti": st.booleans(),
                "pcid": st.booleans(),
                "cpus": st.integers(1, 3),
                "direct_page": st.sampled_from([0, 4096]),
                "reuse": st.sampled_from(["lifo", "fifo"]),
                "table_grace": st.sampled_from([0, 5]),
            }
        ),
        target=processes,
    )
    def boot(self, options: dict[str, Any]) -> Process:
        wide = options["mode"].endswith("level")
        only = {"kpti": options["kpti"] and wide, "pcid": options["pcid"] and wide}
        self.guest = Linux(memory=64 * MIB, lazy_vfree=10, **options | only)
        self.file = self.guest.file(60)
        self.program = self.guest.program(text=20, data=5, bss=5)
        first = self.guest.spawn(self.program)
        self.guest.switch(first)
        self.free = self.guest.memory.frames.free
        self.guest.start()
        self.vm = self.guest.vm()
        return first

    # -- calls ----------------------------------------------------------------------------------------------------

    @rule(process=processes, size=SIZES, write=st.booleans(), execute=st.booleans(), kind=st.integers(0, 4))
    def mmap(self, process: Process, size: int, write: bool, execute: bool, kind: int) -> None:
        if kind == 4 and self.guest.memory.mode.entry_bytes == 8:
            self.guest.mmap(process, 2 * MIB, huge=True)
            return
        size = min(size, 60 * PAGE) if kind in {2, 3} else size
        file = self.file if kind in {2, 3} else None
        self.guest.mmap(process, size, write=write, execute=execute, file=file, shared=kind in {1, 3})

    def areas(self, process: Process) -> list[Vma]:
        """All but the stack."""
        return process.mm.vmas[:-1]

    @rule(process=processes, data=st.data())
    def munmap(self, process: Process, data: st.DataObject) -> None:
        for start, end in self.part(process, data):
            self.guest.munmap(process, start, end - start)

    @rule(process=processes, data=st.data())
    def dontneed(self, process: Process, data: st.DataObject) -> None:
        for start, end in self.part(process, data):
            self.guest.madvise_dontneed(process, start, end - start)

    @rule(process=processes, data=st.data(), read=st.booleans(), write=st.booleans(), execute=st.booleans())
    def mprotect(self, process: Process, data: st.DataObject, read: bool, write: bool, execute: bool) -> None:
        for start, end in self.part(process, data):
            self.guest.mprotect(process, start, end - start, read=read, write=read and write, execute=read and execute)

    @rule(process=processes, data=st.data())
    def mremap(self, process: Process, data: st.DataObject) -> None:
        if areas := self.areas(process):
            self.guest.mremap(process, data.draw(st.sampled_from(areas)))

    def part(self, process: Process, data: st.DataObject) -> list[tuple[int, int]]:
        """A range inside one mapping, or over several."""
        areas = self.areas(process)
        if not areas:
            return []
        first = data.draw(st.integers(0, len(areas) - 1))
        last = data.draw(st.integers(first, min(first + 1, len(areas) - 1)))
        skip = data.draw(st.integers(0, areas[first].pages - 1))
        keep = data.draw(st.integers(0, areas[last].pages - 1 - (skip if first == last else 0)))
        return [(areas[first].start + skip * PAGE, areas[last].end - keep * PAGE)]

    @rule(process=processes, data=st.data(), step=st.sampled_from([1, 1, 3, 17]), mixed=st.booleans())
    def touch(self, process: Process, data: st.DataObject, step: int, mixed: bool) -> None:
        areas = [vma for vma in process.mm.vmas if vma.read]
        vma = data.draw(st.sampled_from(areas))
        first = data.draw(st.integers(0, vma.pages - 1))
        count = min(data.draw(st.sampled_from([1, 8, 40, 700])), -(-(vma.pages - first) // step))
        gvas = pages(vma.start + first * PAGE, count, step * PAGE)
        if data.draw(st.booleans()):
            gvas = self.guest.random.permutation(np.concatenate((gvas, gvas)))
        if vma.execute and data.draw(st.booleans()):
            self.guest.touch(process, gvas, fetch=True)
            return
        written = self.guest.random.integers(0, 2, len(gvas)) > 0 if mixed else np.full(len(gvas), fill_value=True)
        self.guest.touch(process, gvas, write=written & vma.write)

    @rule(process=processes, data=st.data(), write=st.booleans())
    def trap(self, process: Process, data: st.DataObject, write: bool) -> None:
        forbidden = [vma for vma in process.mm.vmas if not (vma.write if write else vma.read)]
        if forbidden:
            self.guest.touch(process, [process.mm.stack_top - 8], write=True)
            vma = data.draw(st.sampled_from(forbidden))
            self.guest.trap(process, pages(vma.start, min(4, vma.pages)), write=write)

    @rule(process=processes, cpu=st.integers(0, 2))
    def switch(self, process: Process, cpu: int) -> None:
        self.guest.switch(process, cpu % len(self.guest.cpus))

    @rule(process=processes)
    def interrupt(self, process: Process) -> None:
        self.guest.interrupt(process)

    @rule(target=processes, parent=processes, thread=st.booleans())
    def fork(self, parent: Process, thread: bool) -> Any:
        if len(self.guest.processes) > 5:
            return multiple()
        return self.guest.thread(parent) if thread else self.guest.fork(parent)

    @rule(process=processes)
    def exec(self, process: Process) -> None:
        if process.mm.users == 1:
            self.guest.exec(process, self.program)

    @rule(target=processes, process=consumes(processes), data=st.data())
    def exit(self, process: Process, data: st.DataObject) -> Any:
        others = [other for other in self.guest.processes.values() if other is not process]
        if not others:
            return process
        self.guest.exit(process, data.draw(st.sampled_from([None, *others])))
        return multiple()

    @rule(target=stacks, count=st.integers(1, 40))
    def vmalloc(self, count: int) -> tuple[int, int]:
        gva = self.guest.vmalloc(count)
        self.guest.kernel_access(pages(gva, count), write=True)
        return gva, count

    @rule(area=consumes(stacks))
    def vfree(self, area: tuple[int, int]) -> None:
        self.guest.vfree(*area)

    @rule(write=st.booleans(), first=st.integers(0, 600))
    def set_memory(self, write: bool, first: int) -> None:
        # Low memory, of which the guest uses nothing.
        self.guest.set_memory(first * PAGE, 3, write=write)

    @rule()
    def age(self) -> None:
        self.guest.age(self.file)
        # A stays clear in memory until the CPU walks again: the shadow still has the page.
        self.aged = True

    @rule(data=st.data())
    def reclaim(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, 59), unique=True, max_size=60))
        self.guest.reclaim(self.file, np.array(sorted(chosen), np.int64))

    # -- comparison -------------------------------------------------------------------------------------------------

    @invariant()
    def the_engine_agrees(self) -> None:
        if not hasattr(self, "vm"):
            return
        result = self.vm.run(self.guest.take())
        assert (result.faults_missed, result.faults_unexpected) == (0, 0), result.first_mismatch
        assert {name for name, count in result.status.items() if count} <= {"done", "page_fault"}
        dtype = self.guest.memory.mode.dtype
        mask = ~dtype.type(A if self.aged else 0)
        for gpa, content in self.guest.memory.pages():
            mine, theirs = (np.frombuffer(data, dtype) & mask for data in (content, self.vm.read_memory(gpa, PAGE)))
            assert (mine == theirs).all(), hex(gpa)

    @invariant()
    def counts_are_right(self) -> None:
        """Each frame is held as often as entries and caches name it; frames in use are those and the tables."""
        if not hasattr(self, "vm"):
            return
        guest = self.guest
        held = np.zeros(len(guest.refs), np.int64)
        mms = {process.mm.number: process.mm for process in guest.processes.values()}
        files: dict[int, File] = {id(file): file for file in (self.file, self.program.text, self.program.data)}
        for mm in mms.values():
            for row in mm.space.leaves(hidden=True):
                first = int(row["gpa"]) // PAGE
                held[first : first + int(row["size"]) // PAGE] += 1
            files |= {id(vma.file): vma.file for vma in mm.vmas if vma.file is not None}
        for file in files.values():
            held[file.frames[file.frames < len(held)].astype(np.int64)] += 1
        held[guest.zero] = 0
        assert (held == guest.refs).all(), np.flatnonzero(held != guest.refs)[:5]

    def teardown(self) -> None:
        if not hasattr(self, "vm"):
            return
        self.probe()
        self.vm.audit()

    def probe(self) -> None:
        """User code of each process goes to each page in each way."""
        for process in list(self.guest.processes.values()):
            self.guest.switch(process)
            self.vm.run(self.guest.take())
            cpu = self.vm.vcpus[process.cpu or 0]
            gvas = np.concatenate([pages(vma.start - PAGE, vma.pages + 2) for vma in process.mm.vmas])
            gvas = np.unique(gvas)[:: max(1, len(gvas) // 120)]
            can = self.guest.expected(process, gvas)
            for at, gva in enumerate(gvas.tolist()):
                for kind in ("read", "fetch", "write"):
                    call: Any = getattr(cpu, kind)
                    got = call(gva, 0x77, user=True) if kind == "write" else call(gva, user=True)
                    assert (got.status == "done") == bool(can[kind][at]), (process, hex(gva), kind, got)
                    if kind == "write" and got.status == "done":
                        assert self.vm.read_memory(int(can["gpa"][at]), 1) == b"\x77", hex(gva)


Guest.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestGuest = Guest.TestCase


def test_everything_that_was_taken_is_given_back() -> None:
    guest = Linux(memory=64 * MIB, lazy_vfree=0)
    program = guest.program()
    shell = guest.spawn(program)
    guest.switch(shell)
    guest.start()
    vm = guest.vm()
    free = [guest.memory.frames.free]
    for _ in range(4):
        area = guest.mmap(shell, 8 * MIB, shared=True)
        guest.touch(shell, pages(area.start, area.pages), write=True)
        children = [guest.fork(shell) for _ in range(3)]
        for child in children:
            guest.switch(child)
            guest.exec(child, program)
            guest.touch(child, pages(guest.layout.program, program.text.pages), fetch=True)
            guest.exit(child, shell)
        guest.munmap(shell, area.start, 8 * MIB)
        free.append(guest.memory.frames.free)
        result = vm.run(guest.take())
        assert (result.faults_missed, result.faults_unexpected) == (0, 0)
    # The first round leaves the stack's page, its tables and two cached kernel stacks behind; the others nothing.
    assert free[1] < free[0]
    assert free[1:] == [free[1]] * 4


def test_a_vm_of_its_own_has_the_image() -> None:
    guest = Linux(memory=64 * MIB)
    with pytest.raises(sk.ConfigError, match="no image before it is started"):
        guest.vm()
    guest.start()
    vm = guest.vm()
    assert isinstance(vm, sk.Vm)
    assert vm.vcpus[0].sregs["cr3"] == guest.kernel.root
    assert vm.vcpus[0].read(guest.layout.direct + 0x1234).status == "done"
    assert vm.vcpus[0].fetch(guest.layout.text).status == "done"
    assert vm.vcpus[0].fetch(guest.layout.data).status == "page_fault"
