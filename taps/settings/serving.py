"""Settings of ``taps serve``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from taps.settings.declare import FromFile, setting


@dataclass(frozen=True)
class ServeSettings(FromFile):
    """Settings of ``taps serve``."""

    title: ClassVar[str] = "serve"
    description: ClassVar[str] = "Serve the tasks of a folder over HTTP."
    positional: ClassVar[tuple[str, ...]] = ("folder",)
    required: ClassVar[tuple[str, ...]] = ("folder",)
    missing: ClassVar[str] = "name a folder of tasks: taps serve results/demo"
    folder: str = setting("", "a folder of tasks such as results/demo, a task's folder, or hf-hub:user/repository")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 serves other machines too, for which --token is advised", metavar="ADDRESS")
    port: int = setting(8000, "port to listen on", int, low=0, high=65535, metavar="N")
    token: str | None = setting(None, "clients have to send this bearer token", metavar="TOKEN", shown="the variable TAPS_TOKEN, if it is set", repeats=False)
    base: str | None = setting(None, "weights of the base, if the tasks' files do not say where they are", metavar="FILE")
    keep: int = setting(64, "largest number of tasks that a replica holds in memory; others are loaded on first use", int, low=1, metavar="N")
    batch_size: int = setting(32, "most images that run in one batch", int, low=1, metavar="N")
    replicas: list[int] = setting([1], "copies of the model, or a minimum and a maximum, between which it scales with the load", int, low=1, nargs="+", metavar="N")
    threads: int | None = setting(None, "processor threads per replica", int, low=1, metavar="N", shown="those of the machine, divided by the replicas")
    address: str | None = setting(None, "HOST:PORT of a Ray cluster to run the replicas on, or auto", metavar="ADDRESS", shown="processes on this machine")
    device: str = setting("auto", "device to run on", choices=("auto", "cpu", "cuda", "mps"))
    max_request: float = setting(32.0, "largest request, in megabytes", float, low=0, above=True, metavar="MB")
    max_pixels: float = setting(50.0, "largest image, in megapixels", float, low=0, above=True, metavar="MP")
    max_queue: int = setting(256, "images that may be in progress or wait; further requests are answered with 503", int, low=1, metavar="N")
    timeout: float = setting(30.0, "seconds for receiving a request, and again for answering it", float, low=0, above=True, metavar="S")

    @property
    def least(self) -> int:
        """The smallest number of replicas."""
        return min(self.replicas)

    @property
    def most(self) -> int:
        """The largest number of replicas."""
        return max(self.replicas)

    @property
    def threads_each(self) -> int:
        """Processor threads per replica."""
        return self.threads or max((os.cpu_count() or 1) // self.most, 1)
