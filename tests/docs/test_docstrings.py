"""Every example in a docstring of the package prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import shadowkvm

MODULES = [
    module.name
    for module in pkgutil.walk_packages(shadowkvm.__path__, "shadowkvm.")
    if not module.name.endswith(("__main__", "_core"))
]


@pytest.mark.parametrize("module", ["shadowkvm", *MODULES])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_the_examples_are_found() -> None:
    """A walk that finds no module would pass the test above."""
    examples = [test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in examples) > 100
    assert len(MODULES) > 50
