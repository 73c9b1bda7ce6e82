"""Greedy, top-k, top-p, minimum lengths and stop strings: the sets against transformers' own, and what the engine does.

The tiny model's tokens are bytes, so a text is as long as its tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from support.engines import engine_of
from support.handmade import make_spec
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dar.assembly.loop import build_loop
from dar.batch import Prompt, Rollouts
from dar.config.data import DecodingSpec
from dar.config.recipe import build_spec, load_recipe
from dar.errors import ConfigError
from dar.policies.precision import Precision
from dar.policies.text.policy import Policy
from dar.rewards import Reward, RewardSet
from dar.rollout.in_process.decode import PaddedDecoder
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import PLAIN, constrained, first_stop, truncate
from dar.run.heldout import HeldoutEvaluation

INFINITY = float("inf")
FP32 = Precision(torch.device("cpu"), torch.float32)
PROMPTS = [Prompt(i, "x", tuple(range(30, 30 + n)), {}) for i, n in enumerate((7, 1, 12))]


def kept(logits: Tensor) -> list[list[int]]:
    """The token ids that can still be drawn, row by row."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


# --- the sets --------------------------------------------------------------------------------------------------------

SMALL = torch.tensor([[0.2, 0.4, 0.3, 0.1]]).log()
# e⁰ : e⁻¹ : e⁻¹ : e⁻¹ : e⁻² = 1 : .368 : .368 : .368 : .135, of 2.239: .447, .611, .775, .940, 1.
TIED = torch.tensor([[0.0, -1.0, -2.0, -1.0, -1.0]])


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p", "expected"),
    [
        (SMALL, None, 0.39, [1]),  # .4 alone reaches it
        (SMALL, None, 0.41, [1, 2]),  # .4 does not, .4 + .3 does
        (SMALL, None, 0.69, [1, 2]),
        (SMALL, None, 0.71, [0, 1, 2]),
        (SMALL, None, 0.91, [0, 1, 2, 3]),
        (SMALL, None, 1e-9, [1]),  # at least one token
        (SMALL, 2, 1.0, [1, 2]),
        (SMALL, 9, 1.0, [0, 1, 2, 3]),  # more than there are
        # Of the two likeliest, (.4, .3)/.7 = (.571, .429): the first alone reaches .5, which .4 of all does not.
        (SMALL, 2, 0.5, [1]),
        (SMALL, 2, 0.58, [1, 2]),
        # Tokens 1, 3 and 4 are tied; one of them does not fit, and ties go to the smaller id.
        (TIED, 3, 1.0, [0, 1, 3]),
        (TIED, 2, 1.0, [0, 1]),
        (TIED, None, 0.6, [0, 1]),
        (TIED, None, 0.7, [0, 1, 3]),
        # Equal logits have weights of exactly 1, so 2 of 4 are exactly .5 and 1500 of 3000, too: large enough.
        (torch.zeros(1, 4), None, 0.5, [0, 1]),
        (torch.zeros(1, 3000), None, 0.5, list(range(1500))),
    ],
)
def test_sets_of_a_small_distribution(logits: Tensor, top_k: int | None, top_p: float, expected: list[int]):
    found = truncate(logits, top_k=top_k, top_p=top_p)
    assert kept(found) == [expected]
    assert torch.equal(found[0, expected], logits[0, expected])


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (None, 0.3), (None, 0.95), (50, 0.9), (2000, 0.8), (None, 0.9999)]
)
def test_sets_are_those_of_transformers(scale: float, top_k: int | None, top_p: float):
    # At scale .1 the nucleus has thousands of tokens, at scale 4 a handful.
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(6, 5000, generator=generator)
    expected = logits
    ids = torch.zeros(6, 1, dtype=torch.int64)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(ids, expected)  # pyright: ignore[reportArgumentType] - alias of a LongTensor
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)  # pyright: ignore[reportArgumentType]
    assert kept(truncate(logits, top_k=top_k, top_p=top_p)) == kept(expected)


def test_a_row_has_the_same_set_alone_and_in_company():
    generator = torch.Generator().manual_seed(1)
    # Row by row from almost uniform over 3000 tokens (sorted whole) to peaked.
    logits = torch.randn(8, 3000, generator=generator) * torch.logspace(-3, 1, 8).unsqueeze(1)
    together = truncate(logits, top_k=None, top_p=0.9)
    sizes = [len(row) for row in kept(together)]
    assert sizes[0] > 1024 > sizes[-1]
    for row in range(8):
        assert torch.equal(truncate(logits[row : row + 1], top_k=None, top_p=0.9)[0], together[row])


