"""Seeded random cases for the conformance harness.

    case = generate(seed, ops=500)      # the same seed gives the same case

A guest with several roots that share tables, self-maps, aliases, large pages; its tables are mapped at their own
addresses, so that it can edit every level. Each case draws its own mix of operations, so that some are full of unsync
tables, some of flooding, MMIO and so on. Groups of themes: 64-bit, PAE, two-level, paging off, several vCPUs, and the
host's actions.
"""

from __future__ import annotations

from shadowkvm.errors import TraceError
from shadowkvm.kvm.case import Case
from shadowkvm.kvm.generate.events import Events
from shadowkvm.kvm.generate.themes import GROUPS, THEMES

__all__ = ["GROUPS", "THEMES", "Generator", "generate"]


class Generator(Events):
    """Makes one case."""

    def generate(self, ops: int) -> Case:
        """The case, with that many operations."""
        names = list(self.weights)
        while len(self.ops) < ops:
            if len(self.cpus) > 1 and self.r.random() < 0.3:
                self.vcpu = self.r.randrange(len(self.cpus))
            getattr(self, f"step_{self.r.choices(names, list(self.weights.values()))[0]}")()
        return Case(seed=self.seed, theme=self.name, **self.start, pages=self.image, ops=self.ops[:ops])


def generate(seed: int, ops: int = 500, theme: str | None = None, group: str = "64-bit") -> Case:
    """A random case; the same arguments give the same case.

    Args:
        seed: any number; its remainder chooses the theme among those of the group.
        ops: number of operations.
        theme: one of `THEMES`, instead of the seed's own.
        group: one of `GROUPS`: what paging the guest runs with; "all": the seed chooses that, too.

    Raises:
        TraceError: there is no such theme or group.
    """
    names = [name for name, t in THEMES.items() if group in ("all", t.group)]
    if not names or (theme is not None and theme not in THEMES):
        raise TraceError(f"theme {theme!r} of group {group!r}: the groups are {', '.join(GROUPS)}, all")
    return Generator(seed, theme or names[seed % len(names)]).generate(ops)
