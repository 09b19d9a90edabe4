"""Workloads of several processes: fork, exec, switches, flushes on other CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shadowkvm.guest import Linux, pages
from shadowkvm.workloads.builtin.common import MIB, begin, resident, run_program, some, step, use
from shadowkvm.workloads.parameter import Parameter, Values
from shadowkvm.workloads.step import START, Step
from shadowkvm.workloads.workload import Workload

__all__ = ["PROCESSES"]

# Rows of so many units go into one step: steps cost more than rows.
_AT_ONCE: Final = 64


def fork_exit(guest: Linux, p: Values) -> Iterator[Step]:
    parent = begin(guest, start=False)
    area = resident(guest, parent, p.pages)
    guest.start()
    yield use(guest, parent, pages(area.start, p.pages))
    for _ in range(p.forks):
        child = guest.fork(parent)
        yield step(guest, "fork")
        guest.switch(child)
        guest.touch(child, some(guest, area, p.child_reads))
        guest.touch(child, some(guest, area, p.child_writes), write=True)
        yield step(guest, "child")
        guest.exit(child, parent)
        yield step(guest, "exit", units=1)
        guest.touch(parent, some(guest, area, p.parent_writes), write=True)
        yield step(guest, "parent")


def exec_storm(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest, start=False)
    own = resident(guest, shell, p.shell_pages)
    program = guest.program(text=p.text, data=p.data, bss=p.bss, heap=p.heap)
    guest.start()
    yield use(guest, shell, pages(own.start, p.shell_pages))
    for _ in range(p.execs):
        child = guest.fork(shell)
        guest.touch(shell, some(guest, own, p.before_exec // 2), write=True)
        yield step(guest, "fork")
        guest.switch(child)
        guest.touch(child, some(guest, own, p.before_exec), write=True)
        guest.exec(child, program)
        yield step(guest, "exec")
        run_program(guest, child)
        yield step(guest, "run")
        guest.exit(child, shell)
        guest.touch(shell, some(guest, own, p.before_exec), write=True)
        yield step(guest, "exit", units=1)


def cow_storm(guest: Linux, p: Values) -> Iterator[Step]:
    parent = begin(guest, start=False)
    area = resident(guest, parent, p.pages)
    guest.start()
    yield use(guest, parent, pages(area.start, p.pages))
    for _ in range(p.rounds):
        children = [guest.fork(parent) for _ in range(p.children)]
        yield step(guest, "fork")
        for child in children:
            guest.switch(child)
            guest.touch(child, some(guest, area, p.pages), write=True)
            yield step(guest, "copy", units=p.pages)
        guest.switch(parent)
        guest.touch(parent, some(guest, area, p.pages), write=True)
        yield step(guest, "reuse")
        for child in children:
            guest.exit(child, parent)
        yield step(guest, "exit")


def context_switch(guest: Linux, p: Values) -> Iterator[Step]:
    program = guest.program(text=8, data=4, bss=4)
    processes = [begin(guest, program, start=False) for _ in range(p.processes)]
    areas = [resident(guest, process, p.working_set) for process in processes]
    guest.start()
    for process, area in zip(processes, areas, strict=True):
        guest.switch(process)
        yield use(guest, process, pages(area.start, p.working_set))
    for first in range(0, p.switches, _AT_ONCE):
        count = min(_AT_ONCE, p.switches - first)
        for number in range(first, first + count):
            chosen = number if p.order == "round" else int(guest.random.integers(p.processes))
            process, area = processes[chosen % p.processes], areas[chosen % p.processes]
            guest.switch(process)
            guest.touch(process, some(guest, area, p.touched), write=bool(number & 1))
        yield step(guest, "switch", units=count)


def syscall_storm(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest, start=False)
    area = resident(guest, shell, p.working_set)
    guest.start()
    yield use(guest, shell, pages(area.start, p.working_set))
    for first in range(0, p.calls, _AT_ONCE):
        count = min(_AT_ONCE, p.calls - first)
        for number in range(first, first + count):
            with guest.syscall(shell, f"call {number % 8}"):
                guest.kernel_data(number % 16)
                guest.kernel_data(16 + number % 4, write=True)
            guest.touch(shell, some(guest, area, 2))
        yield step(guest, "call", units=count)


def shootdown(guest: Linux, p: Values) -> Iterator[Step]:
    first = begin(guest, start=False)
    threads = [first, *(guest.thread(first) for _ in guest.cpus[1:])]
    for cpu, thread in enumerate(threads):
        guest.switch(thread, cpu)
    area = resident(guest, first, p.pages)
    guest.start()
    for thread in threads:
        guest.run(thread)
        guest.touch(thread, pages(area.start, p.pages))
    yield step(guest, START)
    for number in range(p.flushes):
        caller = threads[number % len(threads)]
        guest.madvise_dontneed(caller, area.start, p.pages * 4096)
        yield step(guest, "drop", units=1)
        for thread in threads:
            guest.touch(thread, some(guest, area, p.pages), write=True)
        yield step(guest, "use")


PROCESSES: Final = (
    Workload(
        name="fork_exit",
        summary="a process forks a child that touches a little and exits",
        stresses=(
            "fork write-protects every writable entry of the parent (its tables go unsync), builds the child's tables "
            "in fresh frames, and flushes, which compares the parent's tables. Frames of the last child's tables are "
            "still shadowed when fork zeroes them for the next one: each such page is zapped by the first store to "
            "it."
        ),
        look_for=(
            "phase fork: x_retries and mmu_shadow_zapped: tables freed long ago, used again only now",
            "phase child: a root and tables are shadowed anew (mmu_cache_miss) for a moment",
            "phase exit: one emulated store for each upper-level entry that is cleared",
            "pages=4096: one more comparison for each 512 pages of the parent",
        ),
        body=fork_exit,
        parameters=(
            Parameter("pages", "pages that the parent has", 64, low=1, high=1 << 20),
            Parameter("child_reads", "pages that the child reads", 16, low=0),
            Parameter("child_writes", "pages that the child writes, hence copies", 8, low=0),
            Parameter("parent_writes", "pages that the parent writes after the child is gone", 16, low=0),
            Parameter("forks", "forks", 50, low=1, scaled=True),
        ),
        unit="fork",
        work=lambda p: float(p.forks),
    ),
    Workload(
        name="exec_storm",
        summary="a shell that starts short programs: fork, exec, run, exit",
        stresses=(
            "Address spaces that live for moments: two sets of tables for each program, made, shadowed, torn down; "
            "the kernel's half is found again under each new top table (pf_spurious). Code comes from the page cache, "
            "16 pages a fault."
        ),
        look_for=(
            "CR3 loads: six (fork's flush, child, exec, moved stack, exit, shell)",
            "mmu_cache_miss and mmu_shadow_zapped: twelve tables of the guest shadowed in vain for each program",
            "phase run: one fault of the guest for each 16 pages of code, two of the shadow (it prefetches eight)",
        ),
        body=exec_storm,
        parameters=(
            Parameter("execs", "programs started", 20, low=1, scaled=True),
            Parameter("text", "pages of code of the program", 384, low=1, high=1 << 16),
            Parameter("data", "pages of data of the program", 8, low=1, high=1 << 16),
            Parameter("bss", "zeroed pages of the program", 4, low=0, high=1 << 16),
            Parameter("heap", "pages of its heap", 4, low=0, high=1 << 16),
            Parameter("shell_pages", "pages that the shell has written", 16, low=1, high=1 << 16),
            Parameter("before_exec", "of them written by the child before exec; by the shell half as many", 8, low=0),
        ),
        unit="exec",
        work=lambda p: float(p.execs),
    ),
    Workload(
        name="cow_storm",
        summary="children are forked, and everybody writes to everything",
        stresses=(
            "Copies on write: each store takes the guest's own fault; a copy is made through the direct map, and an "
            "entry that is cleared, flushed by INVLPG and stored anew, all in an unsync table."
        ),
        look_for=(
            "phase copy: pf_guest, pf_fixed and INVLPG of one each for each page",
            "phase reuse: the last owner's pages become writable without copy or flush",
            "phase fork: the costs for each child, however many pages",
        ),
        body=cow_storm,
        parameters=(
            Parameter("pages", "pages that are shared", 256, low=1, high=1 << 20),
            Parameter("children", "children at once", 2, low=1, high=64),
            Parameter("rounds", "times", 4, low=1, scaled=True),
        ),
        unit="copy",
        work=lambda p: float(p.rounds * p.children * p.pages),
    ),
    Workload(
        name="context_switch",
        summary="processes take turns, each with a working set",
        stresses=(
            "CR3 loads: KVM keeps four roots a CPU, the current one and three cached; other roots are found again by "
            "their frame. Nothing is unsync, so nothing is compared: what is left is one exit and one flush for each "
            "switch."
        ),
        look_for=(
            "exits and tlb_flush: one for each switch, and no #PF exit after phase start",
            "kpti=true: two more of each, for the ways out of and into the kernel",
            "pcid=true: no flush, as long as there are no more processes than the six PCIDs of Linux",
        ),
        body=context_switch,
        parameters=(
            Parameter("processes", "processes", 8, low=1, high=4096),
            Parameter("working_set", "pages of each", 32, low=1, high=1 << 18),
            Parameter("touched", "pages touched between two switches", 8, low=0),
            Parameter("order", "who is next: in turn, or by chance", "round", choices=("round", "random")),
            Parameter("switches", "switches", 1000, low=1, scaled=True),
        ),
        unit="switch",
        work=lambda p: float(p.switches),
    ),
    Workload(
        name="syscall_storm",
        summary="system calls, nothing else",
        stresses=(
            "Ways in and out of the kernel. Without KPTI no exit at all; with it two CR3 loads for each call: two "
            "exits, two flushes, and whatever was unsync compared."
        ),
        look_for=(
            "default: no exit after phase start: the floor of all other workloads",
            "kpti=true: exits and tlb_flush of 2 for each call",
            "kpti=true pcid=true: the exits stay, the flushes go (bit 63 of CR3)",
        ),
        body=syscall_storm,
        parameters=(
            Parameter("calls", "system calls", 2000, low=1, scaled=True),
            Parameter("working_set", "pages that the program uses between calls", 16, low=1, high=1 << 18),
        ),
        unit="call",
        work=lambda p: float(p.calls),
    ),
    Workload(
        name="shootdown",
        summary="threads on several CPUs: one drops memory, all must flush",
        stresses=(
            "TLB shootdowns: an interrupt to every CPU that runs a thread, and a flush on each, in tables that all of "
            "them share. Each INVLPG drops and fetches the shared entry again, and asks all CPUs for a flush."
        ),
        look_for=(
            "invlpg: pages times cpus for each drop; io_exits: one for each interrupt sent",
            "remote_tlb_flush_requests: one for each page: the second CPU finds nothing present",
            "phase use: two #PF exits for each page by whoever comes first, none for the other threads",
        ),
        body=shootdown,
        parameters=(
            Parameter("pages", "pages that are dropped and touched again", 16, low=1, high=1 << 18),
            Parameter("flushes", "times", 100, low=1, scaled=True),
        ),
        unit="drop",
        work=lambda p: float(p.flushes),
        guest={"cpus": 4, "memory": 256 * MIB},
    ),
)
