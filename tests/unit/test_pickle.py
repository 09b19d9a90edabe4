"""Pickled VMs and snapshots: what they hold, that they go on exactly as the original, and what is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import pickle
import zlib
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.guest import PD, PML4, PT, entry, guest, reads, rows

import shadowkvm as sk
from shadowkvm._core import Snapshot
from shadowkvm.workloads import get

SITES = [0, 0x9000, 0xA008]


def again(thing: Any, protocol: int = 5) -> Any:
    return pickle.loads(pickle.dumps(thing, protocol))  # noqa: S301 -- our own


def loaded(**settings: Any) -> sk.Vm:
    """Two vCPUs, a table out of sync, a dirty log, slots, host pages of several kinds, MMIO, a quota."""
    vm = guest(memory=8 << 20, vcpus=2, **{"events": True, **settings})
    vm.add_slot(3, 64 << 20, 4 << 20, dirty_log=True)
    vm.add_slot(7, 128 << 20, 4096, readonly=True)
    vm.set_host_pages(2 << 20, 2 << 20, "huge-2m")
    vm.set_host_pages(6 << 20, 1 << 20, "absent")
    vm.set_sites(SITES)
    vm.set_page_quota(70)
    vm.write_memory(PD + 8, entry(2 << 20, 0xE7))  # a large page
    vm.write_memory(PD + 16, entry(0x5000))
    places = [64 << 20, 128 << 20, 256 << 20, *(page << 12 for page in range(1800, 1820))]  # the third is MMIO
    vm.write_memory(0x5000, b"".join(map(entry, places)))
    vm.run(load(0, 600))
    for value in (0x5067, 0, 0x5067):  # stores to a directory, which are emulated
        vm.vcpus[1].write(PD + 24, value)
    vm.add_slot(9, 512 << 20, 4096)
    vm.delete_slot(9)  # all shadow pages are obsolete; freed ones are taken again
    vm.run(load(7, 300))
    vm.vcpus[0].write(PT + 0xF00, 0x67)  # the table is out of sync
    return vm


def load(seed: int, count: int) -> NDArray[np.void]:
    """Rows that do everything: accesses, stores to tables, flushes, CR3 loads, on both vCPUs."""
    random = np.random.default_rng(seed)
    out = rows(*[(sk.Op.READ, {})] * count)
    kinds = [sk.Op.READ, sk.Op.WRITE, sk.Op.FETCH, sk.Op.INVLPG, sk.Op.CR3]
    out["op"] = random.choice(kinds, count, p=[0.35, 0.4, 0.1, 0.1, 0.05])
    out["vcpu"] = random.integers(0, 2, count)
    out["site"] = random.integers(0, 3, count)
    # The first pages are the tables: stores go there on purpose only, to entries behind those that are used.
    out["addr"] = random.choice([8 << 12, 2 << 20, 4 << 20], count) + random.integers(0, 23, count) * 4096
    table = (out["op"] == sk.Op.WRITE) & (random.random(count) < 0.5)
    out["addr"][table] = PT + 8 * random.integers(32, 512, table.sum())
    loads = (out["op"] == sk.Op.READ) & (random.random(count) < 0.3)
    out["addr"][loads] = random.integers(32, 512, loads.sum()) * 4096
    out["value"] = random.integers(32, 512, count) << 12 | 0x67
    out["value"][out["op"] == sk.Op.CR3] = PML4
    return out


def seen(vm: sk.Vm) -> dict[str, Any]:
    """All that shows."""
    cpus = [(cpu.sregs, cpu.cr2, cpu.counters) for cpu in vm.vcpus]
    roots, pages, use = vm.roots(), vm.shadow_pages(), vm.memory_use()
    return {
        "hash": vm.state_hash(),
        "counters": vm.counters,
        "events": vm.event_records(),
        "settings": (vm.memory, vm.policy, vm.profile, vm.model_version),
        "tables": (roots, pages, use),
        "cpus": cpus,
        "beside": (vm.tlb, vm.nested),
    }


def go_on(one: sk.Vm, other: sk.Vm, *, seeds: tuple[int, ...] = (1, 2)) -> None:
    """The same rows on both; nothing may differ, at any time."""
    assert seen(one) == seen(other)
    for seed in seeds:
        ends = [vm.run(load(seed, 800), outcomes=True) for vm in (one, other)]
        assert ends[0].outcomes is not None
        assert ends[0].outcomes.tobytes() == ends[1].outcomes.tobytes()  # type: ignore[union-attr]
        assert ends[0].counters == ends[1].counters
        assert seen(one) == seen(other)
        other.audit()


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_vm_goes_on_as_the_original(protocol: int) -> None:
    vm = loaded()
    assert vm.counters["mmu_unsync"] > 0
    assert vm.counters["pf_mmio_spte_created"] > 0
    assert vm.counters["mmu_pde_zapped"] > 0
    assert vm.counters["mmu_shadow_zapped"] > 0
    assert vm.counters["max_mmu_rmap_size"] > 1, "lists of more than one entry"
    other = again(vm, protocol)
    other.audit()
    go_on(vm, other)
    for either in (vm, other):
        either.move_slot(3, 96 << 20)
        either.notifier_unmap(0x10000, 0x8000)
        either.set_page_quota(64)
        either.set_manual_dirty_log(True, initially_set=True)
        either.set_dirty_log(0, True)
    assert vm.get_dirty_log(3) == other.get_dirty_log(3)
    go_on(vm, other, seeds=(3,))
    assert vm.get_dirty_log(0) == other.get_dirty_log(0)
    go_on(vm, again(other), seeds=(4,))


@pytest.mark.parametrize("name", sk.POLICIES)
def test_every_built_in_policy_is_kept(name: str) -> None:
    policy = f"{name}:4" if sk.POLICIES[name].parameter else name
    vm = loaded(policy=policy)
    other = again(vm)
    assert other.policy == policy
    go_on(vm, other)


@pytest.mark.parametrize(
    "settings",
    [
        {"profile": "qemu-tcg"},
        {"model_version": "linux-6.12"},
        {"features": {"maxphyaddr": 40, "vendor": "intel", "gbpages": False}},
        {"nx_huge_pages": True},
        {"events": ["kvm_mmu_unsync_page", "kvm_page_fault"]},
        {"events": False},
    ],
    ids=str,
)
def test_every_setting_is_kept(settings: dict[str, Any]) -> None:
    vm = loaded(**settings)
    go_on(vm, again(vm))
    go_on(copy.deepcopy(vm), again(copy.deepcopy(vm)), seeds=(5,))


@pytest.mark.parametrize(
    "registers", [{"cr4": 0, "efer": 0}, {"cr4": 0x20, "efer": 0}, {"cr0": 0x33, "efer": 0}], ids=str
)
def test_other_paging_modes_are_kept(registers: dict[str, int]) -> None:
    vm = guest(vcpus=2, events=True)
    vm.write_memory(0x6000, (0x67).to_bytes(4, "little") + (0x2001).to_bytes(4, "little"))
    for cpu in vm.vcpus:
        cpu.set_sregs(cr3=0x6000, cs_l=False, **registers)
    vm.set_sites(SITES)
    vm.run(reads(64))
    go_on(vm, again(vm))


@pytest.mark.parametrize("name", ["fork_exit", "cow_storm"])
def test_a_workload_stopped_in_the_middle_comes_to_the_same_end(name: str) -> None:
    scenario = get(name).build(scale=0.1)
    vm = scenario.vm()
    scenario.run(vm)
    other = again(vm)
    other.audit()
    assert seen(other) == seen(vm)
    trace = reads(2000, step=12288)
    assert vm.run(trace).counters == other.run(trace).counters
    assert seen(other) == seen(vm)


def test_followed_tlbs_and_nested_paging_are_kept() -> None:
    vm = loaded()
    vm.follow_tlb(entries=64, ways=4)
    vm.run(load(9, 300))
    go_on(vm, again(vm))
    assert vm.tlb is not None
    nested = guest(vcpus=2)
    nested.set_sites(SITES)
    nested.use_nested(page_size=2 << 20)
    nested.run(load(9, 300))
    go_on(nested, again(nested))
    assert copy.copy(nested).nested is None, "a copy is under the shadow, as before"


def test_the_same_state_gives_the_same_bytes() -> None:
    vm = loaded()
    vm.follow_tlb()
    vm.run(load(1, 500))
    assert pickle.dumps(vm) == pickle.dumps(again(vm)) == pickle.dumps(again(again(vm)))


def test_room_goes_to_what_is_there() -> None:
    assert len(pickle.dumps(sk.Vm(memory=64 << 30))) < 10_000
    vm = sk.Vm(memory=64 << 20)
    vm.write_memory(0, np.random.default_rng(0).bytes(1 << 20))
    assert (1 << 20) < len(pickle.dumps(vm)) < (1 << 20) + 10_000


# -- snapshots and objects beside -------------------------------------------------------------------------------------


def test_snapshots_are_pickled_too() -> None:
    vm = loaded(policy="no_unsync")
    snapshot = vm.snapshot()
    before = seen(vm)
    saved = again(snapshot)
    assert saved.state_hash() == snapshot.state_hash()
    vm.run(load(1, 300))
    vm.restore(saved)
    assert seen(vm) == before
    go_on(vm, again(vm))
    with pytest.raises(sk.ConfigError, match="of a VM with 2 vCPUs, this one has 1"):
        guest().restore(saved)


class Named(sk.Vm):
    """A VM with an attribute, and with arguments of its own."""

    def __new__(cls, name: str) -> Self:
        self = super().__new__(cls, 4 << 20, vcpus=2)
        self.name = name  # type: ignore[attr-defined]
        return self


def test_a_subclass_keeps_its_class_and_attributes() -> None:
    other = again(Named("the first"))
    assert type(other) is Named
    assert other.name == "the first"  # type: ignore[attr-defined]
    assert len(other.vcpus) == 2


class Counting(sk.Policy):
    """Decides by what it has seen, so that a copy which had lost it would decide otherwise."""

    unsync_limit = 2

    def __init__(self) -> None:
        self.asked = 0
        self.vm: sk.Vm | None = None

    def prefetch(self, page: sk.PageView) -> int:
        self.asked += 1
        return 1 << self.asked % 4 if page.level == 1 else 1


def test_a_policy_in_python_is_pickled_beside() -> None:
    policy = Counting()
    vm = loaded(policy=policy)
    policy.vm = vm
    other, copied = again((vm, policy))
    assert copied.asked == policy.asked > 0
    assert copied.vm is other, "a circle through the policy"
    go_on(vm, other)
    assert copied.asked == policy.asked
    third = again(vm.snapshot())
    before = policy.asked
    other.restore(third)
    other.run(load(6, 200))
    assert policy.asked == before, "the snapshot brought a policy of its own"


def test_a_policy_that_cannot_be_pickled_says_so_itself() -> None:
    class Local(sk.Policy):
        def prefetch(self, page: sk.PageView) -> int:
            return page.level

    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pickle.dumps(guest(policy=Local()))


def run_elsewhere(vm: sk.Vm, seed: int) -> tuple[sk.Vm, int]:
    vm.run(load(seed, 400))
    return vm, vm.state_hash()


def test_processes_take_vms_and_give_them_back() -> None:
    vm = loaded()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        ends = list(pool.map(run_elsewhere, [vm] * 3, range(3)))
    for seed, (back, there) in enumerate(ends):
        here = copy.deepcopy(vm)
        here.run(load(seed, 400))
        assert here.state_hash() == there == back.state_hash()
        assert seen(back) == seen(here)


# -- damage -----------------------------------------------------------------------------------------------------------

HEAD = b"shadowkvm state\n"


def parts(vm: sk.Vm) -> bytes:
    state: bytes = vm.snapshot().__reduce__()[1][0]
    return state


def sealed(payload: bytes) -> bytes:
    """A payload under the right head and checksum: what only intent brings about."""
    version = parts(sk.Vm(4096))[18:].split(b"\0", 1)[0]
    length = version[0]
    return parts(sk.Vm(4096))[: 19 + length] + zlib.crc32(payload).to_bytes(4, "little") + payload


def payload(state: bytes) -> bytes:
    return state[19 + state[18] + 4 :]


def test_every_flipped_byte_is_noticed() -> None:
    state = parts(loaded())
    places = [*range(80), *np.random.default_rng(1).integers(80, len(state), 400).tolist(), len(state) - 1]
    for place in places:
        for bit in (0, 7):
            harmed = bytearray(state)
            harmed[place] ^= 1 << bit
            with pytest.raises(sk.SavedStateError):
                Snapshot(bytes(harmed), "kvm")


def test_every_truncation_is_noticed() -> None:
    state = parts(loaded())
    for length in [*range(80), *np.random.default_rng(2).integers(80, len(state), 100).tolist(), len(state) - 1]:
        with pytest.raises(sk.SavedStateError):
            Snapshot(state[:length], "kvm")
    with pytest.raises(sk.SavedStateError, match="checksum"):
        Snapshot(state + b"\0", "kvm")


def test_what_is_foreign_is_named() -> None:
    state = parts(guest())
    assert state.startswith(HEAD)
    with pytest.raises(sk.SavedStateError, match="no saved state of shadowkvm"):
        Snapshot(b"\x7fELF and more", "kvm")
    other_schema = state[:16] + (999).to_bytes(2, "little") + state[18:]
    with pytest.raises(sk.SavedStateError, match="schema 999; this is"):
        Snapshot(other_schema, "kvm")
    version = sk.__version__.encode()
    assert version in state[:40]
    with pytest.raises(sk.SavedStateError, match="read by the version that wrote it"):
        Snapshot(state.replace(version, b"9" * len(version), 1), "kvm")
    with pytest.raises(sk.ConfigError, match="not known"):
        Snapshot(state, "no_such_policy")
    assert issubclass(sk.SavedStateError, sk.ShadowKvmError)
    assert issubclass(sk.SavedStateError, ValueError)


def test_a_damaged_pickle_of_a_vm_raises() -> None:
    data = pickle.dumps(guest())
    at = data.index(HEAD) + 100
    with pytest.raises(sk.SavedStateError, match="damaged"):
        pickle.loads(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])  # noqa: S301 -- our own


def test_damage_under_a_right_checksum_is_refused_or_harmless() -> None:
    """Nothing that can be read may panic: what is accepted passes the audit and runs."""
    good = payload(parts(loaded()))
    assert Snapshot(sealed(good), "kvm").state_hash() == loaded().state_hash()
    random = np.random.default_rng(3)
    accepted = 0
    for _ in range(300):
        harmed = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 4)):
            harmed[place] = random.integers(0, 256)
        try:
            snapshot = Snapshot(sealed(bytes(harmed)), "kvm")
        except sk.SavedStateError:
            continue
        accepted += 1
        vm = loaded()
        vm.restore(snapshot)
        vm.audit()
        vm.run(load(8, 50))
    assert accepted < 300


def test_a_change_of_the_layout_needs_a_new_schema() -> None:
    """The bytes of a small VM with some of everything.

    If this fails: where a serialised type changed, move SCHEMA in rust/python/src/saved.rs and write the new numbers;
    where only the model did, the numbers alone.
    """
    vm = guest(events=["kvm_mmu_get_page"])
    vm.follow_tlb(entries=4, ways=2)
    vm.run(reads(2))
    vm.vcpus[0].write(PT + 0xF00, 0x67)
    state = vm.take_snapshot(beside=True).__reduce__()[1][0]
    assert (state[16], zlib.crc32(payload(state))) == (3, 1913810980)
