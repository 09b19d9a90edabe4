"""Run one scenario of the corpus on an engine that has shadowkvm's API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.conformance.corpus import RAM, Corpus, Op, Scenario, load, memory_pages
from tests.conformance.program import Guest, ShutdownError

if TYPE_CHECKING:
    from collections.abc import Callable

SLOT1 = (1, 0x10000000, 0x100000)
# The states of the host's pages behind RAM before the first entry, by Scenario.host. In an "untouched" run the harness
# had read all of RAM (zero pages) and written the pages that hold something.
HOST_PAGES = {"4k": "writable", "huge": "huge-2m", "untouched": "zero"}


@dataclass
class Result:
    events: list[str]
    stages: list[dict[str, int]] = field(default_factory=list)  # counters after each HOST action and at the end
    dirty: list[list[int]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  # number of events before each op
    faults: list[int] = field(default_factory=list)  # error codes of guest #PFs
    op: int = 0  # op at which the guest stopped
    shutdown: bool = False
    vm: Any = None


def build_vm(sk: Any, corpus: Corpus, scenario: Scenario) -> Any:
    """The VM as the harness made it: 64 MiB in slot 0, memory filled, registers set."""
    vm = sk.Vm(memory=RAM, vcpus=1, profile="qemu-tcg", events=True)
    vm.set_host_pages(0, RAM, HOST_PAGES[scenario.host])
    for address, page in memory_pages(corpus, scenario).items():
        if scenario.host == "untouched":
            vm.set_host_pages(address, 4096, "writable")
        vm.write_memory(address, page)
    for what, *args in scenario.setup:
        if what == "slot":
            vm.add_slot(*args[:3], readonly=True)
        elif what == "quota":
            vm.set_page_quota(*args)
        else:
            gpa, word = args
            vm.write_memory(gpa, word.to_bytes(8, "little"))
    regs = scenario.regs  # last: PAE paging reads its PDPTEs when the registers are set
    vm.vcpus[0].set_sregs(cr0=regs["cr0"], cr3=regs["cr3"], cr4=regs["cr4"], efer=regs["efer"])
    return vm


def host_action(vm: Any, number: int) -> list[int] | None:
    """What user space does on HOST `number`; the answer of GET_DIRTY_LOG if it was that."""

    def restore_table() -> None:
        content = vm.read_memory(0x6000, 4096)
        vm.notifier_unmap(0x6000, 0x1000)
        vm.write_memory(0x6000, content)

    def drop_three() -> None:
        for gpa in (0x402000, 0x406000, 0x408000):
            vm.notifier_unmap(gpa, 0x1000)

    actions: dict[int, Callable[[], Any]] = {
        1: lambda: vm.set_dirty_log(0, True),
        2: lambda: [int(gfn) for gfn in vm.get_dirty_log(0)],
        3: lambda: vm.set_dirty_log(0, False),
        4: lambda: vm.add_slot(*SLOT1),
        5: lambda: vm.delete_slot(SLOT1[0]),
        6: lambda: vm.notifier_unmap(0x400000, 0x2000),
        7: restore_table,
        8: lambda: vm.vcpus[0].set_sregs(cr3=0x31000),
        9: lambda: vm.set_page_quota(64),
        10: lambda: vm.notifier_unmap(0x400000, 0x1000),
        11: drop_three,
    }
    answer = actions[number]()
    return answer if number == 2 else None


def run_scenario(sk: Any, scenario: Scenario, *, marks: bool = False, corpus: Corpus | None = None) -> Result:
    """Run `scenario`. With `marks` the result also says which events came before each op (slower)."""
    corpus = corpus or load()
    vm = build_vm(sk, corpus, scenario)
    memory = memory_pages(corpus, scenario)

    def code_at(address: int, size: int) -> bytes:  # called code is mapped one to one
        both = memory.get(address & ~0xFFF, bytes(4096)) + memory.get((address & ~0xFFF) + 4096, bytes(4096))
        return both[address & 0xFFF : (address & 0xFFF) + size]

    guest = Guest(vm.vcpus[0], corpus, code_at, idt=scenario.regs["idt"], long=scenario.is_long)
    guest.int3_decodes = list(scenario.int3_decodes)
    result = Result(events=[], vm=vm, faults=guest.faults)

    def on_host(number: int) -> None:
        answer = host_action(vm, number)
        if answer is not None:
            result.dirty.append(answer)
        result.stages.append(dict(vm.counters))

    try:
        guest.start()
        for op in [*scenario.ops, Op("HLT", 0, 0, 0)]:
            if marks:
                result.marks.append(len(vm.events))
            guest.run_op(op, scenario.slot(op), on_host)
            result.op += op.letter != "HLT"
    except ShutdownError:
        result.shutdown = True
    result.stages.append(dict(vm.counters))
    result.events = [str(line) for line in vm.event_text()]
    return result
