"""The verbs of workloads: ``shadowkvm workload list``, ``show``, ``run`` and ``record``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter

from shadowkvm import workload_report as report
from shadowkvm._core import MODEL_VERSION, MODEL_VERSIONS
from shadowkvm.errors import InvariantError, TraceError
from shadowkvm.scenario_options import ScaleOption, SeedOption, SetOption, build_scenario, words_of
from shadowkvm.terminal import (
    Format,
    FormatOption,
    OutputOption,
    QuietOption,
    UsageError,
    check_folder,
    choose_format,
    emit,
    part_progress,
    say,
    show_list,
)
from shadowkvm.vm import Vm
from shadowkvm.workloads import Step, entries, get

__all__ = ["add_verbs"]

_SCHEMA: Final = "shadowkvm.workloads/1"

JsonOption = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="The same as --format json.")
]
app = App(name="workload", help="Workloads: kinds of load on a guest, built in, or brought by other packages.")


def add_verbs(parent: App) -> None:
    """Hang the verbs of this module into the command line."""
    parent.command(app)


def _format(format_: Format | None, *, json: bool) -> Format | None:
    if json and format_ not in {None, "json"}:
        raise UsageError(f"--json and --format {format_} contradict each other")
    return "json" if json else format_


@app.command(name="list", help_epilogue="Examples:\n\n    shadowkvm workload list\n    shadowkvm workload list --json")
def list_workloads(*, format_: FormatOption = None, json: JsonOption = False, output: OutputOption = None) -> int:
    """List the workloads: this package's, and those that other packages bring (entry points shadowkvm.workloads).

    One that cannot be loaded is listed with the reason, and a message goes to stderr.
    """
    rows = []
    for entry in entries():
        what = entry.workload.summary if entry.workload else f"cannot be used: {entry.trouble}"
        unit = entry.workload.unit if entry.workload else ""
        rows.append([entry.name, unit, entry.origin, what])
        if entry.workload is None:
            say(f"workload {entry.name!r} of {entry.origin}: {entry.trouble}")
    show_list(
        "Workloads",
        ("name", "unit", "from", "doc"),
        rows,
        schema=_SCHEMA,
        format_=_format(format_, json=json),
        output=output,
    )
    return 0


@app.command(help_epilogue="Examples:\n\n    shadowkvm workload show fork_exit")
def show(name: str, /, *, format_: FormatOption = None, json: JsonOption = False, output: OutputOption = None) -> int:
    """What a workload stresses, its parameters, and what to look for in its result.

    Parameters
    ----------
    name
        A workload, see: shadowkvm workload list.
    """
    chosen = choose_format(_format(format_, json=json), output, ("table", "json"))
    check_folder(output)
    workload = get(name)
    emit(report.about_json(workload) if chosen == "json" else report.about(workload), output)
    return 0


@app.command(
    help_epilogue="""Examples:

    shadowkvm workload run fork_exit
    shadowkvm workload run mmap_cycle --scale 4 --set chunk=128K --set reuse_gpa=false
    shadowkvm workload run context_switch --set processes=64 --set kpti=true --policy no_unsync
    shadowkvm workload run jit_flip --json -o jit.json""",
)
def run(
    name: str,
    /,
    *,
    scale: ScaleOption = 1.0,
    seed: SeedOption = 1,
    settings: SetOption = None,
    policy: Annotated[str | None, Parameter(help="Decisions of KVM to replace, see: shadowkvm policy list.")] = None,
    profile: Annotated[str, Parameter(help="The CPU: zen, or qemu-tcg.")] = "zen",
    model_version: Annotated[
        str, Parameter(help=f"The kernel whose rules hold: {', or '.join(MODEL_VERSIONS)}.")
    ] = MODEL_VERSION,
    quota: Annotated[int | None, Parameter(help="Number of shadow pages that KVM may keep, at least 64.")] = None,
    audit: Annotated[
        bool, Parameter(negative="", show_default=False, help="Check every invariant of the engine after each step.")
    ] = False,
    format_: FormatOption = None,
    json: JsonOption = False,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> int:
    """Run a workload under KVM's shadow MMU and report what that cost: in all, for each unit of work, by phase.

    Exit status 1: the guest saw something else than its own tables say. 4: --audit found an invariant broken.

    Parameters
    ----------
    name
        A workload, see: shadowkvm workload list.
    """
    chosen = choose_format(_format(format_, json=json), output, ("table", "json", "csv"))
    check_folder(output)
    scenario = build_scenario(name, scale, seed, settings)
    vm = scenario.vm(policy=policy, profile=profile, model_version=model_version)
    if quota is not None:
        vm.set_page_quota(quota)
    replay = ["shadowkvm", "workload", "run", name, *words_of(scale, seed, settings), "--audit"]
    replay += ["--policy", policy] if policy else []
    replay += ["--model-version", model_version] if model_version != MODEL_VERSION else []
    with part_progress(name, quiet=quiet) as tick:
        result = scenario.run(
            vm,
            progress=lambda done, total: tick(0, done / total if total else 1.0),
            each=_auditor(shlex.join(replay)) if audit else None,
        )
    texts: dict[Format, Callable[[], str]] = {
        "json": lambda: report.as_json(result),
        "csv": lambda: report.as_csv(result),
    }
    emit(texts[chosen]() if chosen in texts else report.as_tables(result), output)
    if result.mismatches:
        say(f"the guest saw something else than its own tables say in {result.mismatches:,} accesses")
    return int(result.mismatches > 0)


def _auditor(replay: str) -> Callable[[Vm, Step], None]:
    def audit(vm: Vm, step: Step) -> None:
        try:
            vm.audit()
        except InvariantError as error:
            raise InvariantError(f"after a step of phase {step.phase!r}: {error}", replay) from error

    return audit


@app.command(help_epilogue="Examples:\n\n    shadowkvm workload record fork_exit -o fork.npz && shadowkvm run fork.npz")
def record(
    name: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The recording to write (.npz).")],
    scale: ScaleOption = 1.0,
    seed: SeedOption = 1,
    settings: SetOption = None,
) -> int:
    """Write a workload as a recording, for `shadowkvm run`: faults by kind of page, address spaces, events.

    Parameters
    ----------
    name
        A workload, see: shadowkvm workload list.
    """
    check_folder(output)
    if output.suffix != ".npz":
        raise UsageError(f"{output}: the name of a recording ends in .npz")
    scenario = build_scenario(name, scale, seed, settings)
    try:
        scenario.record(output)
    except TraceError as error:
        raise UsageError(f"{name} cannot be a recording: {error}") from error
    say(f"{output}: {output.stat().st_size:,} bytes")
    return 0
