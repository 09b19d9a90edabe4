"""Real KVM as the referee: cases, what KVM answers to them, and whether the engine does the same.

>>> from shadowkvm.kvm import compare, generate
>>> case = generate(seed=7, ops=50)
>>> len(case.ops), case.theme
(50, 'dirty')

``Qemu().ask([case])`` gets the answers of KVM (docs/verify.md says what that needs), ``compare(case, answers)`` holds
the engine against them; ``shadowkvm verify`` does both.
"""

from __future__ import annotations

from shadowkvm.kvm.agreement import Agreement, Difference, compare
from shadowkvm.kvm.case import Answer, Case, Op, Slot
from shadowkvm.kvm.casefile import load, save
from shadowkvm.kvm.generate import generate
from shadowkvm.kvm.native import Native
from shadowkvm.kvm.qemu import Qemu

__all__ = [
    "Agreement",
    "Answer",
    "Case",
    "Difference",
    "Native",
    "Op",
    "Qemu",
    "Slot",
    "compare",
    "generate",
    "load",
    "save",
]
