"""Making a small flow-matching model: a diffusion transformer trained on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dar.config.flow import FlowPretrainSpec
from dar.errors import require_package


def pretrained(spec: FlowPretrainSpec, advance: Callable[[], None]) -> tuple[Any, float]:
    """The model, and the mean of its loss over the last tenth of the steps.

        L = E ‖v_θ(x_t, t, y) − (ε − x_0)‖² / D,   x_t = (1 − t) x_0 + t ε,  t ~ U(0, 1),  ε ~ N(0, I)

    Args:
        spec: size and training.
        advance: called after every step.

    Raises:
        ConfigError: a package is missing.

    Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003.
    """
    for package in ("diffusers", "sklearn"):
        require_package(package, "dar flow-pretrain")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # noqa: PLC0415 - an extra
    from sklearn.datasets import load_digits  # noqa: PLC0415

    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes, generator = torch.tensor(digits.target), torch.Generator().manual_seed(spec.seed)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = DiTTransformer2DModel(
            num_attention_heads=spec.heads,
            attention_head_dim=16,
            in_channels=1,
            out_channels=1,
            num_layers=spec.layers,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=1,
        )
    model.eval()  # train() would drop labels at random, which only guidance needs
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate)
    last = torch.zeros(max(1, spec.steps // 10))
    for step in range(spec.steps):
        optimizer.param_groups[0]["lr"] = spec.learning_rate * min(1.0, (spec.steps - step) / (0.3 * spec.steps))
        rows = torch.randint(len(images), (spec.batch_size,), generator=generator)
        data, noise = images[rows], torch.randn(len(rows), *images.shape[1:], generator=generator)
        times = torch.rand(len(rows), generator=generator)
        states = torch.lerp(data, noise, times.view(-1, 1, 1, 1))
        found = model(states, times * 1000, class_labels=classes[rows]).sample
        loss = (found - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last[step % len(last)] = loss.detach()
        advance()
    return model, float(last.mean())
