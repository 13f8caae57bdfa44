"""What users get wrong, and the sentence that says so: asked, found, do.

Layers, heads and components out of range are tested with the families.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from intervene import (
    Add,
    AllTokens,
    AmbiguousForward,
    At,
    BadPosition,
    BadVector,
    Coordinates,
    DecodeSteps,
    First,
    InterveneError,
    Intervention,
    LastToken,
    Mask,
    Match,
    Prompt,
    Response,
    Set,
    ShapeMismatch,
    Span,
    SteeringVector,
    Subspace,
    Swap,
    WrongModel,
    Zero,
    capture,
    collect_sources,
    interchange,
    intervene,
)
from intervene.edits import Edit
from intervene.families import fingerprint
from intervene.sites import Site
from tests.intervene.by_hand import close, vector
from tests.tiny import tiny_batch, tiny_model

SITE = "L1.block_output"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def refused(model, plan, error, text, *, sources=None, batch=None, **call):
    """Assert that running `plan` on a right-padded batch of 7 and 4 tokens raises `error` with `text`."""
    batch = tiny_batch(model, "right") if batch is None else batch
    with pytest.raises(error, match=text), torch.no_grad(), intervene(model, plan, sources):
        model(**batch, **call)


def test_a_vector_of_another_width(model):
    refused(model, [Intervention(SITE, Add(torch.ones(31)))], ShapeMismatch, "31 wide, but 32 features.*Give it 32")
    narrow = Intervention(SITE, Swap(), LastToken(), Subspace(16, 2))
    refused(model, [narrow], ShapeMismatch, "made for width 16, but L1.block_output is 32 wide.*Make it for 32")
    beyond = Intervention("L1.head_output[0]", Zero(), featurizer=Coordinates([8]))
    refused(model, [beyond], InterveneError, "index 8 was asked of a site 8 wide. Use 0 to 7")


def test_a_vector_made_for_another_model_or_layer(model):
    other = tiny_model("llama", seed=1)
    made = SteeringVector(vector(1), Site.parse(SITE), fingerprint(other), "mean_difference", model="the-other")
    refused(model, [Intervention(SITE, Add(made))], WrongModel, "made for model the-other.*elsewhere=")
    here = SteeringVector(vector(1), Site.parse("L0.block_output"), fingerprint(model), "mean_difference")
    refused(model, [Intervention(SITE, Add(here))], WrongModel, "made at L0.block_output.*0-based.*elsewhere=")
    with torch.no_grad(), intervene(model, [Intervention(SITE, Add(here), elsewhere="transfer")]):
        model(**tiny_batch(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite(value):
    bad = torch.ones(32)
    bad[3] = value
    for edit in (Add, Set):
        with pytest.raises(BadVector, match=f"{edit.__name__}: the vector has 1 NaN or infinite entries of 32"):
            edit(bad)


def test_vectors_that_are_zero():
    with pytest.raises(BadVector, match="all zero, which would change nothing"):
        Add(torch.zeros(32))
    with pytest.raises(BadVector, match="all zero"):
        Add(torch.stack([torch.ones(32), torch.zeros(32)]))
    Set(torch.zeros(32))  # means something


def test_a_plan_that_is_one_intervention(model):
    item = Intervention(SITE, Zero())
    refused(model, item, TypeError, r"found one Intervention. Write \[intervention\]")


def test_a_position_out_of_range_names_the_example(model):
    text = r"position 5 was asked of example 1, which has 4 tokens \(padding is not counted\). Use -4 to 3"
    refused(model, [Intervention(SITE, Zero(), At(5))], BadPosition, text)
    refused(model, [Intervention(SITE, Zero(), At(-5))], BadPosition, "position -5.*example 1, which has 4 tokens")
    refused(model, [Intervention(SITE, Zero(), First(5))], BadPosition, r"First\(count=5\).*example 1")
    text = "empty or out of range in example 1, which has 4 tokens"
    refused(model, [Intervention(SITE, Zero(), Span(2, 6))], BadPosition, text)
    refused(model, [Intervention(SITE, Zero(), Span(4))], BadPosition, text)


def test_ragged_or_empty_positions(model):
    with pytest.raises(BadPosition, match=r"ragged, the rows have \[1, 2\] positions.*use Mask"):
        At([[0], [1, 2]])
    with pytest.raises(BadPosition, match="no position was given"):
        At()
    with pytest.raises(BadPosition, match="no position was given"):
        At([[], []])
    refused(model, [Intervention(SITE, Zero(), At(1, 1))], BadPosition, "name one token twice")
    refused(model, [Intervention(SITE, Zero(), At(3, -1))], BadPosition, "name one token twice")  # in example 1
    refused(model, [Intervention(SITE, Zero(), At([[0], [1], [2]]))], BadPosition, "3 rows: the batch has 2 examples")


def test_a_mask_over_padding_or_of_another_shape(model):
    selected = torch.zeros(2, 7, dtype=torch.bool)
    refused(model, [Intervention(SITE, Zero(), Mask(selected))], BadPosition, "selects no token in any example")
    selected[1, 5] = True
    refused(model, [Intervention(SITE, Zero(), Mask(selected))], BadPosition, "column 5 of example 1 is padding")
    mask = Mask(torch.ones(2, 6))
    refused(model, [Intervention(SITE, Zero(), mask)], BadPosition, r"shape \(2, 6\): the batch is \(2, 7\)")


@pytest.mark.parametrize("indices", [[1.7], 1.5, [True, False], torch.tensor([[False, True]]), torch.tensor([0.5])])
def test_positions_that_would_be_bent_into_whole_numbers(indices):
    with pytest.raises(BadPosition, match=r"At: .* is no whole number\. Count tokens, or use Mask"):
        At(indices)


def test_masks_that_are_scores_or_columns():
    for given in (torch.full((2, 7), 0.01), torch.tensor([[0, 3], [1, 2]])):
        with pytest.raises(BadPosition, match=r"holds more than 0 and 1\. Compare first"):
            Mask(given)
    with pytest.raises(BadPosition, match=r"a bool tensor \(B, S\) is needed, found a list"):
        Mask([[True, False]])
    with pytest.raises(BadPosition, match=r"First\(count=-1\): selects no token"):
        First(-1)


def test_vectors_that_are_no_tensors():
    with pytest.raises(BadVector, match=r"Add: a list is no tensor\. Wrap it"):
        Add([1.0, 2.0])


def test_a_match_that_is_not_there(model):
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 7]])}
    plan = [Intervention(SITE, Zero(), Match([5, 6]))]
    text = r"Match \(5, 6\), occurrence 0: example 1 has 0 of them, in \[5, 8, 7\]"
    refused(model, plan, BadPosition, text, batch=batch)
    refused(model, [Intervention(SITE, Zero(), Match([5], occurrence=1))], BadPosition, "occurrence 1", batch=batch)
    with pytest.raises(BadPosition, match=r"Write Match\('cat', tokenizer=...\)"):
        Match("cat")
    with pytest.raises(BadPosition, match="nothing to look for"):
        Match([])
    embedded = {"inputs_embeds": torch.randn(1, 3, 32)}
    refused(model, plan, BadPosition, "needs token ids, found.*prompt=", batch=embedded)


def test_a_marker_that_is_not_there(model):
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 7]])}
    plan = [Intervention(SITE, Zero(), Prompt(marker=(6,)))]
    refused(model, plan, BadPosition, r"marker \[6\] is not in example 1.*or pass labels", batch=batch)


def test_positions_that_select_nothing(model):
    labels = torch.ones(2, 7, dtype=torch.long)
    plan = [Intervention(SITE, Zero(), Prompt())]
    refused(model, plan, BadPosition, "select no token of this batch", labels=labels)
    with pytest.raises(BadPosition, match="selects prompt tokens only, but the phase is 'decode'"):
        Intervention(SITE, Zero(), At(1), phase="decode")
    with pytest.raises(BadPosition, match="cannot act in phase 'both'"):
        Intervention(SITE, Swap(), LastToken(), phase="both")


def test_missing_or_superfluous_sources(model):
    plan = [Intervention(SITE, Swap(), LastToken())]
    source = torch.randn(2, 1, 32)
    refused(model, plan, ShapeMismatch, "needs a source activation and none was given.*collect_sources")
    refused(model, plan, ShapeMismatch, "1 interventions: 2 sources were given", sources=[source, source])
    static = [Intervention(SITE, Zero(), LastToken())]
    refused(model, static, ShapeMismatch, "uses no source, but one was given", sources=[source])
    with pytest.raises(ShapeMismatch, match="2 source batches"):
        collect_sources(model, plan, [tiny_batch(model)] * 2)


def test_sources_of_another_shape(model):
    plan = [Intervention(SITE, Swap(), LastToken())]
    refused(model, plan, ShapeMismatch, r"shape \(2, 32\), the site asks \(B, P, 32\)", sources=[torch.ones(2, 32)])
    refused(model, plan, ShapeMismatch, r"shape \(2, 1, 8\), the site asks", sources=[torch.ones(2, 1, 8)])
    two = [Intervention(SITE, Swap(), First(3))]
    text = "written for 2 positions per example, but these are 3"
    refused(model, two, ShapeMismatch, text, sources=[torch.ones(2, 2, 32)])
    refused(model, [Intervention(SITE, Add(vector(1, 2, 2)), First(3))], ShapeMismatch, text)


def test_sources_of_another_number_of_examples(model):
    plan = [Intervention(SITE, Swap(), LastToken())]
    text = "written for 3 examples, but the batch has 2.*one row per example"
    refused(model, plan, ShapeMismatch, text, sources=[torch.ones(3, 1, 32)])
    # one row for two examples that are not copies of one another: nobody said that it is for both
    refused(model, plan, ShapeMismatch, "written for 1 examples, but the batch has 2", sources=[torch.ones(1, 1, 32)])
    refused(model, [Intervention(SITE, Add(vector(1, 3)))], ShapeMismatch, text)
    refused(model, [Intervention(SITE, Add(vector(1), torch.ones(3)))], ShapeMismatch, text)
    with pytest.raises(ShapeMismatch, match="written for 3 examples"):
        interchange(model, plan, tiny_batch(model), tiny_batch(model, lengths=(5, 5, 5)))


def test_edit_and_positions_written_for_different_numbers_of_examples(model):
    plan = [Intervention(SITE, Add(vector(1, 2)), At([[0], [1], [2]]))]
    refused(model, plan, ShapeMismatch, r"written for \[2, 3\] examples")


def test_a_source_with_other_gaps_than_the_base(model):
    base, source = tiny_batch(model, "right"), tiny_batch(model, "right", lengths=(7, 3))
    plan = [Intervention(SITE, Swap(), AllTokens())]
    text = "ragged, the base has 4 such tokens in example 1 and the source 3"
    with pytest.raises(BadPosition, match=text), torch.no_grad():
        interchange(model, plan, base, source)


def test_captures_that_contradict_each_other(model):
    batch = tiny_batch(model)
    with pytest.raises(ShapeMismatch, match="named twice"), capture(model, ["L2.mlp_output", "L-1.mlp_output"]):
        pass
    with (
        pytest.raises(ShapeMismatch, match="2 sites: 1 positions"),
        capture(model, ["L0.mlp_output", "L1.mlp_output"], [LastToken()]),
    ):
        pass
    many = tiny_batch(model, lengths=(5, 5, 5, 5))
    with (
        pytest.raises(ShapeMismatch, match="written for 2 examples, but the batch has 4"),
        torch.no_grad(),
        capture(model, "L0.mlp_output", At([[0], [1]])),
    ):
        model(**many)
    with torch.no_grad(), capture(model, "L0.mlp_output") as acts:
        model(**batch)
        model(**batch)
    with pytest.raises(Exception, match=r"2 forward passes computed it. Use acts.every\(site\)"):
        acts["L0.mlp_output"]
    assert len(acts.every("L0.mlp_output")) == 2
    with pytest.raises(KeyError, match=r"L1.mlp_output was not captured; these were: L0.mlp_output"):
        acts["L1.mlp_output"]


@torch.no_grad()
def test_a_prompt_in_the_cache_before_the_block(model):
    batch = tiny_batch(model)
    cache = DynamicCache()
    model(input_ids=batch["input_ids"][:, :5], past_key_values=cache)
    rest = {"input_ids": batch["input_ids"][:, 5:], "attention_mask": batch["attention_mask"]}
    for positions in (First(), Span(3, 6)):
        with (
            pytest.raises(BadPosition, match="lie in the key/value cache that was filled before this block"),
            intervene(model, [Intervention(SITE, Zero(), positions)]),
        ):
            model(**rest, past_key_values=cache)
    for positions in (Match([int(batch["input_ids"][0, 6])]), Response(marker=(5,))):
        with (
            pytest.raises(BadPosition, match=r"known to the key/value cache only.*pass prompt="),
            intervene(model, [Intervention(SITE, Zero(), positions)]),
        ):
            model(**rest, past_key_values=cache)
    with intervene(model, [Intervention(SITE, Add(vector(1)), At(6))]):
        found = model(**rest, past_key_values=cache).logits
    with intervene(model, [Intervention(SITE, Add(vector(1)), LastToken())]):
        expected = model(**batch).logits
    close(found, expected[:, 5:])


@torch.no_grad()
def test_an_attention_mask_that_does_not_say_what_is_padding(model):
    batch = tiny_batch(model)
    square = torch.ones(7, 7).tril().bool().expand(2, 1, 7, 7)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": square}
    for positions in (AllTokens(), LastToken()):
        plan = [Intervention(SITE, Zero(), positions)]
        refused(model, plan, BadPosition, r"found one of shape \(2, 1, 7, 7\).*Pass prompt=", batch=inputs)
    plan = [Intervention(SITE, Add(vector(1)), LastToken())]
    with intervene(model, plan, prompt=batch):
        found = model(**inputs).logits
    with intervene(model, plan):
        close(found, model(**batch).logits)
    with capture(model, SITE) as acts:  # every column, whatever it is
        model(**inputs)
    assert acts[SITE].shape == (2, 7, 32)


@torch.no_grad()
def test_a_prompt_that_is_not_what_runs(model):
    batch, other = tiny_batch(model, "left"), tiny_batch(model, "left", seed=5)
    plan = [Intervention(SITE, Zero(), LastToken())]
    bare = {"input_ids": batch["input_ids"]}
    for prompt, name in ((other, "input_ids"), (bare, "attention_mask")):
        with (
            pytest.raises(ShapeMismatch, match=f"its {name} are not those of prompt="),
            intervene(model, plan, prompt=prompt),
        ):
            model(**batch)


@torch.no_grad()
def test_a_call_of_a_part_of_the_model(model):
    h = torch.randn(1, 3, 32)
    with (
        pytest.raises(AmbiguousForward, match="ran outside the model's own forward pass"),
        intervene(model, [Intervention("L1.mlp_output", Zero())]),
    ):
        model.model.layers[1].mlp(h)


class _InPlace(Edit):
    def forward(self, z, source):
        return z.mul_(2)


class _Narrow(Edit):
    def forward(self, z, source):
        return z[..., :1]


@pytest.mark.parametrize("positions", [AllTokens(), LastToken()])
def test_edits_of_users_that_break_their_contract(model, positions):
    refused(model, [Intervention(SITE, _InPlace(), positions)], InterveneError, "Return a new tensor: z \\* 2")
    refused(model, [Intervention(SITE, _Narrow(), positions)], ShapeMismatch, "the edit returned shape.*1\\) for")


def test_values_of_the_wrong_kind():
    with pytest.raises(ShapeMismatch, match="positions is no Positions, found 3"):
        Intervention(SITE, Zero(), 3)
    with pytest.raises(BadPosition, match=r"phase 'answer'. Use 'prompt', 'decode' or 'both'"):
        Intervention(SITE, Zero(), phase="answer")
    assert DecodeSteps(1, 3).decodes(2) and not DecodeSteps(1, 3).decodes(3)
    assert Response().can_decode
