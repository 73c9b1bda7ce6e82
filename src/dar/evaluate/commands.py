"""Evaluations that ask a model or a judge: win rates, IFEval, GSM8K, lm-eval, agreement. A second call continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dar.assembly.reward import build_reward, check_reward
from dar.assembly.rows import check_rows
from dar.batch import Prompt
from dar.config.data import EvalSamplingSpec, LMEvalSpec
from dar.config.judge import JudgeEndpointSpec
from dar.config.model import ModelSpec
from dar.config.rewards import AnyReward
from dar.config.run import RuntimeSpec
from dar.config.verifiable import IFEvalRewardSpec, MathRewardSpec, SandboxSpec
from dar.data.messages import text_of
from dar.errors import RewardError
from dar.evaluate.benchmarks import IFEval, Share, ifeval, require_columns
from dar.evaluate.folder import EvaluationFolder, Lines, file_digest
from dar.evaluate.generate import Note
from dar.evaluate.judgements import JudgedPair, pair_up
from dar.evaluate.judging import PairToJudge, judge_pairs
from dar.evaluate.models import build_generators, read_judge, read_prompts
from dar.evaluate.preference_files import LabeledPair
from dar.files.tables import Row, read_table, rows_of
from dar.integrations import require_tested
from dar.policies.precision import resolve_precision
from dar.policies.text.loading import load_model, load_tokenizer
from dar.rewards import Failed
from dar.sandbox.sandbox import Sandbox

_COLUMN = "column:"


def run_win_rate(
    model: str,
    against: str,
    prompts: Path,
    judge: str,
    out: Path,
    sampling: EvalSamplingSpec,
    note: Note,
    *,
    prompt_column: str = "prompt",
    category_column: str | None = None,
) -> list[JudgedPair]:
    """Completions of two models, or of one beside a column of the data, judged by a reward.

    Args:
        model, against: models; `against` may be `column:NAME`.
        prompts: a file of rows.
        judge: see `read_judge`.
        out: folder, continued if it is there.
        sampling: of both models.
        note: told how far it is.

    Raises:
        ConfigError: the folder holds another evaluation, or a model or judge cannot be loaded.
        DataError: a prompt cannot be used.
    """
    rows = _rows(prompts, sampling)
    spec = read_judge(judge)
    check_reward(spec, RuntimeSpec())
    check_rows([spec], list(enumerate(rows)), str(prompts))
    is_column = against.startswith(_COLUMN)
    column = against.removeprefix(_COLUMN)
    needed = [prompt_column, *([column] if is_column else [])]
    require_columns(rows, needed + ([category_column] if category_column else []), str(prompts))
    here = f"'{column}'"
    given = [text_of(row[column], f"{prompts}: row {number}: {here}") for number, row in enumerate(rows) if is_column]
    asked = {"against": against, "prompt_column": prompt_column, "category_column": category_column}
    settings = _settings("win-rate", model, prompts, sampling) | asked | {"judge": _judge_settings(spec)}
    folder = EvaluationFolder(out, settings)
    # Both are checked before hours go into one.
    sampled = {
        name: _sampler(path, rows, prompt_column, prompts, folder.lines(name, key=("key",)), sampling)
        for name, path in (("model", model), ("baseline", against))[: 1 if is_column else 2]
    }
    texts = sampled["model"](note)
    others = given or sampled["baseline"](note)
    pairs = [
        PairToJudge(
            key=str(number),
            prompt=row[prompt_column],
            model=text,
            baseline=other,
            category=str(row[category_column]) if category_column else None,
            columns={name: value for name, value in row.items() if name != prompt_column},
        )
        for number, (row, text, other) in enumerate(zip(rows, texts, others, strict=True))
    ]
    lines = folder.lines("judgements", key=("pair", "model_first"))
    return pair_up(judge_pairs(pairs, build_reward(spec, {}, RuntimeSpec()), lines, note), where=str(lines.path))


def run_ifeval(model: str, prompts: Path, out: Path, sampling: EvalSamplingSpec, note: Note) -> IFEval:
    """IFEval of a model. Raises as `run_win_rate`."""
    rows = _rows(prompts, sampling)
    require_columns(rows, ("prompt", "instruction_id_list"), str(prompts))
    check_rows([IFEvalRewardSpec()], list(enumerate(rows)), str(prompts))
    folder = EvaluationFolder(out, _settings("ifeval", model, prompts, sampling))
    texts = _sampler(model, rows, "prompt", prompts, folder.lines("model", key=("key",)), sampling)
    result = ifeval(rows, texts(note))
    folder.write_result(dataclasses.asdict(result))
    return result


def run_gsm8k(model: str, prompts: Path, out: Path, sampling: EvalSamplingSpec, note: Note) -> Share:
    """The share of GSM8K's questions a model answers right, zero-shot.

    An answer that cannot be checked in time is wrong. Raises as `run_win_rate`, and RewardError where none could be.
    """
    rows = _rows(prompts, sampling)
    require_columns(rows, ("question", "answer"), str(prompts))
    check_rows([MathRewardSpec()], list(enumerate(rows)), str(prompts))
    folder = EvaluationFolder(out, _settings("gsm8k", model, prompts, sampling))
    texts = _sampler(model, rows, "question", prompts, folder.lines("model", key=("key",)), sampling)(note)
    with closing(Sandbox("dar.verifiable.maths_in_sandbox:score", SandboxSpec(workers=1), is_trusted=True)) as sandbox:
        found = sandbox.map(
            [{"completions": [text], "golds": [row["answer"]]} for row, text in zip(rows, texts, strict=True)]
        )
    failed = [value.reason for value in found if isinstance(value, Failed)]
    if len(failed) == len(rows):
        raise RewardError(f"none of the {len(rows)} answers could be checked; the first: {failed[0]}")
    if failed:
        note(f"{len(failed)} answers could not be checked and count as wrong; the first: {failed[0]}")
    result = Share.of([value == 1.0 for value in found])
    folder.write_result(dataclasses.asdict(result))
    return result


def run_lm_eval(model: str, tasks: Sequence[str], out: Path, spec: LMEvalSpec, seed: int, note: Note) -> dict[str, Any]:
    """lm-eval's tasks, and its figures by its own names (`Harness.measure`).

    Raises:
        ConfigError: lm-eval is missing or does not know a task, the folder holds another evaluation, or the model
            cannot be loaded.
    """
    require_tested("lm_eval", "dar eval lm-eval")
    from dar.integrations import lm_eval  # noqa: PLC0415 - an extra

    source, precision = ModelSpec.model_validate({"path": model}), resolve_precision(RuntimeSpec())
    harness = lm_eval.Harness(tasks, spec, load_tokenizer(source))
    settings = {"kind": "lm-eval", "lm_eval": version("lm_eval"), "model": model, "tasks": list(tasks), "seed": seed}
    folder = EvaluationFolder(out, settings | spec.model_dump(exclude={"batch_size"}))
    answers = folder.lines("answers", key=lm_eval.ANSWER_KEY)
    causal_lm = load_model(source).to(precision.device)
    known = {key: row["answer"] for key, row in answers.rows.items()}
    result = harness.measure(causal_lm, precision, seed=seed, answers=known, keep=answers.append, note=note)
    folder.write_result(result)
    return result


def run_choices(pairs: Sequence[LabeledPair], preferences: Path, judge: str, out: Path, note: Note) -> list[JudgedPair]:
    """What a reward chooses among pairs that people judged, the first completion as the model's.

    Raises:
        ConfigError: the folder holds another evaluation, or the judge cannot be built.
    """
    spec = read_judge(judge)
    reward = build_reward(spec, {}, RuntimeSpec())
    settings = {"kind": "agreement", "preferences": file_digest(preferences), "judge": _judge_settings(spec)}
    folder = EvaluationFolder(out, settings | {"num_pairs": len(pairs)})
    lines = folder.lines("judgements", key=("pair", "model_first"))
    todo = [PairToJudge(pair.key, pair.prompt, *pair.completions, category=pair.subset) for pair in pairs]
    return pair_up(judge_pairs(todo, reward, lines, note), where=str(lines.path))


def _rows(prompts: Path, sampling: EvalSamplingSpec) -> list[Row]:
    return rows_of(read_table(prompts), where=str(prompts))[: sampling.num_prompts]


def _settings(kind: str, model: str, prompts: Path, sampling: EvalSamplingSpec) -> dict[str, Any]:
    return {"kind": kind, "model": model, "prompts": file_digest(prompts), **sampling.model_dump()}


def _judge_settings(judge: AnyReward) -> dict[str, Any]:
    """What of a judge decides over its verdicts: not where it is, how patiently it is asked, and what it costs."""
    aside = dict.fromkeys(("weight", "name", "on_failure", "max_failed_share", "cache", "budget", "price"), True)
    return judge.model_dump(exclude={**aside, "endpoint": set(JudgeEndpointSpec.decides_nothing)})


def _sampler(
    model: str, rows: Sequence[Row], column: str, file: Path, lines: Lines, sampling: EvalSamplingSpec
) -> Callable[[Note], list[str]]:
    """What gives a model's completions of a file's rows, and samples those that are missing.

    All that can be is checked before weights are loaded. Raises as `read_prompts`.
    """
    prompts: Sequence[Prompt] = ()
    # Where all are completed, the model need not be there.
    if any((str(number),) not in lines for number in range(len(rows))):
        prompts = read_prompts(model, rows, sampling, prompt_column=column, where=str(file))

    def texts(note: Note) -> list[str]:
        if prompts:
            temperature = sampling.temperature or 0.0
            build_generators(model, sampling, [temperature])[temperature].complete(prompts, lines, note)
        found = [lines.rows[(str(number),)] for number in range(len(rows))]
        return [text_of(row.get("completion"), f"{lines.path}: row {row['key']}: 'completion'") for row in found]

    return texts
