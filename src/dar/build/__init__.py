"""The only place where specs become objects."""

from dar.build.algorithm import build_algorithm, require_reference_is_read
from dar.build.data import build_data, build_prompts, context_length
from dar.build.device import resolve_precision
from dar.build.evaluation import build_generator, build_generators, build_judging_reward, read_judge, read_prompts
from dar.build.loop import build_loop
from dar.build.objects import Objects
from dar.build.policy import build_policy
from dar.build.realignment import build_oracle
from dar.build.reward import build_reward, check_reward
from dar.build.reward_model import build_reward_model_loop
from dar.build.rows import check_rows

__all__ = [
    "Objects",
    "build_algorithm",
    "build_data",
    "build_generator",
    "build_generators",
    "build_judging_reward",
    "build_loop",
    "build_oracle",
    "build_policy",
    "build_prompts",
    "build_reward",
    "build_reward_model_loop",
    "check_reward",
    "check_rows",
    "context_length",
    "read_judge",
    "read_prompts",
    "require_reference_is_read",
    "resolve_precision",
]