def test_tokens_that_cannot_be_drawn_stay_so():
    logits = torch.tensor([[0.0, -INFINITY, 1.0, -INFINITY]])
    for top_k, top_p in ((3, 1.0), (None, 0.999), (4, 0.999)):
        assert kept(truncate(logits, top_k=top_k, top_p=top_p)) == [[0, 2]]


# --- the description -------------------------------------------------------------------------------------------------


def test_plain_decoding_hands_back_the_very_tensor():
    logits = torch.zeros(2, 5)
    positions, eos = torch.zeros(2, dtype=torch.int64), (0,)
    assert PLAIN.is_plain
    assert constrained(PLAIN, logits, positions, eos) is logits
    # Stop strings read texts, not logits.
    assert constrained(DecodingSpec(stop=("x",)), logits, positions, eos) is logits


@pytest.mark.parametrize(
    "changes", [{"greedy": True}, {"top_k": 9}, {"top_p": 0.9}, {"min_new_tokens": 1}, {"stop": ("x",)}], ids=str
)
def test_every_departure_is_not_plain(changes: dict[str, Any]):
    assert not DecodingSpec(**changes).is_plain


def test_eos_is_masked_until_there_are_enough_tokens_and_before_the_likeliest_are_chosen():
    # Tokens 0 and 3 end a text; 0 is the likeliest of all. After two tokens it may be drawn.
    logits = torch.tensor([[9.0, 5.0, 4.0, 8.0]]).repeat(3, 1)
    found = constrained(DecodingSpec(top_k=2, min_new_tokens=2), logits, torch.tensor([0, 1, 2]), (0, 3))
    assert kept(found) == [[1, 2], [1, 2], [0, 3]]
    assert kept(constrained(DecodingSpec(min_new_tokens=2), logits, torch.tensor([0, 1, 2]), (0, 3))) == [
        [1, 2],
        [1, 2],
        [0, 1, 2, 3],
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ({"top_p": 0.0}, "top_p: Input should be greater than 0"),
        ({"top_p": 1.01}, "top_p: Input should be less than or equal to 1"),
        ({"top_p": math.nan}, "top_p: Input should be "),
        ({"min_new_tokens": -1}, "min_new_tokens: Input should be greater than or equal to 0"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"greedy": True, "top_k": 5}, "top_k and top_p would do nothing"),
        ({"greedy": True, "top_p": 0.5}, "top_k and top_p would do nothing"),
    ],
)
def test_impossible_decoding_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        DecodingSpec(**settings)


# --- the engine ------------------------------------------------------------------------------------------------------


def make_engine(*, temperature: float = 1.0, max_tokens: int = 10_000, num_eos: int = 1) -> InProcessEngine:
    """An engine over the tiny model; with `num_eos` of 8, tokens 0 to 7 end a completion."""
    policy = Policy(make_model(), make_tokenizer(), FP32, temperature=temperature, with_reference=False)
    policy.eos_token_ids = tuple(range(num_eos))
    return engine_of(policy, max_tokens=max_tokens)


def sampled(engine: InProcessEngine, decoding: DecodingSpec = PLAIN, *, seed: int = 0, length: int = 14) -> Rollouts:
    return engine.generate(PROMPTS, 3, max_completion_length=length, key=SamplingKey(seed), decoding=decoding)


def test_greedy_completions_are_those_of_transformers_generate():
    rollouts = sampled(make_engine(num_eos=8), DecodingSpec(greedy=True), length=20)
    settings = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=list(range(8)), pad_token_id=0)
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt.token_ids])
        model: Any = make_model()
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        expected = expected[0, len(prompt.token_ids) :].tolist()
        for row in range(3 * index, 3 * index + 3):
            assert rollouts.groups.completion_ids[row, rollouts.groups.mask[row]].tolist() == expected
    # The distribution that sampled gives each chosen token probability 1.
    assert not rollouts.logprobs.any()
    other = sampled(make_engine(num_eos=8), DecodingSpec(greedy=True), seed=1, length=20)
    assert torch.equal(other.groups.completion_ids, rollouts.groups.completion_ids)


