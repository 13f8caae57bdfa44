"""Addition of two two-digit numbers with a carry: "Q: How much is 27 plus 45? A:" -> " 72".

    task = Addition().for_tokenizer(tokenizer)      # takes the form that this tokenizer can score
    pairs = task.pairs("train", variable="ones_carry", n=1000)

Only an answer's first token is scored, and what that holds depends on the tokenizer. So there are three forms:

whole: the answer is the sum. For tokenizers that write every number up to 198 as one token of its own.
tens:  the answer is the tens digit. A sum of three digits has its 1 in the prompt already: "... A: 1" -> "2". For
       tokenizers that split numbers into digits. Tens digits that add up to 9 are left out: there a carry would change
       how many digits come before.
ones:  the answer is the last digit, all others stand in the prompt: "... A: 7" -> "2". The carry changes nothing in
       it, so it is no variable of this form.

Variables: `ones_carry` (1 if the ones digits add up to more than 9), `tens_sum` (of the two tens digits, without the
carry), and the digits of the sum, `tens_out` and `ones_out`. A digit that is the whole answer says where the answer is
carried and no more; `tasks.checks.check` says so too. Pairs for `ones_carry` are half "same", half "different" in it,
and the last digits of base's and source's `tens_sum` differ: so copying the base and flipping its carry ("flip") are
each right on exactly half of them, and copying the source never is.

Source: the task and the variables of Mueller et al. 2025 (MIB, arXiv 2504.13151). We differ: `tens_sum`; the forms, so
that the token scored depends on the variable; operands disjoint between splits, in either order; balanced pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tasks.base import SPLITS, Example, Pair, Task, fill, split_in_order
from tasks.causal_model import CausalModel
from tasks.errors import BadData, BadModel, NotEnough, require_known
from tasks.tokens import Tokenizer, token_ids

QUESTION = "Q: How much is {op1} plus {op2}? A:"
_SHARES = {"train": 2, "select": 1, "test": 2}
_KINDS = ("same", "different")
_PATIENCE = 10_000

# Split -> (smaller, larger) operands; no two splits share one.
Operands = Mapping[str, tuple[tuple[int, int], ...]]

_DIGITS: dict[str, tuple[str, Callable[[int], int]]] = {
    "op1_tens": ("op1", lambda number: number // 10),
    "op1_ones": ("op1", lambda number: number % 10),
    "op2_tens": ("op2", lambda number: number // 10),
    "op2_ones": ("op2", lambda number: number % 10),
}
# What the answer is made of in each form, and what of the sum the prompt carries already.
_ANSWERS: dict[str, Callable[[int, int, int], str]] = {
    "whole": lambda hundreds, tens, ones: str(100 * hundreds + 10 * tens + ones),
    "tens": lambda hundreds, tens, ones: str(tens),
    "ones": lambda hundreds, tens, ones: str(ones),
}
_GIVEN = {"whole": 0, "tens": 2, "ones": 1}  # digits, counted from the end, that the prompt leaves out; 0 is all
_VARIABLES = {
    "whole": ("ones_carry", "tens_sum", "tens_out", "ones_out"),
    "tens": ("ones_carry", "tens_sum", "tens_out"),
    "ones": ("ones_out",),
}


def _causal_model(form: str, space: str) -> CausalModel:
    """Return the model of one form; `space` is what goes before a whole answer."""
    answer = _ANSWERS[form]
    return CausalModel(
        variables=(
            *("op1", "op2", *_DIGITS),
            *("ones_carry", "tens_sum", "hundreds_out", "tens_out", "ones_out", "answer"),
        ),
        parents={
            **{name: (operand,) for name, (operand, _) in _DIGITS.items()},
            "ones_carry": ("op1_ones", "op2_ones"),
            "tens_sum": ("op1_tens", "op2_tens"),
            "hundreds_out": ("tens_sum", "ones_carry"),
            "tens_out": ("tens_sum", "ones_carry"),
            "ones_out": ("op1_ones", "op2_ones"),
            "answer": ("hundreds_out", "tens_out", "ones_out"),
        },
        mechanisms={
            **{name: digit for name, (_, digit) in _DIGITS.items()},
            "ones_carry": lambda ones1, ones2: int(ones1 + ones2 > 9),
            "tens_sum": lambda tens1, tens2: tens1 + tens2,
            "hundreds_out": lambda tens_sum, carry: (tens_sum + carry) // 10,
            "tens_out": lambda tens_sum, carry: (tens_sum + carry) % 10,
            "ones_out": lambda ones1, ones2: (ones1 + ones2) % 10,
            "answer": lambda hundreds, tens, ones: space + answer(hundreds, tens, ones),
        },
        domains={"op1": range(10, 100), "op2": range(10, 100), "ones_carry": (0, 1)},
    )


def _operand_lists() -> dict[str, tuple[tuple[int, int], ...]]:
    pairs = [(low, high) for low in range(10, 100) for high in range(low, 100)]
    random.Random("addition operands").shuffle(pairs)  # a fixed order: dealing it gives each split all sorts of sums
    parts = split_in_order([_entity(low, high) for low, high in pairs], _SHARES)
    return {split: tuple(_operands(entity) for entity in parts[split]) for split in SPLITS}


def _entity(op1: int, op2: int) -> str:
    return f"{min(op1, op2)}+{max(op1, op2)}"


def _operands(entity: str) -> tuple[int, int]:
    low, _, high = entity.partition("+")
    return int(low), int(high)


@dataclass(frozen=True)
class Addition(Task):
    """Two-digit addition; see the head of this file for its forms and variables.

    `form` None is "whole" until `for_tokenizer` chooses. `space_in_answer` says which side the space before the sum
    belongs to: True writes "... A:" -> " 72", False "... A: " -> "72"; `for_tokenizer` chooses this too. `prefix`
    stands before every prompt: worked examples for a model that needs them (their sums are then no longer unseen).

    Raises:
        UnknownName: there is no such form.
    """

    form: str | None = None
    space_in_answer: bool = True
    prefix: str = ""
    operands: Operands = field(default_factory=_operand_lists)
    causal_model: CausalModel = field(init=False, compare=False, repr=False)
    variables: tuple[str, ...] = field(init=False)

    name = "addition"
    kinds = _KINDS

    def __post_init__(self) -> None:
        """Build the causal model of this form."""
        if self.form is not None:
            require_known("addition form", self.form, _ANSWERS)
        space = " " if self.space_in_answer and self._form == "whole" else ""
        object.__setattr__(self, "causal_model", _causal_model(self._form, space))
        object.__setattr__(self, "variables", _VARIABLES[self._form])

    @property
    def _form(self) -> str:
        return self.form or "whole"

    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return the operands of `split`, "27+45" for 27 and 45 in either order."""
        return {"operands": frozenset(_entity(*pair) for pair in self.operands[split])}

    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return the operands of `example`."""
        return {"operands": frozenset({_entity(example.setting["op1"], example.setting["op2"])})}

    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the prompt with its spans: op1, op2, their digits op1_tens ... op2_ones, plus, last.

        `last` is the last character: the colon, the space after it, or a digit of the sum.

        Raises:
            BadModel: the form is "tens" and the tens digits add up to 9.
        """
        values = self.causal_model.run(setting)
        if self._form == "tens" and values["tens_sum"] == 9:
            raise BadModel(
                f"addition, form 'tens': the tens digits of {setting['op1']} and {setting['op2']} add up to 9, so a "
                "carry changes how many digits the sum has. Use other operands."
            )
        prompt, spans = fill(f"{{prefix}}{QUESTION}", {**setting, "prefix": self.prefix})
        del spans["prefix"]
        for operand in ("op1", "op2"):
            begin, end = spans[operand]
            spans |= {f"{operand}_tens": (begin, begin + 1), f"{operand}_ones": (begin + 1, end)}
        spans["plus"] = (spans["op1"][1] + 1, spans["op2"][0] - 1)
        prompt += self._given(setting["op1"] + setting["op2"])
        spans["last"] = (len(prompt) - 1, len(prompt))
        return Example(prompt, values["answer"], dict(setting), spans)

    def kind(self, pair: Pair) -> str:
        """Return "same" or "different": whether base and source have the same value of the pair's variable."""
        base, source = (self.causal_model.run(example.setting) for example in (pair.base, pair.source))
        return _KINDS[int(base[pair.variable] != source[pair.variable])]

    def trivial_answers(self, pair: Pair) -> dict[str, str]:
        """Return copy_base, copy_source and flip: what the base would answer with the other carry."""
        values = self.causal_model.run(pair.base.setting)
        flipped = self.causal_model.intervene(values, {"ones_carry": 1 - values["ones_carry"]})
        return {**super().trivial_answers(pair), "flip": flipped["answer"]}

    def for_tokenizer(self, tokenizer: Tokenizer) -> Addition:
        """Return this task in the first form whose answers `tokenizer` tells apart; a form that was given stays.

        A form fits if every prompt, with the rest of its sum written after it, is read as the prompt's own tokens and
        then the answer's, and if no two answers begin with the same token.

        Raises:
            BadData: no form fits, or not the one that was given; the message says how the sums are read.
        """
        for form in (self.form,) if self.form is not None else ("whole", "tens", "ones"):
            for space_in_answer in (True, False) if form == "whole" else (False,):
                task = replace(self, form=form, space_in_answer=space_in_answer)
                if task._fits(tokenizer):
                    return task
        asked = "it" if self.form is None else f"form {self.form!r}"
        read = ", ".join(f"{number} tokens in {text!r}" for text, number in _lengths(tokenizer).items())
        raise BadData(
            f"addition: {asked} needs answers whose first tokens differ and follow the prompt unmerged, and this "
            f"tokenizer reads {read}. Give another form (Addition(form='tens') for tokenizers that split digits), "
            "leave the form out, or use another model."
        )

    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return random operands of `split`, in random order.

        Raises:
            NotEnough: none of them suits the form.
        """
        return self._draw(rng, split, lambda values: True)

    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return base and source inputs whose values of `variable` are the same or not, by `kind`.

        In form "tens" both sums have equally many digits, as the prompt has given the hundreds away.

        Raises:
            NotEnough: the split's operands hold no such pair.
        """
        base = self._draw(rng, split, lambda values: True)
        at_base = self.causal_model.run(base)

        def fits(values: Mapping[str, Any]) -> bool:
            alike = values[variable] == at_base[variable]
            apart = variable != "ones_carry" or values["tens_sum"] % 10 != at_base["tens_sum"] % 10
            long = self._form != "tens" or values["hundreds_out"] == at_base["hundreds_out"]
            return bool(alike == (kind == "same") and apart and long)

        return base, self._draw(rng, split, fits)

    def _draw(self, rng: random.Random, split: str, fits: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        for _ in range(_PATIENCE):
            pair = rng.choice(self.operands[split])
            op1, op2 = pair if rng.random() < 0.5 else pair[::-1]
            values = self.causal_model.run({"op1": op1, "op2": op2})
            if (self._form != "tens" or values["tens_sum"] != 9) and fits(values):
                return {"op1": op1, "op2": op2}
        raise NotEnough(
            f"addition, {split}: none of its {len(self.operands[split])} pairs of operands suits form "
            f"{self._form!r} and this kind of pair. Give Addition(operands=...) with more of them."
        )

    def _given(self, total: int) -> str:
        """Return what the prompt carries of the answer's text: the space, and the digits before the answer's own."""
        if self._form == "whole":
            return "" if self.space_in_answer else " "
        return f" {str(total)[: -_GIVEN[self._form]]}"

    def _fits(self, tokenizer: Tokenizer) -> bool:
        owner: dict[int, str] = {}
        for total in range(20, 199):
            op1 = max(10, total - 99)
            setting = {"op1": op1, "op2": total - op1}
            if self._form == "tens" and self.causal_model.run(setting)["tens_sum"] == 9:
                continue  # not in this form
            example = self.render(setting)
            answer = token_ids(tokenizer, example.answer)[0]
            prompt = token_ids(tokenizer, example.prompt)
            written_out = f"{example.prompt.rpartition('A:')[0]}A: {total}"
            follows = token_ids(tokenizer, written_out)[: len(prompt) + 1] == (*prompt, answer)
            if not follows or owner.setdefault(answer, example.answer) != example.answer:
                return False
        return True


def _lengths(tokenizer: Tokenizer) -> dict[str, int]:
    return {text: len(token_ids(tokenizer, text)) for text in (" 72", "72", "7", " 172")}
