"""Turn the recorded runs of real KVM into the data file of the conformance suite.

    python -m tests.conformance.tools.import_scenarios scenarios.txt.xz HARNESS_DIR [-o OUT.json.xz]

`scenarios.txt.xz`: blocks of `=== SPEC`, `INIT:`, `OPS:`, `=== SCEN`, `END`, event lines, `SPT` and `STAT`, as the
recording harness printed them. HARNESS_DIR holds the guest programs (guest64.S, ustub.S, guest32.S); they are
assembled here, with binutils, so that the suite itself needs no assembler. The output is described in
tests/conformance/corpus.py.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

from tests.conformance.tools.guest_listing import CODE_BASE, USER_BASE, assemble

MODES = {"64": "64-bit", "32": "32-bit", "36": "PAE", "0": "no paging"}
# What the harness did before the first entry and no line of the recording says.
SLOT1: list[Any] = ["slot", 1, 0x10000000, 0x100000, "readonly"]
SETUP: dict[str, list[list[Any]]] = {
    "O2-7": [SLOT1],
    "O2-8": [["quota", 64]],
    "O2-27": [SLOT1, ["poke", 0x10000000, 0x400003], ["poke", 0x10000008, 0x401003]],
    "O5-11": [SLOT1],
}
# Short names of counters in tools/scenario_names.tsv (the published table), to check the recording against it.
SHORT = {
    "tk": "pf_taken", "fx": "pf_fixed", "em": "pf_emulate", "sp": "pf_spurious", "fa": "pf_fast", "gu": "pf_guest",
    "mm": "pf_mmio_spte_created", "zap": "mmu_shadow_zapped", "pw": "mmu_pte_write", "pd": "mmu_pde_zapped",
    "fl": "mmu_flooded", "rec": "mmu_recycled", "cm": "mmu_cache_miss", "un": "mmu_unsync", "4k": "pages_4k",
    "2m": "pages_2m", "nx": "nx_lpage_splits", "rf": "remote_tlb_flush_requests", "tf": "tlb_flush", "iv": "invlpg",
    "ie": "insn_emulation", "rm": "max_mmu_rmap_size",
}  # fmt: skip
ADDRESS = 0x000F_FFFF_FFFF_F000
NX = 1 << 63
MMIO = 1 << 51


def parse_ops(line: str) -> list[list[Any]]:
    """`R 400000; LCMPXCHG 30a0=f063,0; CALL 430000(rdx=20000,rcx=0);` -> [letter, address, value, extra]."""
    ops: list[list[Any]] = []
    for text in filter(None, (part.strip() for part in line.split(";"))):
        letter, rest = text.split(" ", 1)
        if found := re.fullmatch(r"(\w+)\(rdx=(\w+),rcx=(\w+)\)", rest):
            words = list(found.groups())
        else:
            words = re.split("[=,]", rest)
        numbers = [int(word, 16) for word in words] + [0, 0]
        ops.append([letter, *numbers[:3]])
    return ops


def parse_stages(lines: list[str]) -> list[dict[str, int]]:
    """Counters after each HOST action and at the end, summed up (the harness prints differences)."""
    total: dict[str, int] = {}
    stages = []
    for line in lines:
        for name, value in re.findall(r" (\w+)=(-?\d+)", line):
            total[name] = total.get(name, 0) + int(value)
        stages.append(dict(total))
    return stages


class Tables:
    """Which shadow page lies at which host address, told from the events; needed to know what an SPT line shows."""

    def __init__(self) -> None:
        self.walk: dict[int, int] = {}
        self.requested = 0
        self.fault = False
        self.bound: dict[int, dict[str, Any]] = {}

    def see(self, line: str) -> None:
        if line.startswith(("kvm_mmu_pagetable_walk", "kvm_exit")):
            self.walk, self.fault = {}, False
        elif found := re.match(r"kvm_mmu_paging_element: pte (\w+) level (\d)", line):
            self.walk[int(found[2])] = int(found[1], 16)
        elif found := re.match(r"kvm_mmu_spte_requested: gfn (\w+)", line):
            self.requested, self.fault = int(found[1], 16), True
        elif found := re.match(r"kvm_mmu_set_spte: .* level (\d) at (\w+)", line):
            if self.fault:
                self._bind(int(found[1]), int(found[2], 16) & ~0xFFF)
        elif found := re.match(r"kvm_mmu_prepare_zap_page: sp gen \d gfn (\w+) l(\d) \S+ q\d( direct)?", line):
            for page in self.bound.values():
                if (page["gfn"], page["level"], page["direct"]) == (int(found[1], 16), int(found[2]), bool(found[3])):
                    page["alive"] = False

    def _bind(self, level: int, address: int) -> None:
        leaf = min(self.walk, default=9)
        direct = level < leaf or not self.walk
        gfn = self.requested & ~(512**level - 1) if direct else (self.walk[level + 1] & ADDRESS) >> 12
        self.bound[address] = {"gfn": gfn, "level": level, "direct": direct, "alive": True}

    def final(self, lines: list[str]) -> list[dict[str, Any]]:
        """The leaf tables that still belong to their page, entries as flags (MMIO entries whole)."""
        out = []
        for line in lines:
            address = int(line.split()[1].rstrip(":"), 16)
            page = self.bound.get(address)
            if page is None or not page["alive"]:
                continue
            entries = {}
            for index, text in re.findall(r"\[(\d+)\]=(\w+)", line):
                spte = int(text, 16)
                if page["level"] == 1 or spte & 0x80:
                    entries[index] = spte if spte & MMIO else spte & (NX | 0xFFF)
            out.append({"gfn": page["gfn"], "level": page["level"], "direct": page["direct"], "entries": entries})
        return out


def int3_decodes(events: list[str]) -> list[int]:
    """How often KVM decoded an INT3 again after each fault inside its delivery (quirk of hosts without NRIPS)."""
    counts: list[int] = []
    here = False
    for line in events:
        if line.startswith("kvm_page_fault"):
            here = "rip 0x2001c8 " in line
            if here:
                counts.append(0)
        elif here and line.startswith("kvm_emulate_insn: 0:2001c8"):
            counts[-1] += 1
    return counts


def parse_block(block: str, names: dict[str, list[str]]) -> dict[str, Any]:
    lines = [line.rstrip(" \0") for line in block.splitlines()]
    head = lines[0].split()
    number = int(head[0])
    ident = f"O{number // 100}-{number % 100}"
    regs = dict(zip(head[3:13:2], (int(word, 16) for word in head[4:13:2]), strict=True))
    body = [line.strip() for line in lines if line.startswith("  ")]
    events = [line for line in body if not line.startswith("SPT ")]
    spt = [line for line in body if line.startswith("SPT ")]
    tables = Tables()
    for line in events:
        tables.see(line)

    def field(prefix: str) -> str:
        return next((line.removeprefix(prefix) for line in lines if line.startswith(prefix)), "")

    end = re.match(r" rip (\w+) op (\d+) faults (\d+) err (\w+)", field("END"))
    if end is None:
        raise SystemExit(f"{ident}: no END line")
    return {
        "id": ident,
        "name": names[ident][0],
        "shows": names[ident][1],
        "mode": MODES[head[2]],
        "host": head[-1],
        "regs": regs,
        "setup": SETUP.get(ident, []),
        "memory": [[int(w, 16) for w in item.split("=")] for item in field("INIT:").split()],
        "ops": parse_ops(field("OPS:")),
        "events": events,
        "tables": tables.final(spt),
        "stages": parse_stages([line for line in lines if line.startswith("STAT ")]),
        "dirty": [[int(w, 16) for w in line.split()[1:]] for line in lines if line.startswith("DIRTY:")],
        "int3_decodes": int3_decodes(events),
        "end": {
            "rip": int(end[1], 16), "op": int(end[2]), "faults": int(end[3]), "error": int(end[4], 16),
            "shutdown": any(line.startswith("exit 8 ") for line in lines),
        },
    }  # fmt: skip


def check(scenario: dict[str, Any], published: str) -> None:
    """The recording must agree with the published table, and its tables with its own page counts."""
    last = scenario["stages"][-1]
    for short, value in re.findall(r"(zap|rec|4k|2m|[a-z]{2})(\d+)", published):
        if last.get(SHORT[short], 0) != int(value):
            print(f"{scenario['id']}: {SHORT[short]} {last.get(SHORT[short], 0)}, published {value}", file=sys.stderr)
    for level, name in ((1, "pages_4k"), (2, "pages_2m")):
        tables = [t for t in scenario["tables"] if t["level"] == level]
        leaves = sum(1 for t in tables for e in t["entries"].values() if e & 1 and not e & MMIO)
        if leaves != last.get(name, 0) and all(len(t["entries"]) < 40 for t in tables):
            print(f"{scenario['id']}: {leaves} leaves in the tables kept, {name} {last.get(name, 0)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recording", type=Path)
    parser.add_argument("harness", type=Path)
    parser.add_argument("-o", "--output", type=Path,
                        default=Path(__file__).parents[1] / "data" / "scenarios-kvm-6.1.json.xz")  # fmt: skip
    args = parser.parse_args()
    rows = (Path(__file__).parent / "scenario_names.tsv").read_text(encoding="utf-8").splitlines()[1:]
    names = {row.split("\t")[0]: row.split("\t")[1:] for row in rows}
    code, blocks = assemble(args.harness / "guest64.S", CODE_BASE, {})
    user_names = {USER_BASE: "user_read", USER_BASE + 16: "user_write"}
    user, user_blocks = assemble(args.harness / "ustub.S", USER_BASE, user_names)
    code32, blocks32 = assemble(args.harness / "guest32.S", CODE_BASE, {}, bits=32)
    text = lzma.decompress(args.recording.read_bytes()).decode("utf-8")
    scenarios = [parse_block(block, names) for block in re.split(r"(?m)^=== SPEC ", text)[1:]]
    for scenario in scenarios:
        check(scenario, names[scenario["id"]][2])
    data = {
        "schema": 1,
        "made": "Linux 6.1.0-56 (Debian), kvm-amd npt=0 in QEMU 7.2 TCG, -cpu EPYC,+svm; run twice, counters equal",
        "guest": {"code": code.hex(), "user": user.hex(), "blocks": blocks | user_blocks},
        "guest32": {"code": code32.hex(), "blocks": blocks32},
        "not_in_corpus": sorted(set(names) - {scenario["id"] for scenario in scenarios}),
        "scenarios": scenarios,
    }
    packed = lzma.compress(json.dumps(data, separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(packed)
    print(f"{len(scenarios)} scenarios, {len(packed)} bytes -> {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
