"""Cost tables: what each event takes, as data, every figure with its source."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError, CostError

__all__ = ["COST_INFO", "PRESETS", "Cost", "CostTable", "load_costs"]

COST_INFO: Final = {
    "exit": "a VM exit and the entry after it, under shadow paging, without what the hypervisor does between them",
    "nested_exit": "the same under nested or agile paging",
    "user_exit": "beyond an exit, the way to user space and back; not what a device does there",
    "nested_user_exit": "the same under nested or agile paging",
    "mmio_access": "KVM's work to decode and carry out an access to a device in memory",
    "shadow_fault": "KVM's work for a #PF that repairs the shadow",
    "prefetched_entry": "... for each neighbour that it fills with it",
    "shadow_page": "... for each shadow page that it makes",
    "emulated_store": "KVM's work for a store to a guest table that it emulates",
    "zapped_page": "... for each shadow page that is zapped",
    "reflected_fault": "KVM's work for a #PF that it hands on to the guest",
    "invlpg": "KVM's work for an INVLPG that exits",
    "refetched_entry": "... for an entry of an unsync table that it fills anew",
    "cr3_load": "KVM's work for a CR3 load that exits",
    "synced_entry": "... for each present entry of a table that is brought back into step",
    "stage_fault": "KVM's work for a page that the second stage does not map yet",
    "dirty_fault": "KVM's work for a page that is write-protected for the dirty log",
    "walk_reference": "an entry of any table that a walk of the CPU reads",
    "instruction": "an instruction of KVM's, for costs that are given in instructions",
}
"""The costs of a table, and what each stands for."""

PRESETS: Final = ("zen3", "skylake", "nehalem", "pvm")
"""Tables that come with the package. The first is the default."""

_SCHEMA: Final = "shadowkvm.costs/1"
_UNITS: Final = ("cycles", "ns", "instructions")
# What a table may name as its base: the presets, and KVM's own work without a CPU.
_BASES: Final = (*PRESETS, "linux-6.1")
_GREATEST: Final = 1e12


@dataclass(frozen=True, slots=True)
class Cost:
    """What one event takes."""

    cycles: float
    given: str
    """As the table has it: "4,033 instructions"."""
    source: str
    """Where the figure comes from."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """What events take on a machine.

    Attributes:
        name: a preset's name, or the file's.
        title: one line.
        ghz: cycles of a nanosecond.
        clock_source: where that comes from.
        costs: by the names of `COST_INFO`.
    """

    name: str
    title: str
    ghz: float
    clock_source: str
    costs: Mapping[str, Cost]

    def __getitem__(self, name: str) -> float:
        """The cycles of an event."""
        return self.costs[name].cycles

    def ns(self, cycles: float) -> float:
        """Cycles as nanoseconds."""
        return cycles / self.ghz

    def to_dict(self) -> dict[str, Any]:
        """Everything in the types of JSON."""
        costs = {name: {"cycles": c.cycles, "given": c.given, "source": c.source} for name, c in self.costs.items()}
        return {
            "name": self.name,
            "title": self.title,
            "ghz": self.ghz,
            "clock_source": self.clock_source,
            "costs": costs,
        }


def load_costs(name: str | Path = PRESETS[0]) -> CostTable:
    """A cost table: a preset's name, or the path of a TOML file.

    A file has ``schema``, ``title``, perhaps ``base`` (a preset, or "linux-6.1": KVM's own work in instructions,
    without a CPU), ``[clock]`` with ``ghz`` and ``source``, and for each name of `COST_INFO` a ``[cost.NAME]`` with one
    of ``cycles``, ``ns``, ``instructions``, and ``source``. What the base has need not be there.

    Raises:
        ConfigError: no preset of that name, and no name of a file.
        OSError: the file cannot be read.
        CostError: no TOML, an unknown key, a number that cannot be, a figure
            without a source, or a cost that is missing. The message names the place.

    >>> costs = load_costs("zen3")
    >>> round(costs["exit"]), costs.costs["shadow_fault"].given
    (1850, '4,033 instructions')
    """
    if str(name) in PRESETS:
        return _finish(str(name), _chain(_preset(str(name)), str(name)))
    path = Path(name)
    if path.suffix != ".toml":
        raise ConfigError(f"costs {str(name)!r}: no preset{nearest(str(name), PRESETS)}; a file's name ends in .toml")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CostError(f"{path}: no UTF-8 at byte {error.start}") from None
    return _finish(path.stem, _chain(_parse(text, str(path)), str(path)))


def _preset(name: str) -> dict[str, Any]:
    text = resources.files(__package__).joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")
    return _parse(text, name)


def _parse(text: str, place: str) -> dict[str, Any]:
    """The parts of one file, all of them looked at."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Numbers too long to be read and brackets too deep are no TOMLDecodeError.
        raise CostError(f"{place}: no TOML: {error}") from None
    _keys(data, ("schema", "title", "base", "clock", "cost"), place)
    if data.get("schema") != _SCHEMA:
        raise CostError(f"{place}: schema {data.get('schema')!r}; {_SCHEMA!r} is expected")
    out: dict[str, Any] = {"costs": {}}
    for key in ("title", "base"):
        if key in data:
            out[key] = _text(data[key], f"{place}: {key}")
    if "base" in out and out["base"] not in _BASES:
        raise CostError(f"{place}: base {out['base']!r} is not known{nearest(out['base'], _BASES)}")
    if "clock" in data:
        clock = _section(data["clock"], ("ghz", "source"), f"{place}: clock")
        where = f"{place}: clock"
        out["clock"] = (
            _number(clock.get("ghz"), f"{where}: ghz", least=0.001),
            _text(clock.get("source"), f"{where}: source"),
        )
    for name, entry in _section(data.get("cost", {}), tuple(COST_INFO), f"{place}: cost").items():
        out["costs"][name] = _cost(entry, f"{place}: cost.{name}")
    return out


