"""The model card: what was raised against a run stands beside what it reached."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from dar.config.recipe import build_spec
from dar.config.reward_model import RewardModelSpec
from dar.record.card import model_card
from dar.reward_model.card import reward_model_card

RECIPE: dict[str, Any] = {
    "model": "some/model",
    "data": {"train": "prompts.jsonl", "heldout": "prompts.jsonl"},
    "rewards": ["sentiment"],
    "steps": 6,
    "output_dir": "run",
}
ALERT = {"step": 4, "rule": "kl", "value": 26.0, "threshold": 25.0, "message": "KL is 26", "action": "mark"}


@pytest.mark.parametrize(
    ("rules", "alerts", "said"),
    [
        (["kl"], [ALERT, ALERT | {"step": 6}], "* step 4, kl (mark): KL is 26\n* step 6, kl (mark): KL is 26\n"),
        (["missing_eos", "kl"], [], "No alert was raised during training; watched were: missing_eos, kl.\n"),
    ],
)
def test_the_card_lists_the_alerts_or_what_raised_none(rules: list[str], alerts: list[dict[str, Any]], said: str):
    spec = build_spec(RECIPE | {"alerts": [{"type": rule, "max": 0.5} for rule in rules]}, where="recipe.yaml")
    assert f"\n\n{said}\n```yaml\n" in model_card(spec, [], alerts)


def test_a_run_that_nothing_watched_says_nothing_of_alerts():
    assert "alert" not in model_card(build_spec(RECIPE, where="recipe.yaml"), [], []).partition("```yaml")[0].lower()


def test_the_hub_reads_what_it_shows_from_the_front_matter(tmp_path: Path):
    recipe = RECIPE | {"data": {"train": "lab/prompts", "heldout": {"path": "lab/asked", "split": "test"}}}
    lora = {"model": {"path": "some/model", "lora": {"rank": 2}}, "output_dir": "runs/first"}
    lines = [{"step": 0, "eval/reward": 0.25, "eval/gold": -1.0}, {"step": 6, "eval/reward": 0.75, "eval/gold": -2.0}]
    (tmp_path / "README.md").write_text(model_card(build_spec(recipe | lora, where="r"), lines, []))
    data = ModelCard.load(tmp_path / "README.md").data
    assert isinstance(data, ModelCardData)
    assert (data.base_model, data.datasets, data.library_name) == ("some/model", ["lab/prompts"], "peft")
    assert (data.pipeline_tag, data.tags, data.model_name) == ("text-generation", ["rlhf", "dar"], "first")
    assert [(each.metric_name, each.metric_type, each.metric_value) for each in data.eval_results or ()] == [
        ("reward", "reward", 0.75),
        ("reward, before training", "reward", 0.25),
        ("gold reward, not trained on", "gold", -2.0),
        ("gold reward, not trained on, before training", "gold", -1.0),
    ]
    assert {(each.task_type, each.dataset_type, each.dataset_split) for each in data.eval_results or ()} == {
        ("text-generation", "lab/asked", "test")
    }


def test_the_hub_reads_the_accuracy_of_a_reward_model():
    recipe = {"model": "some/model", "data": {"train": "a.jsonl", "heldout": "b.jsonl"}, "steps": 1, "output_dir": "rm"}
    evaluation = {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.75, "num_pairs": 4}}
    spec = build_spec(recipe, where="r", kind=RewardModelSpec)
    data = ModelCard(reward_model_card(spec, evaluation, num_pairs=3, command="dar")).data
    assert isinstance(data, ModelCardData)
    assert (data.pipeline_tag, data.datasets, data.model_name) == ("text-classification", None, "rm")
    assert [each.metric_value for each in data.eval_results or ()] == [0.75, 0.5]


NAME = "a/b\nlicense: mit\n---\n# <b>x</b> \u202e"


def test_what_the_front_matter_says_is_what_was_trained_from():
    card = model_card(build_spec(RECIPE | {"model": NAME}, where="recipe.yaml"), [], [])
    beginning, rest = card.removeprefix("---\n").split("\n---\n", maxsplit=1)
    # The Hub takes no card whose base model is none of its own.
    expected = {"library_name": "transformers", "tags": ["rlhf", "dar"], "pipeline_tag": "text-generation"}
    assert yaml.safe_load(beginning) == expected
    hub = model_card(build_spec(RECIPE | {"model": "some/model"}, where="recipe.yaml"), [], [])
    assert yaml.safe_load(hub.split("---\n")[1])["base_model"] == "some/model"
    assert rest.startswith("\n# a/b license: mit --- \\# \\<b\\>x\\</b\\> \\[RLO\\], aligned with DAR\n")
    assert "\u202e" not in card


def test_names_make_no_markdown_of_their_own():
    hostile = "```\n# Heading\n| a | b |\n<script>"
    rewards = [{"type": "length", "target": 3, "name": hostile}]
    recipe = RECIPE | {"rewards": rewards, "data": {"train": hostile}, "output_dir": hostile}
    alerts = [ALERT | {"message": hostile}]
    card = model_card(build_spec(recipe, where="recipe.yaml"), [], alerts, command=f"dar train '{hostile}'")
    escaped = r"\`\`\` \# Heading \| a \| b \| \<script\>"
    assert f" from {escaped}; reward: {escaped} (weight 1).\n" in card
    assert f"* step 4, kl (mark): {escaped}\n" in card
    # What is left as it was stands between fences that are longer than its own.
    outside = re.sub(r"^````(sh|yaml)\n.*?\n````$", "", card, flags=re.MULTILINE | re.DOTALL)
    assert "```" not in outside
    assert "<script>" not in outside
    assert outside.count("\n#") == 1


def test_the_card_of_a_reward_model_is_as_careful():
    recipe = {"model": NAME, "data": "`x`|y", "steps": 1, "output_dir": "run"}
    card = reward_model_card(build_spec(recipe, where="r", kind=RewardModelSpec), {}, num_pairs=3, command="dar `````")
    beginning, rest = card.removeprefix("---\n").split("\n---\n", maxsplit=1)
    assert yaml.safe_load(beginning)["tags"] == ["reward-model"]
    assert rest.startswith("\n# A reward model from a/b license: mit --- \\# ")
    assert r"preference pairs from \`x\`\|y. One output" in rest
    assert "\n``````sh\ndar `````\n``````\n" in rest
