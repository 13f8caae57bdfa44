"""Pairs in the original align-transformers format, searched as they are: token ids, with no text and no causal model.

    splits = read_original_splits("pairs.jsonl")         # or a folder with train.jsonl, select.jsonl, test.jsonl
    data = language_pairs(model, splits["train"], ["L15.block_output"], positions=["80"])
    problem = prepare_original(config, model, report)    # what run_das.py searches

Positions are "range", the tokens that the file itself names in each row, or indices of input_ids that are the same in
all rows: "80", "-1", or several together, "80:82". Every token of them gets the same edit. (The original put the tokens
of a range side by side and rotated them as one vector, of so many times the width.)

The file does not say what the right answers of bases and sources are. What the unedited model answers stands in for
them: `copy_base` and `copy_source` are the model's own top tokens, and task accuracy is not known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignments.config import RunDas, with_derived
from alignments.pairs import LanguagePairs, PairData, Progress
from alignments.problem import Problem, Report, check_rank, digest, resolve_config, sites_of, sizes, variables_of
from alignments.scoring import Elsewhere, Facts
from alignments.space import Space, space_of
from alignments.text_problem import random_like
from alignments.tokens import Tokens
from intervene import Site, fingerprint
from intervene.errors import BadPosition, asked_found_do
from intervene.families import locate
from intervene.marked import Marked
from records.config_files import ConfigError
from tasks import SPLITS, BadData
from tasks.original import OriginalPairs, read_original

RANGE = "range"  # the position that the rows name themselves
SHARES = (0.6, 0.8)  # of the distinct bases: where train ends, and select
_COLUMNS = re.compile(r"^(-?\d+)(?::(-?\d+))?$")  # "80", "-1", "80:82"
_SHOWN = 5  # rows named in one message


def is_original(task: str) -> bool:
    """Return whether `task` is the path of pairs in the original format: a JSONL file, or a folder with one per split.

    Such a file is known by its first row, which has source_input_ids.
    """
    path = Path(task) / f"{SPLITS[0]}.jsonl" if Path(task).is_dir() else Path(task)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and "source_input_ids" in row


def read_original_splits(path: str | Path) -> dict[str, OriginalPairs]:
    """Return split -> pairs: the three files of a folder, or one file divided by `divided`.

    Raises:
        BadData: a file is missing, empty or wrong, its rows named; or one base stands in two of three files.
    """
    path = Path(path)
    if not path.is_dir():
        return divided(read_original(path), path)
    found = {split: read_original(path / f"{split}.jsonl") for split in SPLITS}
    owner: dict[tuple[int, ...], str] = {}
    for split, pairs in found.items():
        for number, ids in enumerate(pairs.input_ids, start=1):
            if owner.setdefault(ids, split) != split:
                raise BadData(
                    f"{path / split}.jsonl, row {number}: its base stands in {owner[ids]}.jsonl too, so that what is "
                    "tested was learned. Give each base to one split."
                )
    return found


def divided(pairs: OriginalPairs, where: str | Path = "pairs") -> dict[str, OriginalPairs]:
    """Return split -> the pairs of 60, 20 and 20 % of the distinct bases, which are in the order of their SHA-256.

    So the division depends on the bases alone: not on a seed, nor on the order of rows.

    Raises:
        BadData: fewer than three distinct bases.
    """
    bases = sorted(set(pairs.input_ids), key=lambda ids: hashlib.sha256(repr(ids).encode()).digest())
    n = len(bases)
    if n < len(SPLITS):
        raise BadData(
            f"{where}: {n} distinct bases, which cannot be divided into {', '.join(SPLITS)}. Give more, or three files."
        )
    ends = [max(1, min(round(SHARES[0] * n), n - 2))]
    ends.append(max(ends[0] + 1, min(round(SHARES[1] * n), n - 1)))
    place = {ids: sum(rank >= end for end in ends) for rank, ids in enumerate(bases)}
    return {
        split: chosen(pairs, [row for row, ids in enumerate(pairs.input_ids) if place[ids] == number])
        for number, split in enumerate(SPLITS)
    }


def chosen(pairs: OriginalPairs, rows: Sequence[int]) -> OriginalPairs:
    """Return the pairs of these rows, in this order."""
    picked: dict[str, Any] = {}
    for name, values in vars(pairs).items():
        if values is None:
            picked[name] = None
        elif isinstance(values, np.ndarray):
            picked[name] = values[list(rows)]
        else:
            picked[name] = tuple(values[row] for row in rows)
    return OriginalPairs(**picked)


def require_vocabulary(pairs: OriginalPairs, vocabulary: int, where: str | Path = "pairs") -> None:
    """Refuse token ids that the model has no embedding of.

    Raises:
        BadData: naming the rows.
    """
    bad = [
        row
        for row, (base, source, label) in enumerate(
            zip(pairs.input_ids, pairs.source_input_ids, pairs.labels, strict=True), start=1
        )
        if max(*base, *source, int(label)) >= vocabulary
    ]
    if bad:
        raise BadData(f"{where}: {_rows(bad)}: token ids of {vocabulary} and above. The model has {vocabulary} tokens.")


def tokens_of(
    pairs: OriginalPairs, positions: Sequence[str], device: str | torch.device = "cpu", where: str | Path = "pairs"
) -> tuple[Tokens, Tokens]:
    """Return bases and sources as tensors, padded on the left, each with the columns of `positions`; answers are -1.

    Raises:
        BadPosition: a position is no column and not "range"; the rows do not name their ranges, or ranges of another
            length each; a column does not exist or is padding in some rows; or rows whose tokens begin at different
            columns are to be counted from the first. Rows are named.
    """
    sides = (
        (pairs.input_ids, pairs.attention_masks, pairs.token_ranges),
        (pairs.source_input_ids, pairs.source_attention_masks, pairs.source_token_ranges),
    )
    made = []
    for ids, masks, ranges in sides:
        length = max(map(len, ids))
        pads = [length - len(one) for one in ids]
        mask = torch.tensor([[0] * pad + list(one) for pad, one in zip(pads, masks, strict=True)], device=device)
        marks = {}
        for name in positions:
            columns = _ranges(ranges, pads, where) if name == RANGE else _columns(name, pads, mask.cpu(), where)
            padded = (mask.cpu().gather(1, columns) == 0).any(1).nonzero()[:, 0]
            if len(padded):
                found = f"it is padding in {_rows([int(row) + 1 for row in padded])}."
                raise BadPosition(asked_found_do(f"{where}, position {name}", found, "Name real tokens."))
            marks[name] = columns.to(device)
        made.append(
            Tokens(
                torch.tensor([[0] * pad + list(one) for pad, one in zip(pads, ids, strict=True)], device=device),
                mask,
                marks,
                torch.full((len(ids),), -1, device=device),
            )
        )
    return made[0], made[1]


def _ranges(ranges: Sequence[tuple[int, int]] | None, pads: Sequence[int], where: str | Path) -> Tensor:
    """Return (N, P): the columns of each row's own range."""
    if ranges is None:
        do = "Write token_range and source_token_range in every row, or name columns: --positions 12."
        raise BadPosition(asked_found_do(f"{where}, position {RANGE}", "its rows name none.", do))
    lengths = [stop - start for start, stop in ranges]
    usual = Counter(lengths).most_common(1)[0][0]
    other = [row for row, length in enumerate(lengths, start=1) if length != usual]
    if other:
        found = f"{usual} tokens in most rows, and another number in {_rows(other)}."
        raise BadPosition(asked_found_do(f"{where}, position {RANGE}", found, "Use ranges of one length."))
    return torch.tensor([[pad + at for at in range(*one)] for pad, one in zip(pads, ranges, strict=True)])


