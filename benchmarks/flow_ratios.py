"""What GRPO-Guard does to the ratios and gradients of denoising steps, measured on the digits model.

    python benchmarks/flow_ratios.py [--out flow_ratios.png] [--updates 8] [--noise flow_grpo] [--shift 1.0]

At π_θ = π_t, the norm of each step's own part of the gradient for the four variants; largest over smallest norm is the
spread that the paper says falls from 20 to 2.5. Then the policy moves away from π_t by a few Flow-GRPO updates on one
batch: step by step, the mean and the deviation of the log-ratio, and the share that a clip of 1e-4 closes.
"""

from __future__ import annotations

import argparse

import matplotlib as mpl
import torch

from dar.advantages import group_standardized
from dar.assembly.data import build_data
from dar.assembly.flow import FlowParts
from dar.assembly.objects import NOTHING
from dar.config.flow import FlowGRPOSpec
from dar.config.recipe import load_recipe
from dar.objectives.flow import step_log_ratios
from dar.objectives.policy_gradient import clipped_tokens
from dar.ops import at_least_fp32
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.rewards import digits
from dar.rollout.sampling import SamplingKey

mpl.use("agg")
import matplotlib.pyplot as plt

VARIANTS = {
    "baseline": FlowGRPOSpec(),
    "reweight only": FlowGRPOSpec(reweight=True),
    "mean-revised": FlowGRPOSpec(ratio="centered"),
    "RatioNorm + reweight": FlowGRPOSpec(ratio="normalized", reweight=True),
}
CLIP = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="flow_ratios.png")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--noise", default="flow_grpo")
    parser.add_argument("--shift", default="1.0")
    args = parser.parse_args()
    sde = [f"model.sde.noise={args.noise}", f"model.sde.shift={args.shift}"]
    if args.noise == "dance_grpo":
        sde.append("model.sde.eta=0.3")
    spec = load_recipe("flow_digits", sde)
    parts = FlowParts(spec, spec.model)  # pyright: ignore[reportArgumentType]
    prompts = build_data(spec, NOTHING, parts).train.prompts
    policy = parts.build(Precision(torch.device("cpu"), torch.float32), with_reference=False)
    engine = parts.engine(print)
    engine.sync(policy, 0)
    rollouts = engine.generate(prompts, 16, max_completion_length=0, key=SamplingKey(0, "train", 1))
    images = rollouts.images
    assert images is not None
    labels = [str(prompt.content) for prompt in prompts for _ in range(16)]
    rewards = torch.tensor(digits.legibility(labels, images)) + 0.5 * torch.tensor(digits.ink(images))
    advantages = at_least_fp32(group_standardized(rewards.view(10, 16), ddof=1, eps=1e-4).flatten().float())
    groups, old = rollouts.groups, rollouts.logprobs
    num_steps = old.shape[1]
    parameters = list(policy.trainable().values())

    def used(variant: FlowGRPOSpec) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = policy.outputs(groups, Wants())
        steps = outputs.steps
        ratios = step_log_ratios(outputs.logprobs - old, steps["shift"], steps["deviation"], ratio=variant.ratio)
        return ratios, steps["reweight"] if variant.reweight else torch.ones_like(ratios)

    print(f"gradient norm of each step's own loss at π_θ = π_t ({args.noise}, shift {args.shift})")
    for name, variant in VARIANTS.items():
        ratios, weights = used(variant)
        losses = -(advantages.unsqueeze(1) * ratios.exp() * weights).mean(0)
        norms = []
        for step in range(num_steps):
            grads = torch.autograd.grad(losses[step], parameters, retain_graph=True, allow_unused=True)
            norms.append(float(torch.cat([g.flatten() for g in grads if g is not None]).norm()))
        print(f"  {name:22} max/min {max(norms) / min(norms):6.2f}   " + " ".join(f"{norm:.2e}" for norm in norms))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for _ in range(args.updates):
        ratios, _ = used(VARIANTS["baseline"])
        optimizer.zero_grad()
        (-(advantages.unsqueeze(1) * ratios.exp())).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = {name: used(VARIANTS[name])[0] for name in ("baseline", "mean-revised", "RatioNorm + reweight")}
    spread = advantages.unsqueeze(1).expand_as(old)
    print(f"log-ratios after {args.updates} updates: mean, deviation, share clipped at ±{CLIP:g}")
    for name, ratios in found.items():
        clipped = clipped_tokens(ratios, spread, clip_low=CLIP, clip_high=CLIP).float().mean(0)
        print(f"  {name}")
        for step in range(num_steps):
            mean, deviation = float(ratios[:, step].mean()), float(ratios[:, step].std())
            print(f"    step {step}: {mean:+.2e}  {deviation:.2e}  {float(clipped[step]):.0%}")
        deviations = ratios.std(0)
        print(f"    deviation max/min {float(deviations.max() / deviations.min()):.1f}")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, name in zip(axes, ("baseline", "RatioNorm + reweight"), strict=True):
        ratios = found[name]
        for step in (0, num_steps // 2, num_steps - 1):
            axis.hist(ratios[:, step].numpy(), bins=40, histtype="step", label=f"step {step}")
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(title=name, xlabel="log-ratio of a step")
        axis.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
