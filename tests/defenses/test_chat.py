from __future__ import annotations

import pytest

from defenses.chat import PLAIN_TEMPLATE, BadRow, chat_of, check_messages, system_in_user, with_system
from defenses.errors import DataError
from tests.defenses.chat_tokenizer import CHATML, GEMMA, LLAMA2, LLAMA3, MARKED, tokenizer_with

ENDS = {
    CHATML: "<|im_end|>",
    MARKED: "<|im_end|>",
    GEMMA: "<end_of_turn>",
    LLAMA3: "<|eot_id|>",
    LLAMA2: " </s>",
    PLAIN_TEMPLATE: "</s>",
}
NAMES = {
    CHATML: "chatml",
    MARKED: "marked",
    GEMMA: "gemma",
    LLAMA3: "llama3",
    LLAMA2: "llama2",
    PLAIN_TEMPLATE: "plain",
}


def turns(*texts: str):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def said(tokenizer, rendered):
    return [tokenizer.decode(rendered.input_ids[start:stop]) for start, stop in rendered.responses]


@pytest.mark.parametrize("template", ENDS, ids=NAMES.get)
@pytest.mark.parametrize("repeated", [False, True], ids=["other words", "same words in every turn"])
def test_answers_and_what_ends_them_are_found_in_every_turn(template, repeated):
    tokenizer = tokenizer_with(template)
    texts = (
        ("yes", "yes", "yes", "yes") if repeated else ("what is 2+2?", "it is four.", "é 😀?", "no, maybe\n\n- é 😀")
    )
    rendered = chat_of(tokenizer).render(turns(*texts))
    end = ENDS[template]
    answers = [one.strip() for one in said(tokenizer, rendered)]
    assert answers == [(texts[1] + end).strip(), (texts[3] + end).strip()]
    assert tokenizer.decode(rendered.input_ids) == rendered.text


@pytest.mark.parametrize("template", ENDS, ids=NAMES.get)
def test_rendering_is_the_tokenizers_own(template):
    tokenizer = tokenizer_with(template)
    messages = turns("what is it?", "the answer")
    rendered = chat_of(tokenizer).render(messages)
    assert list(rendered.input_ids) == list(tokenizer.apply_chat_template(messages)["input_ids"])


@pytest.mark.parametrize("template", [CHATML, GEMMA, LLAMA3], ids=NAMES.get)
def test_what_comes_before_an_answer_is_the_generation_prompt(template):
    tokenizer = tokenizer_with(template)
    messages = turns("what is it?", "the answer", "and?", "yes")
    rendered = chat_of(tokenizer).render(messages)
    for (start, _), upto in zip(rendered.responses, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=True)["input_ids"]
        assert list(rendered.input_ids[:start]) == list(prompt)


@pytest.mark.parametrize("template", ENDS, ids=NAMES.get)
def test_what_is_not_template_is_the_text_of_the_messages(template):
    tokenizer = tokenizer_with(template)
    rendered = chat_of(tokenizer).render(turns("what is two?", "it is four."))
    kept = [token for token, mark in zip(rendered.input_ids, rendered.template, strict=True) if not mark]
    assert tokenizer.decode(kept).replace(" ", "") == "whatistwo?itisfour."


def test_a_generation_block_without_the_end_of_turn_gets_it():
    short = MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    tokenizer = tokenizer_with(short)
    assert said(tokenizer, chat_of(tokenizer).render(turns("a", "yes"))) == ["yes<|im_end|>"]


def test_a_template_that_marks_something_else_is_refused():
    wrong = MARKED.replace("m['role'] == 'assistant' %}", "m['role'] == 'user' %}")
    with pytest.raises(BadRow, match=r"marks 1 generations that are not the 1 answers"):
        chat_of(tokenizer_with(wrong)).render(turns("a", "yes"))


def test_white_space_at_the_ends_of_an_answer_is_kept_where_the_template_keeps_it():
    tokenizer = tokenizer_with(CHATML)
    assert said(tokenizer, chat_of(tokenizer).render(turns("a", "  yes \n"))) == ["  yes \n<|im_end|>"]
    tokenizer = tokenizer_with(GEMMA)
    assert said(tokenizer, chat_of(tokenizer).render(turns(" a ", "  yes \n"))) == ["yes<end_of_turn>"]


