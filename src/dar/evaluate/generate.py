"""Completions of a prompt set by the trainer's engine, appended to a file as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dar.batch import Message, Prompt
from dar.config.data import DecodingSpec
from dar.evaluate.folder import Lines
from dar.rollout.protocol import Engine
from dar.rollout.sampling import SamplingKey

CHUNK = 16
"""Prompts sampled together, and so lost at most when an evaluation is interrupted."""

Content = str | list[Message]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Generator:
    """A model that completes prompts, one completion each."""

    engine: Engine
    max_completion_length: int
    seed: int
    decoding: DecodingSpec

    def complete(self, prompts: Sequence[Prompt], lines: Lines, note: Note) -> None:
        """Completes what the file does not have yet: rows with `key`, `prompt`, `completion` and `finish_reason`.

        A prompt's position is its key, and keys its random numbers: they are the same wherever an evaluation continues.
        """
        missing = [prompt for prompt in prompts if (str(prompt.position),) not in lines]
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            rollouts = self.engine.generate(
                chunk,
                1,
                max_completion_length=self.max_completion_length,
                key=SamplingKey(self.seed, "sample"),
                decoding=self.decoding,
            )
            lines.append(
                {"key": str(prompt.position), "prompt": prompt.content, "completion": text, "finish_reason": reason}
                for prompt, text, reason in zip(chunk, rollouts.texts, rollouts.finish_reasons, strict=True)
            )
            note(f"{lines.path.stem}: {len(prompts) - len(missing) + start + len(chunk)} of {len(prompts)}")
