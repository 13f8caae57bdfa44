"""What every test gets: a fixed seed, no hub, and the real model once per session."""

from __future__ import annotations

import os

# Before transformers is imported, which reads it once: the default model then comes from the same place on every
# machine, and no test waits for a hub. The tests of the hub itself set their own in a process of their own.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # several test processes share the cores, and tiny tensors lose by being split
os.environ["OMP_NUM_THREADS"] = "1"  # and so for the processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm():
    """The default model and its tokenizer, for tests marked slow. Shared: leave it as it was."""
    from intervene.models import load_model

    return load_model("smollm2-135m")
