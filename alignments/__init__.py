"""Alignment search: is there a place in this model that plays the role of this variable of this causal model?

    data = {split: LanguagePairs(model, tokenizer, task.pairs(split, ...), sites=sites, positions=names) ...}
    for row in Search(model, data, Marked, cells_of(sites, names, ["full_vector", "das"], rank=8), facts).run(): ...

Choice happens on the select split, reporting on test; every row carries its n, interval and trivial baselines.
"""

from alignments.config import ConfigError, RunDas, load_config
from alignments.fit import FitResult, Score, evaluate, fit, predict
from alignments.methods import METHODS
from alignments.metrics import mean_over_seeds, verdict, wilson
from alignments.pairs import LanguagePairs, PairData, VectorPairs
from alignments.problem import Problem, prepare_equality, prepare_text
from alignments.record import RecordError, RunRecord
from alignments.report import render_report, write_report
from alignments.rows import BadRow, Row
from alignments.search import Budget, Cell, Facts, Search, cells_of

__all__ = [
    "METHODS",
    "BadRow",
    "Budget",
    "Cell",
    "ConfigError",
    "Facts",
    "FitResult",
    "LanguagePairs",
    "PairData",
    "Problem",
    "RecordError",
    "Row",
    "RunDas",
    "RunRecord",
    "Score",
    "Search",
    "VectorPairs",
    "cells_of",
    "evaluate",
    "fit",
    "load_config",
    "mean_over_seeds",
    "predict",
    "prepare_equality",
    "prepare_text",
    "render_report",
    "verdict",
    "wilson",
    "write_report",
]
