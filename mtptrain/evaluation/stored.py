"""Reading of results: JSON files with a schema, each the form of one dataclass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mtptrain.errors import UserError
from mtptrain.run.typed_json import MismatchError, from_json

T = TypeVar("T")


def read_json(kind: type[T], path: Path, schema: int) -> T:
    """Return the content of a JSON file, of type `kind`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 or no JSON, has another schema, or is not the form of `kind`.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored_schema = stored.get("schema") if isinstance(stored, dict) else None
    if stored_schema != schema:
        raise MismatchError(f"schema: expected {schema}, got {stored_schema}")
    return from_json(kind, stored)


@dataclass(frozen=True, slots=True)
class ResultFile(Generic[T]):
    """The file of one kind of result.

    Attributes:
        content: its type.
        name: of the file in its run's folder.
        schema: number in its field `schema`.
        wanted: the file and its other names, if nothing can be read.
        again: the way to a file of this schema.
    """

    content: type[T]
    name: str
    schema: int
    wanted: str
    again: str

    def read(self, path: Path, setting: str) -> T:
        """Return the content of a file.

        Args:
            path: the file, or the folder that holds it.
            setting: name of the setting that gave the path.

        Raises:
            UserError: the file cannot be read, or is none of this kind and schema.
        """
        try:
            return read_json(self.content, path / self.name if path.is_dir() else path, self.schema)
        except OSError as error:
            is_other = isinstance(error, FileNotFoundError) and path.is_dir()
            reason = f"holds no {self.name}" if is_other else f"cannot be read ({error.strerror})"
            raise UserError(f"{setting}={path}: {reason}; give {self.wanted}") from None
        except ValueError as error:
            raise UserError(
                f"{setting}={path}: is no {self.name} of schema {self.schema} ({error}); {self.again}"
            ) from None
