"""Every error that defense training raises on purpose, beside those of `intervene` and `records`.

    DefenseError
    ├── DataError         training data that cannot be used as it is, by file and line
    ├── VectorError       directions that are missing, zero, opposing, or made for another model or layer
    ├── CalibrationError  a threshold that was asked for without the data it needs
    ├── BackendError      a backend that is not installed, not possible here, or was started by the wrong launcher
    ├── TrainingError     a loss that is not finite, or a step that cannot be made
    └── CheckpointError   a checkpoint that is half written, foreign, or of another run

Every message has three parts: what was asked, what was found, what to do.
"""

from __future__ import annotations


class DefenseError(Exception):
    """Anything that defense training refuses."""


class DataError(DefenseError):
    """Training data that cannot be used as it is."""


class VectorError(DefenseError):
    """Directions that are missing, zero, opposing, or made for another model or layer."""


class CalibrationError(DefenseError):
    """A threshold that was asked for without the data it needs."""


class BackendError(DefenseError):
    """A backend that is not installed, not possible here, or was started by the wrong launcher."""


class TrainingError(DefenseError):
    """A loss that is not finite, or a step that cannot be made."""


class CheckpointError(DefenseError):
    """A checkpoint that is half written, foreign, or of another run."""
