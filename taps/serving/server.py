"""The server: replicas of the model on Ray, and the HTTP interface in this process."""

from __future__ import annotations

import asyncio
import errno
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from taps.errors import UserError
from taps.memory import keep_freed_memory
from taps.runs import cluster
from taps.runs.setup import pick_device
from taps.serving.engine import Answer, Engine, Item
from taps.serving.folder import ServedFolder
from taps.settings.serving import ServeSettings
from taps.storage import hub

try:
    import uvicorn
    from ray import serve as ray_serve
    from ray.exceptions import RayActorError, RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    from taps.serving.app import Service, Unavailable, make_app
except ImportError as missing:
    raise UserError(f"taps serve needs {missing.name}: pip install 'taps-vision[serve]'") from None


class Replica:
    """A model in a process of its own, which Ray starts, and starts again if it dies."""

    def __init__(self, root: str, base: str | None, keep: int, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._engine = Engine(Path(root), base, keep, pick_device(device))
        self._pool = ThreadPoolExecutor(1)  # one batch after another, while the next one is received

    @ray_serve.multiplexed(max_num_models_per_replica=1000)
    async def _group(self, group: str) -> str:
        """Tell the router that this replica has a group's tasks in memory."""
        return group

    async def answer(self, items: Sequence[Item]) -> list[Answer]:
        await self._group(ray_serve.get_multiplexed_model_id())
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._engine.answer, items)

    async def cost(self, shape: tuple[int, ...], tasks: dict[str, str]) -> dict[str, int]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._engine.cost, shape, tasks)

    async def default_preprocessing(self) -> dict:
        return self._engine.model.default_preprocessing(224).describe()


def serve(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serve the tasks of a folder until Ctrl-C or SIGTERM.

    Raises:
        UserError: if there is no task, the port is taken, the cluster cannot be reached, or a replica cannot start.
    """
    if settings.folder.startswith(hub.PREFIX):
        settings = replace(settings, folder=str(hub.download(settings.folder)))
    root = Path(settings.folder).absolute()
    folder = ServedFolder(root)
    if not folder.tasks:
        reasons = list(folder.refused.values())
        raise UserError(reasons[0] if reasons else f"{root} holds no task (a folder with task.json)")
    is_remote = settings.base is not None and hub.is_address(settings.base)
    if settings.base is not None and not is_remote and settings.address is None and not Path(settings.base).is_file():
        raise UserError(f"--base {settings.base} does not exist")
    for reason in folder.refused.values():
        warnings.warn(f"skipping task: {reason}", stacklevel=2)
    listener = _listen(settings)
    with listener, _images_of_any_size():
        count = f"{settings.least} replica{'s' * (settings.least > 1)}"
        say(f"starting {count} for {root} on {settings.address or 'this machine'} …")
        with cluster.connected(settings.address, settings.most * settings.threads_each, "taps serve"):
            ray_serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "ERROR"})
            name = f"taps-{uuid.uuid4().hex[:8]}"  # a cluster may run several servers
            try:
                handle = _start_replicas(settings, root, name)
                _answer_requests(settings, folder, handle, name, listener, say)
            finally:
                with cluster.undisturbed():
                    ray_serve.delete(name) if settings.address else ray_serve.shutdown()


@contextmanager
def _images_of_any_size() -> Iterator[None]:
    """Lift Pillow's limit, since ``--max_pixels`` is checked before an image is decoded."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _listen(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens at the address."""
    try:
        kind, *_, where = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {settings.host}: {error.strerror}") from None
    listener = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another --port"
        ) from None
    return listener


def _start_replicas(settings: ServeSettings, root: Path, name: str):
    """Start the replicas, wait until they are ready, and return a handle to them."""
    device = pick_device(settings.device).type if settings.address is None else settings.device
    resources: dict[str, float] = {"num_cpus": settings.threads_each}
    if device == "cuda":
        gpus = torch.cuda.device_count() if settings.address is None else settings.most
        resources["num_gpus"] = cluster.share(gpus, settings.most)
    scale: dict = {"num_replicas": settings.least}
    if settings.most > settings.least:
        bounds = {"min_replicas": settings.least, "max_replicas": settings.most, "initial_replicas": settings.least}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": 1, "upscale_delay_s": 3}}
    deployment = ray_serve.deployment(
        Replica,
        ray_actor_options=resources,
        max_ongoing_requests=4,
        max_constructor_retry_count=1,
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=5,
        **scale,
    )
    bound = deployment.bind(str(root), settings.base, settings.keep, device, settings.threads_each)
    try:
        return ray_serve.run(bound, name=name, route_prefix=None, blocking=False)
    except RuntimeError as error:
        raise UserError(f"a replica does not start: {_reason(error, name)}") from None


def _reason(error: Exception, name: str) -> str:
    """Return the reason in an error, of which Ray says more in the state of the application."""
    text = str(error)
    try:
        application = ray_serve.status().applications[name]
        text = "\n".join([text, *(own.message for own in application.deployments.values())])
    except (KeyError, RuntimeError):
        pass
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line.partition("UserError:")[2].strip() for line in lines if "UserError:" in line]
    return (own or lines)[-1]


def _answer_requests(
    settings: ServeSettings, folder: ServedFolder, handle, name: str, listener: socket.socket, say
) -> None:
    """Run the HTTP interface until a signal ends it."""

    async def send(group: int, items: Sequence[Item]) -> Sequence[Answer]:
        own = handle.options(multiplexed_model_id=str(group))
        return await _tried(lambda: own.answer.remote(list(items)))

    async def cost(shape: tuple[int, ...], tasks: dict[str, str]) -> dict[str, int]:
        return await _tried(lambda: handle.cost.remote(shape, tasks))

    async def is_ready() -> bool:
        return await asyncio.get_running_loop().run_in_executor(None, _runs, name)

    async def main() -> None:
        default = await handle.default_preprocessing.remote()
        app = make_app(Service(settings, folder, default, send, cost), is_ready)
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=65536,
            timeout_graceful_shutdown=10,
            limit_concurrency=1000,
        )
        server = uvicorn.Server(config)
        host, port = listener.getsockname()[:2]
        tasks = len(folder.tasks)
        say(
            f"{tasks} task{'s' * (tasks != 1)} at http://{host}:{port}/ (requests to /v1/predict, their format at /docs); "
            "Ctrl-C stops"
        )
        await server.serve([listener])

    asyncio.run(main())


async def _tried(call: Callable):
    """Return the result of a call to a replica; if that dies, another one gets the call."""
    for last in (False, True):
        try:
            return await call()
        except RayTaskError:  # a mistake in this program
            raise
        except (RayError, RayServeException) as error:
            if last or not isinstance(error, RayActorError):
                raise Unavailable(f"no replica answers ({type(error).__name__})") from None
    return None


def _runs(name: str) -> bool:
    """Return whether a replica is ready."""
    application = ray_serve.status().applications.get(name)
    deployments = application.deployments.values() if application else ()
    return any(count for own in deployments for state, count in own.replica_states.items() if state == "RUNNING")
