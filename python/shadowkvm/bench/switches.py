"""What is off costs nothing: the same trace with and without what can be asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from shadowkvm.bench.clock import best, rounds
from shadowkvm.bench.guests import build
from shadowkvm.bench.guests import rows as make_rows
from shadowkvm.bench.model import Row
from shadowkvm.ops import Op

__all__ = ["DOC", "rows"]

DOC: Final = """One trace without exits and one of first touches, with nothing asked for, with outcomes, with
events, with TLBs followed; and how many events a second go into the array."""

_LABELS: Final = {
    "nothing": "nothing asked for",
    "outcomes": "outcomes of each row",
    "events": "events (there are none)",
    "tlb": "TLBs followed",
}


def rows(quick: bool) -> Iterator[Row]:
    """Outcomes and events, on and off."""
    count = 1 << (17 if quick else 20)
    plain, recording, followed = build(32).vm, build(32, events=True).vm, build(32).vm
    followed.follow_tlb()
    trace = make_rows(Op.READ, np.arange(count) % (32 * 512) << 12)
    plain.run(trace[: 32 * 512])
    recording.run(trace[: 32 * 512])
    followed.run(trace[: 32 * 512])
    works = {
        "nothing": lambda: plain.run(trace),
        "outcomes": lambda: plain.run(trace, outcomes=True),
        "events": lambda: recording.run(trace),
        "tlb": lambda: followed.run(trace),
    }
    for name, seconds in best(works, rounds(quick)).items():
        yield Row(f"no exits, {_LABELS[name]}", count / seconds / 1e6, "M/s")
    yield from _faults(32 if quick else 256, quick)


def _faults(regions: int, quick: bool) -> Iterator[Row]:
    first = make_rows(Op.READ, np.arange(regions * 64) << 15)
    seconds = {"off": float("inf"), "on": float("inf"), "array": float("inf")}
    events = 0
    for _ in range(rounds(quick)):
        silent, telling = build(regions).vm, build(regions, events=True).vm
        seconds["off"] = min(seconds["off"], silent.run(first).seconds)
        seconds["on"] = min(seconds["on"], telling.run(first).seconds)
        start = time.thread_time()
        events = len(telling.events)
        seconds["array"] = min(seconds["array"], time.thread_time() - start)
    yield Row("faults, events off", len(first) / seconds["off"] / 1e6, "M/s")
    yield Row(
        "faults, events on", len(first) / seconds["on"] / 1e6, "M/s", note=f"{events / len(first):.1f} events each"
    )
    rate = events / (seconds["on"] + seconds["array"]) / 1e6
    yield Row("events into the array, with the faults that raise them", rate, "M/s", asked=10, at_least=True)
