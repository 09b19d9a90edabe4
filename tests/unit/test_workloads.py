"""Workloads as such: parameters, scenarios that are the same each time, registry, recordings; all of them audited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shadowkvm as sk
from shadowkvm.guest import Linux, pages
from shadowkvm.replay import replay
from shadowkvm.workloads import (
    GROUP,
    GUEST_PARAMETERS,
    HostAct,
    Parameter,
    Scenario,
    Step,
    Values,
    Workload,
    entries,
    get,
)

NAMES = [entry.name for entry in entries() if entry.origin == "shadowkvm"]
SMALL: dict[str, Any] = {"scale": 0.02}


def audit(vm: sk.Vm, step: Step) -> None:
    del step
    vm.audit()


# -- every workload ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_workload_runs_under_the_audit(name: str) -> None:
    scenario = get(name).build(**SMALL)
    result = scenario.run(each=audit)
    assert result.mismatches == 0
    assert result.units == pytest.approx(scenario.total), "the steps hold all the work that is announced"
    assert result.counters["exits"] > 0


@pytest.mark.parametrize(
    "options",
    [{"policy": "no_unsync"}, {"policy": "zap_on_write"}, {"policy": "no_prefetch"}, {"model_version": "linux-6.12"}],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.parametrize("name", NAMES)
def test_the_guest_sees_the_same_under_every_policy_and_kernel(name: str, options: dict[str, Any]) -> None:
    result = get(name).build(**SMALL).run(each=audit, **options)
    assert result.mismatches == 0
    assert result.policy == options.get("policy", "kvm")
    assert result.model_version == options.get("model_version", sk.model_version)


@pytest.mark.parametrize(
    "guest",
    [
        {"mode": "5-level"},
        {"mode": "pae"},
        {"mode": "32-bit"},
        {"kpti": True, "pcid": True},
        {"direct_page": 4096, "table_grace": 20, "reuse": "fifo"},
        {"host": "absent"},
    ],
    ids=lambda guest: "-".join(map(str, guest.values())),
)
@pytest.mark.parametrize("name", NAMES)
def test_every_workload_runs_on_every_guest(name: str, guest: dict[str, Any]) -> None:
    workload = get(name)
    own = {key: value for key, value in guest.items() if key in workload.all_parameters}
    if name == "huge_pages" and guest.get("mode") == "32-bit":
        with pytest.raises(sk.ConfigError, match="huge pages are for private anonymous memory, in modes with 2 MiB"):
            workload.build(**SMALL, **own).run()
        return
    result = workload.build(**SMALL, **own).run(each=audit)
    assert result.mismatches == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_says_what_it_is(name: str) -> None:
    workload = get(name)
    assert workload.name == name
    assert workload.summary[0].islower()
    assert len(workload.stresses) > 100
    assert len(workload.look_for) >= 3
    assert any(parameter.scaled for parameter in workload.parameters)
    assert all(parameter.doc for parameter in workload.all_parameters.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_is_the_same_trace(name: str) -> None:
    first, second = (get(name).build(seed=7, **SMALL).trace() for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", ["fork_exit", "context_switch", "nested_tables", "live_migration"])
def test_another_seed_is_another_trace(name: str) -> None:
    assert get(name).build(seed=7, **SMALL).trace().tobytes() != get(name).build(seed=8, **SMALL).trace().tobytes()


# -- scenarios --------------------------------------------------------------------------------------------------------


def test_a_scenario_runs_again_and_again() -> None:
    scenario = get("fork_exit").build(scale=0.1)
    results = [scenario.run() for _ in range(3)]
    assert results[0].counters == results[1].counters == results[2].counters
    assert [list(result.phases) for result in results] == [["start", "fork", "child", "exit", "parent"]] * 3


def test_more_scale_is_more_of_the_same() -> None:
    small, large = (get("fork_exit").build(scale=scale).run() for scale in (0.2, 0.6))
    assert (small.units, large.units) == (10, 30)
    assert large.per_unit("pf_guest") == pytest.approx(small.per_unit("pf_guest"), rel=0.05)


def test_phases_add_up() -> None:
    result = get("exec_storm").build(scale=0.1).run()
    for name, value in result.counters.items():
        parts = [phase.counters[name] for phase in result.phases.values()]
        kind = sk.COUNTER_INFO[name].kind
        assert value == (max(parts) if kind == "peak" else sum(parts)), name
    assert result.rows == sum(result.ops.values()) == sum(phase.rows for phase in result.phases.values())
    text = result.to_dict()
    assert text["counters"]["exits"] == sum(phase["counters"]["exits"] for phase in text["phases"].values())
    assert "exec_storm" in repr(result)
    assert "<table>" in result._repr_html_()


def test_a_vm_of_ones_own() -> None:
    scenario = get("context_switch").build(scale=0.05)
    vm = scenario.vm(policy="no_prefetch", events=["kvm_exit"])
    vm.set_page_quota(64)
    result = scenario.run(vm)
    assert (result.policy, result.counters["mmu_recycled"] > 0) == ("no_prefetch", True)
    assert len(vm.events) > 0
    with pytest.raises(sk.ConfigError, match="run: policy is for a fresh VM, and one was given"):
        scenario.run(vm, policy="kvm")


def test_progress_goes_to_the_end() -> None:
    seen: list[tuple[float, float]] = []
    get("cow_storm").build(scale=0.5, pages=16).run(progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 64)
    assert seen[-1] == (64, 64)
    assert sorted(seen) == seen


@pytest.mark.parametrize(("name", "cpus"), [("fork_exit", 1), ("shootdown", 2)])
def test_a_workload_as_a_recording(name: str, cpus: int, tmp_path: Path) -> None:
    scenario = get(name).build(scale=0.05, cpus=cpus)
    scenario.record(tmp_path / "x.npz")
    with sk.Recording.open(tmp_path / "x.npz") as recording:
        assert (recording.meta["name"], recording.meta["vcpus"]) == (name, cpus)
        done = replay(recording)
    assert done.mismatches == 0
    result = scenario.run()
    # PAGE rows are operations; the second CPU loads its registers by itself, with roots that the state lacks.
    apart = (
        {"x_ops"} if cpus == 1 else {"x_ops", "exits", "tlb_flush", "mmu_cache_miss", "max_mmu_page_hash_collisions"}
    )
    for counter in set(result.counters) - apart:
        assert done.result.counters[counter] == result.counters[counter], counter


def test_host_acts_are_rows_too() -> None:
    scenario = get("live_migration").build(scale=0.2, memory_pages=64, dirtied=8)
    by_steps = scenario.run()
    vm = scenario.vm()
    by_rows = vm.run(scenario.trace(), outcomes=True)
    for name in ("pf_fixed", "remote_tlb_flush_requests", "pages_4k"):
        assert by_rows.counters[name] == by_steps.counters[name], name
    acts = [
        HostAct("add_slot", (3, 1 << 32, 1 << 20)),
        HostAct("notifier_unmap", (0, 4096)),
        HostAct("delete_slot", (3,)),
        HostAct("set_page_quota", (100,)),
    ]
    one, other = sk.Vm(1 << 20), sk.Vm(1 << 20)
    for act in acts:
        assert act.apply(one) == 0
        other.run(act.row())
    assert {**one.counters, "x_ops": 0} == {**other.counters, "x_ops": 0}
    with pytest.raises(sk.ConfigError, match="the host cannot 'get_log'; did you mean 'get_dirty_log'"):
        HostAct("get_log", (0,))


def test_a_recording_cannot_hold_the_state_of_the_host(tmp_path: Path) -> None:
    with pytest.raises(sk.ConfigError, match="host 'absent': a recording cannot hold that"):
        get("mmap_cycle").build(scale=0.05, host="absent").record(tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        (Parameter("n", "", 1), "0x10", 16),
        (Parameter("n", "", 1, unit="bytes"), "64 MiB", 64 << 20),
        (Parameter("n", "", 1, unit="bytes"), "3k", 3072),
        (Parameter("n", "", 0.5), "0.25", 0.25),
        (Parameter("n", "", default=False), "Yes", True),
        (Parameter("n", "", default=True), "0", False),
        (Parameter("n", "", "a", choices=("a", "b")), "b", "b"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_text_becomes_a_value(parameter: Parameter, text: str, value: Any) -> None:
    read = parameter.parse(text)
    assert (read, type(read)) == (value, type(value))
    assert parameter.parse(parameter.show(value)) == value


@pytest.mark.parametrize(
    ("parameter", "text", "message"),
    [
        (Parameter("n", "", 1), "64M", "n '64M' is no whole number"),
        (Parameter("n", "", 1, unit="bytes"), "many", "n 'many' is no whole number, such as 64M"),
        (Parameter("n", "", 1, low=1), "0", "n 0 is below 1"),
        (Parameter("n", "", 1, high=1 << 20, unit="bytes"), "2M", "n 2M is above 1M"),
        (Parameter("n", "", 0.5), "half", "n 'half' is no number"),
        (Parameter("n", "", 0.5, high=1.0), "1.5", "n 1.5 is above 1.0"),
        (Parameter("n", "", default=False), "maybe", "n 'maybe' is neither true nor false"),
        (Parameter("n", "", "a", choices=("a", "bcd")), "bc", "n 'bc' is not known; did you mean 'bcd'"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_text_that_is_no_value_is_refused(parameter: Parameter, text: str, message: str) -> None:
    with pytest.raises(sk.ConfigError, match=message):
        parameter.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fork": 3}, "workload 'fork_exit' has no parameter 'fork'; did you mean 'forks'"),
        ({"pages": 0}, "pages 0 is below 1"),
        ({"pages": 1.5}, "pages 1.5: int is expected"),
        ({"pages": True}, "pages True: int is expected"),
        ({"kpti": 1}, "kpti 1: bool is expected"),
        ({"mode": "3-level"}, "mode '3-level' is not known"),
        ({"memory": "1G", "mode": "pae"}, "memory 0x40000000: a guest in mode pae has 16 MiB to 896 MiB"),
        ({"memory": (16 << 20) + 4096}, "memory 0x1001000: a guest in mode 4-level has"),
        ({"kpti": True, "mode": "pae"}, "kpti: pae paging cannot have it"),
        ({"pcid": True, "mode": "32-bit"}, "pcid: 32-bit paging has none"),
        ({"direct_page": 8192}, "direct_page 0x2000: 4-level paging has"),
        ({"seed": -1}, "seed -1 is not a whole number"),
        ({"seed": 1.0}, "seed 1.0 is not a whole number"),
        ({"scale": 0}, "scale 0 is not from 0.001"),
        ({"cpus": 65}, "cpus 65 is above 64"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(sk.ConfigError, match=message):
        get("fork_exit").build(**arguments)


def test_a_guest_that_is_too_small_says_so() -> None:
    with pytest.raises(sk.GuestMemoryError, match=r"guest memory is used up: .* \(give the guest more memory\)"):
        get("fork_exit").build(scale=0.02, pages=1 << 17).run()


def test_parameters_can_be_text_and_scale_multiplies_defaults_only() -> None:
    scenario = get("mmap_cycle").build(scale=2, chunk="64K", reuse_gpa="no")
    assert (scenario.values.total, scenario.values.chunk, scenario.values.reuse_gpa) == (128 << 20, 65536, False)
    assert get("mmap_cycle").build(scale=2, total="1M").values["total"] == 1 << 20
    assert get("fork_exit").build(scale=0.001).values.forks == 1
    with pytest.raises(AttributeError, match="the workload has no parameter 'x'"):
        _ = scenario.values.x
    assert len(scenario.values) == len(get("mmap_cycle").all_parameters)
    assert "chunk=65536" in repr(scenario.values)


# -- the registry -----------------------------------------------------------------------------------------------------

PLUGIN = """
from shadowkvm.workloads import Parameter, Step, Workload

