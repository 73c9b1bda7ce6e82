"""The client against a real server that answers, stalls, refuses, breaks off and comes back."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import time
import traceback
import tracemalloc
import zlib
from typing import Any

import pytest
from support.scripted_judge import Answer, ScriptedJudge, refused, said, user_text

from dar.config.judge import JudgeBudgetSpec, JudgeEndpointSpec, JudgePriceSpec
from dar.errors import BudgetError, ConfigError, RewardError
from dar.judge import Backoff, Client
from dar.judge.budget import Budget
from dar.judge.client import max_bytes, sampling
from dar.judge.counts import Counts
from dar.judge.reply import Reply
from dar.judge.retry import retry_after_seconds
from dar.judge.template import Messages
from dar.rewards import Failed

QUICK = Backoff(first=0.01, longest=0.05)


def endpoint(url: str = "http://u", **settings: Any) -> JudgeEndpointSpec:
    return JudgeEndpointSpec(base_url=url, model="m", **settings)


def make_client(
    url: str, *, budget: Any = None, price: Any = None, api_key: str | None = None, **changes: Any
) -> Client:
    settings: dict[str, Any] = {"timeout": 120.0, "patience": 600.0, "api_key_env": api_key and "KEY_OF_MINE"} | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_OF_MINE", api_key or "")
        return Client(endpoint(url, **settings), budget=budget, price=price, backoff=QUICK)


def ask(client: Client, texts: list[str]) -> list[Reply | Failed]:
    """One batch, everything at once."""

    async def batch() -> list[Reply | Failed]:
        async with client.session() as session:
            return await asyncio.gather(*(session.ask(Messages("s", text)) for text in texts))

    return asyncio.run(batch())


def ask_one(client: Client) -> Reply | Failed:
    return ask(client, ["q"])[0]


def test_what_is_asked_and_what_comes_back():
    with ScriptedJudge(lambda body, before: said("7")) as server:
        client = make_client(server.url, api_key="secret", max_tokens=5, top_logprobs=3, parameters={"seed": 4})
        assert ask_one(client) == Reply("7", (), 100, 10)
    assert server.bodies == [
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "model": "m",
            "temperature": 0.0,
            "max_tokens": 5,
            "logprobs": True,
            "top_logprobs": 3,
            "seed": 4,
        }
    ]
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_parameters_may_take_a_setting_out():
    found = sampling(endpoint(top_logprobs=0, parameters={"max_tokens": None, "max_completion_tokens": 9}))
    assert found == {"temperature": 0.0, "max_completion_tokens": 9}


def test_without_a_key_none_is_sent_and_nothing_of_the_environment_either(monkeypatch: pytest.MonkeyPatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "private")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: private\nauthorization: Bearer private")
    with ScriptedJudge(lambda body, before: said("7")) as server:
        assert isinstance(ask_one(make_client(server.url)), Reply)
        assert isinstance(ask_one(make_client(server.url, api_key="ours")), Reply)
    assert "private" not in str(server.headers)
    assert [headers.get("authorization") for headers in server.headers] == [None, "Bearer ours"]


@pytest.mark.parametrize("key", ["abc-secret\r", " abc-secret", "abc-sécret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str):
    with pytest.raises(ConfigError, match="the judge's key begins or ends with white space, or has char") as raised:
        make_client("http://u", api_key=key)
    assert "cret" not in "".join(traceback.format_exception(raised.value)).replace(repr(key), "")


def test_a_text_that_cannot_be_sent_fails_alone():
    with ScriptedJudge(lambda body, before: said("7")) as server:
        replies = ask(make_client(server.url), ["a", "half a pair: \ud800"])
    assert isinstance(replies[0], Reply)
    assert replies[1] == Failed("the judge refused the request: the question cannot be sent: surrogates not allowed")


def test_candidates_come_with_the_tokens():
    with ScriptedJudge(lambda body, before: said("7", [("7", {"7": -0.5, "8": -1.0})])) as server:
        reply = ask_one(make_client(server.url))
    assert isinstance(reply, Reply)
    assert reply.tokens[0].text == "7"
    assert reply.tokens[0].candidates == (("7", -0.5), ("8", -1.0))


def test_hundreds_at_once_stay_within_the_bound_and_come_back_in_order():
    # Later questions are answered sooner.
    script = lambda body, before: said(user_text(body), delay=0.05 if int(user_text(body)) % 7 == 0 else 0.0)  # noqa: E731
    texts = [str(number) for number in range(200)]
    with ScriptedJudge(script) as server:
        client = make_client(server.url, concurrency=8)
        replies = ask(client, texts)
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == texts
    assert 2 <= server.most_at_once <= 8
    assert client.counts.requests == 200


@pytest.mark.parametrize(
    "failure",
    [
        refused(429),
        refused(500),
        refused(503),
        refused(408),
        Answer(manner="drop"),
        Answer(said("7").body, manner="half"),
        Answer(b"<html>proxy</html>", headers={"content-type": "text/html"}),
        Answer(said("7").body[:40]),
        Answer(b'{"choices": []}'),
        Answer(b'{"choices": [{"message": "7"}]}'),
        Answer(b"[1, 2]"),
        said("7", [("7", {"7": 9999.0})]),
        Answer(said("7").body, headers={"content-encoding": "gzip"}),
        Answer(b""),
    ],
    ids=[
        "429",
        "500",
        "503",
        "408",
        "drop",
        "half",
        "html",
        "cut-json",
        "no-choice",
        "schema",
        "list",
        "logprob",
        "gzip",
        "empty",
    ],
)
def test_passing_failures_are_retried(failure: Answer):
    with ScriptedJudge(lambda body, before: said("7") if before == 2 else failure) as server:
        client = make_client(server.url)
        reply = ask_one(client)
    assert isinstance(reply, Reply)
    assert reply.text == "7"
    assert client.counts.drain() | {"latency_p50": 0, "latency_p95": 0} == {
        "requests": 1,
        "retries": 2,
        "cache_hits": 0,
        "failures": 0,
        "parse_failures": 0,
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "latency_p50": 0,
        "latency_p95": 0,
    }


@pytest.mark.parametrize("manner", ["silence", "trickle"])
def test_an_attempt_has_a_deadline(manner: Any):
    stalled = Answer(said("7").body, manner=manner)
    with ScriptedJudge(lambda body, before: said("8") if before else stalled) as server:
        reply = ask_one(make_client(server.url, timeout=0.5))
    assert isinstance(reply, Reply)
    assert reply.text == "8"


def test_patience_ends():
    with ScriptedJudge(lambda body, before: refused(500, "broken")) as server:
        client = make_client(server.url, patience=0.3)
        failed = ask_one(client)
    assert isinstance(failed, Failed)
    assert failed.reason.startswith(f"the judge at {server.url} gave no answer within 0.3 s of patience (attempts: ")
    assert failed.reason.endswith("the last problem: 500: broken")
    assert client.counts.failures == 1


def test_patience_with_a_dead_server_is_not_waited_out_by_every_request_again():
    with ScriptedJudge(lambda body, before: said("7")) as server:
        pass
    client = make_client(server.url, patience=0.5, concurrency=1)
    replies = ask(client, [str(number) for number in range(40)])
    assert all(isinstance(reply, Failed) for reply in replies)
    # The first waits the 0.5 s out; the last see that nobody was answered for as long, and give up at once.
    assert "(attempts: 1)" in str(replies[-1])
    assert "ConnectError" in str(replies[0])


def test_a_server_that_comes_back_is_found_again():
    with ScriptedJudge(lambda body, before: said("7")) as first:
        port = first.port

    async def batch() -> list[Reply | Failed]:
        client = make_client(f"http://127.0.0.1:{port}/v1")
        async with client.session() as session:
            asked = asyncio.gather(*(session.ask(Messages("s", str(number))) for number in range(20)))
            await asyncio.sleep(0.3)
            with ScriptedJudge(lambda body, before: said("7"), port=port):
                return await asked

    assert [reply for reply in asyncio.run(batch()) if isinstance(reply, Failed)] == []


def test_an_answer_ends_an_outage():
    # Each question fails once, and the first answer takes longer than the patience.
    def script(body: dict[str, Any], before: int) -> Answer:
        return said("7", delay=0.6 if user_text(body) == "a" else 0.0) if before else refused(500)

    with ScriptedJudge(script) as server:
        replies = ask(make_client(server.url, patience=0.5, concurrency=1), ["a", "b"])
    assert [type(reply) for reply in replies] == [Reply, Reply]


def test_a_question_that_always_fails_is_given_up_while_others_are_answered():
    script = lambda body, before: refused(500) if user_text(body) == "bad" else said("7", delay=0.05)  # noqa: E731
    texts = ["bad", *map(str, range(50))]
    with ScriptedJudge(script) as server:
        replies = ask(make_client(server.url, patience=1.0, concurrency=2), texts)
    assert [type(reply) for reply in replies] == [Failed, *[Reply] * 50]
    # Its place was free for others long before the last of them.
    assert "bad" not in [user_text(body) for body in server.bodies[-5:]]


def test_garbage_is_not_asked_for_forever():
    with ScriptedJudge(lambda body, before: Answer(b"{}")) as server:
        failed = ask_one(make_client(server.url))
    assert failed == Failed("the judge's answer was 3 times not a chat completion: choices: Field required")
    assert len(server.bodies) == 3


def compressed(body: bytes, repeats: int, wbits: int) -> bytes:
    """The body so many times over, compressed; the whole is never held."""
    stream = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b"".join(stream.compress(body) for _ in range(repeats)) + stream.flush()


GZIP, ZLIB = zlib.MAX_WBITS | 16, zlib.MAX_WBITS
MIB = bytes(1 << 20)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b"7" * 65536, manner="endless"),
        Answer(b"7" * (64 << 20)),
        Answer(compressed(MIB, 256, GZIP), headers={"content-encoding": "gzip"}),
        Answer(compressed(MIB, 256, ZLIB), headers={"content-encoding": "deflate"}),
        Answer(gzip.compress(said("7").body) + bytes(64 << 20), headers={"content-encoding": "gzip"}),
    ],
    ids=["endless", "large", "gzip", "deflate", "behind-gzip"],
)
def test_a_body_is_bounded(answer: Answer):
    with ScriptedJudge(lambda body, before: answer) as server:
        client = make_client(server.url)
        tracemalloc.start()
        failed = ask_one(client)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # 2 MiB, and 512 bytes for each of the 21 candidates of 16 tokens.
    expected = "longer than 2,269,184 bytes, more than the tokens that were asked for come to"
    assert failed == Failed(f"the judge's answer was 3 times {expected}")
    assert peak < 32 << 20
    assert len(server.bodies) == 3


def test_the_bound_grows_with_what_is_asked_for():
    bound = lambda **settings: max_bytes(endpoint(**settings))  # noqa: E731
    assert bound(max_tokens=1000, top_logprobs=0) == (2 << 20) + 512 * 1000
    assert bound(parameters={"max_tokens": None, "max_completion_tokens": 4000}) == (2 << 20) + 512 * 21 * 4000
    assert bound(max_tokens=10**9) == 64 << 20
    text = "7" + " " * (3 << 20)
    with ScriptedJudge(lambda body, before: said(text)) as server:
        assert ask_one(make_client(server.url, max_tokens=4000, top_logprobs=0)) == Reply(text, (), 100, 10)


@pytest.mark.parametrize(("name", "wbits"), [("gzip", GZIP), ("deflate", ZLIB)])
def test_a_compressed_answer_is_read(name: str, wbits: int):
    answer = Answer(compressed(said("7").body, 1, wbits), headers={"content-encoding": name})
    with ScriptedJudge(lambda body, before: answer) as server:
        assert ask_one(make_client(server.url)) == Reply("7", (), 100, 10)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(b"HTTP/1.1 200 OK\r\nX: " + b"x" * (8 << 20), manner="raw"), "Receive buffer too long"),
        (Answer(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * (1 << 20), manner="raw"), "Receive buffer too long"),
        (Answer(b"boom " * 1000, status=500, manner="endless"), "500: boom boom"),
        (Answer(compressed(b"boom", 1 << 10, GZIP), 503, {"content-encoding": "gzip"}), "503: boomboom"),
        (refused(503, retry_after="Wed, 21 Oct " + "1" * 5000 + " 07:28:00 GMT"), "503: no"),
    ],
    ids=["header", "headers", "status", "compressed-status", "date"],
)
def test_what_surrounds_a_body_is_bounded_too(answer: Answer, problem: str):
    with ScriptedJudge(lambda body, before: answer) as server:
        failed = ask_one(make_client(server.url, patience=0.0))
    assert isinstance(failed, Failed)
    assert problem in failed.reason
    assert len(failed.reason) < 600


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"content": ["7"]}}]}',
        b'{"choices": {"0": {"message": {"content": "7"}}}}',
        b'{"choices": [{"message": {"content": "7"}, "logprobs": [1]}]}',
        b'{"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}",
        b'{"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": -1}}',
        b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    ],
)
def test_json_that_is_no_answer_fails(body: bytes):
    with ScriptedJudge(lambda sent, before: Answer(body)) as server:
        failed = ask_one(make_client(server.url))
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("the judge's answer was 3 times ")


def test_millions_of_wrong_items_are_one_error():
    entries = b",".join([b"1"] * 1_000_000)
    body = b'{"choices": [{"message": {"content": "7"}, "logprobs": {"content": [' + entries + b"]}}]}"
    with ScriptedJudge(lambda sent, before: Answer(body)) as server:
        client = make_client(server.url)
        tracemalloc.start()
        failed = ask_one(client)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert isinstance(failed, Failed)
    assert peak < 32 << 20


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": ' + b"[" * 20_000 + b"]" * 20_000 + b"}}",
        b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b', "code": []}}',
        b'{"error": {"message": "x", "code": ' + b"9" * 5000 + b"}}",
        b'{"error": "no"}',
        b'["no"]',
        b'{"error": {"message": null, "code": "no"}}',
        b"\xff\xfe no",
        b"",
    ],
)
def test_an_error_may_be_anything(body: bytes):
    headers = {"content-type": "application/json; charset=undefined"}
    with ScriptedJudge(lambda sent, before: Answer(body, status=400, headers=headers)) as server:
        failed = ask_one(make_client(server.url))
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("the judge refused the request: 400: ")
    assert "no" in failed.reason or "[[" in failed.reason or '"x"' in failed.reason


def test_log_probabilities_that_are_none_are_named():
    body = json.loads(said("7", [("7", {"7": -0.5})]).body)
    body["choices"][0]["logprobs"]["content"][0]["logprob"] = None
    with ScriptedJudge(lambda sent, before: Answer(json.dumps(body).encode())) as server:
        failed = ask_one(make_client(server.url))
    assert failed == Failed(
        "the judge's answer was 3 times without log-probabilities that can be read (with top_logprobs: 0 none are "
        "asked for): choices.0.logprobs.content.0.logprob: Input should be a valid number"
    )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_is_sent_to_another_origin(status: int):
    with ScriptedJudge(lambda body, before: said("7")) as other:
        away = Answer(status=status, headers={"location": f"{other.url}/chat/completions"})
        with ScriptedJudge(lambda body, before: away) as server:
            here, there = server.url.removesuffix("/v1"), other.url.removesuffix("/v1")
            with pytest.raises(RewardError, match=f"the judge's server {here} redirects to {there}, and prompts and"):
                ask_one(make_client(server.url))
        assert other.bodies == []


@pytest.mark.parametrize("location", ["https://127.0.0.1/v1", "//user:word@elsewhere/v1", "ftp://127.0.0.1/"])
def test_another_scheme_or_host_is_another_origin(location: str):
    with (
        ScriptedJudge(lambda body, before: Answer(status=307, headers={"location": location})) as server,
        pytest.raises(RewardError, match="sent to no other origin than that of base_url") as raised,
    ):
        ask_one(make_client(server.url))
    assert "word" not in str(raised.value)


def test_a_redirect_within_the_origin_is_followed_and_not_forever():
    again = Answer(status=308, headers={"location": "/v1/chat/completions"})
    with ScriptedJudge(lambda body, before: said("7") if before else again) as server:
        assert isinstance(ask_one(make_client(server.url, api_key="abc-secret")), Reply)
    assert server.bodies[0] == server.bodies[1]
    assert [headers["authorization"] for headers in server.headers] == ["Bearer abc-secret"] * 2
    with ScriptedJudge(lambda body, before: again) as server:
        assert ask_one(make_client(server.url)) == Failed("the judge's answer was 3 times a redirect, after 4 others")


KEY = "abc-very/secret"


@pytest.mark.parametrize(
    "answer",
    [
        said(f"7, your key is {KEY}"),
        said("7", [("7", {"7": -0.5, KEY: -1.0})]),
        refused(400, f"{'x ' * 140}{KEY} is wrong"),
        refused(400, " " * 1190 + KEY),
        Answer(b"{" + KEY.encode(), status=400),
        Answer(b"HTTP/1.1 200 OK\r\n" + KEY.encode() + b"\r\n\r\n", manner="raw"),
    ],
    ids=["answer", "candidate", "at-the-end", "at-the-cut", "no-json", "header"],
)
def test_a_key_that_is_echoed_is_not_repeated(answer: Answer):
    with ScriptedJudge(lambda body, before: answer) as server:
        said = repr(ask_one(make_client(server.url, api_key=KEY, patience=0.0)))
    # Half of it is too much, too.
    assert "abc-very" not in said


def test_what_a_key_was_taken_out_of_has_no_tokens():
    with ScriptedJudge(lambda body, before: said(f"7 {KEY}", [(f"7 {KEY}", {"7": -0.5})])) as server:
        assert ask_one(make_client(server.url, api_key=KEY)) == Reply("7 ***", (), 100, 10)


def test_retry_after_is_honoured():
    with ScriptedJudge(lambda body, before: said("7") if before else refused(429, retry_after="0.4")) as server:
        assert isinstance(ask_one(make_client(server.url)), Reply)
    assert server.times[1] - server.times[0] >= 0.4


def test_a_wait_beyond_patience_is_not_waited():
    with ScriptedJudge(lambda body, before: refused(429, "later", retry_after="3600")) as server:
        failed = ask_one(make_client(server.url))
    assert isinstance(failed, Failed)
    assert "(attempts: 1, and asked for 3600 s more)" in failed.reason


def test_a_refused_request_fails_alone_and_is_not_repeated():
    script = lambda body, before: refused(400, "too long") if user_text(body) == "b" else said("7")  # noqa: E731
    with ScriptedJudge(script) as server:
        replies = ask(make_client(server.url), ["a", "b", "c"])
    assert [type(reply) for reply in replies] == [Reply, Failed, Reply]
    assert replies[1] == Failed("the judge refused the request: 400: too long")
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    "answer",
    [refused(401, "key abc-secret is wrong"), refused(404), refused(429, "pay", code="insufficient_quota")],
    ids=["401", "404", "quota"],
)
def test_what_every_request_would_get_is_an_error_without_the_key(answer: Answer):
    with (
        ScriptedJudge(lambda body, before: answer) as server,
        pytest.raises(RewardError, match="does not serve model 'm' to us") as raised,
    ):
        ask_one(make_client(server.url, api_key="abc-secret"))
    # With all its causes, as a notebook would show it.
    assert "abc-secret" not in "".join(traceback.format_exception(raised.value)).replace('api_key="abc-secret"', "")
    assert len(server.bodies) == 1


def test_the_budget_stops_before_the_request_that_is_too_many():
    with ScriptedJudge(lambda body, before: said("7")) as server:
        client = make_client(server.url, budget=JudgeBudgetSpec(requests=3), concurrency=1)
        with pytest.raises(BudgetError, match="budget of 3 requests is used up: 3 were made, 1 more are due"):
            ask(client, ["a", "b", "c", "d"])
    assert len(server.bodies) == 3


def test_the_budget_counts_tokens():
    # 110 tokens each: the second request still begins, with 110 < 150 spent; the third does not.
    with ScriptedJudge(lambda body, before: said("7")) as server:
        client = make_client(server.url, budget=JudgeBudgetSpec(tokens=150), concurrency=1)
        with pytest.raises(BudgetError, match="budget of 150 tokens is used up: 220 were spent in 2 requests"):
            ask(client, ["a", "b", "c"])


def test_a_batch_that_does_not_fit_is_not_begun():
    budget = Budget(JudgeBudgetSpec(requests=5))
    budget.require(5)
    with pytest.raises(BudgetError, match="5 requests is used up: 0 were made, 6 more are due"):
        budget.require(6)


def test_cost_and_latencies():
    with ScriptedJudge(lambda body, before: said("7")) as server:
        client = make_client(server.url, price=JudgePriceSpec(prompt=3.0, completion=15.0))
        ask(client, ["a", "b"])
    found = client.counts.drain()
    # 2 · (100 · 3 + 10 · 15) / 10⁶
    assert found["cost"] == pytest.approx(0.0009)
    assert 0 < found["latency_p50"] <= found["latency_p95"]
    assert client.counts.drain()["requests"] == 0, "drained"


def test_percentiles_by_nearest_rank():
    def percentiles(*latencies: float) -> tuple[float, float]:
        found = Counts(latencies=list(latencies)).drain()
        return found["latency_p50"], found["latency_p95"]

    assert percentiles(*range(20, 0, -1)) == (10, 19)
    assert percentiles(1.0, 2.0, 3.0) == (2, 3)  # 1 of 3 is less than half
    assert percentiles(3.0) == (3, 3)


def test_retry_after_in_both_forms(monkeypatch: pytest.MonkeyPatch):
    now = 1_700_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    assert retry_after_seconds("12") == 12
    assert retry_after_seconds("1.5") == 1.5
    assert retry_after_seconds(email.utils.formatdate(now + 90, usegmt=True)) == 90
    assert retry_after_seconds(email.utils.formatdate(now - 910, usegmt=True)) == 0
    assert retry_after_seconds("-3") == 0
    assert retry_after_seconds("soon") is None
    assert retry_after_seconds("nan") is None
    assert retry_after_seconds("Wed, 21 Oct 99999999 07:28:00 GMT") is None
    assert retry_after_seconds("Wed, 21 Oct " + "1" * 5000 + " 07:28:00 GMT") is None
    assert retry_after_seconds(None) is None


def test_delays_grow_are_capped_and_never_below_what_was_asked():
    backoff = Backoff(first=1.0, longest=8.0)
    for attempt, bound in [(0, 1.0), (1, 2.0), (2, 4.0), (3, 8.0), (9, 8.0), (5000, 8.0)]:
        delays = [backoff.delay(attempt, None) for _ in range(300)]
        assert all(0 <= delay <= bound for delay in delays)
        # Full jitter: 300 uniform draws have both a small and a large one (each fails with probability 0.8^300).
        assert min(delays) < 0.2 * bound
        assert max(delays) > 0.8 * bound
    assert all(30 <= backoff.delay(0, 30.0) <= 31 for _ in range(50))


def test_a_body_with_infinite_logprobs_is_read():
    body = json.loads(said("7", [("7", {"7": 0.0})]).body)
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"].append({"token": "8", "logprob": float("-inf")})
    with ScriptedJudge(lambda sent, before: Answer(json.dumps(body).encode())) as server:
        reply = ask_one(make_client(server.url))
    assert isinstance(reply, Reply)
    assert reply.tokens[0].candidates == (("7", 0.0),)
