"""Bodies of requests: receiving them within limits, and what they ask for."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

#: the most images, and the most classes for each, that one request may ask for
MOST_IMAGES, MOST_CLASSES = 256, 1000
#: requests of the largest size that may be received at the same time
_AT_ONCE = 8


@dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    Attributes:
        images: names and contents of the images.
        tasks: names of the tasks; ``None`` for all.
        top: number of classes.
        cost: whether to report the MACs.
    """

    images: list[tuple[str, bytes]]
    tasks: list[str] | None
    top: int
    cost: bool


def refusal(status: int, detail: str, **headers: str) -> HTTPException:
    """Return the exception that answers a request with a status and a reason."""
    return HTTPException(status, detail, headers or None)


class Uploads:
    """Receives the bodies of requests: each within a size and a time, and all together within eight times that size.

    Args:
        largest: size of a body, in bytes.
        seconds: time for receiving it.
    """

    def __init__(self, largest: int, seconds: float) -> None:
        self._largest, self._seconds = largest, seconds
        self._held = 0  # bytes

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Wanted]:
        """Yield what a request asks for; its body counts as being received until the end of the ``with`` block.

        Raises:
            HTTPException: 400 for a body that cannot be understood, 408 for one that comes too slowly, 413 for a large one, 415 for
                one of another type, 503 if too much is being received.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in ("multipart/form-data", "application/json"):
            raise refusal(415, f"content type {kind or 'none'}: send multipart/form-data or application/json")
        body = bytearray()
        try:
            try:
                await asyncio.wait_for(self._fill(body, request), self._seconds)
            except ClientDisconnect:
                raise refusal(400, "the request was broken off") from None
            except asyncio.TimeoutError:
                raise refusal(408, f"the request did not arrive within {self._seconds:g} seconds") from None
            yield await (_read_form(request, bytes(body)) if kind == "multipart/form-data" else _read_json(bytes(body)))
        finally:
            self._held -= len(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and announced.isascii() and int(announced) > self._largest:
            raise self._too_large()
        async for chunk in request.stream():
            if len(body) + len(chunk) > self._largest:
                raise self._too_large()
            if self._held + len(chunk) > _AT_ONCE * self._largest:
                raise refusal(503, "too many requests are being received", **{"Retry-After": "1"})
            body += chunk
            self._held += len(chunk)

    def _too_large(self) -> HTTPException:
        return refusal(413, f"the request is larger than {self._largest / 1e6:g} MB")


async def _read_form(request: Request, body: bytes) -> Wanted:
    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    images: list[tuple[str, bytes]] = []
    tasks: list[str] = []
    numbers = {"top": "5", "cost": "false"}
    try:
        async with Request(request.scope, receive).form(max_files=MOST_IMAGES + 1, max_fields=MOST_IMAGES) as form:
            for key, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if key != "image":
                        raise refusal(400, f"unknown file field {key!r}; images are fields named image")
                    name = value.filename or f"image {len(images) + 1}"
                    _check_name(len(images) + 1, name)
                    images.append((name, await value.read()))
                elif key == "tasks":
                    tasks.extend(name.strip() for name in value.split(",") if name.strip())
                elif key in numbers:
                    numbers[key] = value.strip()
                else:
                    raise refusal(400, f"unknown field {key!r}; there are image, tasks, top and cost")
    except (ValueError, KeyError, UnicodeError) as error:
        raise refusal(400, f"the form cannot be read ({error})") from None
    top: object = int(numbers["top"]) if re.fullmatch("[0-9]{1,9}", numbers["top"]) else numbers["top"]
    cost = {"true": True, "false": False}.get(numbers["cost"].lower(), numbers["cost"])
    return _checked(images, tasks or None, top, cost)


async def _read_json(body: bytes) -> Wanted:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise refusal(400, f"the body is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise refusal(400, 'the body has to be an object with a list "images"')
    unknown = [key for key in content if key not in ("images", "tasks", "top", "cost")]
    if unknown:
        raise refusal(400, f"unknown entry {unknown[0]!r}; there are images, tasks, top and cost")
    images = []
    for number, entry in enumerate(content["images"], start=1):
        name, data = f"image {number}", entry
        if isinstance(entry, dict):
            name, data = entry.get("name", name), entry.get("data")
        if not isinstance(data, str) or not isinstance(name, str):
            raise refusal(400, f"image {number} has to be a base64 text, or an object with name and data")
        _check_name(number, name)
        try:
            images.append((name, base64.b64decode(data.partition("base64,")[2] or data, validate=True)))
        except (binascii.Error, ValueError):
            raise refusal(400, f"image {number} ({name}) is not base64") from None
    tasks = content.get("tasks")
    if tasks == "all":
        tasks = None
    if tasks is not None and not (isinstance(tasks, list) and all(isinstance(name, str) for name in tasks)):
        raise refusal(400, "tasks has to be a list of names, or left out for all")
    return _checked(images, tasks, content.get("top", 5), content.get("cost", False))


def _check_name(number: int, name: str) -> None:
    """Refuse control characters, and halves of characters, which JSON cannot hold."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise refusal(400, f"the name of image {number} holds characters that cannot be printed")


def _checked(images: list[tuple[str, bytes]], tasks: list[str] | None, top: object, cost: object) -> Wanted:
    if not images:
        raise refusal(400, "the request holds no image")
    if len(images) > MOST_IMAGES:
        raise refusal(400, f"the request holds {len(images)} images; at most {MOST_IMAGES} are allowed")
    if tasks is not None and not tasks:
        raise refusal(400, "tasks is empty; leave it out for all tasks")
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= MOST_CLASSES:
        raise refusal(400, f"top has to be a whole number from 1 to {MOST_CLASSES}")
    if not isinstance(cost, bool):
        raise refusal(400, "cost has to be true or false")
    return Wanted(images, None if tasks is None else list(dict.fromkeys(tasks)), top, cost)
