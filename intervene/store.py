"""A plan as a folder: plan.json (what it is) and plan.safetensors (every tensor); a steering vector as one file.

    save_plan(plan, "runs/das/plan", model=model)
    plan = load_plan("runs/das/plan", model=model)      # the same outputs, bit for bit

plan.json names classes, which are looked up in the tables of `codecs`: loading runs nothing that a file says. It holds
the SHA-256 of plan.safetensors and is put in place last, so that a folder is whole or says that it is not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from intervene.codecs import (
    CONDITION_CODECS,
    EDIT_CODECS,
    FEATURIZER_CODECS,
    Codec,
    Record,
    Tensors,
    decode_module,
    decode_positions,
    decode_vector,
    encode_module,
    encode_positions,
    exact_keys,
    guarded,
    held_by,
    parameters_of,
)
from intervene.errors import StoreError, WrongModel
from intervene.families import fingerprint
from intervene.files import as_json, beside, own_copy, parsed_json, read_tensors, sha256_of, sync
from intervene.interventions import Intervention, Plan
from intervene.vectors import LAYER_CONVENTION, SteeringVector

SCHEMA = 1
PLAN_FILE, TENSOR_FILE = "plan.json", "plan.safetensors"
_KEYS = {
    "schema", "convention", "model", "tokenizer", "notes", "sha256", "featurizers", "edits", "conditions",
    "interventions",
}  # fmt: skip
_ITEM_KEYS = {
    "site", "edit", "positions", "featurizer", "phase", "source_positions", "when", "elsewhere",
}  # fmt: skip
# list in plan.json -> field of Intervention, table of its classes
_MODULES: dict[str, tuple[str, Mapping[str, Codec]]] = {
    "featurizers": ("featurizer", FEATURIZER_CODECS),
    "edits": ("edit", EDIT_CODECS),
    "conditions": ("when", CONDITION_CODECS),
}


def save_plan(
    plan: Plan,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    tokenizer_name: str | None = None,
    notes: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write `plan` to `folder` and return its path. A module that several interventions share is stored once.

    A new folder appears whole or not at all. Into one that exists (a run's folder) the two files are moved one after
    the other, plan.json last, and nothing else in it is touched.

    Args:
        model: what the plan was made for; its name and fingerprint are stored, and `load_plan` compares them.
        tokenizer_name: stored for the reader, and named when a `Match` needs its tokenizer again.
        notes: anything JSON can hold.
        overwrite: replace a plan that is in `folder` already.

    Raises:
        StoreError: `folder` holds a plan already; or something in the plan cannot be stored or could not be read back.
    """
    folder = Path(folder)
    if isinstance(plan, Intervention):
        raise TypeError("A plan is a sequence of interventions: found one Intervention. Write [intervention].")
    if not overwrite:
        _refuse_existing(folder)
    header, tensors = _encoded(plan)
    header["model"] = None if model is None else {"name": model_name(model), "fingerprint": fingerprint(model)}
    header.update(tokenizer=tokenizer_name, notes=notes)
    with beside(folder) as draft:
        draft.mkdir()
        save_file({name: own_copy(tensor) for name, tensor in tensors.items()}, draft / TENSOR_FILE)
        header["sha256"] = sha256_of(draft / TENSOR_FILE)
        (draft / PLAN_FILE).write_text(as_json(header, folder), encoding="utf-8")
        for file in (draft / TENSOR_FILE, draft / PLAN_FILE, draft):
            sync(file)
        if not overwrite:
            _refuse_existing(folder)  # again: another process may have been as fast
        _put_in_place(draft, folder)
    return folder


def load_plan(
    folder: str | Path, *, model: nn.Module | None = None, tokenizer: Any = None, elsewhere: str | None = None
) -> tuple[Intervention, ...]:
    """Return the plan that `save_plan` wrote to `folder`, on the CPU: its tensors, flags and sharing as they were.

    Args:
        model: checked against the fingerprint the plan was saved with, if it was saved with one.
        tokenizer: needed by a `Match` on text.
        elsewhere: the reason for using the plan on another model. The interventions carry it, so that their saved
            vectors are accepted there too. Without effect if `model` is the one the plan was made for.

    Raises:
        StoreError: the folder is missing, half written, damaged, of a newer schema, or says what is not understood.
        WrongModel: `model` has another fingerprint and no reason was given.
    """
    folder = Path(folder)
    header = _read_header(folder)
    same = _check_model(folder, header["model"], model, elsewhere)
    tensors = _Tensors(folder, header["sha256"])
    modules: dict[str, list[Any]] = {}
    for name, (_, table) in _MODULES.items():
        made = modules.setdefault(name, [])
        for number, record in enumerate(header[name]):
            own = tensors.take(f"{name}.{number}")
            made.append(decode_module(table, record, own, f"{folder}: {name}[{number}]", tuple(made)))
    plan = []
    for number, record in enumerate(header["interventions"]):
        asked = f"{folder}: interventions[{number}]"
        try:
            item = _decoded_item(record, modules, tensors, number, tokenizer, asked)
        except StoreError as error:
            if "tokenizer" not in str(error) or header["tokenizer"] is None:
                raise
            raise StoreError(f"{error} The plan was saved with {header['tokenizer']!r}.") from error
        plan.append(_with_reason(item, elsewhere) if elsewhere and not same else item)
    tensors.refuse_rest()
    return tuple(plan)


