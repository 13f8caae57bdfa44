"""`run`: one training in its folder, from a configuration to result.json, with checkpoints to go on from.

    config.json, environment.json, metrics.jsonl, result.json     see `records.folder`
    samples.jsonl        what a detector said of each sample; samples-rank1.jsonl, ... of other ranks
    checkpoints/         to resume from; model/ or adapter/: the trained weights; examples.jsonl: answers judged

Under torchrun every rank calls `run`; rank 0 alone writes the folder and speaks.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from defenses.backend import Backend
from defenses.checkpoints import Checkpoints, digest
from defenses.config import TrainDefense
from defenses.errors import BackendError, DefenseError, TrainingError
from defenses.examining import Looking, examined, require_looking, require_suite
from defenses.launch import Ranks, detect, joined, make_backend
from defenses.loop import Ended, StopRequest, Watch, train
from defenses.preparing import Prepared, prepare, require_possible
from defenses.progress import Journal, TrainingFolder, read_samples, say
from defenses.sample_log import detection
from defenses.saving import save_trained
from intervene.errors import InterveneError, asked_found_do
from records.config_files import ConfigError
from records.layered import describe
from records.trackers import Place, Trackers, makers, require_trackers

OWN_FILES = ("config.json", "environment.json", "metrics.jsonl")  # of a run that was refused before its first row
SIGNALS = {"SIGTERM": 143, "SIGINT": 130}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its result, None for other ranks and unfinished runs; the signal that stopped it, if one did."""

    result: Mapping[str, Any] | None = None
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the signal's number: the command with --resume goes on."""
        return SIGNALS.get(self.stopped, 0)


def run(config: TrainDefense, *, told: Say = say) -> Outcome:
    """Train, or with `dry_run` only check and estimate.

    Raises:
        DefenseError, ConfigError, InterveneError, RecordError: what a user can mend, in words, before any training; or
            TrainingError where a loss is not finite.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = detect()
    cuda = _wants_cuda(config.device)
    tell: Say = told if ranks.rank == 0 else _silent
    require_possible(config, ranks, cuda=cuda)
    require_trackers(config.trackers)
    require_suite(config)
    require_looking(config, len(config.vectors) and 1)
    if config.dry_run:
        prepared = prepare(config, ranks)
        tell(describe(config))
        tell_estimates(prepared, tell)
        return Outcome()
    existed = bool(config.out and config.out.exists())
    with ExitStack() as stack:
        record = None
        if ranks.rank == 0:
            assert config.out is not None
            record = stack.enter_context(TrainingFolder.create(config.out, config, resume=config.resume))
            for note in record.notes:
                tell(note)
            if record.result is not None:
                tell(f"{config.out} is finished: {record.result.get('sentence', '')}")
                return Outcome(record.result)
        elif config.resume and config.out and (config.out / "result.json").exists():
            return Outcome()  # as rank 0 does
        kind = kind_of(config, ranks)
        stack.enter_context(nullcontext() if kind == "plain" else joined(ranks, cuda=cuda))
        try:
            return begun(config, ranks, kind, cuda, record, tell)
        except (ConfigError, DefenseError, InterveneError):
            if record is not None:
                forget(record, existed)
            raise
        finally:
            if kind != "plain":
                gc.collect()  # wrappers that outlive the process group can hang when they are taken down


def begun(
    config: TrainDefense, ranks: Ranks, kind: str, cuda: bool, record: TrainingFolder | None, tell: Say
) -> Outcome:
    """Prepare, train and finish, in a process group where the backend needs one; ranks leave together."""
    prepared = prepare(config, ranks)
    if record is not None:
        note_facts(record, prepared, kind, cuda)
    backend = make_backend(kind, prepared.model, prepared.optimiser, ranks=ranks, cuda=cuda, offload=config.offload)
    outcome = trained(prepared, backend, record, tell)
    backend.max(torch.zeros((), device=backend.device))
    return outcome


def kind_of(config: TrainDefense, ranks: Ranks) -> str:
    """Return the backend's own name of what was asked for: "auto" by the number of ranks."""
    if config.backend == "auto":
        return "plain" if ranks.world == 1 else "ddp"
    return "fsdp" if config.backend == "fsdp2" else config.backend


