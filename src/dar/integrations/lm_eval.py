"""lm-evaluation-harness (lm-eval ≥ 0.4.13): its tasks, asked of a model that is in memory."""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api import task as task_module
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string

from dar.config.data import LMEvalSpec
from dar.errors import ConfigError
from dar.files.hints import nearest_hint
from dar.policies.precision import Precision
from dar.policies.text.loading import context_length
from dar.shown import first_line

CHUNK = 16
"""Passes between two notes, and so lost at most when an evaluation is interrupted."""
_KEPT = ("results", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
ANSWER_KEY = ("kind", "number", "digest")
"""What an answer is known by: the kind of its request, its number among those, and a digest of what was asked."""


class Harness:
    """Tasks with their data, loaded once, of which any number of models can be asked.

    Args:
        tasks: names of lm-eval's tasks, groups or tags, or of those in `spec.include_path`.
        spec: how they are put.
        tokenizer: of the models.

    Raises:
        ConfigError: a task is not known, cannot be loaded, or needs more than a language model; or there is no chat
            template to put it in.
    """

    def __init__(self, tasks: Sequence[str], spec: LMEvalSpec, tokenizer: Any) -> None:
        # lm-eval's code sets its pad token.
        self.spec, self.tokenizer = spec, copy.deepcopy(tokenizer)
        if spec.chat_template and not tokenizer.chat_template:
            raise ConfigError("the model has no chat template to put lm-eval's tasks in: leave chat_template off")
        with _undisturbed():
            self._loaded = _loaded(tasks, spec.include_path)
        for name, task in self._loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ConfigError(
                    f"lm-eval's task {name} runs code that models write, or is not of text alone: not here"
                )
            # As lm-eval's own command has it: a task that says 0 cannot do with more.
            own, asked = task.get_config("num_fewshot"), spec.num_fewshot
            task.set_config("num_fewshot", asked if asked is not None and own != 0 else own or 0)

    def measure(
        self,
        model: Any,
        precision: Precision,
        *,
        seed: int = 0,
        answers: Mapping[tuple[Any, ...], Any] | None = None,
        keep: Callable[[list[dict[str, Any]]], object] = lambda _: None,
        note: Callable[[str], object] = lambda _: None,
    ) -> dict[str, Any]:
        """lm-eval's figures, under its own names: `results[task]["acc,none"]`, `["acc_stderr,none"]` and so on.

        The random numbers of the process go on afterwards as if nothing had been drawn.

        Args:
            model: a transformers causal language model, or a peft model around one, on the device.
            precision: in which it computes.
            seed: of few-shot examples and of whatever a task samples.
            answers: those that are there, by ANSWER_KEY: they are not asked for again.
            keep: given new ones, a mapping each of ANSWER_KEY and `answer`.
            note: told how far it is.
        """
        with _undisturbed():
            lm = _Asked(
                dict(answers or {}),
                keep,
                note,
                pretrained=model,
                tokenizer=self.tokenizer,
                backend="causal",
                batch_size=self.spec.batch_size,
                max_length=context_length(model.config),
                mixed_precision_dtype=None if precision.dtype == torch.float32 else precision.dtype,
            )
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            for task in self._loaded["tasks"].values():
                task.set_fewshot_seed(seed)
            # Not simple_evaluate, which describes the machine again, for seconds, at every call.
            found: Any = evaluate(
                lm,
                self._loaded,
                limit=self.spec.limit,
                log_samples=False,
                apply_chat_template=self.spec.chat_template,
                fewshot_as_multiturn=True,
            )
        return {name: found[name] for name in _KEPT if name in found}


class _Asked(HFLM):
    """A model whose answers are kept as they come, and told of in the program's own way."""

    def __init__(self, answers: dict[Any, Any], keep: Callable[..., object], note: Callable[[str], object],
                 **settings: Any) -> None:  # fmt: skip
        super().__init__(**settings)
        self._answers, self._keep, self._note = answers, keep, note
        self._portion = CHUNK * settings["batch_size"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._ask("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._ask("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._ask("generate_until", super().generate_until, requests)

    def _ask(self, kind: str, ask: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        keys = [(kind, number, hash_string(repr(request.args))) for number, request in enumerate(requests)]
        missing = [number for number, key in enumerate(keys) if key not in self._answers]
        for start in range(0, len(missing), self._portion):
            part = missing[start : start + self._portion]
            found = ask([requests[number] for number in part], disable_tqdm=True)
            self._answers |= zip((keys[number] for number in part), found, strict=True)
            self._keep([dict(zip(ANSWER_KEY, keys[n])) | {"answer": self._answers[keys[n]]} for n in part])
            self._note(f"{kind}: {len(requests) - len(missing) + start + len(part)} of {len(requests)}")
        return [self._answers[key] for key in keys]


def _loaded(tasks: Sequence[str], include_path: str | None) -> Any:
    """Tasks, and the groups they form; lm-eval's own thousands are looked through where one is not in the folder."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"{include_path} is no folder of lm-eval's tasks")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.task_index:
            raise ConfigError(
                f"lm-eval has no task '{name}'{nearest_hint(name, manager.task_index)}; `lm-eval ls tasks` lists "
                "what it has, and a folder of your own tasks is named by include_path"
            )
    try:
        return manager.load(list(tasks))
    except Exception as error:  # of lm-eval, datasets, or a task's own code
        raise ConfigError(
            f"lm-eval cannot load {', '.join(tasks)}: {first_line(error)}. The data of most tasks comes from the Hub: "
            "can this machine reach it (HF_HUB_OFFLINE is honoured), or is it in the cache?"
        ) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The process has its random numbers and streams to itself: lm-eval seeds, draws, warns, prints and shows bars."""
    python, arrays = random.getstate(), np.random.get_state()
    log, bars = logging.getLogger("lm_eval"), task_module.tqdm
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        task_module.tqdm = partial(bars, disable=True)
        with torch.random.fork_rng(), redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        log.setLevel(level)
        task_module.tqdm = bars
