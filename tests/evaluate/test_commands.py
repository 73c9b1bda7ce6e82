"""Evaluations from models to figures, on the tiny model: continued exactly, judged by rewards."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from support.reward_models import save_classifier
from support.rows import write_rows
from support.scripted_judge import Answer, ScriptedJudge, between, said, user_text
from transformers import LlamaForSequenceClassification

from dar.assembly.reward import build_reward
from dar.batch import Prompt
from dar.config.data import EvalSamplingSpec
from dar.config.run import RuntimeSpec
from dar.errors import ConfigError, DataError, RewardError
from dar.evaluate.annotations import read_judged_pairs
from dar.evaluate.benchmarks import ifeval
from dar.evaluate.commands import run_choices, run_gsm8k, run_ifeval, run_win_rate
from dar.evaluate.folder import EvaluationFolder, Lines
from dar.evaluate.generate import CHUNK
from dar.evaluate.judging import PairToJudge, judge_pairs
from dar.evaluate.models import build_generators, read_judge, read_prompts
from dar.evaluate.preference_files import LabeledPair, read_labeled_pairs
from dar.rewards import Failed, Reward, group_reward
from dar.sandbox.sandbox import Sandbox

TINY = EvalSamplingSpec(max_tokens=6)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {n}", "reference": "word " * (n % 3), "kind": "ab"[n % 2]} for n in range(CHUNK + 2)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


# --- judging ---------------------------------------------------------------------------------------------------------


def lines(tmp_path: Path) -> Lines:
    return EvaluationFolder(tmp_path / "judged", {}).lines("judgements", key=("pair", "model_first"))


def test_the_higher_reward_wins_and_failures_are_no_ties(tmp_path: Path):
    seen: list[dict[str, Any]] = []

    def reward(prompts: list[Any], completions: list[Any], gold: list[str]) -> list[float | Failed | None]:
        seen.append({"prompts": prompts, "completions": completions, "gold": gold})
        return [1.0, 0.0, 2.0, 2.0, Failed("no answer"), 1.0, None, 1.0]

    pairs = [PairToJudge(str(n), "q", f"m{n}", "b", columns={"gold": f"g{n}"}) for n in range(4)]
    found = judge_pairs(pairs, Reward("mine", reward), lines(tmp_path), quiet)
    assert [one.preference for one in found] == [1.0, 0.5, None, None]
    assert [one.verdict for one in found] == ["1 : 0", "2 : 2", "no answer", "the reward does not apply"]
    assert seen[0]["completions"] == ["m0", "b", "m1", "b", "m2", "b", "m3", "b"]
    assert seen[0]["gold"] == ["g0", "g0", "g1", "g1", "g2", "g2", "g3", "g3"]


def test_what_was_judged_is_not_asked_again(tmp_path: Path):
    calls: list[int] = []

    def reward(completions: list[Any]) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return [float(len(text)) for text in completions]

    pairs = [PairToJudge(str(n), "q", "long", "b") for n in range(CHUNK + 1)]
    with pytest.raises(KeyboardInterrupt):
        judge_pairs(pairs, Reward("mine", reward), lines(tmp_path), quiet)
    found = judge_pairs(pairs, Reward("mine", reward), lines(tmp_path), quiet)
    assert calls == [2 * CHUNK, 2, 2]
    assert [one.preference for one in found] == [1.0] * (CHUNK + 1)


def test_messages_are_judged_as_messages(tmp_path: Path):
    def reward(completions: list[Any]) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    pair = PairToJudge("0", [{"role": "user", "content": "q"}], "long", "b")
    assert judge_pairs([pair], Reward("mine", reward), lines(tmp_path), quiet)[0].preference == 1.0


def longer_wins(body: dict[str, Any], before: int) -> Answer:
    """Prefers the longer completion, and the first of two that are as long."""
    first, second = (len(between(user_text(body), name)) for name in ("completion_a", "completion_b"))
    return said("B" if second > first else "A")


def test_a_reward_that_compares_a_prompts_completions_compares_a_pair(tmp_path: Path):
    @group_reward
    def shortest_wins(completions: list[str]) -> list[float]:
        return [float(len(text) == min(map(len, completions))) for text in completions]

    pairs = [PairToJudge("0", "q", "aa", "a"), PairToJudge("1", "q", "aaa", "aaaa")]
    found = judge_pairs(pairs, Reward("shortest", shortest_wins), lines(tmp_path), quiet)
    # All four together, "aaa" would not be the shortest.
    assert [one.preference for one in found] == [0.0, 1.0]


def test_a_pairwise_judge_is_asked_in_both_orders(tmp_path: Path):
    judge = tmp_path / "judge.yaml"
    with ScriptedJudge(longer_wins) as server:
        endpoint = f"{{base_url: '{server.url}', model: m}}"
        judge.write_text(f"type: judge\nmode: pairwise\ntemplate: free\ncache: null\nendpoint: {endpoint}\n")
        reward = build_reward(read_judge(str(judge)), {}, RuntimeSpec())
        pairs = [PairToJudge("0", "q", "longer", "b"), PairToJudge("1", "q", "aa", "bb")]
        found = judge_pairs(pairs, reward, lines(tmp_path), quiet)
        assert [(one.pair, one.model_first, one.preference) for one in found] == [
            ("0", True, 1.0),
            ("0", False, 1.0),
            ("1", True, 1.0),
            ("1", False, 0.0),
        ]
        assert len(server.bodies) == 4
        # Cut off between the two lines of a pair: the missing one is written, and no line twice.
        path = tmp_path / "judged" / "judgements.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
        assert judge_pairs(pairs, reward, lines(tmp_path), quiet) == found
        assert len(path.read_text().splitlines()) == 4
    outcomes = [pair.outcome for pair in read_judged_pairs(path)]
    assert outcomes == ["win", "tie"]


def test_a_judge_may_move_and_wait_longer_but_not_be_another(tmp_path: Path):
    judge = tmp_path / "judge.yaml"

    def run(**changes: Any) -> None:
        endpoint = {"base_url": "http://127.0.0.1:1/v1", "model": "m"} | changes
        judge.write_text(json.dumps({"type": "judge", "mode": "pairwise", "cache": None, "endpoint": endpoint}))
        run_choices([], write_rows(tmp_path / "pairs.jsonl", [{"a": 1}]), str(judge), tmp_path / "e", quiet)

    run()
    (tmp_path / "e" / "judgements.jsonl").write_text('{"pair": "0", "model_first": true}\n')
    run(base_url="http://127.0.0.1:2/v1", timeout=5, concurrency=2)
    with pytest.raises(ConfigError, match="other settings"):
        run(model="another")


def test_a_judge_is_a_reward_of_a_recipe(tmp_path: Path):
    assert read_judge("sentiment").type == "sentiment"
    path = tmp_path / "judge.yaml"
    path.write_text("type: regex\npattern: a+\n")
    assert read_judge(str(path)).type == "regex"
    with pytest.raises(ConfigError, match=r"--judge sentimnt is not a reward: .*did you mean 'sentiment'.* such as"):
        read_judge("sentimnt")
    path.write_text("type: regex\npatern: a+\n")
    with pytest.raises(ConfigError, match=r"unknown key 'patern' \(did you mean 'pattern'\?\)"):
        read_judge(str(path))
    path.write_text("")
    with pytest.raises(ConfigError, match=r"expected a mapping of keys to values \(found None\)"):
        read_judge(str(path))
    with pytest.raises(ConfigError, match=r"cannot be read: "):
        read_judge(str(tmp_path / "none.yaml"))


# --- generation ------------------------------------------------------------------------------------------------------


def generator_of(folder: Path, **changes: Any) -> Any:
    sampling = EvalSamplingSpec.model_validate({"max_tokens": 6, "seed": 3} | changes)
    return build_generators(str(folder), sampling, [1.0])[1.0]


def prompts_of(folder: Path, texts: list[str], **changes: Any) -> tuple[Prompt, ...]:
    rows = [{"text": text} for text in texts]
    sampling = EvalSamplingSpec.model_validate({"max_tokens": 6} | changes)
    return read_prompts(str(folder), rows, sampling, prompt_column="text", where="here")


def test_an_interrupted_generation_continues_with_the_same_completions(tiny_folder: Path, tmp_path: Path):
    prompts = prompts_of(tiny_folder, [f"say {n}" for n in range(CHUNK + 3)])
    folder = EvaluationFolder(tmp_path / "e", {})
    whole, parts = folder.lines("whole", key=("key",)), folder.lines("parts", key=("key",))
    generator = generator_of(tiny_folder)
    generator.complete(prompts, whole, quiet)
    generator.complete(prompts[:5], parts, quiet)
    generator.complete(prompts, parts, quiet)
    assert list(parts.rows) == list(whole.rows) == [(str(n),) for n in range(CHUNK + 3)]
    assert parts.rows == whole.rows
    assert len({row["completion"] for row in whole.rows.values()}) > 1
    alike = folder.lines("alike", key=("key",))
    generator.complete(prompts_of(tiny_folder, ["say"] * 4), alike, quiet)
    assert len({row["completion"] for row in alike.rows.values()}) > 1, "every prompt has random numbers of its own"
    other = folder.lines("other", key=("key",))
    generator_of(tiny_folder, seed=4).complete(prompts, other, quiet)
    assert other.rows != whole.rows


def test_prompts_are_read_without_weights(tiny_folder: Path):
    (tiny_folder / "model.safetensors").unlink()
    chat, plain = (prompts_of(tiny_folder, ["say"], is_plain=is_plain)[0] for is_plain in (False, True))
    assert (chat.content, plain.content) == ([{"role": "user", "content": "say"}], "say")
    assert len(chat.token_ids) > len(plain.token_ids)
    with pytest.raises(ConfigError, match=r"--max-tokens is 256, but .* reads at most 256 tokens"):
        prompts_of(tiny_folder, ["say"], max_tokens=256)
    with pytest.raises(
        DataError, match=r"here: 1 of 2 prompts are longer than 1 tokens .* lower --max-tokens, or leave"
    ):
        prompts_of(tiny_folder, ["a", "say " * 9], max_tokens=255, is_plain=True)
    (tiny_folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template: add --plain"):
        prompts_of(tiny_folder, ["say"])


# --- whole evaluations -----------------------------------------------------------------------------------------------


def test_win_rate_of_a_model_against_a_column_and_against_itself(tiny_folder: Path, prompts: Path, tmp_path: Path):
    judge = tmp_path / "length.yaml"
    judge.write_text("type: pattern_count\npattern: word\n")

    def judged(against: str, out: str, **changes: Any) -> Any:
        return run_win_rate(str(tiny_folder), against, prompts, str(judge), tmp_path / out, TINY, quiet, **changes)

    pairs = judged("column:reference", "column", category_column="kind")
    # The tiny model never writes "word"; references have 0, 1, 2 of them in turn.
    assert [pair.outcome for pair in pairs[:3]] == ["tie", "loss", "loss"]
    assert [pair.one.category for pair in pairs[:2]] == ["a", "b"]
    outputs = (tmp_path / "column" / "model.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in outputs] == [str(n) for n in range(CHUNK + 2)]
    assert not (tmp_path / "column" / "baseline.jsonl").exists()
    itself = judged(str(tiny_folder), "itself")
    assert {pair.outcome for pair in itself} == {"tie"}
    with pytest.raises(ConfigError, match="other settings"):
        judged("column:reference", "itself")
    prompts.write_text(json.dumps({"prompt": "a", "reference": [1, 2]}) + "\n")
    with pytest.raises(DataError, match=r"row 0: 'reference' must be text or a list of messages .*, found \[1, 2\]"):
        judged("column:reference", "no_text")
    assert not (tmp_path / "no_text").exists()
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": ["a"]}], "reference": "a"}) + "\n")
    with pytest.raises(DataError, match="row 0: 'prompt': message 0: 'content' must be text"):
        judged("column:reference", "parts")
    with pytest.raises(DataError, match="row 0 has no refrence"):
        judged("column:refrence", "misspelled")
    assert not (tmp_path / "misspelled").exists()


def test_everything_is_checked_before_anything_is_sampled(tiny_folder: Path, prompts: Path, tmp_path: Path):
    def judged(against: str | Path, judge: str) -> Any:
        return run_win_rate(str(tiny_folder), str(against), prompts, judge, tmp_path / "e", TINY, quiet)

    with pytest.raises(ConfigError, match="no_such_module_of_mine cannot be imported"):
        judged("column:reference", "no_such_module_of_mine:reward")
    assert not (tmp_path / "e").exists()
    with pytest.raises(ConfigError, match=r"the model path .*/none does not exist"):
        judged(tmp_path / "none", "sentiment")
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["settings.json"]
    # Nothing was sampled with these settings, so they may be put right in the same folder.
    judged("column:reference", "sentiment")
    with pytest.raises(ConfigError, match="the two must not mix: against: 'column:reference'"):
        judged(tmp_path / "none", "sentiment")


def test_a_model_that_has_completed_everything_may_be_gone(tiny_folder: Path, prompts: Path, tmp_path: Path):
    def judged() -> Any:
        return run_win_rate(str(tiny_folder), "column:reference", prompts, "sentiment", tmp_path / "e", TINY, quiet)

    found = judged()
    shutil.rmtree(tiny_folder)
    assert judged() == found


def test_ifeval_counts_prompts_and_instructions(tiny_folder: Path, tmp_path: Path):
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "prompt": "b",
            "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [{}, {"keywords": ["tea"]}],
        },
    ]
    # First prompt: followed. Second: a comma, but the keyword; without its first line no comma is left.
    found = ifeval(rows, ["fine", "well,\nsome tea"])
    assert (found.prompt_strict.percent, found.instruction_strict.percent) == (50, pytest.approx(200 / 3))
    assert (found.prompt_loose.percent, found.instruction_loose.percent) == (100, 100)
    assert {name: share.percent for name, share in found.kinds.items()} == {"keywords": 100, "punctuation": 50}
    result = run_ifeval(str(tiny_folder), write_rows(tmp_path / "if.jsonl", rows), tmp_path / "e", TINY, quiet)
    assert json.loads((tmp_path / "e" / "result.json").read_text())["prompt_strict"]["n"] == result.prompt_strict.n == 2


def test_an_unknown_instruction_is_refused_before_anything_is_sampled(tiny_folder: Path, tmp_path: Path):
    rows: list[dict[str, Any]] = [{"prompt": "a", "instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}]
    with pytest.raises(DataError, match="no_coma"):
        run_ifeval(str(tiny_folder), write_rows(tmp_path / "if.jsonl", rows), tmp_path / "e", TINY, quiet)
    assert not (tmp_path / "e").exists()


def test_gsm8k_counts_right_answers(tiny_folder: Path, tmp_path: Path):
    rows = [{"question": "1 + 1?", "answer": "so\n#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    prompts, out = write_rows(tmp_path / "gsm.jsonl", rows), tmp_path / "e"
    assert run_gsm8k(str(tiny_folder), prompts, out, TINY, quiet).percent == 0
    outputs = [json.loads(line) for line in (out / "model.jsonl").read_text().splitlines()]
    outputs[1]["completion"] = "The answer is 4."
    write_rows(out / "model.jsonl", outputs)
    assert run_gsm8k(str(tiny_folder), prompts, out, TINY, quiet).percent == 50


def test_a_gold_answer_that_is_none_is_refused_before_anything_is_sampled(tmp_path: Path):
    prompts = write_rows(tmp_path / "gsm.jsonl", [{"question": "1 + 1?", "answer": "#### "}])
    with pytest.raises(
        DataError,
        match="row 0 cannot be scored by the reward 'math': no answer can be read from the gold answer '#### '",
    ):
        run_gsm8k("/no/such/model", prompts, tmp_path / "e", TINY, quiet)


def test_answers_none_of_which_can_be_checked_are_no_zero(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = write_rows(tmp_path / "gsm.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    monkeypatch.setattr(Sandbox, "map", lambda self, requests: [Failed("it took too long") for _ in requests])
    with pytest.raises(RewardError, match="none of the 1 answers could be checked; the first: it took too long"):
        run_gsm8k(str(tiny_folder), prompts, tmp_path / "e", TINY, quiet)


def test_a_reward_chooses_among_labeled_pairs(tmp_path: Path):
    judge = tmp_path / "judge.yaml"
    judge.write_text("type: pattern_count\npattern: a\n")
    pairs = [LabeledPair("0", "q", ("aa", "b"), (1,)), LabeledPair("1", "q", ("b", "a"), (1,))]
    found = run_choices(pairs, write_rows(tmp_path / "pairs.jsonl", [{"a": 1}]), str(judge), tmp_path / "e", quiet)
    assert [pair.outcome for pair in found] == ["win", "loss"]


def test_a_reward_model_reads_an_hh_row_as_the_conversation_it_is_trained_on(tmp_path: Path):
    folder = save_classifier(tmp_path / "classifier")
    judge = tmp_path / "judge.yaml"
    judge.write_text(f"type: model\nmodel: {folder}\nprecision: fp32\n")
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    path = write_rows(tmp_path / "hh.jsonl", [{"chosen": f"{start} yes", "rejected": f"{start} no"}])
    (pair,) = read_labeled_pairs(path).pairs
    (found,) = run_choices([pair], path, str(judge), tmp_path / "e", quiet)
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": "and?"}]  # fmt: skip
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(folder), make_tokenizer()
    scores = []
    for text in pair.completions:
        ids: Any = tokenizer.apply_chat_template(
            [*conversation, {"role": "assistant", "content": text}], return_dict=True
        )
        with torch.no_grad():
            scores.append(float(model(torch.tensor([ids["input_ids"]])).logits))
    assert abs(scores[0] - scores[1]) > 0.01
    lines = (tmp_path / "e" / "judgements.jsonl").read_text().splitlines()
    scored = [float(score) for score in json.loads(lines[0])["verdict"].split(" : ")]
    assert scored == pytest.approx(scores, rel=1e-3)
    assert found.outcome == ("win" if scores[0] > scores[1] else "loss")
