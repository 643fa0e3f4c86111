"""Throughput of ``taps serve`` against a server that runs each request by itself on merged networks, measured in turn.

    python benchmarks/serving.py                  # forty tasks, 32 clients; about three minutes
    python benchmarks/serving.py --tuned 49       # every layer tuned, so that nothing is shared

Tasks have random deltas in the last ``--tuned`` of EfficientNet-Lite0's 49 layers. Both servers run at the same time and are loaded
in turn by a process of clients, each of which sends its next request when it has the answer to the last. Results are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Form, UploadFile
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import taps  # noqa: E402

SIDE = 96


def make_tasks(folder: Path, count: int, tuned: int) -> int:
    """Save tasks with random deltas; return the bytes of the base's weights."""
    model = taps.adapt(taps.create_backbone("tf_efficientnet_lite0"), "taps", norm="follow")
    first = len(model.units) - tuned
    prepare = model.default_preprocessing(SIDE).describe()
    for number in range(count):
        torch.manual_seed(number)
        name = f"task{number}"
        model.add_task(name, num_classes=10)
        for index, unit in enumerate(model.units):
            unit.gates[name].set(index >= first)
            for parameter in unit.deltas[name].parameters():
                parameter.data.normal_(std=0.02 * float(unit.base.weight.std()))
        model.save_task(name, folder / name, {"classes": [str(label) for label in range(10)], "preprocessing": prepare})
        model.remove_task(name)
    return sum(p.numel() * p.element_size() for p in model.backbone.parameters())


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def rival(folder: Path, port: int) -> None:
    """Serve every task's merged network, each request by itself."""
    model = taps.load(folder, keep=10**6)
    transform = model.transform(model.tasks[0])
    nets = {name: model.merge(name) for name in model.tasks}
    classes = {name: model.classes(name) for name in nets}
    del model
    images, network = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
    app = FastAPI()

    @torch.inference_mode()
    def run(x: torch.Tensor, name: str) -> list:
        values, labels = nets[name](x).softmax(1)[0].topk(5)
        return [
            {"class": classes[name][label], "probability": value}
            for label, value in zip(labels, values.tolist(), strict=True)
        ]

    @app.post("/v1/predict")
    async def predict(image: UploadFile, tasks: str = Form()) -> dict:
        data, loop = await image.read(), asyncio.get_running_loop()
        x = await loop.run_in_executor(images, lambda: transform(Image.open(io.BytesIO(data)).convert("RGB"))[None])
        return {name: await loop.run_in_executor(network, run, x, name) for name in tasks.split(",")}

    uvicorn.run(app, port=port, log_level="warning")


def request(port: int, names: list[str], data: bytes) -> bytes:
    """Return the bytes of a request."""
    mark = "boundary"
    parts = [f'--{mark}\r\nContent-Disposition: form-data; name="tasks"\r\n\r\n{",".join(names)}\r\n'.encode()]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    body = b"".join([*parts, head.encode(), data, f"\r\n--{mark}--\r\n".encode()])
    lines = [
        "POST /v1/predict HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Type: multipart/form-data; boundary={mark}",
        f"Content-Length: {len(body)}", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + body


async def client(port: int, requests: list[bytes], seed: int, ended: float, seconds: list[float]) -> None:
    """Send requests one after another until the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    rng = random.Random(seed)
    while time.perf_counter() < ended:
        start = time.perf_counter()
        writer.write(rng.choice(requests))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise RuntimeError(head.decode())
        seconds.append(time.perf_counter() - start)
    writer.close()


def load(port: int, clients: int, seconds: float, names: list[list[str]]) -> None:
    """Load a server and print the time of each request as JSON."""
    requests, taken = [request(port, own, picture()) for own in names], []

    async def main() -> None:
        ended = time.perf_counter() + seconds
        await asyncio.gather(*(client(port, requests, seed, ended, taken) for seed in range(clients)))

    asyncio.run(main())
    print(json.dumps(taken))


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def wait_until_up(port: int) -> None:
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/docs", timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)


def resident(process: int) -> float:
    """Return the memory of a process and those below it in MB."""
    own = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    below = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(own.split()[1]) / 1e3 + sum(resident(int(child)) for child in below)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--tuned", type=int, default=12, help="layers that each task has tuned, counted from the last")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="processor threads of each server's networks")
    parser.add_argument("--rival", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.rival:
        return rival(Path(given.rival[0]), int(given.rival[1]))
    if given.load:
        names = [[f"task{number}"] for number in range(given.tasks)]
        every = [[name for own in names for name in own]]
        return load(int(given.load[0]), given.clients, given.seconds, every if given.load[1] == "every" else names)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_tasks(folder, given.tasks, given.tuned)
        ports = {"taps": free_port(), "merged": free_port()}
        own = [sys.executable, str(Path(__file__).resolve())]
        same = ["--threads", str(given.threads), "--tasks", str(given.tasks), "--seconds", str(given.seconds)]
        lines = {
            "taps": [sys.executable, "-m", "taps", "serve", name, "--port", str(ports["taps"]), *same[:2]],
            "merged": [*own, "--rival", name, str(ports["merged"]), *same],
        }
        processes = {kind: subprocess.Popen(line, cwd=ROOT) for kind, line in lines.items()}
        try:
            for port in ports.values():
                wait_until_up(port)
            for kind, clients in (("one", given.clients), ("every", 2)):
                _compare(kind, clients, given, ports, own, same)
            held = {kind: resident(process.pid) for kind, process in processes.items()}
            print(
                f"memory of all processes: taps {held['taps']:,.0f} MB, of which Ray's own; merged {held['merged']:,.0f} MB"
            )
            print(f"weights: merged {given.tasks * base / 1e6:,.0f} MB, one network {base / 1e6:.0f} MB")
        finally:
            for process in processes.values():
                process.terminate()
                process.wait()
    return None


def _compare(kind: str, clients: int, given, ports: dict[str, int], own: list[str], same: list[str]) -> None:
    """Load both servers in turn, and print their rates and times."""
    rates: dict[str, list[float]] = {name: [] for name in ports}
    times: dict[str, list[float]] = {name: [] for name in ports}
    for turn in range(given.rounds + 1):  # the first one warms up
        for name, port in ports.items():
            line = [*own, "--load", str(port), kind, "--clients", str(clients), *same]
            taken = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
            if turn:
                rates[name].append(len(taken) / given.seconds)
                times[name] += taken
    title = "one random task" if kind == "one" else f"all {given.tasks} tasks"
    for name, own_times in times.items():
        cut = np.percentile(own_times, [50, 95, 99]) * 1e3
        shown = ", ".join(f"p{share} {value:,.0f} ms" for share, value in zip((50, 95, 99), cut, strict=True))
        print(
            f"{title}, {clients} clients, {name}: {statistics.median(rates[name]):.1f} requests a second, {shown}",
            flush=True,
        )
    ratio = statistics.median(a / b for a, b in zip(rates["taps"], rates["merged"], strict=True))
    print(f"{title}: {ratio:.2f} times the requests a second", flush=True)


if __name__ == "__main__":
    main()
