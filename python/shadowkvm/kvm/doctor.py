"""What is missing to ask real KVM, and what installs it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shadowkvm.errors import ShadowKvmError
from shadowkvm.kvm.initramfs import MODULES, compile_harness, module_file
from shadowkvm.kvm.model import SERIES, is_modelled
from shadowkvm.kvm.native import shadow_paging
from shadowkvm.kvm.qemu import default_root, installed_kernels

__all__ = ["Check", "command", "examine"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a backend needs."""

    backend: str
    what: str
    good: bool
    found: str
    packages: tuple[str, ...] = ()
    """Debian packages that bring it."""


def _qemu() -> Check:
    found = shutil.which("qemu-system-x86_64")
    return Check("qemu", "qemu-system-x86_64", found is not None, found or "not on PATH", ("qemu-system-x86",))


def _kernel(root: Path) -> Check:
    packages = ("linux-image-amd64",)
    kernels = installed_kernels(root)
    if not kernels:
        return Check("qemu", "kernel image", False, f"no {root / 'boot'}/vmlinuz-*", packages)  # noqa: FBT003
    version, image = kernels[0]
    if not os.access(image, os.R_OK):
        return Check("qemu", "kernel image", False, f"{image} is not readable: sudo chmod +r {image}")  # noqa: FBT003
    modelled = f" (the engine models {' and '.join(SERIES)}: differences are to be expected)"
    note = "" if is_modelled(version) else modelled
    return Check("qemu", "kernel image", True, f"{image}{note}", packages)  # noqa: FBT003


def _modules(root: Path) -> Check:
    kernels = installed_kernels(root)
    version = kernels[0][0] if kernels else ""
    missing = [name for name in MODULES if not version or module_file(root, version, name) is None]
    found = f"missing (as .ko or .ko.xz): {', '.join(missing)}" if missing else f"of {version}"
    return Check("qemu", "modules of KVM", not missing, found, ("linux-image-amd64",))


def is_static(program: Path) -> bool:
    """Does this ELF program run without shared libraries?"""
    data = program.read_bytes()
    offset, size, count = (int.from_bytes(data[a:b], "little") for a, b in ((32, 40), (54, 56), (56, 58)))
    kinds = [int.from_bytes(data[offset + size * i :][:4], "little") for i in range(count)]
    return data[:4] == b"\x7fELF" and 3 not in kinds  # 3: the name of a dynamic linker


def _busybox() -> Check:
    path = shutil.which("busybox")
    good = path is not None and is_static(Path(path))
    found = (path or "") if good else f"{path} is not static" if path else "not on PATH"
    return Check("qemu", "static busybox", good, found, ("busybox-static",))


def _harness() -> Check:
    packages = ("gcc", "libc6-dev")
    try:
        with tempfile.TemporaryDirectory() as d:
            compile_harness(Path(d) / "replay")
    except ShadowKvmError as error:
        return Check("qemu, kvm", "C compiler", False, str(error).splitlines()[-1], packages)  # noqa: FBT003
    return Check("qemu, kvm", "C compiler", True, "the harness compiles", packages)  # noqa: FBT003


def _native(sysfs: Path, device: Path) -> Check:
    try:
        module = shadow_paging(sysfs, device)
    except ShadowKvmError as error:
        return Check("kvm", "shadow paging", False, str(error))  # noqa: FBT003
    return Check("kvm", "shadow paging", True, f"{module}, {device}")  # noqa: FBT003


def examine(sysfs: Path = Path("/sys"), device: Path = Path("/dev/kvm"), root: Path | None = None) -> list[Check]:
    """Look at everything that the backends need."""
    root = root or default_root()
    checks: list[Callable[[], Check]] = [_qemu, lambda: _kernel(root), lambda: _modules(root), _busybox, _harness]
    return [*(check() for check in checks), _native(sysfs, device)]


def ready(checks: list[Check]) -> list[str]:
    """The backends that can be used."""
    return [b for b in ("qemu", "kvm") if all(c.good for c in checks if b in c.backend.split(", "))]


def command(checks: list[Check]) -> str:
    """What installs everything that is missing; empty: nothing is, or no package would help."""
    packages = dict.fromkeys(p for c in checks if not c.good for p in c.packages)
    return f"sudo apt-get install {' '.join(packages)}" if packages else ""
