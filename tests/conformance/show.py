"""Show one scenario, and where the engine leaves the recording.

python -m tests.conformance.show O1-1           run it: counters, tables, and the events around the first difference
python -m tests.conformance.show O1-1 --recorded   print the recorded events (normalised), without an engine
python -m tests.conformance.show O1-1 --calls      print the calls that the driver makes, without an engine
python -m tests.conformance.show                   run all, one line each
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tests.conformance.compare import (
    diff_events,
    diff_stages,
    diff_tables,
    normalise,
    op_at,
    side_by_side,
)
from tests.conformance.corpus import Scenario, load
from tests.conformance.driver import Result, run_scenario
from tests.conformance.replayed import Replayed
from tests.conformance.skips import SKIPPED


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def headline(scenario: Scenario) -> str:
    return f"{scenario.id} {scenario.name}: {scenario.shows}\n  ops: " + "; ".join(map(str, scenario.ops[:24]))


def report(scenario: Scenario, result: Result, *, context: int) -> bool:
    """Print every difference; True if there is none."""
    good = True
    for line in diff_stages(scenario, result):
        good = False
        say(f"  counter {line}")
    if result.dirty != scenario.dirty:
        good = False
        say(f"  dirty logs: recorded {scenario.dirty}, got {result.dirty}")
    diff = diff_events(scenario, result.events)
    if diff is not None:
        good = False
        say(f"  events, in {op_at(scenario, result, diff)}:\n{side_by_side(diff, before=context, after=2 * context)}")
    for line in diff_tables(scenario, result.vm):
        good = False
        say(f"  {line}")
    return good


def run_all(sk: Any) -> int:
    """One line a scenario; the number of those that differ."""
    bad = 0
    for scenario in load().scenarios.values():
        try:
            result = run_scenario(sk, scenario)
            diff = diff_events(scenario, result.events)
            parts = [
                *diff_stages(scenario, result)[:3],
                *(["events"] if diff else []),
                *diff_tables(scenario, result.vm)[:1],
            ]
        except Exception as error:  # noqa: BLE001 - a developer's tool: say it and go on
            parts = [f"{type(error).__name__}: {error}"]
        bad += bool(parts)
        note = f"  (skips: {', '.join(SKIPPED[scenario.id])})" if scenario.id in SKIPPED else ""
        say(f"{'DIFFERS' if parts else 'same   '} {scenario.id:6} {scenario.name}{note} {'; '.join(parts)}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Run recorded scenarios of real KVM and show the first difference.")
    parser.add_argument("id", nargs="?", help="scenario, e.g. O1-1; without it: all")
    parser.add_argument("--recorded", action="store_true", help="print the recorded events")
    parser.add_argument(
        "--calls", action="store_true", help="print the driver's calls (answers come from the recording)"
    )
    parser.add_argument("--context", type=int, default=6, help="events before the first difference")
    args = parser.parse_args()
    if args.id is None:
        import shadowkvm

        return 1 if run_all(shadowkvm) else 0
    scenario = load().scenarios.get(args.id)
    if scenario is None:
        parser.error(f"no scenario {args.id}; there are {', '.join(load().scenarios)}")
    say(headline(scenario))
    if args.recorded:
        say("\n".join(normalise(scenario, scenario.events)))
        return 0
    if args.calls:
        result = run_scenario(Replayed(scenario), scenario)
        say(
            "\n".join(
                line for line in result.vm.vcpus[0].log if not line.startswith(("write_memory", "set_host_pages"))
            )
        )
        return 0
    import shadowkvm

    good = report(scenario, run_scenario(shadowkvm, scenario, marks=True), context=args.context)
    say("same as recorded" if good else "DIFFERS")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
