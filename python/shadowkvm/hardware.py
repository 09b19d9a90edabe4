"""The hardware beside a VM: TLBs that are followed, or nested and agile paging instead of the shadow."""

from __future__ import annotations

from typing import Final

from shadowkvm._core import USUAL_NESTED_TLB
from shadowkvm._core import Vm as _Vm
from shadowkvm.checks import integer
from shadowkvm.nested import NestedStatistics, stage_level
from shadowkvm.tlb import USUAL_ENTRIES, USUAL_WALK_CACHES, USUAL_WAYS, TlbStatistics, tlb_sizes

__all__ = ["USUAL_INTERVAL", "USUAL_ROOTS", "Hardware"]

USUAL_INTERVAL: Final = 1_000_000
"""Rows from one look of agile paging at its tables to the next."""

USUAL_ROOTS: Final = 8
"""Roots whose shadow a CPU of agile paging keeps (ISCA 2016: four to eight)."""


class Hardware(_Vm):
    """What of a `Vm` is not KVM's: a model of the CPU's caches, and other ways to translate."""

    def follow_tlb(
        self,
        enabled: bool = True,
        *,
        entries: int = USUAL_ENTRIES,
        ways: int | None = USUAL_WAYS,
        walk_caches: tuple[int, int, int] | None = USUAL_WALK_CACHES,
    ) -> None:
        """Follow the vCPUs' TLBs through `run` from now on, beginning with empty ones; `tlb` has what was counted.

        A model of hardware beside the engine: nothing that an access does depends on it. KVM's flushes empty it,
        INVLPG takes a page and the page-walk caches, PCIDs are kept apart. A snapshot or a copy holds none,
        a pickled VM does.

        Args:
            enabled: False stops it and forgets what was counted.
            entries: translations of each vCPU, of any page size; 0: no TLB, every access walks. The default is the
                second-level TLB of Intel's Skylake.
            ways: entries of a set, the least recently used goes first; None: one set.
            walk_caches: entries of the page-walk caches for tables of level 1, 2 and 3; None: none, each walk begins
                at the root. The default is what Barr, Cox and Rixner (ISCA 2010) give.

        Raises:
            ConfigError: sizes that make no cache. What was followed before still is.

        >>> import numpy as np, shadowkvm as sk
        >>> vm = sk.Vm(memory=32 << 20)
        >>> for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x67}.items():
        ...     vm.write_memory(table, entry.to_bytes(8, "little"))
        >>> vm.vcpus[0].set_sregs(cr3=0x1000)
        >>> vm.follow_tlb()
        >>> reads = np.zeros(10, sk.TRACE_DTYPE)
        >>> reads["size"] = 8
        >>> vm.run(reads).status["done"], vm.tlb
        (10, TlbStatistics(accesses=10, hits=9, misses=1, references=4, flushes=0))
        """
        self.set_tlb(tlb_sizes(entries, ways, walk_caches) if enabled else None)

    @property
    def tlb(self) -> TlbStatistics | None:
        """What the TLBs made of the runs since `follow_tlb`; None if they are not followed."""
        counts = self.tlb_counts()
        return None if counts is None else TlbStatistics(*counts)

    def use_nested(
        self,
        *,
        warm: bool = False,
        page_size: int = 4096,
        entries: int = USUAL_ENTRIES,
        ways: int | None = USUAL_WAYS,
        walk_caches: tuple[int, int, int] | None = USUAL_WALK_CACHES,
        nested_tlb: int = USUAL_NESTED_TLB,
    ) -> None:
        """Run the guest under nested paging (AMD NPT, Intel EPT) instead of the shadow, from now to the end.

        `run` then does to the guest what it does under the shadow: the same values, the same faults of its own, the
        same memory. But no table is shadowed: CR3 loads, INVLPG and the guest's faults do not exit, the second stage
        does. `nested` has what was counted. A vCPU's single instructions are refused; a snapshot or a copy is of the
        memory and the registers, and is under the shadow; a pickled VM stays as it is.

        Args:
            warm: the second stage maps everything already. A cold one faults once for each page that is touched, guest
                tables too.
            page_size: bytes of the second stage's pages: 4,096, 2 MiB or 1 GiB.
            entries, ways, walk_caches: as in `follow_tlb`; there are as many page-walk caches for the second stage's
                tables. One of a guest table names its place in the host, so that no second stage is walked for it.
            nested_tlb: entries of the nested TLB: second-stage translations of guest tables (16: Bhargava, Serebrin,
                Spadini and Manne, ASPLOS 2008); 0: none, and no page-walk caches of the second stage.

        Raises:
            ConfigError: sizes that make no cache, another page size, or the VM has run under the shadow already.

        >>> import numpy as np, shadowkvm as sk
        >>> vm = sk.Vm(memory=32 << 20)
        >>> for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x67}.items():
        ...     vm.write_memory(table, entry.to_bytes(8, "little"))
        >>> vm.vcpus[0].set_sregs(cr3=0x1000)
        >>> vm.use_nested(walk_caches=None, nested_tlb=0)
        >>> reads = np.zeros(10, sk.TRACE_DTYPE)
        >>> reads["size"] = 8
        >>> vm.run(reads).status["done"], vm.nested.references_per_miss, vm.nested.exits
        (10, 24.0, 5)
        """
        sizes = tlb_sizes(entries, ways, walk_caches)
        self.set_nested(sizes, (integer("nested_tlb", nested_tlb, bits=20), bool(warm), stage_level(page_size), None))

    def use_agile(
        self,
        *,
        interval: int = USUAL_INTERVAL,
        roots: int = USUAL_ROOTS,
        warm: bool = False,
        page_size: int = 4096,
        entries: int = USUAL_ENTRIES,
        ways: int | None = USUAL_WAYS,
        walk_caches: tuple[int, int, int] | None = USUAL_WALK_CACHES,
        nested_tlb: int = USUAL_NESTED_TLB,
    ) -> None:
        """Run the guest under agile paging (Gandhi, Hill and Swift, ISCA 2016) from now to the end.

        A walk begins in a shadow and changes over to nested paging at the first guest table that is in nested mode.
        Tables begin in shadow mode: stores to them exit, and a walk reads one entry a level. The second store within an
        interval moves a table, and what hangs under it, to nested mode; one that was not stored to for an interval
        comes back. INVLPG does not exit. There is no such hardware; `nested` has the counts of the model, the last
        fields of its own.

        Args:
            interval: rows from one look at the tables to the next (the paper's is a second), at least 1.
            roots: pairs of a guest's root and its shadow that a CPU keeps; other CR3 loads exit.
            warm, page_size, entries, ways, walk_caches, nested_tlb: as in `use_nested`.

        Raises:
            ConfigError: as `use_nested`, or an interval of 0.

        >>> import numpy as np, shadowkvm as sk
        >>> vm = sk.Vm(memory=32 << 20)
        >>> for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x67}.items():
        ...     vm.write_memory(table, entry.to_bytes(8, "little"))
        >>> vm.vcpus[0].set_sregs(cr3=0x1000)
        >>> vm.use_agile(walk_caches=None)
        >>> reads = np.zeros(10, sk.TRACE_DTYPE)
        >>> reads["size"] = 8
        >>> vm.run(reads).status["done"], vm.nested.references_per_miss, vm.nested.shadow_fills, vm.nested.exits
        (10, 4.0, 1, 1)
        """
        sizes = tlb_sizes(entries, ways, walk_caches)
        agile = (integer("interval", interval), integer("roots", roots, bits=20))
        stage = (integer("nested_tlb", nested_tlb, bits=20), bool(warm), stage_level(page_size), agile)
        self.set_nested(sizes, stage)

    @property
    def nested(self) -> NestedStatistics | None:
        """What nested or agile paging came to since `use_nested` or `use_agile`; None under the shadow."""
        counts = self.nested_counts()
        return None if counts is None else NestedStatistics(*counts)
