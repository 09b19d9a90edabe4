"""A stand-in for the engine that answers from the recording: proves the driver without an engine.

Each call takes, in order, the recorded exits that it explains: a kvm_page_fault whose RIP, address and kind are those
of the call, or the exit of a privileged instruction. If the driver makes an access at the wrong place, leaves one out
or mixes up the order, recorded exits stay unexplained and `finish` says which call came when.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.conformance.corpus import Scenario

W, U, F = 2, 4, 16
EXIT_OF = {"write_cr0": "load_cr0", "cr0_sel_write": "load_cr0", "write_cr3": "load_cr3", "write_cr4": "load_cr4",
           "invlpg": "invlpg", "msr": "wrmsr_efer", "io": "io", "hlt": "hlt"}  # fmt: skip


@dataclass
class Exit:
    kind: str  # "PF" or a method of the vCPU
    rip: int
    address: int = 0
    error: int = 0
    injected: int | None = None


def recorded_exits(scenario: Scenario) -> list[Exit]:
    exits: list[Exit] = []
    for line in scenario.events:
        if found := re.match(r"kvm_page_fault: vcpu 0 rip 0x(\w+) address 0x(\w+) error_code 0x(\w+)", line):
            exits.append(Exit("PF", *(int(word, 16) for word in found.groups())))
        elif found := re.match(r"kvm_exit: vcpu 0 reason (\w+) (?:excp )?rip 0x(\w+)", line):
            if found[1] in EXIT_OF:
                exits.append(Exit(EXIT_OF[found[1]], int(found[2], 16)))
        elif found := re.match(r"kvm_inj_exception: #PF \(0x(\w+)\)$", line):
            exits[-1].injected = int(found[1], 16)
    return exits


@dataclass
class FakeCpu:
    exits: list[Exit]
    shuts_down: bool
    counters: dict[str, int] = field(default_factory=lambda: {"pf_taken": 0})
    log: list[str] = field(default_factory=list)

    def _take(self, method: str, rip: int | None, address: int, size: int, code: int, *, anywhere: bool = False) -> Any:
        """Explain as many recorded exits as this call can. `code`: error-code bits (W, U, F) that the call may have."""
        self.log.append(f"{method} rip {rip and hex(rip)} address {address:x} size {size} code {code:x}")
        status, error = "done", 0
        while self.exits:
            exit_ = self.exits[0]
            if exit_.kind != "PF":
                if exit_.kind == method and exit_.rip == rip:
                    self.exits.pop(0)
                break
            fetched = exit_.error & F and rip == exit_.rip and rip <= exit_.address < rip + 15
            bits = exit_.error & (W | U)
            data = (
                not exit_.error & F
                and address <= exit_.address < address + size
                and (anywhere or rip == exit_.rip)
                and bits & ~code == 0
                and (bits ^ code) & U == 0
            )
            if not fetched and not data:
                break
            self.exits.pop(0)
            self.counters["pf_taken"] += 1
            if exit_.injected is not None:
                status, error = "page_fault", exit_.injected
                break
        if self.shuts_down and not self.exits:
            status = "shutdown"
        return SimpleNamespace(status=status, error_code=error, address=0, value=0)

    def read(
        self,
        gva: int,
        size: int = 8,
        user: bool = False,
        *,
        rip: int | None = None,
        ac: bool = False,
        implicit: bool = False,
        delivery: bool = False,
        length: int = 1,
    ) -> Any:
        del ac, length
        return self._take("read", rip, gva, size, U if user and not delivery else 0, anywhere=delivery or implicit)

    def write(
        self,
        gva: int,
        value: int,
        size: int = 8,
        user: bool = False,
        *,
        kind: str = "mov",
        rip: int | None = None,
        ac: bool = False,
        implicit: bool = False,
        delivery: bool = False,
        length: int = 1,
    ) -> Any:
        del ac, kind, length
        assert 0 <= value < 1 << 8 * size
        return self._take(
            "write", rip, gva, size, W | (U if user and not delivery else 0), anywhere=delivery or implicit
        )

    def rmw(
        self,
        gva: int,
        operand: int,
        kind: str = "or",
        size: int = 8,
        user: bool = False,
        *,
        expected: int | None = None,
        locked: bool = True,
        rip: int | None = None,
        ac: bool = False,
        length: int = 1,
    ) -> Any:
        del operand, locked, ac, length
        assert (expected is not None) == (kind == "cmpxchg")
        return self._take("rmw", rip, gva, size, W | (U if user else 0))

    def rep_stos(
        self, gva: int, value: int, count: int, size: int = 8, user: bool = False, *, rip: int | None = None
    ) -> Any:
        del value
        return self._take("rep_stos", rip, gva, size * count, W | (U if user else 0))

    def fetch(self, gva: int, user: bool = False) -> Any:
        return self._take("fetch", gva, gva, 0, F | (U if user else 0))

    def load_cr0(self, value: int, *, rip: int | None = None) -> Any:
        del value
        return self._take("load_cr0", rip, 0, 0, 0)

    def load_cr3(self, value: int, *, rip: int | None = None) -> Any:
        del value
        return self._take("load_cr3", rip, 0, 0, 0)

    def load_cr4(self, value: int, *, rip: int | None = None) -> Any:
        del value
        return self._take("load_cr4", rip, 0, 0, 0)

    def wrmsr_efer(self, value: int, *, rip: int | None = None) -> Any:
        del value
        return self._take("wrmsr_efer", rip, 0, 0, 0)

    def invlpg(self, gva: int, *, rip: int | None = None) -> Any:
        del gva
        return self._take("invlpg", rip, 0, 0, 0)

    def hlt(self, rip: int | None = None) -> Any:
        return self._take("hlt", rip, 0, 0, 0)

    def io(self, rip: int | None = None) -> Any:
        return self._take("io", rip, 0, 0, 0)

    def set_sregs(self, **regs: int) -> None:
        self.log.append(f"set_sregs {regs}")


class FakeVm:
    """The VM's face; memory and host actions are only noted down."""

    def __init__(self, scenario: Scenario) -> None:
        self.vcpus = [FakeCpu(recorded_exits(scenario), bool(scenario.end["shutdown"]))]
        self.counters: dict[str, int] = self.vcpus[0].counters
        self.events: list[str] = []

    def event_text(self) -> list[str]:
        return self.events

    def read_memory(self, gpa: int, size: int) -> bytes:
        self.vcpus[0].log.append(f"read_memory {gpa:x} {size:x}")
        return bytes(size)

    def get_dirty_log(self, slot: int) -> list[int]:
        self.vcpus[0].log.append(f"get_dirty_log {slot}")
        return []

    def __getattr__(self, name: str) -> Any:
        if name not in {
            "add_slot",
            "delete_slot",
            "set_dirty_log",
            "notifier_unmap",
            "set_page_quota",
            "write_memory",
            "set_host_pages",
        }:
            raise AttributeError(name)
        return lambda *args, **kwargs: self.vcpus[0].log.append(f"{name} {[str(a)[:16] for a in args]} {kwargs}")


class Replayed:
    """Stands where the package `shadowkvm` would: `Replayed(scenario).Vm(...)`."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    def Vm(self, **config: Any) -> FakeVm:  # noqa: N802
        assert config["profile"] == "qemu-tcg"
        return FakeVm(self.scenario)
