"""The planner, against a server that speaks /v1/chat/completions: what it sends, takes, asks again and gives up on."""

import contextlib
import gzip
import html
import json
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from urllib.parse import quote

import pytest

from errors import InputError
from regional.reader import read_layout
from tools.plan import plan, write_plan

KEY = "sk-very-secret-0123"
REQUEST = "a cat on the left and a dog on the right, at the sea"


def region(x0, y0, x1, y1, prompt="a grey cat at the sea"):
    return {"prompt": prompt, "box": {"x0": x0, "y0": y0, "x1": x1, "y1": y1}}


PROMPTS = {"prompt": "a cat and a dog at the sea", "background_prompt": "the sea"}
LEFT = region(0, 10, 50, 100)
RIGHT = region(50, 20, 100, 100, "a brown dog at the sea")


def answer_with(*regions, **keys) -> str:
    return json.dumps({**PROMPTS, "regions": regions} | keys)


GOOD = answer_with(LEFT, RIGHT)


def completion(content, **message) -> tuple[int, str]:
    message = {"role": "assistant", "content": content, **message}
    return 200, json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})


def failure(status: int, message: str) -> tuple[int, str]:
    return status, json.dumps({"error": {"message": message, "type": "x"}})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        """Gives the server's answers in order, the last one for ever, and notes what is asked."""
        asked = self.server.asked
        answers = self.server.answers
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked.append((self.path, self.headers, body))
        status, text = answers[min(len(asked), len(answers)) - 1]
        if status is None:  # stays silent until the test is over
            self.server.wait.wait(10)
            return
        self.send_response(status, self.server.reason)
        if isinstance(text, bytes):
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with contextlib.suppress(OSError):  # The program hangs up.
            for part in [text] if isinstance(text, str | bytes) else text:
                self.wfile.write(part if isinstance(part, bytes) else part.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """asked: (path, headers, body) of each request."""
    for name in ("OPENAI_BASE_URL", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.wait = threading.Event()
    server.reason = None
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.wait.set()
    server.shutdown()
    server.server_close()


def contents(server, request: int) -> list[tuple[str, str]]:
    return [(part["role"], part["content"]) for part in server.asked[request][2]["messages"]]


@pytest.fixture
def ask(server, capfd, caplog):
    """Plans with these answers. What was printed meanwhile is in `messages`; the key is neither there nor logged."""
    caplog.set_level("DEBUG")

    def with_answers(*answers, **keys):
        server.asked.clear()
        server.answers = [completion(a) if isinstance(a, str) else a for a in answers]
        try:
            return plan(REQUEST, 512, 256, **{"url": server.url, "model": "some-model"} | keys)
        finally:
            printed = capfd.readouterr()
            with_answers.messages = printed.err.splitlines()
            assert printed.out == ""
            assert KEY not in printed.err and KEY not in caplog.text

    return with_answers


def fails(ask, *answers, **keys) -> str:
    """The message of the InputError that these answers lead to: one line; no secret is in it or in its causes."""
    with pytest.raises(InputError) as caught:
        ask(*answers, **keys)
    message = str(caught.value)
    trace = "".join(traceback.format_exception(caught.value))
    assert KEY not in trace and "pass-word" not in trace
    assert "\n" not in message and message.endswith(".")
    return message


def test_an_answer_becomes_a_layout_in_percent(server, ask):
    cat = {"prompt": "a grey cat at the sea", "box": ["0%", "10%", "50%", "100%"]}
    dog = {"prompt": "a brown dog at the sea", "box": ["50%", "20%", "100%", "100%"]}
    assert ask(GOOD) == {"width": 512, "height": 256, **PROMPTS, "regions": [cat, dog]}
    assert len(server.asked) == 1 and ask.messages == []
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "some-model"
    assert headers["Authorization"] == f"Bearer {KEY}" and KEY not in json.dumps(body)
    (role, instructions), user = contents(server, 0)
    assert role == "system" and "512 x 256" in instructions and user == ("user", REQUEST)


def test_the_schema_is_sent_in_the_form_of_strict_modes(server, ask):
    ask(GOOD)
    form = server.asked[0][2]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    objects = {**schema["$defs"], "Plan": schema}
    names = {name: " ".join(part["properties"]) for name, part in objects.items()}
    plan_keys = "prompt background_prompt regions"
    assert names == {"Box": "x0 y0 x1 y1", "Part": "prompt box", "Plan": plan_keys}
    known = {"type", "title", "description", "properties", "required", "additionalProperties", "$defs"}
    for part in objects.values():
        assert part["type"] == "object" and part["additionalProperties"] is False
        assert part["required"] == list(part["properties"]) and part.keys() <= known
    assert json.dumps(schema) in contents(server, 0)[0][1]  # for servers without response_format


def test_without_a_model_or_a_key_neither_is_sent(server, ask, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_hub")
    ask(GOOD, model=None)
    _, headers, body = server.asked[0]
    assert "model" not in body
    assert "Authorization" not in headers and "hf_of_the_hub" not in str(headers)
    assert "a banana" in fails(ask, failure(500, "a banana"))


def test_the_url_may_be_given_in_several_ways(server, ask, monkeypatch):
    host = server.url.removesuffix("/v1")
    for end in ("", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1beta/openai/"):
        monkeypatch.setenv("OPENAI_BASE_URL", host + end)
        for url in (host + end, None):
            ask(GOOD, url=url)
            base = "/v1beta/openai" if "openai" in end else "/v1"
            assert [request[0] for request in server.asked] == [f"{base}/chat/completions"]


def test_an_address_that_is_none_and_a_size_that_is_none_are_not_asked_about(server, ask):
    for url in (None, "", "localhost:8000", "ftp://x/v1", "http:///v1", "http://x/v1?key=pass-word"):
        message = fails(ask, GOOD, url=url)
        assert "--llm-url" in message and "OPENAI_BASE_URL" in message
    with pytest.raises(InputError, match="500"):
        plan(REQUEST, 500, 256, server.url)
    assert server.asked == []


def test_what_stands_around_the_json_does_not_matter(server, ask):
    for text in (
        f"Here you are:\n```json\n{GOOD}\n```\nHave fun!",
        f"<think>A first idea: {{'regions': []}}, no.</think>\n{GOOD}",
        f"its opening tag was in the template {{}} </think>```json\n{GOOD}```",
        GOOD.replace('"y0": 10', '"y0": "10"').replace('"y0": 20', '"y0": 20.0'),
    ):
        assert [r["box"][1] for r in ask(text)["regions"]] == ["10%", "20%"]
        assert len(server.asked) == 1


def test_after_bad_json_it_is_asked_again_with_the_reason_three_times_at_most(server, ask):
    bad = GOOD[:-3]
    assert len(ask(f"<think>hm</think>{bad}", GOOD)["regions"]) == 2
    assert len(server.asked) == 2 and len(ask.messages) == 1 and "truncated" in ask.messages[0]
    *before, (role, correction) = contents(server, 1)
    assert before == [*contents(server, 0), ("assistant", bad)]
    assert role == "user" and "truncated" in correction and "response_format" in server.asked[1][2]
    message = fails(ask, "{}", "{", "no layout at all", GOOD)
    assert len(server.asked) == 3 == len(ask.messages)
    assert [role for role, _ in contents(server, 2)] == ["system", "user"] + ["assistant", "user"] * 2
    assert "missing required field `prompt`" in contents(server, 2)[3][1]
    assert message.startswith(
        f"{server.url}/chat/completions: no layout in three answers; the last: the answer: damaged JSON"
    )


COVERED = "other regions cover all of it"
NONSENSE = [
    (answer_with(LEFT, prompt=" "), "must not be empty"),
    (answer_with(LEFT, LEFT), f"regions[0].box = [0, 10, 50, 100]: {COVERED}"),
    (answer_with(LEFT, RIGHT, region(40, 20, 60, 90)), f"s[2].box = [40, 20, 60, 90]: {COVERED}"),
    (answer_with(LEFT, region(60, 20, 60, 90)), "regions[1].box = [60, 20, 60, 90]: expected 0 <= x0 < x1"),
    (answer_with(region(50, 90, 90, 10)), "regions[0].box = [50, 90, 90, 10]: expected"),
    (answer_with(region(0, 0, 100, 101)), "regions[0].box = [0, 0, 100, 101]: expected"),
    (answer_with(region(-1, 0, 10, 10)), "regions[0].box = [-1, 0, 10, 10]: expected"),
    (answer_with(region(0, 0, 10**30, 10)), "regions[0].box = [0, 0, 1000"),
    (answer_with(*[region(i, 0, i + 1, 9) for i in range(62)]), "at most 61"),
    (answer_with(), "must not be empty"),
    (answer_with(region(0, 0, 9, 9, " ")), "regions[0].prompt = ' ': expected"),
    (answer_with({**LEFT, "mask": "/etc/passwd"}), "unknown field `mask`"),
]


@pytest.mark.parametrize("answer, reason", NONSENSE)
def test_nonsense_is_sent_back_with_the_reason(server, ask, answer, reason):
    assert ask(answer, GOOD)["regions"][1]["prompt"] == "a brown dog at the sea"
    correction = contents(server, 1)[3][1]
    assert reason in correction and "command line" not in correction


def test_many_regions_may_overlap_in_part(server, ask):
    for regions in (
        [region(0, 0, 60, 100), region(40, 0, 100, 99), region(30, 30, 61, 100)],
        [region(0, 0, 100, 60), region(0, 1, 100, 61)],
        [region(i, 0, i + 1, 9) for i in range(61)],
    ):
        assert len(ask(answer_with(*regions))["regions"]) == len(regions)
        assert len(server.asked) == 1


NO_CHAT = "not a chat completion"
GIVEN_UP = [  # the server's answer, and words of the message
    (completion(GOOD, refusal="I won't."), "the model refuses", "I won't."),
    (completion("", refusal=None), "the model refuses", "an empty answer"),
    (completion(None), "an empty answer"),
    (completion(f"<think>perhaps {GOOD}"), "an empty answer"),
    (failure(401, f"the key {KEY}\nis no good"), "401 Unauthorized", "check OPENAI_API_KEY", "the key [key]"),
    (failure(403, "x"), "403 Forbidden", "check OPENAI_API_KEY"),
    (failure(404, "x"), "404 Not Found", "check --llm-url and --llm-model"),
    (failure(400, "the prompt is too long"), "400 Bad Request", "too long"),
    ((500, ""), "500 Internal Server Error"),
    ((200, "<html>"), NO_CHAT, "<html>"),
    ((200, "[]"), NO_CHAT),
    ((200, '{"choices": []}'), NO_CHAT),
    ((200, '{"choices": [{"message": {"content": 1}}]}'), NO_CHAT),
]


@pytest.mark.parametrize("answer, words", [(answer, words) for answer, *words in GIVEN_UP])
def test_what_cannot_get_better_is_one_sentence_and_not_asked_again(server, ask, answer, words):
    message = fails(ask, answer, GOOD)
    assert message.startswith(f"{server.url}/chat/completions: ")
    assert all(word in message for word in words), message
    assert len(server.asked) == 1


def test_no_answer_is_one_sentence(server, ask):
    message = fails(ask, (None, ""), timeout=0.2)
    assert "timed out" in message and "0.2 s" in message and server.url in message
    assert len(server.asked) == 1
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        assert f"{url}/chat/completions: no answer (" in fails(ask, GOOD, url=url)


def dripping():
    for _ in range(1200):
        time.sleep(0.05)
        yield " "


def test_an_answer_has_1_mb_at_most_and_comes_within_the_time(server, ask):
    for answer, words in (
        ((200, repeat("[" * 100_000)), "more than 1,000,000 bytes"),
        ((500, repeat('"message":"xxx' * 10_000)), "more than 100,000 bytes"),
        ((200, gzip.compress(b" " * 50_000_000)), "more than 1,000,000 bytes"),
        ((200, "[" * 900_000), NO_CHAT),
        ((500, "\x1b[2J\u202e" * 9_000), '500 Internal Server Error, "\\x1b[2J'),
    ):
        message = fails(ask, answer, timeout=60)
        assert words in message and len(message) < 400
    assert "timed out) in 0.3 s" in fails(ask, (200, dripping()), timeout=0.3)
    ask((200, gzip.compress(completion(GOOD)[1].encode())))


def test_a_layout_that_could_not_be_read_is_no_layout(server, ask):
    long = "x" * 15_000
    for answer, words in (
        (answer_with(LEFT, prompt="x" * 20_001), "prompt: at most 20,000 characters"),
        (answer_with(*[region(i, 0, i + 1, 9, long) for i in range(20)]), "more than 200,000 bytes"),
        (answer_with(*[LEFT] * 5000), "at most 61"),
    ):
        ask(answer, GOOD)
        assert words in ask.messages[0]


def test_a_plan_for_a_small_model_has_its_size_and_its_words(server, run):
    server.answers = [completion(GOOD)]
    flags = ("--plan", REQUEST, "--llm-url", server.url, "--output")
    for model, size, is_small in ((None, 256, True), ("org/name", 1024, False)):
        file = f"{size}.yml"
        assert run(*flags, file, model=model).made == [file]
        (_, system), _ = contents(server, -1)
        assert f"{size} x {size} pixels" in system
        assert is_small == ("zigzag" in system and "a dotted blue star on a white" in system)
        assert read_layout(Path(file), {}).width == size
    asked = len(server.asked)
    ran = run(*flags, "plan.png", model=None)
    assert ran.code == 2 and "--output plan.png: the suffix must be .yaml or .yml" in ran.errors[-1]
    assert len(server.asked) == asked and not Path("plan.png").exists()


FORMS = [
    str,
    repr,
    quote,
    html.escape,
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(json.dumps(text)),
    lambda text: "".join(f"\\u{ord(c):04X}" for c in text),
    lambda text: "".join(f"%{ord(c):02x}" for c in text),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_that_is_echoed_in_some_form_is_not_shown_nor_written(server, ask, monkeypatch, form):
    key = 'sk-"very\\secret/01+<&'
    monkeypatch.setenv("OPENAI_API_KEY", key)
    url = server.url.replace("//", "//user:p%C3%A9ss%22word@")
    echoed = form(key) + " and " + form('péss"word') if form is not FORMS[-1] else form(key)
    server.reason = "\x1b[2J" + key
    message = fails(ask, (500, echoed), url=url)
    assert "HTTP 500 \\x1b[2J[key], " in message and message.count("[key]") >= 2
    server.reason = None
    layout = ask(answer_with(LEFT, prompt=f"a cat, {echoed}, a dog"), url=url)
    for text in (message, json.dumps(layout)):
        assert "secret" not in text and "word" not in text and "73%65" not in text


def test_a_key_that_is_a_word_stays_in_the_plan(server, ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert ask(answer_with(LEFT, prompt="an EMPTY street"))["prompt"] == "an EMPTY street"


def test_a_password_in_the_address_is_used_but_never_shown(server, ask, monkeypatch):
    url = server.url.replace("//", "//user:pass-word@")
    ask("{", GOOD, url=url)
    assert server.asked[0][1]["Authorization"].startswith("Basic ")
    refused, unanswered = (500, f"at {url}"), (None, "")
    messages = [*ask.messages, fails(ask, refused, url=url), fails(ask, unanswered, url=url, timeout=0.2)]
    for message in messages:
        assert server.url in message and "pass-word" not in message and "user" not in message
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in fails(ask, GOOD, url=url) and server.asked == []


def test_a_key_that_no_header_can_hold_or_that_the_model_repeats_is_not_shown(server, ask, monkeypatch):
    assert "unknown field `[key]" in fails(ask, json.dumps({f"{KEY}\nx": 1}))
    for key in ("half\nother", "half\x1bother", "half…other"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        server.asked.clear()
        message = fails(ask, GOOD)
        assert "OPENAI_API_KEY" in message and "half" not in message and "other" not in message
        assert server.asked == []


NO_SCHEMA = [
    failure(400, "This response_format type is unavailable now"),
    failure(400, "'json_schema' is not supported by this model"),
    (422, '{"detail": [{"loc": ["body", "response_format", "type"], "msg": "Input should be text"}]}'),
]


def test_a_refused_schema_is_left_out_once_with_a_message(server, ask):
    for refusal in NO_SCHEMA:
        assert len(ask(refusal, "{", GOOD)["regions"]) == 2
        assert ["response_format" in body for _, _, body in server.asked] == [True, False, False]
        assert "Asking without a JSON Schema" in ask.messages[0] and f"HTTP {refusal[0]}" in ask.messages[0]
    assert "HTTP 400" in fails(ask, NO_SCHEMA[0]) and len(server.asked) == 2
    assert "without a JSON Schema, which it does not take" in fails(ask, NO_SCHEMA[1], "no")


def test_the_file_reads_as_the_layout_and_is_written_whole_or_left_as_it_was(ask, tmp_path):
    prompt = "no: a cat, 50% “grey”\n# and 猫 🐈"
    layout = ask(answer_with(region(0, 10, 50, 100, prompt), RIGHT, prompt="yes"))
    file = tmp_path / "plan.yaml"
    file.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write_plan(layout, file)
    with pytest.raises(InputError, match="no folder to write it to"):
        write_plan(layout, file / "plan.yaml", overwrite=True)
    assert file.read_text() == "mine"
    write_plan(layout, file, overwrite=True)
    read = read_layout(file, {})
    assert (read.prompt, read.regions[0].prompt, read.regions[0].box) == ("yes", prompt, (0, 25.6, 256, 256))
    assert "box: [0%, 10%, 50%, 100%]" in file.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [file]
