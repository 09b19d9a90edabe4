"""Asks real KVM in a machine of its own: QEMU without hardware help boots Debian's kernel with kvm-amd npt=0."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from shadowkvm.errors import ShadowKvmError
from shadowkvm.kvm.case import Answer, Case
from shadowkvm.kvm.initramfs import compile_harness, system
from shadowkvm.kvm.model import SERIES, numbers
from shadowkvm.kvm.wire import case_bytes, split_cases

__all__ = ["Qemu", "default_root", "installed_kernels"]

MACHINE: Final = "-accel tcg -cpu EPYC,+svm -m 2048 -display none -no-reboot"
LINE: Final = "console=ttyS0 quiet panic=-1 mitigations=off"


def default_root() -> Path:
    """Where /boot and /lib/modules are: $SHADOWKVM_KERNEL_ROOT (an unpacked package), or the root."""
    return Path(os.environ.get("SHADOWKVM_KERNEL_ROOT") or "/")


def installed_kernels(root: Path | None = None) -> list[tuple[str, Path]]:
    """(version, image) of the kernels that lie there: modelled ones first, the oldest series of these, newest first."""

    def order(pair: tuple[str, Path]) -> tuple[int, list[int]]:
        version = numbers(pair[0])
        series = [numbers(s) for s in SERIES]
        return -series.index(version[:2]) if version[:2] in series else -len(series), version

    images = ((root or default_root()) / "boot").glob("vmlinuz-*")
    return sorted(((p.name.removeprefix("vmlinuz-"), p) for p in images), key=order, reverse=True)


class Qemu:
    """Backend "qemu". One `ask` is one boot: about 6 seconds, then 500 to 1,000 operations a second.

    Args:
        progress: called now and then with the number of operations done in the running boot.
        timeout: seconds that one boot may take.
        kernel_root: folder with boot/ and lib/modules/; None: $SHADOWKVM_KERNEL_ROOT, else /.

    Raises:
        ShadowKvmError: QEMU is not installed, or there is no kernel image in that folder.
    """

    name = "qemu"
    profile = "qemu-tcg"
    batch = 50
    """Cases that go well into one boot."""

    def __init__(
        self,
        progress: Callable[[int], None] | None = None,
        timeout: float = 900,
        kernel_root: Path | None = None,
    ) -> None:
        self._root = kernel_root or default_root()
        kernels = installed_kernels(self._root)
        self.qemu = shutil.which("qemu-system-x86_64")
        if self.qemu is None:
            raise ShadowKvmError("QEMU is missing; see: shadowkvm doctor")
        if not kernels:
            raise ShadowKvmError(f"no {self._root / 'boot'}/vmlinuz-*; see: shadowkvm doctor")
        self.kernel, self._image = kernels[0]
        self._progress, self._timeout = progress, timeout

    def about(self) -> dict[str, str]:
        """What to note beside answers."""
        done = subprocess.run([str(self.qemu), "--version"], capture_output=True, text=True, check=True)  # noqa: S603
        qemu = done.stdout.splitlines()[0]
        return {"kernel": self.kernel, "qemu": qemu, "cpu": "EPYC,+svm", "module": "kvm_amd npt=0"}

    def ask(self, cases: Sequence[Case], *, trace: bool = False) -> list[tuple[list[Answer], list[list[str]]]]:
        """Answers, and with `trace` the tracepoints of each operation, case by case, from one boot.

        Raises:
            ShadowKvmError: the machine did not run, or a case could not be set up.
        """
        with tempfile.TemporaryDirectory(prefix="shadowkvm-") as d:
            folder = Path(d)
            compile_harness(folder / "replay")
            blobs = [(f"{i:05d}{'-nx' * c.nx_huge_pages}", case_bytes(c)) for i, c in enumerate(cases)]
            initrd = system(self._root, self.kernel, folder / "replay", blobs, trace=trace)
            (folder / "initrd.gz").write_bytes(initrd)
            self._boot(folder)
            results = split_cases((folder / "out").read_text(errors="replace"))
            if len(results) != len(cases):
                last = (folder / "console").read_text(errors="replace").strip().splitlines()[-5:]
                lines = "\n".join(last)
                raise ShadowKvmError(
                    f"{len(results)} of {len(cases)} cases were run; the console's last lines:\n{lines}"
                )
        for case, (_, _, problem) in zip(cases, results, strict=True):
            if problem:
                raise ShadowKvmError(f"{case.title}: {problem}")
        return [(answers, events) for answers, events, _ in results]

    def _boot(self, folder: Path) -> None:
        files = ["-serial", f"file:{folder}/console", "-serial", f"file:{folder}/out"]
        files += ["-kernel", str(self._image), "-initrd", f"{folder}/initrd.gz", "-append", LINE]
        command = [str(self.qemu), *MACHINE.split(), *files]
        began, out, seen, done = time.monotonic(), folder / "out", 0, 0
        with (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(command, stderr=errors, preexec_fn=_be_nice)  # noqa: S603, PLW1509
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    if time.monotonic() - began > self._timeout:
                        raise ShadowKvmError(f"QEMU has not ended after {self._timeout:.0f} s")
                    if self._progress and out.exists():
                        with out.open("rb") as f:
                            f.seek(seen)
                            new = f.read()
                        seen += len(new)
                        done += new.count(b"\nR ")
                        self._progress(done)
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            raise ShadowKvmError(f"QEMU failed: {(folder / 'errors').read_text(errors='replace').strip()}")


def _be_nice() -> None:
    os.nice(10)
