"""Shadow, nested or agile paging: it depends on how often the guest changes its tables.

A program reads a working set of 64 MiB by chance, so that nearly each load misses the TLB, and after every 20,000
loads replaces a few pages. Shadow paging walks one table for a miss and exits for the changes; nested paging never
exits here, but walks two stages; agile paging walks the shadow but for the tables that change. Modelled MMU time for
each load, in nanoseconds, by the costs of the preset "zen3".
"""

from shadowkvm.compare import Variant, compare
from shadowkvm.mmus import Mmu
from shadowkvm.workloads import get

WAYS = ("shadow", "nested:warm", "nested:warm:2m", "agile:warm")
variants = [Variant(mmu=Mmu.parse(name)) for name in WAYS]

print(f"{'changes':>8}" + "".join(f"{name:>16}" for name in WAYS) + f"{'cheapest':>16}")
for changes in (0, 2, 5, 10, 20, 40, 80):
    scenario = get("working_set").build(scale=0.1, changes=changes)
    done = compare(scenario, variants, steady=True)
    loads = scenario.values.accesses * scenario.total
    times = [1e9 * run.account.seconds / loads for run in done.runs]
    best = WAYS[times.index(min(times))]
    print(f"{changes:>8}" + "".join(f"{time:>16.1f}" for time in times) + f"{best:>16}")
