"""DAR in one file: plain torch and transformers, readable top to bottom.

Dual-regularized Advantage Regression (He et al. 2026, arXiv:2602.11523) repeats: sample from the current policy π_t,
score, turn each completion into one fixed weight, and do weighted supervised fine-tuning of π_θ.

    J(π_θ) = E[A] − β · ( α · KL[π_θ ‖ π₀] + (1 − α) · KL[π_θ ‖ π_t] )         what is maximised
    π*     ∝ π₀^α · π_t^(1−α) · exp(A / β)                                      its optimum
    w      = min( (π₀ / π_t)^α · exp(A / β), w_clip )                           = π* / π_t up to a constant, clipped
    L(θ)   = − E_{y ~ π_t}[ w · log π_θ(y | x) ]                                what is minimised

The library `dar` does the same with checkpoints, micro-batches, evaluation and a faster sampler; nothing of it is used
here. On two CPU cores a 135M-parameter model is a matter of patience; any small causal language model will do.

    python examples/dar_in_one_file.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 20
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TOPICS = ("a rainy morning", "a train ride", "fresh bread", "an old bicycle", "the sea in winter", "a small garden")


def reward(text: str) -> float:
    """A toy: 0 for a completion of exactly twelve words, less the further from that. Put your own here."""
    return -abs(len(text.split()) - 12) / 12


@dataclass
class Group:
    """The K completions of one prompt.

    ids: [K, L + T] prompt and completion tokens; what follows a row's end-of-sequence token is never used.
    mask: [K, T] bool, True on the tokens that were sampled, end of sequence included.
    prompt_length: L.
    """

    ids: Tensor
    mask: Tensor
    prompt_length: int


@torch.no_grad()
def sample(model: Any, prompt: Tensor, eos: Tensor, *, num: int, max_tokens: int) -> Group:
    """Draws completions from π_t itself: temperature 1, no top-k or top-p, which would make it another distribution."""
    ids, cache = prompt.repeat(num, 1), None
    new, tokens = ids, []
    running, mask = torch.ones(num, dtype=torch.bool), []
    for _ in range(max_tokens):
        output = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        new = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
        tokens.append(new)
        mask.append(running)
        running = running & ~torch.isin(new[:, 0], eos)
        if not running.any():
            break
    return Group(torch.cat([ids, *tokens], 1), torch.stack(mask, 1), prompt.shape[1])


def sequence_logprobs(model: Any, group: Group) -> Tensor:
    """[K] log π(y | x), the sum over the sampled tokens; in fp32, because it is a difference of large numbers."""
    completion = group.ids[:, group.prompt_length :]
    # The logits at one position speak about the next token.
    logits = model(input_ids=group.ids, use_cache=False).logits[:, group.prompt_length - 1 : -1].float()
    logprobs = logits.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
    return logprobs.masked_fill(~group.mask, 0.0).sum(1)


def advantages_of(rewards: Tensor) -> Tensor:
    """[P, K] rewards → [P, K] advantages: less the mean of the group, then divided by the deviation of the batch."""
    centred = rewards
    # With one completion per prompt its own mean would cancel it; the batch's mean, taken off below, serves instead.
    if rewards.shape[1] > 1:
        # Equal rewards must give exactly 0: rounding left over would be blown up by the division.
        tied = rewards.amin(1, keepdim=True) == rewards.amax(1, keepdim=True)
        centred = torch.where(tied, 0.0, rewards - rewards.mean(1, keepdim=True))
    if centred.min() == centred.max():
        return torch.zeros_like(rewards)
    return (centred - centred.mean()) / (centred.std(correction=0) + 1e-8)


def weights_of(old: Tensor, ref: Tensor, advantages: Tensor, *, alpha: float, beta: float, w_clip: float) -> Tensor:
    """[B] regression weights from sequence log-probabilities under π_t (`old`) and π₀ (`ref`), and advantages.

    All in logarithms until the clip: exp(A / β) alone leaves fp32 at a bit over four deviations for β = 0.05.
    """
    log_weights = alpha * (ref - old) + advantages / beta
    return log_weights.clamp(max=math.log(w_clip)).exp()


def train(arguments: argparse.Namespace) -> None:
    """The whole algorithm."""
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # eval() switches dropout off, and stays: under dropout there would be no such thing as *the* probability of a text.
    policy = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    prompts = [encode(tokenizer, f"Write one sentence about {topic}.") for topic in TOPICS]
    eos = end_of_sequence(policy, tokenizer)

    for step in range(1, arguments.steps + 1):
        # 1. Sample K completions of each prompt from π_t.
        groups = [
            sample(policy, prompt, eos, num=arguments.generations, max_tokens=arguments.max_tokens)
            for prompt in prompts
        ]

        # 2. Score them.
        rewards = torch.tensor([[reward(text) for text in texts_of(tokenizer, group)] for group in groups])

        # 3. Fix one weight per completion, from the whole batch. Nothing here carries a gradient.
        with torch.no_grad():
            old = torch.cat([sequence_logprobs(policy, group) for group in groups])
            ref = torch.cat([sequence_logprobs(reference, group) for group in groups])
            weights = weights_of(
                old,
                ref,
                advantages_of(rewards).flatten(),
                alpha=arguments.alpha,
                beta=arguments.beta,
                w_clip=arguments.w_clip,
            )

        # 4. One optimizer step on the weighted negative log-likelihood, a group at a time to save memory. Sums over
        #    tokens, one denominator for the whole batch: dividing each row by its own length would favour short ones.
        loss = 0.0
        for group, group_weights in zip(groups, weights.split(arguments.generations)):
            part = -(group_weights * sequence_logprobs(policy, group)).sum() / len(weights)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # The policy that has just been updated is the next π_t.

        share = (weights > 0.999 * arguments.w_clip).float().mean()
        print(
            f"step {step}: reward {rewards.mean():+.3f}  KL {(old - ref).mean():.3f} nats per completion  "
            f"at the clip {share:.0%}  loss {loss:.2f}",
            flush=True,
        )


def encode(tokenizer: Any, text: str) -> Tensor:
    """[1, L] token ids of a prompt: a user message where the tokenizer has a chat template, else the text itself."""
    if not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ]


def texts_of(tokenizer: Any, group: Group) -> list[str]:
    """The K completions as text, special tokens removed."""
    completions = group.ids[:, group.prompt_length :]
    return [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(completions, group.mask)]


def end_of_sequence(model: Any, tokenizer: Any) -> Tensor:
    """Every token id that ends a completion: chat models often have more than one."""
    found = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])} - {None}
    return torch.tensor(sorted(ids))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Dual-regularized Advantage Regression, plain torch and transformers.")
    parser.add_argument("--model", required=True, help="a folder or a Hub id of a causal language model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--generations", type=int, default=4, help="completions per prompt (K)")
    parser.add_argument("--max-tokens", type=int, default=32, help="most tokens per completion")
    parser.add_argument("--alpha", type=float, default=0.1, help="share of the regularisation that goes to π₀")
    parser.add_argument("--beta", type=float, default=0.05, help="total KL weight")
    parser.add_argument("--w-clip", type=float, default=20.0, help="largest weight")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
