"""Counters: KVM's statistics, read at one moment, and the difference between two moments."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from shadowkvm._core import COUNTERS
from shadowkvm.errors import ConfigError

__all__ = ["COUNTER_INFO", "CounterInfo", "Counters"]


class CounterInfo(NamedTuple):
    """What is known of one counter: the row of the engine's own table."""

    name: str
    """As KVM exports it; the engine's own begin with ``x_``."""
    scope: str
    """"vm" or "vcpu"."""
    kind: str
    """"cumulative" (only rises), "instant" (as many as there are now) or "peak" (the greatest so far)."""
    doc: str
    """What moves it."""


COUNTER_INFO: Final[Mapping[str, CounterInfo]] = {row[0]: CounterInfo(*row) for row in COUNTERS}
"""Every counter by its name, in the engine's order: the VM's first, then those of the vCPUs."""

_NAMES: Final = tuple(COUNTER_INFO)
# What a line of `repr` shows first, if it is not zero.
_TELLING: Final = ("x_ops", "pf_taken", "pf_fixed", "pf_emulate", "pf_guest", "mmu_shadow_zapped", "mmu_unsync")


class Counters(Mapping[str, int]):
    """KVM's statistics under KVM's names: the VM's, and the sums over its vCPUs (of peaks the greatest).

    A snapshot: it does not change when the VM goes on. It is a mapping in the engine's order, so ``dict(counters)``,
    ``counters["pf_taken"]`` and iteration work; ``later - earlier`` is what happened between the two.

    Args:
        values: a number for each name, in any order, or all numbers in the engine's order.

    >>> import shadowkvm as sk
    >>> vm = sk.Vm(memory=1 << 20)
    >>> before = vm.counters
    >>> vm.vcpus[0].invlpg(0x1000).status
    'done'
    >>> vm.counters - before
    <Counters x_ops=1 mmu_cache_miss=1 invlpg=1 exits=1>
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, int] | Iterable[int]) -> None:
        if isinstance(values, Mapping):
            if unknown := [name for name in values if name not in COUNTER_INFO]:
                raise ConfigError(f"{unknown[0]!r} is no counter")
            self._values = {name: int(values[name]) for name in _NAMES if name in values}
        else:
            self._values = dict(zip(_NAMES, values, strict=True))

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __eq__(self, other: object) -> bool:
        return self._values == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __sub__(self, earlier: Mapping[str, int]) -> Counters:
        """What changed since ``earlier``: cumulative and instant counters as a difference, peaks as they stand.

        The difference of an instant counter is negative when there are fewer than before. A peak has no difference that
        would mean anything, so the later one is kept.
        """
        if not isinstance(earlier, Mapping):
            return NotImplemented
        return Counters(
            {
                name: value if COUNTER_INFO[name].kind == "peak" else value - earlier.get(name, 0)
                for name, value in self._values.items()
            }
        )

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each counter: "cumulative", "instant" or "peak"."""
        return {name: COUNTER_INFO[name].kind for name in self._values}

    def nonzero(self) -> dict[str, int]:
        """Those that are not 0, as a dict."""
        return {name: value for name, value in self._values.items() if value}

    def rates(self, per: float = 1000.0, of: str | float = "x_ops") -> dict[str, float]:
        """Cumulative counters as rates: so many for each ``per`` of something.

        Args:
            per: 1000.0 gives rates per thousand.
            of: of what: the name of a counter (``x_ops``: operations run) or a number, such as the instructions that
                the guest carried out.

        Returns:
            Name and rate of each cumulative counter; all 0.0 if there was none of that something.

        Raises:
            ConfigError: ``of`` is the name of no counter.

        >>> Counters({"pf_taken": 5, "x_ops": 2000}).rates()["pf_taken"]
        2.5
        """
        if isinstance(of, str):
            if of not in self._values:
                raise ConfigError(f"{of!r} is no counter")
            of = self._values[of]
        factor = per / of if of else 0.0
        return {name: value * factor for name, value in self._values.items() if COUNTER_INFO[name].kind == "cumulative"}

    def __repr__(self) -> str:
        rest = [name for name in self._values if name not in _TELLING]
        shown = [f"{name}={self._values[name]:,}" for name in (*_TELLING, *rest) if self._values.get(name)]
        more = f" ... {len(shown) - 8} more" if len(shown) > 8 else ""
        return f"<Counters {' '.join(shown[:8]) or 'all 0'}{more}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{name}</td><td>{value:,}</td><td>{COUNTER_INFO[name].kind}</td>"
            f"<td style='text-align:left'>{html.escape(COUNTER_INFO[name].doc)}</td></tr>"
            for name, value in self.nonzero().items()
        )
        return f"<table><tr><th>counter</th><th>value</th><th>kind</th><th>what moves it</th></tr>{rows}</table>"
