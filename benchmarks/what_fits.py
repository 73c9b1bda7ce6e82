"""Parameters that fit into so many GB, by mode: the table of docs/performance.md, computed by `dar plan`'s formulas.

    python benchmarks/what_fits.py

Models are decoders of heads of 128, a third of them key heads, MLPs of 3.5 times the residual, as many layers as heads,
a vocabulary of 131,072 entries shared with the head. A step has 32 prompts of 256 tokens with 4 completions of 256, in
micro-batches of 2048 tokens, products in bf16; 12 prompts are sampled at once. Nothing is run, and the memory of
libraries and heap is not counted.
"""

from __future__ import annotations

from dataclasses import replace

from dar.assembly.memory import ModelShape, StepShape, memory_of

SIZES = (8, 16, 24, 48, 80)
ALL = StepShape(tokens=2048, last=2048, microbatches=20, rows=48, length=256, prompts=12 * 256, trained=0, compute=2)
LORA = replace(ALL, rank=16, base_bytes=2)
MODES = {
    "all weights, AdamW": ALL,
    "all weights, AdamW, checkpointing": replace(ALL, is_checkpointed=True),
    "all weights, 8-bit AdamW, checkpointing": replace(ALL, is_checkpointed=True, moments=2),
    "all weights, Adafactor, checkpointing": replace(ALL, is_checkpointed=True, moments=0),
    "LoRA on an fp32 base": replace(LORA, base_bytes=4),
    "LoRA on a bf16 base": LORA,
    "LoRA on a bf16 base, in place": replace(LORA, is_in_place=True),
    "LoRA on a bf16 base, in place, checkpointing": replace(LORA, is_in_place=True, is_checkpointed=True),
}


def shape(heads: int) -> ModelShape:
    """A model of this many layers and heads."""
    hidden, vocabulary = 128 * heads, 131_072
    keys, inner = 128 * -(-heads // 3), int(3.5 * hidden)
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * inner
    head = vocabulary * hidden
    return ModelShape(
        total=heads * (layer + 2 * hidden) + hidden + head,
        linear=heads * layer,
        head=head,
        features=heads * (4 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner)),
        vocabulary=vocabulary,
        layers=heads,
        hidden=hidden,
        queries=hidden,
        keys=keys,
        inner=inner,
    )


def peak(model: ModelShape, mode: StepShape) -> float:
    """GB at most, with a reference in the precision that the model was saved in (bf16)."""
    trained = mode.rank * model.features if mode.rank else model.total
    step = replace(mode, trained=trained, reference=0 if mode.rank else 2 * model.total)
    return max(memory_of(model, step).values()) / 1e9


def main() -> None:
    print("| mode |", " | ".join(f"{size} GB" for size in SIZES), "|")
    print("|---|" + "---:|" * len(SIZES))
    for name, mode in MODES.items():
        fitting = [[model.total for model in map(shape, range(1, 80)) if peak(model, mode) <= size] for size in SIZES]
        print(f"| {name} |", " | ".join(f"{max(each) / 1e9:.1f}" if each else "–" for each in fitting), "|")


if __name__ == "__main__":
    main()