def trained(prepared: Prepared, backend: Backend, record: TrainingFolder | None, tell: Say) -> Outcome:
    """Train from the newest checkpoint, or the start, to the end; then save, evaluate and write the result."""
    config, defense = prepared.config, prepared.defense
    assert config.out is not None
    name = "samples.jsonl" if backend.rank == 0 else f"samples-rank{backend.rank}.jsonl"
    place = Place(config.out, "defense-training", config.to_json(), config.wandb_entity)
    journal = Journal(
        record, prepared.training.steps, samples=config.out / name if config.samples else None,
        trackers=None if record is None else Trackers(makers(config.trackers, place), tell), say=tell,
    )  # fmt: skip
    checkpoints = Checkpoints(config.out / "checkpoints", identity_of(prepared), config.keep, tell)
    torch.manual_seed(config.seed + 1000 * backend.rank)  # of dropout: another on each rank
    looks = _looks(prepared, backend, journal)  # before a checkpoint is read: these are the weights it all began with
    meta = checkpoints.load(backend, defense) if config.resume else None
    start = 0 if meta is None else meta.step
    journal.rewind(0 if meta is None else meta.rows, start)
    tell_estimates(prepared, tell)
    if start:
        tell(f"resumed after step {start}")
    stop = StopRequest()

    def save(step: int) -> None:
        checkpoints.save(backend, defense, step, rows=journal.rows)

    watch = Watch(row=journal.row, samples=journal.watching(defense), save=save, stop=stop)
    if looks:
        watch.evaluate = lambda step: [look(step) for look in looks]
    if config.evaluate and config.evaluate_before and not start:
        _evaluated(prepared, backend, journal, 0)
    clock = time.perf_counter()
    try:
        with stop.listening():
            ended = train(backend, defense, prepared.feed, prepared.training, start=start, watch=watch)
    except TrainingError as error:
        raise TrainingError(_with_checkpoint(error, checkpoints)) from None
    finally:
        journal.close()
    if ended.reason and ended.steps < prepared.training.steps:
        tell(f"{ended.reason}: stopped after step {ended.steps}. The same command with --resume goes on.")
        return Outcome(None, ended.reason)
    return Outcome(finish(prepared, backend, record, ended, time.perf_counter() - clock, tell))


def _looks(prepared: Prepared, backend: Backend, journal: Journal) -> list[Callable[[int], None]]:
    """Return what is called after each step: evaluations and looks along the directions, where they are asked for."""
    looks: list[Callable[[int], None]] = []
    if prepared.config.evaluate_every:
        looks.append(lambda step: _evaluated_on_the_way(prepared, backend, journal, step))
    if prepared.config.analyse_every:
        batch = prepared.feed.batches(0, backend.rank, backend.world)[0]
        looking = Looking(prepared.config, backend, prepared.directions, batch)
        looks.append(lambda step: looking.at(backend, step))
    return looks


def finish(
    prepared: Prepared, backend: Backend, record: TrainingFolder | None, ended: Ended, seconds: float, tell: Say
) -> dict[str, Any] | None:
    """Save the weights, evaluate, write result.json; return it, None on other ranks. Collective."""
    config = prepared.config
    assert config.out is not None
    with result_weights(prepared, backend):
        saved = (
            save_trained(backend, prepared.tokenizer, config.out, base=config.model, merge=config.merge)
            if config.save_weights
            else []
        )
        evaluation = examined(config, backend, prepared.tokenizer) if config.evaluate else None
    if record is None:
        return None
    rows = [row for row in record.finished() if row.get("kind", "train") == "train"]
    result: dict[str, Any] = {
        "method": config.method_name,
        "evidence": prepared.entry.evidence,
        "seed": config.seed,
        "steps": ended.steps,
        "examples": prepared.facts["examples"],
        "loss": losses_of(rows),
        "seconds": round(seconds, 1),
        "times_sft": prepared.facts["times_sft"],
        "saved": saved,
    }
    if detection := detection_of(config.out):
        result["detection"] = detection
    if evaluation is not None:
        result["evaluation"] = evaluation.rows()
        before = next((row for row in record.finished() if row.get("kind") == "evaluation" and not row["step"]), {})
        result["before"] = {name: value for name, value in before.items() if name not in ("step", "kind")}
        write_lines(record.path("examples.jsonl"), evaluation.answers)
    result["sentence"] = sentence_of(result)
    record.finish(finite(result))
    tell(result["sentence"])
    if config.report:
        reported(config.out, tell)
    tell(f"{config.out}: " + ", ".join(["result.json", "metrics.jsonl", *(f"{one}/" for one in saved)]))
    return dict(record.result or {})


def reported(folder: Path, tell: Say) -> None:
    """Write report.html where plotly is installed; whatever hinders it, the run is finished."""
    if importlib.util.find_spec("plotly") is None:
        return
    from defenses.report import write_report

    try:
        tell(f"report: {write_report(folder)}")
    except (DefenseError, OSError) as error:
        tell(f"no report: {error}")


@contextmanager
def result_weights(prepared: Prepared, backend: Backend, *, early: bool = False) -> Iterator[None]:
    """Let the model be what the method calls its result: its average, where it keeps one. Collective.

    With `early`, on the way, it is as it is where there is no average yet.
    """
    averaged: Callable[..., AbstractContextManager[None]] | None = getattr(prepared.defense, "averaged", None)
    with nullcontext() if averaged is None else averaged(backend, early=early):
        yield


def identity_of(prepared: Prepared) -> dict[str, str]:
    """Return what a checkpoint must agree on with the run that goes on from it."""
    config = prepared.config
    return {
        "method": config.method_name,
        "options": digest({"method": dict(config.method), **config.shared()}),
        "model": prepared.fingerprint,
        "backend": config.backend,
        **{f"data {name}": value for name, value in prepared.digests.items()},
    }


