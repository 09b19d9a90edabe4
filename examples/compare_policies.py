"""The same Linux guest under four policies: what does KVM gain by letting tables go unsync, and by prefetching?"""

from pathlib import Path

import shadowkvm as sk

RECORDING = Path(__file__).parent / "recordings" / "fork20-demote64.npz"
SHOWN = ("exits", "pf_fixed", "pf_emulate", "mmu_flooded", "mmu_cache_miss", "mmu_shadow_zapped", "tlb_flush")

print(f"{'':14}", *(f"{name:>17}" for name in SHOWN))
for policy in ("kvm", "no_unsync", "no_prefetch", "zap_on_write"):
    with sk.Recording.open(RECORDING) as recording:
        result = sk.Vm(recording.meta["memory"], policy=policy).run(recording)
    print(f"{policy:14}", *(f"{result.counters[name]:>17,}" for name in SHOWN))
    if result.faults_missed or result.faults_unexpected:
        print("  the guest saw something else: it must not, whatever the policy")
