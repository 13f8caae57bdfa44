"""Networks whose variables are known by construction, for methods: in neurons, in several directions, with a question.

In each, the state at L0 is the input itself plus 10, so that ReLU changes nothing, and the answer reads given
directions of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignments import VectorPairs
from intervene import Site
from intervene.networks import MLP

SITE = Site("block_output", 0)
OFFSET = 10.0


def orthonormal(width: int, count: int, seed: int) -> Tensor:
    """Return `count` random orthonormal directions, (width, count)."""
    return torch.linalg.qr(torch.randn(width, count, generator=torch.Generator().manual_seed(seed))).Q


def reader(directions: Tensor, read_out: Tensor) -> MLP:
    """Return an MLP with L0 = x + 10 and L1 = relu(U^T x): U `directions` (D, H), logits = L1 @ `read_out` (H, V).

    H is at most D.
    """
    width, count = directions.shape
    model = MLP(width, width, 2, read_out.shape[1])
    with torch.no_grad():
        first, second = (layer.linear for layer in model.layers)
        first.weight.copy_(torch.eye(width))
        first.bias.fill_(OFFSET)
        second.weight.zero_()
        second.bias.zero_()
        second.weight[:count] = directions.T
        second.bias[:count] = -OFFSET * directions.sum(0)
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[:, :count] = read_out.T
    return model.eval()


def sign_reader(direction: Tensor) -> MLP:
    """Return the network that answers whether x . direction > 0: logit 1 - logit 0 = 2 x . direction."""
    both = torch.stack([direction, -direction], 1)
    return reader(both, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def equality_reader(first: Tensor, second: Tensor) -> MLP:
    """Return the network that answers whether x . first and x . second have one sign.

    By |a + b| - |a - b|, which has the sign of ab: two hidden variables under an equality, as in hierarchical equality.
    """
    units = [first + second, -first - second, first - second, second - first]
    return reader(torch.stack(units, 1), torch.tensor([[-1.0, 1.0]] * 2 + [[1.0, -1.0]] * 2))


def signs_reader(directions: Tensor) -> MLP:
    """Return the network that answers which of the 2^K combinations of signs the K `directions` (D, K) have."""
    count = directions.shape[1]
    both = torch.cat([directions, -directions], 1)
    bits = 2.0 * ((torch.arange(2**count)[None] >> torch.arange(count)[:, None]) & 1) - 1  # (K, 2^K)
    return reader(both, torch.cat([bits, -bits]))


def noise(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def pairs_of(model: MLP, n: int, seed: int, directions: Tensor, *, values: bool = True) -> VectorPairs:
    """Return pairs whose label is the source's answer: all that the answer reads is interchanged.

    Values are those of the sign along the first direction.
    """
    width = len(directions)
    base, source = noise(n, width, 2 * seed), noise(n, width, 2 * seed + 1)
    told = ((base @ directions[:, 0] > 0).tolist(), (source @ directions[:, 0] > 0).tolist())
    answers = model(source).argmax(-1)
    return VectorPairs(
        model, base, source, answers, base_answers=model(base).argmax(-1), values=told if values else ((), ())
    )


def two_variable_pairs(model: MLP, n: int, seed: int, first: Tensor, second: Tensor) -> VectorPairs:
    """Return pairs for `equality_reader`: a third each interchange the one sign, the other, or both."""
    width = len(first)
    base, one, other = (noise(n, width, 3 * seed + i) for i in range(3))
    which = torch.arange(n) % 3
    one = torch.where((which != 1)[:, None], one, base)
    other = torch.where((which != 0)[:, None], other, base)
    labels = ((one @ first > 0) == (other @ second > 0)).long()
    return VectorPairs(model, base, [one, other], labels)


# A question decides what is answered: cause pairs ask for the sign along A, isolate pairs for that along B, which is
# correlated with A both in direction (cosine 0.6) and in the data.
WIDTH = 6
ASKED = 5  # the coordinate of the question: 0 asks for A, 1 for B
OWN = torch.eye(WIDTH)[0]
B = torch.eye(WIDTH)[1]
A = 0.8 * OWN + 0.6 * B


def question_reader() -> MLP:
    """Return the network that answers sign(x . A) or sign(x . B), as coordinate ASKED says."""
    units = torch.stack([A, -A, B, -B], 1)
    asked = torch.eye(WIDTH)[ASKED]
    units = units - 20 * torch.stack([asked, asked, -asked, -asked], 1)
    model = reader(units, torch.tensor([[-1.0, 1.0], [1.0, -1.0]] * 2))
    with torch.no_grad():
        model.layers[1].linear.bias[2:4] -= 20.0
    return model


def question_pairs(n: int, seed: int, *, cause: float = 0.5) -> VectorPairs:
    """Return cause pairs (label: the source's u) and isolate pairs (label: the base's v), x = 2u OWN + v B + noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = torch.randint(2, (n,), generator=generator)
        v = torch.where(torch.rand(n, generator=generator) < 0.9, u, 1 - u)
        x = 0.1 * torch.randn(n, WIDTH, generator=generator)
        x = x + (4.0 * u - 2)[:, None] * OWN + (2.0 * v - 1)[:, None] * B
        x[:, ASKED] = asked
        return x, u, v

    kinds = torch.rand(n, generator=generator) < cause
    base, base_u, base_v = draw((~kinds).float())
    source, source_u, _ = draw((~kinds).float())
    return VectorPairs(
        question_reader(),
        base,
        source,
        torch.where(kinds, source_u, base_v),
        base_answers=torch.where(kinds, base_u, base_v),
        kinds=["cause" if one else "isolate" for one in kinds.tolist()],
        values=(base_u.tolist(), source_u.tolist()),
    )
