"""The texts that an evaluation measures heads on, without measuring any."""

from mtptrain.api.backbone import open_session
from mtptrain.api.composed import compose_run
from mtptrain.recipes.traces import gather_traces
from mtptrain.traces.file import TraceSet
from tests.command import fitting


def recorded(light: list[str], *arguments: str) -> TraceSet:
    """Return the prompts of an evaluation with these settings, continued by the backbone."""
    session = open_session(compose_run(fitting(["+recipe=evaluate", *light, "checkpoint=stock", *arguments])))
    return gather_traces(session, session.config.evaluation.num_prompts)
