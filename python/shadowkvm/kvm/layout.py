"""The guest's two pages as assembled from harness/guest.S: image and addresses.

They come from harness/guest.json, so that asking KVM needs no assembler. After a change of guest.S:
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

from shadowkvm.kvm.case import SIZES, Op

__all__ = ["HARNESS", "IMAGE", "LABELS", "RT", "USER", "stub_of"]

HARNESS: Final = Path(__file__).resolve().parent / "harness"
RT: Final = 0x7000
"""The guest's supervisor page, gva = gpa: stubs, IDT, GDT, TSS, stack."""
USER: Final = 0x8000
"""The guest's user page, gva = gpa: stubs for CPL 3."""


def assemble() -> tuple[bytes, dict[str, int]]:
    """The image of the two pages and the address of every label in them."""
    with tempfile.TemporaryDirectory() as d:
        obj, raw = f"{d}/g.o", f"{d}/g.bin"
        link = ["ld", "-Ttext", "0", "-e", "0", "--oformat", "binary", obj, "-o", raw]
        for command in (["as", "--64", str(HARNESS / "guest.S"), "-o", obj], link):
            subprocess.run(command, check=True)  # noqa: S603
        names = subprocess.run(["nm", obj], check=True, capture_output=True, text=True).stdout  # noqa: S603, S607
        image = Path(raw).read_bytes()
    return image, {p[2]: RT + int(p[0], 16) for p in map(str.split, names.splitlines())}


def write() -> None:
    """Assemble, and write guest.json."""
    image, labels = assemble()
    packed = {"image": base64.b64encode(zlib.compress(image, 9)).decode(), "labels": labels}
    (HARNESS / "guest.json").write_text(json.dumps(packed, indent=1) + "\n")


def _load() -> tuple[bytes, dict[str, int]]:
    packed = json.loads((HARNESS / "guest.json").read_text())
    return zlib.decompress(base64.b64decode(packed["image"])), packed["labels"]


def stub_of(op: Op) -> tuple[int, int, int]:
    """Where the guest executes this operation.

    Returns:
        Address of the instruction, of the way out behind it (0: it has none), bytes of set-up code before it.
    """
    name = f"{'u' if op.cpl else 'k'}_{op.op}" + (str(op.size) if op.op in SIZES else "")
    rip = LABELS[name]
    return rip, LABELS.get(f"{name}_end", 0), rip - LABELS.get(f"{name}_setup", rip)


IMAGE, LABELS = _load()

if __name__ == "__main__":
    write()
