"""The guest's two pages as assembled from harness/guest.S and guest32.S: image and addresses.

They come from harness/guest.json, so that asking KVM needs no assembler. After a change of the sources:
``python -m shadowkvm.kvm.layout`` writes guest.json anew (needs as, ld and nm).
"""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import Final

from shadowkvm.kvm.case import LOCKABLE, SIZES, UNLOCKED, Op

__all__ = ["HARNESS", "IMAGE", "LABELS", "RT", "USER", "stub_of"]

HARNESS: Final = Path(__file__).resolve().parent / "harness"
RT: Final = 0x7000
"""The guest's supervisor page, gva = gpa: stubs, IDT, GDT, TSS, stack."""
USER: Final = 0x8000
"""The guest's user page, gva = gpa: stubs for CPL 3."""
STACK: Final = RT + 0xFE0
"""Top of the supervisor's stack, unless a case moves it."""
CODE: Final = {64: 0x08, 32: 0x28}
"""Selector of the supervisor's code segment."""


def _assemble(bits: int, source: str) -> tuple[bytes, dict[str, int]]:
    with tempfile.TemporaryDirectory() as d:
        obj, raw = f"{d}/g.o", f"{d}/g.bin"
        emulation = {64: "elf_x86_64", 32: "elf_i386"}[bits]
        link = ["ld", "-m", emulation, "-Ttext", "0", "-e", "0", "--oformat", "binary", obj, "-o", raw]
        for command in (["as", f"--{bits}", "-I", str(HARNESS), str(HARNESS / source), "-o", obj], link):
            subprocess.run(command, check=True)  # noqa: S603
        names = subprocess.run(["nm", obj], check=True, capture_output=True, text=True).stdout  # noqa: S603, S607
        symbols = [p for p in map(str.split, names.splitlines()) if p[1] == "t"]
        return Path(raw).read_bytes(), {p[2]: RT + int(p[0], 16) for p in symbols}


def assemble() -> tuple[bytes, dict[int, dict[str, int]]]:
    """The image of the two pages, and by mode (64, 32) the address of every label in them."""
    wide, labels64 = _assemble(64, "guest.S")
    narrow, labels32 = _assemble(32, "guest32.S")
    if any(a and b for a, b in zip(wide, narrow, strict=True)):
        raise ValueError("guest.S and guest32.S use the same bytes of their pages")
    return bytes(a | b for a, b in zip(wide, narrow, strict=True)), {64: labels64, 32: labels32}


def write() -> None:
    """Assemble, and write guest.json."""
    image, labels = assemble()
    packed = {"image": base64.b64encode(zlib.compress(image, 9)).decode(), "labels": labels}
    (HARNESS / "guest.json").write_text(json.dumps(packed, indent=1, sort_keys=True) + "\n")


def _load() -> tuple[bytes, dict[int, dict[str, int]]]:
    packed = json.loads((HARNESS / "guest.json").read_text())
    return zlib.decompress(base64.b64decode(packed["image"])), {int(k): v for k, v in packed["labels"].items()}


def stub_of(op: Op, bits: int = 64) -> tuple[int, int, int]:
    """Where the guest executes this operation.

    Args:
        op: an operation of the guest.
        bits: 64 or 32: the code of which mode.

    Returns:
        Address of the instruction, of the way out behind it (0: it has none), bytes of set-up code before it.
    """
    name = f"{'u' if op.cpl else 'k'}_{op.op}"
    if op.op in SIZES:
        name += str(op.size) + ("_" if op.op in LOCKABLE and op.flags & UNLOCKED else "")
    labels = LABELS[bits]
    rip = labels[name]
    return rip, labels.get(f"{name}_end", 0), rip - labels.get(f"{name}_setup", rip)


IMAGE, LABELS = _load()

if __name__ == "__main__":
    write()
