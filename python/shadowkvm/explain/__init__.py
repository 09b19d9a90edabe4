"""One operation as a story: the CPU's walk, the exit, the guest's tables, the decision, what changed, how it goes on.

`explain` tells what a call does on a `Vm`; `explain_row` a row of a trace; `demo` has small guests to begin with.
"""

from __future__ import annotations

from shadowkvm.explain.demo import DEMOS, demo
from shadowkvm.explain.page import html
from shadowkvm.explain.story import Change, Step, Story
from shadowkvm.explain.tell import explain, explain_row, explain_rows

__all__ = ["DEMOS", "Change", "Step", "Story", "demo", "explain", "explain_row", "explain_rows", "html"]
