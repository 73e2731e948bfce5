import numpy as np

from mtptrain.replay.replay import Counts
from mtptrain.serving.result import compare_counts


def test_a_server_without_counts_by_position_has_the_interval_of_its_prompts() -> None:
    """SGLang's counters hold passes and tokens alone, so the longest draft is not the number of positions."""
    none, some = np.zeros(0), np.array([2.0, 1.0])
    served = [Counts(10.0, emitted, None, none, none) for emitted in (15.0, 18.0, 13.0)]
    predicted = [Counts(one.passes, one.emitted, None, some, some) for one in served]
    agreement = compare_counts(served, predicted, [0, 1, 2], 2)
    assert agreement.served.interval == agreement.predicted.interval
    assert agreement.served.interval is not None
    assert 1.0 <= agreement.served.interval[0] < 46 / 30 < agreement.served.interval[1] <= 3.0
