"""Small guests that show one thing each: a teacher's first lessons."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shadowkvm.checks import choice
from shadowkvm.vm import Vm

if TYPE_CHECKING:
    from shadowkvm._core import Outcome

__all__ = ["DEMOS", "Act", "demo"]

_PML4, _PDPT, _PD, _PT, _OTHER, _DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x10_0000


class Act(NamedTuple):
    """One operation, and what it is."""

    title: str
    call: Callable[[], Outcome]


class _Demo(NamedTuple):
    doc: str
    before: Callable[[Any], object]
    acts: Callable[[Any], list[Act]]


def _in_use(cpu: Any) -> None:
    cpu.write(_DATA, 1)


def _edited(cpu: Any) -> None:
    _in_use(cpu)
    cpu.write(_PT + 8 * 257, 0x10_1067)


def _twice(cpu: Any) -> None:
    _in_use(cpu)
    cpu.read(1 << 30)
    for value in (1, 2):
        cpu.write(_OTHER + 800, value)


DEMOS: Final = {
    "first_touch": _Demo(
        "a store to a page that nobody touched before",
        lambda _: None,
        lambda cpu: [Act("A store to a page that nobody touched before", lambda: cpu.write(_DATA, 42))],
    ),
    "unsync": _Demo(
        "a store to the guest's last-level table: it goes out of sync",
        _in_use,
        lambda cpu: [
            Act("A store to the guest's last-level page table", lambda: cpu.write(_PT + 8 * 257, 0x10_1067)),
            Act("A second store to it", lambda: cpu.write(_PT + 8 * 258, 0x10_2067)),
        ],
    ),
    "resync": _Demo(
        "a CR3 load: what is out of sync is brought back into step",
        _edited,
        lambda cpu: [Act("A CR3 load while a table is out of sync", lambda: cpu.load_cr3(_PML4))],
    ),
    "invlpg": _Demo(
        "INVLPG in a table that is out of sync",
        _edited,
        lambda cpu: [Act("INVLPG of a page whose table is out of sync", lambda: cpu.invlpg(_DATA + 4096))],
    ),
    "emulated": _Demo(
        "a store to the guest's page directory: it is emulated",
        _in_use,
        lambda cpu: [Act("A store to the guest's page directory", lambda: cpu.write(_PD + 8, 0))],
    ),
    "flood": _Demo(
        "the third store in a row to a directory: its shadow page is zapped",
        _twice,
        lambda cpu: [Act("The third store in a row to another directory", lambda: cpu.write(_OTHER + 800, 3))],
    ),
    "guest_fault": _Demo(
        "a load that the guest's tables do not allow: the fault is its own",
        _in_use,
        lambda cpu: [Act("A load from an address that the guest has not mapped", lambda: cpu.read(0x90_0000))],
    ),
    "mmio": _Demo(
        "a load from a device, twice",
        _in_use,
        lambda cpu: [
            Act("A load from a device", lambda: cpu.read(0x1F_F000)),
            Act("A second one", lambda: cpu.read(0x1F_F000)),
        ],
    ),
}
"""Every demonstration by its name."""


def demo(name: str, **settings: Any) -> tuple[Vm, list[Act]]:
    """A small guest, and the operations on it that are worth a story.

    Args:
        name: one of `DEMOS`.
        settings: policy, profile, ...: see `Vm`.

    Raises:
        ConfigError: no such demonstration; the message has the nearest.

    >>> vm, acts = demo("unsync")
    >>> acts[0].title
    "A store to the guest's last-level page table"
    """
    chosen = DEMOS[choice("demonstration", name, DEMOS)]
    vm = Vm(32 << 20, **settings)
    for table, entry in {_PML4: _PDPT, _PDPT: _PD, _PD: _PT, _PDPT + 8: _OTHER, _OTHER: _PT}.items():
        vm.write_memory(table, (entry | 7).to_bytes(8, "little"))
    frames = [*range(511), 0xFE000]  # the last page is a device
    vm.write_memory(_PT, b"".join((frame << 12 | 0x67).to_bytes(8, "little") for frame in frames))
    cpu = vm.vcpus[0]
    cpu.set_sregs(cr0=0x8005_0033, cr3=_PML4, cr4=0x20, efer=0xD01)
    chosen.before(cpu)
    return vm, chosen.acts(cpu)
