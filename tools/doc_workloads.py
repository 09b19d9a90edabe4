"""Write the generated parts of docs/guests.md and docs/workloads.md, from the code itself.

python tools/doc_workloads.py          rewrite both pages
python tools/doc_workloads.py --check  only say whether they are up to date (exit status 1: not)

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; everything else is written by hand.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shadowkvm import cli
from shadowkvm.guest import Settings
from shadowkvm.pagetables import MODES
from shadowkvm.replay import replay
from shadowkvm.report import rates
from shadowkvm.trace import Recording
from shadowkvm.workload_report import parameter_rows
from shadowkvm.workloads import GUEST_PARAMETERS, Workload, entries, get
from shadowkvm.workloads.parameter import size_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("guests.md", "workloads.md")
SCALE = 0.2
ROUNDS = 20
COSTS = {
    "exits": "exits",
    "shadow repaired": "pf_fixed",
    "emulated": "pf_emulate",
    "guest's own": "pf_guest",
    "CR3 loads": "CR3",
    "INVLPG": "invlpg",
    "made": "mmu_cache_miss",
    "zapped": "mmu_shadow_zapped",
    "TLB flushes": "tlb_flush",
}


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def workloads() -> list[Workload]:
    """Those of this package."""
    return [entry.workload for entry in entries() if entry.origin == "shadowkvm" and entry.workload is not None]


def modes() -> str:
    """The paging modes of the builder."""
    rows = []
    for mode in MODES.values():
        sizes = ", ".join(map(size_text, mode.page_sizes))
        yes_no = "yes" if mode.nx else "no"
        rows.append((f"`{mode.name}`", len(mode.levels), mode.entry_bytes, sizes, mode.address_bits, yes_no))
    return table(("mode", "levels", "bytes an entry", "page sizes", "address bits", "NX"), rows)


def settings() -> str:
    """What a guest can be told."""
    known = {parameter.name: parameter for parameter in GUEST_PARAMETERS}
    names = [name for name in Settings.__dataclass_fields__ if name in known]
    rows = [(f"`{name}`", known[name].show(known[name].default), known[name].doc) for name in names]
    rows.append(("`seed`", 1, "of all chance in the guest"))
    return table(("setting", "default", "what"), rows)


def costs() -> str:
    """What each workload costs for a unit of its work."""
    rows = []
    for workload in workloads():
        result = workload.build(scale=SCALE).run()
        start = result.phases["start"]
        cells = []
        for name in COSTS.values():
            ops = name.isupper()
            total, before = (part.ops.get(name, 0) if ops else part.counters[name] for part in (result, start))
            cells.append(number((total - before) / result.units))
        rows.append((f"`{workload.name}`", workload.unit, *cells))
    return table(("workload", "one unit", *COSTS), rows)


def number(value: float) -> str:
    """Three digits, or as many as are before the point."""
    return "-" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sections() -> str:
    """Each workload: what it stresses, what to look for, its parameters."""
    out = []
    for workload in workloads():
        rows = ((f"`{name}`", *rest) for name, *rest in parameter_rows(workload, list(workload.parameters)))
        looks = "\n".join(f"* {line}" for line in workload.look_for)
        text = f"{workload.summary[0].upper()}{workload.summary[1:]}. Its work is counted in: {workload.unit}."
        other = ", ".join(f"`{name}={value}`" for name, value in workload.guest.items() if name != "memory")
        text += f" Of the guest it changes {other}." if other else ""
        head = f"### {workload.name}\n\n{text}\n\n{workload.stresses}\n\nWhat to look for:\n\n{looks}\n"
        out.append(f"{head}\n{table(('parameter', 'default', 'limits', 'what'), rows)}\n")
    return "\n".join(out).rstrip()


def real() -> str:
    """One round of fork, exec and exit: a real Linux, and exec_storm."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "exec.npz"
        get("exec_storm").build(execs=ROUNDS).record(model)
        recordings = (ROOT / "examples" / "recordings" / "fork20-demote64.npz", model)
        done = []
        for path in recordings:
            with Recording.open(path) as recording:
                done.append(replay(recording))
    both = [rates(run) for run in done]
    rows = [
        (one.label.strip(), *(number(rate.total / ROUNDS) for rate in (one, other)))
        for one, other in zip(*both, strict=True)
        if one.total or other.total
    ]
    # The report has no line for it.
    rows.append(("tried again", *(number(run.result.counters["x_retries"] / ROUNDS) for run in done)))
    return table(("", "real Linux", "exec_storm"), rows)


def fork_exit() -> str:
    """What the command prints, but for its last line, which has the time."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["workload", "run", "fork_exit", "--scale", "0.1"])
    lines = out.getvalue().splitlines()
    return "\n".join(["```text", *lines[:-1], "...", "```"])


PARTS: dict[str, Callable[[], str]] = {
    "modes": modes,
    "settings": settings,
    "costs": costs,
    "real": real,
    "fork_exit": fork_exit,
    "workloads": sections,
}


def written(text: str) -> str:
    """A page with its generated parts made anew."""

    def part(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{PARTS[found[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """Rewrite the pages, or check them."""
    status = 0
    for name in PAGES:
        path = ROOT / "docs" / name
        old = path.read_text(encoding="utf-8")
        new = written(old)
        if arguments == ["--check"]:
            status |= int(new != old)
            print(f"{'ok   ' if new == old else 'STALE'}  docs/{name}")
        else:
            path.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
