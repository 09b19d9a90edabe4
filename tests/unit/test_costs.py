"""Cost tables and accounts: every figure has a source, every exit a cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import shadowkvm as sk
from shadowkvm.costs import CAUSES, COST_INFO, PRESETS, Account, account, load_costs
from shadowkvm.costs.account import Events, nested_events, shadow_events
from shadowkvm.mmus import Mmu
from shadowkvm.pagetables import make_rows
from shadowkvm.workloads import entries, get

Shell = Callable[..., tuple[int, str, str]]

MINE = """
schema = "shadowkvm.costs/1"
title = "mine"
base = "zen3"

[cost.exit]
cycles = 1000
source = "a guess"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_say_where_figures_come_from(name: str) -> None:
    costs = load_costs(name)
    assert list(costs.costs) == list(COST_INFO)
    assert all(len(cost.source) > 20 or cost.source.startswith("as exit") for cost in costs.costs.values())
    assert "TO BE" not in json.dumps(costs.to_dict())
    assert costs["nested_exit"] >= costs["exit"] > costs["walk_reference"] > 0


def test_a_table_on_top_of_a_preset(tmp_path: Path) -> None:
    mine, base = load_costs(write(tmp_path, MINE)), load_costs("zen3")
    assert (mine.name, mine.title, mine["exit"]) == ("mine", "mine", 1000)
    assert mine["nested_exit"] == base["nested_exit"]
    assert mine.ns(2850) == pytest.approx(1000)


def test_units(tmp_path: Path) -> None:
    more = (
        "[clock]\nghz = 2\nsource = 'x'\n[cost.instruction]\nns = 3\nsource = 'x'\n"
        "[cost.user_exit]\nns = 5\nsource = 'x'\n"
    )
    costs = load_costs(write(tmp_path, MINE + more))
    assert costs["user_exit"] == 10
    assert costs["instruction"] == 6
    assert costs["shadow_fault"] == 4033 * 6
    assert costs["exit"] == 1000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda text: text + "[cost.exitt]\ncycles = 1\nsource = 'x'\n",
            r"key 'exitt' is not known; did you mean 'exit'",
        ),
        (lambda text: text.replace("cycles = 1000", ""), r"cost\.exit: one of cycles, ns, instructions is expected"),
        (lambda text: text.replace("1000", "1000\nns = 4"), r"there are cycles and ns"),
        (lambda text: text.replace("1000", "-1"), r"cost\.exit: cycles: -1\.?0?; a number from 0"),
        (lambda text: text.replace("1000", "nan"), r"cost\.exit: cycles: nan"),
        (lambda text: text.replace("1000", "'many'"), r"cost\.exit: cycles: 'many'"),
        (lambda text: text.replace("1000", "true"), r"cost\.exit: cycles: True"),
        (lambda text: text.replace('source = "a guess"', ""), r"cost\.exit: source: None; some text"),
        (lambda text: text.replace('"a guess"', '" "'), r"cost\.exit: source"),
        (lambda text: text.replace("zen3", "zen4"), r"base 'zen4' is not known; did you mean 'zen3'"),
        (lambda text: text.replace("costs/1", "costs/9"), r"schema 'shadowkvm.costs/9'"),
        (lambda text: text.replace('base = "zen3"', 'base = "linux-6.1"'), r"clock, cost\.nested_exit missing"),
        (lambda text: text.replace('base = "zen3"', ""), r"cost\.shadow_fault.* missing"),
        (lambda text: text + "[clock]\nghz = 0\nsource = 'x'\n", r"clock: ghz: 0"),
        (lambda text: text + "[\n[cost]\n", r"no TOML: .*line 9"),
        (lambda text: text.replace("[cost.exit]", "[[cost.exit]]"), r"a table is expected"),
        (lambda text: text.replace("1000", "1" * 5000), r"no TOML: .*digits"),
        (lambda text: text.replace("1000", "1" * 4000), r"cost\.exit: cycles: 1{10,20}\.\.\."),
        (lambda text: text + "x = " + "[" * 5000, r"no TOML: "),
        (lambda text: text + "[cost.instruction]\ninstructions = 1\nsource = 'x'\n", r"instruction is given in instru"),
    ],
)
def test_broken_tables(tmp_path: Path, shell: Shell, change: Callable[[str], str], told: str) -> None:
    path = write(tmp_path, change(MINE))
    with pytest.raises(sk.CostError, match=told) as raised:
        load_costs(path)
    assert "mine" in str(raised.value)
    status, out, err = shell("costs", "show", path)
    assert (status, out) == (3, "")
    assert err.startswith("shadowkvm: ")


def test_tables_that_are_not_there(tmp_path: Path, shell: Shell) -> None:
    with pytest.raises(sk.ConfigError, match="did you mean 'zen3'"):
        load_costs("zen33")
    with pytest.raises(FileNotFoundError):
        load_costs(tmp_path / "none.toml")
    assert shell("costs", "show", tmp_path / "none.toml")[0] == 3
    assert shell("costs", "show", "zen33")[0] == 2
    (tmp_path / "odd.toml").write_bytes(b"\xff")
    with pytest.raises(sk.CostError, match="no UTF-8 at byte 0"):
        load_costs(tmp_path / "odd.toml")


