"""The model against a real Linux: what one fork, exec and exit costs, in examples/recordings and in exec_storm.

The recording is another program on a kernel with everything in it; so what is held are factors, and the reasons for
what differs are in docs/workloads.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import shadowkvm as sk
from shadowkvm.replay import Replay, replay
from shadowkvm.report import rates
from shadowkvm.workloads import get

RECORDING = Path(__file__).parents[2] / "examples" / "recordings" / "fork20-demote64.npz"
ROUNDS = 20


def each(done: Replay) -> dict[str, float]:
    """Rates of the report, for each of the 20 rounds."""
    return {rate.name: rate.total / ROUNDS for rate in rates(done)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], dict[str, float]]:
    path = tmp_path_factory.mktemp("model") / "exec.npz"
    get("exec_storm").build(execs=ROUNDS).record(path)
    with sk.Recording.open(RECORDING) as real, sk.Recording.open(path) as model:
        return each(replay(real)), each(replay(model))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        # The calls are the same, so are their flushes.
        ("cr3_loads", 0.9, 1.05),
        # Copies on write, each flushed by one INVLPG.
        ("invlpg", 0.6, 1.1),
        # The guest's own faults: pages of the program, copies, new pages.
        ("pf_guest", 0.7, 1.1),
        ("pf_fixed", 0.65, 1.1),
        # A new top table finds the kernel's half shadowed already: a fault for each of its regions that is used.
        ("pf_spurious", 0.7, 1.3),
        # Tables of two address spaces, made and zapped.
        ("mmu_cache_miss", 0.6, 1.1),
        ("mmu_shadow_zapped", 0.7, 1.1),
        ("unsync", 0.5, 1.1),
        ("unsync_zapped", 0.6, 1.2),
        ("exits", 0.65, 1.1),
        ("tlb_flush", 0.65, 1.1),
    ],
)
def test_a_round_costs_about_what_it_costs_a_real_linux(
    both: tuple[dict[str, float], dict[str, float]], name: str, low: float, high: float
) -> None:
    real, model = both
    assert low <= model[name] / real[name] <= high, (model[name], real[name])


def test_what_floods_in_the_recording_is_unprotected_here(both: tuple[dict[str, float], dict[str, float]]) -> None:
    """Frames of old tables are zeroed by a string instruction, which KVM tries again once it has zapped the page.

    The recorder saw its stores one by one, so that they look like MOV: two are emulated, the third floods.
    """
    real, model = both
    assert model["mmu_flooded"] == 0
    assert real["mmu_flooded"] == pytest.approx(model["pf_emulate"] - model["mmu_pte_write"], rel=0.35)
    # Without those three stores for each flooded page, what is left are the entries of upper tables.
    assert real["pf_emulate"] - 3 * real["mmu_flooded"] < model["mmu_pte_write"]
