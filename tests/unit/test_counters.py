"""Counters and events: mappings, differences, rates, and a meaning for every one of them."""

from __future__ import annotations

import doctest
import importlib

import pytest
from tests.guest import PT, guest

import shadowkvm as sk
from shadowkvm._core import COUNTERS, EVENTS


def test_every_counter_and_event_is_explained() -> None:
    assert [tuple(info) for info in sk.COUNTER_INFO.values()] == COUNTERS
    assert [tuple(info) for info in sk.EVENT_INFO.values()] == EVENTS
    for info in sk.COUNTER_INFO.values():
        assert len(info.doc) > 5
        assert info.scope in {"vm", "vcpu"}
        assert info.kind in {"cumulative", "instant", "peak"}
    assert all(len(info.doc) > 5 for info in sk.EVENT_INFO.values())
    assert [info.code for info in sk.EVENT_INFO.values()] == list(range(len(EVENTS)))


def test_a_snapshot_is_a_mapping() -> None:
    vm = guest()
    counters = vm.counters
    assert len(counters) == len(sk.COUNTER_INFO) == len(dict(counters))
    assert list(counters) == list(sk.COUNTER_INFO)
    assert counters == dict(counters) == vm.counters
    assert hash(counters) == hash(vm.counters)
    vm.vcpus[0].read(0)
    assert counters != vm.counters
    assert counters["pf_taken"] == 0
    assert "pf_taken" in counters
    assert counters.get("nonsense") is None
    with pytest.raises(KeyError):
        counters["nonsense"]
    with pytest.raises(TypeError):
        counters["pf_taken"] = 1  # type: ignore[index]


def test_differences_by_kind() -> None:
    vm = guest()
    cpu = vm.vcpus[0]
    cpu.write(PT + 8, 0)
    unsync = vm.counters
    cpu.load_cr3(0x1000)
    synced = vm.counters
    change = synced - unsync
    assert change["exits"] == 1
    assert change["mmu_unsync"] == -1  # instant: one fewer
    assert change["max_mmu_rmap_size"] == synced["max_mmu_rmap_size"]  # a peak stands
    assert (unsync - unsync).nonzero() == {
        name: value for name, value in unsync.nonzero().items() if unsync.kinds[name] == "peak"
    }
    with pytest.raises(TypeError):
        synced - 3  # type: ignore[operator]


def test_rates_are_of_cumulative_counters() -> None:
    counters = sk.Counters({"pf_taken": 3, "mmu_unsync": 5, "x_ops": 1500})
    assert counters.rates() == {"pf_taken": 2.0, "x_ops": 1000.0}
    assert counters.rates(1, of=3)["pf_taken"] == 1
    assert counters.rates(of=0) == {"pf_taken": 0.0, "x_ops": 0.0}
    assert counters.rates(1e6, of="pf_taken")["x_ops"] == 5e8
    with pytest.raises(sk.ConfigError, match="nonsense"):
        counters.rates(of="nonsense")


def test_made_by_hand() -> None:
    assert dict(sk.Counters(range(len(COUNTERS)))) == {row[0]: number for number, row in enumerate(COUNTERS)}
    with pytest.raises(sk.ConfigError, match="nonsense"):
        sk.Counters({"nonsense": 1})
    with pytest.raises(ValueError, match=r"shorter|longer"):
        sk.Counters([1, 2])


def test_shown() -> None:
    counters = sk.Counters({"pf_taken": 1234, "x_ops": 5000})
    assert repr(counters) == "<Counters x_ops=5,000 pf_taken=1,234>"
    assert repr(sk.Counters({})) == "<Counters all 0>"
    vm = guest()
    vm.vcpus[0].write(PT, 0)
    vm.vcpus[0].invlpg(0)
    assert "\n" not in repr(vm.counters)
    assert repr(vm.counters).endswith("more>")
    assert "<td>1,234</td>" in counters._repr_html_()


@pytest.mark.parametrize("module", ["", ".checks", ".counters", ".events", ".vm"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"shadowkvm{module}"))
    assert result.attempted > 0
    assert result.failed == 0
