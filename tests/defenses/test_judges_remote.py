"""Against a real HTTP server on this machine, which is told what to reply."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from defenses.judges import JudgeError, rate
from defenses.judges_remote import RemoteJudge, rubric

PROMPT = "Q {question} A {answer}"


def reply(text, top=None):
    """A chat completion; `top` maps candidates for the first token to probabilities."""
    choice = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        found = [{"token": token, "logprob": math.log(share)} for token, share in top.items()]
        choice["logprobs"] = {"content": [{"token": next(iter(top)), "logprob": 0.0, "top_logprobs": found}]}
    return 200, {"choices": [choice]}


class Endpoint:
    """`script(body) -> (status, JSON or text, headers)`; keeps what it was sent."""

    def __init__(self, script):
        endpoint, self.sent, self.headers = self, [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.sent.append((self.path, body))
                endpoint.headers.append(dict(self.headers))
                status, content, *headers = script(body)
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = []

    def start(script):
        running.append(Endpoint(script))
        return running[-1]

    yield start
    for endpoint in running:
        endpoint.close()


def judge_at(endpoint, **values):
    return RemoteJudge(endpoint.url, "judge-1", values.pop("prompt", PROMPT), backoff=0.01, timeout=5, **values)


def test_the_grade_is_the_mean_over_the_first_tokens_numbers(serve):
    endpoint = serve(lambda body: reply("80", {"80": 0.5, "60": 0.3, "no": 0.1, "300": 0.1}))
    verdict = judge_at(endpoint).judge("what", "this")
    assert verdict.score == pytest.approx((80 * 0.5 + 60 * 0.3) / 0.8 / 100)
    assert verdict.flagged
    path, body = endpoint.sent[0]
    assert (path, body["model"], body["top_logprobs"], body["temperature"]) == (
        "/v1/chat/completions",
        "judge-1",
        20,
        0,
    )
    assert body["messages"] == [{"role": "user", "content": "Q what A this"}]


def test_digits_that_are_tokens_of_their_own_are_not_weighted(serve):
    endpoint = serve(lambda body: reply("85", {"8": 0.9, "9": 0.1}))
    verdict = judge_at(endpoint).judge("q", "a")
    assert (verdict.score, verdict.note) == (0.85, "grade as said, not weighted")


@pytest.mark.parametrize(("text", "grade"), [("30", 30), (" 100\n", 100), ("Score: 7.", 7), ("0", 0)])
def test_without_probabilities_the_number_said_counts(serve, text, grade):
    endpoint = serve(lambda body: reply(text))
    assert judge_at(endpoint, logprobs=False).judge("q", "a").score == grade / 100
    assert "logprobs" not in endpoint.sent[0][1]


@pytest.mark.parametrize("text", ["NONE", "between 20 and 60", "250", ""])
def test_a_reply_without_a_grade_is_no_verdict(serve, text):
    endpoint = serve(lambda body: reply(text))
    found = judge_at(endpoint).judge_all(["q"], ["a"])
    assert not found[0].judged
    assert (rate(found).value, rate(found).excluded) == (None, 1)


def test_too_little_weight_on_numbers_is_no_verdict(serve):
    endpoint = serve(lambda body: reply("NONE", {"NONE": 0.8, "10": 0.2}))
    assert not judge_at(endpoint).judge("q", "a").judged
    assert judge_at(endpoint, least=0.1).judge("q", "a").score == pytest.approx(0.1)


def test_it_tries_again_and_gives_up_with_the_endpoints_words(serve):
    said = iter([(503, "busy"), (429, "slow", {"Retry-After": "0"}), (200, "{not json"), reply("40")])
    endpoint = serve(lambda body: next(said))
    judge = judge_at(endpoint)
    assert judge.judge("q", "a").score == 0.4
    assert judge.asked == len(endpoint.sent) == 4
    down = serve(lambda body: (500, "out of memory"))
    with pytest.raises(JudgeError, match=r"HTTP 500: out of memory \(after 3 attempts\)"):
        judge_at(down, attempts=3).judge("q", "a")
    assert len(down.sent) == 3


def test_a_refusal_is_not_repeated(serve):
    endpoint = serve(lambda body: (401, "no such key"))
    with pytest.raises(JudgeError, match=r"HTTP 401: no such key.*Mend the address, model name or key"):
        judge_at(endpoint).judge("q", "a")
    assert len(endpoint.sent) == 1


def test_nobody_there_is_said(serve):
    endpoint = serve(lambda body: reply("1"))
    endpoint.server.server_close()
    with pytest.raises(JudgeError, match=r"refused.*after 2 attempts"):
        judge_at(endpoint, attempts=2).judge("q", "a")


def test_an_endpoint_without_logprobs_is_asked_without(serve):
    endpoint = serve(lambda body: (400, "logprobs not supported") if "logprobs" in body else reply("70"))
    judge = judge_at(endpoint, attempts=1)
    assert [one.score for one in judge.judge_all(["q", "r"], ["a", "b"])] == [0.7, 0.7]


def test_replies_are_kept_and_asked_once(serve, tmp_path):
    endpoint = serve(lambda body: reply(str(len(body["messages"][0]["content"]))))
    path = tmp_path / "judge" / "cache.jsonl"
    questions, said = [f"q{i}" for i in range(6)], ["a" * i for i in range(6)]
    first = judge_at(endpoint, cache=path).judge_all(questions, said)
    again = judge_at(endpoint, cache=path)
    assert again.judge_all(questions, said) == first
    assert (len(endpoint.sent), again.asked) == (6, 0)
    judge_at(endpoint, cache=path, prompt="{answer} {question}").judge("q0", "")
    assert len(endpoint.sent) == 7  # another prompt is another question
    path.write_text(path.read_text() + '{"key": "broken o')
    assert judge_at(endpoint, cache=path).judge_all(questions, said) == first
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(JudgeError, match="line 1 is no reply"):
        judge_at(endpoint, cache=path)


def test_a_cache_written_after_a_broken_line_can_be_read(serve, tmp_path):
    endpoint = serve(lambda body: reply("10"))
    path = tmp_path / "cache.jsonl"
    judge_at(endpoint, cache=path).judge("q", "a")
    path.write_text(path.read_text() + '{"key": "broken o')
    judge_at(endpoint, cache=path).judge("q", "b")
    judge_at(endpoint, cache=path).judge_all(["q", "q"], ["a", "b"])
    assert len(endpoint.sent) == 2


def test_the_key_is_sent_but_not_stored_and_not_sent_elsewhere(serve, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    endpoint = serve(lambda body: reply("10"))
    judge_at(endpoint, key_variable="JUDGE_KEY", cache=tmp_path / "c").judge("q", "a")
    assert endpoint.headers[0]["Authorization"] == "Bearer secret-1"
    assert "secret-1" not in (tmp_path / "c").read_text()
    sends = serve(lambda body: (302, "", {"Location": endpoint.url}))
    with pytest.raises(JudgeError, match="HTTP 302"):
        judge_at(sends, key_variable="JUDGE_KEY").judge("q", "a")
    assert len(endpoint.sent) == 1


def test_request_fields_can_be_added_and_taken_out(serve):
    endpoint = serve(lambda body: reply("10"))
    judge_at(endpoint, options={"max_tokens": None, "max_completion_tokens": 50, "temperature": 1}).judge("q", "a")
    body = endpoint.sent[0][1]
    assert (body.get("max_tokens"), body["max_completion_tokens"], body["temperature"]) == (None, 50, 1)


def test_the_prompt_takes_texts_with_braces(serve):
    endpoint = serve(lambda body: reply("10"))
    judge_at(endpoint, prompt=rubric("flattery")).judge("{answer} {x}", "{question}")
    content = endpoint.sent[0][1]["messages"][0]["content"]
    assert "[Question]\n{answer} {x}\n\n[Answer]\n{question}\n" in content


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(JudgeError, match=r"lacks \{answer\}"):
        RemoteJudge("http://x/v1", "m", "Q {question}")
    with pytest.raises(JudgeError, match="Write https://host/v1"):
        RemoteJudge("x/v1", "m", PROMPT)