def _columns(name: str, pads: Sequence[int], mask: Tensor, where: str | Path) -> Tensor:
    """Return (N, P): the same columns in every row."""
    match = _COLUMNS.match(name)
    if match is None:
        do = f"Use {RANGE}, a column such as 12 or -1, or several such as 12:14."
        raise BadPosition(asked_found_do(f"{where}, position {name!r}", "token ids have no names.", do))
    firsts = (mask.cumsum(1) == 0).sum(1)  # the first real token of each row
    usual = int(firsts.mode().values)
    other = [row for row, first in enumerate(firsts.tolist(), start=1) if first != usual]
    if other:
        found = f"most rows begin at column {usual}, {_rows(other)} elsewhere: it would be another token in each."
        do = "Write token_range and source_token_range in every row."
        raise BadPosition(asked_found_do(f"{where}, position {name}", found, do))
    length = mask.shape[1]
    start = int(match[1])
    stop = start + 1 if match[2] is None else int(match[2])
    start, stop = (at + length if at < 0 else at for at in (start, stop if stop or start >= 0 else length))
    if not 0 <= start < stop <= length:
        found = f"the rows have {length} tokens."
        raise BadPosition(asked_found_do(f"{where}, position {name}", found, f"Use 0 to {length - 1}."))
    return torch.arange(start, stop).expand(len(pads), -1).contiguous()


