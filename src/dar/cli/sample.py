"""`dar sample`: completions of one prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from dar.cli.common import AsJson, hide_file_progress, print_json
from dar.console import Console
from dar.errors import ConfigError


def sample(
    model: Annotated[
        str, typer.Argument(help="A Hub id, folder (such as RUN/model) or .gguf file.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="What to say to it; '-' reads standard input.", show_default=False)],
    num: Annotated[
        int | None,
        typer.Option(
            "--num", "-n", min=1, max=1_000_000, help="Completions. [default: 3; 1 with --greedy]", show_default=False
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
    from dar.assembly.data import build_prompts
    from dar.assembly.engine import build_engine
    from dar.config.recipe import build_spec
    from dar.policies.precision import resolve_precision
    from dar.policies.text.loading import context_length, load_model, load_tokenizer
    from dar.policies.text.policy import Policy
    from dar.rollout.sampling import SamplingKey
    from dar.rollout.truncation import Decoding

    hide_file_progress()
    decoding = Decoding(greedy=greedy, top_k=top_k, top_p=top_p, min_new_tokens=min_tokens, stop=tuple(stop or ()))
    if min_tokens > max_tokens:
        raise ConfigError(f"--min-tokens is {min_tokens}, but --max-tokens is {max_tokens}")
    text = sys.stdin.read() if prompt == "-" else prompt
    spec = build_spec(
        {
            "model": model,
            "data": {"train": "the prompt", "wrap_as_user": not plain},
            "rewards": ["sentiment"],
            "steps": 1,
            "output_dir": ".",
            "sampling": {"max_completion_length": max_tokens, "temperature": temperature},
        },
        where="dar sample",
    )
    tokenizer = load_tokenizer(spec.model)
    if not plain and not tokenizer.chat_template:
        raise ConfigError(f"{model} has no chat template: add --plain to give it the prompt as it is")
    causal_lm = load_model(spec.model)
    prompts = build_prompts(spec, spec.data.train, [{"prompt": text}], tokenizer, context_length(causal_lm.config))
    policy = Policy(
        causal_lm, tokenizer, resolve_precision(spec.runtime), temperature=temperature, with_reference=False
    )
    engine = build_engine(spec.engine)
    engine.sync(policy, 0)
    started = time.perf_counter()
    rollouts = engine.generate(
        prompts.prompts,
        num or (1 if greedy else 3),
        max_completion_length=max_tokens,
        key=SamplingKey(seed, "sample"),
        decoding=decoding,
    )
    seconds, num_tokens = time.perf_counter() - started, int(rollouts.groups.mask.sum())
    found = list(zip(rollouts.texts, rollouts.finish_reasons, strict=True))
    if as_json:
        rows = [{"completion": completion, "finish_reason": reason} for completion, reason in found]
        print_json({"prompt": prompts.prompts[0].content, "completions": rows})
    else:
        _show(found)
    # Not among the completions: the same call prints the same completions, but never takes the same time.
    speed = f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tokens per second"
    Console(stderr=True).print(speed, style="dim")


def _show(completions: Sequence[tuple[str, str]]) -> None:
    console = Console()
    for index, (completion, reason) in enumerate(completions, start=1):
        console.print(f"── {index} ({reason}) ──", style="dim")
        console.print(completion, soft_wrap=True)
