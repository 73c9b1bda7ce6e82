"""What samples completions, from its spec."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path

from dar.config.engine import AnyEngine, InProcessSpec, VLLMSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.rewards import load_function
from dar.rewards.foreign import ForeignCode
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.protocol import BackgroundEngine, Engine
from dar.rollout.vllm.engine import VLLMEngine

log = logging.getLogger(__name__)


def require_submit(spec: RunSpec, engine: Engine) -> None:
    """Raises ConfigError where completions are to be sampled while the policy learns, and the engine cannot."""
    if spec.sampling.max_staleness and not isinstance(engine, BackgroundEngine):
        raise ConfigError(
            f"sampling.max_staleness has completions sampled while the policy learns, but {spec.engine.type} has no "
            "`submit` (see dar.rollout.protocol.BackgroundEngine): add one, or leave max_staleness at 0"
        )


def build_engine(
    spec: AnyEngine, *, log_file: Path = Path("vllm.log"), say: Callable[[str], None] = log.info
) -> Engine:
    """The engine; it has no weights before its first `sync`. A server it starts has a log, and `say` is told of it.

    Raises:
        ConfigError: its class cannot be imported, does not take the arguments, or has not the methods of an engine.
    """
    if isinstance(spec, InProcessSpec):
        return InProcessEngine(max_tokens=spec.max_cache_tokens, in_place=spec.in_place)
    if isinstance(spec, VLLMSpec):
        return VLLMEngine(spec, log_file=log_file, say=say)
    kind = load_function(spec.type, what="engine")
    with ForeignCode(lambda kind, said: ConfigError(f"engine {spec.type} cannot be made: {kind}: {said}")):
        inspect.signature(kind).bind(**spec.settings)
        engine = kind(**spec.settings)
    missing = [name for name in ("reproduces", "sync", "generate", "close") if not hasattr(engine, name)]
    if missing:
        raise ConfigError(f"engine {spec.type} lacks {', '.join(missing)}: see dar.rollout.protocol.Engine")
    return engine