def _rows(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"


def variables_in(pairs: OriginalPairs) -> tuple[str, ...]:
    """Return the numbers of the variables that the pairs interchange, in their order, as names."""
    return tuple(map(str, sorted(set(pairs.intervention_ids.tolist()))))


def language_pairs(
    model: nn.Module,
    original: OriginalPairs,
    sites: Sequence[Site | str],
    *,
    positions: Sequence[str] = (),
    variables: Sequence[str] = (),
    batch_size: int = 32,
    space: Space | None = None,
    progress: Progress | None = None,
    where: str | Path = "pairs",
) -> LanguagePairs:
    """Return the pairs run once through `model`, their activations kept at `sites`; no tokenizer is needed.

    With several `variables`, plans have one intervention for each, in their order, and a pair changes only the one
    that its intervention_ids names; kinds tell the scores of each apart.

    Args:
        positions: "range" or columns, see `tokens_of`; none: "range".
        variables: those the plans have blocks for; none: all there are. Pairs of others are an error.

    Raises:
        BadPosition: see `tokens_of`.
        BadData: a token id that the model does not have, or a pair of a variable that is not asked for.
    """
    network: Any = locate(model).hf
    weight: Tensor = network.get_input_embeddings().weight
    require_vocabulary(original, len(weight), where)
    names = tuple(variables) or variables_in(original)
    changed = [str(number) for number in original.intervention_ids.tolist()]
    other = [row for row, name in enumerate(changed, start=1) if name not in names]
    if other:
        raise BadData(f"{where}: {_rows(other)}: intervention_ids other than {', '.join(names)}. Leave them out.")
    device = weight.device
    base, source = tokens_of(original, tuple(positions) or (RANGE,), device, where)
    return LanguagePairs.from_tokens(
        model,
        base,
        source,
        torch.from_numpy(original.labels).to(device),
        sites=sites,
        changed=changed,
        variables=names,
        kinds=[f"variable {name}" for name in changed] if len(names) > 1 else (),
        batch_size=batch_size,
        space=space,
        progress=progress,
    )


def baselines_of(data: LanguagePairs) -> dict[str, float]:
    """Return the trivial scores: the most frequent label, and the unedited model's own answers to base and source."""
    labels = data.labels

    def share(answers: Tensor) -> float:
        return float((answers.to(labels.device) == labels).float().mean())

    return {
        "copy_base": share(data.base_answers),
        "copy_source": share(data.source_answers),
        "majority": max(Counter(labels.tolist()).values()) / len(labels),
    }


def prepare_original(config: RunDas, model: nn.Module, report: Report, tokenizer: Any = None) -> Problem:
    """Return the problem of pairs in the original format on a loaded language model; `config.task` is their path.

    Variable, layers and positions that were left open are derived: all the intervention_ids there are, and "range"
    where the rows have ranges. Of each split the first `n_train`, `n_select`, `n_test` rows are used, or all.

    Raises:
        BadData: a row is wrong; it is named. ConfigError: the file has no such variable, no ranges and no columns are
        asked for, or fewer rows than were asked for.
    """
    files = read_original_splits(config.task)
    config = _resolved(config, files, locate(model).n_layers)
    config, files = _cut(config, files)
    sites = sites_of(config)
    check_rank(config, model, sites)

    def run_once(network: nn.Module, kept: Sequence[Site], split: str, what: str = "") -> LanguagePairs:
        return language_pairs(
            network,
            files[split],
            kept,
            positions=config.positions or (),
            variables=variables_of(config),
            space=space_of(config.cache),
            progress=lambda done, total: report(f"running {split} pairs{what}", done, total),
            where=f"{config.task} ({split})",
        )

    def random_model(site: Site) -> Elsewhere:
        network = random_like(model)
        return Elsewhere(network, {split: run_once(network, [site], split, " of a random model") for split in SPLITS})

    splits: dict[str, PairData] = {}
    baselines, lint = {}, {}
    for split in SPLITS:
        data = splits[split] = run_once(model, sites, split)
        baselines[split] = baselines_of(data)
        lint[split] = {
            "pairs": len(data),
            "distinct bases": len(set(files[split].input_ids)),
            "kinds": dict(Counter(data.kinds)),
            "copy_base and copy_source": "the unedited model's own answers; the file does not give the right ones",
            "suffix against full pass": data.exactness(),
        }
    assert config.variable is not None
    accuracy: dict[str, float | None] = dict.fromkeys(SPLITS)
    facts = Facts(Path(config.task).stem, config.model, config.variable, baselines, accuracy)
    return Problem(
        config,
        model,
        splits,
        Marked,
        sites,
        facts,
        lint,
        fingerprint(model),
        {"random_model": random_model},
        examples=[] if tokenizer is None else list(_examples(files["test"], tokenizer)),
        tokenizer=tokenizer,
        digests={split: digest_of(pairs) for split, pairs in files.items()},
    )


def digest_of(pairs: OriginalPairs) -> str:
    """Return the `digest` of ids, labels, variables, ranges and masks."""
    return digest(one.tolist() if isinstance(one, np.ndarray) else one for one in vars(pairs).values())


def _resolved(config: RunDas, files: Mapping[str, OriginalPairs], n_layers: int) -> RunDas:
    """Return `config` with variable, layers and positions derived, and checked."""
    names = variables_in(files["train"])
    if config.variable is None:
        config = with_derived(config, variable="+".join(names))
    if config.positions is None and any(pairs.token_ranges is None for pairs in files.values()):
        do = "Name columns, counted from the first token: --positions 12."
        raise ConfigError(asked_found_do(f"Task {config.task}", "its rows have no token_range.", do))
    several = tuple(name for name in config.positions or () if _COLUMNS.match(name))
    return resolve_config(config, n_layers, names, (RANGE, *several) if config.positions else (RANGE,))


def _cut(config: RunDas, files: Mapping[str, OriginalPairs]) -> tuple[RunDas, dict[str, OriginalPairs]]:
    """Return the rows that are used, those of the searched variables, and `config` with their true numbers."""
    kept: dict[str, OriginalPairs] = {}
    numbers: dict[str, Any] = {}
    wanted = set(variables_of(config))
    for split, n in sizes(config).items():
        rows = [row for row, number in enumerate(files[split].intervention_ids.tolist()) if str(number) in wanted]
        given = config.sources.get(f"n_{split}", "default") not in ("default", "derived")
        if not rows or (given and len(rows) < n):
            found = f"its {split} split has {len(rows)} rows of variable {config.variable}."
            raise ConfigError(
                asked_found_do(f"Task {config.task}, n_{split} {n}", found, "Ask for fewer, or write more.")
            )
        kept[split] = chosen(files[split], rows[:n])
        numbers[f"n_{split}"] = len(kept[split])
    return replace(config, **numbers), kept


def _examples(pairs: OriginalPairs, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield one record per pair, for people to read."""
    for row, number in enumerate(pairs.intervention_ids.tolist()):
        yield {
            "base": tokenizer.decode(pairs.input_ids[row]),
            "source": tokenizer.decode(pairs.source_input_ids[row]),
            "label": tokenizer.decode([int(pairs.labels[row])]),
            "kind": f"variable {number}",
        }