def test_white_space_whose_offsets_are_empty_still_belongs_to_the_answer():
    from tokenizers import processors

    tokenizer = tokenizer_with(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert said(tokenizer, chat_of(tokenizer).render(turns("a", "yes \n")))[0] == "yes \n<|im_end|>"


def test_a_system_message_within_the_users_turn():
    tokenizer = tokenizer_with(LLAMA2)
    messages = [{"role": "system", "content": "be kind"}, *turns("what?", "yes")]
    assert said(tokenizer, chat_of(tokenizer).render(messages))[0].strip() == "yes </s>"


def test_a_template_that_ends_no_turn():
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = tokenizer_with(endless)
    chat = chat_of(tokenizer)
    assert chat.end_of_turn == ""
    assert said(tokenizer, chat.render(turns("a", "yes", "b", "no"))) == [" yes", " no"]  # " yes" is one token


def test_a_tokenizer_without_chat_template_says_what_to_do():
    with pytest.raises(DataError, match=r'has no chat template .*"plain"'):
        chat_of(tokenizer_with(None))
    assert chat_of(tokenizer_with(None), "plain").end_of_turn == "</s>"


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (GEMMA, [{"role": "system", "content": "x"}, *turns("a", "b")], r"refuses the turns system.*system_place"),
        (GEMMA, turns("a", "b")[::-1], r"refuses the turns assistant, user: must alternate"),
        (CHATML, turns("a<|im_end|>", "b"), r"message 0 \(user\) holds the control token '<\|im_end\|>'"),
        (CHATML.replace("m['content']", "m['content'] | upper"), turns("a", "b"), r"writes message 0 \(user\) 0 times"),
        (
            CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
            turns("a", "<think>so</think>b"),
            r"changes the text of message 1 \(assistant\)",
        ),
        ("{{ messages[1]['content'] }}", turns("a", "b"), r"writes message 0 \(user\) 0 times"),
    ],
)
def test_conversations_that_cannot_be_rendered_as_they_are(template, messages, text):
    chat = chat_of(tokenizer_with(template))
    with pytest.raises(BadRow, match=text):
        chat.render(messages)


def test_control_tokens_can_be_let_through():
    rendered = chat_of(tokenizer_with(CHATML)).render(turns("a<|im_end|>", "b"), controls=True)
    assert rendered.text.count("<|im_end|>") == 4


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "a list of at least"),
        ("hello", "a list of at least"),
        ([{"role": "user"}], "message 0 must be an object with 'role' and 'content'"),
        ([{"role": "usr", "content": "a"}], "the role 'usr'. Did you mean user"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([{"role": "user", "content": "a", "name": "x"}], "unknown key 'name'"),
        (turns("a"), "no assistant turn"),
        (turns("a", " "), "an empty response"),
        ([*turns("a", "b"), {"role": "system", "content": "x"}], "only the first may be one"),
    ],
)
def test_messages_that_no_template_could_render(messages, text):
    with pytest.raises(BadRow, match=text):
        check_messages(messages)


def test_a_system_prompt_in_front():
    plain, own = turns("a", "b"), [{"role": "system", "content": "own"}, *turns("a", "b")]
    assert with_system(plain, "new", existing="refuse") == [{"role": "system", "content": "new"}, *plain]
    assert with_system(own, "new", existing="replace") == [{"role": "system", "content": "new"}, *plain]
    assert with_system(own, "new", existing="merge") == [{"role": "system", "content": "new\n\nown"}, *plain]
    assert with_system(own, "new", existing="keep") == own
    with pytest.raises(BadRow, match=r'existing_system="replace" or "merge"'):
        with_system(own, "new", existing="refuse")
    assert system_in_user(own) == turns("own\n\na", "b")
    assert system_in_user(plain) == plain


@pytest.mark.slow
def test_the_template_of_smollm2(smollm):
    tokenizer = smollm[1]
    chat = chat_of(tokenizer)
    rendered = chat.render(turns("What is 2 + 2?", "It is four.", "Sure?", "Yes.\n\n  - é 😀"))
    assert said(tokenizer, rendered) == ["It is four.<|im_end|>", "Yes.\n\n  - é 😀<|im_end|>"]
    prompt = tokenizer.apply_chat_template(turns("What is 2 + 2?"), add_generation_prompt=True)["input_ids"]
    assert list(rendered.input_ids[: rendered.responses[0][0]]) == list(prompt)
