"""README.md's example: one table fault, an unsync table, a resync and an emulated store, in KVM's own words."""

import shadowkvm as sk

vm = sk.Vm(memory=32 << 20, events=True)
for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007}.items():  # PML4 -> PDPT -> PD -> PT
    vm.write_memory(table, entry.to_bytes(8, "little"))
vm.write_memory(0x4000, b"".join((page << 12 | 0x67).to_bytes(8, "little") for page in range(512)))  # the first 2 MiB

cpu = vm.vcpus[0]
cpu.set_sregs(cr0=0x80050033, cr3=0x1000, cr4=0x20, efer=0xD01)
cpu.write(0x100000, 1)  # a first touch: four tables are shadowed, one page and its neighbours are mapped
cpu.write(0x4808, 0)  # a store to the guest's page table: KVM lets the table go unsync and stays out of the way
cpu.load_cr3(0x1000)  # and brings it back in step here
cpu.write(0x3000, 0x4007)  # a store to the guest's page directory: write-tracked, hence emulated
print({name: value for name, value in vm.counters.items() if value})
print(*vm.event_text(), sep="\n")
