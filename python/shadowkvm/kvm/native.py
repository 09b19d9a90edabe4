"""Asks the KVM of this machine through /dev/kvm, if it runs with shadow paging."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shadowkvm.errors import ShadowKvmError
from shadowkvm.kvm.case import Answer, Case
from shadowkvm.kvm.initramfs import compile_harness
from shadowkvm.kvm.wire import case_bytes, split_cases

__all__ = ["Native", "shadow_paging"]

PARAMETERS: Final = {"kvm_amd": "npt", "kvm_intel": "ept"}
PHYS_BITS: Final = {"qemu-tcg": 40, "zen": 48}
"""Physical address width of a profile's guest. With shadow paging KVM itself checks it, so any can be told."""


def shadow_paging(sysfs: Path = Path("/sys"), device: Path = Path("/dev/kvm")) -> str:
    """The module that does shadow paging here.

    Args:
        sysfs: where sysfs is mounted.
        device: KVM's device file.

    Raises:
        ShadowKvmError: there is none, and why; the message says what to do.
    """
    for module, parameter in PARAMETERS.items():
        file = sysfs / "module" / module / "parameters" / parameter
        if not file.exists():
            continue
        if file.read_text().strip() not in ("N", "0"):
            raise ShadowKvmError(
                f"{module} runs with nested paging ({file} is not N), so it does not use its shadow MMU; with no guest"
                f" running: sudo modprobe -r {module} && sudo modprobe {module} {parameter}=0"
            )
        try:
            device.open("r+b", buffering=0).close()
        except OSError as error:
            raise ShadowKvmError(f"{device}: {error.strerror}; are you in the group kvm?") from error
        return module
    raise ShadowKvmError(f"neither kvm_amd nor kvm_intel is loaded ({sysfs}/module); use --backend qemu")


class Native:
    """Backend "kvm". The harness runs as an ordinary program.

    The engine models AMD; a Zen is what it is compared with. Answers of kvm_intel differ where VMX does.
    """

    name = "kvm"
    profile = "zen"
    batch = 1

    def __init__(self, sysfs: Path = Path("/sys"), device: Path = Path("/dev/kvm")) -> None:
        self.module = shadow_paging(sysfs, device)
        self.kernel = platform.release()

    def about(self) -> dict[str, str]:
        """What to note beside answers."""
        return {"kernel": self.kernel, "module": self.module, "profile": self.profile}

    def ask(self, cases: Sequence[Case], *, trace: bool = False) -> list[tuple[list[Answer], list[list[str]]]]:
        """Answers case by case. Events would need root and would mix with those of other guests: none are recorded.

        Raises:
            ShadowKvmError: the harness failed.
        """
        del trace
        out = []
        with tempfile.TemporaryDirectory(prefix="shadowkvm-") as d:
            replay, file = Path(d) / "replay", Path(d) / "case"
            compile_harness(replay)
            for case in cases:
                if case.nx_huge_pages:
                    raise ShadowKvmError(f"{case.title}: nx_huge_pages=force is asked of the qemu backend only")
                file.write_bytes(case_bytes(case, PHYS_BITS[self.profile]))
                done = subprocess.run([replay, file], capture_output=True, text=True, check=False)  # noqa: S603
                results = split_cases(f"CASE {case.title}\n{done.stdout}")
                if done.returncode or results[0][2]:
                    raise ShadowKvmError(f"{case.title}: {results[0][2] or done.stderr.strip() or done.returncode}")
                out.append((results[0][0], results[0][1]))
        return out
