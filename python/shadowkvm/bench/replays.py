"""Trace replay: how many records a second `Vm.run` gets through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.bench.clock import best, rounds
from shadowkvm.bench.guests import ALIAS, FLAGS, build
from shadowkvm.bench.guests import rows as make_rows
from shadowkvm.bench.model import Row
from shadowkvm.ops import Op
from shadowkvm.trace import Recording
from shadowkvm.vm import Vm
from shadowkvm.workloads import get

__all__ = ["DOC", "rows"]

DOC: Final = """Millions of records a second on one thread, from NumPy arrays of 24-byte records, the best of several
rounds. Records without exits are loads of mapped pages, in order and skewed (90 % of them
from a tenth of the pages)."""

_PAGES: Final = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
_TABLE_AT: Final = ALIAS


def _rate(name: str, work: Callable[[], object], records: int, quick: bool, *, asked: float | None = None) -> Row:
    work()
    seconds = best({"": work}, rounds(quick))[""]
    return Row(name, records / seconds / 1e6, "M/s", asked=asked, at_least=True)


def _no_exit(pages: int, quick: bool) -> Iterator[Row]:
    vm = build(pages // 512 if pages >= 512 else 1).vm
    vm.run(make_rows(Op.READ, np.arange(pages) << 12))
    random, count = np.random.default_rng(1), 1 << (18 if quick else 21)
    hot = random.integers(0, pages // 10, count)
    skewed = np.where(random.random(count) < 0.9, hot, random.integers(0, pages, count))
    asked = 60.0 if pages <= 1 << 17 else 12.0
    label = f"{pages >> 10:,} k pages"
    for name, which in (("in order", np.arange(count) % pages), ("skewed", skewed)):
        work = partial(vm.run, make_rows(Op.READ, which << 12))
        yield _rate(f"no exits, {label}, {name}", work, count, quick, asked=asked)


def _fresh(make: Callable[[], Vm], trace: NDArray[np.void], quick: bool) -> float:
    """Seconds of the engine for a trace on a VM that is made anew each round."""
    return min(make().run(trace).seconds for _ in range(rounds(quick)))


def _storms(quick: bool) -> Iterator[Row]:
    regions = 32 if quick else 256
    first = make_rows(Op.READ, np.arange(regions * 64) << 15)
    seconds = _fresh(lambda: build(regions).vm, first, quick)
    yield Row("fault storm, each maps 8 pages", len(first) / seconds / 1e6, "M/s")
    seconds = _fresh(lambda: build(regions, lone=True).vm, first, quick)
    yield Row("fault storm, each maps 1 page", len(first) / seconds / 1e6, "M/s")

    guest = build(32)
    tables = _TABLE_AT + (np.arange(32) + 1) * 4096  # behind the one directory
    parts = []
    for turn in range(2):
        entry = np.arange(8) * 64
        where = (tables[:, None] + entry[None, :] * 8).reshape(-1)
        frames = (np.arange(32)[:, None] * 512 + entry[None, :] + turn).reshape(-1)
        parts += [
            make_rows(Op.WRITE, where, (frames << 12) | FLAGS),
            make_rows(Op.CR3, np.zeros(1, np.int64), guest.root),
        ]
        parts += [make_rows(Op.READ, np.arange(32) << 21)]
    edits = np.concatenate(parts * (2 if quick else 16))
    yield _rate("unsync storm: 32 tables edited in 8 places, CR3 load", lambda: guest.vm.run(edits), len(edits), quick)

    flood = build(1)
    store = make_rows(Op.WRITE, np.full(4, _TABLE_AT), flood.tables | FLAGS)
    floods = np.concatenate([store, make_rows(Op.READ, np.zeros(1, np.int64))] * (100 if quick else 2000))
    yield _rate("flooding: 4 stores to a directory, 1 load", lambda: flood.vm.run(floods), len(floods), quick)


def _real(quick: bool) -> Iterator[Row]:
    scenario = get("fork_exit").build(scale=0.5 if quick else 4)
    result = scenario.run()
    yield Row("workload fork_exit", result.rows / result.seconds / 1e6, "M/s", note=f"{result.rows:,} records")
    for folder in (Path.cwd(), Path(__file__).parents[3]):
        path = folder / "examples/recordings/fork20-demote64.npz"
        if path.exists():
            with Recording.open(path) as recording:
                runs = [Vm(recording.meta["memory"]).run(recording) for _ in range(rounds(quick))]
            rate = max(run.rows / run.seconds for run in runs) / 1e6
            yield Row("a recorded Linux guest: 20 x fork, exec, exit", rate, "M/s", note=f"{runs[0].rows:,} records")
            return


def rows(quick: bool) -> Iterator[Row]:
    """Without exits, storms of one kind of exit, and mixtures."""
    for pages in _PAGES[:-1] if quick else _PAGES:
        yield from _no_exit(pages, quick)
    yield from _storms(quick)
    yield from _real(quick)