def _cost(entry: object, place: str) -> tuple[str, float, str]:
    """Unit, number, source."""
    section = _section(entry, (*_UNITS, "source"), place)
    units = [unit for unit in _UNITS if unit in section]
    if len(units) != 1:
        raise CostError(f"{place}: one of {', '.join(_UNITS)} is expected, there {_are(units)}")
    return (
        units[0],
        _number(section[units[0]], f"{place}: {units[0]}"),
        _text(section.get("source"), f"{place}: source"),
    )


def _are(units: Sequence[str]) -> str:
    return f"are {' and '.join(units)}" if units else "is none"


def _section(value: object, allowed: tuple[str, ...], place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CostError(f"{place}: {reprlib.repr(value)}; a table is expected")
    _keys(value, allowed, place)
    return value


def _keys(data: Mapping[str, Any], allowed: tuple[str, ...], place: str) -> None:
    if unknown := next((key for key in data if key not in allowed), None):
        raise CostError(f"{place}: key {unknown!r} is not known{nearest(unknown, allowed)}")


def _text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise CostError(f"{place}: {reprlib.repr(value)}; some text is expected")
    return value


def _number(value: object, place: str, *, least: float = 0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _GREATEST:
        raise CostError(f"{place}: {reprlib.repr(value)}; a number from {least:g} to {_GREATEST:g} is expected")
    return float(value)


def _chain(parts: dict[str, Any], place: str) -> dict[str, Any]:
    """A file's parts on top of those of its base."""
    below = _chain(_preset(parts["base"]), place) if "base" in parts else {"costs": {}}
    return {**below, **parts, "costs": {**below["costs"], **parts["costs"]}}


def _finish(name: str, parts: dict[str, Any]) -> CostTable:
    """The table, if nothing is missing."""
    missing = [key for key in ("title", "clock") if key not in parts]
    missing += [f"cost.{key}" for key in COST_INFO if key not in parts["costs"]]
    if missing:
        raise CostError(f"costs {name}: {', '.join(missing)} missing, and no base that has it")
    ghz, clock_source = parts["clock"]
    unit, number, _ = parts["costs"]["instruction"]
    if unit == "instructions":
        raise CostError(f"costs {name}: cost.instruction is given in instructions")
    cycles = {"cycles": 1.0, "ns": ghz, "instructions": number * (ghz if unit == "ns" else 1.0)}
    costs = {
        key: Cost(parts["costs"][key][1] * cycles[parts["costs"][key][0]], _given(*parts["costs"][key][:2]), source)
        for key in COST_INFO
        for source in (parts["costs"][key][2],)
    }
    return CostTable(name, parts["title"], ghz, clock_source, costs)


def _given(unit: str, number: float) -> str:
    return f"{number:,g} {unit}" if number < 1e6 else f"{number:,.0f} {unit}"
