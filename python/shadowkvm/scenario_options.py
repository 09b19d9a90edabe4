"""The options of the command line that choose a workload's parameters, and the scenario that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from shadowkvm.terminal import UsageError
from shadowkvm.workloads import Scenario, get

__all__ = ["ScaleOption", "SeedOption", "SetOption", "build_scenario", "words_of"]

ScaleOption = Annotated[float, Parameter(help="How much is done: multiplies what `workload show` marks with x scale.")]
SeedOption = Annotated[int, Parameter(help="Of all chance in it: the same seed, the same scenario.")]
SetOption = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", show_default=False, help="A parameter, as name=value; may be repeated."),
]


def build_scenario(name: str, scale: float, seed: int, settings: Sequence[str] | None) -> Scenario:
    """The scenario that the options describe."""
    parameters = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {setting!r}: name=value is expected")
        if key in parameters:
            raise UsageError(f"--set {key} is there twice")
        parameters[key.replace("-", "_")] = value
    return get(name).build(seed, scale, **parameters)


def words_of(scale: float, seed: int, settings: Sequence[str] | None) -> list[str]:
    """The options again, as words of a command."""
    words = ["--scale", repr(scale).removesuffix(".0"), "--seed", str(seed)]
    return words + [word for setting in settings or [] for word in ("--set", setting)]
