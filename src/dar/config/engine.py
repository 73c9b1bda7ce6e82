"""Specs of what samples completions, one per `type`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dar.config.base import Count, OwnSpec, Positive, Spec


class InProcessSpec(Spec):
    """Sample in the trainer's process, with its own weights."""

    type: Literal["in_process"] = "in_process"
    """`in_process`"""
    max_cache_tokens: Count = 16384
    """Prompt and completion tokens whose keys and values the sampler holds at once; further prompts wait their turn."""
    in_place: bool = False
    """Read the trainer's weights as they are. By default layers whose weights are not in the compute precision, and on
    a CPU all, are read from copies made for each step: 4 bytes a parameter (2 in bf16) for about half of the time."""


class VLLMSpec(Spec):
    """Have a vLLM server sample, which lives in a Python environment of its own ([engines](engines.md#vllm))."""

    type: Literal["vllm"] = "vllm"
    """`vllm`"""
    python: str | None = None
    """The interpreter of vLLM's environment, with which the run starts a server and stops it again; by default that of
    the environment variable `DAR_VLLM_PYTHON`, else `.venv-vllm/bin/python`."""
    url: str | None = None
    """Of a server that somebody else has started, instead: `http://host:port`."""
    own_numbers: bool = True
    """Draw tokens with the library's own random numbers and code, which the server has to have loaded: the completions
    are then those of `in_process`, up to rounding. Otherwise vLLM draws, seeded for every completion."""
    folder: str | None = None
    """Through which weights reach the server, which must see it, too; by default one in memory (`/dev/shm`)."""
    cache_gb: Positive = 2.0
    """Memory for the server's cache of keys and values, in GB (10⁹ bytes)."""
    timeout: Annotated[float, Field(ge=1, le=1e6)] = 900.0
    """Seconds within which a server must have started, and have answered a request."""
    arguments: list[str] = Field(default_factory=list)
    """Further arguments of the server's command line, as in `[--max-model-len, "4096"]`."""

    @model_validator(mode="after")
    def _one_server(self) -> VLLMSpec:
        if self.url is not None and (self.python is not None or self.arguments):
            raise ValueError("url names a server that runs already: python and arguments are for one that is started")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url must begin with http:// or https://")
        return self


class OwnEngineSpec(OwnSpec):
    """Your own class, by import path, with the methods of `dar.rollout.protocol.Engine`. Further keys are its arguments
    ([design](design.md#seams))."""


def _kind(value: Any) -> str:
    """Which spec is meant, so that a mistake is explained once."""
    name = value.get("type", "in_process") if isinstance(value, dict) else getattr(value, "type", None)
    return "package.module:Class" if ":" in str(name) else str(name)


AnyEngine = Annotated[
    Annotated[InProcessSpec, Tag("in_process")]
    | Annotated[VLLMSpec, Tag("vllm")]
    | Annotated[OwnEngineSpec, Tag("package.module:Class")],
    Discriminator(_kind),
]