def events(name: str, mmu: str) -> Events:
    scenario = get(name).build(scale=0.05)
    vm = scenario.vm()
    Mmu.parse(mmu).set(vm)
    ran = scenario.run(vm)
    return shadow_events(ran.counters, ran.ops, vm.tlb) if vm.nested is None else nested_events(vm.nested, ran.ops)


@pytest.mark.parametrize("mmu", ["shadow", "nested", "agile"])
@pytest.mark.parametrize("name", [entry.name for entry in entries()])
def test_every_exit_has_one_cause(name: str, mmu: str) -> None:
    found = events(name, mmu)
    assert all(count >= 0 for count in found.counts.values()), found
    assert sum(found.counts.get(exit_, 0) for cause in CAUSES for exit_ in cause.exits) == found.exits
    done = account(found, load_costs())
    assert sum(share.exits for share in done.shares) == found.exits
    assert sum(done.share(cause.name) for cause in CAUSES) == pytest.approx(1)
    # No workload turns paging off or halts but for its devices: what is left over is a few instructions tried again.
    assert found.counts["other_exit"] <= found.exits / 10 + 8, found


def row_by_row(vm: sk.Vm, rows: NDArray[np.void]) -> None:
    """Every step has its exits and no other: nothing negative, nothing left over."""
    before = vm.counters
    for at in range(len(rows)):
        vm.run(rows[at : at + 1])
        ops = {sk.Op(int(rows["op"][at])).name: 1}
        found = shadow_events(vm.counters - before, ops, None)
        before = vm.counters
        assert all(count >= 0 for count in found.counts.values()), (rows[at], found)
        # An MMIO entry that turns out to be stale is an exit of its own before the access runs again.
        assert found.counts["other_exit"] <= 1, (rows[at], found)


def test_exits_of_odd_accesses(one_frame_guest: Callable[[], sk.Vm]) -> None:
    """Devices, read-only memory, operands on two pages, faults in the middle, the dirty log, paging off."""
    vm = one_frame_guest()
    vm.add_slot(1, 1 << 30, 1 << 20, readonly=True)
    entries_ = {0: 0x10067, 1: 0x4000_0067, 2: 0x8000_0067, 3: 0, 4: 0x4067, 5: 0x3067}
    for page, entry in entries_.items():
        vm.write_memory(0x4000 + 8 * page, entry.to_bytes(8, "little"))
    random = np.random.default_rng(5)
    ops = random.choice([sk.Op.READ, sk.Op.WRITE, sk.Op.XCHG, sk.Op.INVLPG, sk.Op.FETCH, sk.Op.STORE], 400)
    pages, offsets = random.integers(0, 6, 400), random.choice([0, 8, 0x800, 0xFFC], 400)
    rows = make_rows(ops, (pages << 12) + offsets, random.choice(list(entries_.values()), 400))
    row_by_row(vm, rows)
    off = sk.Vm(memory=16 << 20)
    off.vcpus[0].set_sregs(cr0=0x10, cr4=0, efer=0)
    writes = make_rows(sk.Op.WRITE, np.arange(8) << 12)
    row_by_row(off, writes)
    off.set_dirty_log(0, True)
    row_by_row(off, writes)
    off.get_dirty_log(0)
    row_by_row(off, writes)
    assert off.counters["pf_fast"] > 0


def test_time_is_a_line_in_every_cost() -> None:
    found = events("fork_exit", "shadow")
    cheap, dear = load_costs("zen3"), load_costs("nehalem")
    done = account(found, cheap)
    fixed, slope = done.line("exit")
    assert slope == found.exits
    assert fixed + slope * cheap["exit"] == pytest.approx(done.cycles)
    # The two differ in what an exit takes and in nothing else that happened here.
    assert fixed + slope * dear["exit"] == pytest.approx(account(found, dear).cycles)
    for name in ("exits", "nested_exit", "instruction"):
        with pytest.raises(sk.ConfigError, match="is not known"):
            done.line(name)
    fixed, slope = done.line("walk_reference")
    assert slope == found.counts["walk_reference"] > 0
    assert Account(found, cheap, ()).seconds == 0


def test_lists_and_shows(shell: Shell) -> None:
    assert [row["name"] for row in json.loads(shell("costs", "list", "--format", "json")[1])["costs"]] == list(PRESETS)
    told = json.loads(shell("costs", "show", "pvm", "--format", "json")[1])
    assert told["costs"]["nested_exit"]["cycles"] == 16002
    text = shell("costs", "show", "pvm")[1]
    assert "JANUS (OSDI 2026)" in text
    assert [row["name"] for row in json.loads(shell("costs", "mmus", "--format", "json")[1])["mmus"]][:4] == [
        "shadow",
        "nested",
        "agile",
        ":cold",
    ]


@pytest.mark.parametrize("name", ["shadow", "nested", "nested:warm:2m:nopwc", "agile:interval=5", "shadow:nopwc"])
def test_names_of_mmus_come_back(name: str) -> None:
    assert str(Mmu.parse(name)) == name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nestde", "did you mean 'nested'"),
        ("nested:wram", "did you mean 'warm'"),
        ("nested:warm:cold", "says again"),
        ("nested:interval=4", "for agile"),
        ("agile:interval=0", "at least 1"),
        ("agile:interval=x", "at least 1"),
        ("shadow:warm", "no second stage"),
        ("", "is not known"),
    ],
)
def test_mmus_that_are_none(name: str, told: str) -> None:
    with pytest.raises(sk.ConfigError, match=told):
        Mmu.parse(name)
