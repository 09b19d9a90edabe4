"""Unsync where all processes share the kernel's tables: what a change of a kernel mapping costs, and who pays.

Each change maps four kernel pages and unmaps them again: eight stores to one page table that every address space
shares. Between two changes another process takes its turn. Figures are for each change.
"""

from shadowkvm.workloads import get

WORKLOAD = get("kernel_map_change")

print(f"{'processes':>9} {'policy':>10} {'exits':>7} {'emulated':>9} {'resynced':>9} {'flushes':>8}")
for processes in (1, 4, 16, 64):
    scenario = WORKLOAD.build(processes=processes)
    for policy in ("kvm", "no_unsync"):
        vm = scenario.vm(policy=policy, events=["kvm_mmu_sync_page"])
        result = scenario.run(vm)
        start = result.phases["start"].counters
        each = {
            name: (result.counters[name] - start[name]) / result.units for name in ("exits", "pf_emulate", "tlb_flush")
        }
        resynced = len(vm.events) / result.units
        print(
            f"{processes:>9} {policy:>10} {each['exits']:>7.1f} {each['pf_emulate']:>9.1f} {resynced:>9.2f} "
            f"{each['tlb_flush']:>8.1f}"
        )
