"""The run folder of a run of TRL, for `dar report`, `dar watch` and `dar ls`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import MISSING, asdict, fields
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from dar.collective import from_main, gathered, num_ranks, own_rank
from dar.config.alerts import KLAlertSpec, RetentionAlertSpec, why_blind
from dar.config.problems import unknown_name_message
from dar.config.recorded import RecordedSpec
from dar.errors import ConfigError
from dar.files.atomic import written
from dar.integrations.trl.sampled import Row, sampled, shown, table
from dar.policies.precision import Precision
from dar.record.completions import sample_columns
from dar.record.environment import describe_environment
from dar.record.folder import RunFolder
from dar.record.metrics import gold_metrics, sample_metrics
from dar.record.watch import Watch
from dar.shown import keep_secret

log = logging.getLogger(__name__)

_RENAMED = {"sampling/sampling_logp_difference/mean": "rollout/logprob_gap", "eval_runtime": "eval_time"}
_LEFT_OUT = {
    # Of a whole call of train() and evaluate(); where none ended TRL calls their mean length 0.
    *("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"),
    *("eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens", "eval_loss"),
    *("completions/mean_terminated_length", "eval_completions/mean_terminated_length"),
}
_OBSERVED = "_generate_and_score_completions", "_calculate_rewards", "_get_per_token_logps_and_entropies", "evaluate"


class RunRecorder(TrainerCallback):
    """Writes the run folder of a GRPOTrainer, an RLOOTrainer or a DARTrainer: `trainer.add_callback(RunRecorder(…))`.

    A trainer with an `eval_dataset` evaluates before the first step and after the last, too, with torch's random
    numbers the same every time; what training draws of them is what it draws without a recorder.

    Args:
        trainer: before its `train()`.
        output_dir: the run folder. One that holds a run is refused, but for that which `resume_from_checkpoint`
            continues.
        completions_every: write the completions of training every so many steps; 0 = never.
        gold: held-out rewards, functions as TRL's: measured on held-out completions (`eval/gold`), never trained on.
        alerts: what the run is watched for, as in recipes: `["missing_eos", {"type": "no_signal", "action": "stop"}]`.
        best: the metric whose best policy stays in `best/`: `eval/gold`, or `{"metric": …, "mode": "min"}`.
        overwrite: whether a run that the folder holds is removed.

    Raises:
        ConfigError: it is another trainer, or `alerts`, `best` or `gold` ask for what it never measures.
        CheckpointError: by `train()`; the folder holds another run, or cannot be written.
    """

    def __init__(
        self,
        trainer: GRPOTrainer | RLOOTrainer,
        output_dir: str | Path,
        *,
        completions_every: int = 10,
        gold: Sequence[Callable[..., Any]] = (),
        alerts: Sequence[str | Mapping[str, Any]] = (),
        best: str | Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
            raise ConfigError(
                f"RunRecorder reads what GRPOTrainer and RLOOTrainer sample, and {type(trainer).__name__} is neither: "
                "`dar report` shows the log in its output_dir as it is"
            )
        self.trainer: Any = trainer  # what TRL says of its own attributes' types is not what they are
        self.folder = RunFolder(output_dir)
        self.every, self.overwrite, self.gold = completions_every, overwrite, {_name(each): each for each in gold}
        if len(self.gold) < len(gold):
            raise ConfigError(f"two functions of gold have one name, {', '.join(map(_name, gold))}: name them apart")
        self.spec = _spec(trainer, output_dir=str(self.folder.path), alerts=list(alerts), best=best)
        self._require_measured()
        self._watch = Watch(self.spec.alerts)
        self._weights = dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
        self._has_begun, self._last = False, 0
        self._unwritten, self._heldout, self._passes = list[dict[str, float]](), list[list[Row]](), list[Tensor]()
        theirs = self._generate, self._score, self._forward, self._evaluate = [
            getattr(trainer, each) for each in _OBSERVED
        ]
        ours = self._generating, self._scoring, self._passing, self._evaluating
        for name, their, own in zip(_OBSERVED, theirs, ours, strict=True):
            setattr(trainer, name, wraps(their)(partial(own)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_evaluated = from_main(lambda: self._begin(state))
        args.eval_on_start = self.trainer.eval_dataset is not None and not is_evaluated
        self._has_begun, self._last = True, state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy == "no":  # with any other there is one
            control.should_evaluate = self.trainer.eval_dataset is not None

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **_: Any) -> None:
        if self.trainer.model.training:
            self._write_step(state.global_step, _named(logs), control)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict[str, Any], **_: Any) -> None:
        everybodys, self._heldout, step = gathered(self._with_logprobs()), [], state.global_step
        if not self._has_begun or from_main(lambda: self.folder.is_evaluated(step)):
            return
        rows, size = list(chain(*chain(*zip(*everybodys)))), self.trainer.num_generations_eval
        if hasattr(self.trainer.eval_dataset, "__len__"):
            rows = rows[: len(self.trainer.eval_dataset) * size]  # processes fill the last batch up from the first
        logs = {f"eval/{key[5:]}": value for key, value in _named(metrics).items() if key.startswith("eval_")}
        found = {f"eval/{key}": value for key, value in self._take(rows, size, f"heldout-step-{step}").items()}
        self._append(step, {**logs, **found}, control)
        self._keep_best(step, found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write_step(state.global_step, {}, control)  # what was sampled since the last line

    def _generating(self, inputs: Any) -> Any:
        self._with_logprobs()
        output, step, trainer = self._generate(inputs), self.trainer.state.global_step + 1, self.trainer
        rows, self._passes = [self._row(output, *each) for each in enumerate(self._scored)], []
        if not trainer.model.training:
            self._heldout.append(rows)
            return output
        is_due, self._last = self.every > 0 and step // self.every > self._last // self.every, step
        everybodys = list(chain(*gathered(rows)))
        self._unwritten.append(self._take(everybodys, trainer.num_generations, f"step-{step}" if is_due else ""))
        return output

    def _scoring(self, inputs: Any, prompts: Any, *others: Any) -> Tensor:
        rewards, gold = self._score(inputs, prompts, *others), [[]] * len(prompts)
        own = slice(own_rank() * len(prompts), (own_rank() + 1) * len(prompts))
        if self.gold and not self.trainer.model.training:
            judge = copy(self.trainer)  # scores as the trainer does: async functions, environments and all
            judge.reward_funcs, judge.reward_func_names = list(self.gold.values()), list(self.gold)
            judge.reward_processing_classes = [None] * len(self.gold)
            gold = type(judge)._calculate_rewards(judge, inputs, prompts, *others)[own].tolist()
        self._scored = list(zip(prompts, *others, rewards[own].tolist(), gold, strict=True))
        return rewards

    def _passing(self, *args: Any, **others: Any) -> Any:
        found = self._forward(*args, **others)
        self._passes.append(found[0].detach())
        return found

    def _evaluating(self, *args: Any, **others: Any) -> Any:
        device = self.trainer.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.trainer.args.seed + own_rank())
            return self._evaluate(*args, **others)

    def _row(self, output: Mapping[str, Any], index: int, scored: tuple[Any, ...]) -> Row:
        prompt, completion, ids, rewards, gold = scored
        tools, weights, keep = output.get("tool_mask"), output.get("weights"), torch.ones(len(ids), dtype=torch.bool)
        if tools is not None and tools[index].any():
            keep = tools[index, : len(ids)].bool().cpu()
        told = shown(prompt if isinstance(prompt, str) else prompt[-1:]), shown(completion)
        has_ended = ids[-1] in (*self.trainer.eos_token_ids, self.trainer._tokenizer.pad_token_id)
        numbers = float(output["advantages"][index]), None if weights is None else float(weights[index]), rewards, gold
        # TRL's passes are of π_t, then of π₀; where it does without the first, DARTrainer makes up for it after them.
        known = [self._kept(each, index, keep) for each in (*self._passes, None, None)[:2]]
        known = known if _computes_old(self.trainer) else known[::-1]
        return Row(*told, has_ended, keep, torch.tensor(ids)[keep].tolist(), *numbers, *known)

    def _kept(self, logprobs: Tensor | None, index: int, keep: Tensor) -> Tensor | None:
        # Those of masked, truncated completions are computed without their own tokens, and are of no text.
        if logprobs is None or self.trainer.mask_truncated_completions:
            return None
        return logprobs[index, : len(keep)].float().cpu()[keep]

    def _with_logprobs(self) -> list[list[Row]]:
        """The evaluation's batches so far: the pass of the last one's loss has told log π_θ of its rows by now."""
        if self._heldout and self._passes:
            last, found = self._heldout[-1], self._passes[-1]
            self._heldout[-1] = [
                row._replace(logprobs=self._kept(found, index, row.keep)) for index, row in enumerate(last)
            ]
        self._passes = []
        return self._heldout

    def _take(self, rows: Sequence[Row], size: int, name: str) -> dict[str, float]:
        """The metrics of everybody's rows, which are written as a table where it has a name."""
        rollouts, reference = sampled(rows, size)
        rewards = table([row.rewards for row in rows], self._weights, size)
        gold = table([row.gold for row in rows], dict.fromkeys(self.gold, 1.0), size) if rows[0].gold else None
        if name and own_rank() == 0:
            columns = sample_columns(rollouts, rewards, rollouts.logprobs, reference, self.trainer._tokenizer, gold)
            columns["advantage"] = [row.advantage for row in rows]
            if rows[0].weight is not None:
                columns["weight"] = [row.weight for row in rows]
            self.folder.write_completions(name, columns)
        found = sample_metrics(rollouts, rewards, reference) | gold_metrics(gold)
        # TRL's entropy, of whole distributions, is the better estimate; NaN is what it does not tell.
        return {key: value for key, value in found.items() if key != "entropy" and not math.isnan(value)}

    def _begin(self, state: Any) -> bool:
        """Makes or continues the folder; whether it has the evaluation of the step at which the run begins."""
        spec, args = self.spec.model_copy(update={"steps": state.max_steps}), self.trainer.args
        is_resumed = state.global_step > 0 and self.folder.has_steps
        self.folder.prepare(spec, resume=is_resumed, overwrite=self.overwrite and not is_resumed, allow_changes=True)
        if is_resumed:
            self.folder.record_recipe(spec)
            self.folder.forget_after(state.global_step)
            self._watch.restore(self.folder.metrics())
        else:
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else self.trainer.model.dtype
            facts = describe_environment(Precision(args.device, dtype), world_size=num_ranks())
            self.folder.start(spec, facts | {"packages": facts["packages"] | {"trl": trl.__version__}})
        return self.folder.is_evaluated(state.global_step)

    def _write_step(self, step: int, logs: Mapping[str, Any], control: Any) -> None:
        parts, self._unwritten = self._unwritten, []
        means = {key: fmean(part[key] for part in parts if key in part) for part in parts for key in part}
        if logs.keys() - {"epoch"} or means:
            self._append(step, {**logs, **means}, control)

    def _append(self, step: int, metrics: Mapping[str, Any], control: Any) -> None:
        """Adds a line, and ends the run where that raises an alert which asks for it."""
        if from_main(lambda: self._write(step, metrics)):
            control.should_training_stop = control.should_save = True

    def _write(self, step: int, metrics: Mapping[str, Any]) -> bool:
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        line = {"step": step, **{key: value for key, value in numbers.items() if math.isfinite(value)}}
        if broken := sorted(numbers.keys() - line.keys()):
            # In fp16 a gradient may overflow now and then: what is an error is the trainer's to say.
            log.warning("not finite at step %d, and left out of metrics.jsonl: %s", step, ", ".join(broken))
        self.folder.append_metrics(line)
        fired = self._watch.see(line)
        for alert in fired:
            self.folder.append_alert(asdict(alert))
            log.warning("alert at step %d: %s", step, alert.message)
        return any(alert.action == "stop" for alert in fired)

    def _keep_best(self, step: int, metrics: Mapping[str, float]) -> None:
        best = self.spec.best
        value = None if best is None else metrics.get(best.metric)
        if best is None or value is None or not from_main(lambda: self.folder.is_better(value, best)):
            return
        with written(self.folder.best) if own_rank() == 0 else nullcontext() as scratch:
            # All processes may hold parts of the weights.
            self.trainer.save_model(str(from_main(lambda: scratch)), _internal_call=True)
            if scratch is not None:
                (scratch / "training_args.bin").unlink(missing_ok=True)  # has the Hub's token
                record = {"step": step, **best.model_dump(), "value": value}
                (scratch / "best.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _require_measured(self) -> None:
        """Raises ConfigError where something is asked for that this trainer never measures."""
        trainer, best, has_heldout = self.trainer, self.spec.best, self.trainer.eval_dataset is not None
        if isinstance(trainer.eval_dataset, dict) or ((self.gold or best) and not has_heldout):
            raise ConfigError("RunRecorder writes down, and gold and best need, one eval_dataset of the trainer")
        allowed = ["eval/reward", *(f"eval/rewards/{name}/mean" for name in trainer.reward_func_names)]
        allowed += ["eval/gold", *(f"eval/gold/{name}/mean" for name in self.gold)] if self.gold else []
        if best is not None and best.metric not in allowed:
            raise ConfigError(f"best: {unknown_name_message('metric', best.metric, allowed)}")
        known = {
            "is_offline": False,
            "is_plain": True,
            "has_gold": bool(self.gold),
            "num_evaluations": int(has_heldout),
        }
        for alert in self.spec.alerts:
            reason = why_blind(alert, **known)
            if isinstance(alert, RetentionAlertSpec):
                reason = "no task of lm-eval is asked here"
            elif isinstance(alert, KLAlertSpec) and (trainer.beta == 0 or trainer.mask_truncated_completions):
                reason = "KL to π₀ needs beta above 0 and mask_truncated_completions off"
            elif (
                isinstance(alert, KLAlertSpec)
                and alert.samples == "train"
                and trainer._name == "GRPO"
                and not _computes_old(trainer)
            ):
                reason = "GRPOTrainer does without log π_t where it is on-policy: use samples: heldout"
            if reason is not None:
                names = "Here data.heldout is the trainer's eval_dataset, and evaluation.rewards are gold"
                raise ConfigError(f"the alert {alert.type} could never fire: {reason}. {names}.")


def _named(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(key, key): value for key, value in logs.items() if key not in _LEFT_OUT}


def _computes_old(trainer: Any) -> bool:
    """Whether the first pass over samples is of π_t: GRPO has none where the first update is on-policy."""
    args = trainer.args
    is_aligned = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0
    return isinstance(trainer, RLOOTrainer) or not is_aligned or args.use_vllm


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _spec(trainer: Any, **asked: Any) -> RecordedSpec:
    args, config = trainer.args, trainer.model.config
    for name, value in (*vars(args).items(), *(args.model_init_kwargs or {}).items()):
        if name.endswith("token") and isinstance(value, str):
            keep_secret(value)
    usual = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory() for each in fields(args)
    }
    changed = {name: value for name, value in args.to_dict().items() if getattr(args, name) != usual[name]}
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return RecordedSpec(
        trainer=f"trl.{type(trainer).__name__} {trl.__version__}",
        method=f"{trainer._name} ({trainer.loss_type})" if type(trainer) is GRPOTrainer else trainer._name,
        model=config.name_or_path or config.model_type,
        data=getattr(getattr(trainer.train_dataset, "info", None), "dataset_name", None),
        seed=args.seed,
        prompts_per_step=rows // trainer.num_generations or None,
        num_generations=trainer.num_generations,
        settings=json.loads(json.dumps(changed, default=str)),
        **asked,
    )
