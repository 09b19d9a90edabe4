"""Policies: KVM's decisions, to be replaced one by one.

A built-in policy is a name (`POLICIES`; ``shadowkvm policy list``), and costs nothing. A policy of your own is a
`Policy`: what it does not override is KVM's rule, or that of a built-in policy, and is never called from the engine.
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal, NamedTuple, Protocol, runtime_checkable

from shadowkvm._core import POLICIES as _POLICIES
from shadowkvm._core import PageView
from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError

__all__ = ["POLICIES", "BuiltinPolicy", "PageView", "Policy", "Victim"]

Victim = Literal["oldest", "newest", "emptiest"]


class BuiltinPolicy(NamedTuple):
    """A policy of the engine."""

    name: str
    parameter: str
    """What the number in ``name:number`` means; "" if it takes none."""
    doc: str
    """What it does otherwise than KVM."""
    source: str
    """Where the rule comes from."""


POLICIES: Final = {row[0]: BuiltinPolicy(*row) for row in _POLICIES}
"""Every built-in policy by its name."""

_METHODS: Final = ("may_unsync", "flood_threshold", "prefetch")
_RULES: Final = ("large_pages", "sync_all", "unsync_limit", "invlpg_protects", "update_on_write", "victim")


@runtime_checkable
class Policy(Protocol):
    """KVM's decisions (Linux 6.1). Subclass it and override what is to be otherwise; give it to `Vm` as ``policy``.

    Methods are called from within a fault, with a copy of what the decision is about: they must not use the VM. Only
    those that a class overrides are called. The first exception of one ends the run with a PolicyError, whose cause it
    is.

    The attributes are decisions for the whole VM, read once when the VM is made; None leaves them to ``base``.

    >>> import shadowkvm as sk
    >>> class OnlyOnce(sk.Policy):
    ...     '''A table may go out of sync the first time only.'''
    ...     def __init__(self):
    ...         self.seen = set()
    ...     def may_unsync(self, page):
    ...         if page.gfn in self.seen:
    ...             return False
    ...         self.seen.add(page.gfn)
    ...         return True
    >>> vm = sk.Vm(memory=32 << 20, policy=OnlyOnce())
    >>> vm.policy
    'OnlyOnce'
    """

    base: ClassVar[str] = "kvm"
    """The built-in policy that decides what is not overridden."""
    large_pages: ClassVar[bool | None] = None
    """Pages of 2 MiB and more are shadowed by large entries (``kvm_mmu_hugepage_adjust``)."""
    sync_all: ClassVar[bool | None] = None
    """A CR3 load syncs every unsync page, not only those below the new root (``kvm_mmu_sync_roots``)."""
    unsync_limit: ClassVar[int | None] = None
    """How many tables of each vCPU may be out of sync; one more brings the first back."""
    invlpg_protects: ClassVar[bool | None] = None
    """INVLPG brings the whole unsync table into step and protects it again (``FNAME(invlpg)`` looks at one entry)."""
    update_on_write: ClassVar[bool | None] = None
    """An emulated store to a last-level table fills its entry anew (``kvm_mmu_pte_write`` leaves it empty)."""
    victim: ClassVar[Victim | None] = None
    """Which shadow page goes when the quota is used up (``kvm_mmu_zap_oldest_mmu_pages``: the oldest)."""

    def may_unsync(self, page: PageView) -> bool:  # noqa: ARG002
        """Whether a last-level table that the guest wants to write may go out of sync (``mmu_try_to_unsync_pages``)."""
        return True

    def flood_threshold(self, page: PageView) -> int:  # noqa: ARG002
        """How many emulated stores in a row zap an upper-level page (``detect_write_flooding``: 3); 0: none do."""
        return 3

    def prefetch(self, page: PageView) -> int:  # noqa: ARG002
        """How many entries a fault fills in together (``pte_prefetch``: 8); rounded down to a power of two."""
        return 8


def described(policy: object) -> tuple[str, str, tuple[object, list[str], dict[str, object]] | None]:
    """A policy as the engine takes it: what it is called, the built-in one, and what decides beside it.

    Raises:
        ConfigError: no policy has that name; the object overrides nothing, or something that is no decision.
    """
    if policy is None:
        return "kvm", "kvm", None
    if isinstance(policy, str):
        _known("policy", policy)
        return policy, policy, None
    if isinstance(policy, type):
        raise ConfigError(f"policy {policy.__name__}: an instance is expected, not the class")
    asks = [name for name in _METHODS if _overrides(policy, name)]
    rules = {name: getattr(policy, name) for name in _RULES if getattr(policy, name, None) is not None}
    base = getattr(policy, "base", "kvm")
    if not (asks or rules) and not isinstance(policy, Policy):
        raise ConfigError(f"policy {policy!r}: a name, or an object with one of {', '.join((*_METHODS, *_RULES))}")
    _known("base of the policy", str(base))
    return type(policy).__name__, str(base), (policy, asks, rules)


def _known(what: str, text: str) -> None:
    name = text.partition(":")[0]
    if name not in POLICIES:
        raise ConfigError(f"{what} {name!r} is not known{nearest(name, POLICIES) or '; see: shadowkvm policy list'}")


def _overrides(policy: object, name: str) -> bool:
    method = getattr(policy, name, None)
    return callable(method) and getattr(method, "__func__", method) is not getattr(Policy, name)
