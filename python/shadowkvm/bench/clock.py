"""Time: CPU time of the thread, the best of several rounds, interleaved so that a slow moment hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["best", "rounds"]


def rounds(quick: bool) -> int:
    """How many rounds give a figure to quote, or one for a look."""
    return 3 if quick else 9


def best(works: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    """The least CPU seconds of the calling thread that each work took in ``count`` rounds.

    >>> sorted(best({"a": lambda: sum(range(1000)), "b": lambda: None}, 3))
    ['a', 'b']
    """
    least = dict.fromkeys(works, float("inf"))
    for _ in range(count):
        for name, work in works.items():
            start = time.thread_time()
            work()
            least[name] = min(least[name], time.thread_time() - start)
    return least
