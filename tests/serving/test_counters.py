import pytest

from mtptrain.serving.counters import Counters, parse_counters

VLLM = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a/b"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a/b"} 5.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a/b"} 1.7e+09
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a/b",position="0"} 7.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a/b",position="1"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="a/b",position="0"} 1.0
vllm:generation_tokens_total{engine="0",model_name="a, \\"b\\" {c}"} 26.0
"""
SGLANG = """sglang:generation_tokens_total{is_streaming="true",model_name="m"} 20.0
sglang:generation_tokens_total{is_streaming="false",model_name="m"} 10.0
sglang:spec_verify_calls_total{model_name="m"} 12.0
sglang:spec_num_steps{model_name="m"} 3.0
"""


def test_the_counters_of_several_engines_are_added_up() -> None:
    assert parse_counters(VLLM) == Counters("vLLM", 15.0, 26.0, [8.0, 3.0], 2)


def test_sglang_counts_passes_and_tokens_and_shows_its_draft_length() -> None:
    assert parse_counters(SGLANG) == Counters("SGLang", 12.0, 30.0, [], 3)


@pytest.mark.parametrize("text", ["", "<html>", "vllm:generation_tokens_total 4.0\n", "process_cpu 1\n"])
def test_a_server_that_does_not_draft_has_no_counters(text: str) -> None:
    assert parse_counters(text) is None