def _with_reason(item: Intervention, reason: str) -> Intervention:
    return replace(item, elsewhere=item.elsewhere or reason)


def model_name(model: nn.Module) -> str:
    """Return the name a model was loaded under, else its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _encoded(plan: Plan) -> tuple[Record, Tensors]:
    header: Record = {"schema": SCHEMA, "convention": LAYER_CONVENTION}
    tensors: Tensors = {}
    index: dict[int, int] = {}
    owners: dict[int, str] = {}
    for name, (field, table) in _MODULES.items():
        distinct: dict[int, nn.Module] = {}
        for module in (getattr(item, field) for item in plan):
            if module is not None:  # what it holds comes first
                distinct.update({id(each): each for each in (*held_by(table, module), module)})
        index.update({key: number for number, key in enumerate(distinct)})
        header[name] = []
        for number, module in enumerate(distinct.values()):
            asked = f"Save: {name}[{number}]"
            record, own = encode_module(table, module, asked, tuple(distinct.values())[:number])
            _refuse_tied(parameters_of(module, table[record["kind"]]), asked, owners)
            header[name].append(record)
            tensors.update({f"{name}.{number}.{key}": tensor for key, tensor in own.items()})
    header["interventions"] = []
    for number, item in enumerate(plan):
        record = {"site": str(item.site), "phase": item.phase, "elsewhere": item.elsewhere}
        for field, _ in _MODULES.values():
            module = getattr(item, field)
            record[field] = None if module is None else index[id(module)]
        for field in ("positions", "source_positions"):
            positions = getattr(item, field)
            record[field] = None
            if positions is not None:
                record[field], own = encode_positions(positions, f"Save: {field} of {item.site}")
                tensors.update({f"interventions.{number}.{field}.{key}": tensor for key, tensor in own.items()})
        header["interventions"].append(record)
    return header, tensors


def _refuse_tied(parameters: Mapping[str, nn.Parameter], asked: str, owners: dict[int, str]) -> None:
    for name, parameter in parameters.items():
        owner = owners.setdefault(id(parameter), asked)
        if owner != asked:
            raise StoreError(
                f"{asked}: its parameter {name} is also one of {owner.removeprefix('Save: ')}, and would come back as "
                "two. Let the interventions share the whole module."
            )


def _decoded_item(
    record: Any, modules: Mapping[str, list[Any]], tensors: _Tensors, number: int, tokenizer: Any, asked: str
) -> Intervention:
    exact_keys(record, _ITEM_KEYS, asked)
    values: dict[str, Any] = {name: record[name] for name in ("site", "phase", "elsewhere")}
    for name, (field, _) in _MODULES.items():
        place = record[field]
        if place is None and field == "when":
            continue
        if not isinstance(place, int) or not 0 <= place < len(modules[name]):
            raise StoreError(f"{asked}: {field} {place!r}, but {len(modules[name])} {name} are stored. Save it again.")
        values[field] = modules[name][place]
    for field in ("positions", "source_positions"):
        if record[field] is not None or field == "positions":
            own = tensors.take(f"interventions.{number}.{field}")
            values[field] = decode_positions(record[field], own, tokenizer, f"{asked}, {field}")
    return guarded(lambda: Intervention(**values), asked)  # type: ignore[no-any-return]


class _Tensors:
    """The tensors of a plan folder, each handed out once."""

    def __init__(self, folder: Path, sha256: str) -> None:
        self.folder = folder
        if sha256_of(folder / TENSOR_FILE) != sha256:
            raise StoreError(
                f"{folder}: {TENSOR_FILE} is not the one that {PLAN_FILE} describes (its SHA-256 differs). "
                "One of them is half written or was replaced: save the plan again."
            )
        self.left = read_tensors(folder / TENSOR_FILE)

    def take(self, prefix: str) -> Tensors:
        names = [name for name in self.left if name.startswith(f"{prefix}.")]
        return {name.removeprefix(f"{prefix}."): self.left.pop(name) for name in names}

    def refuse_rest(self) -> None:
        if self.left:
            raise StoreError(
                f"{self.folder}: unknown tensors {', '.join(sorted(self.left))}. "
                "Save the plan again instead of editing it."
            )


def _read_header(folder: Path) -> Record:
    if not folder.is_dir():
        raise StoreError(f"Plan {folder}: there is no such folder. Give the one that save_plan returned.")
    missing = [name for name in (PLAN_FILE, TENSOR_FILE) if not (folder / name).is_file()]
    if missing:
        raise StoreError(
            f"Plan {folder}: {' and '.join(missing)} missing, so it is no plan or half written. Save the plan again."
        )
    header: Record = parsed_json((folder / PLAN_FILE).read_bytes(), f"{folder}: {PLAN_FILE}")
    _check_schema(header, f"{folder}")
    exact_keys(header, _KEYS, f"{folder}: {PLAN_FILE}")
    for name in (*_MODULES, "interventions"):
        if not isinstance(header[name], list):
            raise StoreError(f"{folder}: {PLAN_FILE}, {name} is no list. Save the plan again.")
    if header["convention"] != LAYER_CONVENTION:
        raise StoreError(
            f"{folder}: its layers are counted as {header['convention']!r}, here {LAYER_CONVENTION!r}. Save it again."
        )
    return header


def _check_model(folder: Path, stored: Any, model: nn.Module | None, elsewhere: str | None) -> bool:
    """Return whether `model` is known to be the one the plan was made for."""
    if stored is None or model is None:
        return False
    exact_keys(stored, ("name", "fingerprint"), f"{folder}: model")
    found = fingerprint(model)
    if found == stored["fingerprint"]:
        return True
    if not elsewhere:
        raise WrongModel(
            f"Plan {folder}: made for model {stored['name']} ({stored['fingerprint']}), this one is "
            f"{model_name(model)} ({found}). Load that model, or say elsewhere='<reason>'."
        )
    return False


def save_vector(vector: SteeringVector, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `vector` with its provenance to one safetensors file, whole or not at all, and return its path.

    Raises:
        StoreError: `path` exists and `overwrite` is not set.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise StoreError(f"Vector {path}: there is such a file already. Choose another name, or pass overwrite=True.")
    metadata = {"schema": str(SCHEMA), "provenance": as_json(vector.provenance(), path)}
    with beside(path) as draft:
        save_file({"vector": own_copy(vector.vector)}, draft, metadata=metadata)
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    return path


def load_vector(path: str | Path) -> SteeringVector:
    """Return the vector that `save_vector` wrote, with its provenance; using it elsewhere is then still an error.

    Raises:
        StoreError: there is no such file, or it is damaged, foreign, or of a newer schema.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"Vector {path}: there is no such file. Give the one that save_vector returned.")
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if set(tensors) != {"vector"} or set(metadata) != {"schema", "provenance"}:
        raise StoreError(
            f"Vector {path}: no file of save_vector, it holds {sorted(tensors)}. Wrap the tensor yourself."
        )
    _check_schema({"schema": parsed_json(metadata["schema"], str(path))}, f"Vector {path}")
    return decode_vector(tensors["vector"], parsed_json(metadata["provenance"], str(path)), f"Vector {path}")


def _check_schema(header: Any, asked: str) -> None:
    schema = header.get("schema") if isinstance(header, dict) else None
    if type(schema) is not int or schema < 1:
        raise StoreError(f"{asked}: no schema number, found {schema!r}, so it is none of ours. Save it with save_plan.")
    if schema > SCHEMA:
        raise StoreError(f"{asked}: schema {schema}, this version reads up to {SCHEMA}: upgrade.")


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"Save to {folder}: there is a file of that name. Choose another folder.")
    if any((folder / name).exists() for name in (PLAN_FILE, TENSOR_FILE)):
        raise StoreError(f"Save to {folder}: it holds a plan already. Choose another folder, or pass overwrite=True.")


def _put_in_place(draft: Path, folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        for name in (TENSOR_FILE, PLAN_FILE):  # in this order: until plan.json is there, the hash tells
            os.replace(draft / name, folder / name)
        sync(folder)
    else:
        if folder.is_dir():
            folder.rmdir()  # empty; Windows moves no folder onto another
        os.replace(draft, folder)
    sync(folder.parent)
