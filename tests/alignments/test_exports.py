"""Files are read back by other readers: csv by csv, SVG by an XML parser, PNG by Pillow."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignments.exports import csv_text, drawings, text_summary, write_csv, write_figures
from alignments.metrics import verdict, wilson
from alignments.report_figures import colour_at
from alignments.rows import Row
from records import drawing
from records.drawing import Box, Drawing, Line, MissingPillow, Text

SVG = "{http://www.w3.org/2000/svg}"


def row(hits: int, layer: int, position: str, split: str, *, rank: int | None = 8, **changes: Any) -> Row:
    low, high = wilson(hits, 200)
    values: dict[str, Any] = {
        "task": "ioi",
        "model": "tiny",
        "variable": "position",
        "site": f"L{layer}.block_output",
        "layer": layer,
        "component": "block_output",
        "positions": f"Marked({position!r})",
        "position_label": position,
        "method": "das",
        "rank": rank,
        "seed": 0,
        "split": split,
        "n": 200,
        "iia": hits / 200,
        "low": low,
        "high": high,
        "copy_base": 0.5,
        "copy_source": 0.25,
        "majority": 0.125,
        "task_accuracy": None,
        "seconds": 1.5,
    }
    return Row(**(values | changes))


def some_rows() -> list[Row]:
    """DAS of rank 8 on 2 layers x 2 positions, ranks 1 and 64 at the best place, and a control there."""
    hits = {(0, "last"): 60, (0, "subject2"): 80, (4, "last"): 101, (4, "subject2"): 164}
    rows = []
    for split in ("select", "test"):
        rows += [row(count, *place, split) for place, count in hits.items()]
        rows += [row(count, 4, "subject2", split, rank=rank) for rank, count in ((1, 120), (64, 160))]
        rows.append(row(104, 4, "subject2", split, method="control:random_model"))
    return rows


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(svg).iter(f"{SVG}text")]


def test_csv_is_flat_and_holds_the_union_of_all_columns(tmp_path: Path) -> None:
    told = row(100, 4, "last", "test", extra={"flip": 0.375}, kinds={"same": 0.5}, facts={"hard_rank": 13.0})
    path = write_csv([row(60, 0, 'a "quoted", name', "test"), told], tmp_path / "rows.csv")
    with path.open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["position_label"], first["iia"], first["rank"]) == ('a "quoted", name', "0.3", "8")
    assert (first["extra.flip"], first["task_accuracy"]) == ("", "")
    assert (second["extra.flip"], second["iia.same"], second["fact.hard_rank"]) == ("0.375", "0.5", "13.0")
    assert not [name for name in first if name in ("extra", "kinds", "facts")]
    with pytest.raises(ValueError, match="there are no rows to write"):
        write_csv([], tmp_path / "none.csv")


def test_csv_rows_are_rows_again() -> None:
    rows = some_rows()
    kinds = {"layer": int, "rank": int, "seed": int, "n": int}
    rates = ("iia", "low", "high", "copy_base", "copy_source", "majority", "seconds")
    read = [
        {name: kinds.get(name, float if name in rates else str)(text) if text else None for name, text in one.items()}
        for one in csv.DictReader(io.StringIO(csv_text(rows)))
    ]
    assert [Row.from_json(one) for one in read] == rows


def test_figures_are_named_after_what_they_show(tmp_path: Path) -> None:
    paths = write_figures(some_rows(), tmp_path / "figures", formats=("svg",))
    assert [path.name for path in paths] == [
        "position-heatmap-das-rank-8-block-output.svg",
        "position-rank-curves.svg",
    ]
    assert all(ET.parse(path).getroot().tag == f"{SVG}svg" for path in paths)


def test_a_heatmap_holds_each_number_on_its_colour_and_the_stars() -> None:
    svg = drawings(some_rows())["position-heatmap-das-rank-8-block-output"].to_svg()
    shown = texts(svg)
    assert {"L0", "L4", "last", "subject2", "0.30", "0.40", "0.82*"} <= set(shown)
    assert "0.51" in shown or "0.50" in shown
    fills = {box.get("fill") for box in ET.fromstring(svg).iter(f"{SVG}rect")}
    assert "#" + "".join(f"{round(255 * one):02x}" for one in colour_at(0.82)) in fills
    inside = float(ET.fromstring(svg).get("width", 0))
    assert all(float(one.get("x", 0)) < inside for one in ET.fromstring(svg).iter(f"{SVG}text"))


def test_a_rank_curve_is_higher_where_iia_is_and_rings_the_smallest_rank() -> None:
    picture = drawings(some_rows())["position-rank-curves"]
    dots = [mark for mark in picture.marks if isinstance(mark, drawing.Dot)]
    points, rings = [one for one in dots if not one.ring], [one for one in dots if one.ring]
    assert [one.x for one in points] == sorted(one.x for one in points)
    assert points[0].y > points[2].y > points[1].y  # 0.60, 0.82, 0.80 at ranks 1, 8, 64
    # Logarithmic: 8 lies half-way between 1 and 64.
    assert points[1].x == pytest.approx((points[0].x + points[2].x) / 2)
    assert [(one.x, one.y) for one in rings] == [(points[1].x, points[1].y)]


def test_names_of_two_searches_do_not_overwrite_each_other() -> None:
    rows = some_rows() + [replace(one, model=name) for one in some_rows() for name in ("other", "third")]
    assert sorted(drawings(rows)) == sorted(
        f"position-{what}{number}"
        for what in ("heatmap-das-rank-8-block-output", "rank-curves")
        for number in ("", "-2", "-3")
    )


def test_a_png_is_the_drawing_in_pixels(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    picture = Drawing(40, 30, "title", [Box(10, 5, 20, 10, fill="#ff0000"), Line(((0, 25), (40, 25)), "#0000ff", 2)])
    picture.add(Text(20, 10, "M", "middle"))
    with image_module.open(picture.save(tmp_path / "a.png")) as image:
        assert image.size == (80, 60)
        colours = [image.getpixel(place) for place in ((22, 12), (5, 5), (40, 50), (59, 29), (61, 31))]
    white = (255, 255, 255)
    assert colours == [(255, 0, 0), white, (0, 0, 255), (255, 0, 0), white]
    paths = write_figures(some_rows(), tmp_path, formats=("svg", "png"))
    assert [path.suffix for path in paths] == [".svg", ".png"] * 2


def test_without_pillow_svg_works_and_png_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(MissingPillow, match="pip install pillow"):
        write_figures(some_rows(), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
    assert len(write_figures(some_rows(), tmp_path, formats=["svg"])) == 2


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="formats among svg, png"):
        write_figures(some_rows(), tmp_path, formats=("pdf",))
    with pytest.raises(ValueError, match=r"Use \.svg or \.png"):
        Drawing(1, 1, "x").save(tmp_path / "a.pdf")


def test_texts_of_others_cannot_become_markup() -> None:
    nasty = '</text><script href="x">&'
    svg = drawings([replace(one, position_label=nasty, variable=nasty) for one in some_rows()]).popitem()[1].to_svg()
    assert not list(ET.fromstring(svg).iter(f"{SVG}script"))
    assert any(nasty in text for text in texts(svg))


def test_the_summary_tells_the_verdict_line_place_controls_and_rank() -> None:
    rows = some_rows()
    low, high = wilson(164, 200)
    lines = [one.strip() for one in text_summary(rows).splitlines()]
    assert lines == [
        "ioi / tiny / position",
        f"IIA .82 [.{low * 100:.0f},.{high * 100:.0f}], best trivial .50, random-init .52, rank 8",
        "DAS rank 8 at L4.block_output @ subject2, chosen among 6 cells on select, reported on test, n=200: "
        "above the best trivial baseline (copy-base)",
        f"control random model rank 8: 0.52 [{wilson(104, 200)[0]:.2f}, {wilson(104, 200)[1]:.2f}]",
        f"DAS at L4.block_output @ subject2: rank 8 is the smallest within 0.02 of the best on select (rank 8, 0.82); "
        f"on test it has IIA 0.82 [{low:.2f}, {high:.2f}], n=200.",
    ]
    assert verdict(rows).line == lines[1]


def test_the_summary_has_a_line_per_method_and_says_why_there_is_no_verdict() -> None:
    rows = some_rows() + [row(100, 4, "last", split, method="pca", rank=4) for split in ("select", "test")]
    assert "\n  PCA rank 4: IIA .50 [" in text_summary(rows)
    assert "none of 6 rows is on the select split" in text_summary([one for one in some_rows() if one.split == "test"])
    trivial = [replace(one, copy_source=1.0) for one in some_rows()]
    assert "trivially solved by copy-source" in text_summary(trivial)
    with pytest.raises(ValueError, match="there are no rows"):
        text_summary([])
