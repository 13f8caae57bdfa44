"""Rows and losses of a search reach the trackers with their place in the name."""

from __future__ import annotations

import pytest

from alignments.config import load_config
from alignments.trackers import Mirror, mirror_for, scalars_of
from records.trackers import Trackers
from tests.alignments.reported import row
from tests.records.test_trackers import Noted


def test_a_row_becomes_scalars_with_its_place_in_the_name():
    one = row(14, "last", "das", 2, "test", 50)
    values = scalars_of(one)
    iia = [name for name in values if name.startswith("iia/")]
    assert len(iia) == 1 and values[iia[0]] == one.iia and iia[0].endswith("@ last/seed 2")
    noted = Noted()
    Mirror(Trackers({"noted": lambda: noted}, pytest.fail)).row(one)
    assert noted.seen == [(values, 14)]


def test_losses_of_a_fit_are_mirrored_to_the_run_s_folder(tmp_path):
    config = load_config(flags={"task": "ioi", "out": tmp_path, "trackers": "tensorboard"})
    with mirror_for(config, say=pytest.fail) as mirror:
        mirror.losses("das", [0.5, 0.25])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss/das")] == [(1, 0.5), (2, 0.25)]
