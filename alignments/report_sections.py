"""The sections of report.html that a search does not always have rows for: each is empty text where it has none.

Controls, rank curves, learned ranks, soft against hard masks, divergence, failing pairs, and the rows to take away.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from alignments.curves import RankCurve, init_sensitivity, rank_curves
from alignments.exports import csv_text
from alignments.failures import Failures, Group, Record, explore
from alignments.metrics import SeedMean, Verdict, non_overlapping
from alignments.report_figures import Figure, rank_figure, rank_summary
from alignments.rows import CONTROL_PREFIX, Row
from alignments.statistics import p_text
from records.page_parts import Entry, figure, interval, line, share, table, text, whole

SHOWN_GROUPS = 15
# Control -> what it would mean if it scored high. Those in GOOD are meant to.
MEANINGS = {
    "random_subspace": "any subspace of this width carries the variable, and the fit found nothing particular.",
    "random_model": "the method finds the variable in a network that has learned nothing: it put it there itself.",
    "shuffled_labels": "the fit scores on labels that mean nothing, so it learns the answers and not the variable.",
    "complement": "what is left beside the aligned subspace carries the variable too: it is not confined to it.",
    "held_out": "the alignment also holds for entities that it never saw. Low: it has learned names by heart.",
    "random_source": "the swap scores with a source that has nothing to do with the pair.",
}
GOOD = frozenset({"held_out"})


def meaning(method: str) -> str:
    """Return one sentence on what a control would show if it were high."""
    name, _, detail = method.removeprefix(CONTROL_PREFIX).partition("/")[0].partition(":")
    if name == "rival":
        rival = f"“{detail}”" if detail else "a rival variable"
        return f"If high: this place carries {rival} just as well, and the score does not tell them apart."
    return f"If high: {MEANINGS.get(name, 'the score does not depend on what this control takes away.')}"


def control_section(best: Verdict) -> str:
    """Return every control against the best cell, each with the sentence that says what it is for."""
    if not best.controls:
        return ""
    lines = []
    for one in best.controls:
        good = one.cell.method.removeprefix(CONTROL_PREFIX) in GOOD
        apart = non_overlapping(one.interval, best.reported.interval)
        below = apart and one.iia < best.reported.iia
        # A control that should be low passes by lying below; one that should be high by not doing so.
        verdict = "below the best cell" if below else "above the best cell" if apart else "not told from the best cell"
        told: list[Entry] = [
            text(one.method_text.removeprefix("control "), "name"),
            text(f"{one.cell.site} @ {one.position_label}", "place"),
            share(one.iia),
            interval(one),
            whole(one.n),
            text(verdict, "yes" if below != good else "no"),
            text(meaning(one.cell.method)),
        ]
        lines.append(line(told))
    reported = best.reported
    return (
        "<h3>Controls</h3>\n"
        f'<p class="soft">{escape(f"Held against the best cell, {reported}. Seeds and pairs as there.")}</p>\n'
        + table(["Control", "Place", "#IIA", "#95 % interval", "#n", "Against the best cell", "What it is for"], lines)
    )


def rank_section(rows: Sequence[Row], best: Verdict | None, figures: dict[str, Figure]) -> str:
    """Return the rank curve of each method at its best place, with the smallest sufficient rank in words."""
    curves = best_curves(rank_curves(rows))
    if not curves:
        return ""
    name = f"figure-{len(figures)}"
    figures[name] = rank_figure(curves, None if best is None else best.baseline)
    items = "".join(f"<li>{escape(curve.sentence)}</li>" for curve in curves if not curve.is_control)
    return (
        "<h2>How many dimensions it takes</h2>\n"
        '<p class="soft">Each method at the place where it scores highest on select; mean over seeds on test with '
        "95 % intervals. A ring marks the smallest rank that is good enough on select; the dashed line is the upper "
        "end of the best trivial baseline's interval.</p>\n"
        f"<ul>{items}</ul>\n{figure(name, 'IIA by rank', rank_summary(curves), figures[name])}"
    )


def best_curves(curves: Iterable[RankCurve]) -> list[RankCurve]:
    """Return one curve per method: that of the place with the highest mean on select."""
    found: dict[str, RankCurve] = {}
    for curve in curves:
        if curve.method not in found or _height(curve) > _height(found[curve.method]):
            found[curve.method] = curve
    return list(found.values())


def _height(curve: RankCurve) -> float:
    return -1.0 if curve.best is None or curve.best.select is None else curve.best.select.iia


def init_section(rows: Sequence[Row], split: str) -> str:
    """Return learned rank by the rank it started from."""
    lines = [
        line(
            [
                text(f"{one.score.method_text.split(' rank ')[0]}", "name"),
                text(f"{one.site} @ {one.position_label}", "place"),
                whole(one.initial_rank),
                share(one.mean, 1),
                share(one.sd, 1),
                text(", ".join(f"{value:g}" for value in one.learned)),
                share(one.score.iia),
                interval(one.score),
            ]
        )
        for one in init_sensitivity(rows, split)
    ]
    if not lines:
        return ""
    heads = ["Method", "Place", "#Started at", "#Learned rank", "#sd", "Each seed", "#IIA", "#95 % interval"]
    return (
        "<h2>Learned rank</h2>\n"
        '<p class="soft">Where the learned rank follows the one it started at, it says how the search was begun, and '
        "not how wide the variable is.</p>\n" + table(heads, lines, sortable=True)
    )


def soft_hard_section(means: Sequence[SeedMean]) -> str:
    """Return the score of the soft mask next to the hard one that is reported, where facts tell `soft_iia`."""
    lines = []
    for mean in means:
        soft, told = mean.fact("soft_iia"), mean.fact("hard_iia")
        hard = mean.iia if told is None else told
        if soft is not None:
            lines.append(line([*_place(mean), share(soft), share(hard), share(soft - hard), text(mean.split)]))
    if not lines:
        return ""
    return (
        "<h2>Soft and hard masks</h2>\n"
        '<p class="soft">A soft mask mixes base and source in a way that no choice of dimensions does. Scores '
        "elsewhere in this report are of the hard mask.</p>\n"
        + table(["Method", "Place", "#Soft IIA", "#Hard IIA", "#Soft less hard", "Split"], lines, sortable=True)
    )


def divergence_section(means: Sequence[SeedMean]) -> str:
    """Return how far patched activations are from natural ones, where facts tell `divergence`."""
    names = ("divergence", "divergence_natural", "divergence_sliced", "divergence_sliced_natural")
    lines = [
        line(
            [*_place(mean), *(share(mean.fact(name), 4) for name in names), share(mean.fact("divergence_mahalanobis"))]
        )
        for mean in means
        if mean.fact("divergence") is not None
    ]
    if not lines:
        return ""
    heads = ["Method", "Place", "#Energy distance", "#… of natural halves", "#Earth mover's", "#… of natural halves"]
    return (
        "<h2>Are patched activations natural?</h2>\n"
        '<p class="soft">Distances of patched from natural activations, next to those between two halves of the '
        "natural ones, which is what no difference looks like. The last column is the squared Mahalanobis distance, "
        "where natural activations have 1.</p>\n" + table([*heads, "#Mahalanobis ratio"], lines, sortable=True)
    )


def _place(mean: SeedMean) -> list[Entry]:
    return [text(mean.method_text, "name"), text(f"{mean.cell.site} @ {mean.position_label}", "place")]


def failure_section(examples: Sequence[Record]) -> str:
    """Return which pairs fail under the kept plan: groups by causal setting, then some of them to read."""
    found = explore(examples)
    body = [f"<h2>Which pairs fail</h2>\n<p>{escape(found.sentence)}</p>"]
    if found.groups:
        shown = found.groups[: max(SHOWN_GROUPS, len(found.worse))]
        more = f" {len(shown)} of {len(found.groups)} groups are shown." if len(shown) < len(found.groups) else ""
        note = f"Pairs of the test split by their causal setting, significantly worse groups first.{more}"
        heads = ["Causal setting", "#n", "#IIA", "#95 % interval", "#The rest", "#Adjusted p", "Worse"]
        body.append(f'<p class="soft">{escape(" ".join([note, *found.notes]))}</p>')
        body.append(table(heads, [_group_line(group) for group in shown], sortable=True))
    if found.samples:
        body.append(_samples(found))
    return "\n".join(body)


def _group_line(group: Group) -> str:
    told: list[Entry] = [
        text(group.name, "name"),
        whole(group.n),
        share(group.iia),
        interval(group),
        share(group.rest),
        (p_text(group.adjusted), group.adjusted, "number"),
        ("worse", 1, "no") if group.worse else ("no", 0, ""),
    ]
    return line(told)


def _samples(found: Failures) -> str:
    keys = [key for key in ("base", "source", "label", "answer", "kind") if any(key in one for one in found.samples)]
    lines = [line([text(str(one.get(key, "-"))) for key in keys]) for one in found.samples]
    named = {"base": "Base", "source": "Source", "label": "Wanted", "answer": "Answered", "kind": "Kind"}
    return (
        f"<details><summary>{len(found.samples)} of {found.n - found.hits} failing pairs</summary>\n"
        + table([named[key] for key in keys], lines)
        + "</details>"
    )


def download_section(rows: Sequence[Row]) -> str:
    """Return a link that saves the rows as CSV; the page itself holds them."""
    data = base64.b64encode(csv_text(rows).encode()).decode()
    address = f"data:text/csv;charset=utf-8;base64,{data}"
    return (
        f'<p><a download="rows.csv" href="{address}">Save the {len(rows)} rows as CSV</a>'
        ' <span class="soft">one line per cell, seed and split</span></p>'
    )
