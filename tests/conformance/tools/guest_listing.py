"""The guest program of the recorded runs, as data: every instruction with its address, length and memory access.

The suite cannot assemble at test time, so the importer does it once (binutils: as, ld, objdump) and stores the result.
An access is a few words that tests/conformance/program.py carries out; "plain" instructions touch nothing but their
own bytes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

CODE_BASE = 0x200000
USER_BASE = 0x220000

Listing = dict[str, list[tuple[int, int, str, str]]]

# What an instruction does to memory or to the CPU: verb, size, place, and operands. Registers are those of the op list
# entry: rbx = address, rdx = value, rcx = extra.
ACCESS: dict[str, str] = {
    "mov (%rsi),%rax": "load 8 rsi 0",
    "mov 0x8(%rsi),%rbx": "load 8 rsi 8",
    "mov 0x10(%rsi),%rdx": "load 8 rsi 16",
    "mov 0x18(%rsi),%rcx": "load 8 rsi 24",
    "jmp *0x200020(,%rax,8)": "load 8 table 0",
    "mov (%rbx),%r8": "load 8 rbx 0",
    "mov (%rsp),%r14": "load 8 rsp 0",
    "mov %rdx,(%rbx)": "store 8 rbx mov",
    "mov %edx,(%rbx)": "store 4 rbx mov",
    "mov %dx,(%rbx)": "store 2 rbx mov",
    "mov %dl,(%rbx)": "store 1 rbx mov",
    "movaps %xmm0,(%rbx)": "store 16 rbx sse",
    "rep stos %rax,(%rdi)": "rep_stos",
    "xchg %r8,(%rbx)": "rmw 8 xchg locked",
    "lock cmpxchg %rdx,(%rbx)": "rmw 8 cmpxchg locked",
    "lock cmpxchg8b (%rbx)": "cmpxchg8b",
    "lock or %rdx,(%rbx)": "rmw 8 or locked",
    "add %rdx,(%rbx)": "rmw 8 add plain",
    "push %rdx": "push rdx",
    "pushf": "push rflags",
    "push $0x1b": "push 27",
    "push %r11": "push r11",
    "push $0x2": "push 2",
    "push $0x23": "push 35",
    "push %r10": "push r10",
    "orl $0x40000,(%rsp)": "flags or 0x40000",
    "andl $0xfffbffff,(%rsp)": "flags and 0xfffbffff",
    "popf": "popf",
    "iretq": "iret",
    "call *%rbx": "call",
    "invlpg (%rbx)": "invlpg",
    "mov %rbx,%cr0": "cr0",
    "mov %rbx,%cr3": "cr3",
    "mov %rbx,%cr4": "cr4",
    "wrmsr": "efer",
    "out %al,$0x80": "io",
    "hlt": "hlt",
    "int3": "int3",
    "int $0x81": "int 0x81",
    "mov %rbx,%rsp": "rsp rbx",
    "mov %rsp,%r9": "r9 rsp",
    "mov %r9,%rsp": "rsp r9",
    "mov %rsp,%r11": "r11 rsp",
    "lea 0x220000,%r10": "r10 220000",
    "lea 0x220010,%r10": "r10 220010",
    "mov %rbx,%r10": "r10 rbx",
    "mov $0x206000,%rsp": "rsp 206000",
}
# The program of 32-bit, PAE and unpaged guests; the registers keep their 64-bit names.
ACCESS32: dict[str, str] = {
    "mov (%esi),%eax": "load 4 rsi 0",
    "mov 0x8(%esi),%ebx": "load 4 rsi 8",
    "mov 0x10(%esi),%edx": "load 4 rsi 16",
    "mov 0x14(%esi),%edx": "load 4 rsi 20",
    "mov (%ebx),%ecx": "load 4 rbx 0",
    "mov %edx,(%ebx)": "store 4 rbx mov",
    "mov %edx,0x4(%ebx)": "store 4 rbx high",
    "mov %dx,(%ebx)": "store 2 rbx mov",
    "mov %dl,(%ebx)": "store 1 rbx mov",
    "call *%ebx": "call",
    "invlpg (%ebx)": "invlpg",
    "mov %ebx,%cr0": "cr0",
    "mov %ebx,%cr3": "cr3",
    "mov %ebx,%cr4": "cr4",
    "out %al,$0x80": "io",
    "hlt": "hlt",
    "mov $0x206000,%esp": "rsp 206000",
}
TABLE_JUMP32 = re.compile(r"jmp \*0x[0-9a-f]+\(,%eax,4\)")
PLAIN = re.compile(
    r"^(mov \$0x210000,%[re]si|add \$0x20,%[re]si|jmp [0-9a-f]+|mov %\w+,%\w+|mov \$0xc0000080,%ecx|xor .*|inc %r15)$"
)
# Blocks that no recorded one-vCPU run enters.
UNUSED = {"invp", "spin"}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _blocks(listing: str, names: dict[int, str]) -> Listing:
    blocks: Listing = {}
    label = ""
    for line in listing.splitlines():
        if found := re.match(r"^[0-9a-f]+ <(\w+)>:", line):
            label = found[1]
            continue
        found = re.match(r"^\s+([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*\t?(.*)$", line)
        if not found:
            continue
        rip, length, text = int(found[1], 16), len(found[2].split()), found[3]
        if not text:  # objdump breaks a long instruction into two lines
            last = blocks[label][-1]
            blocks[label][-1] = (last[0], last[1] + length, last[2], last[3])
            continue
        label = names.get(rip, label)
        text = re.sub(r"\s+", " ", text.split("#")[0].split("<")[0]).strip().replace("%es:", "")
        if label in UNUSED or text.startswith(("nop", "lea 0x0(%esi", "add %al,(%rax)", "add %cl,", "cs nop")):
            continue
        access = {**ACCESS, **ACCESS32}.get(text, "plain" if PLAIN.match(text) else "")
        if TABLE_JUMP32.match(text):
            access = "load 4 table 0"
        if not access:
            raise SystemExit(f"no access known for {text!r} at {rip:x}")
        blocks.setdefault(label, []).append((rip, length, text, access))
    return blocks


def assemble(source: Path, base: int, names: dict[int, str], *, bits: int = 64) -> tuple[bytes, Listing]:
    """The bytes of `source` linked at `base`, and its instructions by label (`names` adds labels the source lacks)."""
    with tempfile.TemporaryDirectory() as folder:
        obj, elf, raw = (str(Path(folder) / name) for name in ("a.o", "a.elf", "a.bin"))
        _run("as", f"--{bits}", "-o", obj, str(source))
        _run("ld", "-m", {64: "elf_x86_64", 32: "elf_i386"}[bits], "-e", "0", f"-Ttext={base:#x}", "-o", elf, obj)
        _run("objcopy", "-O", "binary", "-j", ".text", elf, raw)
        # The jump table is data; disassembling around it keeps the rest in step.
        if bits == 32:
            symbols = {name: int(at, 16) for at, _, name in map(str.split, _run("nm", elf).splitlines())}
            text = _run("objdump", "-d", f"--stop-address={symbols['tbl']:#x}", elf)
            text += _run("objdump", "-d", f"--start-address={symbols['adv']:#x}", elf)
        elif base == CODE_BASE:
            text = _run("objdump", "-d", f"--stop-address={base + 0x1D:#x}", elf)
            text += _run("objdump", "-d", f"--start-address={base + 0x108:#x}", elf)
        else:
            text = _run("objdump", "-d", f"--stop-address={base + 5:#x}", elf)
            text += _run("objdump", "-d", f"--start-address={base + 16:#x}", elf)
        return Path(raw).read_bytes(), _blocks(text, names)
