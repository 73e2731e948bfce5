"""The section `deepspeed` reaches DeepSpeed, except for settings that belong to the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtptrain.config import EngineName, RunConfig, TrainConfig
from mtptrain.config.deepspeed import passed_settings
from mtptrain.errors import UserError


def passed(given: dict[str, Any], engine: str = "zero2", offload: bool = False) -> dict[str, Any]:
    return passed_settings(given, EngineName(engine), offload)


def test_settings_override_those_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps({"comms_logger": {}, "zero_optimization": {"overlap_comm": True, "reduce_scatter": True}})
    )
    given = {"config": str(file), "zero_optimization": {"overlap_comm": False}}
    zero = {"overlap_comm": False, "reduce_scatter": True}
    assert passed(given) == {"comms_logger": {}, "zero_optimization": zero}


def test_auto_leaves_a_setting_to_the_run() -> None:
    assert passed({"bf16": "auto", "zero_optimization": {"stage": "auto"}}) == {"zero_optimization": {}}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"gradient_clipping": 1.0}, r"deepspeed\.gradient_clipping=1\.0: set train\.clip_norm"),
        ({"train_batch_size": 8}, r"deepspeed\.train_batch_size=8: train\.batch_size"),
        ({"bf16": {"enabled": True}}, r"deepspeed\.bf16=.*fp32; set precision=bf16"),
        ({"zero_optimization": {"stage": 2}}, r"deepspeed\.zero_optimization\.stage=2: set engine="),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "depend on the number of processes"),
        ({"zero_optimization": {"sub_group_size": 5}}, "is read by engine=zero3 only"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.device=nvme: .*set dev",
        ),
        ({"zero_optimization": {"reduce_bucketsize": 5}}, r"did you mean zero_optimization\.reduce_bucket_size\?"),
        ({"zero_optimization": 3}, "must be a section"),
        ({"zero_optimization": {"reduce_bucketsize": "auto"}}, r"did you mean zero_optimization\.reduce_bucket_size\?"),
        ({"wall_clock_breakdown": "often"}, r"deepspeed\.wall_clock_breakdown=often: must be true or false"),
        ({"comms_logger": None}, r"deepspeed\.comms_logger=null: must be a section"),
        ({"flops_profiler": {"enable": True}}, r"did you mean flops_profiler\.enabled\?"),
        ({"aio": {"block_size": 5}}, r"deepspeed\.aio=.*: tunes reads from NVMe"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memoy": True}}},
            r"offload_optimizer\.pin_memoy=true: .*did you mean zero_optimization\.offload_optimizer\.pin_memory\?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "nvme_path": "/a"}}},
            r"offload_optimizer\.nvme_path=/a: is read with device: nvme only",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"offload_optimizer\.ratio=0\.5: replaces the optimiser",
        ),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer=cpu: must be a section"),
        ({"surprise": 5}, r"deepspeed\.surprise=5: is not a setting that is passed"),
        ({"config": "absent.json"}, r"deepspeed\.config=absent\.json: cannot be read as JSON"),
    ],
)
def test_a_setting_of_the_run_is_refused_with_the_way_out(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        passed(given)


def test_offloading_twice_is_refused() -> None:
    with pytest.raises(UserError, match="leave out offload=true"):
        passed({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, offload=True)


def test_a_run_without_deepspeed_refuses_its_settings() -> None:
    with pytest.raises(UserError, match=r"deepspeed=.*: tunes DeepSpeed; set engine=zero1"):
        RunConfig(task="distill", deepspeed={"zero_optimization": {"overlap_comm": True}})


def test_a_value_that_deepspeed_refuses_is_named() -> None:
    from mtptrain.run.deepspeed import check_settings

    check_settings(passed({"zero_optimization": {"reduce_bucket_size": 1000}}))
    with pytest.raises(
        UserError, match=r"deepspeed\.zero_optimization\.reduce_bucket_size=-3: is refused by DeepSpeed"
    ):
        check_settings(passed({"zero_optimization": {"reduce_bucket_size": -3}}))


def test_passed_settings_stand_beside_those_of_the_run() -> None:
    from mtptrain.training.zero_engine import zero_settings

    given = passed({"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1000}}, "zero1")
    settings = zero_settings(TrainConfig(clip_norm=0.5), 1, True, given)
    assert settings["wall_clock_breakdown"] is True
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
