"""Specs of data and of sampling."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from dar.config.base import Count, NotNegative, Positive, Rows, Seed, Spec, by_type
from dar.files.paths import expanded


class HHFormatSpec(Spec):
    """Transcripts as in Anthropic's HH data: `chosen` and `rejected` are strings of `\\n\\nHuman: …` and
    `\\n\\nAssistant: …` turns. The prompt, as messages, is all before the last `\\n\\nAssistant:`; the two answers
    become `chosen` and `rejected`.
    """

    type: Literal["hh"] = "hh"
    unusable: Literal["skip", "refuse"] = "skip"
    """Rows whose two transcripts differ before the last answer, or whose answer is empty: leave them out and say how
    many, or stop."""


class LabelledPairsFormatSpec(Spec):
    """Two completions in columns of their own and a label that says which is the better one: they become `chosen` and
    `rejected`."""

    type: Literal["labelled_pairs"] = "labelled_pairs"
    label: str
    """Column with the label."""
    columns: dict[str, str]
    """For each of the two labels the column with the completion it prefers: `{model: model_summary, …}`."""
    unlabelled: Literal["skip", "refuse"] = "skip"
    """Rows with another label or none: leave them out and say how many, or stop."""

    @field_validator("columns", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        # YAML reads the labels 1 and 2 as numbers.
        return {str(label): column for label, column in value.items()} if isinstance(value, dict) else value

    @field_validator("columns")
    @classmethod
    def _two_of_them(cls, value: dict[str, str]) -> dict[str, str]:
        if len(set(value.values())) != 2 or len(value) != 2:
            raise ValueError(f"expected two labels with a column each, found {value}")
        return value


AnyFormat = Annotated[HHFormatSpec | LabelledPairsFormatSpec, Field(discriminator="type"), by_type()]


class SplitByHashSpec(Spec):
    """A part of the rows, by a hash: SHA-256 of the value modulo 10 is 0–7 for `train`, 8 for `validation`, 9 for
    `test`. Rows with the same value are always in the same part, whatever their order and number.
    """

    shorthand: ClassVar[str | None] = "part"

    part: Literal["train", "validation", "test"]
    """Which part to use."""
    column: str = "prompt"
    """Column that decides: a string, or messages, of which the first of the user's decides (so that conversations with
    the same beginning stay together)."""


class SourceSpec(Spec):
    """One table of rows."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """A `.jsonl`, `.json`, `.parquet` or `.csv` file, `package:NAME/inner/path`, a Hub data set id,
    or `reasoning_gym:TASK?size=1000&seed=0`, questions made by reasoning-gym (an extra)."""
    name: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set (a file has just one)."""
    format: AnyFormat | None = None
    """How the rows are written: a name or a mapping with `type`; by default the columns are used as they are."""
    split_by_hash: SplitByHashSpec | None = None
    """Use only a part of the rows: `train`, `validation` or `test`, or a mapping."""
    max_rows: Count | None = None
    """Of these, use only the first rows."""


class RowsSpec(Spec):
    """Rows to train on and rows held out, and how a prompt is read from one."""

    shorthand: ClassVar[str | None] = "train"

    train: SourceSpec
    """Rows to train on: prompts to sample from, or completions that come with theirs."""
    heldout: SourceSpec | None = None
    """Rows never trained on, which tell before, during and after training how far it has come.
    An offline method also measures the completions that come with them."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string (used as it is) or a list of messages (the chat template is applied)."""
    wrap_as_user: bool = False
    """Turn a string prompt into one user message, so that the chat template is applied to it."""
    system_prompt: str | None = None
    """A system message put before every conversation that has none."""


class DataSpec(RowsSpec):
    """Prompts to train on and prompts held out."""

    max_prompt_length: Count | None = None
    """Longest prompt in tokens; by default the model's context less `sampling.max_completion_length`."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do, before training starts, with prompts longer than that: stop, or leave them out and say how many."""


class ResampleSpec(Spec):
    """Dynamic sampling: groups that teach nothing, as all their rewards are equal or fewer than two are there, are
    replaced by those of fresh prompts, before anything is computed over the batch."""

    max_rounds: Annotated[int, Field(ge=1, le=1000)]
    """Most times that a step samples fresh prompts, as many as groups are tied. Of the last time tied ones stay."""


