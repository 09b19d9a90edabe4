"""Vm.run: the same as one operation after another, in pieces, with errors that name the row."""

from __future__ import annotations

import signal
import threading
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from tests.guest import PD, PML4, PT, guest, reads, rows

import shadowkvm as sk
from shadowkvm import feed
from shadowkvm._core import OPS, STATUSES
from shadowkvm.trace import CHUNK_ROWS

Row = NDArray[np.void]


def mixed() -> Row:
    """Something of everything that a guest does."""
    return rows(
        (sk.Op.READ, {"addr": 0x10_0000}),
        (sk.Op.WRITE, {"addr": 0x10_0000, "value": 5}),
        (sk.Op.WRITE, {"addr": PT + 8, "value": 0}),
        (sk.Op.READ, {"addr": 0x1000}),
        (sk.Op.CR3, {"value": PML4}),
        (sk.Op.READ, {"addr": 0x1000, "flags": sk.Flag.USER}),
        (sk.Op.WRITE, {"addr": PD, "value": PT | 0x67}),
        (sk.Op.ADD, {"addr": 0x10_0000, "value": 3}),
        (sk.Op.FETCH, {"addr": 0x5000}),
        (sk.Op.STORE, {"addr": 0x6000, "value": 9, "size": 4}),
        (sk.Op.INVLPG, {"addr": 0x6000}),
        (sk.Op.MARK, {"value": 1}),
        (sk.Op.HOST_WRITE, {"addr": 0x7000, "value": 0xAB, "size": 1}),
        (sk.Op.READ, {"addr": 0x7000}),
        (sk.Op.UNMAP, {"addr": 0x7000, "value": 4096}),
        (sk.Op.READ, {"addr": 0x7000}),
        (sk.Op.QUOTA, {"value": 64}),
        (sk.Op.READ, {"addr": 0x7000, "flags": sk.Flag.FAULTS, "value": 4}),
    )


def one_by_one(vm: sk.Vm, trace: Row) -> list[sk.Outcome | None]:
    """The same operations through the methods of the API."""
    cpu = vm.vcpus[0]
    out: list[Any] = []
    for row in trace:
        op, addr, value, size = sk.Op(int(row["op"])), int(row["addr"]), int(row["value"]), int(row["size"])
        user = bool(row["flags"] & sk.Flag.USER)
        if op == sk.Op.READ:
            out.append(cpu.read(addr, size, user))
        elif op == sk.Op.WRITE:
            out.append(cpu.write(addr, value, size, user))
        elif op == sk.Op.STORE:
            out.append(cpu.write(addr, value, size, user, kind="push"))
        elif op == sk.Op.ADD:
            out.append(cpu.rmw(addr, value, "add", size, user))
        elif op == sk.Op.FETCH:
            out.append(cpu.fetch(addr, user))
        elif op == sk.Op.CR3:
            out.append(cpu.load_cr3(value))
        elif op == sk.Op.INVLPG:
            out.append(cpu.invlpg(addr))
        elif op == sk.Op.HOST_WRITE:
            vm.write_memory(addr, value.to_bytes(8, "little")[:size])
            out.append(None)
        elif op == sk.Op.UNMAP:
            vm.notifier_unmap(addr, value)
            out.append(None)
        elif op == sk.Op.QUOTA:
            vm.set_page_quota(value)
            out.append(None)
        else:
            out.append(None)
    return out


def test_ops_are_the_engines() -> None:
    assert [(op.value, op.name) for op in sk.Op] == [(code, name) for code, name, _ in OPS]
    assert all(doc for _, _, doc in OPS)
    assert tuple(STATUSES) == sk.STATUS_NAMES


def test_run_is_a_loop_of_operations() -> None:
    both = [guest(events=True), guest(events=True)]
    trace = mixed()
    result = both[0].run(trace, outcomes=True)
    single = one_by_one(both[1], trace)
    assert result.outcomes is not None
    for row, outcome in zip(result.outcomes, single, strict=True):
        if outcome is not None:
            found = sk.STATUS_NAMES[row["status"]], row["value"], row["error_code"], row["address"]
            assert found == (outcome.status, outcome.value, outcome.error_code, outcome.address)
    assert both[0].event_text() == both[1].event_text()
    first, second = (dict(vm.counters) for vm in both)
    # Acts of the host are operations of a trace only.
    assert first.pop("x_ops") - second.pop("x_ops") == sum(outcome is None for outcome in single)
    assert first == second
    assert both[0].shadow_pages() == both[1].shadow_pages()
    assert both[0].read_memory(0, 4 << 20) == both[1].read_memory(0, 4 << 20)


