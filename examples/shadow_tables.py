"""The shadow tables while a guest works: what is there after a first touch, a table edit, a flush, another table."""

import shadowkvm as sk

PML4, PDPT, PD, PT, OTHER_PD, DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x100000

vm = sk.Vm(memory=32 << 20)
for table, entry in {PML4: PDPT, PDPT: PD, PD: PT}.items():
    vm.write_memory(table, (entry | 7).to_bytes(8, "little"))
vm.write_memory(PT, b"".join((page << 12 | 0x67).to_bytes(8, "little") for page in range(512)))
vm.write_memory(PDPT + 8, (OTHER_PD | 7).to_bytes(8, "little"))  # the second GiB has a directory of its own
vm.write_memory(OTHER_PD, (PT | 7).to_bytes(8, "little"))
cpu = vm.vcpus[0]
cpu.set_sregs(cr0=0x80050033, cr3=PML4, cr4=0x20, efer=0xD01)


def show(what: str, before: sk.Counters) -> sk.Counters:
    """The tree, and what the step did to the counters."""
    print(f"\n{what}\n{vm.shadow()}")
    print({name: value for name, value in (vm.counters - before).nonzero().items() if not name.startswith("x_")})
    return vm.counters


now = vm.counters
cpu.write(DATA, 1)
now = show("A store to a page that nobody touched before: the path to it is shadowed, its neighbours come along.", now)
cpu.write(PT + 8 * 256, DATA | 0x65)
now = show("A store to the last-level table (the page becomes read-only): the table goes unsync.", now)
cpu.invlpg(DATA)
now = show("INVLPG of that page: only its entry is looked at, the table stays unsync.", now)
cpu.load_cr3(PML4)
now = show("A CR3 load: the table is compared entry by entry.", now)
cpu.read(DATA + (1 << 30))
now = show("A load from the second GiB: its directory is shadowed, and shares the last-level table.", now)
for _ in range(3):
    cpu.write(OTHER_PD, PT | 7)
now = show("Three stores to that directory: emulated, and the third zaps its shadow page: a flood.", now)
