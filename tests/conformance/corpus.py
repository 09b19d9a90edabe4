"""The corpus: 91 small guests as real KVM ran them, with every event and counter. Made by tools/import_scenarios.py.

A scenario is a list of ops (letters below) that a fixed guest program carries out from 0x200000, reading 32-byte op
entries at 0x210000. Common start state: 64 MiB of RAM; PML4 at 1000, PDPT at 2000, PD at 3000, page tables 4000..b000
that map 0-16 MiB one to one (flags 63, supervisor, except page 220000, the user stub), IDT 201000, GDT 202000, TSS
203000, stack below 206000.

Letters: R/W 64-bit load/store, W8 W16 W32 W64 sized stores, UR/UW the same from CPL3, INV INVLPG, CALL/UEXEC execute
there, XCHG, LCMPXCHG address=new,expected, LCMPXCHG8B, LOR, ADDM, REPSTOS address=value,count, PUSH (at address-8),
MOVAPS, RAC load with EFLAGS.AC=1, INT3, CR0 CR3 CR4 EFER writes, HOST n = exit to user space and the action of
driver.host_action. In names: Pn = page 400000+n*1000, T = page table gfn 6 (maps Pn), D = page directory gfn 3, D2 =
directory gfn 20 at PDPT[1].
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).parent / "data" / "scenarios-kvm-6.1.json.xz"
RAM = 64 << 20
OPS_AT = 0x210000
CODE_AT, USER_AT = 0x200000, 0x220000

# The number of an op in the guest's jump table (table slot and op entry agree).
OP_NUMBER = {
    letter: number
    for number, letter in enumerate(
        [
            "HLT",
            "R",
            "W",
            "INV",
            "CR3",
            "CALL",
            "CR0",
            "CR4",
            "HOST",
            "W32",
            "UR",
            "UW",
            "W8",
            "W16",
            "XCHG",
            "LCMPXCHG",
            "LOR",
            "REPSTOS",
            "PUSH",
            "INVPCID",
            "ADDM",
            "MOVAPS",
            "UEXEC",
            "EFER",
            "SPIN",
            "LCMPXCHG8B",
            "RAC",
            "INT3",
        ]
    )
}


# The 32-bit program's own.
OP_NUMBER32 = OP_NUMBER | {"W32": 2, "W64": 14}


class Op(NamedTuple):
    letter: str
    address: int
    value: int
    extra: int

    def __str__(self) -> str:
        tail = f"={self.value:x}" if self.value else ""
        tail += f",{self.extra:x}" if self.extra else ""
        return f"{self.letter} {self.address:x}{tail}"


class Insn(NamedTuple):
    rip: int
    length: int
    text: str
    access: str


@dataclass(frozen=True)
class Table:
    """One leaf table at the end of a run: entries as flags (low 12 bits and NX), MMIO entries whole."""

    gfn: int
    level: int
    direct: bool
    entries: dict[int, int]


@dataclass(frozen=True)
class Scenario:
    id: str
    name: str
    shows: str
    mode: str  # "64-bit", "32-bit", "PAE", "no paging"
    host: str  # "4k", "huge", "untouched": the host's pages behind the guest's RAM
    regs: dict[str, int]  # cr0 cr3 cr4 efer idt
    setup: list[list[Any]]  # ["slot", id, gpa, size, "readonly"], ["quota", n], ["poke", gpa, qword]
    memory: list[tuple[int, int]]  # qwords that differ from the common start state
    ops: list[Op]
    events: list[str]  # every recorded trace line, in order
    tables: list[Table]
    stages: list[dict[str, int]]  # counters after each HOST action, last: at the end
    dirty: list[list[int]]  # answers to GET_DIRTY_LOG
    int3_decodes: list[int]
    end: dict[str, int]  # rip op faults error shutdown

    @property
    def is_long(self) -> bool:
        return self.mode == "64-bit"

    def slot(self, op: Op) -> int:
        """The op's number in its guest's jump table."""
        return (OP_NUMBER if self.is_long else OP_NUMBER32)[op.letter]

    @property
    def faults(self) -> int:
        """How many #PFs the guest took; only the 64-bit program counts them itself."""
        return self.end["faults"] if self.is_long else self.counters.get("pf_guest", 0)

    @property
    def counters(self) -> dict[str, int]:
        return self.stages[-1]


@dataclass(frozen=True)
class Program:
    """The guest's code at CODE_AT and its instructions by label."""

    code: bytes
    blocks: dict[str, list[Insn]]


@dataclass(frozen=True)
class Corpus:
    long: Program
    short: Program  # of every mode but the 64-bit one
    user: bytes
    not_in_corpus: list[str]
    scenarios: dict[str, Scenario]


