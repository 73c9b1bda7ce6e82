"""An adapter on a model, and the proof that trainer, sampler and saved folder take it for the same thing.

A fresh adapter changes nothing, so whoever reads it wrongly is right about it: its weights are moved, and put back.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from dar.batch import TokenGroups
from dar.config.model import LoraSpec
from dar.errors import ConfigError
from dar.policies.text.frozen import is_linear
from dar.policies.text.loading import add_lora, put_on
from dar.policies.text.logprobs import LogprobModel, unwrapped
from dar.rollout.in_process.weights import merged_copy
from dar.shown import first_line, one_line

_CLOSE = 1e-3
_UNSAID = {"task_type", "peft_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "target_modules",
           "peft_version"}  # fmt: skip


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has an adapter of peft's."""
    return hasattr(model, "peft_config") or any(isinstance(module, BaseTunerLayer) for module in model.modules())


@torch.no_grad()
def adapted(model: Any, lora: LoraSpec | PeftConfig | None, *, seed: int) -> Any:
    """The model with an adapter that is one policy to all who read it.

    Args:
        model: a causal language model; without an adapter where `lora` is given.
        lora: the adapter, or None where the model came with it.
        seed: of a new adapter's first weights.

    Raises:
        ConfigError: the adapter cannot be made, trains what is on when it is off, or is another policy merged, in
            training mode or read back from its folder.
    """
    if lora is not None and has_adapter(model):
        raise ConfigError("the model has an adapter already: merge it into the model first, or leave peft_config out")
    config: Any = lora or getattr(model, "active_peft_config", None)
    try:
        groups, module = _a_few_tokens(model, config), LogprobModel(model, temperature=1.0)
        if lora is None:
            with model.disable_adapter():
                before = module(groups).logprobs
        else:
            before = module(groups).logprobs
            model = add_lora(model, lora, seed=seed)
            config = model.active_peft_config
        problem = _problem(model, lambda: module(groups).logprobs, groups, before)
    except ConfigError:
        raise
    except Exception as error:  # whatever a kind of adapter raises that was made for something else
        problem = f"trying it out ended in {first_line(error)}"
    if problem:
        raise ConfigError(
            f"the adapter {_described(config)} cannot be trained here: {problem.rstrip('.')}. Leave out what is not "
            "plain, or take model.lora or LoraConfig(r=…, lora_alpha=…, target_modules=…)"
        )
    return model


def require_named_base(model: Any) -> None:
    """An adapter's folder names the model it belongs to; so a model given as an object must be what that name holds.

    Raises:
        ConfigError: its embeddings were resized, or its weights changed, since it was loaded from there.
    """
    inner = _bare(model) if has_adapter(model) else model
    own, source = inner.state_dict(), inner.name_or_path
    file = source and cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False,
                                  _raise_exceptions_for_connection_errors=False)  # fmt: skip
    for weights in sorted(Path(file).parent.glob("*.safetensors")) if file else ():
        with safe_open(weights, "pt") as saved:
            # What is packed (8 bits and fewer) is unpacked by rules of its own, and not compared.
            for name in sorted(own.keys() & set(saved.keys())):
                part, mine = saved.get_slice(name), own[name]
                if mine.ndim == 0 or part.get_dtype() not in ("F32", "BF16", "F16"):
                    continue
                # As it was saved, or rounded when it was loaded.
                theirs = [part[:1].to(dtype).float() for dtype in (torch.float32, torch.bfloat16, torch.float16)]
                if part.get_shape() != list(mine.shape) or not any(map(mine[:1].cpu().float().equal, theirs)):
                    raise ConfigError(
                        f"the model given is not the one in {source}, which it names as its source: {name} differs, "
                        "so the adapter's folder would name another model as its base. Save it first, "
                        "model.save_pretrained('base') and tokenizer.save_pretrained('base'), and pass 'base' as model"
                    )


