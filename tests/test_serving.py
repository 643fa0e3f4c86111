"""Serving: an answer over HTTP is the model's own, whatever it is batched with and whatever happens to the folder meanwhile."""

import asyncio
import base64
import copy
import io
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import taps
from taps.errors import UserError
from taps.serving.app import Service, Unavailable, make_app
from taps.serving.batches import Batches, Busy
from taps.serving.engine import CHANGED, Engine, Item
from taps.serving.folder import ServedFolder
from taps.settings.serving import ServeSettings

NAMES = ("ink", "oil", "pen", "wax")
PREPARE = {
    "input_size": 32,
    "resize": 36,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "crop": "center",
}


def save_tasks(root: Path, names=NAMES, seed: int = 0, **about) -> None:
    """Tasks of a small ResNet with random deltas in its later layers; ``oil`` prepares its images in another way."""
    torch.manual_seed(0)
    model = taps.adapt(taps.create_backbone("test_resnet", pretrained=False), norm="follow")
    for number, name in enumerate(names):
        torch.manual_seed(100 * seed + number)
        model.add_task(name, num_classes=3 + number)
        for index, unit in enumerate(model.units):
            unit.gates[name].set(index >= 2 + number)
        for parameter in model.roles(name)["delta"].values():
            parameter.data.normal_(std=0.1)
        prepare = {**PREPARE, "resize": 32} if name == "oil" else PREPARE
        classes = [f"{name} {label}" for label in range(3 + number)]
        model.save_task(name, root / name, {"classes": classes, "preprocessing": prepare, **about})
        base = model.base_state()
    from taps.storage.files import write_tensors

    if not (root / "base.safetensors").exists():
        write_tensors(root / "base.safetensors", base)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    save_tasks(root)
    return root


@pytest.fixture
def root(shelf, tmp_path) -> Path:
    return Path(shutil.copytree(shelf, tmp_path / "tasks"))


