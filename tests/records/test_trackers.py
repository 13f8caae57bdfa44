"""Trackers mirror numbers; one that fails is told of once and stops nothing."""

from __future__ import annotations

import sys
import time

import pytest

from records.config_files import ConfigError
from records.trackers import Place, TensorBoard, Trackers, require_trackers


class Noted:
    def __init__(self, fails_at=None):
        self.seen, self.fails_at, self.closed = [], fails_at, False

    def log(self, values, step):
        if len(self.seen) == self.fails_at:
            raise OSError("the server is gone")
        self.seen.append((dict(values), step))

    def close(self):
        self.closed = True


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on():
    good, bad, told = Noted(), Noted(fails_at=1), []
    trackers = Trackers({"good": lambda: good, "bad": lambda: bad}, told.append)
    for step, loss in enumerate([3.0, 2.0, 1.0], start=1):
        trackers.log({"loss": loss}, step)
    trackers.close()
    assert good.seen == [({"loss": 3.0}, 1), ({"loss": 2.0}, 2), ({"loss": 1.0}, 3)]
    assert good.closed and not bad.closed
    assert told == ["tracker bad failed and is left out from here on (OSError: the server is gone)"]


def test_one_that_cannot_be_started_is_told_of_and_nothing_is_started_before_the_first_number():
    told = []

    def gone():
        raise OSError("no such server")

    trackers = Trackers({"bad": gone}, told.append)
    assert told == []
    trackers.log({"loss": 1.0}, 1)
    trackers.log({"loss": 1.0}, 2)
    trackers.close()
    assert told == ["tracker bad failed and is left out from here on (OSError: no such server)"]


def test_a_missing_package_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("records.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackers wandb: its package is not installed\. Run: pip install wandb"):
        require_trackers(["wandb"])


def test_tensorboard_holds_what_was_logged(tmp_path):
    board = TensorBoard(Place(tmp_path, "project", {}))
    board.log({"loss": 0.5, "iia": 0.75}, 1)
    board.log({"loss": 0.25}, 2)
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [(one.step, one.value) for one in events.Scalars("iia")] == [(1, 0.75)]


def test_wandb_keeps_what_was_logged(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    from records.trackers import Wandb

    run = Wandb(Place(tmp_path / "run0", "project", {"lr": 0.5}))
    run.log({"loss": 0.25}, 7)
    run.close()
    assert wandb.run is None
    (path,) = tmp_path.glob("run0/wandb/offline-run-*/*.wandb")
    missing, deadline = [b"run0", b"project", b"loss", b"0.25"], time.monotonic() + 20
    while missing and time.monotonic() < deadline:  # a process of wandb's own writes it
        held = path.read_bytes()
        missing = [one for one in missing if one not in held]
    assert not missing
