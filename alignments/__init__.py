"""Alignment search: is there a place in this model that plays the role of this variable of this causal model?

    data = {split: LanguagePairs(model, tokenizer, task.pairs(split, ...), sites=sites, positions=names) ...}
    scorer = Scorer(model, data, Marked, facts)
    for row in Search(scorer, cells_of(sites, names, ["full_vector", "das"], rank=8)).run(): ...

Choice happens on the select split, reporting on test; every row carries its n, interval and trivial baselines.
"""

from alignments.answers import Score, evaluate, predict
from alignments.config import RunDas, load_config
from alignments.fit import Budget, FitResult, fit, fit_together
from alignments.methods import METHODS, Method, Setup
from alignments.metrics import mean_over_seeds, verdict, wilson
from alignments.pairs import LanguagePairs, PairData
from alignments.problem import Problem
from alignments.record import RecordError, RunRecord
from alignments.report import render_report, write_report
from alignments.rows import BadRow, Row
from alignments.scoring import Cell, Elsewhere, Facts, Job, Scorer
from alignments.search import Executor, Local, Search, cells_of
from alignments.text_problem import prepare_text
from alignments.vector_pairs import VectorPairs
from alignments.vector_problem import prepare_vectors
from records.config_files import ConfigError

__all__ = [
    "METHODS",
    "BadRow",
    "Budget",
    "Cell",
    "ConfigError",
    "Elsewhere",
    "Executor",
    "Facts",
    "FitResult",
    "Job",
    "LanguagePairs",
    "Local",
    "Method",
    "PairData",
    "Problem",
    "RecordError",
    "Row",
    "RunDas",
    "RunRecord",
    "Score",
    "Scorer",
    "Search",
    "Setup",
    "VectorPairs",
    "cells_of",
    "evaluate",
    "fit",
    "fit_together",
    "load_config",
    "mean_over_seeds",
    "predict",
    "prepare_text",
    "prepare_vectors",
    "render_report",
    "verdict",
    "wilson",
    "write_report",
]
