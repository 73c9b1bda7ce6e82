"""How a model is put to the tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from dar.config.base import Count, Spec
from dar.files.paths import expanded


class LMEvalSpec(Spec):
    """How a model is put to the tasks of EleutherAI's lm-evaluation-harness."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; by default as many as the task says."""
    limit: Count | None = None
    """Only the first so many rows of each task; by default all."""
    batch_size: Count = 8
    """Rows of one pass through the model."""
    chat_template: bool = False
    """Questions are messages in the model's chat template. Without it they are plain text, as most published figures
    have it."""
    include_path: Annotated[str, AfterValidator(expanded)] | None = None
    """A folder with tasks of one's own, in lm-eval's YAML."""
