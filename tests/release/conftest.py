"""A head, and its tensors as a release stores them."""

import pytest
from torch import Tensor

from mtptrain.mtp.stack import MtpStack
from mtptrain.release.modules import to_release
from tests.release.test_modules import CONFIG
from tests.tiny import random_backbone, random_stack


@pytest.fixture(scope="module")
def stack() -> MtpStack:
    return random_stack(random_backbone(), depth=2)


@pytest.fixture(scope="module")
def released(stack: MtpStack) -> dict[str, Tensor]:
    return to_release(stack.state_dict(), CONFIG, "fp8_fp4")