def picture(seed: int = 0, size: tuple[int, int] = (40, 44), form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def plain(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def expected(root: Path, data: bytes) -> dict[str, dict[str, float]]:
    """What every task's merged network says about a picture."""
    model = taps.load(root)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    found = {}
    with torch.no_grad():
        for task in model.tasks:
            values = model.merge(task)(model.transform(task)(image)[None]).softmax(1)[0]
            found[task] = dict(zip(model.classes(task), values.tolist(), strict=True))
    return found


def check(entry: dict, wanted: dict[str, dict[str, float]]) -> None:
    for task, own in entry["tasks"].items():
        given = {one["class"]: one["probability"] for one in own["classes"]}
        best = sorted(wanted[task].values(), reverse=True)[: len(given)]
        assert list(given.values()) == pytest.approx(best, abs=1e-6)
        for name, value in given.items():
            assert value == pytest.approx(wanted[task][name], abs=1e-6)


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [64, 2])
def test_a_batch_of_anything_answers_as_each_task_does_alone(root, keep):
    engine = Engine(root, keep=keep)
    model = taps.load(root)
    versions = {name: task.version for name, task in engine.folder.tasks.items()}
    x = torch.randn(9, 3, 32, 32)
    asked = [
        ["ink"],
        ["oil"],
        ["ink"],
        list(NAMES),
        ["pen", "wax"],
        list(NAMES),
        ["wax"],
        ["pen", "wax"],
        ["ink", "oil"],
    ]
    items = [
        Item(image.numpy(), {name: versions[name] for name in names}, 2) for image, names in zip(x, asked, strict=True)
    ]
    for image, names, answer in zip(x, asked, engine.answer(items), strict=True):
        assert list(answer) == names
        for name, classes in answer.items():
            with torch.no_grad():
                values, labels = model(image[None], task=name).softmax(1)[0].topk(2)
            assert [label for label, _ in classes] == [model.classes(name)[label] for label in labels]
            assert [value for _, value in classes] == pytest.approx(values.tolist(), abs=1e-6)
    assert len(engine.model.heads) <= keep


def test_all_tasks_of_an_image_cost_what_one_shared_pass_costs(root):
    engine = Engine(root)
    versions = {name: task.version for name, task in engine.folder.tasks.items()}
    engine.answer([Item(np.zeros((3, 32, 32), np.float32), versions, 1)])
    cost = engine.cost((3, 32, 32), versions)
    assert cost == taps.load(root).predict_cost(torch.zeros(1, 3, 32, 32), NAMES)
    assert cost["macs"] < cost["macs_separate"]


def test_a_task_whose_files_changed_is_not_answered_for_the_earlier_version(root):
    engine = Engine(root)
    image = np.zeros((3, 32, 32), np.float32)
    old = engine.folder.tasks["ink"].version

    def ask(version):
        return engine.answer([Item(image, {"ink": version}, 1), Item(image, {"oil": oil}, 1)])

    oil = engine.folder.tasks["oil"].version
    before = ask(old)
    save_tasks(root, ("ink",), seed=1)
    after = ask(old)
    assert after[0]["ink"] == CHANGED
    assert after[1] == before[1]
    new = ServedFolder(root).get("ink").version
    assert new != old
    assert ask(new)[0]["ink"] != before[0]["ink"]
    shutil.rmtree(root / "ink")
    assert ask(new)[0]["ink"] == CHANGED


def test_a_damaged_task_is_refused_until_its_file_is_whole_while_others_go_on(root):
    engine = Engine(root)
    image = np.zeros((3, 32, 32), np.float32)
    path = root / "ink" / "task.safetensors"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    versions = {name: task.version for name, task in ServedFolder(root).tasks.items()}
    items = [Item(image, {name: versions[name]}, 1) for name in ("ink", "oil")] + [Item(image, versions, 1)]
    for _ in range(2):
        answers = engine.answer(items)
        assert "damaged" in answers[0]["ink"]
        assert "damaged" in answers[2]["ink"]
        assert isinstance(answers[1]["oil"], tuple)
        assert answers[1]["oil"] == answers[2]["oil"]
    path.write_bytes(whole)
    assert isinstance(engine.answer(items)[0]["ink"], tuple)


def test_a_task_that_cannot_run_does_not_take_the_others_with_it(root):
    engine = Engine(root)
    versions = {name: task.version for name, task in engine.folder.tasks.items()}
    image = np.zeros((3, 32, 32), np.float32)
    items = [*(Item(image, {name: version}, 1) for name, version in versions.items()), Item(image, versions, 1)]
    before = engine.answer(items)
    engine.model.heads["ink"].weight.data.fill_(math.nan)
    engine.model.heads["pen"] = torch.nn.Linear(7, 3)
    after = engine.answer(items)
    for index, answer in enumerate(after):
        for name, found in answer.items():
            reason = {"ink": "is not finite", "pen": "cannot be run"}.get(name)
            assert found == before[index][name] if reason is None else reason in found, (index, name)


def test_a_file_that_vanishes_while_it_is_read_is_no_error_of_the_server(root, monkeypatch):
    engine = Engine(root)
    versions = {name: task.version for name, task in engine.folder.tasks.items()}
    item = [Item(np.zeros((3, 32, 32), np.float32), versions, 1)]

    def vanished(folder, name):
        raise FileNotFoundError(2, "No such file or directory", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "load_task", vanished)
        assert all("No such file" in own for own in engine.answer(item)[0].values())
    assert all(isinstance(own, tuple) for own in engine.answer(item)[0].values())  # and is tried again


def test_a_task_of_other_layers_is_served_without_a_restart(tmp_path):
    from taps.storage.files import write_tensors

    torch.manual_seed(0)
    net, root = taps.create_backbone("test_resnet", pretrained=False), tmp_path / "tasks"
    image = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
    for name, layers in (("few", "layer4"), ("many", None)):
        model = taps.adapt(copy.deepcopy(net), layers=layers).eval()
        model.add_task(name, 3)
        for unit in model.units:
            unit.gates[name].set(True)
            for delta in unit.deltas[name].parameters():
                delta.data.normal_(std=0.1)
        expected = model(torch.from_numpy(image)[None], task=name).softmax(1)[0].max().item()
        if name == "few":
            write_tensors(root / "base.safetensors", model.base_state())
        else:
            engine = Engine(root)
        model.save_task(name, root / name, {"classes": ["x", "y", "z"], "preprocessing": PREPARE})
    engine.folder.refresh()
    wanted = {name: task.version for name, task in engine.folder.tasks.items()}
    for _ in range(2):
        (answer,) = engine.answer([Item(image, wanted, 1)])
        assert answer["many"][0][1] == pytest.approx(expected, abs=1e-6)
        assert answer["few"][0][1] > 0


def test_what_json_cannot_say_is_refused_with_its_folder(root):
    file = root / "ink/task.json"
    file.write_text(file.read_text().replace('"task":', '"accuracy": NaN, "task":', 1))
    folder = ServedFolder(root)
    assert "ink" not in folder.tasks
    assert "holds a value that JSON cannot express" in folder.refused[root / "ink"]


def test_an_engine_needs_a_task(tmp_path):
    with pytest.raises(UserError, match="holds no task"):
        Engine(tmp_path)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_follows_what_lies_in_it(root):
    folder = ServedFolder(root)
    assert list(folder.tasks) == sorted(NAMES)
    shutil.copytree(root / "ink", root / ".copying")  # a hidden folder may be half a copy
    shutil.move(root / "wax", root / "elsewhere")
    (root / "pen" / "task.json").write_text("{")
    folder.refresh()
    assert list(folder.tasks) == ["wax", "ink", "oil"]  # in the order of their folders
    assert "pen" in next(iter(folder.refused.values()))
    with pytest.raises(UserError, match="'pen' cannot be used"):
        folder.get("pen")
    with pytest.raises(UserError, match="did you mean 'ink'"):
        folder.get("inc")
    shutil.copytree(root / "ink", root / "twin")
    folder.refresh()
    assert "too" in folder.refused[root / "twin"]


# -- batches ----------------------------------------------------------------------------------------------------------


def items(count: int) -> list[Item]:
    return [Item(np.zeros(1, np.float32), {f"task{number}": "1"}, 1) for number in range(count)]


def test_what_comes_in_while_batches_are_out_goes_out_together():
    sizes = []

    async def send(group, batch):
        sizes.append(len(batch))
        await asyncio.sleep(0.01)
        return [{"task": (str(group),)} for _ in batch]

    async def main():
        batches = Batches(send, groups=1, size=8, most=100)
        return await asyncio.gather(*(batches.answer(item) for item in items(20)))

    assert len(asyncio.run(main())) == 20
    assert sizes[:2] == [1, 1]
    assert sum(sizes) == 20
    assert 3 < max(sizes) <= 8


def test_clients_that_ask_again_are_answered_in_even_batches():
    """With n clients that each wait for their answer, half of them wait for one batch while the other half makes the next."""
    sizes = []

    async def main():
        network = asyncio.Lock()  # one batch after another

        async def send(group, batch):
            sizes.append(len(batch))
            async with network:
                await asyncio.sleep(0.002 * len(batch))
            return [{"t": ()} for _ in batch]

        batches = Batches(send, groups=1, size=64, most=100)

        async def ask(item):
            for _ in range(10):
                await batches.answer(item)

        await asyncio.gather(*(ask(item) for item in items(16)))

    asyncio.run(main())
    assert sum(sizes) == 160
    # Else what comes first after an answer goes out alone, or all wait for the same batch and ask again at once.
    assert statistics.median(sizes) == 8


def test_a_task_always_belongs_to_the_same_group():
    groups: dict[str, set[int]] = {}

    async def send(group, batch):
        for item in batch:
            groups.setdefault(next(iter(item.tasks)), set()).add(group)
        return [{} for _ in batch]

    async def main():
        batches = Batches(send, groups=3, size=4, most=100)
        for _ in range(3):
            await asyncio.gather(*(batches.answer(item) for item in items(12)))

    asyncio.run(main())
    assert all(len(own) == 1 for own in groups.values())
    assert len(set.union(*groups.values())) == 3


def test_a_busy_group_uses_the_replica_of_an_idle_one():
    async def main():
        sent, free = [], asyncio.Event()

        async def send(group, batch):
            sent.append(group)
            await free.wait()
            return [{"t": ()} for _ in batch]

        batches = Batches(send, groups=4, size=2, most=100)
        waiting = [asyncio.create_task(batches.answer(item)) for item in items(1) * 20]
        await asyncio.sleep(0.05)
        own = sent[0]
        assert sorted(sent) == sorted([own, *range(4)])  # two batches of the group, one at each of the others
        free.set()
        await asyncio.gather(*waiting)

    asyncio.run(main())


def test_an_error_reaches_all_of_its_batch_and_a_full_queue_is_said():
    async def send(group, batch):
        raise Unavailable("gone")

    async def main():
        batches = Batches(send, groups=1, size=8, most=2)
        with batches.admit(1), pytest.raises(Busy), batches.admit(2):
            pass
        assert batches.admitted == 0
        return await asyncio.gather(*(batches.answer(item) for item in items(5)), return_exceptions=True)

    assert all(isinstance(error, Unavailable) for error in asyncio.run(main()))


# -- HTTP, without Ray ------------------------------------------------------------------------------------------------


class Local:
    """The application with an engine in this process."""

    def __init__(self, root: Path, **settings) -> None:
        self.engine = Engine(root)
        self.slow = 0.0
        self.fails: list[Exception] = []
        self.settings = ServeSettings(folder=str(root), **settings)

    def __call__(self, *requests: dict, **parallel) -> list[httpx.Response]:
        async def send(group, batch):
            await asyncio.sleep(self.slow)
            if self.fails:
                raise self.fails.pop()
            return self.engine.answer(batch)

        async def cost(shape, tasks):
            return self.engine.cost(shape, tasks)

        async def is_ready():
            return True

        async def main():
            default = self.engine.model.default_preprocessing(224).describe()
            folder = ServedFolder(Path(self.settings.folder))
            self.app = make_app(Service(self.settings, folder, default, send, cost), is_ready)
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                ask = [client.request(**{"method": "POST", "url": "/v1/predict", **request}) for request in requests]
                return await asyncio.gather(*ask)

        return asyncio.run(main())


def form(data: bytes = b"", name: str = "a.png", **fields) -> dict:
    return {"files": [("image", (name, data))], "data": fields}


def test_both_forms_of_a_request_give_the_merged_networks_answers(root):
    first, second = picture(1), picture(2, (90, 50), "JPEG")
    encoded = [
        base64.b64encode(first).decode(),
        {"name": "b.jpg", "data": "data:image/jpeg;base64," + base64.b64encode(second).decode()},
    ]
    several = {
        "files": [("image", ("a.png", first)), ("image", ("b.jpg", second))],
        "data": {"top": "3", "cost": "true"},
    }
    answers = Local(root)(
        several, {"json": {"images": encoded, "tasks": ["wax", "ink"], "top": 2}}, form(first, tasks="oil, pen")
    )
    for answer in answers:
        assert answer.status_code == 200, answer.text
    content = [answer.json() for answer in answers]
    assert [entry["image"] for entry in content[0]["images"]] == ["a.png", "b.jpg"]
    assert list(content[0]["images"][0]["tasks"]) == sorted(NAMES)
    assert list(content[1]["images"][1]["tasks"]) == ["wax", "ink"]
    assert [entry["image"] for entry in content[1]["images"]] == ["image 1", "b.jpg"]
    one = taps.load(root).predict_cost  # oil prepares images in its own way, so that it runs by itself
    apart = [one(torch.zeros(1, 3, 32, 32), names) for names in (["ink", "pen", "wax"], ["oil"])]
    assert content[0]["macs"] == {key: sum(cost[key] for cost in apart) for key in apart[0]}
    wanted = expected(root, first), expected(root, second)
    for own in content[:2]:
        for entry, probabilities in zip(own["images"], wanted, strict=True):
            check(entry, probabilities)
    check(content[2]["images"][0], wanted[0])


def test_the_list_of_tasks_metrics_health_and_the_page(root):
    (root / "pen" / "task.json").write_text("{")
    get = {"method": "GET"}
    urls = ("/v1/tasks", "/healthz", "/readyz", "/", "/openapi.json", "/metrics")
    tasks, health, ready, page, described, metrics = Local(root)(*({**get, "url": url} for url in urls))
    assert [task["name"] for task in tasks.json()["tasks"]] == ["ink", "oil", "wax"]
    one = tasks.json()["tasks"][0]
    assert one["layer_is_tuned"].count("1") == len(one["tuned_layers"])
    assert len(one["layer_is_tuned"]) == one["layers"]
    assert [entry["folder"] for entry in tasks.json()["refused"]] == ["pen"]
    assert (health.text, ready.text) == ("ok", "ready")
    assert "<!doctype html>" in page.text
    assert {"/v1/predict", "/v1/tasks"} <= set(described.json()["paths"])
    assert "taps_tasks 3.0" in metrics.text


def chunks(data: bytes, pause: float = 0.0):
    async def stream():
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]
            await asyncio.sleep(pause)

    return stream()


