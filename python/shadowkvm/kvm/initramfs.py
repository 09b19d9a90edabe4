"""The small system that QEMU boots: an archive of the harness, KVM's modules and the cases. Written without cpio."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shadowkvm.errors import ShadowKvmError
from shadowkvm.kvm.layout import HARNESS

__all__ = ["MODULES", "SETUP", "archive", "compile_harness", "module_file", "system", "tools"]

MODULES: Final = ("virt/lib/irqbypass", "drivers/crypto/ccp/ccp", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd")
"""In the order in which they are loaded."""

SETUP: Final = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc p /proc; $B mount -t sysfs s /sys
$B mount -t devtmpfs d /dev; $B mount -t tracefs t /sys/kernel/tracing
cd /mods; for m in irqbypass ccp kvm; do $B insmod $m.ko; done; $B insmod kvm-amd.ko npt={npt}
"""
"""How each /init begins."""

INIT: Final = """T=/sys/kernel/tracing/trace
for c in /cases/*; do
  case $c in *-nx) nx=force;; *) nx=auto;; esac
  echo $nx > /sys/module/kvm/parameters/nx_huge_pages
  echo "CASE $c"; /bin/replay $c {trace}
  if [ -n "{trace}" ]; then $B cat $T; echo > $T; fi
done > /dev/ttyS1 2>&1
$B poweroff -f
"""


def compile_harness(target: Path, source: Path = HARNESS / "replay.c") -> None:
    """Build the replay program, or another that runs in its place.

    Raises:
        ShadowKvmError: gcc is missing or refuses.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise ShadowKvmError("gcc is missing; see: shadowkvm doctor")
    command = [gcc, "-O1", "-static", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ShadowKvmError(f"the harness does not compile (see: shadowkvm doctor):\n{done.stderr.strip()}")


def module_file(root: Path, version: str, name: str) -> Path | None:
    """The file of a kernel module, as it is or in xz."""
    for suffix in (".ko", ".ko.xz"):
        path = root / "lib/modules" / version / "kernel" / f"{name}{suffix}"
        if path.exists():
            return path
    return None


def _entry(inode: int, name: str, mode: int, data: bytes = b"") -> bytes:
    """One file of an archive in the newc format."""
    raw = name.encode() + b"\0"
    numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % n for n in numbers) + raw
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A gzipped newc archive of files (permissions, content) and of the folders that they lie in."""
    out: list[bytes] = []
    folders = {str(p) for name in files for p in Path(name).parents} - {"."}
    for name in sorted(folders | {"proc", "sys", "dev"}):
        out.append(_entry(len(out) + 1, name, stat.S_IFDIR | 0o755))
    for name, (permissions, data) in files.items():
        out.append(_entry(len(out) + 1, name, stat.S_IFREG | permissions, data))
    out.append(_entry(0, "TRAILER!!!", 0))
    return gzip.compress(b"".join(out), 1)


def tools(root: Path, version: str) -> dict[str, tuple[int, bytes]]:
    """What every such system has: busybox and KVM's modules, files for `archive`.

    Raises:
        ShadowKvmError: a module is missing.
    """
    files = {"bin/busybox": (0o755, Path(shutil.which("busybox") or "/bin/busybox").read_bytes())}
    for name in MODULES:
        path = module_file(root, version, name)
        if path is None:
            raise ShadowKvmError(f"module {name} of kernel {version} is missing; see: shadowkvm doctor")
        data = path.read_bytes()
        files[f"mods/{Path(name).name}.ko"] = (0o644, lzma.decompress(data) if path.suffix == ".xz" else data)
    return files


def system(root: Path, version: str, replay: Path, cases: Sequence[tuple[str, bytes]], *, trace: bool) -> bytes:
    """The archive that runs these cases one after the other.

    Args:
        root: where /boot and /lib/modules are.
        version: of the kernel.
        replay: the compiled harness.
        cases: name and bytes as `wire.case_bytes` makes them; a name that ends in "-nx" runs with nx_huge_pages=force.
        trace: record tracepoints.
    """
    files = {
        "init": (0o755, (SETUP + INIT).format(npt=0, trace="t" if trace else "").encode()),
        "bin/replay": (0o755, replay.read_bytes()),
        **tools(root, version),
    }
    files.update({f"cases/{name}": (0o644, data) for name, data in cases})
    return archive(files)
