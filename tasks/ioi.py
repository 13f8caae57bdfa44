"""Indirect object identification, two names: "While Mary and John went to the store, John gave a drink to" -> " Mary".

    task = IOI().for_tokenizer(tokenizer)           # only names, places and objects that are one token
    pairs = task.pairs("train", variable="position", n=1000)

One of the two names is repeated: the subject. The right answer is the other one. Two variables are offered:

`position` (1 or 2): which of the first two names the subject repeats. Base and source have no name in common, so the
    counterfactual answer is the *base's* name that the *source's* position leaves over. Half of the pairs agree in
    position (label = base answer), half differ (label = the base's subject), so copying the base and naming the base's
    subject ("flip") are each right on exactly half of an even number of pairs, and copying the source never is.
`token`: the name that is the answer itself. Copying the source is right on *every* pair: a high score says where the
    answer is carried, not that anything was computed. `tasks.checks.check` says so too.

Source: the task is of Wang et al. 2022 (arXiv 2211.00593), the variables of Mueller et al. 2025 (MIB, arXiv
2504.13151). We differ: names, places, objects *and* templates are disjoint between splits; pairs are balanced.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.base import SPLITS, Example, Pair, Task, fill, split_in_order
from tasks.causal_model import CausalModel
from tasks.errors import BadModel, NotEnough
from tasks.tokens import Tokenizer, single_tokens

# One skeleton, so that all prompts have the same words in the same places (14 tokens where every word is one token):
# a batch needs no padding, and "subject2" is the same token everywhere. Both verbs differ between splits. They were
# chosen with the training split's words only, as those after which SmolLM2-135M names a person and not " the".
TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "While {name1} and {name2} went to the {place}, {subject} gave a {object} to",
        "As {name1} and {name2} got to the {place}, {subject} gave a {object} to",
        "Since {name1} and {name2} ran to the {place}, {subject} passed a {object} to",
        "When {name1} and {name2} met at the {place}, {subject} passed a {object} to",
    ),
    "select": (
        "While {name1} and {name2} walked to the {place}, {subject} gifted a {object} to",
        "Since {name1} and {name2} rushed to the {place}, {subject} gifted a {object} to",
    ),
    "test": (
        "While {name1} and {name2} came to the {place}, {subject} handed a {object} to",
        "Since {name1} and {name2} headed to the {place}, {subject} lent a {object} to",
        "As {name1} and {name2} sat in the {place}, {subject} handed a {object} to",
        "Once {name1} and {name2} moved to the {place}, {subject} lent a {object} to",
    ),
}


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Common English first names, women's and men's in turn.
NAMES = _listed(
    """Mary John Sarah Michael Jennifer David Linda James Elizabeth Robert Susan William Jessica Richard Karen Thomas
    Nancy Charles Lisa Daniel Margaret Matthew Sandra Anthony Ashley Mark Emily Steven Donna Paul Michelle Andrew Carol
    Joshua Amanda Kenneth Melissa Kevin Deborah Brian Stephanie George Rebecca Edward Laura Ronald Sharon Timothy
    Cynthia Jason Kathleen Jeffrey Amy Ryan Angela Jacob Anna Gary Ruth Nicholas Brenda Eric Pamela Jonathan Nicole
    Stephen Katherine Larry Samantha Justin Christine Scott Emma Brandon Catherine Benjamin Rachel Samuel Carolyn
    Gregory Janet Frank Maria Alexander Heather Raymond Diane Patrick Julie Jack Joyce Dennis Victoria Jerry Kelly
    Tyler Christina Aaron Lauren Jose Joan Adam Evelyn Nathan Olivia Henry Judith Zachary Megan Douglas Cheryl Peter
    Martha Kyle Andrea Walter Frances Ethan Hannah Jeremy Jacqueline Harold Ann Keith Jean Christian Alice Roger
    Kathryn Noah Gloria Gerald Teresa Carl Doris Terry Sara Sean Janice Austin Julia Arthur Marie Lawrence Madison
    Jesse Grace Dylan Judy Bryan Theresa Joe Beverly Jordan Denise Billy Marilyn Bruce Amber Albert Danielle Willie
    Rose Gabriel Brittany Logan Diana Alan Abigail Juan Jane Wayne Lori Roy Kate Ralph Lucy Randy Claire Eugene
    Charlotte Vincent Sophia Russell Helen Louis Molly Philip Barbara Bobby Simon Ellen Johnny Leo Eva Oscar"""
)
PLACES = _listed(
    """store park school office restaurant garden station market beach hospital library museum theater hotel kitchen
    church bank farm airport zoo river mall bar gym pool lake camp house bakery shop"""
)
# Each takes "a", not "an".
OBJECTS = _listed(
    """drink ring book ball gift letter key basket bottle box card phone cup hat pen toy map flower coin ticket bag
    shirt cake watch necklace computer bone sandwich picture bike"""
)
_SHARES = {"train": 2, "select": 1, "test": 2}
_KINDS = ("same", "different")


def _subject_position(name1: str, name2: str, subject: str) -> int:
    if (subject == name1) == (subject == name2):
        raise BadModel(f"IOI subject {subject!r}: it must repeat exactly one of {name1!r} and {name2!r}. Change it.")
    return 1 if subject == name1 else 2


CAUSAL_MODEL = CausalModel(
    variables=("template", "name1", "name2", "subject", "place", "object", "position", "token", "answer"),
    parents={"position": ("name1", "name2", "subject"), "token": ("name1", "name2", "position"), "answer": ("token",)},
    mechanisms={
        "position": _subject_position,
        "token": lambda name1, name2, position: name2 if position == 1 else name1,
        "answer": lambda token: f" {token}",
    },
    domains={"position": (1, 2)},
)


def _word_lists() -> dict[str, dict[str, tuple[str, ...]]]:
    names, places, objects = (split_in_order(words, _SHARES) for words in (_dealt_names(), PLACES, OBJECTS))
    return {split: {"name": names[split], "place": places[split], "object": objects[split]} for split in SPLITS}


def _dealt_names() -> tuple[str, ...]:
    """Return the women's names, then the men's: dealing each in turn keeps every split half and half."""
    return (*NAMES[::2], *NAMES[1::2])


@dataclass(frozen=True)
class IOI(Task):
    """Two-name IOI with single-clause templates of one length; see the head of this file for its variables.

    `words` maps split -> "name" | "place" | "object" -> the words it may use; `templates` maps split -> templates with
    the fields {name1} {name2} {subject} {place} {object}.
    """

    words: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=_word_lists)
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: TEMPLATES)

    name = "ioi"
    causal_model = CAUSAL_MODEL
    variables = ("position", "token")
    kinds = _KINDS

    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return the names, places, objects and templates of `split`."""
        listed = {kind: frozenset(words) for kind, words in self.words[split].items()}
        return {**listed, "template": frozenset(self.templates[split])}

    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return the names, place, object and template of `example`."""
        setting = example.setting
        single = {kind: frozenset({str(setting[kind])}) for kind in ("place", "object", "template")}
        return {**single, "name": frozenset({setting["name1"], setting["name2"], setting["subject"]})}

    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the prompt with its spans: name1, name2, place, subject2, after_subject2, object, last.

        `subject2` is the second occurrence of the repeated name, `after_subject2` the next word, `last` the last one.
        """
        prompt, spans = fill(setting["template"], setting)
        spans["subject2"] = spans.pop("subject")
        spans["after_subject2"] = _next_word(prompt, spans["subject2"][1])
        spans["last"] = (prompt.rindex(" ") + 1, len(prompt))
        return Example(prompt, self.causal_model.run(setting)["answer"], dict(setting), spans)

    def kind(self, pair: Pair) -> str:
        """Return "same" or "different": whether base and source repeat the name at the same position."""
        base, source = (self.causal_model.run(example.setting)["position"] for example in (pair.base, pair.source))
        return _KINDS[int(base != source)]

    def trivial_answers(self, pair: Pair) -> dict[str, str]:
        """Return copy_base, copy_source and flip: the base's own subject, the name it does *not* want."""
        return {**super().trivial_answers(pair), "flip": f" {pair.base.setting['subject']}"}

    def for_tokenizer(self, tokenizer: Tokenizer) -> IOI:
        """Return this task with only words that are one token with a leading space.

        Words are dropped after the split, so a word never changes its split with the tokenizer.

        Raises:
            NotEnough: a split is left with fewer than four names, no place or no object.
        """
        kept = {
            split: {kind: single_tokens(tokenizer, words) for kind, words in lists.items()}
            for split, lists in self.words.items()
        }
        for split, lists in kept.items():
            for kind, least in (("name", 4), ("place", 1), ("object", 1)):
                if len(lists[kind]) < least:
                    raise NotEnough(
                        f"ioi, {split}: {least} of kind {kind!r} are needed, and {len(lists[kind])} are one token for "
                        "this tokenizer. Give IOI(words=...) with words it knows."
                    )
        return IOI(words=kept, templates=self.templates)

    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return one random input of `split`."""
        return self._setting(rng, split, rng.sample(self.words[split]["name"], 2), rng.choice((1, 2)))

    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return base and source inputs without a common name, whose subject positions are equal or not by `kind`."""
        names = rng.sample(self.words[split]["name"], 4)
        position = rng.choice((1, 2))
        other = position if kind == "same" else 3 - position
        return self._setting(rng, split, names[:2], position), self._setting(rng, split, names[2:], other)

    def _setting(self, rng: random.Random, split: str, names: list[str], position: int) -> dict[str, Any]:
        return {
            "template": rng.choice(self.templates[split]),
            "name1": names[0],
            "name2": names[1],
            "subject": names[position - 1],
            "place": rng.choice(self.words[split]["place"]),
            "object": rng.choice(self.words[split]["object"]),
        }


def _next_word(text: str, end: int) -> tuple[int, int]:
    """Return the characters of the word after position `end`."""
    begin = end + 1
    return begin, text.find(" ", begin)
