"""Sphinx: furo over MyST. Every page beside this file is found by itself."""

import tomllib
from pathlib import Path

CARGO = tomllib.loads((Path(__file__).parents[1] / "Cargo.toml").read_text(encoding="utf-8"))

project = "shadowkvm"
author = "The shadowkvm authors"
project_copyright = "2026, The shadowkvm authors"
release = CARGO["workspace"]["package"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# `Vm.run` in a docstring is a name of the package; what is none (a field, a word) stays text.
default_role = "py:obj"
nitpick_ignore_regex = [("py:.*", ".*")]
# A word that is a field of several classes stays text.
suppress_warnings = ["ref.python"]
python_use_unqualified_type_names = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"shadowkvm {release}"
nitpicky = True
