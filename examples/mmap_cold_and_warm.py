"""mmap, touch, munmap: why one benchmark puts nested paging at half of shadow paging's exits, and another at none.

Exits for each page of 4 KiB that the guest touches, under the shadow and under nested paging. What decides is whether
the second stage is warm: whether the host has mapped the guest's frames already when the benchmark begins, and whether
the guest gets the same frames again.

    python examples/mmap_cold_and_warm.py           1, 16 and 256 MiB
    python examples/mmap_cold_and_warm.py 1 4096    1 MiB and 4 GiB (a minute and a half)
"""

import sys

from shadowkvm.workloads import get

SIZES = [int(size) for size in sys.argv[1:]] or [1, 16, 256]

print(f"{'MiB':>5} {'frames':>8} {'shadow':>10} {'nested, cold':>14} {'nested, warm':>14} {'nested, cold, 2 MiB':>21}")
for mib in SIZES:
    for reuse in (False, True):
        scenario = get("mmap_cycle").build(total=mib << 20, reuse_gpa=reuse, memory=1 << 30)
        pages = mib << 8
        shadow = scenario.run()
        exits = [shadow.counters["exits"] / pages]
        for setup in ({}, {"warm": True}, {"page_size": 2 << 20}):
            vm = scenario.vm()
            vm.use_nested(**setup)
            scenario.run(vm)
            exits.append(vm.nested.exits / pages)
        kind = "reused" if reuse else "fresh"
        print(f"{mib:>5} {kind:>8} {exits[0]:>10.2f} {exits[1]:>14.2f} {exits[2]:>14.2f} {exits[3]:>21.2f}")
