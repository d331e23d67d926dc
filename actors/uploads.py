"""Files that clients send: forms read while they arrive, their file straight into the data directory, bounded.

A file has no name there (`O_TMPFILE`, or removed as soon as it is made): the system takes its space back when nobody
has it open any more, whatever happened to this process. Only the owner of the process can open it, through `/proc`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pipeline.errors import CapacityExceeded, RequestRefused, ServiceError, UploadTooLarge

if TYPE_CHECKING:
    from actors.settings import Settings

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 16_384
_WRITE_BYTES = 1 << 20
_SILENCE_TIMEOUT_S = 30.0
_ARRIVAL_TIMEOUT_S = 900.0
_DISCARD_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Upload:
    """A form that has arrived: the texts of its fields by name, and where its file is, while the form is open."""

    fields: dict[str, list[str]]
    location: str
    num_bytes: int


class Uploads:
    """Receives forms with one file, named `file`.

    Args:
        folder: where files are kept; made, for its owner only, when the first one comes.
        max_bytes: size of the largest file.
        max_concurrent: how many forms may arrive at the same time.
    """

    def __init__(self, folder: Path, max_bytes: int, max_concurrent: int) -> None:
        self._folder = folder.expanduser().absolute()
        self._max_bytes = max_bytes
        self._max_concurrent = max_concurrent
        self._num_arriving = 0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return what receives the uploads of a service with these settings."""
        service = settings.service
        folder = settings.redis.data_dir / "uploads"
        return cls(folder, service.max_upload_mb * 1_000_000, service.max_streams)

    @asynccontextmanager
    async def receive(self, body: AsyncIterator[bytes], content_type: str | None) -> AsyncIterator[Upload]:
        """Read the form in `body` and yield it; its file is gone when the context closes.

        Raises:
            CapacityExceeded: if as many forms as allowed are arriving. Nothing was read then.
            RequestRefused: if it is no form, has no file or several, or stops arriving.
            UploadTooLarge: if the file is larger than allowed.
            ServiceError: if the file cannot be written.
        """
        if self._num_arriving >= self._max_concurrent:
            raise CapacityExceeded(f"{self._num_arriving} files are being received, as many as may be: try again later")
        with contextlib.ExitStack() as files:
            self._num_arriving += 1
            try:
                form = _Form(_boundary_of(content_type), self._max_bytes)
                file = files.enter_context(self._open())
                async with asyncio.timeout(_ARRIVAL_TIMEOUT_S):
                    await self._read(body, form, file)
            except TimeoutError as exc:
                raise RequestRefused(
                    f"nothing was sent for {_SILENCE_TIMEOUT_S:.0f} s, or not all within {_ARRIVAL_TIMEOUT_S:.0f} s"
                ) from exc
            except OSError as exc:
                raise ServiceError(f"cannot keep a file in {self._folder}: {exc.strerror or exc}") from exc
            finally:
                self._num_arriving -= 1
            yield Upload(dict(form.fields), f"/proc/{os.getpid()}/fd/{file.fileno()}", form.num_bytes)

    async def discard(self, body: AsyncIterator[bytes]) -> None:
        """Read on and forget, within bounds: a client that is still sending sees an answer only when it has sent."""
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_TIMEOUT_S):
                async for chunk in body:
                    num_bytes += len(chunk)
                    if num_bytes > self._max_bytes:
                        return

    def _open(self) -> BinaryIO:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cast(BinaryIO, tempfile.TemporaryFile(dir=self._folder, buffering=0))  # mode 0600

    async def _read(self, body: AsyncIterator[bytes], form: _Form, file: BinaryIO) -> None:
        chunks = aiter(body)
        while True:
            try:
                async with asyncio.timeout(_SILENCE_TIMEOUT_S):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                break
            form.feed(chunk)
            if len(form.pending) >= _WRITE_BYTES:
                await _write(file, form.take())
        await _write(file, form.take())
        form.finish()


class _Form:
    """A form on its way: bytes in, fields and the bytes of the file out."""

    def __init__(self, boundary: bytes, max_bytes: int) -> None:
        self.fields: defaultdict[str, list[str]] = defaultdict(list)
        self.num_bytes = 0
        self.pending = bytearray()
        self._max_bytes = max_bytes
        self._num_files = 0
        self._num_fields = 0
        self._is_complete = False
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._field = ""
        self._value: bytearray | None = None  # None: the part is the file
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as exc:
            raise RequestRefused(f"the form cannot be read: {exc}") from exc

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form.

        Raises:
            RequestRefused: if it is none, or not one with one file.
            UploadTooLarge: if the file is larger than allowed.
        """
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise RequestRefused("the form cannot be read: it is no multipart/form-data") from exc

    def take(self) -> bytes:
        """Return the bytes of the file that were not yet taken."""
        data = bytes(self.pending)
        self.pending.clear()
        return data

    def finish(self) -> None:
        """Check that everything has come.

        Raises:
            RequestRefused: if it has not.
        """
        if not self._is_complete:
            raise RequestRefused("the form was cut short")
        if not self._num_files:
            raise RequestRefused("no file was sent: send the sound as the part `file`, with a file name", "file")
        if not self.num_bytes:
            raise RequestRefused("the file is empty", "file")

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = _text(options.get(b"name", b""))
        if b"filename" in options:
            if self._field != "file":
                raise RequestRefused("a file may only be sent as the part `file`", self._field[:80])
            self._num_files += 1
            if self._num_files > 1:
                raise RequestRefused("one file at a time", "file")
            self._value = None
            return
        self._num_fields += 1
        if self._num_fields > _MAX_FIELDS:
            raise RequestRefused(f"more than {_MAX_FIELDS} fields")
        self._value = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self.num_bytes += end - start
            if self.num_bytes > self._max_bytes:
                raise UploadTooLarge(
                    f"the file is larger than {self._max_bytes // 1_000_000} MB, the limit (service.max_upload_mb): "
                    "send it in parts, or compressed"
                )
            self.pending += data[start:end]
            return
        if len(self._value) + end - start > _MAX_FIELD_BYTES:
            raise RequestRefused(f"longer than {_MAX_FIELD_BYTES} bytes", self._field[:80])
        self._value += data[start:end]

    def _on_part_end(self) -> None:
        if self._value is not None:
            self.fields[self._field].append(_text(bytes(self._value)))

    def _on_end(self) -> None:
        self._is_complete = True


def _boundary_of(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestRefused("expected a form: Content-Type multipart/form-data with a boundary")
    return boundary


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise RequestRefused("the fields of the form are not UTF-8") from exc


async def _write(file: BinaryIO, data: bytes) -> None:
    def write_all() -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    if not data:
        return
    writing = asyncio.ensure_future(asyncio.to_thread(write_all))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        # The file is closed next: a thread must not write to a descriptor that may be another file's by then.
        await asyncio.wait({writing})
        raise