class SamplingSpec(Spec):
    """How completions are drawn. Truncating samplers (top-k, top-p) would change π_t and are not offered."""

    section: ClassVar[str] = "sampling."

    max_completion_length: Rows = 256
    """Most tokens a completion may have."""
    temperature: Positive = 1.0
    """Divides the logits of policy, behaviour policy and reference alike, so the closed form stays exact."""
    mask_truncated: bool = False
    """Leave completions that ran out of room out of the loss (their rewards still count in baselines)."""
    correction: Literal["none", "token", "sequence"] = "none"
    """Scale gradients by π_t(trainer)/π_t(sampler), per token or per completion, where the two differ in precision."""
    correction_cap: Annotated[float, Field(ge=1)] = 2.0
    """Upper bound of that factor."""
    max_staleness: Annotated[int, Field(ge=0, le=16)] = 0
    """Steps by which the weights that sample may be behind those that learn. 0: sampling waits for learning. More: both
    go on at once, which needs an engine with weights of its own (`vllm`, or any on a cluster)."""
    prompts_per_request: Rows | None = None
    """Prompts that are sampled together. The same number gives the same rounding, wherever a run samples; by default
    all of a step's on one machine, and an equal share for each sampler of a cluster."""
    resample_tied: ResampleSpec | None = None
    """Replace groups that teach nothing by those of fresh prompts; by default they stay."""

    @model_validator(mode="after")
    def _rewards_come_first(self) -> SamplingSpec:
        if self.resample_tied is not None and self.max_staleness:
            raise ValueError(
                "resample_tied draws prompts when a step's rewards are known, max_staleness has later steps' drawn "
                "before that: set only one of them"
            )
        return self

    @classmethod
    def other_way(cls, key: str, type: object) -> str | None:
        if key not in ("greedy", "top_k", "top_p", "min_p", "min_new_tokens", "stop"):
            return super().other_way(key, type)
        return (
            f"{key} would change π_t: training must sample from the very distribution whose log-probabilities it "
            "reads. Held-out prompts may be sampled otherwise (evaluation.greedy, evaluation.top_k, "
            "evaluation.top_p), and so may dar sample"
        )


class TruncationSpec(Spec):
    """Which tokens may be drawn, for looking at a model and for held-out evaluation: never in training.

    The tokens that are left keep the ratios of their probabilities, and sum to 1. Of two equally likely tokens the one
    with the smaller id comes first.
    """

    greedy: bool = False
    """Take the likeliest token every time, and just one completion per prompt: more would be the same again."""
    top_k: Count | None = None
    """Sample among the k likeliest tokens only; by default among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of those, sample among the smallest set of likeliest tokens whose probability reaches this."""

    @model_validator(mode="after")
    def _greedy_is_alone(self) -> TruncationSpec:
        if self.greedy and (self.top_k is not None or self.top_p < 1):
            raise ValueError("greedy takes the likeliest token every time: top_k and top_p would do nothing")
        return self

    @property
    def is_plain(self) -> bool:
        """Every token is drawn from the model's own distribution, until EOS or the last position."""
        return not self.greedy and self.top_k is None and self.top_p == 1


class DecodingSpec(TruncationSpec):
    """What is done to the logits before a token is drawn, in this order: temperature, min_new_tokens, top_k, top_p."""

    temperature: Positive | None = None
    """Divides the logits; by default the policy's own does."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """No EOS before so many other tokens."""
    stop: tuple[str, ...] = ()
    """A completion ends as soon as its decoded text (special tokens removed) contains one of these; the text is cut
    before it, while the tokens keep the one that completed it."""

    @field_validator("stop")
    @classmethod
    def _can_be_missing(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop string is empty: every text contains it")
        return value

    @property
    def is_plain(self) -> bool:
        return super().is_plain and self.temperature is None and not self.min_new_tokens and not self.stop


class EvalSamplingSpec(Spec):
    """How `dar eval` draws completions."""

    max_tokens: Count = 512
    """Most tokens of a completion."""
    temperature: NotNegative | None = 0.0
    """0 = the likeliest token every time; MT-Bench has one of its own for each category, which `null` stands for."""
    seed: Seed = 0
    """The same seed gives the same completions."""
    is_plain: bool = False
    """Prompts are used as they are; else a string is one user message, and the chat template is applied."""
    num_prompts: Count | None = None
    """Only the first ones; by default all."""


class LMEvalSpec(Spec):
    """How a model is put to the tasks of EleutherAI's lm-evaluation-harness."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; by default as many as the task says."""
    limit: Count | None = None
    """Only the first so many rows of each task; by default all."""
    batch_size: Count = 8
    """Rows of one pass through the model."""
    chat_template: bool = False
    """Questions are messages in the model's chat template. Without it they are plain text, as most published figures
    have it."""
    include_path: Annotated[str, AfterValidator(expanded)] | None = None
    """A folder with tasks of one's own, in lm-eval's YAML."""
