"""What one call from Python costs."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from shadowkvm.bench.clock import rounds
from shadowkvm.bench.guests import build
from shadowkvm.bench.guests import rows as make_rows
from shadowkvm.bench.model import Row
from shadowkvm.image import translate
from shadowkvm.ops import Op
from shadowkvm.policy import PageView, Policy

__all__ = ["DOC", "rows"]

DOC: Final = """Nanoseconds of one call in a loop, the loop included, the best of several rounds."""


def _ns(call: Callable[[], object], count: int, quick: bool) -> float:
    return min(timeit.repeat(call, number=count, repeat=rounds(quick))) / count * 1e9


class _Asked(Policy):
    """KVM's rule, by way of Python."""

    def prefetch(self, page: PageView) -> int:  # noqa: ARG002
        return 8


def _question(quick: bool) -> Row:
    """What a fault takes longer whose policy is asked in Python."""
    regions = 4 if quick else 32
    trace = make_rows(Op.READ, np.arange(regions * 64) << 15)
    least = {"kvm": float("inf"), "python": float("inf")}
    for _ in range(rounds(quick)):
        for name, policy in (("kvm", None), ("python", _Asked())):
            least[name] = min(least[name], build(regions, policy=policy).vm.run(trace).seconds)
    asked = (least["python"] - least["kvm"]) / len(trace) * 1e9
    return Row("a policy's decision in Python", asked, "ns", note="each fault asks once")


def rows(quick: bool) -> Iterator[Row]:
    """Steps, counters, translations."""
    count = 2_000 if quick else 100_000
    vm = build(1).vm
    cpu = vm.vcpus[0]
    cpu.write(0x10_0000, 1)
    read, write, invlpg = cpu.read, cpu.write, cpu.invlpg
    yield Row("step: cpu.read without an exit", _ns(lambda: read(0x10_0000), count, quick), "ns", asked=200)
    yield Row("step: cpu.write without an exit", _ns(lambda: write(0x10_0000, 1), count, quick), "ns", asked=200)
    yield Row("step: a guest's own #PF", _ns(lambda: read(1 << 21), count, quick), "ns")
    yield Row("step: cpu.invlpg", _ns(lambda: invlpg(0x10_0000), count, quick), "ns")
    yield Row("vm.counters", _ns(lambda: vm.counters, count // 10, quick), "ns")
    yield _question(quick)
    memory = np.zeros(1 << 12, np.uint64)
    memory[0x200], memory[0x400], memory[0x600], memory[0x800] = 0x2067, 0x3067, 0x4067, 0x9067
    yield Row("translate: one address", _ns(lambda: translate(memory, 0x1000, [0]), count // 10, quick), "ns")
