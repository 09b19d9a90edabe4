"""Takes pictures of real kernels' page tables: boots Debian's kernels in QEMU (TCG) and asks its monitor.

    python -m tests.conformance.tools.memory_image            # all machines, half a minute each
    python -m tests.conformance.tools.memory_image pae --root32 i386-root

Needs qemu-system-x86, gcc, a 6.1 kernel of Debian's under /boot, and for the 32-bit machines the unpacked packages
(`dpkg-deb -x`) linux-image-6.1.0-*-686 and -686-pae under --root32. The guest is memory_image.c. Each process that is
found running is one picture: registers, all table pages that CR3 reaches, `info tlb`, `info mem`, and `gva2gpa` of
addresses drawn from a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.conformance.pictures import FLAGS, IMAGES, LEAF, NOWHERE, RANGE, SAMPLE, Picture, save

from shadowkvm.kvm.initramfs import archive

GUEST = Path(__file__).with_name("memory_image.c")
GCC = ["gcc", "-O1", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-nostdlib", "-static", "-Wl,-z,noexecstack"]
LINE = "console=ttyS0 panic=-1 mitigations=off"
PROCESSES = 2
SAMPLES = 300  # of each kind
SEED = 1


@dataclass(frozen=True)
class Machine:
    """What boots. Memory is enough for the kernel to use transparent huge pages (512 MiB) and 1 GiB pages (2 GiB)."""

    mode: str
    bits: int
    cpu: str
    megabytes: int
    kernel: str
    maxphyaddr: int


MACHINES = {
    "4-level": Machine("4-level", 64, "EPYC", 2560, "vmlinuz-6.1.0-*-amd64", 40),
    "5-level": Machine("5-level", 64, "max,-pku", 768, "vmlinuz-6.1.0-*-amd64", 40),
    "pae": Machine("pae", 32, "qemu32,+pae,+nx", 768, "vmlinuz-6.1.0-*-686-pae", 36),
    "32-bit": Machine("32-bit", 32, "pentium3", 768, "vmlinuz-6.1.0-*-686", 36),
}


class Monitor:
    """QEMU's monitor over its JSON socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> object:
        self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def text(self, line: str) -> str:
        """What a person would read."""
        return str(self.command("human-monitor-command", **{"command-line": line}))

    def page(self, gpa: int, folder: Path) -> bytes:
        path = folder / "page"
        self.command("pmemsave", val=gpa, size=4096, filename=str(path))
        return path.read_bytes()


