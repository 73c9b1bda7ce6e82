"""What samples completions: the engine's protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol, runtime_checkable

from dar.batch import Prompt, Rollouts
from dar.config.data import DecodingSpec
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import PLAIN

Progress = Callable[[int], None]
"""Called with the number of tokens just sampled."""


class Engine(Protocol):
    """Samples completions with the weights it was last given.

    reproduces: what the same key gives again: the same "tokens", whatever is sampled beside them; the same for equal
        "requests" (prompts and number of completions); or "nothing".
    """

    reproduces: Literal["tokens", "requests", "nothing"]

    def sync(self, policy: Any, version: int) -> None:
        """Takes the policy's present weights; called before each `generate` that is to sample with them.

        Args:
            policy: whose weights they are, of the kind that the recipe's model is.
            version: their name: the number of completed steps.

        Raises:
            RolloutError: they cannot be taken.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        *,
        max_completion_length: int,
        key: SamplingKey,
        progress: Progress | None = None,
        decoding: DecodingSpec = PLAIN,
    ) -> Rollouts:
        """Samples `num_generations` completions of each prompt.

        Args:
            prompts: P prompts.
            num_generations: K.
            max_completion_length: most tokens per completion, EOS included.
            key: of the random numbers.
            progress: told about sampled tokens as they come.
            decoding: truncation, greedy choice, stop strings; training samples plainly and never passes it.

        Returns:
            Tokens, texts, finish reasons, the version of the weights behind each, and log-probabilities under the
            distribution that sampled: after temperature, min_new_tokens, top-k and top-p, renormalised (0 for every
            greedily chosen token).

        Raises:
            RolloutError: the model gave logits that are not finite.
            ConfigError: a row may become longer than the model's rotary factors are fixed for.
        """
        ...

    def close(self) -> None:
        """Gives back whatever it holds; nothing is sampled after this."""
        ...


@runtime_checkable
class BackgroundEngine(Engine, Protocol):
    """An engine with weights of its own, which can sample while others are learned."""

    def submit(self, *args: Any, **settings: Any) -> Future[Rollouts]:
        """As `generate`, of the same arguments, without waiting, and with the weights last synced, whatever is synced
        afterwards. `generate` is `submit` and waiting. Several are worked on in the order they were asked for.
        """
        ...
