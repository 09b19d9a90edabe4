"""Workload: what a guest does, told so that it can be built at any size and run on any VM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError
from shadowkvm.guest import Linux, Settings
from shadowkvm.pagetables import MODES
from shadowkvm.vm import HOST_STATES
from shadowkvm.workloads.parameter import Parameter, Value, Values
from shadowkvm.workloads.scenario import Scenario, ScenarioResult
from shadowkvm.workloads.step import Step

__all__ = ["GUEST_PARAMETERS", "Body", "Workload"]

Body = Callable[[Linux, Values], Iterator[Step]]

_MIB: Final = 1 << 20
_SCALES: Final = (0.001, 1e6)

GUEST_PARAMETERS: Final = (
    Parameter("memory", "guest memory", 256 * _MIB, low=16 * _MIB, unit="bytes"),
    Parameter("mode", "paging mode of the guest", "4-level", choices=tuple(MODES)),
    Parameter("cpus", "CPUs of the guest", 1, low=1, high=64),
    Parameter("kpti", "two top tables a process, CR3 loads at each way in and out of the kernel", default=False),
    Parameter("pcid", "CR4.PCIDE: the TLB keeps six address spaces apart", default=False),
    Parameter("direct_page", "page size of the kernel's direct map; 0: the usual", 0, low=0, unit="bytes"),
    Parameter(
        "reuse", "which freed frame is used next: the last one freed, or the first", "lifo", choices=("lifo", "fifo")
    ),
    Parameter("table_grace", "freed table frames that wait before they are used for anything else", 0, low=0),
    Parameter("flush_ceiling", "flushes of more pages reload CR3, smaller ones use INVLPG", 33, low=0),
    Parameter("lazy_vfree", "vmalloc pages that are unmapped before they are flushed together", 512, low=0),
    Parameter("host", "what the host has behind guest memory at the start", "writable", choices=HOST_STATES),
)
"""What every workload also takes: the guest's settings, and the host's."""

_SETTINGS: Final = tuple(name for name in Settings.__dataclass_fields__ if name != "seed")


def _no_settings(values: Values) -> Mapping[str, Value]:
    del values
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """A kind of load on a guest.

    Attributes:
        name: its key.
        summary: one line.
        stresses: which paths of the shadow MMU it takes, and why.
        look_for: what to look at in the result.
        body: a generator function of a `shadowkvm.guest.Linux` and the values of the parameters: it sets up, calls
            ``guest.start()``, and yields steps.
        parameters: its own.
        unit: what its work is counted in: "fork", "page".
        guest: other defaults for GUEST_PARAMETERS.
        fixed: guest parameters that it does not take.
        settings: settings of the guest that its own parameters decide.
        work: how many units there are, from the values.

    >>> from shadowkvm.workloads import get
    >>> result = get("jit_flip").run(scale=0.05)
    >>> result.mismatches, result.units
    (0, 10)
    """

    name: str
    summary: str
    stresses: str
    look_for: tuple[str, ...]
    body: Body
    parameters: tuple[Parameter, ...]
    unit: str
    work: Callable[[Values], float]
    guest: Mapping[str, Value] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    settings: Callable[[Values], Mapping[str, Value]] = _no_settings

    @property
    def all_parameters(self) -> dict[str, Parameter]:
        """Its own parameters, then the guest's, by name."""
        own = {parameter.name: parameter for parameter in self.parameters}
        common = {p.name: p for p in GUEST_PARAMETERS if p.name not in {*own, *self.fixed}}
        return own | common

    @property
    def guest_settings(self) -> tuple[str, ...]:
        """The parameters that are settings of the guest."""
        return tuple(name for name in _SETTINGS if name in self.all_parameters)

    def default(self, name: str, scale: float = 1.0) -> Value:
        """The default of a parameter at a scale."""
        parameter = self.all_parameters[name]
        return self.guest[name] if name in self.guest else parameter.scale(scale)

    def build(self, seed: int = 1, scale: float = 1.0, **parameters: Any) -> Scenario:
        """Choose the parameters.

        Args:
            seed: of all chance in it; the same seed gives the same scenario.
            scale: how much is done: it multiplies the defaults of the scaled parameters.
            parameters: values for any of `all_parameters`; numbers, or text as on the command line.

        Raises:
            ConfigError: an unknown parameter, a value of the wrong type or beyond its limits.
        """
        known = self.all_parameters
        if unknown := [name for name in parameters if name not in known]:
            raise ConfigError(f"workload {self.name!r} has no parameter {unknown[0]!r}{nearest(unknown[0], known)}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed {seed!r} is not a whole number from 0 to {(1 << 64) - 1}")
        if not _SCALES[0] <= scale <= _SCALES[1]:
            raise ConfigError(f"scale {scale!r} is not from {_SCALES[0]} to {_SCALES[1]:g}")
        values: dict[str, Value] = {}
        for name, parameter in known.items():
            given = parameters.get(name, self.default(name, scale))
            text = isinstance(given, str) and not isinstance(parameter.default, str)
            values[name] = parameter.parse(given) if text else parameter.check(given)
        return Scenario(self, Values(values), seed=seed, scale=scale)

    def run(self, seed: int = 1, scale: float = 1.0, *, policy: str | None = None, **parameters: Any) -> ScenarioResult:
        """Build and run it on a fresh VM; for more say, call `build`, then `Scenario.run`."""
        return self.build(seed, scale, **parameters).run(policy=policy)

    def __repr__(self) -> str:
        return f"<Workload {self.name}: {self.summary}>"
