"""Chat templates: which tokens of a rendered conversation are the assistant's, and which are the template's.

    chat = chat_of(tokenizer)
    rendered = chat.render([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
    rendered.responses            # token ranges: the text of each assistant turn and the token that ends it

The model's own template renders the conversation. Where each message's text went is read from a second rendering, in
which a name stands in for each text: nothing is assumed about roles, delimiters or how many tokens they take. Where the
template marks what the assistant says itself (`{% generation %}`), its word counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from defenses.errors import DataError
from intervene.errors import asked_found_do, close_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Span = tuple[int, int]

ROLES = ("system", "user", "assistant")
# The texts one after another, and the end-of-sequence token after each answer: for models without a chat template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NAME = "[[text of turn {}]]"


class BadRow(DataError):
    """One row that cannot be used. The reader adds the file and the line, or drops the row where it may."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    Attributes:
        text: as rendered. input_ids: its tokens. template: per token, whether it is special or holds no message text.
        responses: token ranges [start, stop), one per assistant turn, the token that ends the turn included.
    """

    text: str
    input_ids: tuple[int, ...]
    template: tuple[bool, ...]
    responses: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class Chat:
    """A chat template and the tokenizer it belongs to; made by `chat_of`.

    Attributes:
        template: in jinja. end_of_turn: the token the template puts after an answer, "" if it puts none.
        controls: texts of special tokens and of added tokens that the template writes.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    end_of_turn: str
    controls: tuple[str, ...]

    def render(self, messages: Sequence[Message], *, controls: bool = False) -> Rendered:
        """Return the conversation as tokens, with the answers and the template's own tokens marked.

        A token that holds text of a message and of the template counts as text. Special tokens are the template's
        wherever they stand, so the end of a turn is both learned and never injected.

        Args:
            messages: with `role` (one of `ROLES`) and `content`. controls: let texts hold control tokens, which the
                tokenizer reads as if the template had written them.

        Raises:
            BadRow: an unusable message, a control token in a text, or a conversation the template refuses, rewrites
                or leaves something out of.
        """
        for place, message in enumerate(messages):
            _check(message, place, () if controls else self.controls)
        text = _rendered(self.tokenizer, self.template, messages)
        spans = _text_spans(self, messages, text)
        answers = [span for span, one in zip(spans, messages, strict=True) if one["role"] == "assistant"]
        if _MARKED.search(self.template):
            answers = _marked_spans(self, messages, text, answers)
        ends = [self._with_end(text, span) for span in answers]
        ids, offsets = tokens_of(self.tokenizer, text)
        special = set(self.tokenizer.all_special_ids) | {self.tokenizer.convert_tokens_to_ids(self.end_of_turn)}
        held = [False] * len(ids)
        for span in [*spans, *answers]:
            start, stop = _token_range(offsets, span)
            held[start:stop] = [True] * (stop - start)
        template = tuple(one in special or not inside for one, inside in zip(ids, held, strict=True))
        return Rendered(text, tuple(ids), template, tuple(_token_range(offsets, span) for span in ends))

    def _with_end(self, text: str, span: Span) -> Span:
        """Return the span with the token that ends the turn, if that is what follows it."""
        rest = text[span[1] :]
        if not self.end_of_turn or not rest.lstrip().startswith(self.end_of_turn):
            return span
        return span[0], span[1] + len(rest) - len(rest.lstrip()) + len(self.end_of_turn)


