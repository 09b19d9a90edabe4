"""Checks of what callers pass, so that a refusal names the value, the limit and the place."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import SupportsIndex

from shadowkvm.errors import ConfigError

__all__ = ["choice", "integer", "nearest"]


def integer(what: str, value: SupportsIndex, *, bits: int = 64) -> int:
    """``value`` as an int of that many bits, without sign.

    Raises:
        ConfigError: it is below 0 or does not fit.
        TypeError: it is no whole number.

    >>> integer("size", 4096)
    4096
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} {value!r}: a whole number is expected") from None
    if not 0 <= number < 1 << bits:
        raise ConfigError(f"{what} {number:#x} is not from 0 to {(1 << bits) - 1:#x}")
    return number


def choice(what: str, name: object, known: Iterable[str]) -> str:
    """``name``, if it is one of the known.

    Raises:
        ConfigError: it is not; the message names those that are.

    >>> choice("profile", "zen", ["zen", "qemu-tcg"])
    'zen'
    """
    if not isinstance(name, str):
        raise ConfigError(f"{what} {name!r}: a name is expected{nearest('', known)}")
    if name not in known:
        raise ConfigError(f"{what} {name!r} is not known{nearest(name, known)}")
    return name


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what is most like it, and all there is if that is little.

    >>> nearest("no_unsnc", ["kvm", "no_unsync"])
    "; did you mean 'no_unsync'? There are: kvm, no_unsync"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    out = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    if len(names) > 8:
        return out
    return f"{out}{'' if close else ';'} {'There' if close else 'there'} are: {', '.join(names)}"