@contextmanager
def booted(machine: Machine, kernel: Path, folder: Path) -> Iterator[Monitor]:
    """A running machine, its processes ready."""
    init = folder / "init"
    subprocess.run([*GCC, f"-m{machine.bits}", "-o", init, GUEST], check=True)
    (folder / "initrd").write_bytes(archive({"init": (0o755, init.read_bytes())}))
    program = "qemu-system-x86_64" if machine.bits == 64 else "qemu-system-i386"
    command = [program, "-accel", "tcg", "-cpu", machine.cpu, "-m", str(machine.megabytes), "-display", "none"]
    command += ["-no-reboot", "-kernel", str(kernel), "-initrd", f"{folder}/initrd", "-append", LINE]
    command += ["-serial", f"file:{folder}/console", "-qmp", f"unix:{folder}/monitor,server=on,wait=off"]
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(["nice", *command], stderr=errors)
        try:
            deadline = time.monotonic() + 120
            while "READY" not in (text := read_text(folder / "console")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{read_text(folder / 'errors')}\n{text[-2000:]}")
                time.sleep(0.2)
            yield Monitor(folder / "monitor")
        finally:
            process.kill()
            process.wait()


def read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def tables(read: Callable[[int], bytes], mode: str, cr3: int) -> dict[int, bytes]:
    """Every table page that CR3 reaches: frame -> content."""
    wide = 4 if mode == "32-bit" else 8
    top = {"5-level": 5, "4-level": 4, "pae": 3, "32-bit": 2}[mode]
    found: dict[int, bytes] = {}
    layer = {cr3 >> 12}
    for level in range(top, 0, -1):
        below = set()
        for frame in sorted(layer):
            found.setdefault(frame, read(frame << 12))
            content = found[frame]
            if mode == "pae" and level == 3:
                content = content[cr3 & 0xFE0 :][:32]
            entries = np.frombuffer(content, f"<u{wide}").astype(np.uint64)
            table = (entries & 1 != 0) & ((entries & 0x80 == 0) | (level > 3) | ((level == 3) & (mode == "pae")))
            below |= set(((entries[table] & 0xFFFFFFFFFF000) >> 12).tolist())
        layer = below
    return found


def leaves_of(text: str) -> NDArray[np.void]:
    rows = []
    for line in text.splitlines():
        va, pa, flags = re.split(r"[: ]+", line.strip())
        rows.append((int(va, 16), int(pa, 16), sum(1 << n for n, c in enumerate(FLAGS) if flags[n] == c)))
    return np.array(rows, LEAF)


def ranges_of(text: str) -> NDArray[np.void]:
    found = re.findall(r"([0-9a-f]+)-([0-9a-f]+) [0-9a-f]+ ([u-])r([w-])", text)
    return np.array([(int(a, 16), int(b, 16), u == "u", w == "w") for a, b, u, w in found], RANGE)


def samples_of(monitor: Monitor, leaves: NDArray[np.void], bits: int, levels: int) -> NDArray[np.void]:
    """Addresses inside pages, just behind pages, and anywhere."""
    dice = random.Random(SEED)
    virtual = 32 if bits == 32 else 12 + 9 * levels
    addresses = set()
    for leaf in dice.choices(leaves, k=SAMPLES):
        size = 1 << 21 if leaf["flags"] >> FLAGS.index("P") & 1 else 1 << 12
        addresses.add(int(leaf["va"]) + dice.randrange(size))
        addresses.add((int(leaf["va"]) + dice.randrange(1, 64) * size) % (1 << 64 if bits == 64 else 1 << 32))
        low = dice.getrandbits(virtual)
        high = ~((1 << virtual) - 1) & NOWHERE if bits == 64 and low >> (virtual - 1) else 0
        addresses.add(high | low)
    rows = []
    for va in sorted(addresses):
        found = re.search(r"gpa: (0x[0-9a-f]+)", monitor.text(f"gva2gpa {va:#x}"))
        rows.append((va, int(found[1], 16) if found else NOWHERE))
    return np.array(rows, SAMPLE)


def take(monitor: Monitor, machine: Machine, about: dict[str, str], folder: Path) -> Picture:
    """A picture of the address space that the stopped machine is in."""
    said = monitor.text("info registers")
    values = {name: re.search(rf"\b{name.upper()}=([0-9a-f]+)", said) for name in ("cr0", "cr3", "cr4", "efer")}
    registers = {name: int(value[1], 16) for name, value in values.items() if value}
    cpl = re.search(r"CPL=(\d)", said)
    about = {**about, "mode": machine.mode, "cpl": cpl[1] if cpl else "?"}
    pages = tables(lambda gpa: monitor.page(gpa, folder), machine.mode, registers["cr3"])
    frames = sorted(pages)
    contents = np.frombuffer(b"".join(pages[frame] for frame in frames), np.uint8).reshape(-1, 4096)
    leaves = leaves_of(monitor.text("info tlb"))
    levels = {"5-level": 5}.get(machine.mode, 4)
    samples = samples_of(monitor, leaves, machine.bits, levels)
    registers["maxphyaddr"] = machine.maxphyaddr
    where = np.array(frames, np.uint32)
    return Picture(about, registers, where, contents, leaves, ranges_of(monitor.text("info mem")), samples)


def photograph(name: str, root32: Path) -> list[Picture]:
    """One picture of each process."""
    machine = MACHINES[name]
    root = Path("/boot") if machine.bits == 64 else root32 / "boot"
    kernels = sorted(root.glob(machine.kernel))
    if not kernels:
        sys.exit(f"{root} has no {machine.kernel}")
    with tempfile.TemporaryDirectory(prefix="shadowkvm-") as d:
        folder = Path(d)
        pictures: dict[int, Picture] = {}
        with booted(machine, kernels[-1], folder) as monitor:
            about = {"machine": f"-cpu {machine.cpu} -m {machine.megabytes}", "kernel": kernels[-1].name}
            version = monitor.command("query-version")
            about["qemu"] = str(version["package"]) if isinstance(version, dict) else ""
            for _ in range(200):
                monitor.command("stop")
                picture = take(monitor, machine, about, folder)
                pictures.setdefault(picture.registers["cr3"], picture)
                monitor.command("cont")
                if len(pictures) == PROCESSES:
                    break
                time.sleep(random.random() / 10)
    return list(pictures.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MACHINES), help="of machines")
    parser.add_argument("--root32", type=Path, default=Path("/"), help="where the 32-bit kernels are unpacked")
    asked = parser.parse_args()
    for name in asked.names:
        pictures = photograph(name, asked.root32)
        path = IMAGES / f"{name}.npz.xz"
        save(path, pictures)
        for p in pictures:
            unmapped = int((p.samples["pa"] == NOWHERE).sum())
            counts = f"{len(p.frames)} tables, {len(p.leaves)} leaves, {len(p.ranges)} ranges"
            print(f"{path.name}: cr3 {p.registers['cr3']:#x}, {counts}, {len(p.samples)} samples ({unmapped} unmapped)")
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
