"""What building guests costs: tables of a GiB, walks of a million addresses, calls of the model, whole workloads.

    python -m pytest benches --benchmark-enable --benchmark-group-by=group -k guest

`extra_info` has rows and, where the engine runs them, the part of the time that it takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shadowkvm.guest import Linux, pages
from shadowkvm.pagetables import MODES, AddressSpace, GuestMemory
from shadowkvm.workloads import entries, get

GIB = 1 << 30


@pytest.mark.benchmark(group="guest tables")
@pytest.mark.parametrize("mode", list(MODES))
def test_map_a_gibibyte(benchmark: Any, mode: str) -> None:
    def fresh() -> tuple[tuple[AddressSpace], dict[str, int]]:
        return (AddressSpace(GuestMemory(2 * GIB, mode)),), {}

    benchmark.pedantic(lambda space: space.map(GIB, 0, GIB), setup=fresh, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="guest tables")
@pytest.mark.parametrize("what", ["walk", "clone", "unmap"])
def test_change_a_gibibyte(benchmark: Any, what: str) -> None:
    gvas = np.random.default_rng(1).integers(GIB, 2 * GIB, 1_000_000, dtype=np.uint64)

    def fresh() -> tuple[tuple[AddressSpace], dict[str, int]]:
        space = AddressSpace(GuestMemory(2 * GIB))
        space.map(GIB, 0, GIB)
        return (space,), {}

    calls = {"walk": lambda s: s.walk(gvas), "clone": lambda s: s.clone(), "unmap": lambda s: s.unmap(GIB, GIB)}
    benchmark.pedantic(calls[what], setup=fresh, rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="guest calls")
def test_touch_64k_pages(benchmark: Any) -> None:
    rows = []

    def fresh() -> tuple[tuple[Any, ...], dict[str, int]]:
        guest = Linux(memory=GIB)
        process = guest.spawn()
        guest.switch(process)
        guest.start()
        return (guest, process, guest.mmap(process, 1 << 28)), {}

    def touch(guest: Linux, process: Any, area: Any) -> None:
        guest.touch(process, pages(area.start, area.pages), write=True)
        rows.append(len(guest.take()))

    benchmark.pedantic(touch, setup=fresh, rounds=3, warmup_rounds=1)
    benchmark.extra_info["rows"] = rows[-1]


@pytest.mark.benchmark(group="workloads")
@pytest.mark.parametrize("name", [entry.name for entry in entries() if entry.origin == "shadowkvm"])
def test_a_workload(benchmark: Any, name: str) -> None:
    scenario = get(name).build(scale=0.1)
    result = benchmark.pedantic(scenario.run, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(rows=result.rows, engine=round(result.seconds / result.elapsed, 3))
