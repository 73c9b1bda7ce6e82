"""Real vLLM servers: the in-process engine's tokens, through updates, adapters and deaths. They need vLLM's environment
(DAR_VLLM_PYTHON, or .venv-vllm) and take minutes: `make test-engines`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from support.engines import engine_of

from dar.batch import Prompt, Rollouts
from dar.config.data import DecodingSpec
from dar.config.engine import VLLMSpec
from dar.config.model import LoraSpec
from dar.errors import ConfigError, RolloutError
from dar.policies.precision import Precision
from dar.policies.text.loading import add_lora
from dar.policies.text.policy import Policy
from dar.rollout.sampling import SamplingKey
from dar.rollout.vllm.engine import VLLMEngine
from dar.rollout.vllm.server import find_python

try:
    PYTHON = find_python(None)
except ConfigError as error:
    pytestmark = [pytest.mark.vllm, pytest.mark.skip(reason=str(error))]
    PYTHON = ""
else:
    pytestmark = pytest.mark.vllm

FP32 = Precision(torch.device("cpu"), torch.float32)
# Longer than one of the CPU cache's blocks of 128 tokens, and so remembered.
PROMPTS = [Prompt(0, "x", (5, 6, 7), {}), Prompt(3, "y", tuple(range(9, 239)), {})]
# Of heads that vLLM's attention on CPUs takes: 32 numbers and more.
LARGER = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
DECODINGS = [{}, {"top_k": 3}, {"top_p": 0.5}, {"greedy": True}, {"min_new_tokens": 4}, {"stop": ("a", "e", "t")}]
KEY = SamplingKey(1, "train", 4)
ENGINE = {"arguments": ["--enforce-eager"], "cache_gb": 0.2}


def larger_model(seed: int = 0, **changes: Any) -> Any:
    return make_model(seed=seed, initializer_range=0.15, **{**LARGER, **changes})


def policy_of(model: Any, temperature: float = 0.7) -> Policy:
    return Policy(model, make_tokenizer(), FP32, temperature=temperature, with_reference=False)


def started(folder: Path, **changes: Any) -> VLLMEngine:
    return VLLMEngine(VLLMSpec(**{**ENGINE, **changes}), log_file=folder / "vllm.log", say=print)


def sampled(engine: Any, length: int = 12, **changes: Any) -> Rollouts:
    return engine.generate(PROMPTS, 4, max_completion_length=length, key=KEY, **changes)


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    assert torch.equal(found.groups.completion_ids, expected.groups.completion_ids)
    assert torch.equal(found.groups.mask, expected.groups.mask)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    assert (found.texts, found.finish_reasons) == (expected.texts, expected.finish_reasons)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policy_of(larger_model())


@pytest.fixture(scope="module")
def engine(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    engine = started(tmp_path_factory.mktemp("vllm"))
    engine.sync(policy, 0)
    yield engine
    engine.close()


def is_alive(process: int) -> bool:
    """Not gone, nor only not yet buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_of(engine: VLLMEngine) -> list[int]:
    assert engine._server is not None
    return pgrep("-g", str(engine._server.process.pid))


def pgrep(*how: str) -> list[int]:
    return [int(each) for each in subprocess.run(["pgrep", *how], capture_output=True, text=True).stdout.split()]


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_the_tokens_are_those_of_the_in_process_engine(engine: VLLMEngine, policy: Policy, decoding: dict[str, Any]):
    rules = DecodingSpec(**decoding)
    expected = sampled(engine_of(policy, max_tokens=10_000), decoding=rules)
    assert_same(sampled(engine, decoding=rules), expected)
    if decoding == {}:
        logprobs = policy.logprobs(expected.groups, max_tokens=10_000)
        torch.testing.assert_close(sampled(engine).logprobs, logprobs, rtol=0, atol=1e-4)
    if "stop" in decoding:
        assert "stop" in expected.finish_reasons


def test_each_submit_keeps_the_weights_that_were_last_synced(engine: VLLMEngine, policy: Policy):
    first = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    own, wanted, asked = engine_of(policy, max_tokens=10_000), [], []
    for version, state in enumerate((larger_model(seed=5).state_dict(), first), 1):
        policy.model.load_state_dict(state)
        wanted.append(sampled(own))
        engine.sync(policy, version)
        asked.append(engine.submit(PROMPTS, 4, max_completion_length=12, key=KEY))
    assert not torch.equal(wanted[0].logprobs, wanted[1].logprobs)
    for version, (future, expected) in enumerate(zip(asked, wanted, strict=True), 1):
        assert_same(future.result(), expected)
        assert future.result().versions == (version,) * 8
    # Only the last are kept.
    assert engine._folder is not None
    assert engine._weights is not None
    assert [each.name for each in Path(engine._folder.name).iterdir() if each.name != "python"] == [
        engine._weights.name
    ]
    saved = load_file(engine._weights.folder / "model.safetensors")
    assert saved.keys() == {name for name, _ in policy.model.named_parameters()}
    assert all(torch.equal(saved[name], tensor) for name, tensor in policy.model.named_parameters())


