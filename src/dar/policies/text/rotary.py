"""Up to which length a row's rotary factors are the same whatever else is in the batch."""

from __future__ import annotations

from typing import Any

from dar.errors import ConfigError


def fixed_length(config: Any) -> int | None:
    """Most tokens of a row whose rotary factors are those of every shorter one, or None where they always are.

    Behind it longrope and dynamic NTK have others, and transformers gives those of the longest row to the whole batch.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limits = []
    # For all layers, or a dictionary for each kind of layer.
    for each in (parameters, *parameters.values()):
        kind = str(each.get("rope_type")) if isinstance(each, dict) else ""
        if kind == "longrope":
            limits.append(each["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def require_fixed(model: Any, longest: int) -> None:
    """Raises ConfigError where a row of `longest` tokens has other rotary factors than shorter ones."""
    limit = fixed_length(model.config)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a row may have {longest} tokens, but behind {limit} the rotary factors of {type(model).__name__} change, "
            "and log-probabilities would depend on what else is in the batch: lower data.max_prompt_length or "
            "sampling.max_completion_length until both together fit."
        )
