"""The sections that only some searches have rows for: each holds its numbers, and is absent without them."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from alignments.exports import csv_text
from alignments.report import render_report
from alignments.report_sections import meaning
from tests.alignments.reported import Page, many_ranks, row, some_rows


def test_the_rank_curve_holds_the_means_and_rings_the_smallest_rank() -> None:
    page = Page(render_report(many_ranks()))
    (figure,) = (one for one in page.figures.values() if one["layout"]["xaxis"].get("type") == "log")  # type: ignore[call-overload]
    line, rings = figure["data"]
    assert (line["x"], line["y"]) == ([1, 4, 8, 64], [0.5, 0.81, pytest.approx(0.825), 0.7])
    assert (rings["x"], rings["y"]) == ([4], [0.81])
    assert "rank 4 is the smallest within 0.02 of the best on select (rank 8, 0.82)" in page.text
    assert "How many dimensions" not in Page(render_report(some_rows())).text


def test_ranks_have_one_verdict_per_method_and_single_cells_no_map() -> None:
    page = Page(render_report(many_ranks()))
    kinds = [figure["data"][0]["type"] for figure in page.figures.values()]
    assert kinds.count("heatmap") == 3  # the ranks that were tried at one place only are points of the curve
    names = page.figures["figure-3"]["data"][0]["y"]
    assert isinstance(names, list) and len(names) == 2  # full vector, and DAS at its one best rank


def test_beyond_eight_maps_only_the_rank_chosen_is_drawn() -> None:
    das = [one for one in some_rows() if one.method == "das"]
    rows = [replace(one, rank=rank) for rank in range(1, 10) for one in das]
    page = Page(render_report(rows))
    kinds = [figure["data"][0]["type"] for figure in page.figures.values()]
    assert kinds.count("heatmap") == 1
    assert "Of each method the rank chosen is drawn: 1 of 9 maps." in page.text


def test_every_control_says_what_it_would_mean() -> None:
    rows = some_rows()
    names = ("random_model", "shuffled_labels", "complement", "rival:token", "held_out", "made_up")
    rows += [row(4, "subject2", f"control:{name}", seed, "test", 90) for name in names for seed in (0, 1)]
    rows += [row(4, "subject2", "control:random_source", 0, "test", 190)]
    page = Page(render_report(rows))
    for name in (*names, "random_source", "random_subspace"):
        assert meaning(f"control:{name}") in page.text
    assert len({meaning(f"control:{name}") for name in names}) == len(names)
    assert "“token”" in meaning("control:rival:token")
    # Six lie below it, of which "held out" should not; one lies above.
    assert page.texts.count("below the best cell") == 7 and page.texts.count("above the best cell") == 1
    marked = [value for tag, name, value in page.attributes if (tag, name) == ("td", "class")]
    assert marked.count("no") == 2


def test_learned_ranks_masks_and_divergence_stand_in_tables_where_facts_tell_them() -> None:
    told = {"hard_rank": 13.0, "initial_rank": 32.0, "soft_iia": 0.875, "divergence": 0.4321, "width": 576.0}
    told |= {"divergence_natural": 0.0123, "divergence_mahalanobis": 1.75}
    rows = [replace(one, facts=told) if one.method == "das" and one.layer == 4 else one for one in some_rows()]
    page = Page(render_report(rows))
    for shown in ("Learned rank", "13, 13", "Soft and hard masks", "0.875", "Are patched activations natural?"):
        assert shown in page.texts
    for shown in ("0.4321", "0.0123", "1.750", "0.050"):  # the last: soft less hard at subject2
        assert shown in page.texts
    assert "rank 13/576" in page.text
    plain = Page(render_report(some_rows())).text
    assert not any(head in plain for head in ("Learned rank", "Soft and hard", "natural?"))


def test_failing_pairs_are_grouped_and_shown() -> None:
    examples = [
        {"base": f"base {index}", "source": "source", "label": " a", "answer": " a" if index % 4 else " <b>"}
        | {"kind": "same", "right": bool(index % 4), "base_setting": {"position": 1 if index % 4 else 2}}
        for index in range(80)
    ]
    page = Page(render_report(some_rows(), examples=examples))
    assert "20 of 80 pairs fail" in page.text
    assert "base.position = 2" in page.texts and "worse" in page.texts
    assert "10 of 20 failing pairs" in page.text and " <b>" in page.texts
    assert "pairs fail" not in Page(render_report(some_rows())).text


def test_the_rows_can_be_taken_away() -> None:
    rows = some_rows()
    page = Page(render_report(rows))
    (address,) = (value for tag, name, value in page.attributes if (tag, name) == ("a", "href"))
    assert base64.b64decode(address.partition("base64,")[2]).decode() == csv_text(rows)
    assert ("a", "download", "rows.csv") in page.attributes


def test_every_figure_can_be_saved() -> None:
    page = Page(render_report(many_ranks()))
    saved = [value for tag, name, value in page.attributes if name == "data-figure"]
    assert saved == [name for name in page.figures for _ in ("png", "svg")]
    assert "das-rank-8-block-output" in {value for _, name, value in page.attributes if name == "data-name"}


PROBE = """<script>window.addEventListener("load", function () { setTimeout(function () {
  var out = document.createElement("pre"), told = [];
  document.querySelectorAll(".scroll").forEach(function (one) { told.push(one.scrollWidth - one.clientWidth); });
  told.push(document.documentElement.scrollWidth - document.documentElement.clientWidth);
  HTMLAnchorElement.prototype.click = function () { out.textContent += " " + this.download + "=" +
    this.href.slice(0, 18); };
  out.id = "probe"; out.textContent = "wider:" + Math.max.apply(null, told); document.body.appendChild(out);
  document.querySelectorAll("button[data-figure=figure-0]").forEach(function (one) { one.click(); });
}, 1500); });</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_1300_wide_scrolls_nothing_sideways_and_saves_figures(tmp_path: Path) -> None:
    rows = [replace(one, kinds={"same": 0.5, "different": 0.5}) for one in many_ranks()]
    path = tmp_path / "report.html"
    path.write_text(render_report(rows).replace("</body>", PROBE), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--dump-dom", "--window-size=1300,900", "--virtual-time-budget=9000"]
    done = subprocess.run(
        ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr[-2000:]
    told = found[1].split()
    assert told[0] == "wider:0"
    assert sorted(told[1:]) == [
        "full-vector-block-output.png=data:image/png;bas",
        "full-vector-block-output.svg=data:image/svg+xml",
    ]
