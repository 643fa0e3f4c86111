"""The HTTP interface: predictions, the list of tasks, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from taps.core.accounting import is_tuned
from taps.data.classification.images import LargeImageError, UnreadableImageError, decode_image
from taps.errors import UserError
from taps.networks.preprocessing import stored_transform
from taps.serving.batches import Batches, Busy
from taps.serving.engine import CHANGED, Answer, Item
from taps.serving.folder import ServedFolder, StoredTask
from taps.serving.requests import Uploads, Wanted, refusal
from taps.settings.serving import ServeSettings
from taps.storage import run_folder
from taps.version import VERSION

#: how often an image is prepared again because its task's files changed on the way
_TRIES = 10


#: shape of an image, and the tasks that it runs through the network for, with their versions
Pass = tuple[tuple[int, ...], dict[str, str]]
#: formats of Pillow that are read; others, such as PostScript, would start programs
_FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "HEIF",
)  # fmt: skip


def _formats() -> list[str]:
    """Return those of the formats that this Pillow reads."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


async def _all(waiting: Sequence[Coroutine]) -> list:
    """Wait for all results; if one fails, the others are given up too."""
    tasks = [asyncio.ensure_future(own) for own in waiting]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Unavailable(Exception):  # noqa: N818 (not an error)
    """No replica answered."""


