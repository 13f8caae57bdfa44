"""The page is whole, holds the numbers, loads nothing, and says without its figures what they show."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from alignments.config import load_config
from alignments.metrics import mean_over_seeds, verdict, wilson
from alignments.report import render_report, write_report
from alignments.report_figures import comparison, heatmap, ink_on
from alignments.statistics import fdr
from tests.alignments.reported import Page, some_rows


def test_the_page_is_whole_and_says_the_verdict_in_words() -> None:
    rows = some_rows()
    page = Page(render_report(rows))
    assert verdict(rows).sentence in page.text
    assert "Above every trivial baseline" in page.text
    assert "Chosen among 8 cells" in page.text
    low, high = wilson(165, 200)
    for shown in ("0.825", f"[{low:.3f}, {high:.3f}]", "0.80, 0.85", "copy-base", "0.375", "control random subspace"):
        assert shown in page.text


def test_the_page_loads_nothing() -> None:
    text = render_report(some_rows())
    page = Page(text)
    loading = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert [(tag, name) for tag, name, _ in loading] == [("link", "href"), ("a", "href")]
    assert all(value.startswith(("data:,", "data:text/csv;charset=utf-8;base64,")) for _, _, value in loading)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy and "http" not in policy
    styles = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert styles and not any("url(" in style or "@import" in style for style in styles)
    ours = [script for script in page.scripts if len(script) < 1_000_000]
    assert len(page.scripts) - len(ours) == 1  # plotly, once
    assert not any("http" in script for script in ours)


def test_plotly_accepts_every_figure_and_it_holds_the_means() -> None:
    import plotly.graph_objects as go

    page = Page(render_report(some_rows()))
    assert len(page.figures) == 4  # three heatmaps, one comparison
    for figure in page.figures.values():
        go.Figure(figure)
    trace = page.figures["figure-1"]["data"][0]
    assert (trace["x"], trace["y"]) == (["last", "subject2"], ["L0", "L4"])
    assert trace["z"] == [[pytest.approx(0.325), pytest.approx(0.425)], [pytest.approx(0.475), pytest.approx(0.825)]]
    assert (trace["zmin"], trace["zmax"]) == (0, 1)
    hover = trace["hovertext"]
    assert isinstance(hover, list)
    assert "IIA 0.825" in hover[1][1] and "n=200" in hover[1][1] and "0.850 (seed 1)" in hover[1][1]


def test_every_figure_says_in_words_what_it_shows() -> None:
    page = Page(render_report(some_rows()))
    labels = {value for tag, name, value in page.attributes if tag == "div" and name == "aria-label"}
    drawn = [value for tag, name, value in page.attributes if tag == "div" and name == "id"]
    assert drawn == list(page.figures)
    assert any(label.startswith("Heatmap of IIA by layer and position, DAS rank 8") for label in labels)
    assert any("0.82 (L4.block_output @ subject2)" in label or "0.83 (L4" in label for label in labels)


def test_the_outline_and_the_stars_are_where_they_belong() -> None:
    rows = [one for one in some_rows() if one.method == "das"]
    best = verdict(rows)
    means = [mean for mean in mean_over_seeds(rows) if mean.split == "test"]
    figure = heatmap(means, best.reported, {one.mean.cell: one for one in fdr(means)})
    (shape,) = figure["layout"]["shapes"]
    assert (shape["x0"], shape["y0"]) == (0.5, 0.5)  # second column, second layer
    drawn = figure["data"][1]
    texts = {(x, y): text for x, y, text in zip(drawn["x"], drawn["y"], drawn["text"], strict=True)}
    assert texts["subject2", "L4"].endswith("*")
    assert sum(text.endswith("*") for text in texts.values()) == 1
    hover = figure["data"][0]["hovertext"]
    assert "adjusted p &lt; 0.001 (binomial" in hover[1][1] and "adjusted p 1.000" in hover[0][0]
    (line,) = comparison(best, [best.reported], [])["layout"]["shapes"]
    assert line["x0"] == best.baseline.high == wilson(100, 200)[1]


def test_the_numbers_contrast_with_their_cells() -> None:
    def channel(one: float) -> float:  # WCAG 2.2, written again: the answer must not come from the code it checks
        return one / 12.92 if one <= 0.04045 else math.pow((one + 0.055) / 1.055, 2.4)

    from alignments.report_figures import colour_at

    for step in range(101):
        red, green, blue = colour_at(step / 100)
        light = 0.2126 * channel(red) + 0.7152 * channel(green) + 0.0722 * channel(blue)
        ink = 0.0 if ink_on(step / 100) == "#000000" else 1.0
        contrast = (max(light, ink) + 0.05) / (min(light, ink) + 0.05)
        assert contrast >= 4.5


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for one in value.values() for text in strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) else []


def test_texts_of_others_cannot_become_markup() -> None:
    nasty = "</script><script>alert('x')</script> & <i>"
    rows = [replace(one, variable=nasty, position_label=nasty, model=nasty) for one in some_rows()]
    text = render_report(rows, config={nasty: nasty}, environment={"a": {nasty: [nasty]}}, lint={nasty: 1}, title=nasty)
    page = Page(text)
    assert len(page.scripts) == 3
    assert not any("alert" in script for script in page.scripts[1:])
    assert nasty in page.text
    own = re.compile(r"</?b>|<br>|<extra></extra>")  # the markup that our own labels hand to Plotly
    shown = [own.sub("", one) for one in strings(page.figures)]
    assert any("alert" in one for one in shown)
    assert not any("<" in one for one in shown)


def test_figure_data_cannot_end_its_script_element() -> None:
    from records.page_parts import json_in_html

    value = {"text": "</script><!-- & é"}
    assert "<" not in json_in_html(value)
    assert json.loads(json_in_html(value)) == value


def test_configuration_environment_and_check_are_shown_with_their_sources() -> None:
    config = load_config(sets=["rank=5"], flags={"task": "ioi"})
    environment = {"versions": {"torch": "2.13.0"}, "resumed": [{"rows": 3}], "commit": None}
    page = Page(render_report(some_rows(), config=config, environment=environment, lint={"labels": {"agree": 300}}))
    for shown in ("rank", "5", "--set", "versions.torch", "2.13.0", "resumed.1.rows", "labels.agree", "300"):
        assert shown in page.texts


def test_rows_without_a_verdict_still_give_a_report() -> None:
    rows = [one for one in some_rows() if one.split == "test"]
    page = Page(render_report(rows))
    assert "No verdict" in page.text and "none of 16 rows is on the select split" in page.text
    assert "0.825" in page.text


def test_a_search_that_tests_only_the_chosen_cell_shows_the_select_heatmap() -> None:
    rows = some_rows()
    best = verdict(rows).reported.cell
    page = Page(render_report([one for one in rows if one.split == "select" or one.cell == best]))
    assert "Mean over seeds on the select split" in page.text
    assert page.text.count("Split") == 1  # the table now mixes splits, and says which


def test_every_variable_has_its_own_verdict_and_figures() -> None:
    page = Page(render_report(some_rows("position") + some_rows("token")))
    assert len(page.figures) == 8
    assert page.text.count("Above every trivial baseline") == 2


def test_a_trivially_solved_variable_is_not_praised() -> None:
    rows = [replace(one, copy_source=1.0) for one in some_rows()]
    text = Page(render_report(rows)).text
    assert "Trivially solved" in text and "trivially solved by copying the source" in text
    assert "Above every" not in text


def test_an_unfinished_heatmap_has_holes_and_sites_without_layer_a_row(tmp_path: Path) -> None:
    rows = some_rows()[:-4]
    rows += [replace(one, site="embedding_output", component="embedding_output", layer=None) for one in rows[:8]]
    page = Page(write_report(tmp_path / "report.html", rows).read_text(encoding="utf-8"))
    assert any(None in line for figure in page.figures.values() for line in figure["data"][0].get("z", []))  # type: ignore[attr-defined]
    assert any(figure["data"][0]["y"] == ["no layer"] for figure in page.figures.values())
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no rows to report"):
        render_report([])
