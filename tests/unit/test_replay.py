"""The recorded Linux guests, replayed: nothing that the real guest could do fails, nothing that it could not succeeds.

The truth here is the recording's own: its faults, and a model of guest memory that is kept by the recorded frame
numbers. Every frame is filled with words that name it, so that a load from the wrong frame is seen.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import shadowkvm as sk

FOLDER = Path(__file__).parents[2] / "examples" / "recordings"
FACTS = {
    "fork20-demote64": {"rows": 202_540, "cr3": 123, "invlpg": 313, "faults": 1_362},
    "dyn10": {"rows": 1_101_223, "cr3": 441, "invlpg": 2_230, "faults": 7_384},
}
NAMES = list(FACTS)
PROFILES = ["zen", "qemu-tcg"]
POLICIES = ["kvm", "no_unsync", "no_prefetch", "zap_on_write"]
WRITE_CR3 = 5  # kvm_exit's code of CR3 loads


@cache
def chunk(name: str) -> sk.Chunk:
    with sk.Recording.open(FOLDER / f"{name}.npz") as recording:
        return recording.to_arrays()


def replay(name: str, **settings: Any) -> tuple[sk.Vm, sk.RunResult]:
    with sk.Recording.open(FOLDER / f"{name}.npz") as recording:
        vm = sk.Vm(recording.meta["memory"], **settings)
        return vm, vm.run(recording)


def check_faults(name: str, result: sk.RunResult) -> None:
    assert result.rows == FACTS[name]["rows"]
    assert (result.faults_missed, result.faults_unexpected, result.first_mismatch) == (0, 0, None)
    assert result.faults_matched == result.status["page_fault"] == FACTS[name]["faults"]
    mmio = chunk(name).rows["flags"] & sk.Flag.MMIO != 0
    assert result.status["mmio"] == np.count_nonzero(mmio)
    assert result.status["done"] == result.rows - result.status["page_fault"] - result.status["mmio"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_the_guests_faults_and_nothing_but_them(name: str, profile: str) -> None:
    vm, result = replay(name, profile=profile, events=["kvm_exit"])
    check_faults(name, result)
    assert result.counters["pf_guest"] == FACTS[name]["faults"]
    assert result.counters["invlpg"] == FACTS[name]["invlpg"]
    assert np.count_nonzero(vm.events["code"] == WRITE_CR3) == FACTS[name]["cr3"]
    with sk.Recording.open(FOLDER / f"{name}.npz") as recording:
        assert result.instructions == recording.meta["instructions"]
        assert recording.meta["raw_counts"]["CR3"] == FACTS[name]["cr3"] + 1  # the first is the start state
    vm.audit()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_no_policy_changes_what_the_guest_sees(name: str, policy: str) -> None:
    vm, result = replay(name, policy=policy)
    check_faults(name, result)
    vm.audit()


@pytest.mark.parametrize("quota", [64, 100, 1000])
def test_no_quota_changes_what_the_guest_sees(quota: int) -> None:
    with sk.Recording.open(FOLDER / "fork20-demote64.npz") as recording:
        vm = sk.Vm(recording.meta["memory"])
        vm.set_page_quota(quota)
        check_faults("fork20-demote64", vm.run(recording))
        assert len(vm.shadow()) <= quota + 1  # a root that still runs may be over it
        vm.audit()


def words(gfn: int) -> NDArray[np.uint64]:
    """512 words that no other frame has; bit 0 is clear, so that none is a present entry."""
    return (np.uint64(gfn) << np.uint64(12)) | (np.arange(512, dtype=np.uint64) << np.uint64(3))


class Model:
    """Guest memory as the recording says it is, without the bits that the CPU's walks set."""

    def __init__(self, gfns: list[int]) -> None:
        self.frames = {gfn: bytearray(words(gfn).tobytes()) for gfn in gfns}

    def load(self, gfn: int, offset: int, size: int) -> int:
        return int.from_bytes(self.frames[gfn][offset : offset + size], "little")

    def store(self, gfn: int, offset: int, data: bytes) -> None:
        self.frames[gfn][offset : offset + len(data)] = data


def without_ad(value: int, offset: int) -> int:
    """The accessed and dirty bits are in the first byte of an entry."""
    return value if offset & 7 else value & ~0x60


