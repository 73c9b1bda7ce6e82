"""`dar sample`: completions of one prompt."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from dar.cli.common import AsJson, ModelArgument, hide_file_progress, print_json, spec_of
from dar.console import Console
from dar.errors import ConfigError


def sample(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to say to it; '-' reads standard input.", show_default=False)],
    num: Annotated[
        int | None,
        typer.Option(
            "--num", "-n", min=1, max=1_000_000, help="Completions: 3, or 1 with --greedy.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per completion.")] = 128,
    min_tokens: Annotated[int, typer.Option(min=0, help="Tokens before a completion may end with EOS.")] = 0,
    temperature: Annotated[float, typer.Option(help="Divides the logits; > 0.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token every time.")] = False,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among the k likeliest tokens only.", show_default=False)
    ] = None,
    top_p: Annotated[float, typer.Option(help="Of those, among the likeliest that reach this probability.")] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End a completion before this text; may be repeated.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same completions.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Use the prompt as it is, without a chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Sample completions of one prompt: as training would, unless told to be greedy or to truncate."""
    from dar.config.data import DecodingSpec, EvalSamplingSpec
    from dar.evaluate.models import build_generators, read_prompts
    from dar.rollout.sampling import SamplingKey

    hide_file_progress()
    chosen = {"greedy": greedy, "top_k": top_k, "top_p": top_p, "min_new_tokens": min_tokens, "stop": tuple(stop or ())}
    if min_tokens > max_tokens:
        raise ConfigError(f"--min-tokens is {min_tokens}, but --max-tokens is {max_tokens}")
    if not temperature > 0:
        raise ConfigError(f"--temperature is {temperature:g}, and must be above 0: --greedy takes the likeliest token")
    decoding = spec_of(DecodingSpec, chosen | {"temperature": temperature}, (), command="dar sample")
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "is_plain": plain}
    sampling = spec_of(EvalSamplingSpec, given, (), command="dar sample")
    text = sys.stdin.read() if prompt == "-" else prompt
    prompts = read_prompts(model, [{"prompt": text}], sampling, prompt_column="prompt", where="the prompt")
    engine = build_generators(model, sampling, [temperature])[temperature].engine
    started = time.perf_counter()
    rollouts = engine.generate(
        prompts,
        num or (1 if greedy else 3),
        max_completion_length=max_tokens,
        key=SamplingKey(seed, "sample"),
        decoding=decoding,
    )
    seconds, num_tokens = time.perf_counter() - started, int(rollouts.groups.mask.sum())
    found = list(zip(rollouts.texts, rollouts.finish_reasons, strict=True))
    if as_json:
        rows = [{"completion": completion, "finish_reason": reason} for completion, reason in found]
        print_json({"prompt": prompts[0].content, "completions": rows})
    else:
        for index, (completion, reason) in enumerate(found, start=1):
            Console().print(f"── {index} ({reason}) ──", style="dim")
            Console().print(completion, soft_wrap=True)
    # Not among the completions: the same call prints the same completions, but never takes the same time.
    speed = f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tokens per second"
    Console(stderr=True).print(speed, style="dim")
