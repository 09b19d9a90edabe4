"""Misuse of a Vm is refused with an error that says what and why, and the Vm goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.guest import guest

import shadowkvm as sk

HUGE = 1 << 70


@pytest.fixture
def vm() -> Iterator[sk.Vm]:
    """A Vm in use; afterwards it must be sound and answer as before."""
    vm = guest()
    cpu = vm.vcpus[0]
    cpu.write(0x10_0000, 77)
    before, pages = dict(vm.counters), vm.shadow_pages()
    yield vm
    vm.audit()
    assert dict(vm.counters) == before
    assert vm.shadow_pages() == pages
    assert vm.read_memory(0x10_0000, 1) == b"M"
    assert cpu.read(0x10_0000).value == 77


@pytest.mark.parametrize("memory", [0, 1, 4095, 4097, -4096, 1 << 43, 1 << 63, 1 << 64, 1 << 80])
def test_memory_sizes(memory: int) -> None:
    with pytest.raises(sk.ConfigError, match="memory"):
        sk.Vm(memory=memory)


@pytest.mark.parametrize("memory", ["32M", 4096.0, None, b"4096"])
def test_memory_is_a_whole_number(memory: Any) -> None:
    with pytest.raises(TypeError, match="whole number"):
        sk.Vm(memory=memory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vcpus": 0}, "vcpus 0"),
        ({"vcpus": 256}, "vcpus 256"),
        ({"vcpus": -1}, "vcpus -0x1"),
        ({"vcpus": HUGE}, "vcpus"),
        ({"policy": "no_unsnc"}, "'no_unsnc' is not known; did you mean 'no_unsync'"),
        ({"policy": "xyz"}, "see: shadowkvm policy list"),
        ({"policy": 7}, "a name, or an object with one of"),
        ({"profile": "intel"}, "there are: zen, qemu-tcg"),
        ({"profile": None}, "a name is expected"),
        ({"model_version": "linux-6.2"}, "did you mean 'linux-6.12' or 'linux-6.1'\\? There are: linux-6.1"),
        ({"model_version": "6"}, "model_version '6' is not known; there are: linux-6.1, linux-6.12"),
        ({"model_version": 612}, "model_version 612: a name is expected"),
        ({"features": {"maxphyaddr": 35}}, '"35" must be 36 to 52 bits'),
        ({"features": {"maxphyaddr": "many"}}, '"many" must be 36 to 52 bits'),
        ({"features": {"vendor": "via"}}, "must be amd or intel"),
        ({"features": {"pcid": 1}}, 'feature pcid: "1" must be true or false'),
        ({"features": {"sgx": True}}, '"sgx" is not known'),
        ({"events": "kvm_exit"}, "a list of names"),
        ({"events": 3}, "a list of names"),
        ({"events": ["kvm_exti"]}, "did you mean 'kvm_exit'"),
        ({"events": [7]}, "event 7 is not known"),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sk.ConfigError, match=message):
        sk.Vm(memory=1 << 20, **settings)


CONFIG: dict[str, Callable[[sk.Vm], object]] = {
    "slot there": lambda vm: vm.add_slot(0, 1 << 30, 4096),
    "slot overlaps": lambda vm: vm.add_slot(1, 4096, 4096),
    "slot number": lambda vm: vm.add_slot(509, 1 << 30, 4096),
    "slot number huge": lambda vm: vm.add_slot(HUGE, 1 << 30, 4096),
    "slot number negative": lambda vm: vm.add_slot(-1, 1 << 30, 4096),
    "slot empty": lambda vm: vm.add_slot(1, 1 << 30, 0),
    "slot size": lambda vm: vm.add_slot(1, 1 << 30, 100),
    "slot address": lambda vm: vm.add_slot(1, 100, 4096),
    "slot far": lambda vm: vm.add_slot(1, 1 << 60, 4096),
    "slot wraps": lambda vm: vm.add_slot(1, (1 << 64) - 4096, 8192),
    "slot absurd": lambda vm: vm.add_slot(1, 1 << 30, 1 << 63),
    "slot beyond": lambda vm: vm.add_slot(1, HUGE, 4096),
    "delete": lambda vm: vm.delete_slot(7),
    "log off": lambda vm: vm.get_dirty_log(0),
    "log of none": lambda vm: vm.get_dirty_log(9),
    "set log of none": lambda vm: vm.set_dirty_log(9, True),
    "unmap nothing": lambda vm: vm.notifier_unmap(0, 0),
    "unmap unaligned": lambda vm: vm.notifier_unmap(8, 4096),
    "unmap no memory": lambda vm: vm.notifier_unmap(1 << 40, 4096),
    "unmap too much": lambda vm: vm.notifier_unmap(0, 1 << 40),
    "unmap beyond": lambda vm: vm.notifier_unmap(HUGE, 4096),
    "unmap negative": lambda vm: vm.notifier_unmap(0, -4096),
    "state": lambda vm: vm.set_host_pages(0, 4096, "solid"),
    "state number": lambda vm: vm.set_host_pages(0, 4096, 1),  # type: ignore[arg-type]
    "huge state unaligned": lambda vm: vm.set_host_pages(4096, 4096, "huge-2m"),
    "state of no memory": lambda vm: vm.set_host_pages(1 << 40, 4096, "zero"),
    "quota": lambda vm: vm.set_page_quota(63),
    "quota absurd": lambda vm: vm.set_page_quota(1 << 40),
    "quota negative": lambda vm: vm.set_page_quota(-1),
    "site": lambda vm: vm.set_sites([0, HUGE]),
    "read too much": lambda vm: vm.read_memory(0, 1 << 40),
    "read beyond": lambda vm: vm.read_memory(HUGE, 8),
    "read negative": lambda vm: vm.read_memory(0, -8),
    "write beyond": lambda vm: vm.write_memory(-1, b"x"),
    "size 0": lambda vm: vm.vcpus[0].read(0, 0),
    "size 9": lambda vm: vm.vcpus[0].write(0, 1, 9),
    "size 16 of rmw": lambda vm: vm.vcpus[0].rmw(0, 1, "or", 16),
    "store kind": lambda vm: vm.vcpus[0].write(0, 1, kind="poke"),
    "rmw kind": lambda vm: vm.vcpus[0].rmw(0, 1, kind="nand"),
    "repeat 0": lambda vm: vm.vcpus[0].rep_stos(0, 1, 0),
    "repeat for ever": lambda vm: vm.vcpus[0].rep_stos(0, 1, 1 << 31),
    "move none": lambda vm: vm.move_slot(3, 0),
    "move unaligned": lambda vm: vm.move_slot(0, 0x800),
    "move far": lambda vm: vm.move_slot(0, (1 << 48) - 4096),
    "full log that is not by hand": lambda vm: vm.set_manual_dirty_log(False, True),
    "clear not by hand": lambda vm: vm.clear_dirty_log(0, [1]),
    "age nothing": lambda vm: vm.notifier_age(0, 0),
    "young no memory": lambda vm: vm.notifier_test_young(1 << 40, 4096),
    "change unaligned": lambda vm: vm.notifier_change(1, 4096),
    "paging off in long mode": lambda vm: vm.vcpus[0].set_sregs(cr0=0x33),
    "long mode without PAE": lambda vm: vm.vcpus[0].set_sregs(cr4=0),
    "64-bit code without long mode": lambda vm: vm.vcpus[0].set_sregs(cr0=0x33, efer=0, cs_l=True),
    "pcid without long mode": lambda vm: vm.vcpus[0].set_sregs(cr4=0x20020, efer=0),
    "no protection keys": lambda vm: vm.vcpus[0].set_sregs(cr4=0x400020),
    "pkru without keys": lambda vm: vm.vcpus[0].set_pkru(1),
    "pkru wide": lambda vm: vm.vcpus[0].set_pkru(1 << 32),
    "efer bits": lambda vm: vm.vcpus[0].set_sregs(efer=0xD03),
    "deliver vector": lambda vm: vm.vcpus[0].deliver(14, idt=HUGE, gdt=0, rsp=0),
    "cr3": lambda vm: vm.vcpus[0].set_sregs(cr3=1 << 60),
    "from event": lambda vm: vm.event_text(-1),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_setting_that_cannot_be(vm: sk.Vm, name: str) -> None:
    before = state(vm)
    with pytest.raises(sk.ConfigError) as caught:
        CONFIG[name](vm)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, sk.ShadowKvmError)
    assert str(caught.value)
    assert state(vm) == before


def state(vm: sk.Vm) -> tuple[object, ...]:
    """All that a refused request could have changed."""
    cpu = vm.vcpus[0]
    return (
        vm.counter_values(),
        cpu.sregs,
        vm.shadow_pages(),
        vm.roots(),
        vm.read_memory(0, 4 << 20),
        len(vm.event_text()),
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda vm: vm.write_memory(4 << 20, b"x"),
        lambda vm: vm.write_memory((4 << 20) - 1, b"xx"),
        lambda vm: vm.write_memory((1 << 64) - 1, b"xx"),
        lambda vm: vm.read_memory(4 << 20, 1),
        lambda vm: vm.read_memory(0, (4 << 20) + 1),
        lambda vm: vm.read_memory((1 << 64) - 1, 2),
    ],
    ids=["write behind", "write over the end", "write wraps", "read behind", "read over the end", "read wraps"],
)
def test_memory_that_is_not_there(vm: sk.Vm, call: Callable[[sk.Vm], object]) -> None:
    with pytest.raises(sk.GuestMemoryError) as caught:
        call(vm)
    assert isinstance(caught.value, LookupError)
    assert caught.value.gpa is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda vm: vm.write_memory(0, "text"),
        lambda vm: vm.vcpus[0].read(1.5),
        lambda vm: vm.vcpus[0].read("0"),
        lambda vm: vm.vcpus[0].read(),
        lambda vm: vm.add_slot("1", 0, 4096),
        lambda vm: vm.run(),
    ],
    ids=["text", "float", "string", "nothing", "slot", "no trace"],
)
def test_another_type_is_a_type_error(vm: sk.Vm, call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError):
        call(vm)


def test_no_vcpu_beyond_the_last(vm: sk.Vm) -> None:
    assert isinstance(vm.vcpus, tuple)
    assert len(vm.vcpus) == 1


@pytest.mark.parametrize("gva", [1 << 60, 0x8000_0000_0000, (1 << 64) - (1 << 47) - 1])
def test_an_address_that_is_not_canonical_is_the_guests_affair(gva: int) -> None:
    assert guest().vcpus[0].read(gva).status == "general_protection"
