"""A client of the OpenAI-compatible endpoint of vLLM and SGLang, with its acceptance counters."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib import error, request

import numpy as np

from mtptrain.errors import UserError
from mtptrain.replay.replay import Counts
from mtptrain.serving.counters import Counters, parse_counters

REQUEST_SECONDS = 600.0
SETTLE_SECONDS = 5.0  # a server may count a request just after it has answered it
SETTLE_PAUSE = 0.05
SWITCHES = (
    "it shows no counters of speculative decoding at /metrics; start vLLM with --speculative-config, SGLang with "
    "--speculative-algorithm and --enable-metrics"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's continuation of one prompt.

    Attributes:
        text: the text.
        counts: passes, tokens and accepted drafts of the request, from the counters around it.
        draft_length: K of the server.
    """

    text: str
    counts: Counts
    draft_length: int


class ServerClient:
    """The server at a URL.

    Args:
        url: without `/v1`, e.g. http://127.0.0.1:8000.

    Raises:
        UserError: nobody answers there, or the server does not draft.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        models = self._json("/v1/models").get("data")
        if not models:
            raise self._fault("its /v1/models names no model; give the address of a vLLM or SGLang server")
        self.model = str(models[0]["id"])
        self.server = self.counters().server

    def counters(self) -> Counters:
        """Return the counters of now.

        Raises:
            UserError: the server has none.
        """
        found = parse_counters(self._read("/metrics"))
        if found is None:
            raise self._fault(SWITCHES)
        return found

    def complete(self, tokens: list[int], settings: dict[str, Any]) -> Answer:
        """Return the server's continuation of a prompt.

        Args:
            tokens: token ids of the prompt.
            settings: fields of the request, such as `max_tokens` and `temperature`.

        Raises:
            UserError: the server refuses the request, or answers others at the same time.
        """
        before = self.counters()
        reply = self._json("/v1/completions", {"model": self.model, "prompt": tokens, **settings})
        text, emitted = str(reply["choices"][0]["text"]), int(reply["usage"]["completion_tokens"])
        after = self._settled(before, emitted)
        return Answer(text, self._counts(before, after, emitted), after.draft_length)

    def _settled(self, before: Counters, emitted: int) -> Counters:
        """Return the counters once they contain a request of `emitted` tokens."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            now = self.counters()
            if now.tokens - before.tokens >= emitted:
                return now
            if time.monotonic() > deadline:
                raise self._fault(
                    f"it counts {now.tokens - before.tokens:g} tokens for a request of {emitted}; it restarted, or "
                    "another process answers /metrics: give the address of one engine"
                )
            time.sleep(SETTLE_PAUSE)

    def _counts(self, before: Counters, after: Counters, emitted: int) -> Counts:
        if after.tokens - before.tokens > emitted:
            raise self._fault(
                f"it answers others at the same time ({after.tokens - before.tokens:g} tokens counted, {emitted} of "
                "ours), so its counters do not measure these prompts; stop the other traffic and start again"
            )
        passes = after.passes - before.passes
        accepted_K = np.array(after.accepted) - np.array(before.accepted or [0.0] * len(after.accepted))
        # Every pass drafts K tokens, and a position is verified if all before it were kept.
        reached_K = np.concatenate([[passes], accepted_K[:-1]]) if len(accepted_K) else accepted_K
        return Counts(passes, emitted - 1, None, reached_K, accepted_K)

    def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        text = self._read(path, body)
        try:
            reply = json.loads(text)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._fault(f"{path} is no JSON object; give the address of a vLLM or SGLang server")
        return reply

    def _read(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        try:
            call = request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with request.urlopen(call, timeout=REQUEST_SECONDS) as reply:
                return str(reply.read().decode("utf-8", "replace"))
        except error.HTTPError as refusal:
            if path == "/metrics":
                raise self._fault(SWITCHES) from None
            detail = " ".join(refusal.read().decode("utf-8", "replace").split())[:300]
            raise self._fault(f"{path} answers {refusal.code}: {detail}") from None
        except (OSError, ValueError, http.client.HTTPException) as fault:
            reason = getattr(fault, "reason", fault)
            raise self._fault(f"no server answers there ({reason}); start it, or give its address") from None

    def _fault(self, rule: str) -> UserError:
        return UserError(f"url={self.url}: {rule}")
