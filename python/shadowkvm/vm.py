"""Vm: a machine under KVM's shadow MMU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Self, cast

from numpy.typing import NDArray

from shadowkvm import feed
from shadowkvm._core import MODEL_VERSION, MODEL_VERSIONS, PROFILES, Snapshot
from shadowkvm.checks import choice, integer
from shadowkvm.counters import Counters
from shadowkvm.events import event_array, event_mask
from shadowkvm.hardware import Hardware
from shadowkvm.policy import Policy, described
from shadowkvm.result import RunResult
from shadowkvm.shadow import ShadowTree, shadow_tree
from shadowkvm.trace import Recording

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

__all__ = ["HOST_STATES", "Vm"]

HOST_STATES: Final = ("writable", "zero", "shared", "absent", "huge-2m", "huge-1g")
"""What the host can have behind guest memory, see `Vm.set_host_pages`."""

Progress = Callable[[int, int], None]


class Vm(Hardware):
    """A virtual machine whose guest runs on KVM's shadow page tables.

    It begins with one memslot (number 0) at guest physical address (gpa) 0, host pages present, writable and small;
    guest memory is sparse, so only pages that were written take room. Each vCPU (`vcpus`) begins in 64-bit mode with
    CR3 = 0.

    Args:
        memory: bytes of slot 0; a multiple of 4,096.
        vcpus: number of virtual CPUs, 1 to 255.
        policy: name of a built-in policy (``shadowkvm policy list``), "prefetch:16" where there is a number, or a
            `Policy` of your own; None is "kvm", the rules of the kernel.
        profile: what the CPU does: "zen" (AMD hardware) or "qemu-tcg" (the machine on which real KVM was recorded).
        features: what of the profile is to be otherwise: "maxphyaddr" (36 to 52 bits), "vendor" ("amd" or "intel":
            whose reserved bits hold), and True or False for "gbpages", "la57", "pcid", "invpcid", "pku", "nrips",
            "decode_assists", "rsvd_sets_p", "rmw_reads_first".
        nx_huge_pages: huge pages are split where the guest executes from them.
        events: what `events` records: True (everything), False, or names of tracepoints.
        model_version: the kernel whose rules hold, one of `shadowkvm.MODELS` (docs/kernels.md: what differs).

    Raises:
        ConfigError: a size, a number or a name that cannot be.

    Guest faults are results. What raises is misuse, and the VM is then as it was before the call.

    >>> import shadowkvm as sk
    >>> vm = sk.Vm(memory=32 << 20)
    >>> for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x67}.items():
    ...     vm.write_memory(table, entry.to_bytes(8, "little"))
    >>> cpu = vm.vcpus[0]
    >>> cpu.set_sregs(cr3=0x1000)
    >>> cpu.write(0x10, 42), cpu.read(0x10).value
    (Outcome(status='done', value=0x0, error_code=0x0, address=0x0), 42)
    >>> vm.counters["pf_fixed"]
    1
    """

    _memory: int
    _policy: str
    _profile: str
    _made: dict[str, Any]

    def __new__(
        cls,
        memory: int,
        *,
        vcpus: int = 1,
        policy: str | Policy | None = None,
        profile: str = "zen",
        features: Mapping[str, bool | int | str] | None = None,
        nx_huge_pages: bool = False,
        events: bool | Iterable[str] = False,
        model_version: str = MODEL_VERSION,
    ) -> Self:
        """Check the names, then have the engine made."""
        named, base, decider = described(policy)
        profile = choice("profile", profile, PROFILES)
        model = choice("model_version", model_version, MODEL_VERSIONS)
        memory = integer("memory", memory)
        count, mask = integer("vcpus", vcpus), event_mask(events)
        words = [(str(name), str(value).lower()) for name, value in (features or {}).items()]
        self = super().__new__(cls, memory, count, base, profile, mask, bool(nx_huge_pages), words, model, decider)
        self._memory, self._policy, self._profile = memory, named, profile
        self._made = {"memory": memory, "vcpus": count, "policy": policy, "profile": profile, "model_version": model}
        return self

    @property
    def memory(self) -> int:
        """Bytes of memory that the VM was made with."""
        return self._memory

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return self._policy

    @property
    def profile(self) -> str:
        """Name of the CPU profile."""
        return self._profile

    # -- what the host does -------------------------------------------------------------------------------------------

    def add_slot(self, slot: int, gpa: int, size: int, readonly: bool = False, dirty_log: bool = False) -> None:
        """Add a memslot (``KVM_SET_USER_MEMORY_REGION``): memory at ``gpa``, ``size`` bytes, both multiples of 4,096.

        Guest stores to a ``readonly`` slot are MMIO. With ``dirty_log`` written frames are noted, see `get_dirty_log`.

        Raises:
            ConfigError: the number is in use or above 508, the range is empty, not aligned, or overlaps a slot.
        """
        number, address = integer("slot", slot, bits=16), integer("gpa", gpa)
        super().add_slot(number, address, integer("size", size), readonly, dirty_log)

    def delete_slot(self, slot: int) -> None:
        """Delete a memslot; all shadow pages become obsolete. ConfigError if there is none of that number."""
        super().delete_slot(integer("slot", slot, bits=16))

    def move_slot(self, slot: int, gpa: int) -> None:
        """Move a memslot to ``gpa`` with what is in it (``KVM_MR_MOVE``); all shadow pages become obsolete.

        Raises:
            ConfigError: there is no such slot, or the new place is not aligned, out of range, or another slot's.
        """
        super().move_slot(integer("slot", slot, bits=16), integer("gpa", gpa))

    def set_manual_dirty_log(self, enabled: bool, initially_set: bool = False) -> None:
        """Say how dirty logs are read (``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2``).

        Args:
            enabled: `get_dirty_log` only reads; `clear_dirty_log` takes frames out and write-protects them again.
            initially_set: a log that is turned on begins with every frame in it, and nothing is write-protected.

        Raises:
            ConfigError: ``initially_set`` without ``enabled``.
        """
        super().set_manual_dirty_log(bool(enabled), bool(initially_set))

    def clear_dirty_log(self, slot: int, frames: Iterable[int]) -> None:
        """Take frames out of a slot's log and write-protect those that were in it (``KVM_CLEAR_DIRTY_LOG``).

        Raises:
            ConfigError: manual protection is off, no such slot or log, or a frame of another slot.

        >>> import shadowkvm as sk
        >>> vm = sk.Vm(memory=1 << 20)
        >>> vm.set_manual_dirty_log(True, initially_set=True)
        >>> vm.set_dirty_log(0, True)
        >>> len(vm.get_dirty_log(0)), len(vm.get_dirty_log(0))
        (256, 256)
        >>> vm.clear_dirty_log(0, range(250))
        >>> vm.get_dirty_log(0)
        [250, 251, 252, 253, 254, 255]
        """
        super().clear_dirty_log(integer("slot", slot, bits=16), [integer("frame", frame) for frame in frames])

    def get_dirty_log(self, slot: int) -> list[int]:
        """Frame numbers written since the last call, ascending; the call clears them (``KVM_GET_DIRTY_LOG``).

        With `set_manual_dirty_log` they stay until `clear_dirty_log`.

        Raises:
            ConfigError: no such slot, or it has no dirty log.
        """
        return super().get_dirty_log(integer("slot", slot, bits=16))

    def set_dirty_log(self, slot: int, enabled: bool) -> None:
        """Turn the dirty log of a slot on or off; ConfigError if there is no such slot."""
        super().set_dirty_log(integer("slot", slot, bits=16), enabled)

    def notifier_unmap(self, gpa: int, size: int) -> None:
        """The host drops the memory behind ``size`` bytes at ``gpa`` (``madvise(MADV_DONTNEED)``).

        Shadow entries that map it are zapped, its content is 0, and its pages are absent until they are touched.

        Raises:
            ConfigError: the range is empty, not aligned to 4,096, or not all memory.
        """
        super().notifier_unmap(integer("gpa", gpa), integer("size", size))

    def notifier_change(self, gpa: int, size: int) -> None:
        """The host puts a read-only page that others share in the place of each page (KSM); the contents stay.

        Shadow entries that map it are zapped; a store gets a page of its own, which is a notifier again.

        Raises:
            ConfigError: as `notifier_unmap`.
        """
        super().notifier_change(integer("gpa", gpa), integer("size", size))

    def notifier_age(self, gpa: int, size: int, flush: bool = True) -> bool:
        """Was any page of the range used since it was last asked? A is cleared in the entries that map it.

        ``flush``: with a remote flush if any was (``clear_flush_young``), or without (``clear_young``).

        Raises:
            ConfigError: as `notifier_unmap`.

        >>> import shadowkvm as sk
        >>> vm = sk.Vm(memory=1 << 20)
        >>> vm.vcpus[0].set_sregs(cr0=0x33, cr4=0, efer=0)  # paging off
        >>> vm.vcpus[0].read(0x5000).status
        'done'
        >>> vm.notifier_age(0x5000, 4096), vm.notifier_age(0x5000, 4096)
        (True, False)
        """
        return super().notifier_age(integer("gpa", gpa), integer("size", size), bool(flush))

    def notifier_test_young(self, gpa: int, size: int) -> bool:
        """The same question; nothing changes (``test_young``)."""
        return super().notifier_test_young(integer("gpa", gpa), integer("size", size))

    def set_nx_huge_pages(self, enabled: bool) -> None:
        """Turn the splitting of huge pages for execution on or off (module parameter ``nx_huge_pages``).

        A change makes all shadow pages obsolete (``kvm_mmu_zap_all_fast``).
        """
        super().set_nx_huge_pages(bool(enabled))

    def recover_nx_huge_pages(self) -> int:
        """One round of KVM's recovery thread: zap one in 60 of the pages that split a huge one. Returns how many."""
        return super().recover_nx_huge_pages()

    def set_host_pages(self, gpa: int, size: int, state: str) -> None:
        """Say what the host has behind ``size`` bytes at ``gpa``, as if it had always been so.

        Args:
            gpa, size: multiples of 4,096, for huge pages of 2 MiB or 1 GiB.
            state: "writable" (small pages of its own), "zero" (the shared zero page: the first store replaces it),
                "shared" (a page that others have, too: the same, but it keeps its contents),
                "absent" (nothing yet: the first access brings it), "huge-2m" or "huge-1g" (huge pages).

        Raises:
            ConfigError: an unknown state, or a range that is not aligned or not all memory.
        """
        super().set_host_pages(integer("gpa", gpa), integer("size", size), choice("state", state, HOST_STATES))

    def set_page_quota(self, n: int) -> None:
        """Allow ``n`` shadow pages, at least 64 (``KVM_SET_NR_MMU_PAGES``); the oldest go if there are more now."""
        super().set_page_quota(integer("quota", n))

    def write_memory(self, gpa: int, data: Buffer | NDArray[Any]) -> None:
        """The host's own store to guest memory: no fault, no write tracking, shadow entries stay as they are.

        ``data`` is bytes, or anything that has some (a NumPy array: its content, row by row).

        Raises:
            GuestMemoryError: some byte is in no memslot (``gpa``); nothing was written.
        """
        if not isinstance(data, bytes):
            data = memoryview(cast("Buffer", data)).tobytes()
        super().write_memory(integer("gpa", gpa), data)

    def read_memory(self, gpa: int, size: int, touch: bool = False) -> bytes:
        """The host's own load of ``size`` bytes of guest memory, as `write_memory`.

        With ``touch`` absent pages become the zero page, as by a load of the process that owns the VM; without, looking
        changes nothing.
        """
        return super().read_memory(integer("gpa", gpa), integer("size", size), bool(touch))

    # -- running ------------------------------------------------------------------------------------------------------

    def set_sites(self, sites: Iterable[int]) -> None:
        """Set the table of instruction addresses that the field ``site`` of a trace's rows indexes.

        Entry 0 stands for "no address", whatever it holds. Recordings bring a table of their own.
        """
        super().set_sites([integer("site", address) for address in sites])

    # -- copies -------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The whole state as it is now: guest memory, registers, shadow tables, counters, recorded events.

        It does not change when the VM goes on, and can be restored any number of times.

        >>> vm = Vm(memory=16 << 20)
        >>> before = vm.snapshot()
        >>> vm.write_memory(0x1000, b"changed")
        >>> vm.restore(before)
        >>> vm.read_memory(0x1000, 7) == bytes(7), vm.state_hash() == before.state_hash()
        (True, True)
        """
        return self.take_snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to the state of a snapshot, of this VM or of another with as many vCPUs.

        A policy in Python is not in it: what the object has seen since stays seen.

        Raises:
            ConfigError: the snapshot is of a VM with another number of vCPUs; nothing was changed.
        """
        self.go_back(snapshot)

    def __copy__(self) -> Vm:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, object]) -> Vm:
        """A VM that goes on by itself from where this one is; a policy in Python is shared."""
        del memo
        other = type(self)(**self._made)
        other.restore(self.snapshot())
        return other

    def __reduce__(self) -> tuple[Callable[[type[Vm]], Vm], tuple[type[Vm]], tuple[Snapshot, dict[str, Any]]]:
        """Pickle the whole state, followed TLBs and nested paging included; a policy in Python is pickled beside it.

        The state is read by the version of shadowkvm that wrote it. As with every pickle, load none that comes from
        somebody you do not trust.

        >>> import pickle
        >>> vm = Vm(memory=16 << 20)
        >>> vm.write_memory(0x1000, b"changed")
        >>> other = pickle.loads(pickle.dumps(vm))
        >>> other.read_memory(0x1000, 7), other.state_hash() == vm.state_hash()
        (b'changed', True)
        """
        # The state comes after the object, not as an argument of its making: a policy may know its VM.
        return _fresh, (type(self),), (self.take_snapshot(beside=True), self.__dict__)

    def __setstate__(self, state: tuple[Snapshot, dict[str, Any]]) -> None:
        snapshot, named = state
        self.go_back(snapshot, beside=True)
        self.__dict__.update(named)

    def set_events(self, events: bool | Iterable[str]) -> None:
        """Choose anew what `events` records from now on: True, False, or names of tracepoints. What was recorded stays.

        Raises:
            ConfigError: a name that is no event.
        """
        super().set_event_mask(event_mask(events))

    def memory_use(self) -> dict[str, int]:
        """Bytes that the VM takes, by what for.

        ``guest_memory``: pages that were written, with the map of frames; ``frames``: reverse maps and write tracking,
        by 2 MiB that are in use; ``shadow_pages``: 8,192 bytes of entries each and a little of bookkeeping; ``rmaps``:
        reverse maps of more than one entry; ``vcpus``; ``events``.

        >>> vm = Vm(memory=64 << 30)
        >>> sum(vm.memory_use().values()) < 1 << 20
        True
        """
        names = ("guest_memory", "frames", "shadow_pages", "rmaps", "vcpus", "events")
        found = super().memory_use()
        return {name: found[name] for name in names}

    def run(
        self, trace: NDArray[np.void] | Recording, outcomes: bool = False, progress: Progress | None = None
    ) -> RunResult:
        """Run a trace: what a loop over its rows would do, one operation each, a hundred times as fast.

        Args:
            trace: a one-dimensional array of TRACE_DTYPE (it may be read-only or a memory map), or a Recording. A
                Recording first sets the registers of vCPU 0 and the table of sites; its rows are read as they are
                needed, so it may be larger than memory.
            outcomes: keep what each row came to (24 bytes a row) in ``result.outcomes``.
            progress: called between pieces of at most 262,144 rows with the number of rows so far and of all rows.

        Returns:
            Rows, seconds, outcomes by status, the change of the counters, and how the guest's faults compare with the
            recorded ones.

        Raises:
            TraceError: the array has another dtype, byte order or shape; or a row cannot be run (unknown op, no such
                vCPU, size 0, ...): ``index`` is its number. Rows before it were run (a Recording is checked chunk by
                chunk, so none of its chunk), and the VM can be used on.
            ConfigError: the VM does not fit the recording (memory, number of vCPUs, paging mode).

        Other Python threads run meanwhile; a signal (Ctrl-C) takes effect between pieces. The array is copied piece by
        piece before it is run: changing it meanwhile is safe.

        >>> import numpy as np, shadowkvm as sk
        >>> rows = np.zeros(3, sk.TRACE_DTYPE)
        >>> rows["op"], rows["size"], rows["addr"] = sk.Op.READ, 8, [0, 8, 4096]
        >>> result = sk.Vm(memory=1 << 20).run(rows)
        >>> result.rows, result.status["page_fault"], result.counters["pf_guest"]
        (3, 3, 3)
        """
        total = len(trace) if isinstance(trace, Recording) else 0
        if not isinstance(trace, Recording):
            feed.check_trace(trace)
            total = len(trace)

        def each(piece: feed.Piece) -> None:
            if progress is not None:
                progress(piece.first + len(piece.rows), total)

        return feed.run(self, trace, outcomes=outcomes, each=each)

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """KVM's statistics now: those of the VM and the sums over its vCPUs. One vCPU's are ``vcpu.counters``."""
        return Counters(self.counter_values())

    @property
    def events(self) -> NDArray[np.void]:
        """The events recorded so far: EVENT_DTYPE, shape (n,), read-only; empty if the VM was made without any.

        They stay until `clear_events`; each takes 40 bytes.
        """
        return event_array(self.event_records())

    def event_text(self, first: int = 0) -> list[str]:
        """The events from number ``first`` on as the kernel prints them, one string each.

        For example ``"kvm_mmu_get_page: sp gen 0 gfn 1 l4 8-byte q0 wux nxe ad root 0 sync new"``.
        """
        return self.event_lines(integer("first", first))

    def shadow(self) -> ShadowTree:
        """The shadow tables as they are now: a copy, to look at."""
        return shadow_tree(self)

    def __repr__(self) -> str:
        size, unit = next(
            (self._memory >> shift, name)
            for shift, name in ((30, "GiB"), (20, "MiB"), (10, "KiB"))
            if self._memory % (1 << shift) == 0
        )
        names = f"policy {self._policy}, profile {self._profile}"
        return f"<Vm {size} {unit}, {len(self.vcpus)} vCPU, {names}, {self.counters['x_ops']:,} ops>"


def _fresh(cls: type[Vm]) -> Vm:
    """A VM of a class, to be given its state: without the arguments that a subclass may want."""
    return Hardware.__new__(cls, 4096)
