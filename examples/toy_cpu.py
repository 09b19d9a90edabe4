"""A toy CPU whose memory is a guest's under shadow paging: fetches, loads and stores go through a vCPU."""

import shadowkvm as sk
from shadowkvm.pagetables import AddressSpace, GuestMemory

HEAP = 0x40_0000

# -- the guest: code and page tables mapped, the heap not yet ----------------------------------------------------------
memory = GuestMemory(16 << 20)
space = AddressSpace(memory)
space.map(0x1000, 0x1000, 4096, write=False)  # the program
space.map(0x80_0000, 0, 16 << 20, nx=True)  # all memory: the kernel changes its tables there
vm = sk.Vm(memory=16 << 20)
memory.install(vm)
cpu = vm.vcpus[0]
cpu.set_sregs(**space.sregs)

# -- the program: fill eight words on four pages, then add them up
PROGRAM = [("set", "p", HEAP), ("set", "n", 8)]
PROGRAM += [("store", "n", "p"), ("add", "p", 2048), ("add", "n", -1), ("loop", "n", 2)]
PROGRAM += [("set", "p", HEAP), ("set", "n", 8), ("set", "sum", 0)]
PROGRAM += [("load", "x", "p"), ("addr", "sum", "x"), ("add", "p", 2048), ("add", "n", -1), ("loop", "n", 9), ("halt",)]


def page_fault(address: int, code: int) -> None:
    """The guest kernel's handler: map a fresh page, by stores to the page tables through the kernel's own mapping."""
    with memory.logging() as log:
        space.map(address & ~0xFFF, 0x20_0000 + (address & 0xF000), 4096)
    for row in log.rows():
        cpu.write(0x80_0000 + int(row["addr"]), int(row["value"]), int(row["size"]))
    print(f"  #PF at {address:#x}, error code {code:#x}: the guest maps the page")


pc, regs, steps = 0, dict.fromkeys(("p", "n", "x", "sum"), 0), 0
while PROGRAM[pc][0] != "halt":
    op, *args = PROGRAM[pc]
    outcome = cpu.fetch(0x1000 + 8 * pc)
    if op == "load":
        outcome = cpu.read(regs[args[1]])
    elif op == "store":
        outcome = cpu.write(regs[args[1]], regs[args[0]])
    if outcome.status == "page_fault":  # the guest's own: its handler runs, then the instruction again
        page_fault(outcome.address, outcome.error_code)
        continue
    assert outcome.status == "done", outcome
    if op == "set":
        regs[args[0]] = args[1]
    elif op == "load":
        regs[args[0]] = outcome.value
    elif op in {"add", "addr"}:
        regs[args[0]] += regs[args[1]] if op == "addr" else args[1]
    pc, steps = (args[1] if op == "loop" and regs[args[0]] else pc + 1), steps + 1

print(f"{steps} instructions, sum {regs['sum']}")
print({name: value for name, value in vm.counters.nonzero().items() if not name.startswith(("x_", "max_"))})
