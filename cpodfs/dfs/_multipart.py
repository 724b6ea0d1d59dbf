"""A multipart/form-data body for one file, streamed, with its exact length known beforehand.

Imports only errors. If the source fails, or yields more or fewer bytes than promised, the body
ends before its final boundary, so that the server cannot take the part for the whole.
"""

from __future__ import annotations

import secrets
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack

from cpodfs.errors import ChangedDuringUpload

Source = Callable[[], AsyncIterator[bytes]]


class MultipartFile:
    """``content_length`` and ``content_type`` are the request's headers; ``stream`` its body.

    ``failure`` is the exception that the source raised, kept so that the HTTP library's own
    handling of it cannot hide it; ``sent`` counts the file's bytes handed over so far, and
    ``complete`` is True once its last one was.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        filename: str,
        source: Source,
        size: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._boundary = secrets.token_hex(24)
        self._source = source
        self._size = size
        self._on_progress = on_progress
        self._head = b"".join(self._field(name, value) for name, value in fields.items())
        self._head += (
            f'--{self._boundary}\r\nContent-Disposition: form-data; name="files"; '
            f"{filename_parameter(filename)}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        self._tail = f"\r\n--{self._boundary}--\r\n".encode()
        self.failure: Exception | None = None
        self.complete = False
        self.sent = 0

    @property
    def content_type(self) -> str:
        return f"multipart/form-data; boundary={self._boundary}"

    @property
    def content_length(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        yield self._head
        try:
            async with AsyncExitStack() as stack:
                chunks = self._source()
                if isinstance(chunks, AsyncGenerator):
                    stack.push_async_callback(chunks.aclose)
                async for chunk in chunks:
                    self._take(chunk)
                    if chunk:
                        yield chunk
            if self.sent < self._size:
                raise ChangedDuringUpload(f"the file ended at {self.sent} of {self._size} bytes")
        except Exception as exc:
            self.failure = exc
            raise
        self.complete = True
        yield self._tail

    def _take(self, chunk: bytes) -> None:
        self.sent += len(chunk)
        if self.sent > self._size:
            raise ChangedDuringUpload(f"the file grew beyond {self._size} bytes")
        if self._on_progress is not None:
            self._on_progress(self.sent)

    def _field(self, name: str, value: str) -> bytes:
        head = f'--{self._boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        return head.encode() + value.encode() + b"\r\n"


def filename_parameter(filename: str) -> str:
    r"""The name as Go's mime/multipart reads it back: ``\` and ``"`` escaped by a backslash.

    RFC 7578 knows no form for control characters (there Go would refuse the whole request), so
    those names go in RFC 5987's form, which it does understand.
    """
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in filename):
        return f"filename*=UTF-8''{urllib.parse.quote(filename, safe='')}"
    escaped = filename.replace("\\", "\\\\").replace('"', '\\"')
    return f'filename="{escaped}"'