def test_the_result_sums_up() -> None:
    vm = guest()
    vm.vcpus[0].read(0)
    before = vm.counters
    result = vm.run(mixed())
    assert result.rows == len(mixed()) == sum(result.status.values())
    assert result.counters == vm.counters - before
    assert result.counters["x_ops"] == result.rows
    # Row 3 still has the old translation; row 5 faults after the CR3 load and does not say so; the last row says that
    # it faults, and does not.
    assert result.status["page_fault"] == 1
    assert (result.faults_matched, result.faults_missed, result.faults_unexpected) == (0, 1, 1)
    assert result.first_mismatch == 5
    assert result.outcomes is None
    assert result.seconds > 0
    assert result.ops_per_second == pytest.approx(result.rows / result.seconds)
    assert result.instructions == 0


def test_the_result_in_other_forms() -> None:
    result = guest().run(mixed())
    data = result.to_dict()
    assert data["rows"] == result.rows
    assert data["faults"] == {"matched": 0, "missed": 1, "unexpected": 1, "first_mismatch": 5}
    assert data["counters"]["x_ops"] == result.rows
    assert "rows in" in repr(result)
    assert "<table>" in result._repr_html_()


@pytest.mark.parametrize("count", [0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 7])
def test_pieces_change_nothing(count: int) -> None:
    trace, said = reads(count), []
    vm = guest()
    result = vm.run(trace, outcomes=True, progress=lambda done, total: said.append((done, total)))
    assert result.rows == count == vm.counters["x_ops"]
    assert result.outcomes is not None
    assert result.outcomes.shape == (count,)
    assert result.outcomes.dtype == sk.OUTCOME_DTYPE
    assert not result.outcomes.flags.writeable
    ends = [*range(CHUNK_ROWS, count, CHUNK_ROWS), *([count] if count else [])]
    assert said == [(end, count) for end in ends]
    expected = guest()
    for at in range(0, count, 100_000):
        expected.run(trace[at : at + 100_000])
    assert dict(vm.counters) == dict(expected.counters)


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_small_pieces_change_nothing(limit: int) -> None:
    trace = mixed()
    one, other = guest(events=True), guest(events=True)
    first = one.run(trace, outcomes=True)
    second = feed.run(other, trace, outcomes=True, limit=limit)
    assert first.outcomes is not None
    assert second.outcomes is not None
    assert first.outcomes.tobytes() == second.outcomes.tobytes()
    assert one.event_text() == other.event_text()
    assert first.first_mismatch == second.first_mismatch == 5
    assert first.counters == second.counters


def test_arrays_of_every_kind_that_hold_the_rows(tmp_path: Any) -> None:
    trace = reads(1000)
    expected = guest().run(trace).counters
    frozen = trace.copy()
    frozen.flags.writeable = False
    strided = np.repeat(trace, 2)[::2]
    np.save(tmp_path / "trace.npy", trace)
    mapped = np.load(tmp_path / "trace.npy", mmap_mode="r")
    backwards = trace[::-1].copy()[::-1]
    for same in (frozen, strided, mapped, backwards):
        assert guest().run(same).counters == expected
        assert (same == trace).all()


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (reads(3).tolist(), "not list"),
        (None, "not NoneType"),
        ("guest.npz", "Recording.open"),
        (np.zeros(3), "of dtype float64"),
        (np.zeros(3, np.dtype([("op", "u1")])), "not TRACE_DTYPE"),
        (np.zeros(72, np.uint8), "of dtype uint8"),
        (reads(3).astype(sk.TRACE_DTYPE.newbyteorder(">")), "big-endian"),
        (np.zeros((2, 3), sk.TRACE_DTYPE), r"shape \(2, 3\)"),
        (np.zeros((), sk.TRACE_DTYPE), r"shape \(\)"),
        (np.zeros((3, 1), sk.TRACE_DTYPE), r"shape \(3, 1\)"),
    ],
    ids=["list", "none", "path", "float", "fields", "bytes", "byte order", "2-d", "0-d", "column"],
)
def test_a_wrong_array_is_refused_with_the_reason(trace: Any, message: str) -> None:
    vm = guest()
    with pytest.raises(sk.TraceError, match=message) as caught:
        vm.run(trace)
    assert caught.value.index is None
    assert vm.counters["x_ops"] == 0
    assert vm.run(reads(5)).rows == 5


