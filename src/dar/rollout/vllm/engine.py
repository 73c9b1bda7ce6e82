"""The engine that has a vLLM server sample."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dar import __version__
from dar.batch import FinishReason, Prompt, Rollouts, pad_rows
from dar.collective import num_ranks
from dar.config.data import DecodingSpec
from dar.config.engine import VLLMSpec
from dar.errors import ConfigError, RolloutError
from dar.files.paths import expanded
from dar.policies.text.policy import Policy
from dar.rollout.completions import not_finite
from dar.rollout.protocol import Progress
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import PLAIN, first_stop
from dar.rollout.vllm.server import WRITTEN_FOR, Client, NoAnswer, Refused, Server, find_python
from dar.rollout.vllm.weights import Weights, taken

log = logging.getLogger(__name__)

_AT_ONCE = 256
"""Requests on their way."""
_GENERATE = "/inference/v1/generate"
_PLUGIN = ("--logits-processors", "dar.rollout.vllm.plugin:Draws")
_DRAWS = (*_PLUGIN, "--logprobs-mode", "processed_logits")
# A seeded prompt that is cut in two ends vLLM's engine on CPUs. The plug-in is loaded for what it does with weights.
_SEEDED = (*_PLUGIN, "--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill")
_TRANSFER = ("--weight-transfer-config", '{"backend": "dar"}')
_USUAL = {"n": 1, "logprobs": 0, "detokenize": False, "ignore_eos": True, "presence_penalty": 0.0, "min_p": 0.0,
          "frequency_penalty": 0.0, "repetition_penalty": 1.0}  # fmt: skip
"""What a server might have defaults of its own for."""


@dataclass(frozen=True)
class _Job:
    """What was asked for. places: (index of the prompt, number of the completion) of each completion."""

    weights: Weights
    prompts: Sequence[Prompt]
    places: Sequence[tuple[int, int]]
    length: int
    key: SamplingKey
    progress: Progress | None
    decoding: DecodingSpec


class VLLMEngine:
    """Samples in another process, with weights of its own, which it is given when something is to be sampled with them.
    The server that is started has a log, and `say` is told when there is to be waited for it. Raises ConfigError where
    there is no vLLM."""

    _server: Server | None = None
    _client: Client | None = None
    _given: Weights | None = None
    _weights: Weights | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _is_proven = _is_closed = False

    def __init__(self, spec: VLLMSpec, *, log_file: Path, say: Callable[[str], None]) -> None:
        self.spec, self.log_file, self.say = spec, log_file.absolute(), say
        self.reproduces: Literal["tokens", "requests", "nothing"] = "tokens" if spec.own_numbers else "requests"
        self.python = None if spec.url is not None else find_python(spec.python)
        self.software: dict[str, str] = {}
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="vllm")

    def sync(self, policy: Policy, version: int) -> None:
        if self.spec.url is not None and num_ranks() > 1:
            raise ConfigError("engine.url is one server, and each rank gives its own weights: leave url out")
        if self._weights is not None and self._weights.version == version:
            return
        try:
            if self._folder is None:
                usual = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
                where = usual if self.spec.folder is None else os.path.abspath(expanded(self.spec.folder))
                self._folder = tempfile.TemporaryDirectory(prefix="dar-vllm-", dir=where)
            folder = Path(self._folder.name) / f"{version}-{uuid.uuid4().hex[:8]}"
            self._weights = taken(policy, version, folder)
        except OSError as error:
            raise RolloutError(
                f"the weights cannot be handed to vLLM: {error}. Name a folder with room for two of them: engine.folder"
            ) from error

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        return self.submit(*args, **kwargs).result()

    def submit(
        self, prompts: Sequence[Prompt], num_generations: int, *, max_completion_length: int, key: SamplingKey,
        progress: Progress | None = None, decoding: DecodingSpec = PLAIN,
    ) -> Future[Rollouts]:  # fmt: skip
        assert self._weights is not None, "sync comes first"
        places = [(index, number) for index in range(len(prompts)) for number in range(num_generations)]
        job = _Job(self._weights, prompts, places, max_completion_length, key, progress, decoding)
        return self._jobs.submit(self._work, job)

    def close(self) -> None:
        self._is_closed = True
        self._stop()
        self._jobs.shutdown(cancel_futures=True)
        self._stop()  # one that was being started
        self._weights = None
        if self._folder is not None:
            self._folder.cleanup()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = self._client = self._given = None
        self._is_proven = False

    def _work(self, job: _Job) -> Rollouts:
        while True:
            try:
                client = self._client or self._connected(job.weights)
                if self._given is not job.weights:
                    self._give(client, job.weights)
                rows = self._rows(client, job)
                break
            except NoAnswer as error:
                # One that has never sampled would fail again, and one that is well had a reason.
                server, is_proven = self._server, self._is_proven
                if server is None or self._is_closed or not is_proven or server.is_well():
                    raise RolloutError(f"{error}" + (f"; {server.last_words()}" if server else "")) from error
                log.warning("no answer from vLLM (%s): another server is started, and asked the same", error)
                self._stop()
        self._is_proven = True
        ids, mask = pad_rows([row[0] for row in rows], pad_id=0)
        logprobs = torch.tensor([[*row[1], *[0.0] * (ids.shape[1] - len(row[1]))] for row in rows])
        reasons: tuple[FinishReason, ...] = tuple(row[2] for row in rows)
        makes, version = job.weights.completions, job.weights.version
        return makes.rollouts(job.prompts, ids, mask.sum(1), logprobs, reasons, job.decoding, version)

    def _connected(self, weights: Weights) -> Client:
        """A client of a server that is there; one of our own begins with these weights."""
        client = Client(self.spec.url or "", self.spec.timeout)
        if self.python is not None:
            draws = _DRAWS if self.spec.own_numbers else _SEEDED
            dtype = str(weights.policy.precision.dtype).removeprefix("torch.")
            lora = ("--enable-lora", "--max-lora-rank", str(weights.max_rank))
            arguments = ["--model", str(weights.base), "--served-model-name", "policy", "--dtype", dtype,
                         "--skip-tokenizer-init", "--generation-config", "vllm", "--enable-scale-out",
                         "--kv-cache-memory-bytes", str(int(self.spec.cache_gb * 1e9)), *draws,
                         *(lora if weights.max_rank else _TRANSFER), *self.spec.arguments]  # fmt: skip
            self._server = Server(self.python, arguments, folder=weights.folder.parent, log_file=self.log_file)
            client = Client(self._server.url, self.spec.timeout)
            self._server.wait(self.spec.timeout, self.say)
        self._introduce(client)
        if self._server is not None and not weights.max_rank:
            client.ask("/update_weight_version", {"new_version": weights.name})
            self._given = weights
        self._client = client
        return client

    def _introduce(self, client: Client) -> None:
        """Asks a server who it is. Raises RolloutError where it does not draw as this library does."""
        self.software = {"vllm": str((client.ask("/version") or {}).get("version"))}
        if not self.software["vllm"].startswith(f"{WRITTEN_FOR}."):
            log.warning("the server is of vLLM %s, and this is written for %s", self.software["vllm"], WRITTEN_FOR)
        self._model = client.ask("/v1/models")["data"][0]["id"]
        if not self.spec.own_numbers:
            return
        has = "no plug-in of dar"
        try:  # no version is "?": a server that draws with the library's numbers says which it has
            client.ask(_GENERATE, {"token_ids": [0], "sampling_params": {"extra_args": {"dar": {"version": "?"}}}})
        except Refused as refused:
            if (found := re.search(r"draws tokens with dar ([\w.+-]+)", str(refused))) is None:
                raise
            if found[1] == __version__:
                return
            has = f"the plug-in of dar {found[1]}"
        raise RolloutError(
            f"the vLLM server at {client.url} has {has}, and this is dar {__version__}. In its environment: pip "
            f"install --no-deps dar-rlhf=={__version__}; on its command line: {' '.join(_DRAWS)}. Or let vLLM draw: "
            "engine.own_numbers=false"
        )

    def _give(self, client: Client, weights: Weights) -> None:
        """Puts weights in the place of those that the server has."""
        if weights.max_rank:
            client.ask("/v1/load_lora_adapter", {"lora_name": weights.name, "lora_path": str(weights.folder)})
            if self._given is not None:
                client.ask("/v1/unload_lora_adapter", {"lora_name": self._given.name})
        else:
            try:
                client.ask("/init_weight_transfer_engine", {"init_info": {}})
            except Refused as refused:
                raise RolloutError(
                    f"the vLLM server takes no weights: it has to be started with VLLM_SERVER_DEV_MODE=1 and "
                    f"{' '.join(_TRANSFER)}, unless the run trains an adapter (model.lora). {refused}"
                ) from refused
            client.ask("/pause?mode=wait", {})
            client.ask("/start_weight_update", {})
            client.ask("/update_weights", {"update_info": {"path": str(weights.folder / "model.safetensors")}})
            client.ask("/finish_weight_update", {"weight_version": weights.name})
            # What it remembers of prompts was computed with other weights.
            if not client.ask("/reset_prefix_cache", {})["success"]:
                raise NoAnswer("the vLLM server's prefix cache could not be emptied")
            client.ask("/resume", {})
        self._given = weights

    def _rows(self, client: Client, job: _Job) -> list[tuple[list[int], list[float], FinishReason]]:
        """The completions of a job, as the server samples them."""
        model = job.weights.name if job.weights.max_rank else self._model
        with ThreadPoolExecutor(min(len(job.places), _AT_ONCE)) as pool:
            futures = [
                pool.submit(client.ask, _GENERATE, {"model": model, "token_ids": job.prompts[index].token_ids,
                                                    "sampling_params": self._params(job, index, number)})
                for index, number in job.places
            ]  # fmt: skip
            try:
                for future in as_completed(futures):
                    count = len(_read(future.result(), job)[0])
                    if job.progress is not None:
                        job.progress(count)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return [_read(future.result(), job) for future in futures]

    def _params(self, job: _Job, index: int, number: int) -> dict[str, Any]:
        """How a completion is sampled, in vLLM's words."""
        key, decoding, eos = job.key, job.decoding, job.weights.policy.eos_token_ids
        place = (job.prompts[index].position, number)
        usual = {**_USUAL, "max_tokens": job.length, "stop_token_ids": eos}
        if self.spec.own_numbers:
            rules = decoding.model_dump(exclude={"stop"}, exclude_defaults=True)
            own = {"version": __version__, "key": (key.seed, key.purpose, key.step), "place": place, "eos": eos,
                   "temperature": job.weights.policy.module.temperature, "decoding": rules}  # fmt: skip
            # The one token that is left to choose costs least greedily.
            return {**usual, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "extra_args": {"dar": own}}
        temperature = decoding.temperature or job.weights.policy.module.temperature
        return {**usual, "temperature": 0.0 if decoding.greedy else temperature,
                "top_k": decoding.top_k or 0, "top_p": decoding.top_p,
                "min_tokens": min(decoding.min_new_tokens, job.length),
                "seed": int(key.seeds(*place, 1)[0]) & (2**63 - 1)}  # fmt: skip


