"""A small guest for tests: page tables at fixed places, the first 2 MiB mapped one to one, and rows to run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import shadowkvm as sk

CR0, CR4, EFER = 0x80050033, 0x20, 0xD01
PML4, PDPT, PD, PT = 0x1000, 0x2000, 0x3000, 0x4000
MAPPED = 2 << 20
FULL = 0x67  # present, writable, user, accessed, dirty


def entry(gpa: int, flags: int = FULL) -> bytes:
    return (gpa | flags).to_bytes(8, "little")


def build(vm: sk.Vm) -> None:
    """Tables and registers of every vCPU."""
    for table, child in ((PML4, PDPT), (PDPT, PD), (PD, PT)):
        vm.write_memory(table, entry(child))
    vm.write_memory(PT, b"".join(entry(page << 12) for page in range(512)))
    for cpu in vm.vcpus:
        cpu.set_sregs(cr0=CR0, cr3=PML4, cr4=CR4, efer=EFER)


def guest(memory: int = 4 << 20, **settings: Any) -> sk.Vm:
    vm = sk.Vm(memory, **settings)
    build(vm)
    return vm


def rows(*items: tuple[sk.Op, dict[str, int]]) -> NDArray[np.void]:
    """A trace: (op, fields); size is 8 unless given."""
    out = np.zeros(len(items), sk.TRACE_DTYPE)
    out["size"] = 8
    for number, (op, fields) in enumerate(items):
        out["op"][number] = op
        for name, value in fields.items():
            out[name][number] = value
    return out


def reads(count: int, *, step: int = 4096) -> NDArray[np.void]:
    """Loads from the mapped 2 MiB, a page farther each."""
    out = np.zeros(count, sk.TRACE_DTYPE)
    out["op"], out["size"] = sk.Op.READ, 8
    out["addr"] = np.arange(count, dtype=np.uint64) * step % MAPPED
    return out