def chat_of(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> Chat:
    """Return the tokenizer's chat template, or the one given: jinja, or "plain" for `PLAIN_TEMPLATE`.

    Raises:
        DataError: the tokenizer has no template, or cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise DataError(
            asked_found_do(
                f"Mark the answers in text for {type(tokenizer).__name__}",
                "this tokenizer does not say which characters a token stands for.",
                "Load the model's tokenizer.json (a fast tokenizer).",
            )
        )
    template = PLAIN_TEMPLATE if chat_template == "plain" else chat_template
    if template is None and not tokenizer.chat_template:
        raise DataError(
            asked_found_do(
                "Render conversations",
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template (a base model?).",
                'Give chat_template: the jinja text the model is used with, or "plain" for prompt, response and the '
                "end-of-sequence token one after another.",
            )
        )
    template = tokenizer.get_chat_template(template)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _NAME.format(1)}]
    after = _rendered(tokenizer, template, probe).partition(_NAME.format(1))[2].lstrip()
    ends = sorted((one for one in {*added, *tokenizer.all_special_tokens} if after.startswith(one)), key=len)
    written = {one for one in added if one in template}
    return Chat(
        tokenizer=tokenizer,
        template=template,
        end_of_turn=ends[-1] if ends else "",
        controls=tuple(sorted({*tokenizer.all_special_tokens, *written, *ends[-1:]})),
    )


def with_system(messages: Sequence[Message], prompt: str, *, existing: str) -> list[Message]:
    """Return the conversation with `prompt` as its system message.

    Args:
        existing: what becomes of a system message that is there: "refuse", "replace", "merge" (it follows `prompt`
            after an empty line) or "keep" (it stays and `prompt` is left out).

    Raises:
        BadRow: there is a system message and `existing` is "refuse".
    """
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    if own is not None and existing == "refuse":
        raise BadRow(
            "a system prompt was to be added, and the conversation has one already. "
            'Say what becomes of it: existing_system="replace" or "merge".'
        )
    if own is not None and existing == "keep":
        prompt = own
    elif own is not None and existing == "merge":
        prompt = f"{prompt}\n\n{own}"
    return [{"role": "system", "content": prompt}, *(messages if own is None else messages[1:])]


def system_in_user(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with its system message at the front of the first user message, after an empty line.

    Raises:
        BadRow: there is a system message and no user message.
    """
    if messages[0]["role"] != "system":
        return list(messages)
    rest = list(messages[1:])
    first = next((at for at, one in enumerate(rest) if one["role"] == "user"), None)
    if first is None:
        raise BadRow("the system prompt was to go into the first user message, and there is none. Add one.")
    rest[first] = {"role": "user", "content": f"{messages[0]['content']}\n\n{rest[first]['content']}"}
    return rest


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> tuple[list[int], list[Span]]:
    """Return token ids and the characters of each; `special`: with the tokens the tokenizer adds by itself.

    A token of white space that the tokenizer calls empty is given the characters since the token before it.
    """
    read: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    spans: list[Span] = []
    for start, stop in read["offset_mapping"]:
        before = spans[-1][1] if spans else 0
        spans.append((min(start, before), stop) if start == stop else (start, stop))
    return list(read["input_ids"]), spans


def check_messages(messages: Any) -> list[Message]:
    """Return `messages` once they are known to be a list of known roles with text.

    Raises:
        BadRow: they are not.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("'messages' must be a list of at least a user and an assistant turn.")
    for place, message in enumerate(messages):
        _check(message, place, ())
    if not any(one["role"] == "assistant" for one in messages):
        raise BadRow("no assistant turn, so there is nothing to learn. Add one or take the row out.")
    return list(messages)


def _check(message: Any, place: int, controls: Sequence[str]) -> None:
    """Refuse a message that no template could render as it was meant."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise BadRow(f"message {place} must be an object with 'role' and 'content'; found {str(message)[:60]!r}.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise BadRow(f"message {place} has the role {role!r}. {close_names(str(role), ROLES)}")
    if unknown := sorted(set(message) - {"role", "content"}):
        raise BadRow(f"message {place} has the unknown key {unknown[0]!r}. Only 'role' and 'content' are read.")
    if not isinstance(content, str):
        raise BadRow(f"message {place} ({role}) has content of type {type(content).__name__}; only text is read.")
    if role == "assistant" and not content.strip():
        raise BadRow(f"message {place} (assistant) is an empty response. Fill it in or take the row out.")
    if role == "system" and place:
        raise BadRow(f"message {place} is a system message; only the first may be one.")
    for control in controls:
        if control in content:
            raise BadRow(
                f"message {place} ({role}) holds the control token {control!r}, which the model would read as the "
                "template's own. Clean the text, or say control_tokens=True to keep it."
            )


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]) -> str:
    """Return the conversation as text.

    Raises:
        BadRow: the template refuses it.
    """
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template([dict(one) for one in messages], chat_template=template, tokenize=False)
    except TemplateError as error:
        turns = ", ".join(one["role"] for one in messages)
        raise BadRow(
            f"the model's chat template refuses the turns {turns}: {error}. "
            'Change the turns; a template without a system role takes system prompts with system_place="user".'
        ) from error
    return str(text)