@pytest.mark.parametrize("name", NAMES)
def test_every_load_and_store_reaches_the_recorded_frame(name: str) -> None:
    rows, gfns, _ = chunk(name)
    with sk.Recording.open(FOLDER / f"{name}.npz") as recording:
        memory = recording.meta["memory"]
        used = sorted(set(gfns[gfns < memory >> 12].tolist()))
        vm, model = sk.Vm(memory), Model(used)
        for gfn in used:
            vm.write_memory(gfn << 12, words(gfn))
        outcomes = vm.run(recording, outcomes=True).outcomes
        assert outcomes is not None
        tables: set[int] = set()
        fields = (rows[field].tolist() for field in ("op", "size", "flags", "addr", "value"))
        loads = 0
        stop = sk.Flag.FAULTS | sk.Flag.MMIO | sk.Flag.KEEP
        every = zip(*fields, gfns.tolist(), outcomes["value"].tolist(), strict=True)
        for index, (op, size, flags, addr, value, gfn, loaded) in enumerate(every):
            offset = addr & 4095
            if op == sk.Op.PAGE:
                tables.add(gfn)
                model.store(gfn, 0, recording.pages[value])
            elif flags & stop:
                continue
            elif op == sk.Op.READ:
                expected = model.load(gfn, offset, size)
                same = (
                    without_ad(loaded, offset) == without_ad(expected, offset) if gfn in tables else loaded == expected
                )
                assert same, f"row {index}: frame {gfn:#x}, {loaded:#x} loaded, {expected:#x} expected"
                loads += 1
            elif op == sk.Op.WRITE:
                model.store(gfn, offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
    assert loads > 90_000
    bits = np.uint64((1 << 64) - 1 - 0x60)
    for gfn in used:
        found = np.frombuffer(vm.read_memory(gfn << 12, 4096), np.uint64)
        expected_words = np.frombuffer(model.frames[gfn], np.uint64)
        mask = bits if gfn in tables else np.uint64((1 << 64) - 1)
        assert ((found & mask) == (expected_words & mask)).all(), f"frame {gfn:#x}"


def test_chunks_are_read_as_they_are_needed(tmp_path: Path) -> None:
    with sk.Recording.open(FOLDER / "fork20-demote64.npz") as recording:
        path = tmp_path / "small.npz"
        with sk.RecordingWriter(path, recording.meta, compression="none", chunk_rows=1000) as writer:
            writer.add_pages(b"".join(recording.pages))
            for part in recording.chunks():
                writer.append(*part)
    _, expected = replay("fork20-demote64")
    with sk.Recording.open(path) as small:
        said: list[tuple[int, int]] = []
        result = sk.Vm(small.meta["memory"]).run(small, progress=lambda *now: said.append(now))
    assert result.counters == expected.counters
    assert len(said) == 203
    assert said[-1] == (202_540, 202_540)


def test_a_recording_needs_a_vm_that_fits_it() -> None:
    with sk.Recording.open(FOLDER / "fork20-demote64.npz") as recording:
        vm = sk.Vm(64 << 20)
        with pytest.raises(sk.ConfigError, match="needs 0x8000000 bytes"):
            vm.run(recording)
        assert vm.counters["x_ops"] == 0
        vm.add_slot(1, 64 << 20, 64 << 20)
        assert vm.run(recording).rows == 202_540


def test_a_recording_of_two_vcpus() -> None:
    rows = np.zeros(4, sk.TRACE_DTYPE)
    rows["op"], rows["size"], rows["vcpu"] = sk.Op.READ, 8, [0, 1, 0, 1]
    recording = sk.Recording.from_arrays(rows, memory=1 << 20, vcpus=2, sregs=chunk_sregs())
    with pytest.raises(sk.ConfigError, match="2 vCPUs, the VM 1"):
        sk.Vm(1 << 20).run(recording)
    vm = sk.Vm(1 << 20, vcpus=2)
    vm.run(recording)
    assert [cpu.counters["x_ops"] for cpu in vm.vcpus] == [2, 2]


def chunk_sregs() -> dict[str, int]:
    return {"cr0": 0x80050033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD01}


def test_a_recording_sets_the_paging_mode_and_refuses_one_that_cannot_be() -> None:
    rows = np.zeros(1, sk.TRACE_DTYPE)
    rows["op"], rows["size"] = sk.Op.READ, 4
    recording = sk.Recording.from_arrays(rows, memory=1 << 20)
    vm = sk.Vm(1 << 20)
    assert vm.run(recording).status["done"] == 1  # registers all 0: paging off
    assert vm.vcpus[0].sregs["cr0"] == 0
    impossible = sk.Recording.from_arrays(rows, memory=1 << 20, sregs={"cr0": 0x80000001, "cr4": 0, "efer": 0x500})
    with pytest.raises(sk.ConfigError, match="long mode needs PAE"):
        sk.Vm(1 << 20).run(impossible)


def test_a_damaged_recording_stops_at_the_damage(tmp_path: Path) -> None:
    rows = np.zeros(2000, sk.TRACE_DTYPE)
    rows["op"], rows["size"] = sk.Op.READ, 8
    path = tmp_path / "a.npz"
    meta = {"memory": 1 << 20, "sregs": chunk_sregs()}
    with sk.RecordingWriter(path, meta, compression="none", chunk_rows=1000) as writer:
        writer.append(rows)
    data = bytearray(path.read_bytes())
    data[data.index(b"chunk-00001.npy") + 500] ^= 1
    path.write_bytes(data)
    vm = sk.Vm(1 << 20)
    with sk.Recording.open(path) as recording, pytest.raises(sk.TraceError) as caught:
        vm.run(recording)
    assert caught.value.place == "chunk-00001.npy"
    assert vm.counters["x_ops"] == 1000
    assert vm.run(rows[:7]).rows == 7


def test_pages_are_handed_over_a_few_at_a_time() -> None:
    count = 9000
    rows = np.zeros(2 * count, sk.TRACE_DTYPE)
    rows["op"][::2], rows["op"][1::2] = sk.Op.PAGE, sk.Op.MARK
    rows["addr"][::2] = np.arange(count, dtype=np.uint64) % 100 << np.uint64(12)
    rows["value"][::2] = np.arange(count, dtype=np.uint64) % 7
    pages = np.repeat(np.arange(7, dtype=np.uint8), 4096).reshape(7, 4096)
    recording = sk.Recording.from_arrays(rows, memory=1 << 20, pages=pages, sregs=chunk_sregs())
    vm = sk.Vm(1 << 20)
    assert vm.run(recording).rows == 2 * count
    for gfn in range(100):
        last = max(number for number in range(gfn, count, 100))
        assert vm.read_memory(gfn << 12, 4096) == bytes([last % 7]) * 4096
