"""What real KVM's handling of an event costs, in instructions, under nested and under shadow paging.

    python benches/kvm_cost.py                       # both, about a minute: a table
    python benches/kvm_cost.py --npt 1 --json cost.json
    python benches/kvm_cost.py --irqchip --append mitigations=off

Needs what `shadowkvm doctor` names for the qemu backend. QEMU without hardware help runs Debian's kernel with kvm-amd,
and in it kvm_cost.c, a minimal VMM with a guest of a few loops. With `-icount shift=0` the TSC counts executed
instructions, those of KVM and of the VMM included, and KVM lets the guest read it without an exit. So the guest's own
RDTSC before and after one instruction gives the whole event; the same code without an event is subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from shadowkvm.errors import ShadowKvmError
from shadowkvm.kvm.initramfs import SETUP, archive, compile_harness, tools
from shadowkvm.kvm.qemu import Qemu, default_root, installed_kernels

SOURCE: Final = Path(__file__).with_name("kvm_cost.c")
MACHINE: Final = "-accel tcg -icount shift=0,sleep=off -cpu EPYC,+svm,+npt -m 2048 -display none -no-reboot"
LINE: Final = "console=ttyS0 quiet panic=-1"
RUN: Final = """/bin/cost {option} > /out 2>&1
$B cat /out > /dev/ttyS1
$B poweroff -f
"""
"""The serial port comes last: its interrupts must not fall into what is measured."""
REGION: Final = 64
"""kvm_cost.c touches so many pages in each region of 2 MiB; the first of them needs a new last-level table."""


@dataclass(frozen=True, slots=True)
class Event:
    """A row: which events of which scenario of kvm_cost.c."""

    text: str
    scenario: str
    part: str = "all"
    """first: the first touch of each region of 2 MiB; rest: the others."""
    own: int = 0
    """Instructions that the guest executes more than in scenario "nop"."""
    npt: tuple[int, ...] = (1, 0)


EVENTS: Final = (
    Event("CPUID: answered by KVM", "cpuid", own=1),
    Event("HLT: to the VMM and back", "hlt"),
    Event("... as the VMM sees it, around KVM_RUN", "hlt_ioctl"),
    Event("OUT to the VMM and back", "out"),
    Event("IN", "in"),
    Event("guest's own #PF", "fault", own=3),
    Event("store, page not mapped by KVM, tables present", "store_again", "rest"),
    Event("... and a new last-level table", "store_again", "first"),
    Event("store, the same, KVM's first look at that page", "store", "rest"),
    Event("... and a new last-level table", "store", "first"),
    Event("load, the same", "load", "rest"),
    Event("store, absent in the host too", "absent", "rest"),
    Event("... and a new last-level table", "absent", "first"),
    Event("store, 2 MiB page", "huge", npt=(1,)),
    Event("store, 2 MiB page, absent in the host too", "huge_absent", npt=(1,)),
    Event("store, page write-protected for the dirty log", "dirty"),
    Event("MMIO store to the VMM and back", "mmio_store"),
    Event("MMIO load", "mmio_load"),
    Event("MMIO store, KVM's first look at that page", "mmio_fresh", "rest"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Instructions of an event, exit and entry included."""

    npt: int
    event: str
    scenario: str
    part: str
    count: int
    median: float
    p5: float
    p95: float
    mean: float
    exits: float
    """For each event of the scenario, by KVM's own counter."""


def boot(npt: int, *, irqchip: bool, append: str) -> str:
    """What kvm_cost.c prints."""
    qemu, root = Qemu(), default_root()
    with tempfile.TemporaryDirectory(prefix="shadowkvm-") as d:
        folder = Path(d)
        compile_harness(folder / "cost", SOURCE)
        init = (SETUP + RUN).format(npt=npt, option="irqchip" if irqchip else "")
        files = {"init": (0o755, init.encode()), "bin/cost": (0o755, (folder / "cost").read_bytes())}
        (folder / "initrd.gz").write_bytes(archive(files | tools(root, qemu.kernel)))
        command = [str(qemu.qemu), *MACHINE.split(), "-kernel", str(dict(installed_kernels(root))[qemu.kernel])]
        command += ["-initrd", f"{folder}/initrd.gz", "-append", f"{LINE} {append}"]
        command += ["-serial", f"file:{folder}/console", "-serial", f"file:{folder}/out"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=900)  # noqa: S603
        text = (folder / "out").read_text(errors="replace")
        if not text.rstrip().endswith("DONE"):
            last = "\n".join([*text.splitlines()[-1:], *(folder / "console").read_text().splitlines()[-5:]])
            raise ShadowKvmError(f"kvm_cost did not end; the last lines:\n{last}")
    return text


def select(values: Sequence[int], part: str) -> Sequence[int]:
    """The very first touch needs upper tables as well: it is nobody's."""
    if part == "first":
        return values[REGION::REGION]
    return [v for i, v in enumerate(values) if part == "all" or i % REGION]


def rows(npt: int, text: str) -> list[Row]:
    """The table of one boot."""
    lines = [line.split() for line in text.splitlines()]
    values = {words[1]: [int(v) for v in words[2:]] for words in lines if words[0] == "E"}
    counters = {w[1]: dict(word.split("+") for word in w[2:]) for w in lines if w[0] == "C"}
    nothing = statistics.median(values["nop"])
    made = []
    for event in EVENTS:
        if npt not in event.npt or event.scenario not in values:
            continue
        # The VMM's view holds none of the guest's code but the RDTSCs between two exits.
        own = 0 if event.scenario == "hlt_ioctl" else nothing + event.own
        chosen = [v - own for v in select(values[event.scenario], event.part)]
        cuts = statistics.quantiles(chosen, n=20)
        exits = int(counters[event.scenario.removesuffix("_ioctl")]["exits"]) / len(values[event.scenario])
        spread = (statistics.median(chosen), cuts[0], cuts[-1], statistics.fmean(chosen))
        made.append(Row(npt, event.text, event.scenario, event.part, len(chosen), *spread, round(exits, 2)))
    return made


def table(npt: int, lines: Sequence[Row]) -> Table:
    """For people."""
    made = Table(title=f"kvm-amd npt={npt}: instructions of a whole event, exit and entry included")
    made.add_column("event")
    for head in ("median", "5 %", "95 %", "mean", "exits", "events"):
        made.add_column(head, justify="right")
    for row in lines:
        figures = [f"{v:,.0f}" for v in (row.median, row.p5, row.p95, row.mean)]
        made.add_row(row.event, *figures, f"{row.exits:.2f}", f"{row.count:,}")
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--npt", type=int, choices=(0, 1), action="append", help="1 nested, 0 shadow paging [both]")
    parser.add_argument("--irqchip", action="store_true", help="interrupt controllers in the kernel; leaves HLT out")
    parser.add_argument("--append", default="", metavar="WORDS", help="to the kernel's command line")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    about = {k: v for k, v in Qemu().about().items() if k in {"kernel", "qemu"}}
    about |= {"machine": MACHINE, "append": f"{LINE} {args.append}".strip(), "irqchip": str(args.irqchip).lower()}
    console, done = Console(), []
    console.print("  ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    for npt in args.npt or (1, 0):
        measured = rows(npt, boot(npt, irqchip=args.irqchip, append=args.append))
        console.print(table(npt, measured))
        done += measured
    if args.json:
        result = {"schema": "shadowkvm.kvm_cost/1", **about, "rows": [asdict(row) for row in done]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
