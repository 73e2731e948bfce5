"""`+recipe=measure_server` against a local server that decodes with the head of the prediction, or does not."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtptrain.backbone.load import Backbone, load_backbone, open_source
from mtptrain.config import BackboneConfig, PastDepth
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.errors import UserError
from mtptrain.mtp.stack import stack_from_tensors
from mtptrain.mtp.start import stock_tensors
from mtptrain.recipes.measure_server import check_modules
from tests.command import Refused, run_main
from tests.serving.stand_in import Served, StandIn, serving

K = 2


@pytest.fixture(scope="module")
def backbone(backbone_folder: Path) -> Backbone:
    config = BackboneConfig(path=str(backbone_folder))
    return load_backbone(config, torch.device("cpu"), torch.float32, True, open_source(config))


@pytest.fixture(scope="module")
def decode(backbone: Backbone) -> Callable[[list[int], dict[str, Any]], Served]:
    """Return a function that answers a request with the backbone and its stock head."""
    stack = stack_from_tensors(backbone.config, 1, stock_tensors(backbone), "stock").eval()

    def answer(prompt: list[int], body: dict[str, Any]) -> Served:
        limits = Limits(body["max_tokens"], frozenset(body["stop_token_ids"]))
        row = decode_speculative(backbone.model, MtpProposer(backbone.model, stack), [prompt], K, limits).rows[0]
        text = backbone.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Served(text, len(row.tokens), [one.accepted for one in row.passes])

    return answer


def test_a_stacked_head_is_compared_with_a_server_that_runs_it_by_the_same_rule() -> None:
    wraps = Policy(past_depth=PastDepth.wrap_around)
    check_modules("SGLang", 4, 1, Policy())
    check_modules("vLLM", 2, 2, Policy())
    check_modules("vLLM", 4, 2, wraps)
    with pytest.raises(UserError, match=r"past_depth=repeat_last: vLLM drafts 4 tokens with 2 modules .*wrap_around"):
        check_modules("vLLM", 4, 2, Policy())
    with pytest.raises(UserError, match=r"url=SGLang: SGLang runs one MTP module and this head has 2"):
        check_modules("SGLang", 2, 2, wraps)


@pytest.mark.parametrize("server", ["vLLM", "SGLang"])
def test_a_server_that_runs_the_head_as_trained_serves_what_replay_predicts(
    server: str, decode: Callable[..., Served], light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(StandIn(server, K, decode)) as url:
        arguments = [*light, "checkpoint=stock", f"url={url}/v1", f"output_dir={tmp_path}"]
        assert run_main("+recipe=measure_server", *arguments) == 0
    result = json.loads((tmp_path / "server.json").read_text())
    served, predicted = result["served"], result["predicted"]
    assert (result["server"], result["draft_length"], result["same_text"]) == (server, K, 1.0)
    assert (served["passes"], served["emitted"]) == (predicted["passes"], predicted["emitted"])
    assert result["difference"]["gain"] == 0
    if server == "vLLM":
        assert served["accepted"] == predicted["accepted"]
    else:
        assert served["accepted"] == []
    output = capsys.readouterr().out
    assert "no evidence that the server and the prediction differ" in output
    assert f"{server}, served" in output


def test_the_request_carries_the_policy_and_the_ends_of_the_run(
    decode: Callable[..., Served], light: list[str], tmp_path: Path
) -> None:
    stand_in = StandIn("vLLM", K, decode)
    policy = ["decoding.temperature=0.5", "decoding.top_k=7", "decoding.stop=[5]", "decoding.stop_strings=[zz]"]
    with serving(stand_in) as url:
        arguments = [*light, *policy, "checkpoint=stock", f"url={url}", f"output_dir={tmp_path}"]
        assert run_main("+recipe=measure_server", *arguments) == 0
    body = stand_in.requests[0]
    assert isinstance(body.pop("prompt")[0], int)
    assert body == {
        "model": "served",
        "max_tokens": 6,
        "temperature": 0.5,
        "ignore_eos": True,
        "stop_token_ids": [1, 5],
        "seed": 0,
        "top_k": 7,
        "stop": ["zz"],
    }


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"draft_length": 0}, r"shows no counters of speculative decoding at /metrics; start vLLM with"),
        ({"others": 3}, r"answers others at the same time \(\d+ tokens counted, \d+ of ours\)"),
        ({"draft_length": 3}, r"decoding.draft_length=2: the server drafts 3 tokens a pass; set .*=3"),
        ({"answer": lambda prompt, body: Served("%%%", 6, [0] * 5)}, r"2 of 2 texts of served begin otherwise than"),
    ],
)
def test_a_server_whose_counters_measure_something_else_is_named(
    fault: dict[str, Any],
    line: str,
    decode: Callable[..., Served],
    light: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with serving(replace(StandIn("vLLM", K, decode), **fault)) as url:
        arguments = [*light, "checkpoint=stock", f"url={url}", f"output_dir={tmp_path}/run"]
        assert run_main("+recipe=measure_server", *arguments) == 2
    assert re.search(line, capfd.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "run" / "server.json").exists()


def test_a_server_that_is_down_is_one_line(refused: Refused) -> None:
    line = refused("checkpoint=stock", "url=http://127.0.0.1:9", recipe="measure_server")
    assert line.startswith("url=http://127.0.0.1:9: no server answers there (")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("checkpoint=stock", "url=null: measure_server needs a running server"),
        ("checkpoint=stock url=127.0.0.1:8000", "url=127.0.0.1:8000: must start with http"),
        ("url=http://a", "checkpoint=null: name the head that the server runs"),
        ("url=http://a checkpoint=stock decoding.min_confidence=0.2", "decoding.min_confidence=0.2: servers draft K"),
        (
            "url=http://a checkpoint=stock decoding.temperature=1 decoding.verification=block",
            "decoding.verification=block: servers verify token by token",
        ),
    ],
)
def test_settings_that_no_server_has_are_refused(settings: str, line: str, refused: Refused) -> None:
    assert refused(*settings.split(), recipe="measure_server").startswith(line)
