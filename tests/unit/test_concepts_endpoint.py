"""Labels from an OpenAI-compatible endpoint, asked over a real local HTTP server."""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from daco_rt.cli import main
from daco_rt.concepts import WordConcept, load_table, save_table, shipped_table
from daco_rt.concepts.endpoint import PROMPT, EndpointLabeller, parse_answer, prompt_for
from daco_rt.errors import ArtifactError, DacoError

CONCEPTS = [
    WordConcept(f"{name}.n.01", name, gloss=f"what a {name} is", paths=((f"{kind}.n.01", "entity.n.01"),))
    for name, kind in (
        ("dagger", "weapon"), ("rifle", "weapon"), ("spoon", "tool"), ("honesty", "virtue"),
        ("chair", "seat"),        ("grenade", "bomb"), ("table", "seat"),
    )
]  # fmt: skip
TRUTH = {"dagger": "undesirable", "rifle": "undesirable", "grenade": "undesirable", "honesty": "desirable"}


def label_of(name):
    return TRUTH.get(name, "neutral")


class Server:
    """An expert on a port of its own. ``script`` holds what to do with the next requests, then it answers."""

    def __init__(self):
        self.requests, self.script, self.hold = [], [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                step = outer.script.pop(0) if outer.script else None
                if callable(step):
                    step = step(body)
                if step == "slow":
                    outer.hold.wait(5)
                    return
                if step == "drop":
                    self.connection.close()
                    return
                status, headers, payload = step or (200, {}, answer(body))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                data = payload.encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.hold.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "DACO_RT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.close()


def asked(body):
    """Numbers and words of a request's concepts."""
    text = body["messages"][0]["content"]
    return [(int(n), word) for n, word in re.findall(r"^(\d+)\. (\w+) \(a kind of", text, re.M)]


def completion(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def answer(body, wrong=()):
    rows = [
        {"id": number, "label": label_of(word), "group": "Some Topic", "reason": f"it is a {word}"}
        for number, word in asked(body)
        if word not in wrong
    ]
    return completion("```json\n" + json.dumps(rows) + "\n```")


def labeller(server, tmp_path, **options):
    settings = {"batch": 3, "workers": 2, "timeout": 5.0, "pause": 0.01} | options
    return EndpointLabeller(server.url, "expert", tmp_path / "cache.jsonl", **settings)


def check(found, names=None):
    keys = [c.key for c in CONCEPTS if names is None or c.name in names]
    assert list(found) == keys
    for concept in CONCEPTS:
        if concept.key in found:
            label = found[concept.key]
            assert (label.label, label.source) == (label_of(concept.name), "endpoint expert")
            assert label.reason == f"it is a {concept.name}" and label.group == "some-topic"


def test_concepts_go_out_in_batches_and_come_back(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DACO_RT_API_KEY", "secret")
    check(labeller(server, tmp_path).label_all(CONCEPTS))
    assert sorted(len(asked(body)) for _, _, body in server.requests) == [1, 3, 3]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "expert" and body["temperature"] == 0
    assert body["messages"][0]["content"].startswith(PROMPT)


def test_the_page_says_the_prompt_that_is_sent():
    page = Path(__file__).resolve().parents[2] / "docs" / "concepts.md"
    assert f"```text\n{PROMPT.rstrip()}\n```\n" in page.read_text(encoding="utf-8")


def test_the_cache_spares_every_second_question(server, tmp_path):
    labeller(server, tmp_path).label_all(CONCEPTS[:4])
    count = len(server.requests)
    check(labeller(server, tmp_path).label_all(CONCEPTS))
    new = {word for _, _, body in server.requests[count:] for _, word in asked(body)}
    assert new == {c.name for c in CONCEPTS[4:]}
    count = len(server.requests)
    check(labeller(server, tmp_path).label_all(CONCEPTS))
    assert len(server.requests) == count
    # Another model is another opinion.
    other = EndpointLabeller(server.url, "other", tmp_path / "cache.jsonl")
    assert other.label_all(CONCEPTS[:1])["dagger.n.01"].source == "endpoint other"
    assert len(server.requests) == count + 1


def test_overload_and_lost_connections_are_retried(server, tmp_path):
    server.script = [(503, {}, "busy"), "drop", (429, {"Retry-After": "0"}, ""), (500, {}, "")]
    one = labeller(server, tmp_path, batch=7)
    check(one.label_all(CONCEPTS))
    assert one.asked == 5 and not one.unanswered


def test_retry_after_is_obeyed(server, tmp_path):
    server.script = [(429, {"Retry-After": "0.4"}, "")]
    began = time.monotonic()
    check(labeller(server, tmp_path, batch=7).label_all(CONCEPTS))
    assert time.monotonic() - began >= 0.4


def test_a_slow_server_is_asked_again(server, tmp_path):
    server.script = ["slow"]
    one = labeller(server, tmp_path, batch=7, timeout=0.3)
    check(one.label_all(CONCEPTS))
    assert one.asked == 2


def test_a_server_that_stays_slow_is_named(server, tmp_path):
    server.script = ["slow"] * 9
    with pytest.raises(
        DacoError, match=r"did not answer in 2 tries \(no answer within 0\.1 s\).*run the same command"
    ):
        labeller(server, tmp_path, batch=7, workers=1, timeout=0.1, tries=2).label_all(CONCEPTS)


def test_a_server_that_goes_down_loses_nothing(server, tmp_path):
    server.script = [None, *[(503, {}, "")] * 50]
    with pytest.raises(DacoError, match="did not answer in 3 tries"):
        labeller(server, tmp_path, workers=1, tries=3).label_all(CONCEPTS)
    server.script = []
    count = len(server.requests)
    check(labeller(server, tmp_path).label_all(CONCEPTS))
    assert {w for _, _, body in server.requests[count:] for _, w in asked(body)} == {
        c.name for c in CONCEPTS[3:]
    }


def test_nobody_there(tmp_path):
    silent = Server()
    silent.close()
    with pytest.raises(DacoError, match=r"did not answer in 2 tries .*refused"):
        EndpointLabeller(silent.url, "m", tmp_path / "c.jsonl", tries=2, pause=0.01).label_all(CONCEPTS)


def test_a_wrong_key_is_no_reason_to_retry(server, tmp_path):
    server.script = [(401, {}, "no such\nkey")] * 9
    with pytest.raises(DacoError, match="refused with status 401: no such key; check"):
        labeller(server, tmp_path, workers=1).label_all(CONCEPTS)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        "I am sorry, I cannot do that.",
        '[{"id": 1, "label": "evil"}]',
        '[{"id": 99, "label": "neutral"}, {"label": "neutral"}]',
        "[{",
        "",
    ],
)
def test_nonsense_is_asked_again_in_halves(server, tmp_path, nonsense):
    server.script = [(200, {}, completion(nonsense))]
    check(labeller(server, tmp_path, batch=7, workers=1).label_all(CONCEPTS))
    assert [len(asked(body)) for _, _, body in server.requests] == [7, 4, 3]


@pytest.mark.parametrize(
    "payload", ["", "<html>", "[]", '{"choices": []}', '{"choices": [{"message": {"content": 3}}]}']
)
def test_answers_that_are_no_completion_count_as_nonsense(server, tmp_path, payload):
    server.script = [(200, {}, payload)]
    check(labeller(server, tmp_path, batch=7, workers=1).label_all(CONCEPTS))


def test_one_concept_without_an_answer_does_not_stop_the_others(server, tmp_path):
    server.script = [lambda body: (200, {}, answer(body, wrong=("spoon",)))] * 99
    one = labeller(server, tmp_path)
    check(one.label_all(CONCEPTS), names={c.name for c in CONCEPTS} - {"spoon"})
    assert one.unanswered == ["spoon.n.01"]


def test_partial_answers_are_kept(server, tmp_path):
    def cut(body):
        text = json.loads(answer(body))["choices"][0]["message"]["content"]
        return 200, {}, completion(text[: text.index('"id": 3')])

    server.script = [cut]
    check(labeller(server, tmp_path, batch=7, workers=1).label_all(CONCEPTS))
    assert [[w for _, w in asked(body)] for _, _, body in server.requests][1][0] == "spoon"


@pytest.mark.parametrize("lost", [1, 20])
def test_a_killed_run_goes_on(server, tmp_path, lost):
    labeller(server, tmp_path).label_all(CONCEPTS[:3])
    cache = tmp_path / "cache.jsonl"
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-lost])
    check(labeller(server, tmp_path).label_all(CONCEPTS[:3]), names={c.name for c in CONCEPTS[:3]})
    assert len(cache.read_bytes().splitlines()) == 3
    cache.write_bytes(b'{"key": "x"}\n' + whole)
    with pytest.raises(ArtifactError, match="line 1: no cached label"):
        labeller(server, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "ftp://x"}, "is no http address"),
        ({"url": "localhost:80"}, "is no http address"),
        ({"model": ""}, "needs the name of a model"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"timeout": 0}, "timeout must be above 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, options, said):
    with pytest.raises(ArtifactError, match=said):
        EndpointLabeller(**({"url": "http://x", "model": "m", "cache": tmp_path / "c"} | options))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('[{"id": 1, "label": "Neutral "}]', {0: "neutral"}),
        ('{"labels": [{"id": 2, "label": "desirable"}]}', {1: "desirable"}),
        ('{"id": "2", "label": "neutral"}', {1: "neutral"}),
        ('[{"id": 1, "label": "neutral"}, {"id": 1, "label": "desirable"}]', {}),
        ('[{"id": 1, "label": "neutral"}, {"id": 1, "label": "neutral"}]', {0: "neutral"}),
        ('[{"id": true, "label": "neutral"}, {"id": 0, "label": "neutral"}]', {}),
        ('{"id": 1, "label": ["neutral"]}', {}),
        ("{" * 5000, {}),
    ],
)
def test_answers_are_read_leniently_and_never_guessed(text, labels):
    assert {number: row["label"] for number, row in parse_answer(text, 2).items()} == labels