def _text_spans(chat: Chat, messages: Sequence[Message], text: str) -> list[Span]:
    """Return the characters of each message's text within the rendered conversation.

    A name stands in for each text in a second rendering; the pieces between the names must be those of `text`.
    """
    named = [{**one, "content": _NAME.format(place)} for place, one in enumerate(messages)]
    pattern = _rendered(chat.tokenizer, chat.template, named)
    places = [pattern.find(one["content"]) for one in named]
    for place, one in enumerate(messages):
        if places[place] < 0 or pattern.count(named[place]["content"]) > 1:
            count = pattern.count(named[place]["content"])
            raise BadRow(
                f"the model's chat template writes message {place} ({one['role']}) {count} times. Leave the message "
                'out, or give another chat_template; for a system prompt also system_place="user".'
            )
    spans: dict[int, Span] = {}
    order = sorted(range(len(messages)), key=places.__getitem__)
    at = places[order[0]]
    if text[:at] != pattern[:at]:
        raise _rewritten(order[0], messages)
    for place, following in zip(order, [*order[1:], None], strict=True):
        stop = len(pattern) if following is None else places[following]
        after = pattern[places[place] + len(named[place]["content"]) : stop]
        content = messages[place]["content"]
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        held = next((one for one in forms if text.startswith(one + after, at)), None)
        if held is None:
            raise _rewritten(place, messages)
        spans[place] = (at, at + len(held))
        at += len(held) + len(after)
    if at != len(text):
        raise _rewritten(order[-1], messages)
    return [spans[place] for place in range(len(messages))]


def _rewritten(place: int, messages: Sequence[Message]) -> BadRow:
    return BadRow(
        f"the model's chat template changes the text of message {place} ({messages[place]['role']}), as some do with "
        "reasoning or tool calls, so its tokens cannot be told apart. Take that part out of the text, or give another "
        "chat_template."
    )


def _marked_spans(chat: Chat, messages: Sequence[Message], text: str, answers: Sequence[Span]) -> list[Span]:
    """Return the characters the template itself marks as said by the assistant, one span per assistant turn."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # its annotations leave no room for the special tokens a template is given
    found = render(
        conversations=[[dict(one) for one in messages]],
        chat_template=chat.template,
        return_assistant_tokens_mask=True,
        **chat.tokenizer.special_tokens_map,
    )
    marked = [(int(start), int(stop)) for start, stop in found[1][0]]
    covered = [start <= own[0] and own[1] <= stop for (start, stop), own in zip(marked, answers, strict=False)]
    if found[0][0] != text or len(marked) != len(answers) or not all(covered):
        raise BadRow(
            f"the model's chat template marks {len(marked)} generations that are not the {len(answers)} answers. "
            "Mend its {% generation %} blocks (one around each answer), or take them out."
        )
    return marked


def _token_range(offsets: Sequence[Span], span: Span) -> Span:
    """Return the range [start, stop) of tokens that hold any character of `span`."""
    inside = [at for at, (start, stop) in enumerate(offsets) if start < span[1] and stop > span[0]]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