def _read(answer: Any, job: _Job) -> tuple[list[int], list[float], FinishReason]:
    """A completion as the server gives it, as far as the first token with which its text has a stop string.

    Raises:
        RolloutError: it is none, or other weights made it.
    """
    weights = job.weights
    try:
        (choice,) = answer["choices"]
        ids, said = choice["token_ids"], choice["finish_reason"]
        logprobs = [float(each["logprob"]) for each in choice["logprobs"]["content"]]
        made_by = {answer["model"]} if weights.max_rank else {span["version"] for span in choice["weight_versions"]}
    except (LookupError, TypeError, ValueError) as error:
        raise RolloutError(f"the vLLM server's answer lacks {error}: is it of version {WRITTEN_FOR}?") from error
    if made_by != {weights.name}:
        raise RolloutError(
            f"the vLLM server sampled with the weights {', '.join(map(str, made_by))} and was given {weights.name}: "
            "somebody else gives it weights, or it has been started again"
        )
    if any(logprob > 0 for logprob in logprobs):  # the plug-in's sign
        raise not_finite()
    reason: FinishReason = "eos" if ids and ids[-1] in weights.policy.eos_token_ids else "length"
    if len(logprobs) != len(ids) or not (reason == "eos" or (said == "length" and len(ids) == job.length)):
        raise RolloutError(
            f"the vLLM server gave up a completion after {len(ids)} of {job.length} tokens ({said}): if its context is "
            "too short, give it --max-model-len"
        )
    for end in range(1, len(ids) + (reason != "eos") if job.decoding.stop else 0):
        if first_stop(job.decoding, weights.completions.texts([ids[:end]])[0]) is not None:
            ids, logprobs, reason = ids[:end], logprobs[:end], "stop"
            break
    return ids, [0.0] * len(ids) if job.decoding.greedy else logprobs, reason
