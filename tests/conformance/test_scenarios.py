"""Every recorded run of real KVM, replayed: counters, events, dirty logs and final tables must be KVM's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tests.conformance.compare import diff_events, diff_stages, diff_tables, op_at, side_by_side
from tests.conformance.corpus import load
from tests.conformance.driver import Result, run_scenario
from tests.conformance.skips import NOT_RECORDED, SKIPPED

sk: Any = pytest.importorskip("shadowkvm")

SCENARIOS = load().scenarios
RUN = list(SCENARIOS)


@cache
def run(ident: str) -> Result:
    return run_scenario(sk, SCENARIOS[ident], marks=True)


def skip_if_listed(ident: str, check: str) -> None:
    reasons = SKIPPED.get(ident, {})
    if reason := reasons.get("run") or reasons.get(check):
        pytest.skip(reason)


@pytest.mark.parametrize("ident", RUN)
def test_counters(ident: str) -> None:
    """Every counter, after each action of user space and at the end."""
    skip_if_listed(ident, "counters")
    scenario, result = SCENARIOS[ident], run(ident)
    differences = diff_stages(scenario, result)
    assert not differences, f"{ident} {scenario.name}\n" + "\n".join(differences)


@pytest.mark.parametrize("ident", RUN)
def test_guest_and_host_see_the_same(ident: str) -> None:
    """Where the guest stopped, the #PFs it took, and what GET_DIRTY_LOG answered."""
    skip_if_listed(ident, "run")
    scenario, result = SCENARIOS[ident], run(ident)
    end = scenario.end
    assert (result.op, len(result.faults), result.shutdown) == (end["op"], scenario.faults, end["shutdown"])
    if scenario.is_long:  # the 32-bit program keeps no error code
        assert (result.faults or [0])[-1] == end["error"]
    assert result.dirty == scenario.dirty


@pytest.mark.parametrize("ident", RUN)
def test_events(ident: str) -> None:
    """The event stream: order and fields; host frames and table addresses as "same or not"."""
    skip_if_listed(ident, "events")
    scenario, result = SCENARIOS[ident], run(ident)
    diff = diff_events(scenario, result.events)
    if diff is not None:
        pytest.fail(f"{ident} {scenario.name}, in {op_at(scenario, result, diff)}\n{side_by_side(diff)}", pytrace=False)


@pytest.mark.parametrize("ident", RUN)
def test_final_tables(ident: str) -> None:
    """Leaf entries at the end: rights, accessed and dirty bits, software bits; MMIO entries whole."""
    skip_if_listed(ident, "tables")
    scenario, result = SCENARIOS[ident], run(ident)
    differences = diff_tables(scenario, result.vm)
    assert not differences, f"{ident} {scenario.name}\n" + "\n".join(differences)


@pytest.mark.parametrize("ident", RUN)
def test_state_is_sound_at_the_end(ident: str) -> None:
    skip_if_listed(ident, "run")
    run(ident).vm.audit()


def test_lists_are_complete() -> None:
    assert len(SCENARIOS) == 91
    assert set(load().not_in_corpus) == set(NOT_RECORDED)
    assert set(SKIPPED) <= set(RUN)
