"""A client of the OpenAI-compatible endpoint of vLLM and SGLang, with its acceptance counters."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
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
ADDRESS = "give the address of a vLLM or SGLang server"
EMITTED = ("usage", "completion_tokens")
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
        self.model = str(self._part("/v1/models", self._json("/v1/models"), "data", 0, "id"))
        self.server = self.counters().server

    def counters(self) -> Counters:
        """Return the counters of now.

        Raises:
            UserError: the server has none.
        """
        counters = parse_counters(self._read("/metrics"))
        if counters is None:
            raise self._fault(SWITCHES)
        return counters

    def complete(self, tokens: list[int], settings: Mapping[str, object]) -> Answer:
        """Return the server's continuation of a prompt.

        Args:
            tokens: token ids of the prompt.
            settings: fields of the request, such as `max_tokens` and `temperature`.

        Raises:
            UserError: the server refuses the request, or answers others at the same time.
        """
        before = self.counters()
        path = "/v1/completions"
        reply = self._json(path, {"model": self.model, "prompt": tokens, **settings})
        text, emitted = self._part(path, reply, "choices", 0, "text"), self._part(path, reply, *EMITTED)
        if not isinstance(emitted, int):
            raise self._fault(f"{path} counts {emitted!r} tokens; {ADDRESS}")
        after = self._settled(before, emitted)
        return Answer(str(text), self._counts(before, after, emitted), after.draft_length)

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

    def _json(self, path: str, body: Mapping[str, object] | None = None) -> object:
        text = self._read(path, body)
        try:
            return json.loads(text)
        except ValueError:
            raise self._fault(f"{path} is no JSON; {ADDRESS}") from None

    def _part(self, path: str, reply: Any, *keys: str | int) -> object:
        """Return a part of the reply to a path, by keys and list indices."""
        for key in keys:
            try:
                reply = reply[key]
            except (LookupError, TypeError):
                raise self._fault(f"the answer of {path} has no {'.'.join(map(str, keys))}; {ADDRESS}") from None
        return reply

    def _read(self, path: str, body: Mapping[str, object] | None = None) -> str:
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
