"""What samples completions, from its spec."""

from __future__ import annotations

import inspect

from dar.config.engine import AnyEngine, InProcessSpec
from dar.errors import ConfigError
from dar.rewards import load_function
from dar.rewards.foreign import ForeignCode
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.protocol import Engine


def build_engine(spec: AnyEngine) -> Engine:
    """The engine; it has no weights before its first `sync`.

    Raises:
        ConfigError: its class cannot be imported, does not take the arguments, or has not the methods of an engine.
    """
    if isinstance(spec, InProcessSpec):
        return InProcessEngine(max_tokens=spec.max_cache_tokens, in_place=spec.in_place)
    kind = load_function(spec.type, what="engine")
    with ForeignCode(lambda kind, said: ConfigError(f"engine {spec.type} cannot be made: {kind}: {said}")):
        inspect.signature(kind).bind(**spec.settings)
        engine = kind(**spec.settings)
    missing = [name for name in ("reproduces", "sync", "generate", "close") if not hasattr(engine, name)]
    if missing:
        raise ConfigError(f"engine {spec.type} lacks {', '.join(missing)}: see dar.rollout.protocol.Engine")
    return engine