def _scenario(raw: dict[str, Any]) -> Scenario:
    fields = dict(raw)
    fields["memory"] = [(address, value) for address, value in raw["memory"]]
    fields["ops"] = [Op(*op) for op in raw["ops"]]
    fields["tables"] = [
        Table(t["gfn"], t["level"], t["direct"], {int(index): spte for index, spte in t["entries"].items()})
        for t in raw["tables"]
    ]
    return Scenario(**fields)


def _program(raw: dict[str, Any]) -> Program:
    blocks = {label: [Insn(*insn) for insn in block] for label, block in raw["blocks"].items()}
    return Program(bytes.fromhex(raw["code"]), blocks)


@cache
def load(path: Path = DATA) -> Corpus:
    data = json.loads(lzma.decompress(path.read_bytes()))
    if data["schema"] != 1:
        message = f"{path}: schema {data['schema']}, this reader knows 1"
        raise ValueError(message)
    guest = data["guest"]
    return Corpus(
        long=_program(guest),
        short=_program(data["guest32"]),
        user=bytes.fromhex(guest["user"]),
        not_in_corpus=data["not_in_corpus"],
        scenarios={raw["id"]: _scenario(raw) for raw in data["scenarios"]},
    )


def _common_pages() -> dict[int, int]:
    """The start state's qwords, by address."""
    words = {0x1000: 0x2067, 0x2000: 0x3067}
    for i in range(8):
        table = 0x4000 + 0x1000 * i
        words[0x3000 + 8 * i] = table | 0x67
        for j in range(512):
            words[table + 8 * j] = (i * 512 + j) << 12 | 0x63
    words[0x5000 + 8 * 0x20] = 0x220067
    for vector, handler, gate in ((14, 0x200800, 0x8E), (0x81, 0x200840, 0xEE)):
        at = 0x201000 + 16 * vector
        words[at] = handler & 0xFFFF | 8 << 16 | gate << 40 | (handler >> 16 & 0xFFFF) << 48
        words[at + 8] = handler >> 32
    gdt = (0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
    for slot, descriptor in enumerate(gdt, start=1):
        words[0x202000 + 8 * slot] = descriptor
    words[0x203000] = 0x206000 << 32 & (1 << 64) - 1  # RSP0 stands at offset 4
    words[0x203008] = 0x206000 >> 32
    return words


def _short_pages(mode: str) -> dict[int, int]:
    """The same of guests with 32-bit code: PAE (8-byte entries), 32-bit (4-byte entries, two a qword) or no tables."""
    words: dict[int, int] = {}
    if mode == "PAE":
        words[0x1000] = 0x3001
        for i in range(8):
            words[0x3000 + 8 * i] = 0x4000 + 0x1000 * i | 0x63
            words.update({0x4000 + 0x1000 * i + 8 * j: (i * 512 + j) << 12 | 0x63 for j in range(512)})
    elif mode == "32-bit":
        entries = {0x1000 + 4 * i: 0x4000 + 0x1000 * i | 0x63 for i in range(4)}
        entries |= {0x4000 + 4 * page: page << 12 | 0x63 for page in range(4096)}
        words = {at: entry | entries.get(at + 4, 0) << 32 for at, entry in entries.items() if at % 8 == 0}
    handler = 0x200800
    words[0x201000 + 8 * 14] = handler & 0xFFFF | 8 << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
    words[0x202008], words[0x202010] = 0x00CF9B000000FFFF, 0x00CF93000000FFFF
    return words


def memory_pages(corpus: Corpus, scenario: Scenario) -> dict[int, bytes]:
    """The guest's memory before the first entry, page by page; pages not named are zero and were never written."""
    pages: dict[int, bytearray] = {}

    def put(address: int, data: bytes) -> None:
        page = pages.setdefault(address & ~0xFFF, bytearray(4096))
        page[address & 0xFFF : (address & 0xFFF) + len(data)] = data

    for address, word in (_common_pages() if scenario.is_long else _short_pages(scenario.mode)).items():
        put(address, word.to_bytes(8, "little"))
    put(CODE_AT, (corpus.long if scenario.is_long else corpus.short).code)
    if scenario.is_long:
        put(USER_AT, corpus.user)
    for address, word in scenario.memory:
        put(address, word.to_bytes(8, "little"))
    for index, op in enumerate([*scenario.ops, Op("HLT", 0, 0, 0)]):
        words = (scenario.slot(op), op.address, op.value, op.extra)
        put(OPS_AT + 32 * index, b"".join(word.to_bytes(8, "little") for word in words))
    return {address: bytes(page) for address, page in pages.items()}
