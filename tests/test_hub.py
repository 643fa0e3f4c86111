"""Tasks on the Hugging Face hub, tried against a stand-in on loopback."""

import pytest
import torch
from hub import serving
from test_front_door import network, trained

import taps


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants, get_token

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    assert get_token() == "hf_of_the_test"
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield running


def test_a_pushed_task_loads_from_the_hub(hub):
    model = trained("taps", "follow", "sketch")
    model.describe_task("sketch", classes=["cat", "dog", "bird"])
    address = model.push_task("sketch", "someone/sketch-taps", private=True)
    assert address == f"{hub.url}/someone/sketch-taps"
    assert hub.private == {"someone/sketch-taps": True}
    files = hub.files["someone/sketch-taps"]
    assert set(files) == {"README.md", "task.json", "task.safetensors"}
    card = files["README.md"].decode()
    for text in ("library_name: taps", 'taps.load("hf-hub:someone/sketch-taps")', "3: cat, dog, bird", "`taps`, norms"):
        assert text in card
    x = torch.randn(2, 3, 32, 32)
    for name in ("hf-hub:someone/sketch-taps", "hf-hub:someone/sketch-taps@main"):
        loaded = taps.load(name, base=network())
        assert torch.equal(loaded(x, task="sketch"), model(x, task="sketch"))
    assert taps.TaskModel.from_pretrained("hf-hub:someone/sketch-taps", base=network()).classes("sketch")[1] == "dog"


def test_a_cached_task_loads_without_the_hub(hub, monkeypatch):
    from huggingface_hub import constants

    model = trained("taps", "follow", "sketch")
    model.push_task("sketch", "someone/sketch")
    taps.load("hf-hub:someone/sketch", base=network())
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert taps.load("hf-hub:someone/sketch", base=network()).tasks == ["sketch"]
    with pytest.raises(taps.UserError, match="neither cached nor can it be downloaded: the hub does not answer"):
        taps.load("hf-hub:someone/other")
    with pytest.raises(taps.UserError, match=r"is not uploaded: the hub does not answer at http://127\.0\.0\.1:1"):
        model.push_task("sketch", "someone/sketch")


def test_what_the_hub_refuses_is_one_line(hub):
    model = trained("taps", "follow", "sketch")
    hub.refuses = True
    with pytest.raises(taps.UserError, match=r"someone/sketch is not uploaded: .*401") as caught:
        model.push_task("sketch", "someone/sketch")
    assert len(str(caught.value).splitlines()) == 1
    for name, message in (
        ("hf-hub:someone/nothing", "hf-hub:someone/nothing is neither cached nor can it be downloaded"),
        ("hf-hub:nothing", "is not hf-hub:user/repository"),
    ):
        with pytest.raises(taps.UserError, match=message) as caught:
            taps.load(name)
        assert len(str(caught.value).splitlines()) == 1


def test_save_pretrained_writes_every_task(tmp_path):
    model = trained("taps", "follow", "sketch")
    model.save_pretrained(tmp_path / "tasks")
    loaded = taps.TaskModel.from_pretrained(tmp_path / "tasks", base=network())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x, task="sketch"), model(x, task="sketch"))
