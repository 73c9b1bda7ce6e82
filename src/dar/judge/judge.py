"""A language model as a judge: scores completions, or compares two."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, TypeVar

from dar.config.rewards import JudgeRewardSpec
from dar.errors import require_package
from dar.files.paths import cache_root, expanded
from dar.judge.cache import ReplyCache
from dar.judge.client import Client, Session, sampling
from dar.judge.reply import CUT_OFF, Reply
from dar.judge.retry import Backoff
from dar.judge.scores import Scale, Score, read_score
from dar.judge.template import Messages, load_template
from dar.judge.verdicts import Preference, Verdict, read_verdict
from dar.rewards import Failed

Found = TypeVar("Found")


@dataclass(frozen=True)
class ScoreItem:
    """A completion to score.

    prompt: text, or chat messages.
    completion: its text.
    rubric: what to judge by, where the row says so itself.
    row: the other columns of the data.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    completion: str
    rubric: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairItem:
    """Two completions of a prompt to compare; the rest as in `ScoreItem`."""

    prompt: str | Sequence[Mapping[str, Any]]
    completion_a: str
    completion_b: str
    rubric: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


class Judge:
    """Asks an endpoint with a template, and reads what it says.

    Args:
        spec: of the reward; `mode` pointwise for `score`, pairwise for `compare`.
        backoff: how long to wait between attempts.

    Raises:
        ConfigError: the key's environment variable is not set, the template cannot be used, or the cache's folder
            cannot be made. Nothing is sent yet.

    The order of results is that of the items, whatever the order of answers; equal questions are asked once.
    """

    def __init__(self, spec: JudgeRewardSpec, *, backoff: Backoff | None = None) -> None:
        require_package("httpx2", "a judge")
        self.spec = spec
        self.client = Client(spec.endpoint, budget=spec.budget, price=spec.price, backoff=backoff)
        self.template = load_template(spec.template, spec.mode)
        self.cache = None if spec.cache is None else ReplyCache(cache_root() / expanded(spec.cache))
        self.scale = Scale(*spec.scale or (1, 10))
        self.min_mass = 0.1 if spec.min_score_mass is None else spec.min_score_mass

    def score(self, items: Sequence[ScoreItem]) -> list[Score | Failed]:
        """`score_async`, for those who are in no event loop."""
        return asyncio.run(self.score_async(items))

    def compare(self, items: Sequence[PairItem]) -> list[Preference | Failed]:
        """`compare_async`, for those who are in no event loop."""
        return asyncio.run(self.compare_async(items))

    async def score_async(self, items: Sequence[ScoreItem]) -> list[Score | Failed]:
        """A score for every item.

        Returns:
            One per item, in their order: a `Score`, or `Failed` where no answer came or none could be read.

        Raises:
            BudgetError: the budget does not reach; what was answered is in the cache.
            RewardError: the endpoint would refuse every request, or the template cannot be filled.
        """
        questions = [
            self.template.render(
                prompt=conversation_text(item.prompt),
                completion=item.completion,
                rubric=item.rubric,
                row=item.row,
                low=self.scale.low,
                high=self.scale.high,
            )
            for item in items
        ]
        return await self._ask(questions, self._read_score)

    async def compare_async(self, items: Sequence[PairItem]) -> list[Preference | Failed]:
        """A preference for every pair, each asked in both orders.

        Returns:
            One per item, in their order: a `Preference` with both verdicts, or `Failed` where one of them is missing.

        Raises:
            As `score_async`.
        """
        questions = [
            self.template.render(
                prompt=conversation_text(item.prompt),
                completion_a=first,
                completion_b=second,
                rubric=item.rubric,
                row=item.row,
            )
            for item in items
            for first, second in permutations([item.completion_a, item.completion_b])
        ]
        verdicts = await self._ask(questions, _read_verdict)
        return [_preference(forward, backward) for forward, backward in zip(verdicts[::2], verdicts[1::2], strict=True)]

    def _read_score(self, reply: Reply) -> Score | Failed:
        score = read_score(reply, self.scale, min_mass=self.min_mass)
        return score or _unread(f"no score from {self.scale.low} to {self.scale.high}", reply)

    async def _ask(
        self, questions: Sequence[Messages], read: Callable[[Reply], Found | Failed]
    ) -> list[Found | Failed]:
        """What was read of the answers, in the order of the questions."""
        by_key = {self._key(question): question for question in questions}
        known = self.cache.get(list(by_key)) if self.cache is not None else {}
        results = {key: read(known[key]) for key in by_key if key in known}
        counts = self.client.counts
        counts.cache_hits += len(results)
        # What another scale or `min_mass` could read, this one may not.
        counts.parse_failures += sum(isinstance(result, Failed) for result in results.values())
        missing = [key for key in by_key if key not in known]
        self.client.budget.require(len(missing))

        async def fetch(session: Session, key: str) -> None:
            reply = await session.ask(by_key[key])
            if isinstance(reply, Failed):
                results[key] = reply
                return
            results[key] = read(reply)
            if isinstance(results[key], Failed):
                counts.parse_failures += 1
            elif self.cache is not None:
                # At once, so that nothing paid for is lost when the run ends here.
                self.cache.put(key, reply)

        if missing:
            async with self.client.session() as session:
                await ask_all([fetch(session, key) for key in missing])
        return [results[self._key(question)] for question in questions]

    def _key(self, question: Messages) -> str:
        """SHA-256 of everything the answer depends on. Where the endpoint is, is not among it; nor is its key."""
        endpoint = self.client.endpoint
        parts = [endpoint.model, self.template.digest, question.system, question.user, sampling(endpoint)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_verdict(reply: Reply) -> Verdict | Failed:
    return read_verdict(reply) or _unread("neither A, B nor tie", reply)


def _unread(what: str, reply: Reply) -> Failed:
    cut = f", which was {CUT_OFF}" if reply.is_cut else ""
    return Failed(f"{what} in the judge's answer{cut}: {reply.text!r:.200}")


def _preference(forward: Verdict | Failed, backward: Verdict | Failed) -> Preference | Failed:
    if isinstance(forward, Failed):
        return forward
    return backward if isinstance(backward, Failed) else Preference(forward, backward)


async def ask_all(work: Sequence[Any]) -> None:
    """Everything at once; the first error cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def conversation_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as one text: as it is, the content of a single message, or the messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{str(message['role']).capitalize()}: {message['content']}" for message in prompt)
