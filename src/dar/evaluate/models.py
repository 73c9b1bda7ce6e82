"""What evaluations need of specs: prompts, a model that completes them, and a reward that judges."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import TypeAdapter, ValidationError

from dar.assembly.engine import build_engine
from dar.batch import Prompt
from dar.config.data import DataSpec, DecodingSpec, EvalSamplingSpec
from dar.config.engine import InProcessSpec
from dar.config.model import ModelSpec
from dar.config.problems import explain
from dar.config.recipe import read_yaml
from dar.config.rewards import AnyReward, expand_reward
from dar.config.run import RuntimeSpec
from dar.data.prompts import prepare_prompts
from dar.errors import ConfigError
from dar.evaluate.generate import Generator
from dar.files.tables import Row
from dar.policies.precision import resolve_precision
from dar.policies.text.loading import context_length, load_config, load_model, load_tokenizer
from dar.policies.text.policy import Policy
from dar.policies.text.rendering import prompt_ids


def read_prompts(
    model: str,
    rows: Sequence[Row],
    sampling: EvalSamplingSpec,
    *,
    prompt_column: str,
    where: str,
    num_completions: int = 1,
) -> tuple[Prompt, ...]:
    """A file's prompts as a model reads them; its weights are not loaded.

    Args:
        model: Hub id, folder or `.gguf` file.
        rows: of the file.
        sampling: how completions are to be drawn.
        prompt_column: of the rows.
        where: the file, for messages.
        num_completions: for which a prompt must leave room; two where another turn is to follow.

    Raises:
        ConfigError: the model cannot be had, has no chat template, or no room for a prompt.
        DataError: a prompt cannot be used, or is too long.
    """
    spec = ModelSpec.model_validate({"path": model})
    wrap = not sampling.is_plain
    data = DataSpec.model_validate({"train": where, "wrap_as_user": wrap, "prompt_column": prompt_column})
    tokenizer = load_tokenizer(spec)
    if wrap and not tokenizer.chat_template:
        raise ConfigError(f"{model} has no chat template: add --plain to give it the prompts as they are")
    context = context_length(load_config(spec))
    room = num_completions * sampling.max_tokens
    if context is not None and context <= room:
        times = f", {num_completions} times" if num_completions > 1 else ""
        raise ConfigError(f"--max-tokens is {sampling.max_tokens}{times}, but {model} reads at most {context} tokens")
    longest = None if context is None else context - room
    advice = f"{model} reads {context} tokens: lower --max-tokens, or leave them out."
    read = partial(prompt_ids, tokenizer)
    return prepare_prompts(rows, read, data, max_prompt_length=longest, where=where, advice=advice).prompts


def build_generators(model: str, sampling: EvalSamplingSpec, temperatures: Sequence[float]) -> dict[float, Generator]:
    """A model, loaded once, ready to complete prompts at several temperatures.

    Args:
        model: Hub id, folder or `.gguf` file.
        sampling: how completions are drawn, at each of the temperatures.
        temperatures: 0 = the likeliest token every time.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    spec = ModelSpec.model_validate({"path": model})
    causal_lm, tokenizer, precision = load_model(spec), load_tokenizer(spec), resolve_precision(RuntimeSpec())
    engine = build_engine(InProcessSpec())
    engine.sync(Policy(causal_lm, tokenizer, precision, temperature=1.0, with_reference=False), 0)
    decodings = {each: DecodingSpec(greedy=each == 0, temperature=each or None) for each in temperatures}
    return {each: Generator(engine, sampling.max_tokens, sampling.seed, decodings[each]) for each in temperatures}


def read_judge(judge: str) -> AnyReward:
    """The spec of a judge: what an entry of a recipe's `rewards:` may be, or a YAML file with one.

    Raises:
        ConfigError: the file cannot be read, or it is no reward.
    """
    entry = expand_reward(read_yaml(judge) if judge.endswith((".yaml", ".yml")) else judge)
    try:
        return TypeAdapter(AnyReward).validate_python(entry)
    except ValidationError as error:
        problems = "; ".join(explain(error, entry if isinstance(entry, dict) else {}))
        raise ConfigError(
            f"--judge {judge} is not a reward: {problems}. It is what an entry of a recipe's `rewards:` may be (a name "
            "such as sentiment, or package.module:function), or a YAML file with the keys of one (docs/recipes.md)."
        ) from error
