"""The interface from Python: the recipes' own steps as functions, for notebooks and scripts.

`mtptrain` offers these names itself. A function composes and checks its settings as the command line does, and runs the
recipe's own program, so that its results are those of the command line. A mistake raises `UserError`. The list of
names is in `mtptrain/__init__.py`.
"""

# ruff: noqa: F401

from mtptrain.api.backbone import LoadedBackbone, load_backbone, load_head, training_batches
from mtptrain.api.runs import TrainedRun, evaluate, read_evaluation, run_recipe, train
from mtptrain.api.texts import DecodedText, DecodedTexts, decode
from mtptrain.batch import Batch
from mtptrain.data.batches import BatchSource
from mtptrain.errors import UserError
from mtptrain.evaluation.head_result import HeadResult
from mtptrain.evaluation.heads import Head
from mtptrain.evaluation.result import Evaluation
