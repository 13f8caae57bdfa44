"""That the benchmark's counters count right: against operations counted by hand, and costs fixed in the design."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.counting import OpCounter, Parts, count, plain_cost
from benchmarks.peers import load
from benchmarks.peers.ours import Ours
from benchmarks.peers.raw_hooks import RawHooks
from benchmarks.workload import Workload, make_model, make_workload

ROOT = Path(__file__).parents[2]
MOST_OPERATIONS = 6  # a static edit and site: DESIGN 4.2, clause 10


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1  # 2 operations


class Model(nn.Module):
    """1 operation, three blocks of 2, 1 operation: 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.ReLU()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Enough(Exception):
    pass


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., object]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[1, 2, 3]])


@pytest.fixture
def parts(model: Model) -> Parts:
    return Parts(model.embedding, list(model.blocks), model.norm)


def test_operations_are_counted_one_by_one_views_included():
    x, v = torch.zeros(2, 3, 4), torch.ones(4)
    with torch.no_grad(), OpCounter() as counter:
        y = x.clone()  # 1
        y[:, -1].add_(v)  # select, add_: 2 (torch leaves out the slice that takes everything)
        y.sum().item()  # sum, read of the value: 2
    assert (
        counter.names
        == {
            "aten.clone.default": 1,
            "aten.slice.Tensor": 1,
            "aten.select.int": 1,
            "aten.add_.Tensor": 1,
            "aten.sum.default": 1,
            "aten._local_scalar_dense.default": 1,
        }
        or counter.total == 5
    )  # torch may leave out the slice that takes everything


def test_what_touches_no_tensor_is_no_operation():
    with OpCounter() as counter:
        torch.promote_types(torch.float16, torch.float32)
    assert counter.total == 0


def test_a_plain_forward_is_cut_at_its_parts(model: Model, ids: Tensor, parts: Parts):
    cost, names = plain_cost(parts, lambda: model(ids))
    assert (cost.before, cost.blocks, cost.after) == (1, (2, 2, 2), 1)
    assert names == {
        "aten.embedding.default": 1,
        "aten.mul.Tensor": 3,
        "aten.add.Tensor": 3,
        "aten.relu.default": 1,
    }


def test_only_the_hooks_operations_are_charged(model: Model, ids: Tensor, parts: Parts):
    plain, names = plain_cost(parts, lambda: model(ids))
    with hooked(model.blocks[1], lambda module, args, output: (output + 1).neg()):
        counted = count(parts, plain, names, lambda: model(ids))
    assert (counted.extra, counted.forwards, counted.blocks) == (2, 1, 3)
    assert counted.names == {"aten.add.Tensor": 1, "aten.neg.default": 1}


def test_a_run_that_stops_early_is_charged_for_the_layers_it_ran(model: Model, ids: Tensor, parts: Parts):
    plain, names = plain_cost(parts, lambda: model(ids))

    def stop(module: nn.Module, args: object, output: Tensor) -> None:
        output.clone()  # 1
        raise Enough

    def run() -> None:
        with pytest.raises(Enough):
            model(ids)

    with hooked(model.blocks[1], stop):
        counted = count(parts, plain, names, run)
    assert (counted.extra, counted.forwards, counted.blocks) == (1, 1, 2)


def test_a_run_on_another_model_is_refused_and_not_counted(model: Model, ids: Tensor, parts: Parts):
    plain, names = plain_cost(parts, lambda: model(ids))
    with pytest.raises(ValueError, match="never called the model that is watched"):
        count(parts, plain, names, lambda: Model()(ids))


def test_counting_leaves_the_model_as_it_was(model: Model, ids: Tensor, parts: Parts):
    def own(*args: object) -> Tensor:
        return Block.forward(model.blocks[0], *args)

    model.blocks[0].forward = own  # some peers set one on the module itself
    with pytest.raises(ZeroDivisionError):
        plain_cost(parts, lambda: 1 / 0)
    assert vars(model.blocks[0])["forward"] is own
    assert not any("forward" in vars(module) for module in model.modules() if module is not model.blocks[0])