class Service:
    """What the HTTP interface offers.

    Args:
        settings: settings of the command.
        folder: the tasks.
        default: preprocessing of tasks that do not say how their images were prepared.
        send: sends a batch to a replica, as in :class:`Batches`.
        cost: returns the MACs of tasks on one image of a shape.
    """

    def __init__(
        self,
        settings: ServeSettings,
        folder: ServedFolder,
        default: dict,
        send: Callable[[int, Sequence[Item]], Awaitable[Sequence[Answer]]],
        cost: Callable[[tuple[int, ...], dict[str, str]], Awaitable[dict[str, int]]],
    ) -> None:
        self.settings, self.folder, self._default, self._cost = settings, folder, default, cost
        self.uploads = Uploads(int(settings.max_request * 1e6), settings.timeout)
        self.measured = Measured()
        self._send = send
        self.batches = Batches(self._counted_send, settings.most, settings.batch_size, settings.max_queue)
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="images")
        self._transforms: dict[str, Callable] = {}
        self._older: dict[tuple[Path, str], dict] = {}  # preprocessing of tasks that do not say it themselves

    async def _counted_send(self, group: int, items: Sequence[Item]) -> Sequence[Answer]:
        self.measured.batch.observe(len(items))
        return await self._send(group, items)

    async def predict(self, request: Request) -> dict[str, Any]:
        """Answer a request for predictions."""
        start = time.perf_counter()
        async with self.uploads.receive(request) as wanted:
            received = time.perf_counter()
            tasks = self._find(wanted.tasks)
            if len(wanted.images) > self.batches.most:
                raise refusal(
                    413, f"{len(wanted.images)} images are more than the {self.batches.most} that may wait at a time"
                )
            try:
                with self.batches.admit(len(wanted.images)):
                    images, macs = await asyncio.wait_for(self._answer(wanted, tasks), self.settings.timeout)
            except asyncio.TimeoutError:
                reason = f"no answer within {self.settings.timeout:g} seconds"
                raise refusal(503, reason, **{"Retry-After": "1"}) from None
        answer: dict[str, Any] = {"images": [entry for entry, _ in images]}
        if macs is not None:
            answer["macs"] = macs
        now = time.perf_counter()
        answer["seconds"] = {"receiving": round(received - start, 6), "answering": round(now - received, 6)}
        self.measured.images.inc(len(images))
        return answer

    async def _answer(
        self, wanted: Wanted, tasks: dict[str, StoredTask]
    ) -> tuple[list[tuple[dict[str, Any], list[Pass]]], dict[str, int] | None]:
        """Return each image's entry and passes, and the MACs of an image if the request wants them."""
        images = await _all([self._classify(number, wanted, tasks) for number in range(len(wanted.images))])
        return images, await self._cost_of(images[0][1]) if wanted.cost else None

    async def _cost_of(self, passes: Sequence[Pass]) -> dict[str, int]:
        """Return the MACs of an image: the sum over its passes, which tasks share that prepare images alike."""
        total: dict[str, int] = {}
        for shape, tasks in passes:
            for key, own in (await self._cost(shape, tasks)).items():
                total[key] = total.get(key, 0) + own
        return total

    def _find(self, names: list[str] | None) -> dict[str, StoredTask]:
        """Return the tasks as they are now."""
        if names is None:
            self.folder.refresh()
            if not self.folder.tasks:
                raise refusal(404, "there is no task")
            return dict(self.folder.tasks)
        found = {}
        for name in names:
            try:
                found[name] = self.folder.get(name)
            except UserError as error:
                damaged = any(folder.name == name for folder in self.folder.refused)
                raise refusal(503 if damaged else 404, str(error)) from None
        return found

    async def _classify(
        self, number: int, wanted: Wanted, tasks: dict[str, StoredTask]
    ) -> tuple[dict[str, Any], list[Pass]]:
        """Return the entry of one image, and its passes."""
        name, data = wanted.images[number]
        left, passes = dict(tasks), []
        entries: dict[str, dict] = {}
        refused: dict[str, str] = {}
        for _ in range(_TRIES):
            prepared = await self._prepared(number, name, data, left)
            items = [Item(image, {task: left[task].version for task in own}, wanted.top) for image, own in prepared]
            for item, answer in zip(items, await _all([self.batches.answer(item) for item in items]), strict=True):
                passes.append((item.image.shape, item.tasks))
                for task, classes in answer.items():
                    if classes == CHANGED:
                        continue
                    version = left.pop(task).version
                    if not isinstance(classes, str):
                        ranked = [{"class": own, "probability": value} for own, value in classes]
                        entries[task] = {"version": version, "classes": ranked}
                    elif wanted.tasks is None:  # the others go on
                        refused[task] = classes
                    else:
                        raise refusal(503, f"task {task!r} cannot be used: {classes}")
            if left:
                now = self._find(None if wanted.tasks is None else list(left))
                left = {task: now[task] for task in left if task in now}  # of all tasks, some may have been removed
            if not left:
                entry = {"image": name, "tasks": {task: entries[task] for task in tasks if task in entries}}
                return {**entry, "refused": refused} if refused else entry, passes
        raise refusal(503, f"task {next(iter(left))!r} was replaced at every attempt to run it", **{"Retry-After": "1"})

    async def _prepared(
        self, number: int, name: str, data: bytes, tasks: dict[str, StoredTask]
    ) -> list[tuple[np.ndarray, list[str]]]:
        """Return the image as tasks want it, with the names of those that want it so."""
        groups: dict[str, list[str]] = {}
        for task, stored in tasks.items():
            groups.setdefault(json.dumps(self._preparation(stored), sort_keys=True), []).append(task)
        transforms = [self._transform(key) for key in groups]

        def prepare() -> list[np.ndarray]:
            return decode_image(
                io.BytesIO(data),
                lambda image: [transform(image).numpy() for transform in transforms],
                1e6 * self.settings.max_pixels,
                _formats(),
            )

        try:
            images = await asyncio.get_running_loop().run_in_executor(self.pool, prepare)
        except UnreadableImageError as error:
            status = 413 if isinstance(error, LargeImageError) else 400
            raise refusal(status, f"image {number + 1} ({name}) cannot be read ({error})") from None
        return list(zip(images, groups.values(), strict=True))

    def _preparation(self, task: StoredTask) -> dict:
        stored = task.description.get("preprocessing")
        if stored:
            return stored
        if (task.folder, task.version) not in self._older:
            older = run_folder.older_preprocessing(self._default, task.folder, task.name)
            self._older[task.folder, task.version] = older or self._default
        return self._older[task.folder, task.version]

    def _transform(self, key: str) -> Callable:
        if key not in self._transforms:
            try:
                self._transforms[key] = stored_transform(json.loads(key))
            except UserError as error:
                raise refusal(503, str(error)) from None
        return self._transforms[key]

    def describe(self) -> dict[str, Any]:
        """Return what each task is."""
        self.folder.refresh()
        tasks = [
            {
                "name": task.name,
                "version": task.version,
                "classes": task.description.get("classes"),
                "accuracy": task.description.get("accuracy"),
                "metric": task.description.get("metric", "accuracy"),
                "bytes": task.description["bytes"],
                "method": task.description["method"],
                "base": {key: task.description["base"].get(key) for key in ("name", "fingerprint", "parameters")},
                "tuned_layers": [unit["name"] for unit in task.description["units"] if is_tuned(unit)],
                "layers": len(task.description["units"]),
                "layer_is_tuned": "".join("01"[is_tuned(unit)] for unit in task.description["units"]),
            }
            for task in self.folder.tasks.values()
        ]
        refused = [{"folder": path.name, "reason": reason} for path, reason in self.folder.refused.items()]
        return {"tasks": tasks, "refused": refused}


