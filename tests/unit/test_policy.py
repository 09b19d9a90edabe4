"""Policies: the built-in ones by what they do, and those in Python by when they are asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.guest import PD, PDPT, PML4, PT, entry, guest, reads, rows

import shadowkvm as sk
from shadowkvm.replay import replay
from shadowkvm.workloads import get

Shell = Callable[..., tuple[int, str, str]]
NAMES = [f"{row.name}:4" if row.parameter else row.name for row in sk.POLICIES.values()]
RECORDING = "examples/recordings/fork20-demote64.npz"


@pytest.fixture(scope="module")
def kvm() -> sk.Counters:
    return counters_of("kvm")


def counters_of(policy: Any) -> sk.Counters:
    scenario = get("fork_exit").build(scale=0.2)
    vm = scenario.vm(policy=policy)
    scenario.run(vm)
    vm.audit()
    return vm.counters


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_keeps_the_shadow_in_order(name: str) -> None:
    """Forks and exits: the guest sees the same values whatever the policy, and the audit finds nothing."""
    counters = counters_of(name)
    assert counters["exits"] > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_guest_sees_the_same(name: str) -> None:
    """Every load of a recorded guest's faults and translations is as it was, under every policy."""
    with sk.Recording.open(RECORDING) as recording:
        done = replay(recording, policy=name)
    assert done.mismatches == 0
    assert done.settings["policy"] == name


# -- what each does ------------------------------------------------------------------------------------------------


def edited(policy: Any, tables: int = 1) -> sk.Vm:
    """Last-level tables in use, each stored to once."""
    vm = guest(32 << 20, policy=policy)
    for number in range(tables):
        vm.write_memory(PD + 8 * number, entry(0x10000 + number * 4096))
        vm.write_memory(0x10000 + number * 4096, b"".join(entry(page << 12) for page in range(512)))
    for number in range(tables):
        vm.vcpus[0].read(number << 21)
    for number in range(tables):
        vm.vcpus[0].write(0x10000 + number * 4096 + 8, 0x1067)
    vm.audit()
    return vm


def test_unsync() -> None:
    assert edited("kvm", 5).counters["mmu_unsync"] == 5
    assert edited("no_unsync", 5).counters["mmu_unsync"] == 0
    assert edited("xen_oos", 5).counters["mmu_unsync"] == 3
    assert edited("unsync_limit:1", 5).counters["mmu_unsync"] == 1
    assert edited("dirty_tables", 20).counters["mmu_unsync"] == 16


def test_the_first_table_is_the_one_that_comes_back() -> None:
    vm = edited("unsync_limit:2", 3)
    unsync = sorted(page.gfn for page in vm.shadow().pages if page.unsync)
    assert unsync == [0x11, 0x12]


def test_update_on_write() -> None:
    vm = edited("update_on_write")
    assert vm.counters["pf_emulate"] == 1
    before = vm.counters["pf_taken"]
    assert vm.vcpus[0].read(0x1000).status == "done"
    assert vm.counters["pf_taken"] == before
    other = edited("no_unsync")
    before = other.counters["pf_taken"]
    other.vcpus[0].read(0x1000)
    assert other.counters["pf_taken"] == before + 1


@pytest.mark.parametrize(("policy", "stores"), [("kvm", 3), ("flood:2", 2), ("flood:5", 5), ("zap_on_write", 1)])
def test_flooding(policy: str, stores: int) -> None:
    vm = guest(policy=policy)
    vm.write_memory(PDPT + 8, entry(0x8000))
    vm.write_memory(0x8000, entry(PT))
    vm.vcpus[0].read(1 << 30)
    for count in range(1, stores + 1):
        assert vm.counters["mmu_flooded"] == 0
        vm.vcpus[0].write(0x8000 + 800, count)
    assert vm.counters["mmu_flooded"] == 1


def test_flooding_never() -> None:
    vm = guest(policy="flood:0")
    vm.write_memory(PDPT + 8, entry(0x8000))
    vm.write_memory(0x8000, entry(PT))
    vm.vcpus[0].read(1 << 30)
    for count in range(50):
        vm.vcpus[0].write(0x8000 + 800, count)
    assert vm.counters["mmu_flooded"] == 0