BAD: dict[str, tuple[dict[str, int], str]] = {
    "op": ({"op": 28}, "op code 28"),
    "op 255": ({"op": 255}, "op code 255"),
    "vcpu": ({"vcpu": 1}, "vCPU 1"),
    "size 0": ({"size": 0}, "size 0"),
    "size 9": ({"size": 9}, "size 9"),
    "site": ({"site": 3}, "site 3"),
    "page": ({"op": sk.Op.PAGE, "addr": 0}, "page 0"),
    "host write": ({"op": sk.Op.HOST_WRITE, "addr": 1 << 40}, "0x10000000000"),
    "host write size": ({"op": sk.Op.HOST_WRITE, "size": 9}, "size 9"),
    "no log": ({"op": sk.Op.GET_DIRTY_LOG}, "no dirty log"),
    "no slot": ({"op": sk.Op.SET_DIRTY_LOG, "addr": 5}, "memslot 5"),
    "unmap": ({"op": sk.Op.UNMAP, "addr": 1, "value": 4096}, "4096"),
    "quota": ({"op": sk.Op.QUOTA, "value": 1}, "quota 1"),
    "slot overlaps": ({"op": sk.Op.SLOT_ADD, "size": 1, "value": 4096}, "overlaps"),
    "slot wraps": ({"op": sk.Op.SLOT_ADD, "size": 1, "addr": (1 << 64) - 4096, "value": 1 << 63}, "memslot 1"),
    "slot del": ({"op": sk.Op.SLOT_DEL, "size": 9}, "memslot 9"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("at", [0, 5, CHUNK_ROWS + 3], ids=["first", "early", "second piece"])
def test_a_bad_row_is_named_and_those_before_it_were_run(name: str, at: int) -> None:
    fields, message = BAD[name]
    trace = reads(at + 10)
    for field, value in fields.items():
        trace[field][at] = value
    vm = guest()
    with pytest.raises(sk.TraceError, match=message) as caught:
        vm.run(trace)
    assert caught.value.index == at
    assert str(caught.value).startswith(f"row {at}: ")
    assert vm.counters["x_faults_read"] == guest().run(reads(at)).counters["x_faults_read"]
    vm.audit()
    assert vm.run(reads(100)).status["done"] == 100


def test_recorded_faults_are_compared_by_error_code() -> None:
    faults = {"flags": sk.Flag.FAULTS | sk.Flag.USER, "addr": 0x20_0000}
    trace = rows((sk.Op.READ, {**faults, "value": 4}), (sk.Op.WRITE, {**faults, "value": 4}), (sk.Op.READ, {}))
    result = guest().run(trace)
    assert (result.faults_matched, result.faults_missed, result.faults_unexpected) == (1, 1, 0)
    assert result.first_mismatch == 1


def test_sites_are_instruction_addresses() -> None:
    vm = guest(events=["kvm_page_fault"])
    vm.set_sites([0, 0x5000])
    vm.run(rows((sk.Op.READ, {"addr": 0x10_0000, "site": 1})))
    assert vm.events["b"].tolist() == [0x5000, 0x10_0000]  # the fetch of the instruction comes first
    assert vm.events["a"].tolist() == [0x5000, 0x5000]


def endless() -> Row:
    """A trace of 2**40 rows that takes 24 bytes."""
    return as_strided(reads(1), shape=(1 << 40,), strides=(0,))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer on this system")
def test_a_signal_stops_a_run_between_pieces() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    vm = guest()
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            vm.run(endless())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert vm.counters["x_ops"] % CHUNK_ROWS == 0
    vm.audit()
    assert vm.run(reads(10)).rows == 10


def test_an_error_in_progress_stops_a_run() -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    vm = guest()
    with pytest.raises(RuntimeError, match=f"{CHUNK_ROWS} of"):
        vm.run(endless(), progress=stop)
    assert vm.counters["x_ops"] == CHUNK_ROWS
    assert vm.run(reads(10)).rows == 10


def test_machines_run_side_by_side() -> None:
    trace = reads(CHUNK_ROWS)
    expected = guest().run(trace).counters
    results: list[sk.RunResult] = []
    threads = [threading.Thread(target=lambda: results.append(guest().run(trace))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.counters for result in results] == [expected] * 4


def test_another_thread_may_change_the_array() -> None:
    trace = reads(200_000)
    done = threading.Event()

    def scribble() -> None:
        while not done.is_set():
            trace["addr"][:] = 0
            trace["addr"][:] = 4096

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        vm = guest()
        for _ in range(20):
            assert vm.run(trace).status["done"] == len(trace)
    finally:
        done.set()
        thread.join()
    vm.audit()