@pytest.mark.parametrize(
    "decoding",
    [
        DecodingSpec(top_k=3),
        DecodingSpec(top_p=0.6),
        DecodingSpec(top_k=5, top_p=0.8, min_new_tokens=4),
        DecodingSpec(min_new_tokens=9),
        DecodingSpec(temperature=1.3, top_p=0.8),  # before top-p, in the place of the policy's
    ],
)
def test_logprobs_are_those_of_transformers_processed_logits(decoding: DecodingSpec):
    eos = list(range(8))
    rollouts = sampled(make_engine(temperature=0.7, num_eos=8), decoding)
    groups = rollouts.groups
    for row, prompt in enumerate(groups.row_prompts()):
        completion = groups.completion_ids[row, groups.mask[row]]
        ids = torch.cat([torch.tensor(prompt), completion])
        with torch.no_grad():
            logits = make_model()(input_ids=ids.unsqueeze(0)).logits[0, len(prompt) - 1 : -1] / (
                decoding.temperature or 0.7
            )
        processors = LogitsProcessorList()
        if decoding.min_new_tokens:
            processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), decoding.min_new_tokens, eos))
        if decoding.top_k:
            processors.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        for t, token in enumerate(completion.tolist()):
            scores = processors(ids[None, : len(prompt) + t], logits[None, t])  # pyright: ignore[reportArgumentType]
            expected = float(scores.log_softmax(-1)[0, token])
            assert float(rollouts.logprobs[row, t]) == pytest.approx(expected, rel=1e-4, abs=2e-5)
    assert rollouts.texts != sampled(make_engine(temperature=0.7, num_eos=8)).texts


def test_no_eos_before_the_minimum():
    engine = make_engine(num_eos=8)
    plain = sampled(engine)
    assert plain.groups.lengths.min() < 6
    rollouts = sampled(engine, DecodingSpec(min_new_tokens=5))
    ended = rollouts.has_eos
    assert ended.any()
    # Five tokens and then the EOS.
    assert rollouts.groups.lengths[ended].min() >= 6
    # As many as there is room for: no EOS at all.
    assert sampled(engine, DecodingSpec(min_new_tokens=14)).finish_reasons == ("length",) * 9


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.8, "min_new_tokens": 2}, {"greedy": True}, {"top_k": 4, "stop": ("e", "Z")}], ids=str
)
def test_completions_do_not_depend_on_the_batch_or_the_decoder(settings: dict[str, Any]):
    decoding = DecodingSpec(**settings)
    together = sampled(make_engine(num_eos=8), decoding)
    padded = make_engine(num_eos=8)
    padded.decoder = PaddedDecoder
    for engine in (make_engine(num_eos=8), make_engine(num_eos=8, max_tokens=1), padded):
        other = sampled(engine, decoding)
        assert torch.equal(other.groups.completion_ids, together.groups.completion_ids)
        assert (other.texts, other.finish_reasons) == (together.texts, together.finish_reasons)
        torch.testing.assert_close(other.logprobs, together.logprobs, rtol=1e-4, atol=1e-5)
    alone = make_engine(num_eos=8).generate(
        PROMPTS[1:2], 2, max_completion_length=14, key=SamplingKey(0), decoding=decoding
    )
    assert alone.texts == together.texts[3:5]


# --- stop strings ----------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_completion_and_its_text_is_cut_before_it():
    engine = make_engine(num_eos=8)
    plain = sampled(engine)
    tokenizer = engine.policy.tokenizer
    stop = ("a", "QQQ", "V")
    rollouts = sampled(engine, DecodingSpec(stop=stop))
    reasons = set()
    for row, reason in enumerate(rollouts.finish_reasons):
        reasons.add(reason)
        tokens = plain.groups.completion_ids[row, plain.groups.mask[row]].tolist()
        # The definition: the first token after which the text contains one of them.
        texts = [
            tokenizer.decode([token for token in tokens[: t + 1] if token >= 8], skip_special_tokens=True)
            for t in range(len(tokens))
        ]
        hits = [t for t, text in enumerate(texts) if any(string in text for string in stop)]
        length = hits[0] + 1 if hits else len(tokens)
        assert rollouts.groups.completion_ids[row, rollouts.groups.mask[row]].tolist() == tokens[:length]
        torch.testing.assert_close(rollouts.logprobs[row, :length], plain.logprobs[row, :length], rtol=1e-4, atol=1e-5)
        if hits:
            assert reason == "stop"
            assert rollouts.texts[row] == texts[hits[0]][:-1]  # both that occur are one character long
            assert not rollouts.has_eos[row]
        else:
            assert reason == plain.finish_reasons[row]
            assert rollouts.texts[row] == plain.texts[row]
    assert reasons == {"stop", "eos", "length"}


def test_a_stop_string_over_several_tokens_is_found_when_its_last_one_comes():
    engine = make_engine()
    plain = sampled(engine, length=30)
    row, at = next(
        (row, at)
        for row, text in enumerate(plain.texts)
        for at in range(2, len(text) - 4)
        if text[at : at + 3].isascii() and text.find(text[at : at + 3]) == at
    )
    string = plain.texts[row][at : at + 3]
    rollouts = sampled(engine, DecodingSpec(stop=(string,)), length=30)
    assert rollouts.finish_reasons[row] == "stop"
    assert rollouts.texts[row] == plain.texts[row][:at]
    # The three tokens that spell it were sampled, and stay.
    tokens = rollouts.groups.completion_ids[row, rollouts.groups.mask[row]].tolist()
    assert engine.policy.tokenizer.decode(tokens[-3:]) == string
    assert tokens == plain.groups.completion_ids[row, : len(tokens)].tolist()


