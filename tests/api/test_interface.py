"""The public names of `mtptrain`: whoever changes a line of this list changes notebooks of users."""

import inspect

import pytest

import mtptrain

FUNCTIONS = {
    "load_backbone": "path=None, *, settings=None",
    "load_head": "backbone, checkpoint='stock'",
    "training_batches": "backbone, *, settings=None",
    "decode": "backbone, prompts, head=None, *, settings=None",
    "train": "backbone, *, recipe='distill', output_dir=None, settings=None",
    "evaluate": "backbone, head='stock', *, output_dir=None, settings=None",
    "read_evaluation": "path",
    "run_recipe": "recipe, backbone=None, *, output_dir=None, settings=None",
}
RETURNED = {
    "load_backbone": "LoadedBackbone",
    "load_head": "Head",
    "training_batches": "BatchSource",
    "decode": "DecodedTexts",
    "train": "TrainedRun",
    "evaluate": "Evaluation",
    "read_evaluation": "Evaluation",
    "run_recipe": "Path",
}
TYPES = {
    "LoadedBackbone": ["config", "device", "encode", "fingerprint", "loaded", "model", "settings", "text", "tokenizer"],
    "Head": ["backbone", "checkpoint", "mode", "name", "num_parameters", "passages", "selection", "stack"],
    "DecodedText": ["pieces", "prompt", "record", "text", "tokens", "tokens_per_pass"],
    "DecodedTexts": ["batch", "count", "index", "texts", "tokens_per_pass", "tokens_per_second"],
    "TrainedRun": ["curve", "evaluation", "folder", "head", "metrics"],
    "Batch": [
        *("loss_mask_BS", "position_BS", "segment_BS", "source_B", "source_tokens", "streams_BSND", "target_mask"),
        *("to", "tokens_BS"),
    ],
}
NAMED_ONLY = ["BatchSource", "Evaluation", "HeadResult", "UserError"]  # docs/evaluation.md describes the figures


def test_the_package_offers_these_names_and_no_others() -> None:
    assert sorted([*FUNCTIONS, *TYPES, *NAMED_ONLY]) == mtptrain.__all__ == sorted(mtptrain.__all__)
    assert set(mtptrain.__all__) <= set(dir(mtptrain))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_keeps_its_arguments(name: str) -> None:
    signature = inspect.signature(getattr(mtptrain, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({FUNCTIONS[name]})"
    assert signature.return_annotation == RETURNED[name]


@pytest.mark.parametrize("name", TYPES)
def test_a_type_keeps_its_attributes(name: str) -> None:
    assert [one for one in dir(getattr(mtptrain, name)) if not one.startswith("_")] == TYPES[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_raises_and_shows_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(mtptrain, name)) or ""
    assert "UserError:" in text
    assert f"mtptrain.{name}(" in text.partition("Example:")[2]


def test_an_unknown_name_of_the_package_is_missing_as_in_any_module() -> None:
    assert not hasattr(mtptrain, "load_tokenizer")
