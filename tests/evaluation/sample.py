"""A plausible evaluation, as the evaluate task would write it, for the tests of tables and reports."""

from typing import Any

# K draft length, k position in the draft from 1.

SHARES = {"stock": 0.62, "trained": 0.74}
DOMAINS = ("code", "prose")


def sample_evaluation(draft_length: int = 4, heads: tuple[str, ...] = ("stock", "trained")) -> dict[str, Any]:
    """An evaluation.json whose trained head gains and whose certificate passed.

    Args:
        draft_length: longest K, 1 to 8.
        heads: names, the stock head first.
    """
    lengths = range(1, draft_length + 1)
    return {
        "schema": 2,
        "provenance": _provenance(),
        "backbone": {
            "name": "tiny",
            "fingerprint": "9f" * 32,
            "parameters": 4_218_112,
            "heldout_nats_per_token": 2.8114,
            "heldout_bits_per_byte": 1.2173,
        },
        "prompts": {"source": "heldout", "count": 24, "prompt_tokens": 96, "new_tokens": 64},
        "draft_length": draft_length,
        "heads": [_head(name, draft_length) for name in heads],
        "policy": {"temperature": 0.0, "top_k": None, "top_p": 1.0, "draft": "greedy", "verification": "token"},
        "gain": {str(k): _gain(k) for k in lengths} if len(heads) == 2 else None,
        "gain_by_domain": {name: _gain(draft_length) for name in DOMAINS} if len(heads) == 2 else None,
        "certificate": {
            "passed": True,
            "greedy_identity": {"passed": True, "compared": 48, "identical": 48, "near_ties": [], "differences": []},
            "replay_equals_loop": {"passed": True, "compared": 48, "equal": 48, "differences": []},
            "sampler": {"passed": True, "token": {"passed": True}, "block": {"passed": True}},
            "controls": {"passed": True, "all_accept": {"passed": True, "acceptance_length": 5.0, "ceiling": 5}},
        },
        "speedup": {
            batch: {name: {str(k): _speedup(name, k) for k in lengths} for name in heads} for batch in ("1", "4")
        },
        "steps": {batch: {name: _steps(name, draft_length) for name in heads} for batch in ("1", "4")},
        "plain_tokens_per_second": {"1": 183.4172, "4": 402.1},
    }


def _provenance() -> dict[str, Any]:
    return {
        "command": ["python", "-m", "mtptrain", "+recipe=evaluate", "checkpoint=outputs/distill/first run"],
        "started": "2026-01-31T10:20:30+0000",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.9", "mtptrain": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0"},
        "hardware": {"processor": "Example CPU @ 2.60GHz", "cores": 2, "torch_threads": 1, "gpus": []},
        "seed": 0,
    }


def _length(name: str, k: int) -> float:
    return 1 + sum(SHARES[name] ** step for step in range(1, k + 1))


def _head(name: str, draft_length: int) -> dict[str, Any]:
    lengths = range(1, draft_length + 1)
    share = SHARES[name]
    return {
        "name": name,
        "checkpoint": f"outputs/{name}/checkpoints/step-000400",
        "mode": "shared",
        "depth": 1,
        "parameters": 612_480,
        "teacher_forced": {
            "alpha": [share * 0.97**k for k in lengths],
            "top1": [share * 1.05 * 0.97**k for k in lengths],
            "tokens": [24_480 - 96 * k for k in lengths],
        },
        "replay": {str(k): _replay(name, k) for k in lengths},
        "domains": {domain: _replay(name, draft_length) for domain in DOMAINS},
        "breakdown": {"draft_length": draft_length, "by": {"token_class": _buckets(share), "domain": _buckets(share)}},
        "calibration": {
            "draft_length": draft_length,
            "ece": 0.041,
            "bins": [
                {"low": x, "high": x + 0.2, "confidence": x + 0.1, "acceptance": x + 0.06} for x in (0.0, 0.4, 0.8)
            ],
        },
        "thresholds": [
            {"stop_below": 0.0, "acceptance_length": _length(name, draft_length), "drafted_per_pass": draft_length},
            {"stop_below": 0.6, "acceptance_length": _length(name, 1), "drafted_per_pass": None},
        ],
        "loop": {
            str(k): {"acceptance_length": _length(name, k) - 0.021, "passes": 401 - 40 * k, "emitted": 378}
            for k in lengths
        },
        "samples": [_sample(draft_length)],
    }


def _replay(name: str, draft_length: int) -> dict[str, Any]:
    share, value = SHARES[name], _length(name, draft_length)
    passes = round(1512 / value)
    drafted = [passes - 9 * k for k in range(draft_length)]  # the last drafts of a continuation are cut short
    return {
        "acceptance_length": value,
        "interval": [value - 0.1132, value + 0.1217],
        "passes": passes,
        "emitted": 1512,
        "drafted": drafted,
        "accepted": [round(count * share**k) for k, count in enumerate(drafted, start=1)],
        "conditional": [share for _ in range(draft_length)],
        "unconditional": [share**k for k in range(1, draft_length + 1)],
    }


def _gain(k: int) -> dict[str, Any]:
    value = _length("trained", k) - _length("stock", k)
    return {"gain": value, "interval": [value - 0.0612, value + 0.0587]}


def _speedup(name: str, k: int) -> dict[str, Any]:
    median = _length(name, k) / (1 + 0.31 * k)
    return {
        "median": median,
        "quartiles": [median - 0.0414, median + 0.0523],
        "per_batch": [median + 0.02 * step for step in (-4, -2, 0, 1, 3, 5)],
        "after_prefill": {"median": median + 0.03, "quartiles": [median - 0.01, median + 0.08]},
        "shares": _shares(),
    }


def _shares() -> dict[str, float]:
    return {"prefill": 0.1, "draft": 0.3, "verify": 0.5, "sample": 0.05, "rewind": 0.01}


def _buckets(share: float) -> list[dict[str, Any]]:
    return [
        {"bucket": "word start", "reached": 1210.4, "acceptance": share, "lost_share": 0.7},
        {"bucket": "digits <0-9> $a$", "reached": 90.0, "acceptance": share / 2, "lost_share": 0.3},
    ]


def _steps(name: str, draft_length: int) -> dict[str, Any]:
    def spread(value: float) -> dict[str, Any]:
        return {"median": value, "quartiles": [value * 0.9, value * 1.1]}

    lengths = range(1, draft_length + 1)
    return {
        "batch": 1,
        "context": 96,
        "repetitions": 20,
        "step_seconds": {str(n): spread(0.007 + 0.0005 * n) for n in range(1, draft_length + 2)},
        "draft_seconds": {str(k): spread(0.002 * k) for k in lengths},
        "predicted_speedup": {str(k): spread(_speedup(name, k)["median"] * 1.02) for k in lengths},
    }


def _sample(draft_length: int) -> dict[str, Any]:
    return {
        "prompt": "    def close(self):\n        ",
        "draft_length": draft_length,
        "pieces": [
            {"text": '"""Close', "kind": "bonus"},
            {"text": " the", "kind": "accepted"},
            {"text": " file", "kind": "accepted"},
            {"text": ', if <open> & "dirty".', "kind": "bonus"},
            {"text": '"""', "kind": "accepted"},
            {"text": "\n        ", "kind": "accepted"},
            {"text": "\n", "kind": "rejected"},
            {"text": "self", "kind": "bonus"},
            {"text": ".", "kind": "accepted"},
            {"text": "_file", "kind": "accepted"},
            {"text": ".close", "kind": "accepted"},
            {"text": "()", "kind": "bonus"},
        ],
    }
