"""Accounts: the events of a run times what each takes, by cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shadowkvm.checks import choice
from shadowkvm.costs.table import CostTable
from shadowkvm.nested import NestedStatistics
from shadowkvm.tlb import TlbStatistics

__all__ = ["CAUSES", "Account", "Cause", "Events", "Share", "account", "nested_events", "shadow_events"]


@dataclass(frozen=True, slots=True)
class Cause:
    """What time goes to.

    Attributes:
        name: key in JSON and CSV.
        label: for people.
        exits: events each of which is one exit.
        work: events that are work of the hypervisor's or the CPU's, by the names of `COST_INFO`.
        what: told in full.
    """

    name: str
    label: str
    exits: tuple[str, ...]
    work: tuple[str, ...]
    what: str


CAUSES: Final = (
    Cause(
        "faults",
        "shadow faults",
        ("shadow_fault",),
        ("shadow_fault", "prefetched_entry", "shadow_page"),
        "#PF exits that repair the shadow: a page is touched that the guest maps and the shadow does not yet",
    ),
    Cause(
        "stores",
        "table stores",
        ("emulated_store",),
        ("emulated_store", "zapped_page"),
        "stores to guest tables that are emulated, and shadow pages zapped",
    ),
    Cause(
        "guest",
        "guest #PF",
        ("reflected_fault",),
        ("reflected_fault",),
        "#PF of the guest's own that exit and are handed on to it",
    ),
    Cause(
        "flush",
        "flushes",
        ("cr3_load", "invlpg"),
        ("cr3_load", "invlpg", "refetched_entry", "synced_entry"),
        "CR3 loads and INVLPG that exit, and tables and entries that they bring back into step",
    ),
    Cause(
        "stage",
        "second stage",
        ("stage_fault", "dirty_fault"),
        ("stage_fault", "dirty_fault"),
        "pages that the second stage does not map, or does not let be written for the dirty log",
    ),
    Cause(
        "device",
        "devices",
        ("device_exit",),
        ("user_exit", "nested_user_exit", "mmio_access"),
        "accesses to devices: MMIO and ports, without what the device does",
    ),
    Cause("other", "other exits", ("other_exit",), (), "HLT, control registers, instructions tried again"),
    Cause("walks", "page walks", (), ("walk_reference",), "entries of tables that the CPU reads when its TLB misses"),
)
"""What modelled time goes to; every exit belongs to one of them."""


@dataclass(frozen=True, slots=True)
class Events:
    """How often what happened, by the names of `CAUSES`, and the exits in all."""

    exit_cost: str
    """Which of a table's costs an exit is: "exit" or "nested_exit"."""
    exits: int
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Share:
    """What one cause takes."""

    cause: Cause
    exits: int
    exit_cycles: float
    work_cycles: float

    @property
    def cycles(self) -> float:
        """All of it."""
        return self.exit_cycles + self.work_cycles


