"""The breakdown of a replay: its sums are KVM's counters, its classes are right for known accesses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.guest import CR0, CR4, EFER, MAPPED, PD, PDPT, PML4, PT, build, entry, rows

import shadowkvm as sk
from shadowkvm import feed
from shadowkvm.breakdown import EVENTS_NEEDED, Breakdown
from shadowkvm.events import event_array
from shadowkvm.faults import Access, Kind, Result, Tables
from shadowkvm.replay import Replay, open_trace, replay

FOLDER = Path(__file__).parents[2] / "examples" / "recordings"
POLICIES = ["kvm", "no_unsync", "no_prefetch", "zap_on_write"]


def recorded(name: str, **settings: Any) -> Replay:
    trace = open_trace(FOLDER / f"{name}.npz")
    assert isinstance(trace, sk.Recording)
    with trace:
        return replay(trace, **settings)


def run(trace: Any, *, limit: int = 1 << 15, memory: int = 4 << 20) -> Breakdown:
    vm = sk.Vm(memory, events=EVENTS_NEEDED, vcpus=int(trace["vcpu"].max()) + 1)
    build(vm)
    breakdown = Breakdown([PML4] * len(vm.vcpus))

    def each(piece: feed.Piece) -> None:
        breakdown.add(piece, event_array(vm.event_records()), piece.first)
        vm.clear_events()

    feed.run(vm, trace, each=each, limit=limit)
    return breakdown


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("profile", ["zen", "qemu-tcg"])
@pytest.mark.parametrize("name", ["fork20-demote64", "dyn10"])
def test_its_sums_are_the_counters(name: str, profile: str, policy: str) -> None:
    done = recorded(name, profile=profile, policy=policy)
    breakdown, counters = done.breakdown, done.result.counters
    totals = {result: int(breakdown.faults[:, :, result].sum()) for result in Result}
    assert totals == {
        Result.FIXED: counters["pf_fixed"],
        Result.EMULATED: counters["pf_emulate"],
        Result.SPURIOUS: counters["pf_spurious"],
        Result.GUEST: counters["pf_guest"],
        Result.MMIO: counters["x_mmio_faults"],
    }
    assert (breakdown.kinds.sum(0) == breakdown.faults.sum((0, 1))).all()
    for access in Access:
        assert breakdown.faults[:, access].sum() == counters[f"x_faults_{access.name.lower()}"]
    assert breakdown.faults[1].sum() == counters["x_faults_user"]
    spaces = breakdown.spaces
    assert sum(space.rows for space in spaces) == done.result.rows
    assert sum(space.instructions for space in spaces) == done.result.instructions
    assert sum(space.loads for space in spaces) == breakdown.ops[sk.Op.CR3]
    assert sum(space.faults for space in spaces) == breakdown.faults.sum()
    assert sum(space.guest for space in spaces) == counters["pf_guest"]
    assert sum(space.emulated for space in spaces) == counters["pf_emulate"]
    assert sum(space.zapped for space in spaces) == counters["mmu_shadow_zapped"] == breakdown.zap_ops.sum()
    unsync = sum(space.unsync for space in spaces)
    assert unsync == breakdown.kind_unsync.sum()
    assert unsync - breakdown.sync_ops.sum() - breakdown.sync_zapped == counters["mmu_unsync"]
    assert breakdown.checks.wrong == 0
    assert breakdown.checks.translations > 3000
    assert done.mismatches == 0


@pytest.mark.parametrize("limit", [500, 1 << 15, 1 << 18])
def test_pieces_change_nothing(limit: int) -> None:
    with sk.Recording.open(FOLDER / "fork20-demote64.npz") as recording:
        rows = recording.to_arrays().rows.copy()
        pages = np.flatnonzero(rows["op"] == sk.Op.PAGE)
    whole = recorded("fork20-demote64").breakdown
    vm = sk.Vm(128 << 20, events=EVENTS_NEEDED)
    breakdown = Breakdown([recording.meta["sregs"]["cr3"]])

    def each(piece: feed.Piece) -> None:
        breakdown.add(piece, event_array(vm.event_records()), piece.first)
        vm.clear_events()

    with sk.Recording.open(FOLDER / "fork20-demote64.npz") as recording:
        feed.run(vm, recording, each=each, limit=limit)
    assert len(pages) == breakdown.ops[sk.Op.PAGE]
    for name in ("faults", "kinds", "kind_unsync", "events", "sync_ops", "zap_ops", "ops"):
        assert (getattr(breakdown, name) == getattr(whole, name)).all(), name
    assert breakdown.spaces == whole.spaces
    assert breakdown.checks == whole.checks


def kinds(breakdown: Breakdown) -> dict[Kind, dict[Result, int]]:
    out: dict[Kind, dict[Result, int]] = {}
    for kind, result in zip(*np.nonzero(breakdown.kinds), strict=True):
        out.setdefault(Kind(kind), {})[Result(result)] = int(breakdown.kinds[kind, result])
    return out


@pytest.mark.parametrize(
    ("op", "fields", "kind", "result"),
    [
        (sk.Op.FETCH, {"addr": 0x10_0000, "flags": sk.Flag.USER}, Kind.USER_CODE, Result.FIXED),
        (sk.Op.READ, {"addr": 0x10_0000, "flags": sk.Flag.USER}, Kind.USER_DATA, Result.FIXED),
        (sk.Op.WRITE, {"addr": 0x10_0000}, Kind.USER_DATA, Result.FIXED),
        (sk.Op.WRITE, {"addr": MAPPED}, Kind.USER_DATA, Result.GUEST),
        (sk.Op.FETCH, {"addr": MAPPED, "flags": sk.Flag.USER}, Kind.USER_CODE, Result.GUEST),
        (sk.Op.READ, {"addr": (1 << 64) - 4096}, Kind.KERNEL_DATA, Result.GUEST),
        (sk.Op.FETCH, {"addr": (1 << 64) - 4096}, Kind.KERNEL_CODE, Result.GUEST),
        # The walk of its own address shadows the top table first, and the CPU's CR3 is it.
        (sk.Op.READ, {"addr": PML4}, Kind.TABLE_4, Result.FIXED),
    ],
    ids=["user fetch", "user read", "user page", "user fault", "user fetch fault", "kernel", "kernel fetch", "table"],
)
def test_one_access(op: sk.Op, fields: dict[str, int], kind: Kind, result: Result) -> None:
    breakdown = run(rows((op, fields)))
    assert kinds(breakdown) == {kind: {result: 1}}
    user = int(bool(fields.get("flags", 0) & sk.Flag.USER))
    access = {sk.Op.FETCH: Access.FETCH, sk.Op.READ: Access.READ, sk.Op.WRITE: Access.WRITE}[op]
    assert breakdown.faults[user, access, result] == breakdown.faults.sum() == 1


@pytest.mark.parametrize("table", [PT, PD, PDPT, PML4])
def test_stores_to_tables(table: int) -> None:
    """The last level goes unsync; the levels above are emulated."""
    level = {PT: 1, PD: 2, PDPT: 3, PML4: 4}[table]
    store = (sk.Op.WRITE, {"addr": table + 8 * 256, "value": 0})
    breakdown = run(rows((sk.Op.READ, {"addr": 0x10_0000}), store, (sk.Op.CR3, {"value": PML4})))
    kind = Kind(Kind.TABLE_1 + level - 1)
    result = Result.FIXED if level == 1 else Result.EMULATED
    assert kinds(breakdown)[kind] == {result: 1}
    assert breakdown.kind_unsync[kind] == int(level == 1)
    assert breakdown.sync_ops[sk.Op.CR3] == int(level == 1)
    (space,) = breakdown.spaces
    assert (space.cr3, space.unsync, space.synced) == (PML4, int(level == 1), int(level == 1))


def test_devices() -> None:
    device = {"addr": 0x5000}
    point = (sk.Op.HOST_WRITE, {"addr": PT + 8 * 5, "value": 64 << 20 | 0x67})
    access = (sk.Op.READ, device), (sk.Op.READ, device), (sk.Op.WRITE, device)
    breakdown = run(rows(point, *access))
    assert kinds(breakdown) == {Kind.DEVICE: {Result.EMULATED: 1, Result.MMIO: 2}}
    # A new memslot makes MMIO entries obsolete: the next access looks at the guest's tables again.
    slot = (sk.Op.SLOT_ADD, {"addr": 1 << 30, "value": 4096, "size": 1})
    breakdown = run(rows(point, *access, slot, *access))
    assert kinds(breakdown) == {Kind.DEVICE: {Result.EMULATED: 2, Result.MMIO: 4}}


def test_address_spaces_are_those_of_each_vcpu() -> None:
    other = 0x8000
    trace = rows(
        (sk.Op.HOST_WRITE, {"addr": other, "value": PDPT | 0x67}),
        (sk.Op.READ, {"addr": 0x10_0000}),
        (sk.Op.CR3, {"value": other | 0x18, "vcpu": 1}),
        (sk.Op.READ, {"addr": 0x11_0000, "vcpu": 1}),
        (sk.Op.READ, {"addr": 0x12_0000}),
        (sk.Op.READ, {"addr": 0x13_0000, "vcpu": 1}),
    )
    for limit in (1, 2, 100):
        spaces = {space.cr3: space for space in run(trace, limit=limit).spaces}
        assert set(spaces) == {PML4, other}
        assert (spaces[PML4].rows, spaces[PML4].loads, spaces[PML4].faults) == (3, 0, 2)
        assert (spaces[other].rows, spaces[other].loads, spaces[other].faults) == (3, 1, 2)


def test_any_number_of_address_spaces_is_held_in_bounded_memory() -> None:
    count = 6000
    trace = np.zeros(count, sk.TRACE_DTYPE)
    trace["op"], trace["value"] = sk.Op.CR3, np.arange(1, count + 1, dtype=np.uint64) << np.uint64(12)
    breakdown = run(trace, memory=32 << 20)
    assert len(breakdown.spaces) <= 4097
    assert sum(space.loads for space in breakdown.spaces) == count
    others = next(space for space in breakdown.spaces if space.cr3 == -1)
    assert others.to_dict()["cr3"] == "others"


def test_tables_are_counted_by_level() -> None:
    tables = Tables()
    assert tables.level(7) == 0
    tables.note(7, 1, made=True)
    tables.note(7, 3, made=True)
    tables.note(7, 2 | 1 << 7, made=True)  # direct: no guest table
    assert tables.level(7) == 3
    tables.note(7, 3, made=False)
    assert tables.level(7) == 1
    tables.note(7, 1, made=False)
    assert tables.level(7) == 0


def test_a_wrong_translation_is_seen() -> None:
    trace = rows(
        (sk.Op.READ, {"addr": 0x10_0000}), (sk.Op.READ, {"addr": 0x12_0000}), (sk.Op.READ, {"addr": 0x14_0000})
    )
    sregs = {"cr0": CR0, "cr3": PML4, "cr4": CR4, "efer": EFER}
    tables = {0x1000: PDPT, 0x2000: PD, 0x3000: PT}
    pages = b"".join(entry(child).ljust(4096, b"\0") for child in tables.values())
    pages += b"".join(entry(page << 12) for page in range(512))
    writes = rows(*((sk.Op.PAGE, {"addr": 0x1000 * (n + 1), "value": n}) for n in range(4)))
    full = np.concatenate((writes, trace))
    gfn = [sk.NO_PAGE] * 4 + [0x100, 0x121, 0x140]
    recording = sk.Recording.from_arrays(full, memory=4 << 20, sregs=sregs, pages=pages, gfn=gfn)
    done = replay(recording)
    assert (done.breakdown.checks.translations, done.breakdown.checks.wrong) == (3, 1)
    assert done.breakdown.checks.first_wrong == 5
    assert done.mismatches == 1