@pytest.mark.parametrize(
    ("policy", "pages"),
    [("kvm", 8), ("no_prefetch", 1), ("prefetch:2", 2), ("prefetch:64", 64), ("prefetch:512", 512)],
)
def test_prefetch(policy: str, pages: int) -> None:
    vm = guest(policy=policy)
    vm.vcpus[0].read(100 << 12)
    assert vm.counters["pages_4k"] == pages
    vm.audit()


def test_eager_sync() -> None:
    """Tables below another root come back, too."""
    for policy, left in (("kvm", 1), ("eager_sync", 0)):
        vm = edited(policy)
        vm.write_memory(0x9000, entry(PDPT + 0x8000))
        vm.vcpus[0].load_cr3(0x9000)
        assert vm.counters["mmu_unsync"] == left, policy


def test_invlpg_protects() -> None:
    for policy, left in (("kvm", 1), ("invlpg_protects", 0)):
        vm = edited(policy)
        vm.vcpus[0].invlpg(0x1000)
        assert vm.counters["mmu_unsync"] == left, policy
        vm.audit()


def test_small_pages() -> None:
    for policy, large in (("kvm", 1), ("small_pages", 0)):
        vm = guest(32 << 20, policy=policy)
        vm.set_host_pages(0, 32 << 20, "huge-2m")
        vm.write_memory(PD + 16, ((4 << 20) | 0xE7).to_bytes(8, "little"))
        assert vm.vcpus[0].read(4 << 20).status == "done"
        assert vm.counters["pages_2m"] == large, policy


@pytest.mark.parametrize("policy", ["kvm", "recycle_newest", "recycle_emptiest"])
def test_recycling(policy: str) -> None:
    vm = edited(policy, 8)
    vm.set_page_quota(64)
    for gib in range(1, 60):
        vm.write_memory(PDPT + 8 * gib, entry((0x100 + gib) << 12))
        vm.write_memory((0x100 + gib) << 12, entry(0x10000 + gib % 8 * 4096))
        vm.vcpus[0].read(gib << 30)
    assert vm.counters["mmu_recycled"] > 0
    vm.audit()


# -- in Python ---------------------------------------------------------------------------------------------------------


class Counting(sk.Policy):
    def __init__(self) -> None:
        self.asked: list[sk.PageView] = []

    def may_unsync(self, page: sk.PageView) -> bool:
        self.asked.append(page)
        return page.gfn % 2 == 0


def test_only_what_is_overridden_is_asked() -> None:
    policy = Counting()
    vm = edited(policy, 4)
    assert vm.policy == "Counting"
    assert [(page.gfn, page.level) for page in policy.asked] == [(0x10 + n, 1) for n in range(4)]
    assert all((page.write, page.user, page.execute) == (True, True, True) for page in policy.asked)
    assert vm.counters["mmu_unsync"] == 2


class Never(sk.Policy):
    def may_unsync(self, page: sk.PageView) -> bool:
        return False

    def flood_threshold(self, page: sk.PageView) -> int:
        return 1


class Like(sk.Policy):
    base = "zap_on_write"


class Wide(sk.Policy):
    def prefetch(self, page: sk.PageView) -> int:
        return 70 if page.level == 1 else 8


@pytest.mark.parametrize(
    ("policy", "name"), [(Never(), "zap_on_write"), (Like(), "zap_on_write"), (Wide(), "prefetch:64")]
)
def test_a_policy_in_python_does_what_the_same_one_in_rust_does(policy: sk.Policy, name: str) -> None:
    assert counters_of(policy) == counters_of(name)


class Rules(sk.Policy):
    large_pages: ClassVar = False
    unsync_limit: ClassVar = 2
    victim: ClassVar = "newest"


def test_rules_are_attributes() -> None:
    assert edited(Rules(), 4).counters["mmu_unsync"] == 2


def test_an_object_that_is_no_subclass() -> None:
    class Duck:
        def prefetch(self, page: sk.PageView) -> int:
            return 1

    vm = guest(policy=Duck())
    vm.vcpus[0].read(0)
    assert vm.counters["pages_4k"] == 1


