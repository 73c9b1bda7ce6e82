"""Asking actors that die, without Ray's processes: what counts is who is asked what, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="runs on a cluster need the extra ray")
from ray.exceptions import ActorDiedError, RayTaskError

from dar.cluster.pool import Pool
from dar.cluster.rewards import RemoteReward, shared_out
from dar.errors import ClusterError, RewardError
from dar.rewards.background import start_in_background
from dar.rewards.function import Logged


class Actor:
    """Dies at its first `deaths` requests, and answers `describe` after that many calls of it."""

    def __init__(self, name: str, *, deaths: int = 0, silent: int = 0, error: Exception | None = None) -> None:
        self.name, self.deaths, self.silent, self.error = name, deaths, silent, error
        self.asked: list[Any] = []
        self.score = SimpleNamespace(remote=self._score)
        self.describe = SimpleNamespace(remote=self._describe)

    async def _score(self, *arguments: Any) -> Any:
        self.asked.append(arguments)
        if len(self.asked) <= self.deaths:
            raise ActorDiedError
        if self.error is not None:
            raise RayTaskError("score", "a traceback", self.error)
        return [float(len(text)) for text in arguments[2]["completions"]], {"worker": float(self.name)}, Logged()

    async def _describe(self) -> str:
        self.silent -= 1
        if self.silent >= 0:
            raise ActorDiedError
        return self.name


def make_pool(*actors: Actor, patience: float = 60.0) -> Pool:
    return Pool("reward worker", actors, patience=patience, timeout=60)


ARGUMENTS = {"completions": ["a", "bb", "ccc", "dddd", "e", "ff"], "group_ids": [0, 0, 1, 1, 2, 2]}


def scores(pool: Pool, num_shares: int) -> tuple[list[Any], dict[str, float]]:
    reward = RemoteReward(pool, "rewards", 0, num_shares)
    return start_in_background(reward(**ARGUMENTS)).result(timeout=30), reward.metrics()


def test_what_a_dead_worker_was_asked_another_answers_once():
    dying, other = Actor("1", deaths=1, silent=10**9), Actor("2")
    pool = make_pool(dying, other)
    values, said = scores(pool, num_shares=2)
    assert values == [1.0, 2.0, 3.0, 4.0, 1.0, 2.0]
    assert said == {"worker": 2.0}
    assert [len(asked[2]["completions"]) for asked in (*dying.asked, *other.asked)] == [2, 2, 4]
    assert pool.num_again == 1


def test_the_only_worker_is_asked_again_once_it_is_back():
    pool = make_pool(alone := Actor("1", deaths=2, silent=1))
    assert scores(pool, num_shares=1)[0] == [1.0, 2.0, 3.0, 4.0, 1.0, 2.0]
    assert len(alone.asked) == 3


@pytest.mark.parametrize(
    ("actor", "kind", "message"),
    [
        (Actor("1", error=RewardError("no such letter")), RewardError, "^no such letter$"),
        (Actor("1", deaths=8), ClusterError, "8 times a reward worker died of one request"),
        (
            Actor("1", deaths=1, silent=10**9),
            ClusterError,
            r"no reward worker is left, and for 0.1 s",
        ),
    ],
)
def test_errors(actor: Actor, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        scores(make_pool(actor, patience=0.1), num_shares=1)


def test_the_completions_of_a_prompt_go_to_one_worker():
    parts = shared_out({"group_ids": [3, 3, 4, 5, 5, 5], "texts": ("a", "b", "c", "d", "e", "f")}, 2)
    assert [part["texts"] for part in parts] == [("a", "b"), ("c", "d", "e", "f")]
    assert len(shared_out({"group_ids": [0, 0]}, 5)) == 1
