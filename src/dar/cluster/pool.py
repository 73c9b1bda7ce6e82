"""Actors that do the same work: whoever is free is asked, and what one that dies was asked, another is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError

from dar.errors import ClusterError, DarError
from dar.rewards.background import start_in_background

_MOST_DEATHS = 8
"""Actors that one request may be the end of: with more of them it is no accident."""
LOGS = "Ray's logs on its machine (by default in /tmp/ray/session_latest/logs) say more"


class Pool:
    """Ray starts a dead actor again in its place, or on another node; it is asked again once it answers.

    Args:
        what: they are, for messages.
        actors: handles, each of one with a method `describe`.
        patience: seconds within which one of them must live.
        timeout: seconds in which one that lives must answer.
    """

    def __init__(self, what: str, actors: Sequence[Any], *, patience: float, timeout: float) -> None:
        self.what, self.actors, self.patience, self.timeout = what, actors, patience, timeout
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        for actor in actors:
            self._idle.put_nowait(actor)
        self._num_dead = 0
        self.num_again = 0
        """Requests that were asked again; whoever reads it sets it back."""

    async def ask(self, method: str, *arguments: Any, **settings: Any) -> Any:
        """What the method of an actor that is free returns. In the loop of `start_in_background` only.

        Raises:
            DarError: it raised that.
            ClusterError: none is there to ask, none answers, or one after another dies of it.
        """
        for _ in range(_MOST_DEATHS):
            actor, is_dead = await self._free(), False
            try:
                async with asyncio.timeout(self.timeout):
                    return await getattr(actor, method).remote(*arguments, **settings)
            except TimeoutError as error:
                raise ClusterError(
                    f"a {self.what} did not answer for {self.timeout:g} s (runtime.rank_timeout): it hangs, or is "
                    "slow. If it only needs longer, raise that key"
                ) from error
            except RayTaskError as error:
                raise own_error(error) from error
            except RayError:
                is_dead = True
                self.num_again += 1
            finally:
                if is_dead:
                    self._num_dead += 1
                    start_in_background(self._revived(actor))
                else:
                    self._idle.put_nowait(actor)
        raise ClusterError(f"{_MOST_DEATHS} times a {self.what} died of one request: mostly memory runs out. {LOGS}")

    async def _free(self) -> Any:
        while True:
            try:
                async with asyncio.timeout(self.patience):
                    return await self._idle.get()
            except TimeoutError as error:
                if self._num_dead == len(self.actors):
                    raise ClusterError(
                        f"no {self.what} is left, and for {self.patience:g} s (cluster.patience) none could be started "
                        "again: the cluster has no room for one. `ray status` shows what it has"
                    ) from error

    async def _revived(self, actor: Any) -> None:
        is_dead = True
        while is_dead:
            try:
                with suppress(RayTaskError):  # it lives; what is wrong with it is said when it is asked
                    await actor.describe.remote()
                is_dead = False
            except RayError:
                await asyncio.sleep(1)
        self._num_dead -= 1
        self._idle.put_nowait(actor)


def own_error(error: RayTaskError) -> Exception:
    """What an actor raised, where it was meant to be read; else all that Ray says of it."""
    return error.cause if isinstance(error.cause, DarError) else error
