"""`save_bundle` and `load_bundle`: an alignment as a folder that can be handed on and used without its training data.

    save_bundle("shared/ioi", plan, model, tokenizer, pairs=train, scores=rows, task="ioi", variable="position")
    bundle = load_bundle("shared/ioi", model=model, tokenizer=tokenizer)        # or "owner/name" on the Hub

The folder holds the plan (plan.json, plan.safetensors), prototypes.safetensors and manifest.json. A *prototype* is the
mean activation at the plan's place over the training sources that have one value of the variable: what `steer.pin`
needs to hold the variable at that value. Loading runs nothing that a file says, and refuses what was made for another
model or tokenizer.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alignments.made_for import check_made_for, tokenizer_hash, tokenizer_name
from alignments.metrics import SeedMean, mean_over_seeds
from alignments.pairs import PairData
from alignments.rows import Row
from intervene import Intervention, Plan, fingerprint
from intervene.errors import ShapeMismatch, StoreError, close_names
from intervene.files import as_json, beside, own_copy, parsed_json, read_tensors, sha256_of, sync
from intervene.marked import Marked
from intervene.store import PLAN_FILE, TENSOR_FILE, load_plan, model_name, save_plan

SCHEMA = 1
MANIFEST, PROTOTYPES = "manifest.json", "prototypes.safetensors"
FILES = (PLAN_FILE, TENSOR_FILE, PROTOTYPES)
_KEYS = {
    "schema", "created", "model", "tokenizer", "task", "variable", "method", "places", "values", "scores", "licence",
    "versions", "files", "extra",
}  # fmt: skip
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Value:
    """One value of the variable: its `name` (how it is asked for), itself, and on how many sources it was seen."""

    name: str
    value: Any
    count: int


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded alignment: its plan, the prototypes of the variable's values, and the manifest.

    `prototypes[name]` has one tensor (P, D) per intervention of the plan that needs a source, in plan order. `force` is
    the reason for which a mismatch of model or tokenizer was accepted, None if there was none.
    """

    folder: Path
    plan: tuple[Intervention, ...]
    values: tuple[Value, ...]
    prototypes: Mapping[str, tuple[Tensor, ...]]
    manifest: Mapping[str, Any]
    force: str | None = None

    @property
    def variable(self) -> str:
        """The variable that the plan holds."""
        return str(self.manifest["variable"])

    def named(self, value: Any) -> Value:
        """Return the value of that name, or that is equal to `value`.

        Raises:
            StoreError: the bundle has no prototype of it.
        """
        for one in self.values:
            if one.name == str(value):
                return one
        hint = close_names(str(value), [one.name for one in self.values])
        raise StoreError(f"Value {value!r} of {self.variable}: this bundle has no prototype of it. {hint}")

    def test_scores(self) -> list[Mapping[str, Any]]:
        """Return the scores on the test split."""
        return [score for score in self.manifest["scores"] if score["split"] == "test"]

    def check(self, model: nn.Module | None, tokenizer: Any = None) -> None:
        """Refuse a model or tokenizer that the bundle was not made for; None is not checked.

        Raises:
            WrongModel: the fingerprint or the tokenizer's hash is another one, and no reason was given on loading.
        """
        if self.force is None:
            check_made_for(f"Bundle {self.folder}", self.manifest, model, tokenizer)


def prototypes(plan: Plan, pairs: PairData) -> tuple[tuple[Value, ...], dict[str, tuple[Tensor, ...]]]:
    """Return the variable's values on the sources of `pairs`, and the mean source activation of each.

    Per value one (P, D) tensor in fp32 for each intervention that needs a source; means are taken in fp64.

    Raises:
        ShapeMismatch: the pairs do not say what the variable is on their sources, or two values have one name.
    """
    sources = list(pairs.values[1])
    if len(sources) != len(pairs):
        raise ShapeMismatch(
            f"Prototypes: the {len(pairs)} pairs name {len(sources)} values of the variable on their sources. "
            "Give them values= when they are prepared: by running the causal model, as values_of does."
        )
    distinct = list(dict.fromkeys(sources))
    names = [str(value) for value in distinct]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ShapeMismatch(f"Prototypes: two different values are both written {twice[0]!r}. Rename one in the task.")
    needing = [item for item in plan if item.edit.needs_source]
    if not needing:
        raise ShapeMismatch("Prototypes: no intervention of the plan needs a source, so no value can be put in.")
    found = [pairs.activations(item.site, item.positions)[1] for item in needing]
    made: dict[str, tuple[Tensor, ...]] = {}
    counts = []
    for value, name in zip(distinct, names, strict=True):
        rows = torch.tensor([index for index, one in enumerate(sources) if one == value])
        made[name] = tuple(acts[rows.to(acts.device)].double().mean(0).float().cpu() for acts in found)
        counts.append(Value(name, _plain(value), len(rows)))
    return tuple(counts), made


