"""The guest's two pages as assembled from guest.S: image and addresses.

They come from guest.json, so that a replay needs no assembler.

python -m tests.conformance.kvm.layout      # writes guest.json anew
"""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
RT, USER = 0x7000, 0x8000  # the guest's supervisor page and user page, gva = gpa
SIZED = {"read", "write", "or", "and", "xor", "add", "xchg", "cmpxchg", "stos", "movnti", "push", "rep"}


def assemble() -> tuple[bytes, dict[str, int]]:
    """The image of the two pages and the address of every label in them."""
    with tempfile.TemporaryDirectory() as d:
        subprocess.run(["as", "--64", HERE / "guest.S", "-o", f"{d}/g.o"], check=True)
        subprocess.run(
            ["ld", "-Ttext", "0", "-e", "0", "--oformat", "binary", f"{d}/g.o", "-o", f"{d}/g.bin"], check=True
        )
        lines = subprocess.run(["nm", f"{d}/g.o"], check=True, capture_output=True, text=True).stdout.splitlines()
        image = Path(f"{d}/g.bin").read_bytes()
    return image, {p[2]: RT + int(p[0], 16) for p in map(str.split, lines)}


def write() -> None:
    image, labels = assemble()
    packed = {"image": base64.b64encode(zlib.compress(image, 9)).decode(), "labels": labels}
    (HERE / "guest.json").write_text(json.dumps(packed, indent=1) + "\n")


def _load() -> tuple[bytes, dict[str, int]]:
    packed = json.loads((HERE / "guest.json").read_text())
    return zlib.decompress(base64.b64decode(packed["image"])), packed["labels"]


def stub_of(op: dict) -> tuple[int, int, int]:
    """(address of the op's instruction, of the way out behind it, bytes of set-up code before it)"""
    name = f"{'u' if op.get('cpl') else 'k'}_{op['op']}" + (str(op.get("size", 8)) if op["op"] in SIZED else "")
    rip = LABELS[name]
    return rip, LABELS.get(f"{name}_end", 0), rip - LABELS.get(f"{name}_setup", rip)


if __name__ == "__main__":
    write()
else:
    IMAGE, LABELS = _load()