def body(guest, p):
    process = guest.spawn(guest.program())
    guest.switch(process)
    guest.start()
    for _ in range(p.rounds):
        guest.touch(process, [guest.layout.program], fetch=True)
        yield Step("round", guest.take(), units=1)

good = Workload(name="theirs", summary="fetches a page", stresses="nothing", look_for=("one fault",), body=body,
                parameters=(Parameter("rounds", "times", 3, low=1, scaled=True),), unit="round",
                work=lambda p: float(p.rounds))
number = 7
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution "their-workloads" on the path, with one good workload and several that are not."""
    (tmp_path / "their_workloads.py").write_text(PLUGIN)
    info = tmp_path / "their_workloads-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-workloads\nVersion: 1.0\n")
    points = [
        "theirs = their_workloads:good",
        "other_name = their_workloads:good",
        "number = their_workloads:number",
        "gone = their_workloads:gone",
        "no_module = not_there_at_all:x",
        "fork_exit = their_workloads:good",
    ]
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_other_packages_bring_workloads(distribution: Path) -> None:
    del distribution
    theirs = get("theirs")
    result = theirs.run(scale=2)
    assert (result.units, result.mismatches) == (6, 0)
    # The window of 16 pages is mapped by one fault of the guest, eight by one of the shadow.
    assert result.counters["pf_guest"] == 1
    listed = {(entry.name, entry.origin): entry for entry in entries()}
    assert listed["theirs", "their-workloads"].workload is theirs
    assert get("fork_exit").run(scale=0.02).units == 1, "ours stays ours"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("other_name", "their_workloads:good is the workload 'theirs', not the Workload 'other_name'"),
        ("number", "their_workloads:number is a int, not the Workload 'number'"),
        ("gone", "their_workloads:gone cannot be loaded: AttributeError"),
        ("no_module", "not_there_at_all:x cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_broken_entry_point_breaks_only_itself(distribution: Path, name: str, why: str) -> None:
    del distribution
    with pytest.raises(sk.ConfigError, match=f"workload '{name}' of their-workloads: {why}") as caught:
        get(name)
    assert (caught.value.__cause__ is not None) == ("cannot be loaded" in why)
    assert [entry.name for entry in entries() if entry.workload is not None] == [*NAMES, "theirs"]


def test_a_name_that_is_taken(distribution: Path) -> None:
    del distribution
    [entry] = [entry for entry in entries() if entry.name == "fork_exit" and entry.workload is None]
    assert entry.trouble == "the name is taken by shadowkvm"


def test_an_unknown_workload_has_the_nearest() -> None:
    with pytest.raises(sk.ConfigError, match="workload 'fork_exits' is not known; did you mean 'fork_exit'"):
        get("fork_exits")


# -- workloads of one's own -------------------------------------------------------------------------------------------


def own(body: Any, **fields: Any) -> Workload:
    settings: dict[str, Any] = {
        "name": "own", "summary": "s", "stresses": "s", "look_for": (), "parameters": (), "unit": "step",
        "work": lambda _: 1.0,
    }  # fmt: skip
    return Workload(body=body, **settings | fields)


def test_a_body_must_start_its_guest() -> None:
    def never(guest: Linux, p: Values) -> Iterator[Step]:
        del p
        yield Step("x", guest.take())

    def nothing(guest: Linux, p: Values) -> Iterator[Step]:
        del p
        guest.start()
        return
        yield

    for body in (never, nothing):
        with pytest.raises(sk.ConfigError, match="workload 'own': it never starts its guest, or has no step"):
            own(body).build()


def test_a_model_that_errs_is_found_out() -> None:
    """Rows that claim a fault which the guest's tables do not give are mismatches."""

    def wrong(guest: Linux, p: Values) -> Iterator[Step]:
        del p
        process = guest.spawn()
        guest.switch(process)
        area = guest.mmap(process, 4 * 4096)
        guest.touch(process, pages(area.start, 4), write=True)
        guest.start()
        guest.touch(process, pages(area.start, 4))
        rows = guest.take()
        rows["flags"] |= int(sk.Flag.FAULTS)
        yield Step("x", rows, units=1)

    result = own(wrong).run()
    assert result.mismatches == 4


def test_settings_of_the_guest_have_defaults_that_are_parameters() -> None:
    names = {parameter.name for parameter in GUEST_PARAMETERS}
    assert names - {"host"} == set(get("fork_exit").guest_settings)
    assert isinstance(get("fork_exit").build(scale=0.02), Scenario)
    image = get("fork_exit").build(scale=0.02).image
    assert all(gpa % 4096 == 0 and len(content) == 4096 for gpa, content in image)
    assert sorted(gpa for gpa, _ in image) == [gpa for gpa, _ in image]
    assert np.array([gpa for gpa, _ in image]).max() < 256 << 20
