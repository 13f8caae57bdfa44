"""Trackers mirror rows; one that fails is told of once and stops nothing."""

from __future__ import annotations

import sys

import pytest

from alignments.config import ConfigError, load_config
from alignments.trackers import Trackers, require_trackers, scalars_of, trackers_for
from tests.alignments.reported import row


class Noted:
    def __init__(self, fails_at=None):
        self.seen, self.fails_at, self.closed = [], fails_at, False

    def log(self, values, step):
        if len(self.seen) == self.fails_at:
            raise OSError("the server is gone")
        self.seen.append((dict(values), step))

    def close(self):
        self.closed = True


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(tmp_path):
    good, bad, told = Noted(), Noted(fails_at=1), []
    config = load_config(flags={"task": "ioi", "out": tmp_path})
    trackers = Trackers(config, {"good": lambda _: good, "bad": lambda _: bad}, told.append)
    trackers.losses("das", [3.0, 2.0, 1.0])
    trackers.close()
    assert [step for _, step in good.seen] == [1, 2, 3] and good.closed and not bad.closed
    assert told == ["tracker bad failed and is left out from here on (OSError: the server is gone)"]


def test_a_row_becomes_scalars_with_its_place_in_the_name():
    one = row(14, "last", "das", 2, "test", 50)
    values = scalars_of(one)
    iia = [name for name in values if name.startswith("iia/")]
    assert len(iia) == 1 and values[iia[0]] == one.iia and iia[0].endswith("@ last/seed 2")


def test_a_missing_package_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("alignments.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackers wandb: its package is not installed\. Run: pip install wandb"):
        require_trackers(["wandb"])


def test_tensorboard_holds_what_was_logged(tmp_path):
    config = load_config(flags={"task": "ioi", "out": tmp_path, "trackers": "tensorboard"})
    with trackers_for(config, say=pytest.fail) as trackers:
        trackers.losses("das", [0.5, 0.25])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss/das")] == [(1, 0.5), (2, 0.25)]
