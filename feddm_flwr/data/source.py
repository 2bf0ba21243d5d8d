"""A data set before it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feddm_flwr.config import ConfigError, class_name
from feddm_flwr.data.images import Decoded, Images

if TYPE_CHECKING:
    from datasets import Dataset


FOLDER = "folder"  # the group of an image in a folder of its own
PATIENT = "PatientID"  # that of a DICOM file, of whose patient only a hash is kept
_UNLABELLED = "unlabelled"  # the class of a row that has none


@dataclass(frozen=True)
class Source:
    """A data set before decoding: where it is (for messages), one row per image, and a decoder of rows, which
    fills the beginning of an array. Where it is streamed, all rows are decoded in their order, or none."""

    origin: str
    table: Dataset
    fill: Callable[[Sequence[int], Images], Decoded]
    version: str  # of what it is decoded from
    streamed: bool = False
    names: Sequence[str] = ()  # of the rows, where they have some that stay when others come and go
    by_path: bool = False  # whether rows have paths of files
    other_columns: Sequence[str] = ()  # that have images, too, which are not read
    together: Sequence[str] = ()  # which file the image of each row is in, where some have several
    left_out: Sequence[tuple[str, int]] = ()  # what else the files have that is not read, and how much of it
    passed_over: Sequence[tuple[str, int]] = ()  # endings of files there that are not read, and how many there are

    def decode(self, rows: Sequence[int], out: Images) -> Decoded:
        """Fills the beginning of an array with rows.

        Raises:
            ConfigError: they cannot be read, which is not to be taken for an error of where they are written.
        """
        try:
            return self.fill(rows, out)
        except OSError as error:
            raise ConfigError(f"{self.origin}: cannot be read ({error.strerror or type(error).__name__})") from error

    def classes(self, column: str) -> list[str]:
        """Returns the class of every row, or nothing where there is no such column."""
        if column not in self.table.column_names:
            return []
        names: list[str] = getattr(self.table.features[column], "names", [])
        return [class_name(_class(value, names)) for value in self.table[column][:]]

    def groups(self, column: str) -> list[str]:
        """Returns, for every row, which group of images it belongs to: by the column, else by its file where files have
        several images; nothing where each is by itself.

        Raises:
            ConfigError: there is no such column.
        """
        if not column:
            return [*self.together]
        if column == FOLDER and self.names:
            return [name.rpartition("/")[0] for name in self.names]
        if not (found := self.classes(column)):
            what = "not all images are DICOM files that name their patient" if column == PATIENT else "no such column"
            raise ConfigError(f"data.group-column = {column!r}: {what}; {self.origin}")
        return found


def _class(value: object, names: Sequence[str]) -> str:
    if value is None or value != value or (names and isinstance(value, int) and value < 0):  # NaN, too
        return _UNLABELLED
    if names and isinstance(value, int):
        return names[value]
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