def test_prompt_names_word_kind_and_definition():
    assert prompt_for(CONCEPTS[:2]).endswith(
        "1. dagger (a kind of weapon): what a dagger is\n2. rifle (a kind of weapon): what a rifle is"
    )


def test_every_shipped_concept_can_be_asked_about():
    text = prompt_for(shipped_table())
    assert len(re.findall(r"^\d+\. ", text, re.M)) == 15_000
    assert prompt_for([WordConcept("entity.n.01", "entity", paths=((),))]).endswith("1. entity: ")


def test_command_asks_the_endpoint_and_keeps_the_hand_above_it(server, tmp_path, capsys):
    table, hand = save_table(CONCEPTS, tmp_path / "t.jsonl"), tmp_path / "hand.tsv"
    hand.write_text("concept\tlabel\tgroup\treason\nspoon\tundesirable\tcutlery\tfor the test\n")
    rules = tmp_path / "rules.yaml"
    rules.write_text("version: 1\ngroups:\n  seats: {label: undesirable, under: [seat.n.01]}\n")
    command = [
        "concepts",
        "--table",
        str(table),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--labels",
        str(hand),
    ]
    command += ["--rules", str(rules), "--endpoint", server.url, "--endpoint-model", "expert"]
    server.script = [lambda body: (200, {}, answer(body, wrong=("chair",)))] * 99
    assert main(command) == 0
    assert "1 concepts got no usable answer" in capsys.readouterr().out
    found = {c.name: (c.label, c.source) for c in load_table(tmp_path / "out.jsonl")}
    assert found["spoon"] == ("undesirable", "hand") and found["dagger"] == ("undesirable", "endpoint expert")
    assert found["chair"] == ("undesirable", "rules") and found["table"] == ("neutral", "endpoint expert")
    assert len((tmp_path / "out.labels-cache.jsonl").read_text().splitlines()) == 6
    assert main(["concepts", "--table", str(table), "--output", "x", "--endpoint-model", "m"]) == 2