@dataclass(frozen=True, slots=True)
class Account:
    """Modelled time of a run by cause. The events are exact (page walks: of the TLB model), what each takes is data."""

    events: Events
    table: CostTable
    shares: tuple[Share, ...]

    @property
    def cycles(self) -> float:
        """All causes."""
        return sum(share.cycles for share in self.shares)

    @property
    def seconds(self) -> float:
        """All causes, at the table's clock."""
        return self.table.ns(self.cycles) / 1e9

    def share(self, name: str) -> float:
        """The part of a cause in the whole, 0 to 1."""
        of = sum(share.cycles for share in self.shares if share.cause.name == name)
        return of / self.cycles if self.cycles else 0.0

    def line(self, cost: str) -> tuple[float, float]:
        """Cycles as a + b x, where x is what one event of a cost takes: (a, b).

        Args:
            cost: "exit" (those of nested paging keep their ratio to it), or one of the causes' work.

        Raises:
            ConfigError: another name.
        """
        if cost == "exit":
            ratio = self.table[self.events.exit_cost] / self.table["exit"] if self.table["exit"] else 1.0
            slope = self.events.exits * ratio
        else:
            choice("cost", cost, [name for cause in CAUSES for name in cause.work])
            slope = float(self.events.counts.get(cost, 0))
        return self.cycles - slope * self.table[cost], slope

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON: cycles by cause."""
        causes = {
            share.cause.name: {"exits": share.exits, "exit_cycles": share.exit_cycles, "work_cycles": share.work_cycles}
            for share in self.shares
        }
        return {"cycles": self.cycles, "seconds": self.seconds, "events": dict(self.events.counts), "causes": causes}


def shadow_events(counters: Mapping[str, int], ops: Mapping[str, int], tlb: TlbStatistics | None) -> Events:
    """The events of a run under shadow paging.

    Args:
        counters: KVM's.
        ops: rows by op.
        tlb: of `Vm.follow_tlb`; None: page walks are left out.
    """
    made = counters["pf_mmio_spte_created"]
    repaired = counters["pf_fixed"] + counters["pf_spurious"]
    counts = {
        "shadow_fault": repaired,
        "prefetched_entry": counters["x_prefetched"],
        "shadow_page": counters["mmu_cache_miss"],
        # The first access to a device makes an MMIO entry, and counts as emulated. So do stores to read-only slots.
        "emulated_store": counters["pf_emulate"] - made,
        "zapped_page": counters["mmu_shadow_zapped"],
        # Not pf_guest: an emulated instruction can end in a fault of the guest's, too, and that is no further exit.
        "reflected_fault": counters["pf_taken"] - repaired - counters["pf_emulate"],
        "cr3_load": ops.get("CR3", 0),
        "invlpg": counters["invlpg"],
        "refetched_entry": counters["x_refetched"],
        "synced_entry": counters["x_synced_entries"],
        "device_exit": counters["x_mmio_faults"] + made + counters["io_exits"],
        "user_exit": counters["mmio_exits"] + counters["io_exits"],
        "mmio_access": counters["mmio_exits"],
        "walk_reference": tlb.references if tlb else 0,
    }
    return _with_other(Events("exit", counters["exits"], counts))


def nested_events(counts: NestedStatistics, ops: Mapping[str, int]) -> Events:
    """The events of a run under nested or agile paging."""
    ports = ops.get("IO", 0)
    found = {
        "shadow_fault": counts.shadow_fills,
        "prefetched_entry": counts.prefetched,
        "emulated_store": counts.table_stores,
        "reflected_fault": counts.reflected_faults,
        "cr3_load": counts.cr3_exits,
        "stage_fault": counts.stage_faults,
        "dirty_fault": counts.dirty_faults,
        "device_exit": counts.mmio_exits + ports,
        "nested_user_exit": counts.mmio_exits + ports,
        "mmio_access": counts.mmio_exits,
        "walk_reference": counts.references,
    }
    return _with_other(Events("nested_exit", counts.exits, found))


def _with_other(events: Events) -> Events:
    """The same, with the exits that belong to no cause of their own."""
    known = sum(events.counts.get(name, 0) for cause in CAUSES for name in cause.exits)
    return Events(events.exit_cost, events.exits, {**events.counts, "other_exit": events.exits - known})


def account(events: Events, table: CostTable) -> Account:
    """What the events of a run take.

    >>> from shadowkvm.costs import account, load_costs
    >>> from shadowkvm.costs.account import nested_events
    >>> from shadowkvm.workloads import get
    >>> scenario = get("fork_exit").build(scale=0.02)
    >>> vm = scenario.vm()
    >>> vm.use_nested()
    >>> ran = scenario.run(vm)
    >>> done = account(nested_events(vm.nested, ran.ops), load_costs("zen3"))
    >>> round(done.share("stage") + done.share("walks"), 6)
    1.0
    """
    shares = []
    for cause in CAUSES:
        exits = sum(events.counts.get(name, 0) for name in cause.exits)
        work = sum(events.counts.get(name, 0) * table[name] for name in cause.work)
        shares.append(Share(cause, exits, exits * table[events.exit_cost], work))
    return Account(events, table, tuple(shares))
