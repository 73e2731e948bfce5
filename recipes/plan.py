"""`+recipe=plan`: what drafting would gain on some hardware, and why; no model is loaded and torch is not imported.

python -m mtptrain +recipe=plan model=v4_flash hardware=h200
"""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from mtptrain.config import RunConfig
from mtptrain.errors import UserError
from mtptrain.planning.decoding import plan_decoding
from mtptrain.planning.profile import read_profile
from mtptrain.planning.table import print_decoding_plan
from mtptrain.run_folder import RunFolder
from mtptrain.storage import write_json

SCHEMA = 1


def run(config: RunConfig, run_folder: RunFolder) -> None:
    """Compute the plan, write plan.json and print it."""
    if config.model is None or config.hardware is None or config.plan is None:
        raise UserError("model=null: plan needs shapes, hardware and a load; start from +recipe=plan")
    body = plan_decoding(config.model.name, config.model.shape, config.hardware, config.plan, read_profile(config.plan))
    run_folder.record()
    plan = {
        "schema": SCHEMA,
        "provenance": run_folder.provenance,
        "what": config.plan.what.value,
        "hardware": asdict(config.hardware),
        "load": run_folder.settings["plan"],
        **body,
    }
    write_json(run_folder.path / "plan.json", plan)
    print_decoding_plan(plan, Console())
    run_folder.say(f"wrote {run_folder.path / 'plan.json'}")
