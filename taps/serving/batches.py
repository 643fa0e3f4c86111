"""Collection of items into batches while earlier batches are being answered, and limits on what may wait."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from taps.serving.engine import Answer, Item


class Busy(Exception):  # noqa: N818 (not an error)
    """Too much is waiting; the message says so."""


class Batches:
    """The items that wait for an answer, in groups that each go to one replica, so that it has their tasks in memory.

    An item goes out at once if no batch of its group is on its way. While one is, items wait until they are as many, or until it is
    answered. What waits and what is on its way are divided evenly, so that the replica always has a batch to go on with, and
    none is small. A full batch does not wait if no batch of another group is on its way: that group's replica answers it.

    Args:
        send: sends a batch and returns its answers; its first argument is the group.
        groups: number of groups; a task belongs to one of them.
        size: most items in a batch.
        most: most images that may be admitted at a time.

    Attributes:
        admitted: number of images that have been admitted and not been answered.
    """

    #: two, so that a batch is sent while the one before it is computed
    AT_ONCE = 2

    def __init__(
        self, send: Callable[[int, Sequence[Item]], Awaitable[Sequence[Answer]]], groups: int, size: int, most: int
    ) -> None:
        self._send, self._size, self.most = send, size, most
        self.admitted = 0
        self._waiting: list[deque[tuple[Item, asyncio.Future]]] = [deque() for _ in range(groups)]
        self._sent: list[list[int]] = [[] for _ in range(groups)]  # sizes of the batches on their way
        self._tasks: set[asyncio.Task] = set()

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Let images be answered inside the ``with`` block.

        Raises:
            Busy: if there are too many already.
        """
        if self.admitted + images > self.most:
            raise Busy(f"{self.admitted} images are waiting already, and at most {self.most} may")
        self.admitted += images
        try:
            yield
        finally:
            self.admitted -= images

    async def answer(self, item: Item) -> Answer:
        """Wait for the answer to an item."""
        group = zlib.crc32(",".join(item.tasks).encode()) % len(self._waiting)
        future = asyncio.get_running_loop().create_future()
        self._waiting[group].append((item, future))
        self._send_waiting(group)
        return await future

    def _send_waiting(self, group: int) -> None:
        """Send those of a group's items that may go out now."""
        waiting = self._waiting[group]
        while waiting and (lane := self._free_lane(group)) is not None:
            half = (len(waiting) + sum(self._sent[lane]) + 1) // 2
            most = min(half, self._size) if lane == group else self._size
            batch = []
            while waiting and len(batch) < most:
                item, future = waiting.popleft()
                if not future.done():  # its client may have given up
                    batch.append((item, future))
            if batch:
                self._sent[lane].append(len(batch))
                task = asyncio.create_task(self._answer_all(lane, batch))
                self._tasks.add(task)  # or it might be collected as garbage
                task.add_done_callback(self._tasks.discard)

    def _free_lane(self, group: int) -> int | None:
        """Return the group whose replica should get items of ``group`` now: itself, or an idle one."""
        waiting, sent = len(self._waiting[group]), self._sent[group]
        if len(sent) < self.AT_ONCE and waiting >= min(sum(sent), self._size):
            return group
        if waiting < self._size:
            return None
        return next((own for own, busy in enumerate(self._sent) if not busy), None)

    async def _answer_all(self, lane: int, batch: Sequence[tuple[Item, asyncio.Future]]) -> None:
        try:
            answers = await self._send(lane, [item for item, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        finally:
            self._sent[lane].remove(len(batch))
            for group in range(len(self._sent)):
                self._send_waiting(group)
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
