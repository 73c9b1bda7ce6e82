"""What a trainer is given in Python, checked when it is made: all problems of a call at once, none at step 1."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import datasets
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dar.assembly.adapter import has_adapter
from dar.config.reward import RewardSpec
from dar.config.rewards import expand_reward
from dar.errors import ConfigError, DarError
from dar.files.hints import nearest_hint
from dar.files.tables import rows_of
from dar.policies.text.logprobs import unwrapped
from dar.reward_model.reward import Classifier
from dar.rewards import RewardFunction
from dar.rewards.foreign import ForeignCode
from dar.shown import one_line

GivenModel = str | Path | nn.Module
GivenRows = str | Path | Iterable[Mapping[str, Any]]
GivenReward = RewardFunction | RewardSpec | PreTrainedModel | Mapping[str, Any] | str | Path

_ELSEWHERE = {
    "tokenizer": "it is called processing_class",
    "compute_metrics": "the rewards measure the held-out rows of eval_dataset",
    "judge": "reward_funcs takes functions, models and judges alike",
    "optimizers": "args has optim, learning_rate and lr_scheduler_type",
    "tools": "a completion is one turn; a sampler of your own is an engine: overrides=['engine=my_module:MyEngine']",
    "data_collator": "rows are read by their columns: prepare the data set",
}
"""Arguments of TRL's trainers, and what has their place here."""

P = ParamSpec("P")
T = TypeVar("T")


