"""The engine that has a vLLM server sample."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
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
from dar.rollout.vllm.client import Client, NoAnswer, Refused
from dar.rollout.vllm.server import WRITTEN_FOR, Server, find_python
from dar.rollout.vllm.weights import Weights, taken

log = logging.getLogger(__name__)

_TRIES, _AT_ONCE = 3, 256
"""Servers that the same requests are given, where the run starts them; requests on their way."""
_GENERATE = "/inference/v1/generate"
_DRAWS = ("--logits-processors", "dar.rollout.vllm.plugin:Draws", "--logprobs-mode", "processed_logits")
# A seeded prompt that is cut in two ends vLLM's engine on CPUs.
_SEEDED = ("--no-enable-chunked-prefill", "--logprobs-mode", "processed_logprobs")
_TRANSFER = ("--weight-transfer-config", '{"backend": "dar"}')
_USUAL = {"n": 1, "logprobs": 0, "detokenize": False, "ignore_eos": True, "presence_penalty": 0.0, "min_p": 0.0,
          "frequency_penalty": 0.0, "repetition_penalty": 1.0}  # fmt: skip
"""What a server might have defaults of its own for."""
_Row = tuple[list[int], list[float], FinishReason]


class VLLMEngine:
    """Samples in another process, with weights of its own, which it is given when something is to be sampled with them.

    Args:
        spec: which server, and how.
        log_file: of a server that the run starts.
        say: told what there is to wait for.

    Raises:
        ConfigError: there is no vLLM to be started.
    """

    _server: Server | None = None
    _client: Client | None = None
    _given: Weights | None = None
    _weights: Weights | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _is_closed = False

    def __init__(self, spec: VLLMSpec, *, log_file: Path, say: Callable[[str], None]) -> None:
        self.spec, self.log_file, self.say = spec, log_file.absolute(), say
        self.reproduces: Literal["tokens", "requests", "nothing"] = "tokens" if spec.own_numbers else "requests"
        self.python = None if spec.url is not None else find_python(spec.python)
        self.software: dict[str, str] = {}
        self._names = uuid.uuid4().hex[:8]
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="vllm")

    def sync(self, policy: Policy, version: int) -> None:
        if self.spec.url is not None and num_ranks() > 1:
            raise ConfigError("engine.url is one server, and each rank gives its own weights: leave url out")
        if self._folder is None:
            usual = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            where = usual if self.spec.folder is None else expanded(self.spec.folder)
            self._folder = tempfile.TemporaryDirectory(prefix="dar-vllm-", dir=where)
        before = self._weights
        if before is None or before.version != version:
            name, base = f"{self._names}-{version}", None if before is None else before.base
            self._weights = taken(policy, version, name, Path(self._folder.name), base)

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        return self.submit(*args, **kwargs).result()

    def submit(
        self, prompts: Sequence[Prompt], num_generations: int, *, max_completion_length: int, key: SamplingKey,
        progress: Progress | None = None, decoding: DecodingSpec = PLAIN,
    ) -> Future[Rollouts]:  # fmt: skip
        weights = self._weights
        assert weights is not None, "sync comes first"
        asked = [
            {"token_ids": list(prompt.token_ids),
             "sampling_params": self._params(weights, (prompt.position, k), max_completion_length, key, decoding)}
            for prompt in prompts for k in range(num_generations)
        ]  # fmt: skip
        return self._jobs.submit(self._work, weights, list(prompts), asked, progress, decoding)

    def close(self) -> None:
        self._is_closed = True
        if self._server is not None:
            self._server.stop()
        self._jobs.shutdown(cancel_futures=True)
        self._weights = self._given = None
        if self._folder is not None:
            self._folder.cleanup()

    def _params(
        self, weights: Weights, place: tuple[int, int], length: int, key: SamplingKey, decoding: DecodingSpec
    ) -> dict[str, Any]:
        """How one completion is sampled, in vLLM's words."""
        eos = list(weights.eos_token_ids)
        usual = {**_USUAL, "max_tokens": length, "stop_token_ids": eos}
        if not self.spec.own_numbers:
            seed = int(key.seeds(*place, 1)[0]) & (2**63 - 1)
            temperature = 0.0 if decoding.greedy else weights.temperature
            return {**usual, "temperature": temperature, "top_k": decoding.top_k or 0, "top_p": decoding.top_p,
                    "min_tokens": min(decoding.min_new_tokens, length), "seed": seed}  # fmt: skip
        own = {"version": __version__, "key": [key.seed, key.purpose, key.step], "place": place, "eos": eos,
               "temperature": weights.temperature,
               "decoding": decoding.model_dump(exclude={"stop"}, exclude_defaults=True)}  # fmt: skip
        # The one token that is left to choose costs least greedily.
        return {**usual, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "extra_args": {"dar": own}}

    def _work(
        self, weights: Weights, prompts: list[Prompt], asked: list[dict[str, Any]], progress: Progress | None,
        decoding: DecodingSpec,
    ) -> Rollouts:  # fmt: skip
        for left in reversed(range(_TRIES)):
            try:
                client = self._client or self._connected(weights)
                if self._given is not weights:
                    self._give(client, weights)
                rows = self._rows(client, weights, asked, progress, decoding)
                break
            except NoAnswer as error:
                server = self._server
                if server is None or self._is_closed or not left or server.is_well(Client(server.url, 5.0)):
                    words = "" if server is None else f"\nThe last lines of {self.log_file}:\n{server.last_words(8)}"
                    raise RolloutError(f"nothing was sampled: {error}{words}") from error
                log.warning("no answer from vLLM (%s): another server is started, and asked the same", error)
                server.stop()
                self._server = self._client = self._given = None
        ids, mask = pad_rows([row[0] for row in rows], pad_id=0)
        logprobs = torch.tensor([[*row[1], *[0.0] * (ids.shape[1] - len(row[1]))] for row in rows])
        reasons = tuple(row[2] for row in rows)
        return weights.completions.rollouts(prompts, ids, mask.sum(1), logprobs, reasons, decoding, weights.version)

    def _connected(self, weights: Weights) -> Client:
        """A client of a server that is there; one of our own begins with these weights."""
        client = Client(self.spec.url or "", self.spec.timeout)
        if self.python is not None:
            own = _DRAWS if self.spec.own_numbers else _SEEDED
            lora = ("--enable-lora", "--max-lora-rank", str(weights.max_rank))
            arguments = ["--model", str(weights.base), "--served-model-name", "policy", "--dtype", weights.dtype,
                         "--skip-tokenizer-init", "--generation-config", "vllm", "--enable-scale-out",
                         "--kv-cache-memory-bytes", str(int(self.spec.cache_gb * 1e9)), *own,
                         *(lora if weights.max_rank else _TRANSFER), *self.spec.arguments]  # fmt: skip
            self._server = Server(self.python, arguments, folder=weights.folder.parent, log_file=self.log_file)
            client = Client(self._server.url, self.spec.timeout)
            self._server.wait(client, self.say)
        self._introduce(client)
        if self._server is not None and not weights.max_rank:
            client.ask("/update_weight_version", {"new_version": weights.name})
            self._given = weights
        self._client = client
        return client

    def _introduce(self, client: Client) -> None:
        """Asks a server who it is. Raises RolloutError where it does not draw as this library does."""
        version = str((client.ask("/version") or {}).get("version"))
        self.software = {"vllm": version}
        if not version.startswith(f"{WRITTEN_FOR}."):
            log.warning("the vLLM server is of version %s, and this library is written for %s", version, WRITTEN_FOR)
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

    def _rows(
        self, client: Client, weights: Weights, asked: list[dict[str, Any]], progress: Progress | None,
        decoding: DecodingSpec,
    ) -> list[_Row]:  # fmt: skip
        """A completion for each request, in their order."""
        model = weights.name if weights.max_rank else self._model
        with ThreadPoolExecutor(min(len(asked), _AT_ONCE)) as pool:
            futures = [pool.submit(client.ask, _GENERATE, {"model": model, **one}) for one in asked]
            try:
                for future in as_completed(futures):
                    row = _read(future.result(), weights)
                    if progress is not None:
                        progress(len(row[0]))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        rows = [_read(future.result(), weights) for future in futures]
        for (ids, _, reason), one in zip(rows, asked, strict=True):
            if reason == "length" and len(ids) < (length := one["sampling_params"]["max_tokens"]):
                raise RolloutError(f"the vLLM server ended at {len(ids)} of {length} tokens: give it --max-model-len")
        return [_as_decoded(row, weights, decoding) for row in rows]


def _read(answer: Any, weights: Weights) -> _Row:
    """A completion as the server gives it. Raises RolloutError where it is none, or other weights made it."""
    try:
        (choice,) = answer["choices"]
        ids, reason = choice["token_ids"], choice["finish_reason"]
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
    if len(logprobs) != len(ids) or reason not in ("stop", "length") or not ids:
        raise RolloutError(f"the vLLM server gave up a completion after {len(ids)} tokens: {reason}")
    return ids, logprobs, "eos" if ids[-1] in weights.eos_token_ids else "length"


def _as_decoded(row: _Row, weights: Weights, decoding: DecodingSpec) -> _Row:
    """The row as far as the first token with which its text has a stop string; chosen greedily, it was certain."""
    ids, logprobs, reason = row
    for end in range(1, len(ids) + (reason != "eos") if decoding.stop else 0):
        if first_stop(decoding, weights.completions.texts([ids[:end]])[0]) is not None:
            ids, logprobs, reason = ids[:end], logprobs[:end], "stop"
            break
    return ids, [0.0] * len(ids) if decoding.greedy else logprobs, reason
