"""The verbs of costs: ``shadowkvm costs list``, ``show`` and ``mmus``."""

from __future__ import annotations

import json
from typing import Final

from cyclopts import App
from rich.console import Group
from rich.text import Text

from shadowkvm.costs import COST_INFO, PRESETS, load_costs
from shadowkvm.mmus import MMU_WORDS
from shadowkvm.report import table
from shadowkvm.terminal import FormatOption, OutputOption, check_folder, choose_format, emit, show_list

__all__ = ["add_verbs"]

_LIST: Final = "shadowkvm.cost-tables/1"
_MMUS: Final = "shadowkvm.mmus/1"

app = App(
    name="costs", help="Cost tables: what an exit, a page walk, a resync take, each with its source; MMUs to compare."
)


def add_verbs(parent: App) -> None:
    """Hang the verbs of this module into the command line."""
    parent.command(app)


@app.command(name="list", help_epilogue="Examples:\n\n    shadowkvm costs list")
def list_tables(*, format_: FormatOption = None, output: OutputOption = None) -> int:
    """List the cost tables that come with the package."""
    rows = [[name, load_costs(name).title] for name in PRESETS]
    show_list("Costs", ("name", "doc"), rows, schema=_LIST, format_=format_, output=output)
    return 0


@app.command(name="mmus", help_epilogue="Examples:\n\n    shadowkvm costs mmus")
def list_mmus(*, format_: FormatOption = None, output: OutputOption = None) -> int:
    """List the words that the name of an MMU is made of, as in nested:warm:2m."""
    rows = [list(row) for row in MMU_WORDS.items()]
    show_list("MMUs", ("name", "doc"), rows, schema=_MMUS, format_=format_, output=output)
    return 0


@app.command(
    help_epilogue="Examples:\n\n    shadowkvm costs show zen3\n    shadowkvm costs show mine.toml --format json"
)
def show(name: str, /, *, format_: FormatOption = None, output: OutputOption = None) -> int:
    """What each event takes, and where the figure comes from.

    Parameters
    ----------
    name
        A preset (shadowkvm costs list), or a TOML file.
    """
    chosen = choose_format(format_, output, ("table", "json"))
    check_folder(output)
    costs = load_costs(name)
    if chosen == "json":
        emit(json.dumps({"schema": "shadowkvm.costs/1", **costs.to_dict()}, indent=1) + "\n", output)
        return 0
    rows = [[key, COST_INFO[key], cost.given, f"{cost.cycles:,.0f}"] for key, cost in costs.costs.items()]
    sources = [Text(f"  {key}: {cost.source}") for key, cost in costs.costs.items()]
    clock = f"{costs.ghz:g} GHz: {costs.clock_source}"
    emit(
        Group(
            Text(f"{costs.name}: {costs.title}", style="bold"),
            Text(clock),
            Text(),
            table("Costs", ("event", "what", "as given", "cycles"), rows, left=2),
            Text(),
            Text("Sources", style="bold"),
            *sources,
        ),
        output,
    )
    return 0
