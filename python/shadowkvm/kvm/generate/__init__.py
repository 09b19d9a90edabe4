"""Seeded random cases."""

from __future__ import annotations

from shadowkvm.kvm.generate.steps import GROUPS, THEMES, generate

__all__ = ["GROUPS", "THEMES", "generate"]
