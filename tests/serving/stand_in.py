"""A local server with vLLM's or SGLang's endpoint and counters, which decodes on a small backbone."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """An answer: its text, its number of tokens, and the drafts kept in each verify pass."""

    text: str
    num_tokens: int
    accepted: list[int]


@dataclass
class StandIn:
    """A server's state.

    Attributes:
        server: `vLLM` or `SGLang`.
        draft_length: K; 0 serves without drafts.
        answer: continues the token ids of a prompt under the fields of a request.
        others: tokens that other users receive during every request.
        requests: fields of all requests.
    """

    server: str
    draft_length: int
    answer: Callable[[list[int], dict[str, Any]], Served]
    others: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    kept: list[int] = field(default_factory=list)

    def metrics(self) -> str:
        """Return the counters as the server writes them."""
        label = 'model_name="m",engine="0"'
        if self.server == "SGLang":
            lines = [f'sglang:generation_tokens_total{{model_name="m",is_streaming="false"}} {float(self.tokens)}']
            if self.draft_length:
                lines.append(f'sglang:spec_num_steps{{model_name="m"}} {float(self.draft_length)}')
            if self.passes:  # a counter of several processes has no sample before its first increment
                lines.append(f'sglang:spec_verify_calls_total{{model_name="m"}} {float(self.passes)}')
            return "\n".join(lines)
        lines = [f"vllm:generation_tokens_total{{{label}}} {float(self.tokens)}"]
        if self.draft_length:
            lines += [
                "# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.",
                f"vllm:spec_decode_num_drafts_total{{{label}}} {float(self.passes)}",
            ]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="{k}"}} {float(self.kept[k])}'
                for k in range(self.draft_length)
            ]
        return "\n".join(lines)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer one request and count it."""
        self.requests.append(body)
        served = self.answer(body["prompt"], body)
        self.passes += len(served.accepted)
        self.tokens += served.num_tokens + self.others
        for k in range(self.draft_length):
            self.kept[k] += sum(accepted > k for accepted in served.accepted)
        return {"choices": [{"text": served.text}], "usage": {"completion_tokens": served.num_tokens}}


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Serve on a free port; yield the URL."""
    stand_in.kept = [0] * stand_in.draft_length

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _send(self, body: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            known = {"/v1/models": json.dumps({"data": [{"id": "served"}]}), "/metrics": stand_in.metrics()}
            self._send(known.get(self.path, "{}"), 200 if self.path in known else 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(json.dumps(stand_in.complete(body)))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
