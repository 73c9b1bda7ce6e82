"""A judge behind a real server that is not ours: `transformers serve` around a tiny model, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from support.judged_runs import judged_training, reported, reported_in_full, weights_of
from test_judge import make_judge

from dar.judge import Judge, PairItem, ScoreItem
from dar.judge.template import Messages
from dar.rewards import Failed

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve needs fastapi, uvicorn and openai, which the dev group has",
)
OUTAGE_SECONDS = float(os.environ.get("DAR_TEST_OUTAGE_SECONDS", "0"))
"""How long the server stays away, beside the time it takes to start."""
START_SECONDS = 300.0
SCORES = "23456789"
"""Of one token each; a 1 that is cut off there might have been 10."""
FORCED = 1000.0
"""A bias that no logit outweighs."""


class Served:
    """`transformers serve` on loopback; it may be killed and started again on the same port."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Starts it, and waits until it listens."""
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(self.folder), "--device", "cpu"]
        self.log.write_bytes(b"")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)], stdout=log, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + START_SECONDS
        while not (found := re.search(r"Uvicorn running on http://127\.0\.0\.1:(\d+)", self.said())):
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.05)
        self.port = int(found[1])

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def num_answered(self) -> int:
        """Chat completions since it was started."""
        return self.said().count('"POST /v1/chat/completions HTTP/1.1" 200')

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("serve")
    # Bytes are tokens, and the library's templates have many.
    make_model(max_position_embeddings=4096).save_pretrained(root / "tiny-judge")
    make_tokenizer().save_pretrained(root / "tiny-judge")
    server = Served(root / "tiny-judge", root / "log.txt")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def held_to(choices: str) -> dict[str, Any]:
    """Settings under which a model that has learned nothing says one of these characters."""
    tokenizer = make_tokenizer()
    bias = {str(tokenizer.convert_tokens_to_ids(choice)): FORCED for choice in choices}
    return {"max_tokens": 1, "parameters": {"logit_bias": bias}}


def expected(judge: Judge, choices: str, **values: Any) -> str:
    """Which of the choices the model itself has for the likeliest answer to a question."""
    tokenizer: Any = make_tokenizer()
    question: Messages = judge.template.render(prompt="p", rubric=None, row={}, **values)
    messages = [{"role": "system", "content": question.system}, {"role": "user", "content": question.user}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        logits = make_model(max_position_embeddings=4096)(**inputs).logits[0, -1]
    return max(choices, key=lambda choice: float(logits[tokenizer.convert_tokens_to_ids(choice)]))


def judge_of(served: Served, mode: str, **settings: Any) -> Judge:
    return make_judge(served.url, mode, model=str(served.folder), **settings)


TEXTS = ["rain", "It rains.", "Nobody knows.", "zzzzzzzzzzzzzzzzzz", "<b>7</b>", "Ünïcödé ✓"]


def test_scores(served: Served):
    judge = judge_of(served, "pointwise", concurrency=4, **held_to(SCORES))
    scores = judge.score([ScoreItem("p", text) for text in TEXTS])
    wanted = [expected(judge, SCORES, completion=text, low=1, high=10) for text in TEXTS]
    assert len(set(wanted)) > 1, "a judge that always says the same tests nothing"
    assert [score if isinstance(score, Failed) else score.text for score in scores] == wanted
    # It was asked for log-probabilities and gives none: the number in the text counts.
    assert judge.client.endpoint.top_logprobs > 0
    values = [(score.value, score.mass) for score in scores if not isinstance(score, Failed)]
    assert values == [(float(text), None) for text in wanted]
    counts = judge.client.counts.drain()
    assert (counts["requests"], counts["completion_tokens"]) == (len(TEXTS), len(TEXTS))
    assert counts["prompt_tokens"] > 100 * len(TEXTS)


def test_preferences(served: Served):
    judge = judge_of(served, "pairwise", concurrency=4, **held_to("AB"))
    pairs = [(first, second) for first in TEXTS[:4] for second in TEXTS[:4] if first < second]
    found = judge.compare([PairItem("p", first, second) for first, second in pairs])
    for (first, second), preference in zip(pairs, found, strict=True):
        assert not isinstance(preference, Failed)
        orders = ((first, second), (second, first))
        wanted = [expected(judge, "AB", completion_a=a, completion_b=b) for a, b in orders]
        assert [preference.forward.text, preference.backward.text] == wanted
        assert preference.winner == {"AB": "a", "BA": "b"}.get("".join(wanted), "tie")


def test_an_answer_without_a_score(served: Served):
    (failed,) = judge_of(served, "pointwise", **held_to("x")).score([ScoreItem("p", "c")])
    assert failed == Failed(
        "no score from 1 to 10 in the judge's answer, which was cut off at its limit of tokens (a judge that thinks "
        "first needs more: raise max_tokens of its endpoint): 'x'"
    )


def test_refusals(served: Served):
    unknown = judge_of(served, "pointwise", parameters={"guided_choice": ["1", "2"]})
    assert unknown.score([ScoreItem("p", "c")]) == [
        Failed(
            "the judge refused the request: 422: "
            """{"detail":"Unexpected fields in the request: {'guided_choice'}"}"""
        )
    ]
    (failed,) = make_judge(served.url, model="another").score([ScoreItem("p", "c")])
    assert isinstance(failed, Failed)
    assert f"400: {{\"detail\":\"Server is pinned to '{served.folder}'; requested 'another'." in failed.reason


def test_a_server_that_is_killed_in_mid_run_changes_nothing(
    served: Served, write_recipe: Callable[..., Path], tmp_path: Path
):
    train = judged_training(write_recipe, tmp_path)
    settings = {"model": str(served.folder), "concurrency": 2, "patience": 900, **held_to(SCORES)}
    calm = train("calm", served.url, endpoint=settings, cache=None)
    over = threading.Event()

    def kill_and_restart(after: int) -> None:
        while served.num_answered() < after and not over.wait(0.005):
            pass
        served.kill()
        over.wait(OUTAGE_SECONDS)
        served.start()

    # 3 steps of 8 completions: the server dies in the second one.
    killer = threading.Thread(target=kill_and_restart, args=(served.num_answered() + 10,))
    killer.start()
    try:
        stormy = train("stormy", served.url, endpoint=settings, cache=None)
    finally:
        over.set()
        killer.join()
    scores = [[row["rewards/judge/mean"] for row in reported_in_full(folder)] for folder in (calm, stormy)]
    assert scores[0] == scores[1]
    assert len(set(scores[0])) > 1
    assert sum(row["rewards/judge/retries"] for row in reported_in_full(stormy)) > 0, "the outage was noticed"
    assert weights_of(calm) == weights_of(stormy)
    assert reported(calm) == reported(stormy)
