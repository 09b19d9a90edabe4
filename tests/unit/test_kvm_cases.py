"""Cases: made, checked, written, read, and put into the form that the harness reads."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from shadowkvm.errors import TraceError
from shadowkvm.kvm import Answer, Case, Op, Slot, generate, load, save
from shadowkvm.kvm.case import CONTROL, GUEST_OPS, LOCKABLE, SIZES
from shadowkvm.kvm.driver import Driver
from shadowkvm.kvm.generate import GROUPS, THEMES
from shadowkvm.kvm.initramfs import archive
from shadowkvm.kvm.layout import HARNESS, IMAGE, LABELS, assemble, stub_of
from shadowkvm.kvm.record import usable
from shadowkvm.kvm.wire import HEAD, case_bytes, op_bytes, split_cases


def answered(case: Case) -> Case:
    driver = Driver(case)
    return replace(case, answers=[driver.step(op) for op in case.ops], kernel="6.1.0-test")


@pytest.mark.parametrize("theme", THEMES)
def test_generated_cases_can_be_run_and_are_repeatable(theme: str) -> None:
    case = generate(5, 120, theme)
    assert case == generate(5, 120, theme)
    assert case.theme == theme
    assert len(case.ops) == 120
    case.check()
    assert case != generate(6, 120, theme)
    statuses = {a.status for a in answered(case).answers or []}
    assert "done" in statuses
    assert statuses <= {"done", "page_fault", "mmio", "general_protection", "shutdown", "double_fault"}


def test_a_seed_chooses_a_theme_of_its_group() -> None:
    for group in GROUPS:
        names = [name for name, theme in THEMES.items() if theme.group == group]
        assert {generate(seed, 1, group=group).theme for seed in range(len(names))} == set(names)
    assert generate(len(THEMES) + 1, 1, group="all").theme == list(THEMES)[1]
    with pytest.raises(TraceError, match="the groups are 64-bit, PAE, two-level, off, vcpus, host, all"):
        generate(1, 1, group="128-bit")


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_its_guests(group: str) -> None:
    cases = [generate(seed, 10, group=group) for seed in range(48)]
    if group == "vcpus":
        assert all(case.vcpus > 1 for case in cases)
    modes = {(bool(c.efer & 0x400), bool(c.cr0 >> 31), bool(c.cr4 & 0x20)) for c in cases}
    wanted = {"64-bit": {(True, True, True)}, "PAE": {(False, True, True)}, "two-level": {(False, True, False)}}
    assert modes == wanted.get(group, modes)
    assert group in wanted or {m[:2] for m in modes} >= {(False, False), (False, True)}


@pytest.mark.parametrize("name", ["a.json", "a.json.xz"])
@pytest.mark.parametrize("columns", [True, False])
def test_what_is_written_is_read(tmp_path: Path, name: str, columns: bool) -> None:
    cases = [answered(generate(seed, 60)) for seed in range(5)]
    cases.append(replace(cases[0], answers=None, name="no answers", shows="nothing", ops=[]))
    save(tmp_path / name, cases, columns=columns, meta={"kernel": "6.1.0-test"})
    assert load(tmp_path / name) == [*cases[:5], replace(cases[5], kernel="6.1.0-test")]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_form_for_people_takes_numbers_and_hexadecimal(tmp_path: Path) -> None:
    raw = {
        "schema": "shadowkvm.case/1",
        "cases": [
            {
                "memory": "0x100000",
                "cr3": 0x10000,
                "slots": [[0, 0, "0x100000", 0]],
                "pages": {"0x10000": {"0": "0x11067"}},
                "ops": [{"op": "read", "addr": "0x400000", "size": 4}],
            }
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(raw))
    (case,) = load(tmp_path / "a.json")
    assert case.ops == [Op("read", 0x400000, size=4)]
    assert (case.cr0, case.vcpus, case.profile, case.answers) == (0x80010033, 1, "qemu-tcg", None)
    assert case.pages == {0x10000: {0: 0x11067}}


BAD = [
    ({"schema": "shadowkvm.case/2"}, "schema 'shadowkvm.case/2', wanted 'shadowkvm.case/1'"),
    ({"memory": None}, "field 'memory' is missing|None is no number|memory"),
    ({"colour": 1}, "field 'colour' is unknown"),
    ({"ops": [{"op": "fly"}]}, "row 0: operation 'fly' is unknown"),
    ({"ops": [{"op": "read", "speed": 1}]}, "speed"),
    ({"ops": [{"op": "read", "size": 3}]}, "read of 3 bytes in 64-bit code: there are 1, 2, 4, 8"),
    ({"ops": [{"op": "read"}, {"op": "read", "vcpu": 1}]}, "row 1: vcpu 1: the case has 1"),
    ({"ops": [{"op": "read", "cpl": 1}]}, "cpl 1: there are 0 and 3"),
    ({"ops": [{"op": "invlpg", "cpl": 3}]}, "invlpg at CPL 3"),
    ({"ops": [{"op": "push", "size": 4}]}, "push of 4 bytes in 64-bit code: there are 8"),
    ({"ops": [{"op": "run"}]}, "run: length 0 is none of an instruction"),
    ({"ops": [{"op": "read", "flags": 1}]}, "read with flags 1"),
    ({"ops": [{"op": "or", "flags": 4}]}, "or with flags 4"),
    ({"ops": [{"op": "set_sregs", "value": 1}]}, None),
    ({"ops": [{"op": "set_sregs", "value": 0x80000001, "flags": 0x500}]}, "needs CR4.PAE"),
    ({"ops": [{"op": "set_sregs", "value": 0x80000001, "flags": 0x100}]}, "EFER.LMA stands if, and only if"),
    ({"ops": [{"op": "set_sregs", "value": 0x80000000}]}, "protected mode, bit 0 must be set"),
    ({"ops": [{"op": "set_sregs", "value": 1}, {"op": "read"}]}, "row 1: read of 8 bytes in 32-bit code"),
    ({"efer": 0}, "read of 8 bytes in 32-bit code: there are 1, 2, 4"),
    ({"efer": 0, "cr3": 1 << 32, "ops": []}, "a 32-bit guest has 32-bit registers"),
    ({"efer": 0, "ops": [{"op": "cmpxchg8b", "value": (1 << 64) - 1}]}, None),
    ({"efer": 0, "ops": [{"op": "cmpxchg16b", "size": 16}]}, "cmpxchg16b of 16 bytes in 32-bit code: there is none"),
    ({"efer": 0, "ops": [{"op": "cmpxchg", "size": 4, "value": 1 << 32}]}, "value 0x100000000 is no 32-bit number"),
    ({"efer": 0, "ops": [{"op": "cr3", "addr": 1 << 32}]}, "addr 0x100000000 is no 32-bit number"),
    ({"efer": 0, "ops": [{"op": "read", "size": 4, "addr": 0xFFFFFFFD}]}, "leaves the 4 GiB of a 32-bit guest"),
    ({"efer": 0, "ops": [{"op": "rep", "size": 4, "addr": 0xFFFFFFF0, "value": 5}]}, "leaves the 4 GiB"),
    ({"efer": 0, "ops": [{"op": "efer", "value": 0x100}]}, "long mode .bit 8. is entered by the host only"),
    ({"manual_dirty": 2}, "manual_dirty 2: there are 0, 1, 3"),
    ({"ops": [{"op": "hwrite", "size": 5}]}, "host's write of 5 bytes"),
    ({"ops": [{"op": "read", "addr": -1}]}, "addr -1 is no 64-bit number"),
    ({"ops": {"count": 2, "names": ["read"], "op": "0"}}, "a column has 1 numbers instead of 2"),
    ({"vcpus": 9}, "vcpus 9: 1 to 8 are possible"),
    ({"memory": 5000}, "memory 5000"),
    ({"pages": {"0x10": {}}}, "page 0x10"),
    ({"pages": {"0x9000000": {}}}, "page 0x9000000 lies in no memslot"),
    ({"answers": [{}, {}]}, "2 answers to 1 operations"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_case_is_refused_with_the_place(tmp_path: Path, change: dict, message: str | None) -> None:
    case = {"memory": 1 << 20, "cr3": 0x10000, "slots": [[0, 0, 1 << 20, 0]], "pages": {}, "ops": [{"op": "read"}]}
    whole = {"schema": change.get("schema", "shadowkvm.case/1")}
    case.update({k: v for k, v in change.items() if k != "schema"})
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**whole, "cases": [case]}))
    if message is None:  # a neighbour of a bad one
        assert len(load(path)) == 1
        return
    with pytest.raises(TraceError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"no", b"[]", lzma.compress(b"{}"), lzma.compress(b"{}" * 99)[:40], b"\xff\xfe"])
def test_what_is_no_case_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(TraceError, match=r"a\.json"):
        load(tmp_path / "a.json")


def test_harness_input() -> None:
    case = generate(3, 40)
    data = case_bytes(case, 40)
    head = struct.unpack_from(HEAD, data)
    assert head[8:11] == (len(case.slots), len(case.pages) + 2, 40)
    assert len(data) == struct.calcsize(HEAD) + 32 * head[8] + 4104 * head[9] + 48 * head[10]
    assert head[13] == 40
    assert IMAGE[:4096] in data


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_harness_reads_what_is_written(tmp_path: Path) -> None:
    """The structures of replay.c are those of wire.py: sizes as its compiler sees them."""
    source = (HARNESS / "replay.c").read_text()
    sizes = 'int main(void) { printf("%zu %zu %zu", sizeof(struct head), sizeof(struct slot), sizeof(struct op)); }'
    (tmp_path / "a.c").write_text(source.replace("int main(", "int unused(") + sizes)
    subprocess.run(["gcc", tmp_path / "a.c", "-o", tmp_path / "a"], check=True)
    said = subprocess.run([tmp_path / "a"], check=True, capture_output=True, text=True).stdout
    assert said == f"{struct.calcsize(HEAD)} 32 {len(op_bytes(Op('read')))}"


def test_harness_output() -> None:
    text = (
        "noise\nCASE /cases/00000\r\nR 0 2 1 ff fe000010 mmio:fe000010:4:0 mmio:fe000010:4:1 pf_taken+2 exits+3\n"
        "R 1 1 7 0 400000 pages_4k-12 mmu_unsync+1\nDONE\nCASE /cases/00001\nERROR no case\nCASE c\nR 0 4 2000 0 0\n"
    )
    (first, _, good), (_, _, refused), (cut, _, ended) = split_cases(text)
    assert first[0] == Answer("mmio", 0, 0xFF, 0xFE000010, [(0xFE000010, 4, 0), (0xFE000010, 4, 1)], {"pf_taken": 2})
    assert first[1] == Answer("page_fault", 7, 0, 0x400000, [], {"pages_4k": -12, "mmu_unsync": 1})
    assert (good, refused, ended) == ("", "no case", "the harness did not end")

    def case(*ops: str) -> Case:
        return Case(1 << 20, [Slot(0, 0, 1 << 20)], 0x10000, [Op(op) for op in ops])

    assert usable(cut, case("read")) == (0, "the guest stopped (0x2000)")
    failed = [Answer(), Answer(counters={"insn_emulation_fail": 1})]
    assert usable(failed, case("read", "read")) == (1, "KVM could not emulate")
    twice = [Answer(counters={"insn_emulation": 2})]
    assert usable(twice, case("read")) == (1, "")
    assert usable(twice, case("fetch")) == (0, "the guest ran the bytes of another page")
    # INT 0x80 of a 32-bit guest is decoded again if its delivery faulted.
    again = [Answer(counters={"insn_emulation": 2, "pf_fixed": 1})]
    assert usable(again, case("fetch")) == (0, "the guest ran the bytes of another page")
    assert usable(again, replace(case("fetch"), efer=0)) == (1, "")


def test_harness_traces() -> None:
    lines = [
        "CASE /cases/00000",
        "R 0 0 0 0 0",
        "DONE",
        "# tracer: nop",
        "  replay-90   [000] .....     5.1: tracing_mark_write: op 0",
        "  replay-90   [000] .....     5.2: kvm_exit: vcpu 0 reason hlt rip 0x7000 info1 0x0",
        "  replay-90   [000] .....     5.3: tracing_mark_write: op 1",
    ]
    ((_, events, _),) = split_cases("\n".join(lines))
    assert events == [["kvm_exit: vcpu 0 reason hlt rip 0x7000 info1 0x0"], []]


def test_stubs_are_where_the_labels_say() -> None:
    rip, end, setup = stub_of(Op("write", size=4, cpl=3))
    assert rip == LABELS[64]["u_write4"]
    assert IMAGE[rip - 0x7000 : end - 0x7000] == bytes.fromhex("8913")  # mov %edx, (%rbx)
    assert setup == 0
    assert stub_of(Op("rep"))[2] > 0
    for bits, code in ((64, "f04809 13"), (32, "f00913")):
        locked, plain = (stub_of(Op("or", size=bits // 8, flags=flags), bits) for flags in (0, 1))
        assert IMAGE[locked[0] - 0x7000 : locked[1] - 0x7000] == bytes.fromhex(code)
        assert IMAGE[plain[0] - 0x7000 : plain[1] - 0x7000] == bytes.fromhex(code)[1:]


def test_there_is_a_stub_for_every_operation_of_the_guest() -> None:
    for bits in (64, 32):
        stubs = set()
        for op in GUEST_OPS:
            for size in SIZES.get(op, {}).get(bits, (8,)):
                for cpl in (0,) if op in CONTROL else (0, 3):
                    for flags in (0, 1) if op in LOCKABLE else (0,):
                        stubs.add(stub_of(Op(op, size=size, cpl=cpl, flags=flags), bits)[0])
        code = {label for label in LABELS[bits].values() if label >= LABELS[bits]["k_read1"]}
        assert stubs <= code
        assert len(stubs) == sum(
            len(SIZES.get(op, {}).get(bits, (8,))) * (1 if op in CONTROL else 2) * (2 if op in LOCKABLE else 1)
            for op in GUEST_OPS
        )


@pytest.mark.skipif(not all(map(shutil.which, ("as", "ld", "nm"))), reason="needs binutils")
def test_the_assembled_guest_is_that_of_the_source() -> None:
    assert assemble() == (IMAGE, LABELS)


def test_archive_is_a_newc_archive() -> None:
    data = gzip.decompress(archive({"init": (0o755, b"#!"), "a/b/c": (0o644, b"12345")}))
    names, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        numbers = [int(data[at + 6 + 8 * i :][:8], 16) for i in range(13)]
        mode, size, length = numbers[1], numbers[6], numbers[11]
        name = data[at + 110 : at + 110 + length - 1].decode()
        at += (110 + length + 3) & ~3
        if name == "TRAILER!!!":
            break
        names[name] = (mode, data[at : at + size])
        at += (size + 3) & ~3
    assert names["a/b/c"] == (0o100644, b"12345")
    assert names["a/b"] == (0o040755, b"")
    assert list(names).index("a") < list(names).index("a/b") < list(names).index("a/b/c")
    assert {"proc", "sys", "dev"} < set(names)


def test_slots_of_a_case_are_those_of_the_machine() -> None:
    slots = [Slot(0, 0, 1 << 20), Slot(3, 0x4000000, 0x10000, 2)]
    case = Case(1 << 20, slots, 0x10000, [Op("hwrite", 0x4000008, 7)], pages={0x10000: {0: 5}})
    driver = Driver(case)
    assert driver.step(case.ops[0]) == Answer()
    assert driver.vm.read_memory(0x4000000, 16)[8:] == (7).to_bytes(8, "little")
    assert driver.vm.read_memory(0x10000, 8) == (5).to_bytes(8, "little")
