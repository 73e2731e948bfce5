"""The example data set, and the rows that docs/data.md shows."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mtptrain.config import DataConfig, DataFormat, DataSource
from mtptrain.data import notes
from mtptrain.data.chat import open_chat_template
from mtptrain.data.documents import Split
from mtptrain.data.forms import read_content, recognise
from mtptrain.data.text import TextReader, text_documents
from mtptrain.data.tokenizer import save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = DataConfig(
    source=DataSource.text, path=str(ROOT / "examples" / "chat"), field_name="messages", chat_template="builtin"
)
FORMS = [form for form in DataFormat if form not in (DataFormat.auto, DataFormat.text)]
CHAPTERS = re.split(r"^### ", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("form", FORMS)
def test_every_row_of_the_documentation_has_the_form_of_its_heading(form: DataFormat) -> None:
    (chapter,) = (text for text in CHAPTERS if text.startswith(f"{form.value}\n"))
    rows = [json.loads(line) for line in chapter.split("```")[1].splitlines()[1:]]
    assert len(rows) >= 2
    for row in rows:
        assert recognise(row, "messages") is form
        assert read_content("docs/data.md", row, "messages", DataFormat.auto).messages[-1]["role"] == "assistant"


def test_the_example_data_set_has_rows_of_every_form_on_both_sides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "_shown", set())
    for split in Split:
        assert text_documents(EXAMPLES, split)
    noted = capsys.readouterr().err
    assert all(f"rows are read as conversations of the form {form.value}" in noted for form in FORMS)


@pytest.mark.parametrize("template", ["builtin", str(ROOT / "examples" / "template.jinja")])
def test_every_example_has_targets_and_tools_in_a_template(template: str, tmp_path: Path) -> None:
    documents = list(TextReader(EXAMPLES))
    tokenizer = train_tokenizer([document.text for document in documents], 400)
    save_tokenizer(tokenizer, tmp_path)
    chat = open_chat_template(replace(EXAMPLES, chat_template=template), tmp_path, tokenizer, [0])
    assert chat is not None
    assert len(documents) == 20
    assert sum(bool(document.tools) for document in documents) == 4
    for document in documents:
        (row,) = chat.encode_rows(document.messages, document.tools)
        assert 0 < sum(row.loss_mask) < len(row.tokens)
        assert all(tool["function"]["name"] in row.text for tool in document.tools)
