"""Compare: one trace or workload under several MMUs, kernels, policies and CPUs, and what each of them makes of it."""

from __future__ import annotations

from shadowkvm.compare.runs import Comparison, Ran, Variant, compare
from shadowkvm.compare.texts import as_csv, as_json, as_tables

__all__ = ["Comparison", "Ran", "Variant", "as_csv", "as_json", "as_tables", "compare"]
