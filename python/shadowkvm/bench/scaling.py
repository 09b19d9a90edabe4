"""Larger guests at equal locality, several VMs in threads, and memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from shadowkvm.bench.clock import rounds
from shadowkvm.bench.guests import Guest, build
from shadowkvm.bench.guests import rows as make_rows
from shadowkvm.bench.model import Row
from shadowkvm.ops import Op
from shadowkvm.vm import Vm

__all__ = ["DOC", "rows"]

DOC: Final = """The same faults (16 regions of 2 MiB, spread over all of memory, first touches without neighbours) in
guests of four sizes; loads without exits in 1, 2 and 4 threads, each with a VM of its own; and bytes, as
`Vm.memory_use` counts them."""

_SIZES: Final = {"64 MiB": 64 << 20, "1 GiB": 1 << 30, "16 GiB": 16 << 30, "64 GiB": 64 << 30}
_REGIONS: Final = 16


def _spread(size: int) -> Guest:
    """A guest of that size with regions all over it, and its tables near the end."""
    last = (size >> 21) - 4
    return build(np.linspace(0, last - 1, _REGIONS).astype(np.uint64), size, lone=True)


def _faults(quick: bool) -> Iterator[Row]:
    least = dict.fromkeys(_SIZES, float("inf"))
    for _ in range(rounds(quick) * 3):
        for name, size in _SIZES.items():
            guest = _spread(size)
            regions = np.linspace(0, (size >> 21) - 5, _REGIONS).astype(np.int64)
            where = ((regions[:, None] << 21) + (np.arange(64)[None, :] << 15)).reshape(-1)
            guest.vm.run(make_rows(Op.READ, where[::64]))
            trace = make_rows(Op.READ, where)
            least[name] = min(least[name], guest.vm.run(trace).seconds / len(trace) * 1e9)
    for name, ns in least.items():
        yield Row(f"a fault in a guest of {name}", ns, "ns")
    ratio = least["64 GiB"] / least["64 MiB"]
    yield Row("64 GiB over 64 MiB", ratio, "x", asked=1.3)


def _threads(quick: bool) -> Iterator[Row]:
    count = 1 << (18 if quick else 21)
    for threads in (1, 2, 4):
        vms = [build(32).vm for _ in range(threads)]
        traces = [make_rows(Op.READ, np.arange(count) % (32 * 512) << 12) for _ in vms]
        for vm, trace in zip(vms, traces, strict=True):
            vm.run(trace[: 32 * 512])
        taken = float("inf")
        for _ in range(rounds(quick)):
            workers = [threading.Thread(target=vm.run, args=(trace,)) for vm, trace in zip(vms, traces, strict=True)]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            taken = min(taken, time.perf_counter() - start)
        yield Row(f"{threads} VMs in threads, loads without exits", threads * count / taken / 1e6, "M/s")


def _memory(quick: bool) -> Iterator[Row]:
    regions = 8 if quick else 64
    guest = build(regions)
    before = guest.vm.memory_use()
    guest.vm.run(make_rows(Op.READ, np.arange(regions * 512) << 12))
    after = guest.vm.memory_use()
    pages = guest.vm.shadow().pages
    yield Row("a shadow page", (after["shadow_pages"] - before["shadow_pages"]) / len(pages), "bytes", 8_376)
    grown = sum(after.values()) - sum(before.values())
    yield Row("a mapped page, shadow page and reverse map", grown / (regions * 512), "bytes")
    empty = Vm(64 << 30)
    yield Row("a GiB of a guest of 64 GiB that is not touched", sum(empty.memory_use().values()) / 64, "bytes")
    touched = 8 << 20 if quick else 100 << 20
    for gpa in range(0, touched, 1 << 20):
        empty.write_memory(gpa * 600, b"\1" * (1 << 20))
    used = sum(empty.memory_use().values())
    yield Row(f"a guest of 64 GiB with {touched >> 20} MiB written, over that", used / touched, "x", asked=1.1)


def rows(quick: bool) -> Iterator[Row]:
    """Sizes, threads, bytes."""
    yield from _faults(quick)
    yield from _threads(quick)
    yield from _memory(quick)
