"""AI feedback: a language model behind an OpenAI-compatible endpoint scores completions, or compares two.

`Judge` asks a `Client` with a `Template` and reads `Score`s or `Preference`s out of the answers; `ScoreReward` and
`WinsReward` make rewards of it. What it is asked and what it may cost are its spec's, of `dar.config`.
"""

from dar.judge.client import Client
from dar.judge.judge import Judge, PairItem, ScoreItem
from dar.judge.retry import Backoff
from dar.judge.reward import ScoreReward, WinsReward, build_judge_reward
from dar.judge.scores import Scale, Score
from dar.judge.template import Template, load_template
from dar.judge.verdicts import Preference, Verdict

__all__ = [
    "Backoff",
    "Client",
    "Judge",
    "PairItem",
    "Preference",
    "Scale",
    "Score",
    "ScoreItem",
    "ScoreReward",
    "Template",
    "Verdict",
    "WinsReward",
    "build_judge_reward",
    "load_template",
]
