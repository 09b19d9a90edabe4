"""Parameters of workloads: typed, with limits; read from text, scaled, shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError

__all__ = ["Parameter", "Values", "size_text"]

_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a workload; the type of ``default`` is its type.

    Attributes:
        name: as in ``--set name=value``.
        doc: what it is.
        default: at scale 1.
        low, high: limits of a number, both included; None: none.
        choices: what a str may be.
        scaled: the default is multiplied by the scale: it says how much is done, not how big anything is.
        unit: "bytes" (written 64M), or what else is counted.

    >>> chunk = Parameter("chunk", "bytes mapped at once", 2 << 20, low=4096, unit="bytes")
    >>> chunk.parse("64K"), chunk.show(2 << 20)
    (65536, '2M')
    >>> chunk.parse("1K")
    Traceback (most recent call last):
    shadowkvm.errors.ConfigError: chunk 1K is below 4K
    """

    name: str
    doc: str
    default: Value
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    scaled: bool = False
    unit: str = ""

    def parse(self, text: str) -> Value:
        """The value that a text stands for.

        Raises:
            ConfigError: it is none, or beyond the limits.
        """
        text = text.strip()
        if isinstance(self.default, bool):
            if text.lower() not in _TRUE + _FALSE:
                raise ConfigError(f"{self.name} {text!r} is neither true nor false")
            return text.lower() in _TRUE
        if isinstance(self.default, str):
            return self.check(text)
        if isinstance(self.default, float):
            try:
                number = float(text)
            except ValueError:
                raise ConfigError(f"{self.name} {text!r} is no number") from None
            return self.check(number)
        found = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+)\s*([kmgt]?)(i?b)?", text, re.IGNORECASE)
        if not found or (found[2] and self.unit != "bytes"):
            hint = ", such as 64M" if self.unit == "bytes" else ""
            raise ConfigError(f"{self.name} {text!r} is no whole number{hint}")
        return self.check(int(found[1], 0) * _UNITS[found[2].lower()])

    def check(self, value: Any) -> Value:
        """The value, if it has the right type and is within the limits.

        Raises:
            ConfigError: it is not.
        """
        kind = type(self.default)
        right = isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float) if kind is float else kind)
        if not right:
            raise ConfigError(f"{self.name} {value!r}: {kind.__name__} is expected")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.name} {value!r} is not known{nearest(str(value), self.choices)}")
        if self.low is not None and value < self.low:
            raise ConfigError(f"{self.name} {self.show(value)} is below {self.show(self.low)}")
        if self.high is not None and value > self.high:
            raise ConfigError(f"{self.name} {self.show(value)} is above {self.show(self.high)}")
        return kind(value)

    def scale(self, scale: float) -> Value:
        """The default at a scale: at least 1, and within the limits."""
        if not self.scaled or isinstance(self.default, bool | str):
            return self.default
        value = type(self.default)(max(1, round(self.default * scale)))
        low, high = self.low or 0, self.high if self.high is not None else float("inf")
        return type(self.default)(min(max(value, low), high))

    def show(self, value: Any) -> str:
        """A value as text that `parse` reads."""
        if self.unit == "bytes" and not isinstance(value, bool | str):
            return size_text(int(value))
        return str(value).lower() if isinstance(value, bool) else f"{value}"


def size_text(value: int) -> str:
    """Bytes as text: 4K, 2M, 1G.

    >>> size_text(2 << 20), size_text(4097)
    ('2M', '4097')
    """
    for letter in "tgmk":
        if value and value % _UNITS[letter] == 0:
            return f"{value // _UNITS[letter]}{letter.upper()}"
    return str(value)


class Values(Mapping[str, Any]):
    """The values of a workload's parameters; ``values.chunk`` is ``values["chunk"]``."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"the workload has no parameter {name!r}") from None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Values({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"
