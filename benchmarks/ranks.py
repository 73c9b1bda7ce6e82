"""Bytes that ranks send in a step, and memory per rank: DDP and sharded (FSDP2), a random Llama of 38 M weights.

    torchrun --nproc-per-node 2 benchmarks/ranks.py [--sharding none|full]

One thread a rank over gloo; nothing is sampled. Bytes are those of the loopback device (Linux), which nothing else may
use. The bound: n ranks send (n − 1) · W to gather W bytes of weights, once for a pass without gradient, twice for one
with it, which then sends as much of the gradient; DDP sends 2 · (n − 1) · W of the gradient alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from dar.batch import TokenGroups
from dar.collective import gathered, num_ranks, own_part, own_rank
from dar.config.optim import AdamWSpec
from dar.learn.optim import build_optimizer, clipped_step
from dar.learn.ranks import own_groups
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.text.policy import Policy
from dar.record.environment import release_freed_memory

PROMPTS, K, LENGTH = 8, 4, 32


class Peak:
    """The most resident memory inside, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self.is_on = 0, True
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        while self.is_on:
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.is_on = False
        self.thread.join()


def sent() -> int:
    """Bytes through the loopback device so far, on all ranks' count at once."""
    gathered(0)
    with open("/proc/net/dev") as file:
        (line,) = (line for line in file if line.strip().startswith("lo:"))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sharding", choices=("none", "full"), default="full")
    sharding = parser.parse_args().sharding
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, **heads}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, eos_token_id=0)
    policy = Policy(
        LlamaForCausalLM(config),
        SimpleNamespace(eos_token_id=0),
        Precision(torch.device("cpu"), torch.float32),
        temperature=1.0,
    )
    size = sum(parameter.nbytes for parameter in policy.model.parameters())
    policy.share(sharding)
    parameters = list(policy.trainable().values())
    optimizer = build_optimizer(AdamWSpec(learning_rate=1e-6), parameters)
    ids = torch.randint(1, config.vocab_size, (PROMPTS * K, LENGTH))
    prompts = tuple(tuple(range(1 + at, 20 + at)) for at in range(PROMPTS))
    groups = TokenGroups(prompts, (K,) * PROMPTS, ids, torch.ones_like(ids, dtype=torch.bool))
    own = groups.select(groups.rows_of(*own_groups(PROMPTS)))
    gc.collect()
    release_freed_memory()

    def gather() -> None:
        with policy.sampler():
            pass

    passes = {
        "reference": lambda: policy.ref_logprobs(own, max_tokens=4096),
        "update": lambda: update(policy, own, optimizer),
        "sampling": gather,
    }
    with Peak() as peak:
        for _ in range(2):
            bytes_of = {}
            for name, run in passes.items():
                before = sent()
                run()
                bytes_of[name] = sent() - before
    kept = sum(own_part(each).nbytes for each in parameters)
    kept += sum(own_part(each).nbytes for state in optimizer.state.values() for each in state.values())
    n, ranks = num_ranks(), gathered((kept, peak.bytes))
    once = (n - 1) * size
    bound = {"reference": once, "update": 3 * once, "sampling": once} if sharding == "full" else {"update": 2 * once}
    if own_rank() == 0:
        memory = f"{ranks[0][0] / 1e6:.0f} MB a rank, peak resident {max(peak for _, peak in ranks) / 1e6:.0f} MB"
        print(f"{sharding}, {n} ranks, {size / 1e6:.0f} MB of weights; weights and moments {memory}")
        for name, count in bytes_of.items():
            print(f"  {name}: {count / 1e6:.0f} MB sent by all, at least {bound.get(name, 0) / 1e6:.0f}")
    dist.destroy_process_group()


def update(policy: Policy, own: TokenGroups, optimizer: torch.optim.Optimizer) -> None:
    """A gradient of log-probabilities and a step."""
    parameters = list(policy.trainable().values())
    with policy.training():
        policy.outputs(own, Wants()).logprobs.sum().backward()
    clipped_step(optimizer, parameters, 1.0, where="a step")


if __name__ == "__main__":
    main()
