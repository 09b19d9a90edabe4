"""Vm: the promised names, and what they answer."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
from tests.guest import CR0, CR4, EFER, FULL, PD, PDPT, PML4, PT, build, entry, guest

import shadowkvm as sk


def test_the_promised_names_are_there() -> None:
    for name in ("Vm", "Recording", "RecordingWriter", "RunResult", "Op", "Flag", "TRACE_DTYPE", "EVENT_DTYPE",
                 "OUTCOME_DTYPE", "Outcome", "ShadowKvmError", "ConfigError", "TraceError", "GuestMemoryError",
                 "InvariantError", "PolicyError", "__version__", "model_version"):  # fmt: skip
        assert hasattr(sk, name), name
        assert name in sk.__all__
    assert sk.model_version == "linux-6.1"
    assert sk.MODELS == ("linux-6.1", "linux-6.12")
    assert sk.__version__[0].isdigit()


def test_the_promised_signatures() -> None:
    signature = inspect.signature(sk.Vm)
    names = ["memory", "vcpus", "policy", "profile", "features", "nx_huge_pages", "events", "model_version"]
    assert list(signature.parameters) == names
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "memory"}
    assert defaults == {
        "vcpus": 1,
        "policy": None,
        "profile": "zen",
        "features": None,
        "nx_huge_pages": False,
        "events": False,
        "model_version": sk.model_version,
    }
    promised = {
        "add_slot": ["slot", "gpa", "size", "readonly", "dirty_log"],
        "delete_slot": ["slot"],
        "move_slot": ["slot", "gpa"],
        "set_manual_dirty_log": ["enabled", "initially_set"],
        "clear_dirty_log": ["slot", "frames"],
        "notifier_change": ["gpa", "size"],
        "notifier_age": ["gpa", "size", "flush"],
        "notifier_test_young": ["gpa", "size"],
        "set_nx_huge_pages": ["enabled"],
        "recover_nx_huge_pages": [],
        "get_dirty_log": ["slot"],
        "set_dirty_log": ["slot", "enabled"],
        "notifier_unmap": ["gpa", "size"],
        "set_page_quota": ["n"],
        "write_memory": ["gpa", "data"],
        "read_memory": ["gpa", "size", "touch"],
        "set_host_pages": ["gpa", "size", "state"],
        "run": ["trace", "outcomes", "progress"],
        "audit": [],
        "shadow": [],
    }
    vm = sk.Vm(memory=1 << 20)
    for name, parameters in promised.items():
        assert list(inspect.signature(getattr(vm, name)).parameters) == parameters, name


def test_everything_public_says_what_it_is() -> None:
    for name in sk.__all__:
        if not name.startswith("__"):
            assert inspect.getdoc(getattr(sk, name)), name
    for name, member in vars(sk.Vm).items():
        if not name.startswith("_"):
            assert inspect.getdoc(member), f"Vm.{name}"


def test_memory_may_be_given_by_position_or_name() -> None:
    assert sk.Vm(1 << 20).memory == sk.Vm(memory=1 << 20).memory == 1 << 20
    with pytest.raises(TypeError):
        sk.Vm(1 << 20, 2)  # type: ignore[call-arg]


def test_a_vm_can_be_subclassed() -> None:
    class Mine(sk.Vm):
        def twice(self, gva: int) -> tuple[int, int]:
            return self.vcpus[0].read(gva).value, self.vcpus[0].read(gva).value

    vm = Mine(4 << 20, policy="no_unsync")
    build(vm)
    vm.write_memory(0x9000, b"\x2a")
    assert vm.twice(0x9000) == (42, 42)
    assert vm.policy == "no_unsync"


def test_each_operation_answers_with_an_outcome() -> None:
    vm = guest()
    cpu = vm.vcpus[0]
    assert cpu.write(0x10_0000, 0x1122_3344_5566_7788).status == "done"
    assert cpu.read(0x10_0004, size=2).value == 0x3344
    assert cpu.rmw(0x10_0000, 0xFF, kind="and").value == 0x1122_3344_5566_7788
    assert vm.read_memory(0x10_0000, 8) == (0x88).to_bytes(8, "little")
    old = 0x88
    for kind, new in (("or", 0x8F), ("xor", 0x80), ("add", 0x8F), ("xchg", 0x0F), ("and", 0x0F), ("cmpxchg", 0x0F)):
        assert cpu.rmw(0x10_0000, 0x0F, kind=kind, size=1).value == old
        assert vm.read_memory(0x10_0000, 1)[0] == new
        old = new
    assert cpu.fetch(0x10_0000).status == "done"
    for outcome in (cpu.load_cr3(PML4), cpu.load_cr0(CR0), cpu.load_cr4(CR4), cpu.wrmsr_efer(EFER), cpu.invlpg(0)):
        assert outcome.status == "done"
    assert cpu.sregs == {"cr0": CR0, "cr3": PML4, "cr4": CR4, "efer": EFER, "cs_l": 1}


def test_guest_faults_are_results() -> None:
    vm = guest()
    cpu = vm.vcpus[0]
    fault = cpu.write(0x20_0000, 1, user=True)
    assert (fault.status, fault.error_code, fault.address) == ("page_fault", 6, 0x20_0000)
    vm.write_memory(PT + 8 * 256, entry(8 << 20))
    device = cpu.read(0x10_0010)
    assert (device.status, device.value, device.address) == ("mmio", (1 << 64) - 1, (8 << 20) + 0x10)
    assert cpu.load_cr0(0).status == "general_protection"
    assert cpu.read(0x10_0010) == device
    assert hash(cpu.read(0x10_0010)) == hash(device)
    assert device != fault
    assert "status='mmio'" in repr(device)


def test_counters_of_the_vm_are_the_sum_over_its_vcpus() -> None:
    vm = guest(vcpus=3)
    for number, cpu in enumerate(vm.vcpus):
        assert cpu.id == number
        for page in range(number + 1):
            cpu.read(page << 15)
    each = [cpu.counters["x_ops"] for cpu in vm.vcpus]
    assert each == [1, 2, 3]
    assert vm.counters["x_ops"] == 6
    for name, info in sk.COUNTER_INFO.items():
        if info.scope == "vcpu":
            assert vm.counters[name] == sum(cpu.counters[name] for cpu in vm.vcpus), name
        else:
            assert name not in vm.vcpus[0].counters


def test_slots_dirty_log_and_notifier() -> None:
    vm = guest()
    cpu = vm.vcpus[0]
    vm.set_dirty_log(0, True)
    cpu.write(0x5000, 1)
    cpu.write(0x7000, 1)
    assert vm.get_dirty_log(0) == [5, 7]
    assert vm.get_dirty_log(0) == []
    vm.set_dirty_log(0, False)
    vm.notifier_unmap(0x5000, 0x1000)
    assert cpu.read(0x5000).value == 0
    vm.add_slot(1, 1 << 30, 1 << 20, readonly=True)
    cpu.write(PT, 1 << 30 | FULL)
    cpu.invlpg(0)
    assert cpu.read(0).status == "done"
    assert cpu.write(0, 1).status == "mmio"
    vm.delete_slot(1)
    assert cpu.read(0).status == "mmio"
    vm.set_page_quota(64)
    vm.audit()


@pytest.mark.parametrize("state", sk.HOST_STATES)
def test_every_state_of_the_hosts_pages_is_taken(state: str) -> None:
    vm = sk.Vm(1 << 30)
    vm.set_host_pages(0, 1 << 30, state)
    build(vm)
    assert vm.vcpus[0].write(0x10_0000, 7).status == "done"
    assert vm.vcpus[0].read(0x10_0000).value == 7
    vm.audit()


def test_a_choice_of_events() -> None:
    assert len(guest().events) == 0
    vm = guest(events=["kvm_page_fault", "kvm_mmu_unsync_page"])
    vm.vcpus[0].write(PT + 8, 0)
    assert [line.partition(":")[0] for line in vm.event_text()] == ["kvm_page_fault", "kvm_mmu_unsync_page"]
    everything = guest(events=True)
    everything.vcpus[0].write(PT + 8, 0)
    events = everything.events
    assert events.dtype == sk.EVENT_DTYPE
    assert len(events) == len(everything.event_text()) > 10
    assert not events.flags.writeable
    names = {info.code: name for name, info in sk.EVENT_INFO.items()}
    assert [names[kind] for kind in events["kind"]] == [text.partition(":")[0] for text in everything.event_text()]
    assert everything.event_text(5) == everything.event_text()[5:]
    everything.clear_events()
    assert everything.event_text() == []
    assert len(events) > 10  # a copy


def test_events_are_numbered_by_operation() -> None:
    vm = guest(events=["kvm_page_fault"])
    for page in (0, 0, 16, 32):
        vm.vcpus[0].read(page << 12)
    assert vm.events["op"].tolist() == [0, 2, 3]
    assert vm.events["b"].tolist() == [0, 16 << 12, 32 << 12]


def test_the_shadow_as_a_tree() -> None:
    vm = guest()
    cpu = vm.vcpus[0]
    cpu.write(0x10_0000, 1)
    tree = vm.shadow()
    assert len(tree) == len(tree.pages) == 4
    (root,) = tree.roots
    assert root.page is not None
    assert [page.role.level for page in tree.pages if page is root.page] == [4]
    page = root.page
    for table, index in ((PML4, 0), (PDPT, 0), (PD, 0)):
        assert page.gfn == table >> 12
        assert list(page.children) == [index]
        page = page.children[index]
    assert (page.gfn, page.role.level, page.role.direct, page.unsync) == (PT >> 12, 1, False, False)
    assert tree.of(PT >> 12) == (page,)
    assert page.role.access == "wux"
    assert page.role.quadrant == 0
    assert page.sptes.shape == (512,)
    assert not page.sptes.flags.writeable
    assert set(np.flatnonzero(page.sptes)) == set(page.entries) == set(range(256, 264))
    assert page.entries[256] & 3 == 3
    assert not page.children
    cpu.write(PT + 8, 0)
    assert vm.shadow().of(PT >> 12)[0].unsync
    assert not page.unsync  # what was taken stays as it was
    with pytest.raises(AttributeError):
        page.unsync = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        page.entries[0] = 1  # type: ignore[index]


def test_the_tree_in_words() -> None:
    vm = guest(vcpus=2)
    assert str(vm.shadow()) == "vCPU 0: no root\nvCPU 1: no root"
    vm.vcpus[1].read(0)
    vm.vcpus[0].write(PT + 8, 0)
    tree = vm.shadow()
    text = str(tree)
    assert "gfn 0x4 l1 wux unsync maps 8 (5 writable)" in text
    assert "as above" in text  # both vCPUs have one root
    assert repr(tree) == "<ShadowTree: 4 pages (1 l4, 1 l3, 1 l2, 1 l1), 1 unsync>"
    assert tree._repr_html_().startswith("<pre>vCPU 0")


def test_pages_under_no_root_are_drawn_too() -> None:
    vm = guest()
    cpu = vm.vcpus[0]
    cpu.read(0)
    for number in range(5):  # more top tables than a vCPU caches
        vm.write_memory(0x10_0000 + (number << 12), entry(PDPT))
        cpu.load_cr3(0x10_0000 + (number << 12))
        cpu.read(0)
    text = str(vm.shadow())
    assert "under no root:" in text
    assert text.count("gfn 0x1 l4") == 1


def test_representations_are_one_line() -> None:
    vm = guest(8 << 20, profile="qemu-tcg")
    assert repr(vm) == "<Vm 8 MiB, 1 vCPU, policy kvm, profile qemu-tcg, 0 ops>"
    assert repr(sk.Vm(4096)) == "<Vm 4 KiB, 1 vCPU, policy kvm, profile zen, 0 ops>"
    assert repr(vm.vcpus[0]) == "<vCPU 0>"


def test_numbers_of_numpy_are_numbers() -> None:
    vm = sk.Vm(np.int64(4 << 20), vcpus=np.uint8(1))  # type: ignore[arg-type]
    build(vm)
    address: Any = np.uint64(0x5000)
    vm.write_memory(address, np.arange(4, dtype=np.uint8))
    assert vm.read_memory(address, 4) == bytes(range(4))
    assert vm.vcpus[0].read(address, size=4).value == 0x0302_0100


def test_a_device_that_became_a_page_directory_is_written_unseen() -> None:
    """An MMIO entry with W stays writable when memory takes its place (make_spte, 6.1), even of a write-tracked frame.

    Stores through it cause no exit; KVM walks the guest's tables at each fault, and sees them.
    """
    vm = sk.Vm(memory=16 << 20)

    def put(gpa: int, value: int) -> None:
        vm.write_memory(gpa, value.to_bytes(8, "little"))

    for gpa, value in {0x1000: 0x2067, 0x2000: 0x3067, 0x3000: 0x4067, 0x4400: 0x1_0000_0067}.items():
        put(gpa, value)
    for page in range(32):
        put(0x5000 + 8 * page, (0x100 + page) << 12 | 0x67)
        put(0x6000 + 8 * page, (0x200 + page) << 12 | 0x67)
    put(0x110000, 0xAAAA)
    put(0x210000, 0xBBBB)
    cpu = vm.vcpus[0]
    cpu.set_sregs(cr3=0x1000)
    device, region = 0x80000, 1 << 30 | 1 << 21
    assert cpu.read(device).status == "mmio"
    vm.add_slot(1, 1 << 32, 0x10000)
    put((1 << 32) + 8, 0x5067)
    put(0x2008, 0x1_0000_0067)
    cpu.read(region)
    cpu.read(device)
    before = cpu.counters["pf_taken"]
    cpu.write(device + 8, 0x6067)
    assert cpu.counters["pf_taken"] == before
    assert cpu.read(region + 0x10000).value == 0xBBBB
    vm.audit()


def test_shared_host_pages_pass_the_audit() -> None:
    vm = guest()
    vm.set_host_pages(0x10000, 4096, "shared")
    vm.vcpus[0].read(0x10000)
    vm.audit()
    assert pickle.loads(pickle.dumps(vm)).state_hash() == vm.state_hash()  # noqa: S301 -- our own
