"""Cases: made, checked, written, read, and put into the form that the harness reads."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from shadowkvm.errors import TraceError
from shadowkvm.kvm import Answer, Case, Op, Slot, generate, load, save
from shadowkvm.kvm.driver import Driver
from shadowkvm.kvm.generate import THEMES
from shadowkvm.kvm.initramfs import archive
from shadowkvm.kvm.layout import IMAGE, LABELS, assemble, stub_of
from shadowkvm.kvm.record import usable
from shadowkvm.kvm.wire import case_bytes, split_cases


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
    assert statuses <= {"done", "page_fault", "mmio", "general_protection"}


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
    ({"ops": [{"op": "read", "size": 3}]}, "read of 3 bytes: there are 1, 2, 4, 8"),
    ({"ops": [{"op": "read"}, {"op": "read", "vcpu": 1}]}, "row 1: vcpu 1: the case has 1"),
    ({"ops": [{"op": "read", "cpl": 1}]}, "cpl 1: there are 0 and 3"),
    ({"ops": [{"op": "invlpg", "cpl": 3}]}, "invlpg at CPL 3"),
    ({"ops": [{"op": "push"}]}, "push at CPL 0"),
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
def test_a_bad_case_is_refused_with_the_place(tmp_path: Path, change: dict, message: str) -> None:
    case = {"memory": 1 << 20, "cr3": 0x10000, "slots": [[0, 0, 1 << 20, 0]], "pages": {}, "ops": [{"op": "read"}]}
    whole = {"schema": change.get("schema", "shadowkvm.case/1")}
    case.update({k: v for k, v in change.items() if k != "schema"})
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**whole, "cases": [case]}))
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
    head = struct.unpack_from("<17Q", data)
    assert head[8:11] == (len(case.slots), len(case.pages) + 2, 40)
    assert len(data) == 17 * 8 + 32 * head[8] + 4104 * head[9] + 40 * head[10]
    assert head[16] == 40
    assert IMAGE[:4096] in data


def test_harness_output() -> None:
    text = (
        "noise\nCASE /cases/00000\r\nR 0 2 1 ff fe000010 mmio:fe000010:4:0 mmio:fe000010:4:1 pf_taken+2 exits+3\n"
        "R 1 1 7 0 400000 pages_4k-12 mmu_unsync+1\nDONE\nCASE /cases/00001\nERROR no case\nCASE c\nR 0 4 2000 0 0\n"
    )
    (first, _, good), (_, _, refused), (cut, _, ended) = split_cases(text)
    assert first[0] == Answer("mmio", 0, 0xFF, 0xFE000010, [(0xFE000010, 4, 0), (0xFE000010, 4, 1)], {"pf_taken": 2})
    assert first[1] == Answer("page_fault", 7, 0, 0x400000, [], {"pages_4k": -12, "mmu_unsync": 1})
    assert (good, refused, ended) == ("", "no case", "the harness did not end")
    assert usable(cut, [Op("read")]) == (0, "the guest stopped (0x2000)")
    failed = [Answer(), Answer(counters={"insn_emulation_fail": 1})]
    assert usable(failed, [Op("read")] * 2) == (1, "KVM could not emulate")
    twice = [Answer(counters={"insn_emulation": 2})]
    assert usable(twice, [Op("read")]) == (1, "")
    assert usable(twice, [Op("fetch")]) == (0, "the guest ran the bytes of another page")


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
    assert rip == LABELS["u_write4"]
    assert IMAGE[rip - 0x7000 : end - 0x7000] == bytes.fromhex("8913")  # mov %edx, (%rbx)
    assert setup == 0
    assert stub_of(Op("rep"))[2] > 0


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
