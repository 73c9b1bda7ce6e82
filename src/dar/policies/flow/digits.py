"""A flow-matching model that anybody can align in minutes: handwritten digits of 8×8 pixels, learnt on the spot."""

from __future__ import annotations

from typing import Any

import torch
from rich.progress import track

from dar.console import Console
from dar.errors import require_package
from dar.policies.cached import made_once

TOY = "toy:digits"


def digits_folder() -> str:
    """Where the model is, trained now (three minutes on a core) unless it was before; raises as `made_once`."""
    return str(made_once("toy/digits-1", lambda folder: trained(steps=2000).save_pretrained(folder)))


def trained(*, steps: int) -> Any:
    """A diffusion transformer of 0.4M parameters, trained on scikit-learn's 1,797 digits by flow matching.

        L = E ‖v_θ(x_t, t, y) − (ε − x_0)‖² / D,   x_t = (1 − t) x_0 + t ε,  t ~ U(0, 1),  ε ~ N(0, I)

    Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003.
    """
    require_package("sklearn", TOY)
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # noqa: PLC0415 - an extra
    from sklearn.datasets import load_digits  # noqa: PLC0415

    data: Any = load_digits()
    digits = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes, generator = torch.tensor(data.target), torch.Generator().manual_seed(0)
    shape: Any = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    size: Any = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "norm_num_groups": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(**shape, **size).eval()  # train() would drop labels, which only guidance needs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in track(range(steps), "making toy:digits, once", console=Console(stderr=True), transient=True):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (steps - step) / (0.3 * steps))
        rows, times = torch.randint(len(digits), (64,), generator=generator), torch.rand(64, generator=generator)
        noise = torch.randn(64, 1, 8, 8, generator=generator)
        states = torch.lerp(digits[rows], noise, times.view(-1, 1, 1, 1))
        velocities = model(states, times * 1000, class_labels=classes[rows]).sample
        optimizer.zero_grad()
        (velocities - (noise - digits[rows])).square().mean().backward()
        optimizer.step()
    return model
