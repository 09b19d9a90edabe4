"""Instructions of one event, by callgrind, beside real KVM's."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from shadowkvm.bench.model import Row, Skipped

__all__ = ["DOC", "rows"]

DOC: Final = """Instructions that valgrind's callgrind counts for N rows of a trace with the event, less those of the
same run without them, over N; it gives the same figure each time. KVM's figures are of Linux 6.1. What a row takes
that needs no exit is taken off; what remains is the MMU's part, as KVM's figures leave exit and entry out (but those of
INVLPG and CR3, which are of whole exits). The last column has it with the row."""


class _Event(NamedTuple):
    label: str
    kvm: float | None
    asked: float
    times: int


_EVENTS: Final = {
    "fault": _Event("fault on a fresh page, no neighbours", 4_033, 400, 2000),
    "lone_table": _Event("... and a new last-level table", 4_637, 700, 400),
    "unsync": _Event("first store to a last-level table: unsync", 4_153, 400, 400),
    "directory": _Event("store to a page directory: emulated", 5_766, 500, 1000),
    "flood": _Event("third such store: flood, zap", 26_984, 1_500, 150),
    "reflected": _Event("guest's own #PF", 937, 250, 2000),
    "invlpg": _Event("INVLPG of a synced page", 4_689, 120, 2000),
    "invlpg_unsync": _Event("INVLPG in an unsync table", 13_866, 600, 1000),
    "cr3": _Event("CR3 load, nothing unsync", 3_819, 120, 2000),
}


def _source() -> Path:
    """The checkout that has the program to measure."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).parents[3]):
        if (folder / "rust/core/examples/cost.rs").exists():
            return folder
    raise Skipped("instructions are counted in a clone of the repository; this is none")


def _program(source: Path) -> Path:
    for tool, what in (("cargo", "Rust"), ("valgrind", "valgrind")):
        if shutil.which(tool) is None:
            raise Skipped(f"{tool} was not found on PATH: instructions are counted with {what}")
    command = ["cargo", "build", "--release", "--locked", "--quiet", "--example", "cost", "-p", "shadowkvm-core"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise Skipped(f"the program to measure does not build: {done.stderr.strip().splitlines()[-1]}")
    return source / "target/release/examples/cost"


def _instructions(program: Path, event: str, count: int) -> float:
    """Of one event."""
    totals = []
    for run in ("not", "run"):
        with tempfile.NamedTemporaryFile() as out:
            command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out.name}", str(program)]
            words = [*command, event, str(count), run]
            said = subprocess.run(words, capture_output=True, text=True, check=False).stderr  # noqa: S603
        found = re.search(r"Collected : (\d+)", said)
        if not found:
            raise Skipped(
                f"valgrind gave no count: {said.strip().splitlines()[-1] if said.strip() else 'it said nothing'}"
            )
        totals.append(int(found[1]))
    return (totals[1] - totals[0]) / count


def rows(quick: bool) -> Iterator[Row]:
    """The table of docs/performance.md."""
    program = _program(_source())

    def of(event: str, count: int) -> float:
        return _instructions(program, event, max(50, count // 10) if quick else count)

    base = of("hit", 2000)
    yield Row("a row that needs no exit", base, "instructions")
    measured = {}
    for name, event in _EVENTS.items():
        measured[name] = of(name, event.times)
        mmu = measured[name] - base
        note = f"{measured[name]:,.0f}"
        yield Row(event.label, mmu, "instructions", event.kvm, event.asked, note=note)
        if name == "fault":
            each = (of("prefetch", event.times) - measured[name]) / 7
            yield Row("... each neighbour that is prefetched with it", each, "instructions", 2_720, 60)
    full, one = of("resync_512", 100), of("resync_1", 100)
    yield Row("resync at a CR3 load, each present entry", (full - one) / 511, "instructions", 550, 25)
    # KVM: the load, one entry, 511 empty slots at 10 each.
    whole = 3_819 + 550 + 511 * 10
    ours = one - measured["unsync"]
    yield Row("CR3 load that resyncs 1 entry and 511 empty ones", ours, "instructions", whole)
