"""MT-Bench on the tiny model with a scripted judge: prompts, ratings, scores, and folders that continue."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import write_rows
from support.scripted_judge import Answer, ScriptedJudge, refused, said, user_text

from dar.config.data import EvalSamplingSpec
from dar.config.judge import JudgeEndpointSpec
from dar.errors import ConfigError, DataError, RewardError
from dar.evaluate.mt_bench.grading import Grade, read_rating
from dar.evaluate.mt_bench.prompts import JudgePrompts, prompt_name
from dar.evaluate.mt_bench.questions import Question, read_questions
from dar.evaluate.mt_bench.run import Files, run_mt_bench
from dar.evaluate.mt_bench.scores import MeanRating, mean_rating, mt_bench

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 7, "category": "writing", "turns": ["say {a}", "again"]},
    {"question_id": 8, "category": "math", "turns": ["one", "two"]},
    {"question_id": 9, "category": "stem", "turns": ["why", "how"]},
]
REFERENCES: list[dict[str, Any]] = [{"question_id": 8, "choices": [{"index": 0, "turns": ["ref one", "ref two"]}]}]
PROMPTS: list[dict[str, Any]] = [
    {"name": "pair-v2", "system_prompt": "pair", "prompt_template": "{answer_a}", "output_format": "[[A]]"},
    {"name": "single-v1", "system_prompt": "s1", "prompt_template": "Q={question} A={answer}"},
    {"name": "single-math-v1", "system_prompt": "s2", "prompt_template": "Q={question} R={ref_answer_1} A={answer}"},
    {
        "name": "single-v1-multi-turn",
        "system_prompt": "s3\n\n",
        "prompt_template": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "s4",
        "prompt_template": "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}",
    },
]
TINY = EvalSamplingSpec(max_tokens=6, temperature=None)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    prompts = [{"output_format": "[[rating]]", **row} for row in PROMPTS]
    return Files(
        write_rows(tmp_path / "question.jsonl", QUESTIONS),
        write_rows(tmp_path / "gpt-4.jsonl", REFERENCES),
        write_rows(tmp_path / "judge_prompts.jsonl", prompts),
    )


def quiet(_: str) -> None:
    pass


def endpoint(url: str, **changes: Any) -> JudgeEndpointSpec:
    settings: dict[str, Any] = {"max_tokens": 50, "top_logprobs": 0, "patience": 0.0}
    return JudgeEndpointSpec.model_validate({"base_url": url, "model": "m"} | settings | changes)


# --- ratings and scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[7.5]] out of 10", 7.5),
        ("[[3]] and later [[9]]", 3.0),
        ("first [2], then [[9]]", 9.0),
        ("only [4] here", 4.0),
        ("[[rating]]", None),
        ("[[0]]", None),
        ("[[11]] [[5]]", None),
        ("[[10]]", 10.0),
        ("8", None),
        ("", None),
        ("<think>[[3]] or [[4]]</think> [[8]]", 8.0),
        ("<think>[[3]]", None),
        ("[[" + "1" * 100_000, None),
        ("[[" + "1" * 100_000 + "." + "1" * 100_000, None),
    ],
)
def test_a_rating_is_the_first_number_in_brackets(text: str, rating: float | None):
    assert read_rating(text) == rating


def test_scores_are_means_with_questions_as_clusters():
    found = mean_rating(
        [Grade("1", "a", 1, 2.0), Grade("1", "a", 2, 4.0), Grade("2", "a", 1, 6.0), Grade("2", "a", 2, 8.0)]
    )
    # Questions' means 3 and 7: s = √8, se = √8/√2 = 2. Four independent ratings would have 2.58/2 = 1.29.
    assert found == MeanRating(5.0, 2.0, 4, 0)
    # One rating of each: the plain s/√n. Ratings 1, 4, 7: s = 3.
    assert mean_rating([Grade(str(n), "a", 1, 1.0 + 3 * n) for n in range(3)]).standard_error == pytest.approx(
        3 / math.sqrt(3)
    )
    # Unequal: ratings 2 and 4 of one question, 9 of another. m = 5; sums of deviations −4 and 4; √(2 · 32)/3.
    unequal = [Grade("1", "a", 1, 2.0), Grade("1", "a", 2, 4.0), Grade("2", "a", 1, 9.0), Grade("2", "a", 2, None)]
    assert mean_rating(unequal) == MeanRating(5.0, 8 / 3, 3, 1)


def test_what_is_not_rated_is_counted_and_never_a_zero():
    assert mean_rating([Grade("1", "a", 1, None)]) == MeanRating(None, None, 0, 1)
    grades = [
        Grade("1", "writing", 1, 8.0),
        Grade("1", "writing", 2, None),
        Grade("2", "math", 1, None, was_answered=False),
        Grade("2", "math", 2, 4.0),
    ]
    found = mt_bench(grades)
    assert list(found.categories) == ["writing", "math"]
    assert found.overall.both == MeanRating(6.0, 2.0, 2, 2)
    assert (found.overall.first.mean, found.overall.second.mean) == (8.0, 4.0)
    assert found.categories["writing"].second == MeanRating(None, None, 0, 1)
    assert found.categories["math"].both == MeanRating(4.0, None, 1, 1)
    assert (found.num_unreadable, found.num_unanswered) == (1, 1)


# --- files -----------------------------------------------------------------------------------------------------------


def test_questions_know_their_references_and_temperatures(files: Files):
    writing, maths, stem = read_questions(files.questions, files.references)
    assert maths == Question("8", "math", ("one", "two"), ("ref one", "ref two"))
    assert [question.references for question in (writing, stem)] == [None, None]
    assert [question.temperature for question in (writing, maths, stem)] == [0.7, 0.0, 0.1]
    assert Question("1", "poetry", ("a", "b"), None).temperature == 0.7
    assert writing.conversation(["first"]) == [
        {"role": "user", "content": "say {a}"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "again"},
    ]
    assert read_questions(files.questions, files.references, first=1) == [writing]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_id": None}, "row 0 has no question_id; it has question_id, category, turns"),
        ({"category": None}, "row 0 has no category"),
        ({"turns": ["one"]}, "row 0: turns: expected a list of two texts, found"),
        ({"question_id": 8}, "row 1: question 8 is there twice"),
        ({"category": "coding"}, "has no answer to question 7, and those of category coding are rated beside one"),
    ],
)
def test_a_question_that_is_none_is_refused(files: Files, changes: dict[str, Any], message: str):
    write_rows(files.questions, [QUESTIONS[0] | changes, *QUESTIONS[1:]])
    with pytest.raises(DataError, match=message):
        read_questions(files.questions, files.references)


def test_a_reference_without_two_answers_is_refused(files: Files):
    write_rows(files.references, [{"question_id": 8, "choices": [{"turns": ["ref one"]}]}])
    with pytest.raises(DataError, match=r"gpt-4\.jsonl: row 0: choices\[0\]\.turns: expected a list of two texts"):
        read_questions(files.questions, files.references)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "has no judge prompt named single-v1$"),
        ({"system_prompt": None}, "single-v1: system_prompt and prompt_template must be texts"),
        ({"output_format": "[[A]]"}, r"single-v1: the output_format must be \[\[rating\]\]"),
        ({"prompt_template": "{question}"}, "must have the fields answer, question and no other; it has question"),
        ({"prompt_template": "{question.__class__} {answer}"}, "it has answer, question.__class__"),
        ({"prompt_template": "{question!r} {answer}"}, "it has none that can be read"),
        ({"prompt_template": "{question"}, "it has none that can be read"),
    ],
)
def test_a_judge_prompt_that_is_none_is_refused(files: Files, changes: dict[str, Any], message: str):
    rows = [{"output_format": "[[rating]]", **row} for row in PROMPTS]
    write_rows(files.judge_prompts, [*rows[:1], rows[1] | changes, *rows[2:]])
    with pytest.raises(DataError, match=message):
        JudgePrompts.read(files.judge_prompts)


def test_each_answer_is_shown_with_the_prompt_of_its_category_and_turn(files: Files):
    prompts = JudgePrompts.read(files.judge_prompts)
    writing, maths, _ = read_questions(files.questions, files.references)
    said = ("A {question}", "B")
    assert [prompts.messages(writing, said, turn).user for turn in (1, 2)] == [
        "Q=say {a} A=A {question}",
        "say {a}|A {question}|again|B",
    ]
    assert [prompts.messages(maths, said, turn).user for turn in (1, 2)] == [
        "Q=one R=ref one A=A {question}",
        "ref one|ref two|one|A {question}|two|B",
    ]
    assert prompts.messages(writing, said, 2).system == "s3\n\n", "as published, to the last character"


# --- the whole evaluation --------------------------------------------------------------------------------------------


def by_turn(body: dict[str, Any], before: int) -> Answer:
    """4 for first answers, 8 for second ones, and no rating where a reference was shown in the second turn."""
    system = body["messages"][0]["content"]
    return said({"s1": "[[4]]", "s2": "[[4]]", "s3\n\n": "so [[8]]", "s4": "who knows"}[system])


def test_a_model_is_rated_by_category_and_turn_and_continues(tiny_folder: Path, files: Files, tmp_path: Path):
    out, notes = tmp_path / "e", []

    def run(url: str, **changes: Any) -> Any:
        return run_mt_bench(str(tiny_folder), files, endpoint(url, **changes), out, TINY, notes.append)

    with ScriptedJudge(by_turn) as server:
        found = run(server.url)
        assert len(server.bodies) == 6
        assert {name: row.both.mean for name, row in found.categories.items()} == {"writing": 6, "math": 4, "stem": 6}
        assert found.overall.first == MeanRating(4.0, 0.0, 3, 0)
        assert found.overall.second == MeanRating(8.0, 0.0, 2, 1)
        assert (found.num_unreadable, found.num_unanswered) == (1, 0)
        assert json.loads((out / "result.json").read_text()) == dataclasses.asdict(found)
        assert {body["temperature"] for body in server.bodies} == {0.0}
        assert {body["max_tokens"] for body in server.bodies} == {50}
        assert not any("logprobs" in body for body in server.bodies)
    rows = [json.loads(line) for line in (out / "model.jsonl").read_text().splitlines()]
    answers = {row["key"]: row for row in rows}
    assert set(answers) == {"0", "1", "2", "3", "4", "5"}
    first, second = answers["2"], answers["3"]
    assert first["prompt"] == [{"role": "user", "content": "one"}]
    assert second["prompt"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first["completion"]},
        {"role": "user", "content": "two"},
    ]
    asked = {user_text(body) for body in server.bodies}
    assert f"Q=one R=ref one A={first['completion']}" in asked
    assert f"ref one|ref two|one|{first['completion']}|two|{second['completion']}" in asked
    # Two judgements and the last answer are lost: they, and nothing else, are made again, the same as before.
    write_rows(out / "model.jsonl", [row for row in rows if row["key"] != "5"])
    judgements = (out / "judgements.jsonl").read_text().splitlines(keepends=True)
    (out / "judgements.jsonl").write_text("".join(judgements[:4]))
    with ScriptedJudge(by_turn) as server:
        assert run(server.url, timeout=5.0, concurrency=1) == found
        assert len(server.bodies) == 2
        again = {json.loads(line)["key"]: json.loads(line) for line in (out / "model.jsonl").read_text().splitlines()}
        assert again == answers
        with pytest.raises(ConfigError, match="the two must not mix: judge: "):
            run(server.url, model="another")


def test_what_the_judge_did_not_answer_is_asked_again(tiny_folder: Path, files: Files, tmp_path: Path):
    notes: list[str] = []

    def run(script: Callable[[dict[str, Any], int], Answer]) -> tuple[Any, int]:
        with ScriptedJudge(script) as server:
            judge, out = endpoint(server.url), tmp_path / "e"
            return run_mt_bench(str(tiny_folder), files, judge, out, TINY, notes.append), len(server.bodies)

    def refuses_stem(body: dict[str, Any], before: int) -> Answer:
        return refused(400, "too long") if "why" in user_text(body) else by_turn(body, before)

    found, asked = run(refuses_stem)
    assert (asked, found.num_unanswered, found.num_unreadable) == (6, 2, 1)
    assert found.categories["stem"].both == MeanRating(None, None, 0, 2)
    assert "2 answers were not rated" in notes[-1]
    assert "400: too long" in notes[-1]
    found, asked = run(by_turn)
    assert (asked, found.num_unanswered, found.num_unreadable) == (2, 0, 1)


def test_no_rating_at_all_is_an_error_and_no_score(tiny_folder: Path, files: Files, tmp_path: Path):
    with ScriptedJudge(lambda body, before: said("fine")) as server:
        message = r"none of the 6 answers was rated: 0 requests got no answer .*, and 6 of its answers hold no rating"
        with pytest.raises(RewardError, match=message):
            run_mt_bench(str(tiny_folder), files, endpoint(server.url), tmp_path / "e", TINY, quiet)
    assert not (tmp_path / "e" / "result.json").exists()


def test_a_judge_whose_thoughts_took_all_tokens_is_named(tiny_folder: Path, files: Files, tmp_path: Path):
    def thinks(body: dict[str, Any], before: int) -> Answer:
        return said(None, finish_reason="length") if "why" in user_text(body) else by_turn(body, before)

    notes: list[str] = []
    with ScriptedJudge(thinks) as server:
        found = run_mt_bench(str(tiny_folder), files, endpoint(server.url), tmp_path / "e", TINY, notes.append)
    assert found.categories["stem"].both == MeanRating(None, None, 0, 2)
    told = [note for note in notes if "was cut off at its limit of tokens" in note]
    assert len(told) == 2
    assert told[0].startswith("question 9, turn ")


def test_a_key_in_a_judgement_is_not_written(
    tiny_folder: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_KEY", "abc-very-secret")
    with ScriptedJudge(lambda body, before: said("[[5]] abc-very-secret")) as server:
        judge = endpoint(server.url, api_key_env="MY_KEY")
        run_mt_bench(str(tiny_folder), files, judge, tmp_path / "e", TINY, quiet)
    judgements = (tmp_path / "e" / "judgements.jsonl").read_text()
    assert judgements.count("[[5]] ***") == 6
    assert "abc-very-secret" not in judgements


def test_temperatures_are_those_of_the_category(tiny_folder: Path, files: Files, tmp_path: Path):
    """Greedy answers do not depend on the seed; sampled ones do."""
    same = [QUESTIONS[0] | {"question_id": n, "category": "writing" if n % 2 else "extraction"} for n in range(8)]
    write_rows(files.questions, same)

    def answers(out: str, **changes: Any) -> list[str]:
        sampling = TINY.model_copy(update=changes)
        with ScriptedJudge(lambda body, before: said("[[5]]")) as server:
            run_mt_bench(str(tiny_folder), files, endpoint(server.url), tmp_path / out, sampling, quiet)
        rows = [json.loads(line) for line in (tmp_path / out / "model.jsonl").read_text().splitlines()]
        return [row["completion"] for row in sorted(rows, key=lambda row: int(row["key"]))]

    published, other_seed, greedy = answers("a"), answers("b", seed=1), answers("c", temperature=0.0)
    extraction, writing = ([2 * n + turn for n in rows for turn in (0, 1)] for rows in (range(0, 8, 2), range(1, 8, 2)))
    assert [published[n] for n in extraction] == [other_seed[n] for n in extraction] == [greedy[n] for n in extraction]
    assert [published[n] for n in writing] != [other_seed[n] for n in writing]
    assert len({published[n] for n in writing[::2]}) > 1
    assert len({greedy[n] for n in range(0, 16, 2)}) == 1


def test_two_answers_must_fit_before_anything_is_sampled(tiny_folder: Path, files: Files, tmp_path: Path):
    def run(max_tokens: int) -> None:
        sampling = EvalSamplingSpec(max_tokens=max_tokens, temperature=None)
        run_mt_bench(str(tiny_folder), files, endpoint("http://127.0.0.1:1/v1"), tmp_path / "e", sampling, quiet)

    with pytest.raises(ConfigError, match=r"--max-tokens is 128, 2 times, but .* reads at most 256 tokens"):
        run(128)
    with pytest.raises(DataError, match=r"the questions: 3 of 3 prompts are longer than 2 tokens .*lower --max-tokens"):
        run(127)
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["settings.json"]


def test_a_key_that_is_not_set_is_found_before_anything_is_sampled(files: Files, tmp_path: Path):
    judge = endpoint("http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY_OF_MINE")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY_OF_MINE, which is not set"):
        run_mt_bench("/no/such/model", files, judge, tmp_path / "e", TINY, quiet)
    assert not (tmp_path / "e").exists()


# --- the published files ---------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("DAR_TEST_DATA", "no-such-folder")) / "mt_bench"


@pytest.mark.skipif(not DATA.is_dir(), reason="the environment variable DAR_TEST_DATA names no folder with mt_bench")
def test_the_published_files_are_read(tiny_folder: Path, tmp_path: Path):
    files = Files(*(DATA / name for name in ("question.jsonl", "reference_answer_gpt-4.jsonl", "judge_prompts.jsonl")))
    questions = read_questions(files.questions, files.references)
    assert len(questions) == 80
    categories = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
    assert [question.category for question in questions] == [name for name in categories for _ in range(10)]
    assert sum(question.references is not None for question in questions) == 30
    prompts = JudgePrompts.read(files.judge_prompts)
    maths, writing = questions[30], questions[0]
    assert [prompt_name(maths, turn) for turn in (1, 2)] == ["single-math-v1", "single-math-v1-multi-turn"]
    for turn in (1, 2):
        text = prompts.messages(maths, ("answer α", "answer β"), turn).user
        assert maths.turns[turn - 1] in text
        assert maths.references is not None
        assert maths.references[turn - 1] in text
        assert ("answer β" in text) == (turn == 2)
    first = prompts.messages(writing, ("answer α", "answer β"), 1)
    assert first.system == "You are a helpful assistant."
    assert first.user.endswith("[The Start of Assistant's Answer]\nanswer α\n[The End of Assistant's Answer]")
    assert "Reference" not in first.user
