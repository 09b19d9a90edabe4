"""Output files: whole or not at all; text, and events as Parquet or as the kernel prints them."""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from shadowkvm._core import MODEL_VERSION
from shadowkvm.errors import ConfigError
from shadowkvm.events import EVENT_INFO
from shadowkvm.vm import Vm

__all__ = ["EVENT_FORMATS", "EventFile", "event_file", "write_atomically"]

# Rows of a Parquet row group: large enough to compress, small enough to hold.
_GROUP: Final = 1 << 17


def _beside(path: Path) -> Path:
    """The hidden file that becomes ``path``: in the same folder, since a rename works within one file system only."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; whoever looks finds the old file or the new one, never a part."""
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class EventFile:
    """A file of events that is written piece by piece, and is in its place after the ``with`` block ended well.

    Args:
        path: the file.
        model_version: the kernel whose rules hold.

    Subclasses write what `put` gives them.
    """

    def __init__(self, path: Path, model_version: str) -> None:
        self.path, self.model_version = path, model_version
        self._temporary = _beside(path)

    def put(self, vm: Vm, events: NDArray[np.void]) -> None:
        """Write events (EVENT_DTYPE): all that ``vm`` holds at the moment."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
            if kind is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


class _Text(EventFile):
    """One line an event, in the kernel's text form."""

    def __init__(self, path: Path, model_version: str) -> None:
        super().__init__(path, model_version)
        self._file = self._temporary.open("x", encoding="utf-8")

    def put(self, vm: Vm, events: NDArray[np.void]) -> None:
        del events
        self._file.writelines(f"{line}\n" for line in vm.event_text())

    def close(self) -> None:
        self._file.close()


class _Parquet(EventFile):
    """One row an event: row, event, vcpu, level, flag, code, a, b, c."""

    def __init__(self, path: Path, model_version: str) -> None:
        try:
            self._arrow: Any = importlib.import_module("pyarrow")
            parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            message = f'{path.name} needs pyarrow: pip install "shadowkvm[parquet]"'
            raise ImportError(message, name="pyarrow") from error
        super().__init__(path, model_version)
        arrow = self._arrow
        numbers = {"vcpu": "uint8", "level": "uint8", "flag": "uint8", "code": "uint32"}
        numbers |= {"a": "uint64", "b": "uint64", "c": "uint64"}
        fields = [("row", arrow.uint64()), ("event", arrow.dictionary(arrow.uint8(), arrow.string()))]
        fields += [(name, getattr(arrow, kind)()) for name, kind in numbers.items()]
        about = {"schema": "shadowkvm.events/1", "model_version": model_version}
        self._schema = arrow.schema(fields, metadata=about)
        self._names = arrow.array(list(EVENT_INFO), arrow.string())
        self._waiting: list[NDArray[np.void]] = []
        self._writer = parquet.ParquetWriter(self._temporary, self._schema, compression="zstd")

    def put(self, vm: Vm, events: NDArray[np.void]) -> None:
        del vm
        self._waiting.append(events)
        if sum(map(len, self._waiting)) >= _GROUP:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        events = np.concatenate(self._waiting)
        self._waiting.clear()
        arrow = self._arrow
        columns: dict[str, Any] = {
            field.name: np.ascontiguousarray(events[field.name])
            for field in self._schema
            if field.name not in {"row", "event"}
        }
        columns["row"] = np.ascontiguousarray(events["op"])
        columns["event"] = arrow.DictionaryArray.from_arrays(np.ascontiguousarray(events["kind"]), self._names)
        self._writer.write_table(arrow.table([columns[field.name] for field in self._schema], schema=self._schema))


EVENT_FORMATS: Final[dict[str, type[EventFile]]] = {".parquet": _Parquet, ".txt": _Text}
"""The formats of event files, by suffix."""


def event_file(path: Path, model_version: str = MODEL_VERSION) -> EventFile:
    """A file of events; its suffix says the format.

    Raises:
        ConfigError: another suffix.
        ImportError: .parquet without pyarrow; the message names the extra.
        OSError: the folder is not there or may not be written.
    """
    try:
        make = EVENT_FORMATS[path.suffix]
    except KeyError:
        raise ConfigError(f"events {path.name!r}: the name must end in {' or '.join(EVENT_FORMATS)}") from None
    return make(path, model_version)