class Broken(sk.Policy):
    def __init__(self, after: int) -> None:
        self.left = after

    def prefetch(self, page: sk.PageView) -> int:
        self.left -= 1
        if self.left < 0:
            raise KeyError("lost")
        return 1


def test_the_first_exception_ends_a_call() -> None:
    vm = guest(policy=Broken(0))
    with pytest.raises(sk.PolicyError, match="the policy raised") as raised:
        vm.vcpus[0].read(0)
    assert isinstance(raised.value.__cause__, KeyError)
    vm.audit()


def test_the_first_exception_ends_a_run() -> None:
    vm = guest(policy=Broken(3))
    with pytest.raises(sk.PolicyError):
        vm.run(reads(100))
    assert vm.counters["x_ops"] == 4
    vm.audit()
    with pytest.raises(sk.PolicyError):
        vm.run(rows((sk.Op.CR3, {"value": PML4}), (sk.Op.READ, {"addr": 64 << 12})))


def test_an_answer_that_is_none() -> None:
    class Vague(sk.Policy):
        def may_unsync(self, page: sk.PageView) -> Any:
            return "perhaps"

    with pytest.raises(sk.PolicyError, match="the policy raised") as raised:
        edited(Vague())
    assert isinstance(raised.value.__cause__, TypeError)


def test_a_policy_must_not_use_the_vm() -> None:
    class Nosy(sk.Policy):
        vm: Any = None

        def prefetch(self, page: sk.PageView) -> int:
            return int(self.vm.counters["pages_4k"])

    policy = Nosy()
    policy.vm = guest(policy=policy)
    with pytest.raises(sk.PolicyError):
        policy.vm.vcpus[0].read(0)


class Limit(sk.Policy):
    unsync_limit: ClassVar = 0


class Who(sk.Policy):
    victim: ClassVar[Any] = "youngest"


class Based(sk.Policy):
    base = "no_unsnc"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("no_unsnc", "did you mean 'no_unsync'"),
        ("kvm:3", "takes no number"),
        ("prefetch", "a number is needed"),
        ("prefetch:7", "no power of two"),
        ("flood:x", "no number from 0"),
        (Counting, "an instance is expected"),
        (object(), "a name, or an object with one of may_unsync"),
        (Limit(), "unsync_limit 0"),
        (Who(), "victim .youngest. is not known"),
        (Based(), "did you mean 'no_unsync'"),
    ],
)
def test_bad_policies(policy: Any, message: str) -> None:
    with pytest.raises(sk.ConfigError, match=message):
        sk.Vm(memory=32 << 20, policy=policy)


def test_the_list(shell: Shell) -> None:
    status, out, err = shell("policy", "list")
    assert (status, err) == (0, "")
    listed = json.loads(shell("policy", "list", "--format", "json")[1])
    assert listed["schema"] == "shadowkvm.policies/2"
    assert [item["name"].removesuffix(":N") for item in listed["policies"]] == list(sk.POLICIES)
    assert all(item["doc"] and item["source"] for item in listed["policies"])
    assert "xen_oos" in out


def test_a_number_on_the_command_line(shell: Shell) -> None:
    status, out, _ = shell("run", RECORDING, "--policy", "prefetch:16")
    assert status == 0
    assert "policy prefetch:16" in out
    status, _, err = shell("run", RECORDING, "--policy", "prefetch:17")
    assert status == 2
    assert "no power of two" in err


def test_runs_do_not_depend_on_how_rows_are_cut() -> None:
    """The loop over rows and single steps ask the same questions."""
    trace = np.concatenate([reads(64), rows(*((sk.Op.WRITE, {"addr": PT + 8 * n, "value": 0x67}) for n in range(20)))])
    one, many = Counting(), Counting()
    first, second = guest(policy=one), guest(policy=many)
    first.run(trace)
    for row in range(len(trace)):
        second.run(trace[row : row + 1])
    assert first.counters == second.counters
    assert [page.gfn for page in one.asked] == [page.gfn for page in many.asked]
