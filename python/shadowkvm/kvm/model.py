"""Which of the modelled kernels a kernel is."""

from __future__ import annotations

import re
from typing import Final

from shadowkvm._core import MODEL_VERSION, MODEL_VERSIONS

__all__ = ["SERIES", "is_modelled", "model_of", "numbers"]

SERIES: Final = tuple(name.removeprefix("linux-") for name in MODEL_VERSIONS)
"""The kernel series that the engine models, oldest first."""


def numbers(version: str) -> list[int]:
    """The numbers in a version, to compare by: "6.1.0-56-amd64" gives [6, 1, 0, 56, 64]."""
    return [int(n) for n in re.findall(r"\d+", version)]


def is_modelled(kernel: str) -> bool:
    """Is this kernel, by its version, of a series that the engine models?"""
    return numbers(kernel)[:2] in [numbers(series) for series in SERIES]


def model_of(kernel: str) -> str:
    """The model_version to compare a kernel with: its own series, else the newest modelled one before it.

    Args:
        kernel: its version; empty: not known, which gives the default.

    >>> model_of("6.12.95+deb12-amd64"), model_of("6.1.0-56-amd64"), model_of("6.6.9"), model_of("")
    ('linux-6.12', 'linux-6.1', 'linux-6.1', 'linux-6.1')
    """
    if not kernel:
        return MODEL_VERSION
    older = [name for name, s in zip(MODEL_VERSIONS, SERIES, strict=True) if numbers(s) <= numbers(kernel)[:2]]
    return older[-1] if older else MODEL_VERSIONS[0]
