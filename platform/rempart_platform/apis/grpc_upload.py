"""An upload over gRPC: one message about the file, its content, and one that says it is whole."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from google.protobuf.message import DecodeError

from rempart_platform.apis.pace import Pace, PacedClient
from rempart_platform.errors import invalid_request
from rempart_protos.v1 import batch_pb2


class Upload:
    """One call's messages, read at the pace that uploads must keep.

    Raises:
        RempartError: INVALID_REQUEST for messages out of order or that are none, REQUEST_TIMEOUT.
    """

    def __init__(self, messages: AsyncIterator[batch_pb2.UploadFileRequest], pace: Pace) -> None:
        self._messages = messages
        self._client = PacedClient(pace)
        self._is_waiting = False

    async def metadata(self) -> batch_pb2.FileMetadata:
        """Of the first message."""
        first = await self._next()
        if first is None or not first.HasField("metadata"):
            raise invalid_request("The first message must have the metadata.", "metadata")
        return first.metadata

    async def content(self) -> AsyncIterator[bytes]:
        """Of all that follow. A call that breaks off looks like one that has said all, but for its last message."""
        while (message := await self._next()) is not None:
            if message.HasField("end"):
                return
            if message.HasField("metadata"):
                raise invalid_request("Only the first message may have the metadata.", "metadata")
            yield message.content
        raise invalid_request("The upload broke off: no message said that the content is whole.", "end")

    async def discard(self, timeout_s: float) -> None:
        """Reads what is left, if it comes soon: some clients still sending would not see why they are refused."""
        if self._is_waiting:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for _ in self._messages:
                    pass

    async def _next(self) -> batch_pb2.UploadFileRequest | None:
        self._is_waiting = True
        try:
            message = await self._client.wait_for(anext(self._messages, None))
        except DecodeError:
            raise invalid_request("A message of the upload cannot be read.") from None
        self._is_waiting = False
        if message is not None:
            self._client.count(len(message.content))
        return message
