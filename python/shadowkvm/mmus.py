"""MMUs: the ways to run the same guest, by names: "shadow", "nested:warm:2m", "agile:interval=50000"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError
from shadowkvm.hardware import USUAL_INTERVAL
from shadowkvm.tlb import USUAL_WALK_CACHES
from shadowkvm.vm import Vm

__all__ = ["MMU_WORDS", "Mmu"]

MMU_WORDS: Final = {
    "shadow": "KVM's shadow page tables, the TLB followed",
    "nested": "nested paging (AMD NPT, Intel EPT): the CPU walks the guest's tables through a second stage",
    "agile": "agile paging (ISCA 2016): shadow paging but for guest tables that change often",
    ":cold": "nested, agile: the second stage maps nothing at the start (the usual)",
    ":warm": "nested, agile: it maps everything at the start",
    ":4k": "nested, agile: it maps pages of 4 KiB (the usual)",
    ":2m": "nested, agile: ... of 2 MiB",
    ":1g": "nested, agile: ... of 1 GiB",
    ":nopwc": "all: no page-walk caches and no nested TLB, each walk begins at the root",
    ":interval=N": f"agile: rows from one look at the tables to the next ({USUAL_INTERVAL:,})",
}
"""What a name is made of: one of the first three, then any of the others, each after a colon."""

_SIZES: Final = {"4k": 4096, "2m": 2 << 20, "1g": 1 << 30}
_KINDS: Final = ("shadow", "nested", "agile")


@dataclass(frozen=True, slots=True)
class Mmu:
    """A way to run a guest. `Mmu.parse` makes one of its name, ``str`` gives the name back."""

    kind: Literal["shadow", "nested", "agile"] = "shadow"
    warm: bool = False
    page_size: int = 4096
    """Bytes of the second stage's pages."""
    walk_caches: bool = True
    interval: int = USUAL_INTERVAL
    """Of agile paging: rows."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """The MMU of a name, see `MMU_WORDS`.

        Raises:
            ConfigError: a word that is not known, or that is not for this kind.

        >>> Mmu.parse("nested:warm:2m")
        Mmu(kind='nested', warm=True, page_size=2097152, walk_caches=True, interval=1000000)
        >>> str(Mmu.parse("nested:2m:warm"))
        'nested:warm:2m'
        """
        kind, *words = name.split(":")
        if kind not in _KINDS:
            raise ConfigError(f"mmu {name!r}: {kind!r} is not known{nearest(kind, _KINDS)}")
        fields: dict[str, object] = {"kind": kind}
        for word in words:
            field, value = _setting(name, word)
            if field in fields:
                raise ConfigError(f"mmu {name!r}: {word!r} says again, or otherwise, what was said")
            if kind == "shadow" and field != "walk_caches":
                raise ConfigError(f"mmu {name!r}: {word!r} is for nested and agile, shadow paging has no second stage")
            if kind == "nested" and field == "interval":
                raise ConfigError(f"mmu {name!r}: an interval is for agile")
            fields[field] = value
        return cls(**fields)  # type: ignore[arg-type]  # looked at word by word

    def __str__(self) -> str:
        words: list[str] = [self.kind]
        words += ["warm"] if self.warm else []
        words += [word for word, size in _SIZES.items() if size == self.page_size != 4096]
        words += [] if self.walk_caches else ["nopwc"]
        words += [f"interval={self.interval}"] if self.interval != USUAL_INTERVAL else []
        return ":".join(words)

    def set(self, vm: Vm) -> None:
        """Have a fresh VM run this way, its TLB followed."""
        caches = USUAL_WALK_CACHES if self.walk_caches else None
        more = {} if self.walk_caches else {"nested_tlb": 0}
        if self.kind == "shadow":
            vm.follow_tlb(walk_caches=caches)
        elif self.kind == "nested":
            vm.use_nested(warm=self.warm, page_size=self.page_size, walk_caches=caches, **more)
        else:
            vm.use_agile(interval=self.interval, warm=self.warm, page_size=self.page_size, walk_caches=caches, **more)


def _setting(name: str, word: str) -> tuple[str, object]:
    """The field that a word sets, and its value."""
    if word in {"warm", "cold"}:
        return "warm", word == "warm"
    if word in _SIZES:
        return "page_size", _SIZES[word]
    if word == "nopwc":
        return "walk_caches", False
    key, equals, number = word.partition("=")
    if key == "interval" and equals:
        if not number.isdecimal() or int(number) == 0:
            raise ConfigError(f"mmu {name!r}: interval {number!r} must be a number of rows, at least 1")
        return "interval", int(number)
    known = [word.removeprefix(":") for word in MMU_WORDS if word.startswith(":")]
    raise ConfigError(f"mmu {name!r}: {word!r} is not known{nearest(word, known)}")
