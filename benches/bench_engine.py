"""What the package costs: one call, a trace without exits, fault and unsync storms, a recorded guest.

    python -m pytest benches --benchmark-enable --benchmark-group-by=group

Each bench says in `extra_info` how many operations and exits a round has. docs/performance.md has the engine's own
benches and how to measure in instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.guest import MAPPED, PD, PDPT, PML4, PT, build, entry, guest, reads

import shadowkvm as sk
from shadowkvm.replay import open_trace, replay

ROOT = Path(__file__).parents[1]
ROWS = 1 << 18


def run(benchmark: Any, make: Callable[[], sk.Vm], trace: NDArray[np.void] | sk.Recording, rounds: int = 10) -> None:
    """Time `Vm.run` on a fresh VM each round."""
    results: list[sk.RunResult] = []
    benchmark.pedantic(
        lambda vm: results.append(vm.run(trace)), setup=lambda: ((make(),), {}), rounds=rounds, warmup_rounds=1
    )
    counters = results[-1].counters
    benchmark.extra_info.update(rows=results[-1].rows, exits=counters["exits"])
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_row"] = round(benchmark.stats.stats.min * 1e9 / results[-1].rows, 2)


@pytest.mark.benchmark(group="one call")
@pytest.mark.parametrize("method", ["read", "write", "fetch", "rmw"])
def test_a_call_without_an_exit(benchmark: Any, method: str) -> None:
    cpu = guest().vcpus[0]
    cpu.write(0x10_0000, 1)
    call = getattr(cpu, method)
    benchmark(call, 0x10_0000, *((1,) if method in {"write", "rmw"} else ()))


@pytest.mark.benchmark(group="one call")
def test_a_call_that_faults_in_the_guest(benchmark: Any) -> None:
    benchmark(guest().vcpus[0].read, MAPPED)


@pytest.mark.benchmark(group="one call")
def test_counters(benchmark: Any) -> None:
    vm = guest()
    benchmark(lambda: vm.counters)


@pytest.mark.benchmark(group="run")
@pytest.mark.parametrize("outcomes", [False, True], ids=["plain", "outcomes"])
def test_no_exits(benchmark: Any, outcomes: bool) -> None:
    trace = reads(ROWS)
    vm = guest()
    vm.run(trace)
    result = benchmark(vm.run, trace, outcomes)
    assert result.counters["exits"] == 0
    benchmark.extra_info["rows"] = ROWS


@pytest.mark.benchmark(group="run")
def test_fault_storm(benchmark: Any) -> None:
    """Each load is the first touch of an 8-page group: a #PF exit that maps eight pages, and now and then a table."""
    pages = 1 << 17
    tables = pages >> 9

    def make() -> sk.Vm:
        vm = sk.Vm(1 << 30)
        build(vm)
        first = 16 << 20
        vm.write_memory(PD, b"".join(entry(first + (n << 12)) for n in range(tables)))
        vm.write_memory(first, b"".join(entry(page << 12) for page in range(pages)))
        return vm

    trace = np.zeros(pages >> 3, sk.TRACE_DTYPE)
    trace["op"], trace["size"] = sk.Op.READ, 8
    trace["addr"] = np.arange(len(trace), dtype=np.uint64) << np.uint64(15)
    run(benchmark, make, trace)


@pytest.mark.benchmark(group="run")
def test_unsync_storm(benchmark: Any) -> None:
    """A store that takes a table out of step, a CR3 load that compares its 512 entries: again and again."""
    trace = np.zeros(2 << 12, sk.TRACE_DTYPE)
    trace["size"] = 8
    trace["op"][::2], trace["addr"][::2], trace["value"][::2] = sk.Op.WRITE, PT, 0x67
    trace["op"][1::2], trace["value"][1::2] = sk.Op.CR3, PML4

    def make() -> sk.Vm:
        vm = guest()
        vm.run(reads(512))
        return vm

    run(benchmark, make, trace)


@pytest.mark.benchmark(group="run")
def test_emulated_stores(benchmark: Any) -> None:
    """Stores to an upper-level table that is in use: an exit and an emulation each."""
    trace = np.zeros(1 << 13, sk.TRACE_DTYPE)
    trace["op"], trace["size"], trace["addr"], trace["value"] = sk.Op.WRITE, 8, PDPT + 8, 0
    run(benchmark, guest, trace)


@pytest.mark.benchmark(group="recording")
@pytest.mark.parametrize("name", ["fork20-demote64", "dyn10"])
def test_a_recording(benchmark: Any, name: str) -> None:
    """From memory: the container is not measured."""
    with sk.Recording.open(ROOT / "examples" / "recordings" / f"{name}.npz") as stored:
        meta = {key: stored.meta[key] for key in ("memory", "sregs")}
        pages = np.frombuffer(b"".join(stored.pages), np.uint8)
        recording = sk.Recording.from_arrays(stored.to_arrays().rows, pages=pages, **meta)
    run(benchmark, lambda: sk.Vm(meta["memory"]), recording, rounds=5)


@pytest.mark.benchmark(group="recording")
def test_the_main_job(benchmark: Any) -> None:
    """What `shadowkvm run` does before it prints: reading, engine with events, breakdown."""

    def job() -> int:
        with open_trace(ROOT / "examples" / "recordings" / "fork20-demote64.npz") as recording:
            return replay(recording).result.rows

    assert benchmark.pedantic(job, rounds=5, warmup_rounds=1) == 202_540