class Measured:
    """Prometheus metrics of the service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more = {"registry": self.registry, "namespace": "taps"}
        buckets = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.requests = Counter("requests", "requests by path and status", ["path", "status"], **more)
        self.seconds = Histogram("request_seconds", "time to answer a request for predictions", buckets=buckets, **more)
        self.images = Counter("images", "images that were answered", **more)
        self.batch = Histogram("batch_images", "images per batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **more)
        self.waiting = Gauge("images_in_progress", "images that are being answered or wait", **more)
        self.tasks = Gauge("tasks", "tasks that are served", **more)

    def text(self) -> bytes:
        return generate_latest(self.registry)


_IMAGE = {"type": "string", "description": "the file's bytes in base64"}
_TASK = {"type": "string", "description": "a task's name; all if left out"}
_OPTIONS = {
    "top": {
        "type": "integer",
        "minimum": 1,
        "maximum": 1000,
        "default": 5,
        "description": "classes per task; 5 if left out",
    },
    "cost": {"type": "boolean", "default": False, "description": "also return the MACs"},
}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
                    "tasks": {"type": "string", "description": "names, separated by commas; all if left out"},
                    **_OPTIONS,
                },
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "additionalProperties": False,
                "properties": {
                    "images": {"type": "array", "items": _IMAGE, "minItems": 1, "maxItems": 256},
                    "tasks": {"type": "array", "items": _TASK, "minItems": 1},
                    **_OPTIONS,
                },
            }
        },
    },
}
_REASONS = {
    400: "an image or the body cannot be read",
    401: "the bearer token is missing or wrong",
    404: "there is no such task",
    408: "the request arrived too slowly",
    413: "the request or an image is too large",
    415: "the content type is another one",
    503: "too much is waiting, a task's files are damaged, or no replica answers",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": reason,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["detail"], "properties": {"detail": {"type": "string"}}}
            }
        },
    }
    for status, reason in _REASONS.items()
}


def _answers(description: str) -> dict[int | str, dict[str, Any]]:
    """The responses of a call that needs the token."""
    return {200: {"description": description}, 401: _RESPONSES[401]}


def make_app(service: Service, is_ready: Callable[[], Awaitable[bool]]) -> FastAPI:
    """Return the application."""
    # The documentation pages of FastAPI load scripts from elsewhere, which a closed network does not have.
    about = "Predictions of many tasks that share one network."
    app = FastAPI(title="TAPS", version=VERSION, description=about, docs_url=None, redoc_url=None)
    token = service.settings.token

    async def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        # Headers come as Latin-1, whatever they were written in.
        if token is not None and not hmac.compare_digest(given.encode("latin-1"), f"Bearer {token}".encode()):
            raise refusal(401, "send the header Authorization: Bearer TOKEN", **{"WWW-Authenticate": "Bearer"})

    @contextmanager
    def busy_is_503() -> Iterator[None]:
        try:
            yield
        except Busy as error:
            raise refusal(503, str(error), **{"Retry-After": "1"}) from None
        except Unavailable as error:
            raise refusal(503, str(error), **{"Retry-After": "2"}) from None

    @app.middleware("http")
    async def count(request: Request, call_next):
        start, status = time.perf_counter(), 500
        try:
            response = await call_next(request)
            status = response.status_code
        finally:
            path = getattr(request.scope.get("route"), "path", "other")
            service.measured.requests.labels(path, str(status)).inc()
            if path == "/v1/predict":
                service.measured.seconds.observe(time.perf_counter() - start)
        return response

    @app.post(
        "/v1/predict",
        summary="Classify images with some tasks or all",
        openapi_extra={"requestBody": _BODY},
        responses={200: {"description": "for each image and task the most probable classes"}, **_RESPONSES},
        dependencies=[Depends(allowed)],
    )
    async def predict(request: Request) -> JSONResponse:
        with busy_is_503():
            return JSONResponse(await service.predict(request))

    @app.get("/v1/tasks", summary="The tasks that are served", responses=_answers("their classes, sizes and layers"))
    async def tasks(_: None = Depends(allowed)) -> JSONResponse:
        return JSONResponse(service.describe())

    @app.get(
        "/healthz",
        summary="Whether the server runs",
        response_class=PlainTextResponse,
        responses={200: {"description": "it does"}},
    )
    async def healthz() -> str:
        return "ok"

    @app.get(
        "/readyz",
        summary="Whether a replica is ready to answer",
        response_class=PlainTextResponse,
        responses={200: {"description": "it is"}, 503: {"description": "not yet"}},
    )
    async def readyz() -> PlainTextResponse:
        ready = await is_ready()
        return PlainTextResponse("ready" if ready else "no replica is ready", 200 if ready else 503)

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
        responses=_answers("numbers as text"),
    )
    async def metrics(_: None = Depends(allowed)) -> PlainTextResponse:
        service.measured.waiting.set(service.batches.admitted)
        service.measured.tasks.set(len(service.folder.tasks))
        return PlainTextResponse(service.measured.text(), media_type="text/plain; version=0.0.4")

    page, docs = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.html", "docs.html"))

    @app.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/docs", include_in_schema=False)
    async def document() -> HTMLResponse:
        return HTMLResponse(docs)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    return app