JSON = {"content-type": "application/json"}
BAD = {
    "no image": (form(b"text"), 400, "image 1 (a.png) cannot be read (not an image of a known format)"),
    "cut short": (form(picture()[:300]), 400, "image 1 (a.png) cannot be read"),
    "second of two": (
        {"files": [("image", ("a.png", picture())), ("image", ("b.png", b"x"))]},
        400,
        "image 2 (b.png) cannot be read",
    ),
    "unknown task": (form(picture(), tasks="inc"), 404, "did you mean 'ink'"),
    "many pixels": (form(plain((400, 300))), 413, "400 × 300 pixels, at most 100,000 are allowed"),
    "large, announced": ({"content": b"x" * 400_000, "headers": JSON}, 413, "larger than 0.3 MB"),
    "large, in chunks": ({"content": lambda: chunks(b"x" * 400_000), "headers": JSON}, 413, "larger than 0.3 MB"),
    "slow": ({"content": lambda: chunks(b"x" * 3000, 0.3), "headers": JSON}, 408, "did not arrive within 0.5 seconds"),
    "other type": (
        {"content": b"x", "headers": {"content-type": "text/plain"}},
        415,
        "send multipart/form-data or application/json",
    ),
    "no type": ({"content": b"x"}, 415, "content type none"),
    "no JSON": ({"content": b"{", "headers": JSON}, 400, "not JSON"),
    "deep JSON": ({"content": b"[" * 100_000, "headers": JSON}, 400, "not JSON"),
    "list": ({"json": []}, 400, '"images"'),
    "empty": ({"json": {"images": []}}, 400, "no image"),
    "number": ({"json": {"images": [1]}}, 400, "image 1 has to be a base64 text"),
    "not base64": ({"json": {"images": ["?"]}}, 400, "image 1 (image 1) is not base64"),
    "unknown entry": ({"json": {"images": [""], "task": ["ink"]}}, 400, "unknown entry 'task'"),
    "tasks": ({"json": {"images": [""], "tasks": "ink"}}, 400, "tasks has to be a list"),
    "no tasks": ({"json": {"images": [""], "tasks": []}}, 400, "tasks is empty"),
    "top": ({"json": {"images": [""], "top": 0}}, 400, "top has to be a whole number from 1 to 1000"),
    "long top": (form(picture(), top="9" * 5000), 400, "top has to be"),
    "name": ({"content": rb'{"images": [{"name": "\ud800", "data": ""}]}', "headers": JSON}, 400, "cannot be printed"),
    "PostScript": (form(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 400, "not an image of a known format"),
    "top as text": (form(picture(), top="many"), 400, "top has to be"),
    "cost": ({"json": {"images": [""], "cost": 1}}, 400, "cost has to be true or false"),
    "unknown field": (form(picture(), task="ink"), 400, "unknown field 'task'"),
    "unknown file": ({"files": [("file", ("a.png", b""))]}, 400, "unknown file field 'file'"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    "broken form": ({"content": b"--a\r\nx", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_a_status_and_a_reason(shelf, case):
    request, status, reason = BAD[case]
    if callable(request.get("content")):
        request = {**request, "content": request["content"]()}
    (answer,) = Local(shelf, max_request=0.3, max_pixels=0.1, timeout=0.5)(request)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["detail"]


def test_a_token_is_asked_for(shelf):
    local = Local(shelf, token="secret")
    head = {"headers": {"authorization": "Bearer secret"}}
    get = {"method": "GET", "url": "/v1/tasks"}
    answers = local(
        form(picture()), {**form(picture()), **head}, get, {**get, **head},
        {**get, "headers": {"authorization": "Bearer nö".encode()}},
        {**get, "url": "/healthz"}, {**get, "url": "/metrics"},
    )  # fmt: skip
    assert [answer.status_code for answer in answers] == [401, 200, 401, 200, 401, 200, 401]
    (answer,) = Local(shelf, token="nö")({**get, "headers": {"authorization": "Bearer nö".encode()}})
    assert answer.status_code == 200
    assert answers[0].headers["www-authenticate"] == "Bearer"


def test_too_much_waiting_a_slow_answer_and_a_dead_replica_are_503(shelf):
    local = Local(shelf, max_queue=3, timeout=0.4)
    local.slow = 0.1
    statuses = [answer.status_code for answer in local(*[form(picture(seed), tasks="ink") for seed in range(12)])]
    assert set(statuses) == {200, 503}
    several = {"files": [("image", (f"{seed}.png", picture(seed))) for seed in range(4)], "data": {"tasks": "ink"}}
    (answer,) = local(several)
    assert (answer.status_code, "retry-after" in answer.headers) == (413, False), "waiting does not help"
    assert "4 images are more than the 3" in answer.json()["detail"]
    local.slow = 1.0
    (answer,) = local(form(picture()))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "0.4 seconds" in answer.json()["detail"]
    local.slow, local.fails = 0.0, [Unavailable("the replica died")]
    (answer,) = local(form(picture(), tasks="ink"))
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


def test_a_task_that_changes_on_the_way_is_answered_as_it_is_now(root):
    local = Local(root)
    data = picture(3)
    changed = []
    answer_as_before = local.engine.answer

    def answer(batch):
        if not changed:
            changed.append(save_tasks(root, ("ink",), seed=5))
        return answer_as_before(batch)

    local.engine.answer = answer
    (given,) = local(form(data, tasks="ink"))
    assert given.status_code == 200
    check(given.json()["images"][0], expected(root, data))
    assert given.json()["images"][0]["tasks"]["ink"]["version"] == ServedFolder(root).get("ink").version


def test_a_damaged_task_is_503_with_its_reason_and_the_rest_is_served(root):
    path = root / "ink" / "task.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    ask = form(picture(), tasks="ink"), form(picture(), tasks="oil"), form(picture())
    damaged, rest, everything = Local(root)(*ask)
    assert damaged.status_code == 503
    assert "bytes, task.json says" in damaged.json()["detail"]
    assert rest.status_code == 200
    assert "ink" not in everything.json()["images"][0]["tasks"]
    save_tasks(root, ("ink",))
    damaged_bytes = bytearray(path.read_bytes())
    damaged_bytes[-1] ^= 1  # known only from the checksum, when the task is loaded
    path.write_bytes(damaged_bytes)
    damaged, rest, everything = Local(root)(*ask)
    assert (damaged.status_code, rest.status_code, everything.status_code) == (503, 200, 200)
    assert "damaged" in damaged.json()["detail"]
    entry = everything.json()["images"][0]
    assert list(entry["tasks"]) == ["oil", "pen", "wax"]
    assert "damaged" in entry["refused"]["ink"]


def test_without_any_task_left_there_is_404(root):
    local = Local(root)
    for name in NAMES:
        shutil.rmtree(root / name)
    everything, one = local({**form(picture()), "data": {"cost": "true"}}, form(picture(), tasks="ink"))
    assert (everything.status_code, one.status_code) == (404, 404)


# -- the command ------------------------------------------------------------------------------------------------------


class Server:
    """``taps serve`` in a process of its own."""

    def __init__(self, root: Path, *arguments: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        line = [sys.executable, "-m", "taps", "serve", str(root), "--port", str(self.port), *map(str, arguments)]
        self.process = subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
        )
        self.output: list[str] = []
        while not any("requests to" in own for own in self.output):
            line = self.process.stdout.readline()
            assert line, "".join(self.output)
            self.output.append(line)

    def ask(self, data: bytes, **fields) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/predict", timeout=120, **form(data, **fields))

    def replica(self) -> int:
        """The process of a replica."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if b"Replica" in (path / "cmdline").read_bytes() and self._is_below(path):
                    return int(path.name)
            except OSError:
                continue
        raise AssertionError("there is no replica")

    def _is_below(self, path: Path) -> bool:
        """Whether a process belongs to this server: Ray's are children of its own, in the same session of Ray."""
        own = {int(line.name) for line in Path("/proc").glob("[0-9]*")}
        number = int(path.name)
        while number in own and number > 1:
            if number == self.process.pid:
                return True
            number = int((Path("/proc") / str(number) / "stat").read_text().rpartition(")")[2].split()[1])
        return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.output.append(self.process.communicate(timeout=60)[0])
        return self.process.returncode


@pytest.fixture(scope="module")
def server(shelf, tmp_path_factory):
    root = Path(shutil.copytree(shelf, tmp_path_factory.mktemp("live") / "tasks"))
    running = Server(root, "--threads", 1)
    running.root = root
    yield running
    assert running.stop() == 143, "".join(running.output)
    assert "Traceback" not in "".join(running.output)


@pytest.mark.slow
def test_the_server_answers_as_taps_predict_does(server, tmp_path, here):
    data = picture(7)
    (tmp_path / "a.png").write_bytes(data)
    printed = json.loads(here("taps predict", server.root, tmp_path / "a.png", "--json", "--top", 3).stdout)[0]["tasks"]
    answer = server.ask(data, top="3").json()["images"][0]["tasks"]
    assert list(answer) == list(printed)
    for task, own in printed.items():
        assert [one["class"] for one in answer[task]["classes"]] == [one["class"] for one in own]
        given = [one["probability"] for one in answer[task]["classes"]]
        assert given == pytest.approx([one["probability"] for one in own], abs=1e-6)


@pytest.mark.slow
def test_tasks_come_go_and_change_under_load_and_no_answer_is_wrong(server):
    """Each answer names the version that gave it, and is that version's; the task that is replaced changes between requests."""
    data = picture(8)
    versions, wanted = {}, {}
    stores = server.root.parent
    for seed in (0, 1):
        folder = stores / f"version{seed}"
        shutil.copytree(server.root, folder)
        save_tasks(folder, ("ink",), seed=seed)
        versions[ServedFolder(folder).get("ink").version] = seed
        wanted[seed] = expected(folder, data)
    ended = threading.Event()
    seen: dict[int, int] = {0: 0, 1: 0}

    def load(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not ended.is_set():
                asked = [{"tasks": "ink"}, {"tasks": "oil"}, {}][number % 3]
                answer = client.post(f"{server.url}/v1/predict", **form(data, **asked))
                assert answer.status_code == 200, answer.text
                entry = answer.json()["images"][0]
                seed = versions.get(entry["tasks"].get("ink", {}).get("version"), 0)
                seen[seed] += 1
                check(entry, wanted[seed])

    with ThreadPoolExecutor(6) as pool:
        loads = [pool.submit(load, number) for number in range(6)]
        for step in range(10):
            time.sleep(0.25)
            shutil.copytree(stores / f"version{step % 2}" / "ink", server.root / ".ink")
            shutil.rmtree(server.root / "ink") if step == 9 else os.rename(server.root / "ink", stores / f"old{step}")
            os.rename(server.root / ".ink", server.root / "ink")
            if any(one.done() for one in loads):
                break
        ended.set()
    # between the two renames the task is not there; then it may be unknown, never wrong
    errors = [one.exception() for one in loads if one.exception() is not None]
    assert all("unknown task" in str(error) for error in errors), errors
    assert sum(seen.values()) > 20
    shutil.copytree(server.root / "ink", server.root / ".new")
    (server.root / ".new").rename(server.root / "renamed")
    shutil.rmtree(server.root / "ink")
    assert server.ask(data, tasks="ink").status_code == 200  # the same task in another folder
    shutil.rmtree(server.root / "renamed")
    assert server.ask(data, tasks="ink").status_code == 404
    save_tasks(server.root, ("ink",))
    assert server.ask(data, tasks="ink").status_code == 200


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_no_request_is_lost(server):
    data = picture(9)
    wanted = expected(server.root, data)
    ended = threading.Event()

    def load(number: int) -> list[int]:
        statuses = []
        with httpx.Client(timeout=60) as client:
            while not ended.is_set():
                answer = client.post(f"{server.url}/v1/predict", **form(data, tasks=NAMES[number % 4]))
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    check(answer.json()["images"][0], wanted)
                else:  # the new replica needs the processor
                    time.sleep(0.2)
        return statuses

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, number) for number in range(4)]
        time.sleep(1)
        os.kill(server.replica(), signal.SIGKILL)
        before = time.time()
        time.sleep(0.5)
        while server.ask(data, tasks="ink").status_code != 200 and time.time() < before + 60:
            time.sleep(0.2)
        ended.set()
        statuses = [status for one in loads for status in one.result()]
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) > 10
    assert httpx.get(f"{server.url}/readyz").text == "ready"


def test_pages_load_nothing_from_elsewhere():
    for name in ("page.html", "docs.html"):
        text = (ROOT / "taps/serving" / name).read_text()
        assert not [word for word in ("http:", "https:", "src=", "@import", '<link rel="stylesheet') if word in text]


@pytest.mark.slow
def test_the_page_shows_every_task_in_a_browser(server, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium is not installed")
    (tmp_path / "photo.png").write_bytes(picture(4, (120, 160)))
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync", "no-first-run",
                     "disable-dev-shm-usage", "disable-component-update", f"user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        for width in (1200, 390):
            browser.set_window_size(width, 900)
            browser.get(server.url)
            WebDriverWait(browser, 20).until(lambda own: len(own.find_elements(By.TAG_NAME, "article")) == 4)
            browser.find_element(By.ID, "file").send_keys(str(tmp_path / "photo.png"))
            WebDriverWait(browser, 60).until(lambda own: "tasks" in own.find_element(By.ID, "state").text)
            assert "sharing saved" in browser.find_element(By.ID, "state").text
            cards = browser.find_elements(By.TAG_NAME, "article")
            assert [card.find_element(By.TAG_NAME, "h2").text for card in cards] == sorted(NAMES)
            assert all(len(card.find_elements(By.CLASS_NAME, "class")) == 3 for card in cards)
            assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
            folder = Path(os.environ.get("TAPS_SCREENSHOTS") or tmp_path)
            assert browser.save_screenshot(str(folder / f"page{width}.png"))
            browser.get(f"{server.url}/docs")
            WebDriverWait(browser, 20).until(lambda own: len(own.find_elements(By.TAG_NAME, "section")) == 5)
            first = browser.find_element(By.TAG_NAME, "section").text
            assert "/v1/predict" in first
            assert "an image or the body cannot be read" in first
            assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
            assert browser.save_screenshot(str(folder / f"docs{width}.png"))
    finally:
        browser.quit()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, when it is imported
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere holds no task"),
        (["{root}", "--port", "{taken}"], "port {taken}: it is in use; choose another --port"),
        (["{root}", "--port", "0", "--address", "127.0.0.1:1"], "the Ray cluster at 127.0.0.1:1 does not answer"),
        (["{root}", "--port", "0", "--address", "there"], "--address there is not HOST:PORT or auto"),
        (["{root}", "--replicas", "3", "1"], "--replicas takes a number, or the least and the largest number"),
        (["{root}", "--base", "missing.safetensors", "--port", "0"], "missing.safetensors"),
        ([], "name a folder of tasks: taps serve results/demo"),
    ],
)
def test_a_mistake_is_one_line(shelf, here, arguments, reason):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"root": str(shelf), "taken": taken.getsockname()[1]}
        line = [argument.format(**values) for argument in arguments]
        done = here("taps serve", *line, check=2)
    assert reason.format(**values) in done.stderr
    assert [own for own in done.stderr.splitlines() if not own.startswith("usage")][-1].count("error:") == 1
