"""Rows to make a report of, and a strict reader of the page."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

from alignments.metrics import wilson
from alignments.rows import Row

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order. Keeps visible texts, attributes and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        kind = self.open[-1] if self.open else ""
        if kind == "script":
            self.scripts.append(data)
        elif kind != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def figures(self) -> dict[str, dict[str, list[dict[str, object]]]]:
        found: dict[str, dict[str, list[dict[str, object]]]] = json.loads(self.scripts[0])
        return found


def row(layer: int, position: str, method: str, seed: int, split: str, hits: int, variable: str = "position") -> Row:
    low, high = wilson(hits, 200)
    return Row(
        task="ioi",
        model="tiny",
        variable=variable,
        site=f"L{layer}.block_output",
        layer=layer,
        component="block_output",
        positions=f"Marked({position!r})",
        position_label=position,
        method=method,
        rank=None if method == "full_vector" else 8,
        seed=seed,
        split=split,
        n=200,
        iia=hits / 200,
        low=low,
        high=high,
        copy_base=0.5,
        copy_source=0.25,
        majority=0.125,
        task_accuracy=0.97,
        seconds=1.5,
        extra={"flip": 0.375},
    )


def some_rows(variable: str = "position") -> list[Row]:
    """Two methods and a control on 2 layers x 2 positions, 2 seeds; the best is DAS at L4, subject2: 165/200."""
    hits = {(0, "last"): 60, (0, "subject2"): 80, (4, "last"): 90, (4, "subject2"): 160}
    return [
        row(layer, position, method, seed, split, count + 10 * seed + bonus, variable)
        for method, bonus in (("full_vector", -10), ("das", 0), ("control:random_subspace", -50))
        for (layer, position), count in hits.items()
        for seed in (0, 1)
        for split in ("select", "test")
    ]


def many_ranks() -> list[Row]:
    """`some_rows` and DAS at L4, subject2 at ranks 1 (0.5), 4 (0.81) and 64 (0.7), on both splits."""
    return some_rows() + [
        replace(row(4, "subject2", "das", 0, split, hits), rank=rank)
        for rank, hits in ((1, 100), (4, 162), (64, 140))
        for split in ("select", "test")
    ]
