"""What all tests share.

Hypothesis is derandomised, so that a red run says something about the commit and not about the dice;
`pytest --hypothesis-profile=explore` searches farther, anew each time.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("repeatable")
