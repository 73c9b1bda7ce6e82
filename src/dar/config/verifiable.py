"""Specs of rewards that check something: answers, instructions, structure, and one's own code in a sandbox."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dar.config.base import FunctionPath, Positive, Spec
from dar.config.reward import RewardSpec


class FunctionPathSpec(RewardSpec):
    """What rewards that are a Python function share."""

    function: FunctionPath
    """`package.module:function`, looked for in the working directory too, or `file.py:function`."""


class SandboxSpec(Spec):
    """What rewards that run in processes of their own share."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Processes at once."""
    timeout_seconds: Positive = 10.0
    """Most a completion may take; then its process is killed, and the score has failed (`on_failure`)."""
    memory_gb: Positive = 2.0
    """Most memory (address space) a call may take beyond what its process has after its imports; Linux only."""
    max_processes: Annotated[int, Field(ge=0)] = 8
    """Processes a call may have running; with more it is killed."""


class SandboxedRewardSpec(SandboxSpec, FunctionPathSpec):
    """A Python function, by import path, in processes of its own, one completion at a time: a hang, a crash, a memory
    blow-up or an exception costs that completion's score (`on_failure`), never the run."""

    type: Literal["sandboxed"] = "sandboxed"


class MathRewardSpec(SandboxSpec, RewardSpec):
    """1 where the completion's final answer equals the gold answer as mathematics, 0 where not (math-verify)."""

    type: Literal["math"] = "math"
    column: str = "answer"
    """Column with the gold answer: a number, LaTeX, words, or a solution that ends in `#### number` (GSM8K)."""


class ReasoningGymRewardSpec(SandboxSpec, RewardSpec):
    """The score reasoning-gym gives an answer to one of its tasks; for data from `reasoning_gym:TASK`."""

    type: Literal["reasoning_gym"] = "reasoning_gym"


class IFEvalRewardSpec(RewardSpec):
    """IFEval's verifiable instructions (arXiv:2311.07911), from the columns `instruction_id_list` and `kwargs`."""

    type: Literal["ifeval"] = "ifeval"
    strictness: Literal["strict", "loose"] = "strict"
    """`loose` forgives a first line, a last line and asterisks."""
    credit: Literal["share", "all"] = "share"
    """The share of the instructions that are followed, or 1 where all are and else 0."""


class JsonSchemaRewardSpec(RewardSpec):
    """1 where the completion is JSON (in a code fence or not) that a schema allows, 0 elsewhere."""

    type: Literal["json_schema"] = "json_schema"
    path: str
    """JSON or YAML file with the schema."""


class FormatRewardSpec(RewardSpec):
    """The share of tags in their place: `<tag>…</tag>` opened once, closed once, not empty, in the order given."""

    type: Literal["format"] = "format"
    tags: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["think", "answer"])
    """Their names."""

    @field_validator("tags")
    @classmethod
    def _are_names(cls, value: list[str]) -> list[str]:
        wrong = [tag for tag in value if not re.fullmatch(r"[\w-]+", tag)]
        if wrong or len(set(value)) < len(value):
            raise ValueError(f"tags are different names without brackets, such as [think, answer]; got {value}")
        return value


VerifiableReward = (
    SandboxedRewardSpec
    | MathRewardSpec
    | ReasoningGymRewardSpec
    | IFEvalRewardSpec
    | JsonSchemaRewardSpec
    | FormatRewardSpec
)
