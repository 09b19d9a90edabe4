"""Byte streams of the importer: plain files, and zstd by the package, Python's own module or the command."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from shadowkvm.errors import TraceError

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_PLAIN_STEP: Final = 1 << 20
# zstd packs zeros 30,000 to 1: what one step unpacks to must stay small whatever the file holds.
_PACKED_STEP: Final = 4096


class RawStream:
    """A file that is plain or compressed by zstd, read once from the start.

    Attributes:
        fraction: part of the file (as stored) that was read so far, 0 to 1.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Unbuffered: the zstd command shares the file's offset, and `fraction` looks at it.
        self._file = self.path.open("rb", buffering=0)
        self._size = max(1, os.fstat(self._file.fileno()).st_size)
        packed = self._file.read(len(_MAGIC)) == _MAGIC
        self._file.seek(0)
        if not packed and self.path.suffix == ".zst":
            self._file.close()
            raise TraceError("not zstd: the file does not begin with its magic number", place=self.path.name)
        self._blocks = self._unpack() if packed else self._plain()

    @property
    def fraction(self) -> float:
        """Part of the stored file that was read, 0 to 1."""
        return min(1.0, self._file.tell() / self._size)

    def items(self, size: int, count: int) -> Iterator[bytes]:
        """The content in pieces of ``count`` items of ``size`` bytes (the last one may have fewer items).

        Raises:
            TraceError: the stream is damaged, or ends inside an item; ``index`` is the number of the item.
        """
        kept, done = bytearray(), 0
        for block in self._blocks:
            kept += block
            while len(kept) >= size * count:
                yield bytes(kept[: size * count])
                del kept[: size * count]
                done += count
        whole, spare = divmod(len(kept), size)
        if spare:
            offset = (done + whole) * size
            raise TraceError(f"cut off: {spare} of {size} bytes (offset {offset})", done + whole, self.path.name)
        if whole:
            yield bytes(kept)

    def close(self) -> None:
        """Close the file, and end the zstd command if there is one."""
        self._blocks.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plain(self) -> Any:
        while block := self._file.read(_PLAIN_STEP):
            yield block

    def _unpack(self) -> Any:
        make, kind = _decompressor()
        return self._by_command() if make is None else self._by_module(make, kind)

    def _by_module(self, make: Any, failure: type[Exception]) -> Any:
        frame = make()
        fresh = False
        while data := self._file.read(_PACKED_STEP):
            while data:
                if frame.eof:
                    frame = make()
                try:
                    yield frame.decompress(data)
                except failure as error:
                    offset = self._file.tell() - len(data)
                    raise TraceError(f"damaged zstd: {error} (near offset {offset})", place=self.path.name) from error
                data = frame.unused_data if frame.eof else b""
                fresh = True
        if fresh and not frame.eof:
            raise TraceError(f"cut off: zstd goes on after offset {self._size}", place=self.path.name)

    def _by_command(self) -> Any:
        command = shutil.which("zstd")
        if command is None:
            message = f'{self.path.name} needs zstd: pip install "shadowkvm[import]", or install the zstd command'
            raise ImportError(message, name="zstandard")
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(  # noqa: S603 -- the path is shutil.which's, the input is a handle
                [command, "-d", "-c", "-q"], stdin=self._file, stdout=subprocess.PIPE, stderr=said
            ) as process,
        ):
            try:
                while process.stdout is not None and (block := process.stdout.read(_PLAIN_STEP)):
                    yield block
                if process.wait():
                    said.seek(0)
                    message = said.read(500).decode(errors="replace").strip()
                    raise TraceError(f"damaged zstd: {message}", place=self.path.name)
            finally:
                if process.poll() is None:
                    process.kill()


def _decompressor() -> tuple[Any, type[Exception]]:
    """What makes a decompressor of one frame, and what it raises; (None, ...) if no module is there."""
    try:
        module = importlib.import_module("compression.zstd")
    except ImportError:
        pass
    else:
        return module.ZstdDecompressor, module.ZstdError
    try:
        module = importlib.import_module("zstandard")
    except ImportError:
        return None, Exception
    context = module.ZstdDecompressor()
    return context.decompressobj, module.ZstdError
