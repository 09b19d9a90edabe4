"""Events: filters, text, and every reader of Arrow that people use."""

from __future__ import annotations

import sys
from typing import Any, cast

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from tests.guest import PT, guest, reads

import shadowkvm as sk


@pytest.fixture(scope="module")
def vm() -> sk.Vm:
    vm = guest(events=True, vcpus=2)
    vm.run(reads(100))
    vm.vcpus[1].read(0x5000)
    vm.vcpus[0].write(PT + 8, 0x1067)
    vm.vcpus[0].read(1 << 30)
    return vm


@pytest.fixture(scope="module")
def events(vm: sk.Vm) -> sk.Events:
    return sk.Events(vm.events)


def test_text_is_the_engines(vm: sk.Vm, events: sk.Events) -> None:
    assert events.text() == vm.event_text()
    assert list(events[3:7]) == vm.event_text()[3:7]


def test_counts(events: sk.Events) -> None:
    counts = events.counts()
    assert sum(counts.values()) == len(events)
    assert counts["kvm_mmu_unsync_page"] == 1
    assert "kvm_mmio" not in counts
    assert repr(events).startswith(f"<Events: {len(events):,}: ")


def test_filters(events: sk.Events) -> None:
    faults = events.where("kvm_page_fault")
    assert len(faults) == events.counts()["kvm_page_fault"]
    both = events.where("kvm_page_fault", "kvm_exit")
    assert set(both.counts()) == {"kvm_page_fault", "kvm_exit"}
    assert all(event["vcpu"] == 1 for event in events.where(vcpu=1).array)
    assert events.where("kvm_mmu_get_page", level=4).counts() == {"kvm_mmu_get_page": 2}
    first = events.where(ops=(0, 1))
    assert len(first) > 5
    assert first == events.where(ops=range(1))
    about = events.where(gfn=PT >> 12)
    assert set(about.counts()) == {
        "kvm_mmu_get_page",
        "kvm_mmu_spte_requested",
        "kvm_mmu_set_spte",
        "kvm_mmu_unsync_page",
    }
    assert all(f"gfn {PT >> 12:x} " in line for line in about)
    assert len(events.where("kvm_mmio")) == 0


def _rows(events: sk.Events) -> list[tuple[Any, ...]]:
    names = list(sk.EVENT_INFO)
    return [
        (int(e["op"]), names[e["kind"]], *(int(e[name]) for name in ("vcpu", "level", "flag", "code", "a", "b", "c")))
        for e in events.array
    ]


COLUMNS = ["op", "event", "vcpu", "level", "flag", "code", "a", "b", "c"]


def test_polars(events: sk.Events) -> None:
    frame = pl.DataFrame(events)
    assert frame.columns == COLUMNS
    assert frame.rows() == _rows(events)


def test_pandas(events: sk.Events) -> None:
    frame = pd.DataFrame.from_arrow(events)
    assert list(frame.columns) == COLUMNS
    assert [tuple(row) for row in frame.itertuples(index=False)] == _rows(events)


def test_pyarrow(events: sk.Events) -> None:
    table = pa.table(events)
    assert table.column_names == COLUMNS
    assert [tuple(row.values()) for row in table.to_pylist()] == _rows(events)


def test_duckdb(events: sk.Events) -> None:
    log = events  # noqa: F841  # the query names it
    relation = duckdb.sql("select event, count(*) from log group by event")
    assert relation is not None
    found = relation.fetchall()
    assert dict(found) == events.counts()


def test_none_at_all() -> None:
    nothing = sk.Events(np.zeros(0, sk.EVENT_DTYPE))
    assert (len(nothing), nothing.counts(), nothing.text()) == (0, {}, [])
    assert pl.DataFrame(nothing).shape == (0, 9)
    assert repr(nothing) == "<Events: 0: none>"


def test_a_notebook(events: sk.Events) -> None:
    page = events._repr_html_()
    assert page.count("<tr>") == 21
    assert "more" in page


def test_without_nanoarrow(events: sk.Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanoarrow", None)
    with pytest.raises(ImportError, match=r"shadowkvm\[arrow\]"):
        events.__arrow_c_stream__()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: sk.Events(cast("Any", np.zeros(3))), sk.ConfigError, "EVENT_DTYPE"),
        (lambda e: e.where("kvm_exits"), sk.ConfigError, "did you mean 'kvm_exit'"),
        (lambda e: e.where(vcpu=300), sk.ConfigError, "vcpu"),
        (lambda e: e[3], TypeError, "slices"),
    ],
    ids=["dtype", "name", "vcpu", "index"],
)
def test_bad_input(events: sk.Events, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(events)


def test_a_record_that_cannot_be() -> None:
    array = np.zeros(1, sk.EVENT_DTYPE)
    array["kind"] = 200
    with pytest.raises(sk.ConfigError, match="event kind 200 does not exist"):
        sk.Events(array).text()
