"""The planner, against a server that speaks /v1/chat/completions: what it sends, takes, asks again and gives up on."""

import json
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from errors import InputError
from regional.reader import read_layout
from tools.plan import plan, write_plan

KEY = "sk-very-secret-0123"
REQUEST = "a cat on the left and a dog on the right, at the sea"


def region(x0, y0, x1, y1, prompt="a grey cat at the sea"):
    return {"prompt": prompt, "box": {"x0": x0, "y0": y0, "x1": x1, "y1": y1}}


def answer_with(*regions, **keys) -> str:
    texts = {"prompt": "a cat and a dog at the sea", "background_prompt": "the sea"}
    return json.dumps({**texts, "regions": regions} | keys)


LEFT, RIGHT = region(0, 10, 50, 100), region(50, 20, 100, 100, "a brown dog at the sea")
GOOD = answer_with(LEFT, RIGHT)


def completion(content, **message) -> tuple[int, str]:
    message = {"role": "assistant", "content": content, **message}
    return 200, json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})


def failure(status: int, message: str) -> tuple[int, str]:
    return status, json.dumps({"error": {"message": message, "type": "x"}})


class Server(ThreadingHTTPServer):
    """Gives the answers in order, the last one for ever, and keeps what it was asked: (path, headers, body)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.wait = [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def contents(self, request: int) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.asked[request][2]["messages"]]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers, body))
        status, text = self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1]
        if status is None:  # stays silent until the test is over
            self.server.wait.wait(10)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("OPENAI_BASE_URL", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.wait.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(server, capfd, caplog):
    """Plans with these answers; afterwards the key must have been neither printed nor logged, nor said."""
    caplog.set_level("DEBUG")
    said = []

    def with_answers(*answers, **keys):
        server.answers = [completion(a) if isinstance(a, str) else a for a in answers]
        return plan(REQUEST, 512, 256, **{"url": server.url, "model": "some-model", "say": said.append} | keys)

    with_answers.said = said
    yield with_answers
    printed = capfd.readouterr()
    for text in (printed.out, printed.err, caplog.text, *said):
        assert KEY not in text


def fails(ask, *answers, **keys) -> str:
    """The message of the InputError that these answers lead to: one line; no secret is in it or in its causes."""
    with pytest.raises(InputError) as caught:
        ask(*answers, **keys)
    message = str(caught.value)
    trace = "".join(traceback.format_exception(caught.value))
    assert KEY not in trace and "pass-word" not in trace
    assert "\n" not in message and message.endswith(".")
    return message


# ------------------------------------------------------------------------------------------------- what is asked


def test_an_answer_becomes_a_layout_in_shares(server, ask):
    assert ask(GOOD) == {
        "width": 512,
        "height": 256,
        "prompt": "a cat and a dog at the sea",
        "background_prompt": "the sea",
        "regions": [
            {"prompt": "a grey cat at the sea", "box": ["0%", "10%", "50%", "100%"]},
            {"prompt": "a brown dog at the sea", "box": ["50%", "20%", "100%", "100%"]},
        ],
    }
    assert len(server.asked) == 1 and ask.said == []


def test_what_is_sent(server, ask):
    ask(GOOD)
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "some-model"
    (role, instructions), user = server.contents(0)
    assert role == "system" and "512 x 256" in instructions and user == ("user", REQUEST)
    assert KEY not in json.dumps(body)


def test_the_schema_is_sent_in_the_form_of_strict_modes(server, ask):
    ask(GOOD)
    form = server.asked[0][2]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    objects = {**schema["$defs"], "Plan": schema}
    assert {name: set(part["properties"]) for name, part in objects.items()} == {
        "Plan": {"prompt", "background_prompt", "regions"},
        "Part": {"prompt", "box"},
        "Box": {"x0", "y0", "x1", "y1"},
    }
    known = {"type", "title", "description", "properties", "required", "additionalProperties", "$defs"}
    for part in objects.values():
        assert part["type"] == "object" and part["additionalProperties"] is False
        assert part["required"] == list(part["properties"]) and part.keys() <= known
    assert json.dumps(schema) in server.contents(0)[0][1]  # for servers that ignore or refuse response_format


def test_without_a_model_or_a_key_neither_is_sent(server, ask, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_hub")
    ask(GOOD, model=None)
    _, headers, body = server.asked[0]
    assert "model" not in body
    assert "a banana" in fails(ask, failure(500, "a banana"))
    assert "Authorization" not in headers and "hf_of_the_hub" not in str(headers)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_url_may_be_given_in_several_ways(server, ask, end):
    ask(GOOD, url=server.url.removesuffix("/v1") + end)
    assert server.asked[0][0] == "/v1/chat/completions"


def test_another_path_is_kept(server, ask):
    ask(GOOD, url=server.url + "beta/openai/")
    assert server.asked[0][0] == "/v1beta/openai/chat/completions"


def test_the_url_is_by_default_that_of_the_environment(server, ask, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    ask(GOOD, url=None)
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", [None, "", "localhost:8000", "ftp://x/v1", "http:///v1", "http://x/v1?key=pass-word"])
def test_an_address_that_is_none_is_not_asked_and_not_shown(ask, url):
    message = fails(ask, GOOD, url=url)
    assert "--llm-url" in message and "OPENAI_BASE_URL" in message and "pass-word" not in message


def test_the_users_own_mistakes_come_before_any_question(server):
    server.answers = [completion(GOOD)]
    with pytest.raises(InputError, match="--width 500"):
        plan(REQUEST, 500, 256, server.url)
    assert server.asked == []


# ------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{GOOD}\n```",
        f"Here you are:\n```\n{GOOD}\n```\nHave fun!",
        f"<think>A first idea: {{'regions': []}}, no.</think>\n{GOOD}",
        f"its opening tag was in the template {{}} </think>```json\n{GOOD}```",
        GOOD.replace('"y0": 10', '"y0": "10"').replace('"y0": 20', '"y0": 20.0'),
    ],
    ids=["fence", "prose", "thoughts", "half-thoughts", "loose-numbers"],
)
def test_what_stands_around_the_json_does_not_matter(server, ask, text):
    assert [r["box"][1] for r in ask(text)["regions"]] == ["10%", "20%"]
    assert len(server.asked) == 1


def test_thoughts_that_never_end_are_no_answer(server, ask):
    assert "an empty answer" in fails(ask, f"<think>perhaps {GOOD}")
    assert len(server.asked) == 1


# -------------------------------------------------------------------------------------------- what is asked again


def test_after_bad_json_it_is_asked_again_with_the_reason(server, ask):
    bad = GOOD[:-3]
    assert len(ask(bad, GOOD)["regions"]) == 2
    assert len(server.asked) == 2
    first, second = server.contents(0), server.contents(1)
    assert second[:2] == first and second[2] == ("assistant", bad)
    role, correction = second[3]
    assert role == "user" and "truncated" in correction
    assert "response_format" in server.asked[1][2]
    assert len(ask.said) == 1 and "truncated" in ask.said[0] and "asking again" in ask.said[0]


def test_thoughts_are_not_sent_back(server, ask):
    ask("<think>hm</think>no layout", GOOD)
    assert server.contents(1)[2] == ("assistant", "no layout")


def test_after_three_bad_answers_it_gives_up(server, ask):
    message = fails(ask, "{}", "{", "no layout at all", GOOD)
    assert len(server.asked) == 3 and len(ask.said) == 2
    assert [role for role, _ in server.contents(2)] == ["system", "user"] + ["assistant", "user"] * 2
    assert "missing required field `prompt`" in server.contents(2)[3][1]
    assert message.startswith(server.url + "/chat/completions: no layout in three answers; the last: ")


NONSENSE = {
    "duplicates": ([LEFT, LEFT], "regions[0].box = [0, 10, 50, 100]: other regions cover all of it"),
    "inside": ([LEFT, region(10, 20, 20, 40)], "regions[1].box = [10, 20, 20, 40]: other regions cover"),
    "under two": ([LEFT, RIGHT, region(40, 20, 60, 90)], "regions[2].box = [40, 20, 60, 90]: other regions cover"),
    "empty": ([LEFT, region(60, 20, 60, 90)], "regions[1].box = [60, 20, 60, 90]: expected 0 <= x0 < x1"),
    "turned": ([region(50, 90, 90, 10)], "regions[0].box = [50, 90, 90, 10]: expected"),
    "outside": ([region(0, 0, 100, 101)], "regions[0].box = [0, 0, 100, 101]: expected"),
    "negative": ([region(-1, 0, 10, 10)], "regions[0].box = [-1, 0, 10, 10]: expected"),
    "huge": ([region(0, 0, 10**30, 10)], "regions[0].box = [0, 0, 1000"),
    "fraction": ([region(0, 0, 12.5, 10)], "Expected `int`, got `float` - at `$.regions[0].box.x1`"),
    "62 regions": ([region(i, 0, i + 1, 9) for i in range(62)], "expected array of length <= 61"),
    "none": ([], "prompt, regions: they must not be empty"),
    "no prompt": ([region(0, 0, 9, 9, " ")], "regions[0].prompt = ' ': expected what the region shows"),
    "other keys": ([{**LEFT, "mask": "/etc/passwd"}], "unknown field `mask`"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_sent_back_with_the_reason(server, ask, name):
    regions, reason = NONSENSE[name]
    assert ask(answer_with(*regions), GOOD)["regions"][1]["prompt"] == "a brown dog at the sea"
    assert reason in server.contents(1)[3][1] and "command line" not in server.contents(1)[3][1]


def test_nonsense_three_times_is_an_error(server, ask):
    assert fails(ask, answer_with(LEFT, LEFT)).endswith("the last: regions[0].box = [0, 10, 50, 100]: other regions "
        "cover all of it.")  # fmt: skip
    assert len(server.asked) == 3


def test_boxes_may_overlap_in_part(server, ask):
    ask(answer_with(region(0, 0, 60, 100), region(40, 0, 100, 99), region(30, 30, 61, 100)))
    ask(answer_with(region(0, 0, 100, 60), region(0, 1, 100, 61)))
    assert len(server.asked) == 2


def test_61_regions_are_possible(ask):
    assert len(ask(answer_with(*(region(i, 0, i + 1, 9) for i in range(61))))["regions"]) == 61


# --------------------------------------------------------------------------------------------- what it gives up on


@pytest.mark.parametrize(
    "message, shown",
    [
        ({"content": None, "refusal": "I can't draw that."}, "I can't draw that."),
        ({"content": GOOD, "refusal": "I won't."}, "I won't."),
        ({"content": "", "refusal": None}, "an empty answer"),
        ({"content": None}, "an empty answer"),
    ],
)
def test_a_refusal_is_not_asked_again(server, ask, message, shown):
    message = fails(ask, completion(**message))
    assert f"{server.url}/chat/completions: the model refuses" in message and shown in message
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "status, words",
    [
        (401, ["401 Unauthorized", "check OPENAI_API_KEY"]),
        (403, ["403 Forbidden", "check OPENAI_API_KEY"]),
        (404, ["404 Not Found", "check --llm-url and --llm-model"]),
        (400, ["400 Bad Request"]),
        (429, ["429 Too Many Requests"]),
        (500, ["500 Internal Server Error"]),
    ],
)
def test_http_errors_are_one_sentence_without_the_key(server, ask, status, words):
    message = fails(ask, failure(status, f"the key {KEY}\nis no good"))
    for word in [*words, "the key [key]", server.url]:
        assert word in message
    assert len(server.asked) == 1


@pytest.mark.parametrize("text", ["", "oops", '"oops"', '[{"error": {"message": "oops"}}]', '{"detail": ["oops"]}'])
def test_errors_may_have_any_form(ask, text):
    assert ("oops" in text) == ("oops" in fails(ask, (500, text)))


@pytest.mark.parametrize(
    "text", ["<html>", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 1}}]}']
)
def test_other_servers_are_told_from_models(ask, text):
    message = fails(ask, (200, text))
    assert "this is no chat completion" in message and text in message


def test_silence_ends_with_the_time_out(server, ask):
    start = time.monotonic()
    message = fails(ask, (None, ""), timeout=0.2)
    assert time.monotonic() - start < 3
    assert "timed out" in message and "0.2 s" in message and server.url in message
    assert len(server.asked) == 1


def test_a_refused_connection_is_one_sentence(ask):
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        assert f"{url}/chat/completions: no answer (" in fails(ask, GOOD, url=url)


def test_a_password_in_the_address_is_used_but_never_shown(server, ask):
    url = server.url.replace("//", "//user:pass-word@")
    ask("{", GOOD, url=url)
    assert server.asked[0][1]["Authorization"].startswith("Basic ")
    messages = [fails(ask, failure(500, f"at {url}"), url=url), fails(ask, (None, ""), url=url, timeout=0.2), *ask.said]
    for message in messages:
        assert server.url in message and "pass-word" not in message and "user" not in message


def test_offline_nothing_is_asked(server, ask, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = fails(ask, GOOD, url=server.url.replace("//", "//user:pass-word@"))
    assert "HF_HUB_OFFLINE" in message and "pass-word" not in message and server.asked == []


@pytest.mark.parametrize("key", ["half\nother", "half\x1bother", "half…other"])
def test_a_key_that_no_header_can_hold_is_not_shown(server, ask, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    message = fails(ask, GOOD)
    assert "OPENAI_API_KEY" in message and "half" not in message and "other" not in message
    assert server.asked == []


def test_a_key_that_the_model_repeats_is_not_shown(ask):
    assert "unknown field `[key] x`" in fails(ask, json.dumps({f"{KEY}\nx": 1}))


# ------------------------------------------------------------------------------------- servers without JSON Schemas


NO_SCHEMA = [
    failure(400, "This response_format type is unavailable now"),
    failure(400, "'json_schema' is not supported by this model"),
    (422, '{"detail": [{"loc": ["body", "response_format", "type"], "msg": "Input should be text"}]}'),
]


@pytest.mark.parametrize("refusal", NO_SCHEMA)
def test_a_refused_schema_is_left_out_and_said(server, ask, refusal):
    assert len(ask(refusal, "{", GOOD)["regions"]) == 2
    assert ["response_format" in body for _, _, body in server.asked] == [True, False, False]
    assert "Asking without a JSON Schema" in ask.said[0] and f"HTTP {refusal[0]}" in ask.said[0]


def test_a_refused_schema_is_refused_once(server, ask):
    assert "HTTP 400" in fails(ask, NO_SCHEMA[0])
    assert len(server.asked) == 2


def test_three_bad_answers_without_a_schema_say_so(server, ask):
    assert "without a JSON Schema, which it does not take" in fails(ask, NO_SCHEMA[1], "no")
    assert len(server.asked) == 4


def test_other_400s_keep_the_schema(server, ask):
    fails(ask, failure(400, "the prompt is too long"), GOOD)
    assert len(server.asked) == 1


# ------------------------------------------------------------------------------------------------------- the file


def test_the_file_reads_as_the_layout(ask, tmp_path):
    prompt = "no: a cat, 50% “grey”\n# and 猫 🐈"
    layout = ask(answer_with(region(0, 10, 50, 100, prompt), RIGHT, prompt="yes"))
    file = tmp_path / "plan.yaml"
    write_plan(layout, file)
    read = read_layout(file, {})
    assert (read.prompt, read.background_prompt, read.width, read.height) == ("yes", "the sea", 512, 256)
    assert [(r.prompt, r.box) for r in read.regions] == [
        (prompt, (0, 25.6, 256, 256)),
        ("a brown dog at the sea", (256, 51.2, 512, 256)),
    ]
    assert "box: [0%, 10%, 50%, 100%]" in file.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [file]


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write_plan({"prompt": "x"}, file)
    assert file.read_text() == "mine"
    write_plan({"prompt": "x"}, file, overwrite=True)
    assert read_layout(file, {}).prompt == "x"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        write_plan({"prompt": "x"}, tmp_path / "none" / "plan.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(OSError):
        write_plan({"prompt": "x"}, tmp_path / "folder.yaml", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.yaml"]
