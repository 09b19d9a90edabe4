"""Linux: the whole guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError
from shadowkvm.guest.machine import Settings
from shadowkvm.guest.reclaim import Reclaim
from shadowkvm.guest.task import Process
from shadowkvm.pagetables import set_registers
from shadowkvm.pagetables.walk import addresses

if TYPE_CHECKING:
    from shadowkvm.vm import Vm

__all__ = ["Linux"]


class Linux(Reclaim):
    """A small model of Linux in a guest: what its calls do to page tables, TLBs and memory, as rows of a trace.

    It is no kernel: it keeps books of processes, mappings and frames, and makes for each call the stores, flushes and
    accesses that Linux 6.1 would make, in its order, at the addresses where it would make them. Stores to tables go
    through the direct map. What the trace then costs, the engine says.

    Args:
        settings: the fields of `shadowkvm.guest.Settings`: memory, mode, cpus, kpti, pcid, ...

    Before `start`, calls build the image that the guest begins with; after it they are traced.

    >>> import shadowkvm as sk
    >>> guest = Linux(memory=64 << 20)
    >>> shell = guest.spawn(guest.program())
    >>> guest.switch(shell)
    >>> guest.start()
    >>> vm = guest.vm()
    >>> area = guest.mmap(shell, 1 << 20)
    >>> guest.touch(shell, range(area.start, area.end, 4096), write=True)
    >>> guest.munmap(shell, area.start, 1 << 20)
    >>> result = vm.run(guest.take())
    >>> result.faults_matched, result.faults_missed, result.faults_unexpected
    (256, 0, 0)
    """

    def __init__(self, **settings: Any) -> None:
        known = Settings.__dataclass_fields__
        if unknown := [name for name in settings if name not in known]:
            raise ConfigError(f"Linux has no setting {unknown[0]!r}{nearest(unknown[0], known)}")
        super().__init__(Settings(**settings))

    def vm(self, **options: Any) -> Vm:
        """A fresh `Vm` with the image that the guest starts with: memory, and the registers of all CPUs.

        Args:
            options: policy, profile, model_version, events, ...: see `Vm`.
        """
        from shadowkvm.vm import Vm  # noqa: PLC0415 -- the model works without the engine

        vm = Vm(self.settings.memory, vcpus=len(self.cpus), **options)
        self.install(vm)
        return vm

    def install(self, vm: Vm) -> None:
        """Write the image into ``vm``, and set the registers of its vCPUs.

        Raises:
            ConfigError: the guest has not started.
        """
        if not self.started:
            raise ConfigError("the guest has no image before it is started: call start()")
        for gpa, content in self.image:
            vm.write_memory(gpa, content)
        for cpu, sregs in zip(vm.vcpus, self.start_sregs, strict=False):
            set_registers(cpu, sregs)

    def expected(self, process: Process, gvas: Any) -> dict[str, NDArray[Any]]:
        """What user code of a process may do at addresses without a fault, by the tables: for tests and teaching.

        Returns:
            ``gpa`` (uint64), ``read``, ``write``, ``fetch`` (bool), each of shape (n,).
        """
        found = process.space.walk(addresses(gvas), user_root=True)
        ok = found.present & found.user
        return {"gpa": found.gpa, "read": ok, "write": ok & found.write, "fetch": ok & found.execute}

    def __repr__(self) -> str:
        count, size = len(self.processes), self.settings.memory >> 20
        return f"<Linux {self.settings.mode}, {size} MiB, {len(self.cpus)} CPU, {count} processes>"


def pages(start: int, count: int, step: int = 4096) -> NDArray[np.uint64]:
    """Addresses ``step`` apart, beginning with ``start``: uint64, shape (count,)."""
    return np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(step)
