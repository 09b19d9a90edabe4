"""Random cases: seeded guests that edit their own page tables in every way that has a rule."""

from __future__ import annotations

from shadowkvm.kvm.generate.steps import generate
from shadowkvm.kvm.generate.themes import THEMES

__all__ = ["THEMES", "generate"]
