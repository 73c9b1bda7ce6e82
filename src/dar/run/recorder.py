"""Writing down what a run does: metrics.jsonl, alerts, trackers, callbacks, completion tables and the screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dar.batch import Message, Rollouts, TokenGroups, Weighted
from dar.rewards import RewardTable
from dar.run.display import Display
from dar.run.folder import RunFolder
from dar.run.heldout import HeldoutResult
from dar.run.measures import MEASURES
from dar.run.stopping import Control
from dar.run.watch import Watch


class Callback(Protocol):
    """Told about a run as it goes on, and able to ask something of it."""

    def on_metrics(self, step: int, metrics: Mapping[str, float], control: Control) -> None:
        """A line was added to metrics.jsonl: a training step, or (all keys `eval/…`) a held-out evaluation.

        What is asked of `control` (`stop(reason)`, `save()`, `evaluate()`) is done once the step is finished.
        """
        ...


@dataclass(frozen=True)
class Recorder:
    """Sends what happens to everything that keeps it. Only the main process writes."""

    folder: RunFolder
    display: Display
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    every: int
    watch: Watch
    callbacks: Sequence[Callback] = ()
    control: Control = field(default_factory=Control)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished training step."""
        shown = step % self.every == 0
        self._metrics(step, metrics, tracked=shown)
        self.display.step(step, metrics, shown=shown)

    def heldout(self, step: int, found: Mapping[str, float], result: HeldoutResult | None, *, seconds: float) -> None:
        """What a held-out evaluation found, and the completions it sampled, if it did."""
        if not self.accelerator.is_main_process:
            return
        line = {f"eval/{name}": value for name, value in {**found, "time": seconds}.items()}
        self._metrics(step, line, tracked=True)
        if result is not None:
            columns = heldout_columns(result)
            columns |= token_columns(result.rollouts.groups, result.logprobs, result.ref_logprobs, self.tokenizer)
            self.folder.write_completions(f"heldout-step-{step}", columns)
        said = ", ".join(f"{one.label} {one.shown(found[one.key])}" for one in MEASURES[:6] if one.key in found)
        self.display.note(f"held-out after step {step}: {said} ({seconds:.0f} s)")

    def completions(
        self, step: int, rollouts: Rollouts, rewards: RewardTable, ref_logprobs: Tensor | None, weighted: Weighted
    ) -> None:
        """The completions of a training step, with all that decided about them; one is shown."""
        if not self.accelerator.is_main_process:
            return
        columns = completion_columns(rollouts, rewards)
        advantages = weighted.advantages
        # Where every token has its own, the row shows their mean.
        rows = advantages if advantages.ndim == 1 else advantages.sum(1) / weighted.mask.sum(1)
        # A completion without a reward has neither.
        columns["advantage"] = weighted.to_table(rows, absent=0.0).flatten().tolist()
        columns["weight"] = weighted.to_table(weighted.weights, absent=0.0).flatten().tolist()
        # What completions from the data were sampled with is nobody's knowledge, and NaN.
        logprobs = rollouts.logprobs if rollouts.logprobs.isfinite().all() else None
        if ref_logprobs is not None and logprobs is not None:
            columns["kl_ref"] = (logprobs - ref_logprobs).sum(1).tolist()
        columns |= token_columns(rollouts.groups, logprobs, ref_logprobs, self.tokenizer)
        self.folder.write_completions(f"step-{step}", columns)
        if rollouts.images is None:
            best = int(rewards.total[0].argmax())
            prompt = prompt_text(rollouts.prompts[0].content)
            self.display.completion(prompt, rollouts.texts[best], float(rewards.total[0, best]))

    def _metrics(self, step: int, metrics: Mapping[str, float], *, tracked: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        self.folder.append_metrics({"step": step, **metrics})
        if tracked:
            self.accelerator.log(dict(metrics), step=step)
        for callback in self.callbacks:
            callback.on_metrics(step, dict(metrics), self.control)
        for alert in self.watch.see({"step": step, **metrics}):
            self.folder.append_alert(asdict(alert))
            self.display.alert(alert)
            self.control.is_stopping |= alert.action == "stop"


def completion_columns(rollouts: Rollouts, rewards: RewardTable) -> dict[str, Any]:
    """One row per completion: prompt, text or image, length, ending, reward, its parts and what the data says of it."""
    prompts = [prompt for prompt in rollouts.prompts for _ in range(rollouts.num_generations)]
    known = {**rewards.parts, **rollouts.labels}
    return {
        "position": [prompt.position for prompt in prompts],
        "prompt": [prompt_text(prompt.content) for prompt in prompts],
        "completion": list(rollouts.texts),
        **({} if rollouts.images is None else {"image": pngs(rollouts.images)}),
        "length": rollouts.groups.lengths.tolist(),
        "finish_reason": list(rollouts.finish_reasons),
        "reward": rewards.total.flatten().tolist(),
        **{f"reward/{name}": values.flatten().tolist() for name, values in known.items()},
        **{f"contribution/{name}": values.flatten().tolist() for name, values in rewards.contributions.items()},
    }


def heldout_columns(result: HeldoutResult) -> dict[str, Any]:
    """One row per held-out completion: as `completion_columns`, its drift, and what the held-out rewards said."""
    columns = completion_columns(result.rollouts, result.rewards)
    if result.logprobs is not None and result.ref_logprobs is not None:
        columns["kl_ref"] = (result.logprobs - result.ref_logprobs).sum(1).tolist()
    if result.gold is None:
        return columns
    parts = {f"gold/{name}": values.flatten().tolist() for name, values in result.gold.parts.items()}
    return {**columns, "gold": result.gold.total.flatten().tolist(), **parts}


def token_columns(
    groups: TokenGroups, logprobs: Tensor | None, ref_logprobs: Tensor | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Each completion's tokens as text and what π_t and π₀ say of them, as far as that is known: lists of equal length.

    Args:
        groups: the completions, B rows.
        logprobs, ref_logprobs: [B, T] nats, or None.
        tokenizer: turns each token into its text behind another; one that is a part of a character becomes U+FFFD.
    """
    ids, mask = groups.completion_ids, groups.mask
    # Some tokenizers leave out the space that the first token of a text begins with.
    text = {
        token: str(tokenizer.decode([token, token])).removeprefix(str(tokenizer.decode([token])))
        for token in ids[mask].unique().tolist()
    }
    columns: dict[str, Any] = {
        "tokens": [[text[token] for token in row[keep].tolist()] for row, keep in zip(ids, mask, strict=True)]
    }
    for name, values in ("logprobs", logprobs), ("ref_logprobs", ref_logprobs):
        if values is not None:
            rows = [row[keep].tolist() for row, keep in zip(values, mask, strict=True)]
            columns[name] = pa.array(rows, type=pa.list_(pa.float32()))
    return columns


def pngs(images: Tensor) -> list[bytes]:
    """Each image of [B, C, H, W] in [−1, 1] as a PNG: in color where C is 3, else its channels' mean in grey."""
    from PIL import Image  # noqa: PLC0415 - comes with diffusers, whose models make images

    images = images if images.shape[1] == 3 else images.mean(1, keepdim=True)
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    files = [io.BytesIO() for _ in pixels]
    for file, each in zip(files, pixels, strict=True):
        Image.fromarray(each.squeeze(2).numpy()).save(file, "PNG")
    return [file.getvalue() for file in files]


def prompt_text(content: str | list[Message]) -> str:
    """A prompt for people: the string, or the conversation's last message."""
    return content if isinstance(content, str) else str(content[-1]["content"])
