"""The spec of a cluster's hardware, for `dar plan --cluster-spec`: nothing of it need exist."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dar.config.base import Count, Positive, Spec

Share = Annotated[float, Field(gt=0, le=1)]


class HardwareSpec(Spec):
    """A cluster of equal devices: a data sheet's figures, what share of them is reached, and who gets which."""

    nodes: Count = 1
    """Machines."""
    devices: Count
    """Accelerators of each machine."""
    memory_gb: Positive
    """Memory of a device, in 10⁹ bytes."""
    bf16_tflops: Positive
    """Dense bf16 products, in 10¹² FLOP/s (data sheets often give twice that, with sparsity)."""
    memory_gb_per_s: Positive
    """What a device reads of its memory, in 10⁹ bytes a second."""
    link_gb_per_s: Positive
    """What a device sends to those of its machine, in one direction (half of NVLink's figure)."""
    network_gb_per_s: Positive
    """What a device sends to other machines, in one direction: its share of their network adapters."""
    mfu: Share = 0.4
    """Share of `bf16_tflops` reached. Llama 3 was trained at 0.38 to 0.43 (arXiv:2407.21783, table 4)."""
    memory_bandwidth_share: Share = 0.6
    """Share of `memory_gb_per_s` reached while tokens are sampled: an assumption."""
    network_share: Share = 0.7
    """Share of `link_gb_per_s` and `network_gb_per_s` reached: an assumption."""
    memory_share: Share = 0.9
    """Share of `memory_gb` to plan with; libraries and holes have the rest."""
    learners: Count | None = None
    """Devices that learn, the others sampling; by default all learn and, in turns, sample."""
    devices_per_sampler: Count = 1
    """Devices that share the weights of one sampler (tensor parallelism)."""
    model: str | None = None
    """A model in place of the recipe's: a `config.json`, its folder, or a Hub id; no weight is read."""

    @model_validator(mode="after")
    def _devices_are_dealt_out(self) -> HardwareSpec:
        if self.num_sampling < 1 or self.num_sampling % self.devices_per_sampler:
            raise ValueError(
                f"{self.num_sampling} devices sample, of which devices_per_sampler makes no whole samplers"
            )
        return self

    @property
    def num_sampling(self) -> int:
        """Devices that sample, those among them that also learn."""
        return self.nodes * self.devices - (self.learners or 0)