def note_facts(record: TrainingFolder, prepared: Prepared, kind: str, cuda: bool) -> None:
    """Put into environment.json what is known now that model and data are loaded."""
    config = prepared.config
    newest = Checkpoints(record.path("checkpoints"), identity_of(prepared)).latest()
    if newest is not None:  # says by name what differs
        Checkpoints(record.path("checkpoints"), identity_of(prepared)).require_same(newest, record.directory)
    record.note_environment(
        model_fingerprint=prepared.fingerprint,
        data_digests=dict(prepared.digests),
        device="cuda" if cuda else "cpu",
        backend=kind,
        seeds=[config.seed],
        estimates=dict(prepared.facts),
        dropped=len(prepared.data.dropped),
        resolved={**config.to_json(), "sources": dict(config.sources)},
        options=prepared.options,
    )


def tell_estimates(prepared: Prepared, tell: Say) -> None:
    """Say what will be done and what a step costs."""
    facts, config = prepared.facts, prepared.config
    tell(f"{prepared.entry.name}: {prepared.entry.text}. Evidence: {prepared.entry.evidence}")
    if prepared.data.dropped:
        first = prepared.data.dropped[0]
        tell(f"{len(prepared.data.dropped)} rows were left out, first {first.path}:{first.line}: {first.reason}")
    tell(
        f"{facts['examples']} examples, {facts['steps']} steps of {config.batch_size} ({facts['epochs']:.2f} epochs), "
        f"{facts['tokens']} tokens, {facts['learned_tokens']} of them learned"
    )
    for one in facts.get("warnings", ()):
        tell(f"warning: {one}")
    trainable = sum(one.numel() for one in prepared.model.parameters() if one.requires_grad)
    tell(
        f"{trainable / 1e6:.2f} M parameters trained; {facts['forward_units_per_micro_batch']} forward passes per "
        f"micro-batch, backward passes counted as two: {facts['times_sft']} x plain fine-tuning"
    )


def detection_of(folder: Path) -> dict[str, Any]:
    """Return what the scores of samples.jsonl say of a detector; {} without any. See `sample_log.detection`."""
    return detection(read_samples(folder))


def losses_of(rows: list[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the first loss, and the mean of the last tenth of the steps."""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if not losses:
        return {"first": None, "last": None}
    tail = losses[-max(1, len(losses) // 10) :]
    return {"first": losses[0], "last": sum(tail) / len(tail)}


def sentence_of(result: Mapping[str, Any]) -> str:
    """Return the result in a sentence."""
    loss = result["loss"]
    parts = [f"{result['method']}, seed {result['seed']}: {result['steps']} steps"]
    if loss["first"] is not None:
        parts.append(f"loss {loss['first']:.3f} -> {loss['last']:.3f}")
    for name, one in result.get("evaluation", {}).items():
        if one["value"] is not None:
            parts.append(f"{name} {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}] (n {one['n']})")
    if "auroc" in result.get("detection", {}) and (auc := result["detection"]["auroc"])["value"] is not None:
        parts.append(f"AUROC of the detector {auc['value']:.2f}")
    return ", ".join(parts) + "."


def forget(record: TrainingFolder, existed: bool) -> None:
    """Take back a start that was refused before its first row, so that the mended command may use the folder."""
    left = {one.name for one in record.directory.iterdir()} - {*OWN_FILES, "tensorboard"}
    if record.finished() or left:
        return
    for name in OWN_FILES:
        record.path(name).unlink(missing_ok=True)
    if not existed and not any(record.directory.iterdir()):
        record.directory.rmdir()


def finite(value: Any) -> Any:
    """Return JSON without infinities: an interval that is unbounded has None for an end."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and value - value != 0 else value


def write_lines(path: Path, rows: Any) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows))


def _evaluated_on_the_way(prepared: Prepared, backend: Backend, journal: Journal, step: int) -> None:
    if step % prepared.config.evaluate_every == 0 and step < prepared.training.steps:
        with result_weights(prepared, backend, early=True):
            _evaluated(prepared, backend, journal, step)


def _evaluated(prepared: Prepared, backend: Backend, journal: Journal, step: int) -> None:
    """Add the row of an evaluation after `step` steps."""
    found = examined(prepared.config, backend, prepared.tokenizer, with_base=False)
    if found is not None:
        values = {name: one.value for name, one in found.metrics.items() if one.value is not None}
        journal.row({"step": step, "kind": "evaluation", **values})


def _with_checkpoint(error: TrainingError, checkpoints: Checkpoints) -> str:
    meta = checkpoints.latest()
    kept = "No checkpoint was written yet." if meta is None else f"The checkpoint of step {meta.step} is kept."
    return f"{error} {kept}"


def _wants_cuda(device: str | None) -> bool:
    if device not in (None, "cpu", "cuda"):
        do = "Use cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several."
        raise ConfigError(asked_found_do(f"device {device}", "each rank takes the GPU of its number.", do))
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(asked_found_do("device cuda", "there is none here.", "Leave device out."))
    return device != "cpu" and torch.cuda.is_available()


def _silent(text: str) -> None:
    """Say nothing: only rank 0 speaks."""