def _problem(model: Any, read: Callable[[], Tensor], groups: TokenGroups, before: Tensor) -> str | None:
    """What is wrong with the adapter of a model, or None.

    `read` gives the log-probabilities of `groups` as the trainer computes them; `before`, what they are without it.
    """
    if not hasattr(model, "merge_and_unload"):
        return "its kind cannot be merged into the model's weights"
    if hasattr(model, "update_and_allocate"):
        return "its ranks are to be adapted between steps, which is not done here"
    bare = _bare(model)
    with _moved(model), tempfile.TemporaryDirectory() as folder:
        model.train()
        with torch.enable_grad():
            training = read().detach()
        model.eval()
        with model.disable_adapter():
            off = read()
        with _merging_compared(model) as different:
            on = read()
        if not (on - before).abs().max() > _CLOSE:
            return "what it trains has no effect on the log-probabilities (is anything of it trainable?)"
        if not _agree(off, before):
            return "with it off, the model is not what it was without it, so π₀ would be another model, or move"
        if not _agree(training, on):
            return "in training mode it is another policy"
        if different:
            return f"merged, its layer {different[0]} computes something else"
        if shared := _shared_targets(model):
            return (
                f"its target {shared[0]} shares a weight with another layer (tied embeddings), and merging changes both"
            )
        model.save_pretrained(folder)
        if not _agree(LogprobModel(put_on(bare, folder), temperature=1.0, packed=False)(groups).logprobs, on):
            return "read back from its folder it is another model"
    return None


def _agree(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE)


def _a_few_tokens(model: Any, config: Any) -> TokenGroups:
    """Two completions of a prompt, with tokens whose embeddings alone are trained among them, if there are any."""
    named = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    named = [token for each in named.values() for token in each] if isinstance(named, dict) else list(named)
    tokens = torch.tensor([*named[:6], *range(1, 13)])[:12] % model.config.get_text_config().vocab_size
    return TokenGroups((tuple(tokens[:2].tolist()),), (2,), tokens[2:].view(2, 5), torch.ones(2, 5, dtype=torch.bool))


def _described(config: Any) -> str:
    """A configuration's class, and its fields that are not at their defaults."""
    if not dataclasses.is_dataclass(config):
        return type(config).__name__
    plain = {each.name: each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
             for each in dataclasses.fields(config)}  # fmt: skip
    changed = [f"{name}={value!r}" for name in plain if (value := getattr(config, name)) != plain[name]]
    return one_line(f"{type(config).__name__}({', '.join(c for c in changed if c.partition('=')[0] not in _UNSAID)})")


@contextlib.contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Inside, all that is trained is elsewhere; afterwards no trace of it is left, nor of random numbers drawn."""
    kept = [(each, each.clone(), each.requires_grad) for each in (*model.parameters(), *model.buffers())
            if each.requires_grad or not isinstance(each, nn.Parameter)]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        try:
            for each, value, is_trained in kept:
                if is_trained:
                    scale = max(0.02, 0.1 * float(value.square().mean().sqrt()))
                    each.add_(torch.randn(each.shape, generator=generator).to(each) * scale)
            yield
        finally:
            for each, value, is_trained in kept:
                each.copy_(value).requires_grad_(is_trained)


@contextlib.contextmanager
def _merging_compared(model: nn.Module) -> Iterator[list[str]]:
    """The layers that, whenever they run inside, compute something else than what they are merged into, by name."""
    different: list[str] = []

    def compare(name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        merged = merged_copy(layer)
        base = merged.get_base_layer()
        found = (base if is_linear(base) else merged).forward(*args, **kwargs)
        found, output = (each if isinstance(each, Tensor) else each[0] for each in (found, output))
        if not torch.allclose(found, output, rtol=_CLOSE, atol=_CLOSE * float(output.abs().max())):
            different.append(name)

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                hook = functools.partial(compare, name)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield different


def _shared_targets(model: nn.Module) -> list[str]:
    """Layers with an adapter on a weight that another layer has too; trained tokens are the same in both."""
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and not hasattr(layer, "token_indices")
        and any(uses[id(weight)] > 1 for weight in layer.get_base_layer().parameters(recurse=False))
    ]


def _bare(model: Any) -> Any:
    """The model without its adapter, the weights shared."""
    inner = unwrapped(model)
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in inner.parameters()}
    for module in inner.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
        elif isinstance(module, BaseTunerLayer):
            memo[id(module)] = copy.deepcopy(module.get_base_layer(), memo)
    bare = copy.deepcopy(inner, memo)
    del bare.peft_config
    return bare
