"""Fits that are run alone and by several ranks, and must come out alike: group -> name -> tensor."""

from __future__ import annotations

import torch

from alignments import METHODS, LanguagePairs, Setup
from alignments.answers import predict_together
from alignments.executors_parallel import DataParallel
from alignments.fit import Budget, fit_together
from alignments.scoring import Cell, Facts, Job, Scorer
from intervene import AllTokens, GatedSwap, Identity, Intervention, Site
from intervene.marked import Marked
from tasks import Example, Pair
from tests.alignments.planted import WIDTH, planted_mlp, planted_pairs, toy_tokenizer
from tests.tiny import tiny_model

SITE = Site("block_output", 0)
NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay")


def told(plans, results, pairs, group):
    """All that a fit leaves behind, as tensors."""
    made = {f"plan {number}": torch.cat([p.detach().flatten() for item in plan for m in (item.featurizer, item.edit)
                                        for p in m.parameters()]) for number, plan in enumerate(plans)}  # fmt: skip
    made["losses"] = torch.tensor([result.losses for result in results])
    made["validation"] = torch.tensor([result.validation for result in results])
    made["best"] = torch.tensor([result.best_step for result in results])
    made["answers"] = predict_together(plans, pairs, group=group)
    return made


def das(seed=0, rank=1, width=WIDTH, where=None, site=SITE):
    return METHODS["das"].make(Setup(site, where or AllTokens(), width, rank, seed))


def planted(group):
    """Two seeds at once, batches of 5 that two ranks cannot share equally, accumulated, with a penalty."""
    model = planted_mlp()
    pairs = planted_pairs(model, 101, 0)
    plans = [das(seed) for seed in (0, 1)]
    penalties = [lambda plan: 0.1 * plan[0].featurizer.frame()[0].abs().sum(), None]
    budget = Budget(30, 5, 0.05, accumulate=2)
    results = fit_together(model, plans, pairs, budget, seeds=[0, 1], penalties=penalties, group=group)
    return told(plans, results, pairs, group)


def one_pair(group):
    """One pair per batch: all ranks but the first run a pair that counts for nothing."""
    model = planted_mlp()
    pairs = planted_pairs(model, 9, 1)
    plan = das(3)
    return told([plan], fit_together(model, [plan], pairs, Budget(12, 1, 0.02), seeds=[3], group=group), pairs, group)


def stopped(group):
    """Early stopping: a fit that no longer improves on select ends at the same step on every rank."""
    model = planted_mlp()
    train, select = planted_pairs(model, 64, 2), planted_pairs(model, 37, 3)
    plan = das(4)
    budget = Budget(200, 16, 0.05, validate_every=5, patience=3)
    results = fit_together(model, [plan], train, budget, seeds=[4], validation=select, group=group)
    return told([plan], results, select, group)


def gated(group):
    """A gate per feature on the whole width, learned."""
    model = planted_mlp()
    pairs = planted_pairs(model, 50, 5)
    plan = [Intervention(SITE, GatedSwap(WIDTH), AllTokens(), Identity())]
    results = fit_together(model, [plan], pairs, Budget(20, 7, 0.05), seeds=[0], group=group)
    return told([plan], results, pairs, group)


def noisy(group):
    """Hard concrete gates draw at random in every pass: from their own generators, alike on every rank."""
    model = planted_mlp()
    pairs = planted_pairs(model, 50, 6)
    setups = [Setup(SITE, AllTokens(), WIDTH, None, seed, options={"gate": "hard_concrete"}) for seed in (0, 1)]
    plans = [METHODS["mask_neurons"].make(setup) for setup in setups]
    results = fit_together(model, plans, pairs, Budget(15, 3, 0.05), seeds=[0, 1], group=group)
    return told(plans, results, pairs, group)


def name_pairs(n=24):
    """Pairs of short prompts that differ in length, so that shares are padded."""
    made = []
    for number in range(n):
        one, two, three = (NAMES[(number + step) % len(NAMES)] for step in (0, 1, 3))
        tail = " and the park" if number % 2 else ""
        base, source = (f"When {a} and {b} went to the store{tail} , {b} gave a ring to" for a, b in
                        ((one, two), (three, one)))  # fmt: skip
        examples = [Example(text, f" {a}", {}, {"last": (len(text) - 2, len(text))})
                    for text, a in ((base, one), (source, three))]  # fmt: skip
        made.append(Pair(*examples, "name", f" {three}"))
    return made


def language(group):
    """A subspace of a tiny llama."""
    model, site = tiny_model("llama"), Site("block_output", 1)
    pairs = LanguagePairs(model, toy_tokenizer(), name_pairs(), sites=[site], positions=["last"], batch_size=8)
    plans = [das(seed, 4, 32, Marked("last"), site) for seed in (0, 1)]
    results = fit_together(model, plans, pairs, Budget(12, 5, 0.01), seeds=[0, 1], group=group)
    return told(plans, results, pairs, group)


CASES = {case.__name__: case for case in (planted, one_pair, stopped, gated, noisy, language)}


def searched(group):
    """Rows of two jobs by the executor, without their seconds; on other ranks nothing."""
    model = planted_mlp()
    splits = {name: planted_pairs(model, 60, number) for number, name in enumerate(("train", "select", "test"))}
    baselines = {name: {"copy_base": 0.5, "copy_source": 0.5, "majority": 0.5} for name in splits}
    facts = Facts("planted", "mlp", "sign", baselines, dict.fromkeys(splits, 1.0))
    scorer = Scorer(model, splits, lambda name: AllTokens(), facts, budget=Budget(20, 16, 0.05))
    jobs = [Job(Cell(SITE, "input", "das", 1), (0, 1)), Job(Cell(SITE, "input", "full_vector", None), (0,))]
    if group is None:
        found = [scorer.rows(job) for job in jobs]
    else:
        executor = DataParallel(scorer, group)
        if group.rank:
            return executor.work()
        try:
            found = [rows for _, rows in executor.run(jobs)]
        finally:
            executor.close()
    return [{**row.to_json(), "seconds": 0.0} for rows in found for row in rows]
