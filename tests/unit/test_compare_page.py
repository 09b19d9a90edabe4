"""The page of a comparison: whole by itself, the same each time, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shadowkvm.compare import Comparison, Variant, compare
from shadowkvm.compare.charts import _COLOURS
from shadowkvm.compare.page import as_html
from shadowkvm.compare.words import sentence
from shadowkvm.costs import COST_INFO, account, load_costs
from shadowkvm.mmus import Mmu
from shadowkvm.ops import TRACE_DTYPE
from shadowkvm.workloads import get

Shell = Callable[..., tuple[int, str, str]]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VARIANTS = [
    Variant(),
    Variant(policy="no_unsync"),
    *(Variant(mmu=Mmu.parse(name)) for name in ("nested", "nested:warm:2m", "agile")),
]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(get("fork_exit").build(scale=0.1), VARIANTS)


class Page(HTMLParser):
    """Text, tags that are open, and addresses of other things."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.outside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "path", "use", "rect"}:
            self.open.append(tag)
        self.outside += [
            v or "" for k, v in attrs if k in {"src", "href", "xlink:href"} and not (v or "").startswith("#")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"meta", "path", "use", "rect"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_by_itself(comparison: Comparison) -> None:
    html = as_html(comparison, ["shadowkvm", "compare", "fork_exit"])
    page = Page(html)
    assert page.open == []
    assert page.outside == []
    assert html.count("<svg") == 2
    text = " ".join(page.text)
    assert sentence(comparison) in text
    for word in (*comparison.names(), *COST_INFO, "modelled", "exact", "Khorenko", "pf_emulate"):
        assert word in text, word
    assert "shadowkvm compare fork_exit" in text
    assert as_html(comparison) == as_html(comparison)


def test_the_verb_writes_it_whole_or_not_at_all(tmp_path: Path, shell: Shell) -> None:
    out = tmp_path / "report.html"
    words = ("compare", "fork_exit", "--scale", "0.05", "--mmu", "shadow,nested", "-q")
    assert shell(*words, "-o", out) == (0, "", "")
    assert out.read_text(encoding="utf-8").endswith("</html>\n")
    status, _, err = shell(*words, "-o", tmp_path / "none" / "report.html")
    assert status == 2
    assert "is not there" in err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert shell(*words[:2], "--scale", "0.05", "--format", "html")[1].startswith("<!doctype html>")


def test_without_matplotlib_the_extra_is_named(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shell: Shell
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "shadowkvm\[plot\]"'):
        as_html(comparison)
    monkeypatch.setattr("shadowkvm.compare.verb.compare", None)  # it is not come to
    status, _, err = shell("compare", "fork_exit", "--scale", "0.05", "-o", tmp_path / "report.html")
    assert status == 2
    assert "shadowkvm[plot]" in err
    assert not list(tmp_path.iterdir())


def test_crossings_are_where_the_times_are_equal(comparison: Comparison) -> None:
    for cost in ("exit", "walk_reference"):
        for i, j, x in comparison.crossings(cost):
            ends = [comparison.runs[n].account.line(cost) for n in (i, j)]
            at = [fixed + slope * x for fixed, slope in ends]
            assert at[0] == pytest.approx(at[1])
            assert ends[0][1] > ends[1][1], "the first is the one that grows faster"
    both = compare(
        get("working_set").build(scale=0.05, changes=1),
        [VARIANTS[0], Variant(mmu=Mmu.parse("nested:warm"))],
        steady=True,
    )
    ((i, j, x),) = both.crossings("exit")
    for price, cheaper in ((0.9 * x, i), (1.1 * x, j)):
        exits = {name: replace(both.costs.costs[name], cycles=price) for name in ("exit", "nested_exit")}
        costs = replace(both.costs, costs={**both.costs.costs, **exits})
        cycles = [account(run.account.events, costs).cycles for run in both.runs]
        assert cycles.index(min(cycles)) == cheaper


def test_exits_that_take_longer_under_nested_paging_stay_so() -> None:
    """Where the two kinds of exit differ, the lines go through what the table says, and so does the answer."""
    ways = [Variant(), Variant(mmu=Mmu.parse("nested"))]
    done = compare(get("fork_exit").build(scale=0.05), ways, costs=load_costs("pvm"))
    for run in done.runs:
        fixed, slope = run.account.line("exit")
        assert fixed + slope * done.costs["exit"] == pytest.approx(run.account.cycles)
    ((below, above, x),) = done.crossings("exit")
    cycles = [run.account.cycles for run in done.runs]
    assert cycles.index(min(cycles)) == (below if done.costs["exit"] < x else above)
    assert "5.97 times as much" in as_html(done)


@pytest.mark.parametrize("title", ["[/x] [bold red] <b>", "a $x^{$ b"])
def test_odd_titles_are_shown_as_they_are(title: str, tmp_path: Path, shell: Shell) -> None:
    text = f'schema = "shadowkvm.costs/1"\ntitle = "{title}"\nbase = "zen3"\n'
    path = tmp_path / "$a^{$.toml"
    path.write_text(text, encoding="utf-8")
    words = ("compare", "fork_exit", "--scale", "0.05", "--mmu", "shadow,nested", "--costs", path)
    status, out, err = shell(*words)
    assert (status, err) == (0, "")
    assert title in out
    assert shell(*words, "-o", tmp_path / "page.html") == (0, "", "")
    assert escape(title) in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_trace_without_rows_and_costs_of_nothing(tmp_path: Path, shell: Shell) -> None:
    np.save(tmp_path / "empty.npy", np.zeros(0, TRACE_DTYPE))
    assert shell("compare", tmp_path / "empty.npy", "--mmu", "shadow,nested", "-o", tmp_path / "x.html") == (0, "", "")
    assert "All take 0 ns" in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["x.pdf", "x.HTML", "x.htm"])
def test_suffixes(name: str, tmp_path: Path, shell: Shell) -> None:
    status, _, err = shell("compare", "fork_exit", "--scale", "0.05", "-o", tmp_path / name)
    assert (status, (tmp_path / name).exists()) == ((2, False) if name == "x.pdf" else (0, True)), err
    assert shell("compare", "fork_exit", "--scale", "0.05", "-o", "/dev/null")[0] == 2


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_it(comparison: Comparison, tmp_path: Path) -> None:
    """The text is there to be read, nothing is cut off at the side, and the bars have their colours."""
    import matplotlib.image

    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(as_html(comparison), encoding="utf-8")
    words = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1200,3600",
    ]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    dom = subprocess.run([*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    text = re.sub(r"<[^>]*>", " ", dom.stdout)
    for word in (sentence(comparison), "modelled time", "Where the time goes", "nested:warm:2m", "shadow faults"):
        assert word in text, word
    subprocess.run([*words, f"--screenshot={picture}", page.as_uri()], capture_output=True, check=True, timeout=120)
    pixels = (matplotlib.image.imread(picture)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (3600, 1200)
    for colour in _COLOURS[:3]:
        rgb = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (pixels == rgb).all(axis=2).sum() > 500, f"{colour} is not to be seen"
    edge = pixels[:, -4:]
    assert (edge == 255).all(), "something reaches over the side"
