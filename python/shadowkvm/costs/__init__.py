"""Costs: what the events of an MMU take, as data; modelled time, and by what."""

from __future__ import annotations

from shadowkvm.costs.account import CAUSES, Account, Cause, Share, account
from shadowkvm.costs.table import COST_INFO, PRESETS, Cost, CostTable, load_costs

__all__ = [
    "CAUSES",
    "COST_INFO",
    "PRESETS",
    "Account",
    "Cause",
    "Cost",
    "CostTable",
    "Share",
    "account",
    "load_costs",
]
