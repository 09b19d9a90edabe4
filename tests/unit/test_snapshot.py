"""Snapshots, copies and state hashes: what they hold, and that they go on by themselves."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
from tests.guest import PD, PML4, PT, guest, reads, rows

import shadowkvm as sk
from shadowkvm.workloads import get


def busy() -> sk.Vm:
    vm = guest(events=True)
    vm.run(reads(512))
    vm.vcpus[0].write(PT + 8, 0x1067)
    vm.vcpus[0].write(PD, 0x4067)
    return vm


REST = rows(
    (sk.Op.CR3, {"value": PML4}),
    (sk.Op.WRITE, {"addr": 0x8000, "value": 7}),
    (sk.Op.INVLPG, {"addr": 0x1000}),
    (sk.Op.READ, {"addr": 0x1000}),
)


def test_a_snapshot_is_restored_any_number_of_times() -> None:
    vm = busy()
    saved, counters, events = vm.snapshot(), vm.counters, vm.event_text()
    ends = []
    for _ in range(3):
        vm.run(REST)
        vm.audit()
        ends.append((vm.state_hash(), vm.counters, vm.event_text()))
        vm.restore(saved)
        vm.audit()
        assert vm.state_hash() == saved.state_hash()
        assert (vm.counters, vm.event_text()) == (counters, events)
    assert len(set(map(repr, ends))) == 1
    assert ends[0][0] != saved.state_hash()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_goes_on_by_itself(how: object) -> None:
    vm = busy()
    other = how(vm)  # type: ignore[operator]
    assert other.state_hash() == vm.state_hash()
    assert (other.policy, other.profile, other.memory) == (vm.policy, vm.profile, vm.memory)
    vm.run(REST)
    assert other.state_hash() != vm.state_hash()
    other.run(REST)
    assert other.state_hash() == vm.state_hash()
    assert other.event_text() == vm.event_text()
    other.audit()


def test_vcpus_of_a_restored_vm_are_the_same_objects() -> None:
    vm = busy()
    cpu, saved = vm.vcpus[0], vm.snapshot()
    cpu.load_cr3(PML4)
    vm.restore(saved)
    assert cpu.counters == vm.vcpus[0].counters
    assert cpu.read(0x1000).status == "done"


def test_a_policy_in_python_is_shared_and_can_still_fail() -> None:
    class Failing(sk.Policy):
        calls = 0

        def prefetch(self, page: sk.PageView) -> int:
            self.calls += 1
            if self.calls > 2:
                raise ValueError("enough")
            return 1

    vm = guest(policy=Failing())
    vm.vcpus[0].read(0)
    other = copy.deepcopy(vm)
    other.vcpus[0].read(0x9000)
    with pytest.raises(sk.PolicyError):
        vm.vcpus[0].read(0x19000)
    with pytest.raises(sk.PolicyError):
        other.vcpus[0].read(0x29000)


def test_what_cannot_be() -> None:
    with pytest.raises(sk.ConfigError, match="of a VM with 2 vCPUs, this one has 1"):
        guest().restore(guest(vcpus=2).snapshot())


def test_the_same_input_gives_the_same_hash_in_any_thread() -> None:
    """A workload alone, and four of them in threads."""

    def run(into: list[int]) -> None:
        scenario = get("fork_exit").build(scale=0.1)
        vm = scenario.vm()
        scenario.run(vm)
        into.append(vm.state_hash())

    alone: list[int] = []
    run(alone)
    together: list[int] = []
    threads = [threading.Thread(target=run, args=(together,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 4


def test_the_hash_tells_what_differs() -> None:
    vm = guest()
    hashes = {vm.state_hash()}
    vm.write_memory(0x2_0000, b"x")
    hashes.add(vm.state_hash())
    vm.vcpus[0].read(0)
    hashes.add(vm.state_hash())
    vm.vcpus[0].set_sregs(cr4=0xA0)
    hashes.add(vm.state_hash())
    vm.set_host_pages(0x3_0000, 4096, "shared")
    hashes.add(vm.state_hash())
    assert len(hashes) == 5
    assert np.all(np.array(list(hashes), np.uint64) > 0)


def test_recording_events_changes_nothing_else() -> None:
    """Faults take a short way while no events are recorded; here one meets a table that the host has dropped."""
    silent, telling = guest(events=False), guest(events=True)
    for vm in (silent, telling):
        cpu = vm.vcpus[0]
        cpu.read(0)
        cpu.read(64 << 12)
        vm.notifier_unmap(PT, 4096)
        cpu.load_cr3(PML4)  # what that asked for is done
        assert cpu.read(128 << 12).status == "page_fault"
        cpu.write(PD + 8, 0)
        vm.audit()
    assert silent.counters == telling.counters
    assert silent.state_hash() == telling.state_hash()
