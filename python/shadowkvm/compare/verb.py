"""The verb of this package: ``shadowkvm compare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from shadowkvm._core import MODEL_VERSION
from shadowkvm.compare.charts import pyplot
from shadowkvm.compare.page import as_html
from shadowkvm.compare.runs import Variant, compare
from shadowkvm.compare.texts import as_csv, as_json, as_tables
from shadowkvm.costs import PRESETS, load_costs
from shadowkvm.mmus import Mmu
from shadowkvm.scenario_options import ScaleOption, SeedOption, SetOption, build_scenario, words_of
from shadowkvm.terminal import (
    Format,
    OutputOption,
    QuietOption,
    UsageError,
    check_folder,
    choose_format,
    emit,
    part_progress,
    say,
)
from shadowkvm.vm import Vm
from shadowkvm.workloads import Scenario

__all__ = ["add_verbs"]


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{text!r}: names are expected, with a comma between two")
    return words


def add_verbs(app: App) -> None:
    """Hang the verb of this module into the command line."""
    lines = (
        "Examples:",
        "",
        "    shadowkvm compare fork_exit --mmu shadow,nested,nested:warm,agile",
        "    shadowkvm compare mmap_cycle --mmu shadow,nested --policy kvm,no_unsync -o report.html",
        "    shadowkvm compare examples/recordings/fork20-demote64.npz --policy kvm,no_unsync,no_prefetch",
        "    shadowkvm compare guest.npz --model-version linux-6.1,linux-6.12 -o compare.json",
    )
    app.command(compare_verb, name="compare", help_epilogue="\n".join(lines))


def _variants(
    mmus: Sequence[str], policies: Sequence[str], versions: Sequence[str], profiles: Sequence[str]
) -> list[Variant]:
    """Every combination. Policies and kernels are those of shadow paging, so another MMU is run once a profile."""
    for version, policy, profile in product(versions, policies, profiles):
        # A name that is none is told before anything is run.
        Vm(4096, model_version=version, policy=policy, profile=profile)
    out = []
    for mmu in map(Mmu.parse, mmus):
        if mmu.kind == "shadow":
            out += [Variant(*words, mmu=mmu) for words in product(versions, policies, profiles)]
        else:
            out += [Variant(profile=profile, mmu=mmu) for profile in profiles]
    return out


def compare_verb(
    what: str,
    /,
    *,
    mmu: Annotated[str, Parameter(help="MMUs, see: shadowkvm costs mmus.")] = "shadow",
    policy: Annotated[str, Parameter(help="Policies of shadow paging, see: shadowkvm policy list.")] = "kvm",
    model_version: Annotated[str, Parameter(help="Kernels whose rules hold.")] = MODEL_VERSION,
    profile: Annotated[str, Parameter(help="CPUs: zen, qemu-tcg.")] = "zen",
    costs: Annotated[
        str, Parameter(help="What events take: a preset (shadowkvm costs list), or a TOML file.")
    ] = PRESETS[0],
    scale: ScaleOption = 1.0,
    seed: SeedOption = 1,
    settings: SetOption = None,
    steady: Annotated[
        bool,
        Parameter(
            negative="", show_default=False, help="Without the phase in which a workload's tables are first built."
        ),
    ] = False,
    format_: Annotated[
        Format | None,
        Parameter(name="--format", help="table, json, csv, html (a page with plots); else by the suffix of -o."),
    ] = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> int:
    """Run one workload or trace under several MMUs, policies, kernels or CPUs, and set what they cost side by side.

    Each option takes several names with a comma between two; every combination is run. The first one is what the others
    are held against: "+3.0%" is 3 percent more, "=" the same. Events are exact; time is modelled from a table of costs.
    Exit status 1: an access went otherwise than the recording or the workload's own tables say.

    Parameters
    ----------
    what
        A workload (shadowkvm workload list), a recording (.npz), or a trace saved by numpy.save (.npy).
    """
    chosen = choose_format(format_, output, ("table", "json", "csv", "html"))
    check_folder(output)
    if chosen == "html":
        pyplot()  # whether it is there is known before anything is run
    table = load_costs(costs)
    variants = _variants(_words(mmu), _words(policy), _words(model_version), _words(profile))
    if (policy, model_version) != ("kvm", MODEL_VERSION) and all(v.mmu.kind != "shadow" for v in variants):
        raise UsageError("--policy and --model-version are of shadow paging, and no --mmu is that")
    source: Path | Scenario
    if Path(what).suffix in {".npz", ".npy"}:
        if settings or scale != 1.0 or seed != 1 or steady:
            raise UsageError("--scale, --seed, --set and --steady are for workloads, and a trace is given")
        source = Path(what)
    else:
        source = build_scenario(what, scale, seed, settings)
    with part_progress("compare", quiet=quiet) as tick:
        done = compare(source, variants, costs=table, steady=steady, progress=lambda part: tick(0, part))
    command = ["shadowkvm", "compare", what, "--mmu", mmu, "--policy", policy, "--model-version", model_version]
    command += ["--profile", profile, "--costs", costs]
    command += words_of(scale, seed, settings) if isinstance(source, Scenario) else []
    command += ["--steady"] if steady else []
    command += ["-o", str(output)] if output else []
    texts: dict[str, Callable[[], str]] = {
        "json": lambda: as_json(done),
        "csv": lambda: as_csv(done),
        "html": lambda: as_html(done, command),
    }
    emit(texts[chosen]() if chosen in texts else as_tables(done), output)
    if done.mismatches:
        say(f"{done.mismatches:,} accesses went otherwise than they should")
    return int(done.mismatches > 0)
