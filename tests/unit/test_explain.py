"""Stories: what is told is what happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.guest import reads

import shadowkvm as sk
from shadowkvm.explain import DEMOS, Story, demo, explain, explain_row, html

Shell = Callable[..., tuple[int, str, str]]
RECORDING = "examples/recordings/fork20-demote64.npz"


def stories(name: str) -> list[Story]:
    vm, acts = demo(name)
    return [explain(vm, act.call, act.title) for act in acts]


def functions(story: Story) -> list[str]:
    return [step.function for step in story.steps if step.function]


@pytest.mark.parametrize("name", DEMOS)
def test_the_story_is_what_the_counters_say(name: str) -> None:
    """The same operation on another VM of the kind, without a story, moves the same counters."""
    (vm, acts), told = demo(name), stories(name)
    for act, story in zip(acts, told, strict=True):
        before = vm.counters
        assert act.call().status == story.outcome
        assert vm.counters - before == story.counters
        assert story.title == act.title
        assert story.steps[-1].who == "guest"


def test_a_first_touch() -> None:
    (story,) = stories("first_touch")
    assert functions(story) == [
        "kvm_mmu_get_page", "kvm_mmu_page_fault", "FNAME(walk_addr_generic)", "FNAME(update_accessed_dirty_bits)",
        "kvm_mmu_get_page", "kvm_mmu_get_page", "kvm_mmu_get_page", "FNAME(fetch)", "make_spte", "FNAME(pte_prefetch)",
    ]  # fmt: skip
    walk = next(step for step in story.steps if step.function == "FNAME(walk_addr_generic)")
    assert [(entry.level, entry.index) for entry in walk.entries] == [(4, 0), (3, 0), (2, 0), (1, 256)]
    assert walk.entries[-1].meaning == "maps gfn 0x100, rwxu AD"
    assert sum(change.what == "page made" for change in story.changes) == 4
    assert sum(change.what == "entry" for change in story.changes) == 3 + 8


def test_unsync_and_a_free_store() -> None:
    first, second = stories("unsync")
    assert "mmu_try_to_unsync_pages" in functions(first)
    assert any(change.what == "unsync" and change.after for change in first.changes)
    assert functions(second) == []
    assert second.changes == ()
    assert "nothing stops it" in second.steps[0].text


def test_what_the_others_decide() -> None:
    assert "kvm_sync_page" in functions(stories("resync")[0])
    assert "FNAME(invlpg)" in functions(stories("invlpg")[0])
    (emulated,) = stories("emulated")
    why = next(step.why for step in emulated.steps if step.function == "x86_emulate_instruction")
    assert why == "gfn 0x3 holds a shadowed table of level 2, and upper-level tables stay protected"
    (flood,) = stories("flood")
    why = next(step.why for step in flood.steps if step.function == "kvm_mmu_prepare_zap_page")
    assert why.startswith("3 stores in a row")
    assert [change.what for change in flood.changes] == ["page zapped", "entry"]
    (fault,) = stories("guest_fault")
    assert fault.outcome == "page_fault"
    assert any("not present" in entry.meaning for step in fault.steps for entry in step.entries)
    device, again = stories("mmio")
    assert "mark_mmio_spte" in functions(device)
    assert "handle_mmio_page_fault" in functions(again) or "x86_emulate_instruction" in functions(again)


def test_events_are_as_they_were() -> None:
    """Without events there are none afterwards; with some, they stay and the others are not added."""
    vm, acts = demo("first_touch")
    explain(vm, acts[0].call)
    assert len(vm.events) == 0
    vm, acts = demo("first_touch", events=["kvm_exit"])
    vm.vcpus[0].read(0)
    before = vm.event_text()
    assert len(before) > 0
    explain(vm, acts[0].call)
    assert vm.event_text()[: len(before)] == before
    vm.clear_events()
    vm.vcpus[0].invlpg(0)
    assert {line.split(":")[0] for line in vm.event_text()} == {"kvm_exit"}


def test_a_call_that_raises_leaves_the_choice_of_events() -> None:
    vm, _ = demo("first_touch")
    with pytest.raises(sk.ConfigError):
        explain(vm, lambda: vm.vcpus[0].read(-1))
    vm.vcpus[0].read(0)
    assert len(vm.events) == 0


def test_a_row_of_a_recording() -> None:
    """A row that faults in a replay faults in its story, with the same counters in all."""
    with sk.Recording.open(RECORDING) as recording:
        arrays = recording.to_arrays()
        meta = recording.meta
        rows = arrays.rows[:3000]
        vm = sk.Vm(meta["memory"])
        part = sk.Recording.from_arrays(
            rows, pages=b"".join(recording.pages), memory=meta["memory"], sregs=meta["sregs"]
        )
        outcomes = vm.run(part, outcomes=True).outcomes
        assert outcomes is not None
        number = int(np.flatnonzero(outcomes["status"] == sk.STATUS_NAMES.index("page_fault"))[0])
        story = explain_row(part, number)
    assert story.outcome == "page_fault"
    assert story.counters["pf_guest"] == 1
    assert story.title.startswith(f"Row {number:,}: ")


def test_bad_rows() -> None:
    with pytest.raises(sk.ConfigError, match="row 5: the trace has rows 0 to 4"):
        explain_row(reads(5), 5)
    with pytest.raises(sk.ConfigError, match="did you mean 'unsync'"):
        demo("unsnc")


def test_the_page() -> None:
    page = html(stories("unsync"))
    assert page.startswith("<!doctype html>")
    assert "http" not in page
    assert page.count("class=changed") > 8
    assert "mmu_try_to_unsync_pages" in page


def test_the_verb(shell: Shell, tmp_path: Path) -> None:
    status, out, err = shell("explain", "demo", "flood")
    assert (status, err) == (0, "")
    assert "kvm_mmu_prepare_zap_page" in out
    said = json.loads(shell("explain", "demo", "unsync", "--format", "json")[1])
    assert [story["schema"] for story in said] == ["shadowkvm.explain/1"] * 2
    file = tmp_path / "story.html"
    assert shell("explain", RECORDING, "1000", "--count", "2", "-o", str(file)) == (0, "", "")
    assert file.read_text().count("<ol>") == 2
    assert "emulated" not in shell("explain", "demo", "emulated", "--policy", "kvm")[2]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["demo", "unsnc"], 2, "did you mean 'unsync'"),
        (["nowhere.npz", "1"], 3, "nowhere.npz"),
        ([RECORDING, "x"], 2, "row 'x'"),
        ([RECORDING, "999999"], 2, "the trace has rows 0 to"),
        (["demo", "unsync", "--count", "0"], 2, "--count 0"),
        (["demo", "unsync", "--policy", "no"], 2, "policy 'no'"),
    ],
)
def test_refusals(shell: Shell, arguments: list[str], status: int, message: str) -> None:
    got, out, err = shell("explain", *arguments)
    assert (got, out) == (status, "")
    assert message in err