def test_the_text_is_cut_before_the_first_of_several_stop_strings():
    decoding = DecodingSpec(stop=("late", "y th", "absent"))
    assert first_stop(decoding, "say the late word") == 2
    assert first_stop(decoding, "nothing") is None


# --- finished rows ---------------------------------------------------------------------------------------------------


def test_finished_rows_are_counted_once_and_leave_when_they_are_an_eighth(monkeypatch: pytest.MonkeyPatch):
    engine, drawn, told = make_engine(num_eos=8), [], []
    draw = engine._draw

    def counting(states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        drawn.append(len(states))
        return draw(states, *rest)

    monkeypatch.setattr(engine, "_draw", counting)
    rollouts = engine.generate(PROMPTS[:1], 40, max_completion_length=30, key=SamplingKey(3), progress=told.append)
    assert sum(told) == int(rollouts.groups.mask.sum())
    lengths = rollouts.groups.lengths.tolist()
    expected, batch = [], lengths
    for t in range(30):
        expected.append(len(batch))
        finished = sum(length <= t + 1 for length in batch)
        if finished * 8 >= len(batch):
            batch = [length for length in batch if length > t + 1]
        if not batch:
            break
    assert drawn == expected
    # At some step a row stood finished among the others: they are summed over steps until they are an eighth.
    assert any(now > sum(length > t for length in lengths) for t, now in enumerate(drawn))


# --- recipes and held-out evaluation ---------------------------------------------------------------------------------


def test_training_refuses_a_truncating_sampler_and_says_why():
    for key, value in (("top_p", 0.9), ("top_k", 50), ("greedy", True), ("stop", ["x"]), ("min_new_tokens", 3)):
        raw = {"model": "m", "data": "d", "rewards": ["sentiment"], "steps": 1, "output_dir": "o"}
        with pytest.raises(ConfigError, match=rf"sampling: {key} would change π_t: training must sample from the very"):
            build_spec(raw | {"sampling": {key: value}}, where="r")


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"greedy": True, "top_p": 0.9}, "evaluation: greedy takes the likeliest token every time"),
    ],
)
def test_impossible_evaluation_is_refused(evaluation: dict[str, Any], message: str):
    raw = {"model": "m", "data": "d", "rewards": ["sentiment"], "steps": 1, "output_dir": "o"}
    with pytest.raises(ConfigError, match=message):
        build_spec(raw | {"evaluation": evaluation}, where="r")


def heldout(decoding: DecodingSpec) -> HeldoutEvaluation:
    policy = Policy(make_model(), make_tokenizer(), FP32, temperature=1.0)
    lengths = Reward("length", lambda completions, **_: [float(len(text)) for text in completions])
    return HeldoutEvaluation(
        make_spec(sampling={"max_completion_length": 14}, evaluation={"num_generations": 3}),
        PROMPTS,
        policy,
        engine_of(policy, max_tokens=10_000),
        RewardSet([lengths]),
        decoding,
    )


def test_greedy_evaluation_takes_one_completion_per_prompt():
    found = heldout(DecodingSpec(greedy=True)).run(0)
    expected = make_engine().generate(
        PROMPTS, 1, max_completion_length=14, key=SamplingKey(7), decoding=DecodingSpec(greedy=True)
    )
    assert found.rollouts.texts == expected.texts
    assert found.metrics["reward"] == pytest.approx(sum(map(len, expected.texts)) / 3)


def test_truncated_evaluation_leaves_out_what_only_plain_samples_estimate():
    plain, truncated = heldout(PLAIN).run(0), heldout(DecodingSpec(top_p=0.5)).run(0)
    assert truncated.rollouts.num_generations == plain.rollouts.num_generations == 3
    assert truncated.rollouts.texts != plain.rollouts.texts
    estimates = {"entropy", "kl/ref", "kl/ref_per_token", "kl/ref_k3", "kl/ref_k3_per_token"}
    assert plain.metrics.keys() - truncated.metrics.keys() == estimates


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({}, PLAIN),
        ({"greedy": True}, DecodingSpec(greedy=True)),
        ({"top_k": 20, "top_p": 0.9}, DecodingSpec(top_k=20, top_p=0.9)),
    ],
)
def test_a_recipe_says_how_held_out_prompts_are_sampled(
    write_recipe: Any, tmp_path: Path, evaluation: dict[str, Any], expected: DecodingSpec
):
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": {"path": prompts}}, evaluation=evaluation)
    loop = build_loop(load_recipe(recipe), quiet=True)
    assert loop.heldout is not None
    assert loop.heldout.decoding == expected