def test_a_server_given_by_url_says_what_it_lacks_and_takes_weights(
    engine: VLLMEngine, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sampled(engine)
    assert engine._server is not None
    monkeypatch.setattr("dar.rollout.vllm.engine.__version__", "9.9")
    other = VLLMEngine(VLLMSpec(url=engine._server.url), log_file=tmp_path / "log", say=print)
    other.sync(policy, 0)
    with pytest.raises(RolloutError, match=r"has the plug-in of dar [\d.]+, and this is dar 9.9"):
        sampled(other)
    monkeypatch.undo()
    assert_same(sampled(other), sampled(engine_of(policy, max_tokens=10_000)))
    assert other.software == {"vllm": "0.32.0"}
    other.close()
    # It has other weights now than the first gave it, and says so.
    with pytest.raises(RolloutError, match="somebody else gives it weights, or it has been started again"):
        sampled(engine)
    engine._given = None


def test_logits_that_are_not_finite_are_found(engine: VLLMEngine):
    broken = policy_of(larger_model())
    broken.model.model.norm.weight.data[:] = torch.nan
    engine.sync(broken, 77)
    with pytest.raises(RolloutError, match="logits are not finite"):
        sampled(engine)


def test_a_server_that_dies_is_replaced_and_asked_the_same(engine: VLLMEngine, policy: Policy):
    engine.sync(policy, 78)
    expected = sampled(engine_of(policy, max_tokens=10_000), 250)
    assert_same(sampled(engine, 250), expected)
    assert engine._server is not None
    before, server = processes_of(engine), engine._server
    killing = threading.Timer(0.5, os.kill, (server.process.pid, signal.SIGKILL))
    killing.start()
    assert_same(sampled(engine, 250), expected)
    assert engine._server is not server
    assert not any(map(is_alive, before))
    after = processes_of(engine)
    assert len(after) >= 3  # the server, its engine, and the one that waits
    engine.close()
    assert not any(map(is_alive, after))


def test_only_the_adapter_moves(tmp_path: Path):
    policy = policy_of(add_lora(larger_model(tie_word_embeddings=False), LoraSpec(rank=4)), 1.3)
    own, engine = engine_of(policy, max_tokens=10_000), started(tmp_path)
    try:
        for version in range(3):
            torch.manual_seed(version)
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            engine.sync(policy, version)
            assert_same(sampled(engine), replace(sampled(own), versions=(version,) * 8))
        assert engine._weights is not None
        assert engine._weights.folder.stat().st_ino != engine._weights.base.stat().st_ino
        assert not (engine._weights.folder / "model.safetensors").exists()
    finally:
        engine.close()


def test_vllm_s_own_numbers_reproduce_requests(policy: Policy, tmp_path: Path):
    engine = started(tmp_path, own_numbers=False)
    try:
        engine.sync(policy, 0)
        found = sampled(engine)
        assert_same(sampled(engine), found)
        logprobs = policy.logprobs(found.groups, max_tokens=10_000)
        torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=1e-4)
        greedy = DecodingSpec(greedy=True)
        assert_same(sampled(engine, decoding=greedy), sampled(engine_of(policy, max_tokens=10_000), decoding=greedy))
    finally:
        engine.close()


TRAINS = """
import sys
from dar.assembly.loop import build_loop
from dar.config.recipe import load_recipe
from dar.trainer import run_loop
run_loop(build_loop(load_recipe(sys.argv[1], sys.argv[2:]), quiet=True), resume=False, command="")
"""


def test_a_run_is_the_in_process_run_and_leaves_nothing_behind(write_recipe: Callable[..., Path], tmp_path: Path):
    folder = tmp_path / "larger"
    larger_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(
        model=str(folder), steps=3, data={"train": prompts, "heldout": prompts}, engine={"type": "vllm", **ENGINE}
    )
    command = [sys.executable, "-c", TRAINS, str(recipe)]

    def run(*overrides: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, *overrides], start_new_session=True)

    assert run("engine={type: in_process}", f"output_dir={tmp_path}/own").wait() == 0
    trained = run(f"output_dir={tmp_path}/vllm")
    assert trained.wait() == 0
    own, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("own", "vllm"))
    for name, tensor in own.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5)
    environment = json.loads((tmp_path / "vllm" / "environment.json").read_text())
    assert environment["engine"] == {"type": "vllm", "reproduces": "tokens", "vllm": "0.32.0"}
    assert (tmp_path / "vllm" / "vllm.log").stat().st_size > 1000

    killed = run(f"output_dir={tmp_path}/killed", "steps=500", "checkpoint.every=0")
    log = tmp_path / "killed" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert killed.poll() is None
        time.sleep(0.2)
    (server,) = pgrep("-P", str(killed.pid), "-f", "api_server")
    group = pgrep("-g", str(server))
    assert len(group) >= 3
    folder = Path(f"/proc/{server}/cwd").resolve()
    assert (folder / "python").is_dir()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, group))
    assert not folder.exists()
