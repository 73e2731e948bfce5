"""`+recipe=measure_server`: does a running server accept as many drafts as replay predicts?

python -m mtptrain +recipe=measure_server url=http://127.0.0.1:8000 checkpoint=stock prompts=prompts.jsonl
"""

from __future__ import annotations

from mtptrain.config import RunConfig, require
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_traces, settings
from mtptrain.decoding.policy import Policy
from mtptrain.errors import UserError
from mtptrain.evaluation.heads import describe_policy, describe_prompts
from mtptrain.kernels.choices import Verification
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import prepare_traces, replay_head
from mtptrain.run.folder import FolderUse
from mtptrain.run.progress import Progress, waiting
from mtptrain.run.storage import write_json
from mtptrain.run.tables import open_console
from mtptrain.run.typed_json import to_json
from mtptrain.serving.client import Answer, ServerClient
from mtptrain.serving.counters import SGLANG
from mtptrain.serving.result import SCHEMA, SERVER_FILE, ServerMeasurement, compare_counts, print_measurement
from mtptrain.traces.file import Trace

FOLDER = FolderUse.result
BEGINNING = 8  # characters; texts of one model begin alike even if a rounding difference parts them later


def reads(config: RunConfig) -> Settings:
    """Return the settings that a measurement of a server reads."""
    return ALWAYS | of_backbone(config) | of_traces(config) | settings("url", "checkpoint", "overwrite")


def check(config: RunConfig) -> None:
    """Refuse a measurement without an address or a head, and policies that no server has."""
    if config.url is None:
        raise UserError("url=null: measure_server needs a running server; set url=http://127.0.0.1:8000")
    if not config.url.startswith(("http://", "https://")):
        raise UserError(f"url={config.url}: must start with http:// or https://, e.g. http://127.0.0.1:8000")
    if config.checkpoint is None:
        raise UserError("checkpoint=null: name the head that the server runs: a run's or export's folder, or `stock`")
    decoding = config.decoding
    rule = "servers draft K tokens in every pass; leave it 0"
    require(decoding.min_confidence == 0, "decoding.min_confidence", decoding.min_confidence, rule)
    is_served = decoding.temperature == 0 or decoding.verification is Verification.token
    require(is_served, "decoding.verification", decoding.verification.value, "servers verify token by token; use token")


def request_settings(session: Session) -> dict[str, object]:
    """Return the fields of a request under the policy and limits of the run."""
    policy, limits = session.policy, session.limits
    fields: dict[str, object] = {
        "max_tokens": limits.max_new_tokens,
        "temperature": policy.temperature,
        "ignore_eos": True,  # the backbone's end tokens are among the stop tokens
        "stop_token_ids": sorted(limits.stop),
        "seed": session.config.seed,
    }
    penalties = policy.penalties
    given = {
        "top_k": (policy.top_k, None),
        "top_p": (policy.top_p, 1.0),
        "min_p": (policy.min_p, 0.0),
        "repetition_penalty": (penalties.repetition, 1.0),
        "frequency_penalty": (penalties.frequency, 0.0),
        "presence_penalty": (penalties.presence, 0.0),
    }
    fields |= {name: value for name, (value, default) in given.items() if value != default}
    return fields | ({"stop": list(limits.strings.texts)} if limits.strings else {})


def check_length(served: int, longest: int) -> None:
    """Raise a `UserError` if a server drafts more tokens a pass than are replayed."""
    rule = f"the server drafts {served} tokens a pass; set decoding.draft_length={served}"
    require(served <= longest, "decoding.draft_length", longest, rule)


def check_modules(server: str, served: int, depth: int, policy: Policy) -> None:
    """Raise a `UserError` if a server runs a stacked head by another rule than replay.

    Args:
        server: `vLLM` or `SGLang`.
        served: drafts a pass, K.
        depth: number of the head's modules.
        policy: of the replay.
    """
    if depth == 1:
        return
    rule = f"SGLang runs one MTP module and this head has {depth}; serve it with vLLM"
    require(server != SGLANG, "url", server, rule)
    rule = (
        f"vLLM drafts {served} tokens with {depth} modules and starts again past them; serve with "
        f"num_speculative_tokens={depth}, or set decoding.past_depth=wrap_around decoding.draft=greedy"
    )
    require(served <= depth or policy.wraps(depth, served), "decoding.past_depth", policy.past_depth.value, rule)


def ask_server(session: Session, client: ServerClient, traces: list[Trace]) -> list[Answer]:
    """Return the server's answer to every prompt, one request at a time: its counters have no other way to tell them.

    Raises:
        UserError: the server answers others too, or drafts more than was replayed.
    """
    fields, longest = request_settings(session), session.config.decoding.draft_length
    answers: list[Answer] = []
    with Progress("asking the server", len(traces), unit="prompts") as progress:
        for number, trace in enumerate(traces, start=1):
            answer = client.complete(trace.prompt.tokens, fields)
            check_length(answer.draft_length, longest)
            answers.append(answer)
            progress.update(number, client.server, 1)
    return answers


def compare_texts(session: Session, client: ServerClient, answers: list[Answer], traces: list[Trace]) -> float | None:
    """Return the share of greedy texts that equal the backbone's; None at a temperature above 0.

    Raises:
        UserError: most texts begin differently, as those of another model do.
    """
    if not session.policy.is_greedy:
        return None
    pairs = [
        (answer.text, session.source.tokenizer.decode(trace.tokens, skip_special_tokens=True))
        for answer, trace in zip(answers, traces, strict=True)
    ]
    alike = sum(ours.startswith(served[:BEGINNING]) for served, ours in pairs)
    if 2 * alike < len(pairs):
        raise UserError(
            f"url={client.url}: {len(pairs) - alike} of {len(pairs)} texts of {client.model} begin otherwise than the "
            f"backbone's; it serves another model than backbone.path={session.source.folder}"
        )
    return sum(served == ours for served, ours in pairs) / len(pairs)


def run(session: Session) -> None:
    """Send the prompts, read the counters, and compare with replay; write server.json."""
    config, folder = session.config, session.folder
    client = ServerClient(str(config.url))  # before anything is loaded
    longest = client.counters().draft_length
    check_length(longest, config.decoding.draft_length)
    head = session.head(str(config.checkpoint))
    check_modules(client.server, longest, head.stack.depth, session.policy)
    trace_set = prepare_traces(session)
    traces = trace_set.traces
    with waiting(f"replaying the {head.name} head on {len(traces)} texts"):
        predicted = replay_head(session, head.stack, traces)
    answers = ask_server(session, client, traces)
    same_text = compare_texts(session, client, answers, traces)
    k = max(answer.draft_length for answer in answers)
    if k < 1:
        raise UserError(f"url={client.url}: {client.server} drafted nothing for these prompts; give longer ones")
    groups = [trace.prompt.group for trace in traces]
    agreement = compare_counts([answer.counts for answer in answers], predicted[k], groups, k)
    result = ServerMeasurement(
        schema=SCHEMA,
        provenance=folder.provenance,
        url=client.url,
        server=client.server,
        model=client.model,
        checkpoint=head.checkpoint,
        policy=describe_policy(session.policy, session.config.decoding.served_as),
        prompts=describe_prompts(trace_set),
        draft_length=k,
        served=agreement.served,
        predicted=agreement.predicted,
        difference=agreement.difference,
        same_text=same_text,
        verdict=agreement.verdict,
    )
    write_json(folder.path / SERVER_FILE, to_json(result))
    print_measurement(result, open_console())
    folder.print_status(f"wrote {folder.path / SERVER_FILE}")