class Problems(list[str]):
    """The problems of one call."""

    def of(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What the call gives; None where it raises a DarError, which is kept."""
        try:
            return make(*args, **kwargs)
        except DarError as error:
            self.append(str(error))
            return None

    def require_none(self, call: str) -> None:
        """Raises one ConfigError with all of them."""
        if self:
            many = f"{call} cannot be made of these arguments:\n" + "\n".join(f"  * {each}" for each in self)
            raise ConfigError(many if len(self) > 1 else self[0])


def settings_problems(trainer: type, kind: type[Any], args: object, unknown: Iterable[str]) -> Iterator[str]:
    """Of a trainer's settings, which are to be of a kind, and of arguments that it does not have."""
    known = [name for name in inspect.signature(trainer).parameters if name != "unknown"]
    for name in unknown:
        hint = nearest_hint(name, known) or f"; it has {', '.join(known)}"
        if name in _ELSEWHERE:
            hint = f": {_ELSEWHERE[name]}"
        elif name in kind.model_fields:
            hint = f": it belongs into args, {kind.__name__}({name}=…)"
        yield f"{trainer.__name__} has no argument {name}{hint}"
    if not isinstance(args, kind):
        advice = f"{kind.__name__}(**settings)" if isinstance(args, dict) else f"{kind.__name__}(output_dir=…, …)"
        yield f"args must be a {kind.__name__}, got {shown(args)}: write {advice}; most names are TRL's"


def model_problems(name: str, model: object) -> Iterator[str]:
    """Of what is to be a path or a causal language model, perhaps with an adapter."""
    inner = unwrapped(model)
    is_model = isinstance(inner, PreTrainedModel) and inner.can_generate() and not inner.config.is_encoder_decoder
    if not is_model and not isinstance(model, str | Path):
        hint = ". Are model and reward_funcs swapped?" if inspect.isroutine(model) else ""
        if is_classifier(model):
            hint = ". A classifier scores texts and writes none: pass it as reward_funcs; RewardTrainer trains one"
        expected = "a causal language model: a Hub id, a folder, or AutoModelForCausalLM.from_pretrained(…)"
        yield f"{name} is {shown(model)}; expected {expected}{hint}"


def part_problems(model: object, tokenizer: object, adapter: object) -> Iterator[str]:
    """Of the tokenizer and the adapter of the model that is trained."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        inside = "=processor.tokenizer" if hasattr(tokenizer, "tokenizer") else " as AutoTokenizer.from_pretrained(…)"
        yield f"processing_class is {shown(tokenizer)}, and no tokenizer: pass processing_class{inside}"
    elif tokenizer is None and isinstance(model, nn.Module) and described(model).startswith("<"):
        # Otherwise it is the one of the folder that the model came from.
        yield "a model given as an object needs its tokenizer: pass processing_class"
    if not isinstance(adapter, PeftConfig | None):
        yield f"peft_config is {shown(adapter)}; expected one of peft: LoraConfig(r=16, …)"
    elif adapter is not None and isinstance(model, nn.Module) and has_adapter(model):
        yield "the model has an adapter already: merge it into the model, or leave peft_config out"


def given_rows(data: Any, name: str) -> Any:
    """A path as text, or the rows as they were given; those of an iterator as a list, for it gives them only once.

    Raises:
        ConfigError: it is no table.
        DataError: there are no rows, or one is not a mapping.
    """
    if isinstance(data, str | Path | None):
        return None if data is None else str(data)
    if isinstance(data, datasets.IterableDataset):
        raise ConfigError(f"{name} comes row by row, but an epoch draws from all of them: pass list(data.take(10_000))")
    if isinstance(data, Iterator):
        data = list(data)
    # The rows of a data set are read once, when the run begins.
    if not isinstance(data, datasets.Dataset) or not len(data):
        rows_of(data, where=name)
    return data


def given_rewards(
    given: GivenReward | Sequence[GivenReward] | None, weights: Sequence[float] | None, tokenizers: Any
) -> tuple[list[dict[str, Any]], dict[str, RewardFunction | Classifier]]:
    """The rewards as a recipe has them, and those that are objects by their names.

    Args:
        given: one or several.
        weights: a factor of each, or None.
        tokenizers: of classifiers: one, or a list with an entry for each reward.

    Raises:
        ConfigError: one is no reward, or has two weights.
    """
    items: list[Any] = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    their = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(items)
    for what, values in ("reward_weights", weights), ("reward_processing_classes", their):
        if values is not None and len(values) != len(items):
            raise ConfigError(f"{what} has {len(values)} values for {len(items)} reward functions: give one for each")
    specs: list[dict[str, Any]] = []
    objects: dict[str, Any] = {}
    for index, (item, tokenizer) in enumerate(zip(items, their, strict=True)):
        where = f"reward_funcs[{index}]" if isinstance(given, list | tuple) else "reward_funcs"
        spec, known = _reward(item, tokenizer, where)
        if known is not None:
            name, number = spec["name"], 1
            while spec["name"] in objects:
                number += 1
                spec["name"] = f"{name}_{number}"
            objects[spec["name"]] = known
        if weights is not None and "weight" in spec:
            raise ConfigError(f"{where} has the weight {spec['weight']}, and reward_weights gives it another")
        specs.append(spec if weights is None else spec | {"weight": float(weights[index])})
    return specs, objects


def _reward(item: Any, tokenizer: Any, where: str) -> tuple[dict[str, Any], Any]:
    """A reward as a recipe has it, and the object it is, if it is one."""
    if isinstance(item, RewardSpec):
        return item.model_dump(exclude={"weight"} - item.model_fields_set), None
    if isinstance(item, str | Path | Mapping):
        return {"type": "model", "model": str(item)} if isinstance(item, Path) else dict(expand_reward(item)), None
    if is_classifier(item):
        path = described(item)
        if not isinstance(tokenizer, PreTrainedTokenizerBase) and (tokenizer is not None or path.startswith("<")):
            raise ConfigError(f"{where} is {shown(item)}: pass its tokenizer as reward_processing_classes")
        if item.config.num_labels != 1:
            raise ConfigError(f"{where} has {item.config.num_labels} outputs (num_labels), but a reward model has one")
        return {"type": "model", "model": path, "name": Path(path).name.strip("<>")}, Classifier(item, tokenizer)
    if isinstance(item, nn.Module) or inspect.isclass(item) or not callable(item):
        raise ConfigError(
            f"{where} is {shown(item)}, and no reward. A reward is a function f(completions, **columns) that returns a "
            "number for each completion, a name ('sentiment'), an import path ('my_rewards:fn'), a mapping or spec as "
            "in a recipe, or a sequence classifier with its tokenizer"
        )
    with ForeignCode(lambda kind, said: ConfigError(f"a reward function raised {kind} when asked its name: {said}")):
        name = str(getattr(item, "__name__", type(item).__name__))
        path = f"{getattr(item, '__module__', '?')}:{getattr(item, '__qualname__', name)}"
    return {"type": "function", "function": path, "name": name}, item


def is_classifier(model: object) -> bool:
    """Whether it is a sequence classifier of transformers, perhaps with an adapter."""
    return isinstance(model, nn.Module) and type(unwrapped(model)).__name__.endswith("ForSequenceClassification")


def described(value: Any, argument: str = "") -> str:
    """The path of something given by path, or what kind of object it is, and of which argument."""
    if isinstance(value, str | Path):
        return str(value)
    return getattr(getattr(value, "config", None), "name_or_path", "") or f"<{argument}{type(value).__name__}>"


def shown(value: Any) -> str:
    """What was found, in a few words."""
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"the {'class' if inspect.isclass(value) else 'function'} {getattr(value, '__name__', '?')}"
    return one_line(repr(value), 60) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
