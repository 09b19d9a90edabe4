"""Shadow paging inside an event simulator: processes are generators of delays, as in SimPy, and exits cost time.

Two CPUs of one VM run for a while: one walks through its memory, the other keeps remapping a page under it and tells it
to flush (a TLB shootdown). What shadow paging costs each of them comes out as simulated time.
"""

import heapq
from collections.abc import Generator, Iterator
from itertools import count

import shadowkvm as sk
from shadowkvm.pagetables import AddressSpace, GuestMemory

CYCLES = {"access": 4, "exit": 1_500}
DATA, KERNEL, PAGES = 1 << 30, 1 << 31, 64

Process = Generator[float, None, None]


class Simulator:
    """Processes in the order of their times."""

    def __init__(self) -> None:
        self.now, self.queue, self.order = 0.0, [], count()

    def start(self, process: Process, at: float = 0.0) -> None:
        heapq.heappush(self.queue, (at, next(self.order), process))

    def run(self, until: float) -> None:
        while self.queue and self.queue[0][0] < until:
            self.now, _, process = heapq.heappop(self.queue)
            delay = next(process, None)
            if delay is not None:
                self.start(process, self.now + delay)


def cost(cpu: sk.Vcpu, outcome: sk.Outcome, before: int) -> float:
    """What one access or instruction took: itself, and its exits."""
    assert outcome.status == "done", outcome
    return CYCLES["access"] + CYCLES["exit"] * (cpu.counters["exits"] - before)


def reader(cpu: sk.Vcpu, flushes: list[int], done: list[int]) -> Process:
    """Goes round its pages, and flushes what it is told to before it goes on."""
    for number in count():
        while flushes:
            before = cpu.counters["exits"]
            yield cost(cpu, cpu.invlpg(flushes.pop()), before)
        before = cpu.counters["exits"]
        yield cost(cpu, cpu.read(DATA + number % PAGES * 4096), before)
        done[0] += 1


def remapper(cpu: sk.Vcpu, entries: Iterator[tuple[int, int, int]], flushes: list[int], every: float) -> Process:
    """Changes one entry of the page tables now and then, and tells the other CPU."""
    for gva, slot, value in entries:
        before = cpu.counters["exits"]
        yield cost(cpu, cpu.write(KERNEL + slot, value), before)
        flushes.append(gva)
        yield every


def simulate(policy: str, every: float) -> None:
    memory = GuestMemory(32 << 20)
    space = AddressSpace(memory)
    space.map(DATA, 8 << 20, PAGES * 4096)
    space.map(KERNEL, 0, 32 << 20)
    vm = sk.Vm(memory=32 << 20, vcpus=2, policy=policy)
    memory.install(vm)
    for cpu in vm.vcpus:
        cpu.set_sregs(**space.sregs)
    table = int(space.walk([DATA]).slot[0])
    pages = ((n * 7 % PAGES, n) for n in count())
    entries = ((DATA + page * 4096, table + 8 * page, (8 << 20) + (page + n % 2) * 4096 | 0x67) for page, n in pages)
    simulator, flushes, done = Simulator(), [], [0]
    simulator.start(reader(vm.vcpus[0], flushes, done))
    simulator.start(remapper(vm.vcpus[1], entries, flushes, every))
    simulator.run(until=3_000_000)
    c = vm.counters
    print(f"{policy:<10} a change each {every:>7,.0f} cycles: {done[0]:>7,} loads, {c['exits']:>5,} exits, "
          f"{c['pf_emulate']:>4,} stores emulated")  # fmt: skip


for every in (100_000, 10_000, 2_000):
    for policy in ("kvm", "no_unsync"):
        simulate(policy, every)
