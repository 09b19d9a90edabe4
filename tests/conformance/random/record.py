"""Records random cases through the real KVM.

    python -m tests.conformance.random.record OUT.json.xz --cases 20 --ops 300 --seed 1

Every case runs twice; it ends at the first op where the two runs differ (a rescheduling of the host), where the guest
left its stubs or hung, or where KVM could not emulate. Cases that end too early are replaced by the next seed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from ..kvm import oracle
from ..kvm.result import STOPPED, Result
from . import casefile
from .generator import THEMES, generate


def usable(first: list[Result], second: list[Result]) -> tuple[int, str]:
    """(number of ops that can be kept, why not more)"""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a.status == STOPPED:
            return i, f"stopped {a.err:#x}"
        if a.stats.get("insn_emulation_fail"):
            return i, "emulation failure"
        if a != b:
            return i, f"two runs differ: {a} {b}"
    return min(len(first), len(second)), ""


def record(seeds: list[int], ops: int, log=print) -> list[dict]:
    """The cases of these seeds in one boot, with their results, cut to what is usable."""
    cases = [generate(s, ops) for s in seeds]
    results = oracle.run([c for c in cases for _ in range(2)])
    if len(results) != 2 * len(cases):
        raise RuntimeError(f"{len(results)} results for {2 * len(cases)} runs")
    for i, c in enumerate(cases):
        n, why = usable(results[2 * i], results[2 * i + 1])
        if n < ops:
            log(f"seed {c['seed']} {c['theme']}: {n} of {ops} ops, {why}; op {c['ops'][n] if n < ops else ''}")
        c["ops"], c["results"] = c["ops"][:n], results[2 * i][:n]
    return cases


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out")
    p.add_argument("--cases", type=int, default=20)
    p.add_argument("--ops", type=int, default=500)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--least", type=float, default=0.5, help="share of the ops that a case must keep")
    p.add_argument("--batch", type=int, default=50, help="cases in one boot")
    a = p.parse_args()
    kept: list[dict] = []
    seed, began, ran = a.seed, time.time(), 0
    while len(kept) < a.cases:
        n = min(a.batch, a.cases - len(kept))
        cases = record(list(range(seed, seed + n)), a.ops)
        ran += sum(2 * len(c["ops"]) for c in cases)
        kept += [c for c in cases if len(c["ops"]) >= a.least * a.ops]
        seed += n
    qemu = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    casefile.save(a.out, kept, kernel=oracle.kernel()[1], qemu=qemu, cpu="EPYC,+svm", module="kvm_amd npt=0")
    themes = {t: sum(c["theme"] == t for c in kept) for t in THEMES}
    speed = ran / (time.time() - began)
    print(f"{len(kept)} cases, {sum(len(c['ops']) for c in kept)} ops, next seed {seed}, {speed:.0f} ops/s, {themes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