def save_bundle(
    folder: str | Path,
    plan: Plan,
    model: nn.Module,
    tokenizer: Any,
    *,
    pairs: PairData,
    scores: Iterable[Row | SeedMean],
    task: str,
    variable: str,
    licence: str | None = None,
    extra: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write `plan` with its prototypes, scores and what it was made for to a new `folder`, whole or not at all.

    Args:
        plan: the interventions of one variable; they are pinned together.
        tokenizer: None for a model without text.
        pairs: the training pairs, of whose sources the prototypes are means.
        scores: rows of the search at the plan's place; seeds are averaged.
        licence: under which the alignment is shared, such as "CC-BY-4.0"; the model's own still holds.
        extra: anything JSON can hold.
        overwrite: replace a bundle of that name. Nothing but a bundle is ever replaced.

    Raises:
        StoreError: the folder exists, the scores are of another place or variable, or something cannot be stored.
        ShapeMismatch: see `prototypes`.
    """
    folder = Path(folder)
    _refuse_existing(folder, overwrite)
    means = _means(scores)
    _check_scores(plan, variable, means)
    values, held = prototypes(plan, pairs)
    with beside(folder) as draft:
        save_plan(plan, draft, model=model, tokenizer_name=tokenizer_name(tokenizer))
        tensors = {
            f"{place}.{number}": part for place, one in enumerate(values) for number, part in enumerate(held[one.name])
        }
        save_file({name: own_copy(tensor) for name, tensor in tensors.items()}, draft / PROTOTYPES)
        manifest = {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": {"name": model_name(model), "fingerprint": fingerprint(model)},
            "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
            "task": task,
            "variable": variable,
            "method": next((mean.method_text for mean in means), None),
            "places": [_place(item) for item in plan],
            "values": [asdict(one) for one in values],
            "scores": [_score(mean) for mean in means],
            "licence": licence,
            "versions": _versions(),
            "files": {name: sha256_of(draft / name) for name in FILES},
            "extra": extra,
        }
        (draft / MANIFEST).write_text(as_json(manifest, folder), encoding="utf-8")
        for name in (PROTOTYPES, MANIFEST):
            sync(draft / name)
        sync(draft)
        _refuse_existing(folder, overwrite)  # again: another process may have been as fast
        _move(draft, folder)
    return folder


def load_bundle(
    where: str | Path,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    force: str | None = None,
) -> Bundle:
    """Return the bundle in a folder, or of the Hub repository "owner/name" if there is no such folder.

    Args:
        model, tokenizer: what it is to be used with; compared with what it was made for. None: not compared here, but
            `steer.pin` compares its model.
        revision: of the Hub repository. force: the reason for using it with another model or tokenizer all the same.

    Raises:
        StoreError: no such folder or repository, or it is half written, damaged, changed, or of a newer schema.
        WrongModel: the model or the tokenizer is another one.
    """
    folder = Path(where) if Path(where).is_dir() else _from_hub(str(where), revision)
    manifest = _read_manifest(folder)
    if force is None:
        check_made_for(f"Bundle {folder}", manifest, model, tokenizer)
    plan = load_plan(folder, tokenizer=tokenizer, elsewhere=force)
    values = _values(manifest["values"], folder)
    tensors = read_tensors(folder / PROTOTYPES)
    needing = sum(item.edit.needs_source for item in plan)
    wanted = [f"{place}.{number}" for place in range(len(values)) for number in range(needing)]
    if sorted(tensors) != sorted(wanted):
        raise StoreError(f"Bundle {folder}: {PROTOTYPES} does not hold what {MANIFEST} lists. Save it again.")
    held = {
        one.name: tuple(tensors[f"{place}.{number}"] for number in range(needing)) for place, one in enumerate(values)
    }
    return Bundle(folder, plan, values, held, manifest, force)


def _values(told: Any, folder: Path) -> tuple[Value, ...]:
    try:
        return tuple(Value(str(one["name"]), one["value"], int(one["count"])) for one in told)
    except (TypeError, KeyError, ValueError) as error:
        raise StoreError(f"Bundle {folder}: its values are damaged ({error!r}). Copy it again.") from error


def _means(scores: Iterable[Row | SeedMean]) -> list[SeedMean]:
    listed = list(scores)
    rows = [one for one in listed if isinstance(one, Row)]
    return [*(one for one in listed if isinstance(one, SeedMean)), *mean_over_seeds(rows)]


def _check_scores(plan: Plan, variable: str, means: Sequence[SeedMean]) -> None:
    sites = [str(item.site) for item in plan]
    for mean in means:
        if mean.cell.variable != variable or mean.cell.site not in sites:
            raise StoreError(
                f"Bundle of {variable} at {', '.join(sites)}: a score is of {mean.cell.variable} at {mean.cell.site}. "
                "Give the rows of this plan's cell."
            )


def _place(item: Intervention) -> dict[str, Any]:
    where = item.positions
    features = item.featurizer
    return {
        "site": str(item.site),
        "positions": where.name if isinstance(where, Marked) else repr(where),
        "marked": isinstance(where, Marked),
        "rank": None if features.width is None else features.features(features.width),
        "width": features.width,
        "edit": type(item.edit).__name__,
    }


def _score(mean: SeedMean) -> dict[str, Any]:
    return {
        **{name: getattr(mean.cell, name) for name in ("site", "positions", "method", "rank")},
        **{name: getattr(mean, name) for name in ("split", "n", "iia", "low", "high", "seeds", "values")},
        "baselines": {one.name: one.value for one in mean.baselines},
        "task_accuracy": mean.task_accuracy,
        "kinds": dict(mean.kinds),
        "facts": dict(mean.facts),
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _plain(value: Any) -> Any:
    """Return `value` if JSON gives it back equal, else its text."""
    try:
        return value if json.loads(json.dumps(value)) == value else str(value)
    except (TypeError, ValueError):
        return str(value)


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise StoreError(f"Bundle {folder}: something that is no bundle is there already. Choose another folder.")
    if not overwrite:
        raise StoreError(f"Bundle {folder}: there is one already. Choose another folder, or pass overwrite=True.")


def _move(draft: Path, folder: Path) -> None:
    """Put `draft` where `folder` is; the old one is moved aside first and removed last, so that one is always whole."""
    with beside(folder) as old:
        if folder.is_dir():
            os.replace(folder, old)
        try:
            os.replace(draft, folder)
        except OSError:
            if old.is_dir():
                os.replace(old, folder)
            raise
    sync(folder.parent)


def _from_hub(name: str, revision: str | None) -> Path:
    if not _HUB_ID.match(name) or name.startswith("."):
        raise StoreError(f"Bundle {name}: there is no such folder. Give the one that save_bundle returned.")
    from huggingface_hub import snapshot_download  # comes with transformers, and only this asks the network

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=[MANIFEST, *FILES])
    except Exception as error:  # the hub's errors, the network's, and those of a cache that lacks it
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"Bundle {name}: no such folder here, and the Hub did not give it ({type(error).__name__}: {reason}). "
            "Check the name and the connection, or copy the folder here."
        ) from error
    return Path(found)


def _read_manifest(folder: Path) -> dict[str, Any]:
    missing = [name for name in (MANIFEST, *FILES) if not (folder / name).is_file()]
    if missing:
        raise StoreError(f"Bundle {folder}: {', '.join(missing)} missing, so it is none or half copied. Copy it again.")
    manifest: dict[str, Any] = parsed_json((folder / MANIFEST).read_bytes(), f"{folder}: {MANIFEST}")
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema < 1:
        raise StoreError(f"Bundle {folder}: {MANIFEST} has no schema number, found {schema!r}. Save it again.")
    if schema > SCHEMA:
        raise StoreError(f"Bundle {folder}: schema {schema}, this version reads up to {SCHEMA}: upgrade.")
    if set(manifest) != _KEYS:
        wrong = sorted(set(manifest) ^ _KEYS)
        raise StoreError(f"Bundle {folder}: {MANIFEST} lacks or has too many of {', '.join(wrong)}. Save it again.")
    kinds = {"model": dict, "files": dict, "values": list, "scores": list, "places": list}
    damaged = [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]
    if damaged or not {"name", "fingerprint"} <= set(manifest["model"]):
        raise StoreError(f"Bundle {folder}: {', '.join(damaged) or 'model'} in {MANIFEST} is damaged. Copy it again.")
    changed = [name for name in FILES if sha256_of(folder / name) != manifest["files"].get(name)]
    if changed:
        raise StoreError(
            f"Bundle {folder}: {', '.join(changed)} changed since it was saved (the SHA-256 differs). Copy it again."
        )
    return manifest