PRETEND = """
import torch
from benchmarks.pretend import HostCounter, Remote, register
device = register()
x = Remote(torch.arange(6.0).view(2, 3))
reads = {
    "item": lambda: x.sum().item(),
    "if": lambda: bool((x > 1).any()),
    "tolist": lambda: x.tolist(),
    "cpu": lambda: x.cpu(),
    "nonzero": lambda: x.nonzero(),
    "mask": lambda: x[x > 1],
    "equal": lambda: torch.equal(x, x),
}
uploads = {
    "list": lambda: torch.tensor([1.0, 2.0], device=device),
    "to": lambda: torch.ones(2).to(device),
    "index": lambda: x[:, torch.tensor([0, 1])],
}
free = {
    "arithmetic": lambda: (x + 1) @ x.mT,
    "scalar": lambda: x * torch.tensor(2.0),
    "zeros": lambda: torch.zeros(3, device=device) + torch.arange(3, device=x.device),
    "view": lambda: x[:, -1].clone().add_(1.0),
    "where": lambda: torch.where(x > 1, x, x.new_zeros(())),
    "device index": lambda: x[:, Remote(torch.tensor([0, 1]))],
}
for name, run in reads.items():
    with HostCounter() as counter: run()
    assert (counter.reads.total(), counter.uploads.total()) == (1, 0), (name, counter.reads, counter.uploads)
for name, run in uploads.items():
    with HostCounter() as counter: run()
    assert (counter.reads.total(), counter.uploads.total()) == (0, 1), (name, counter.reads, counter.uploads)
for name, run in free.items():
    with HostCounter() as counter: assert run().device == device, name
    assert counter.total == 0, (name, counter.reads, counter.uploads)
with HostCounter():
    assert (x + 1).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    try: x + torch.ones(3)
    except RuntimeError as error: print(error)
"""


def test_the_pretend_device_counts_reads_and_uploads_and_refuses_what_cuda_refuses():
    done = subprocess.run([sys.executable, "-c", PRETEND], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "found host tensors [(3,)] beside device tensors" in done.stdout


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def work(request: pytest.FixtureRequest) -> Workload:
    model = make_model(request.param, width=16, layers=12, vocabulary=32)
    return make_workload(model, batch=2, length=5, prompts=1, new_tokens=3, device="cpu")


def test_raw_hooks_cost_what_their_lines_say(work: Workload):
    cases = measure.operations(RawHooks, work)["cases"]
    expected = {
        "add_all": 1,  # add
        "add_last": 3,  # clone, select, add_
        "swap_last": 4,  # select; clone, select, copy_
        "zero_head": 3,  # clone, slice, zero_
        "collect": 0,
    }
    assert {case: (cases[case]["per_site"], cases[case]["per_call"]) for case in expected} == {
        case: (cost, 0) for case, cost in expected.items()
    }
    assert cases["steer"]["extra_per_step"] == 1


@pytest.fixture(scope="module")
def ours(work: Workload) -> measure.Figures:
    return measure.operations(Ours, work)["cases"]


def test_the_engine_agrees_with_hand_written_hooks(ours: measure.Figures):
    wrong = {case: figures for case, figures in ours.items() if not figures.get("agrees", case == "steer")}
    assert not wrong


def test_twelve_sites_from_one_source_cost_two_forwards(ours: measure.Figures):
    assert ours["swap_last"]["forwards"] == 2
    assert ours["collect"]["forwards"] == 1


@pytest.mark.parametrize("case", ["add_all", "add_last"])
def test_a_static_add_costs_at_most_six_operations_a_site(ours: measure.Figures, case: str):
    assert ours[case]["per_site"] <= MOST_OPERATIONS, ours[case]["names"]


READS = """
import json
from benchmarks import measure
from benchmarks.peers.ours import Ours
from benchmarks.pretend import register
from benchmarks.workload import make_model, make_workload
work = make_workload(
    make_model("gpt2", width=16, layers=4, vocabulary=32), batch=2, length=5, prompts=1, new_tokens=3, device="cpu"
)
register()
print(json.dumps(measure.host_reads(Ours, work)["cases"]))
"""


def test_an_edit_never_waits_for_the_device():
    done = subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])
    failed = {case: figures["failed"] for case, figures in cases.items() if "failed" in figures}
    assert not failed
    waits = {
        case: figures
        for case, figures in cases.items()
        if case != "steer" and (figures["reads_per_site"] or figures["uploads_per_site"])
    }
    assert not waits


def test_a_peer_that_is_missing_is_named_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    kind, reason = load("nnsight")
    assert kind is None
    assert reason.startswith("not installed")
