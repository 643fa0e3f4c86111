"""Tasks on the Hugging Face hub: a repository holds the files of one task, or folders of several, and a model card."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from timm.models import PretrainedCfg

from taps.core.accounting import is_tuned
from taps.errors import UserError, first_line
from taps.storage.files import write_text
from taps.storage.task_file import AVERAGE_PRECISION, read_description

PREFIX = "hf-hub:"
_TIMEOUT = 5.0  # seconds
_FILES = ("task.json", "task.safetensors", "base.safetensors")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@contextmanager
def cache_if_unreachable() -> Iterator[None]:
    """Use only the cache if the hub does not answer. Its client would retry for a minute, which no time-out of it shortens."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _downloading(name: str) -> Iterator[None]:
    """Take from the cache or from the hub what the ``with`` block asks for, or raise a ``UserError`` about ``name``."""
    from huggingface_hub import constants

    with cache_if_unreachable():
        try:
            yield
        except Exception as error:  # the client, the network and a damaged cache raise almost anything
            reason = "the hub does not answer" if constants.HF_HUB_OFFLINE else first_line(error, 200)
            raise UserError(f"{name} is neither cached nor can it be downloaded: {reason}") from None


def _answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # the exceptions depend on the version's HTTP library
        return False
    return True


def download(repository: str) -> Path:
    """Return the local folder with a repository's task files, downloaded unless they are cached.

    Args:
        repository: ``"user/name"`` or ``"user/name@revision"``, with or without ``hf-hub:`` before it.

    Raises:
        UserError: if the name is not one, or the files are neither cached nor can be downloaded.
    """
    from huggingface_hub import constants, snapshot_download

    name, _, revision = repository.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name):
        raise UserError(f"{repository!r} is not hf-hub:user/repository")
    patterns = [*_FILES, *(f"*/{file}" for file in _FILES)]
    with _downloading(f"{PREFIX}{name}"):
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=patterns, endpoint=constants.ENDPOINT)
        )


def is_address(path: str | Path) -> bool:
    """Return whether this names a file on the hub or the web."""
    return str(path).startswith((PREFIX, "https://", "http://", "file://"))


def local_file(path: str | Path) -> Path:
    """Return the path of a file that may be on the hub (``hf-hub:user/repository/file``) or the web; it is downloaded once.

    Raises:
        UserError: if it is neither here nor can be downloaded.
    """
    address = str(path)
    if not is_address(path):
        return Path(path)
    if not address.startswith(PREFIX):
        name = f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{PurePosixPath(urlparse(address).path).name}"
        target = Path(torch.hub.get_dir()) / "checkpoints" / name
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(address, str(target), progress=sys.stderr.isatty())
        except Exception as error:  # no such host, no such page, a full disk
            raise UserError(f"{address} cannot be downloaded: {first_line(error, 200)}") from None
        return target
    from huggingface_hub import constants, hf_hub_download

    repository, _, file = address.removeprefix(PREFIX).partition("/")[2].partition("/")
    user = address.removeprefix(PREFIX).partition("/")[0]
    name, _, revision = f"{user}/{repository}".partition("@")
    if not _NAME.fullmatch(name) or not file:
        raise UserError(f"{address!r} is not hf-hub:user/repository/file")
    with _downloading(address):
        return Path(hf_hub_download(name, file, revision=revision or None, endpoint=constants.ENDPOINT))


def config_of(name: str) -> PretrainedCfg:
    """Return timm's description of the model in a repository of the hub.

    Raises:
        UserError: if it is neither cached nor can be downloaded.
    """
    from timm.models import load_model_config_from_hf

    with _downloading(name):
        return PretrainedCfg(**load_model_config_from_hf(name.removeprefix(PREFIX))[0])


def upload(folder: Path, repository: str, private: bool = False, message: str | None = None) -> str:
    """Upload a task's files and its model card, and return the repository's address.

    Raises:
        UserError: if the hub does not answer, or refuses.
    """
    from huggingface_hub import HfApi, constants

    name = repository.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise UserError(f"{repository!r} is not user/repository")
    task = read_description(folder)["task"]
    write_text(folder / "README.md", model_card(read_description(folder), name))
    if not _answers():
        raise UserError(f"{name} is not uploaded: the hub does not answer at {constants.ENDPOINT}")
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=["README.md", *_FILES],
            commit_message=message or f"Task {task}",
        )
    except Exception as error:  # as above
        raise UserError(f"{name} is not uploaded: {first_line(error, 200)}") from None
    return f"{constants.ENDPOINT}/{name}"


def model_card(description: dict, repository: str) -> str:
    """Return a model card in Markdown from the contents of a ``task.json``."""
    base, account, classes = description["base"], description["accounting"], description.get("classes") or []
    precise = description.get("metric") == AVERAGE_PRECISION
    accuracy, images = description.get("accuracy"), (description.get("provenance") or {}).get("images", {})
    tuned = [row["name"] for row in description["units"] if is_tuned(row)]
    architecture = str(base.get("model") or base["name"]).removeprefix(PREFIX)
    rows = {
        "base": f"`{architecture}`, fingerprint `{base['fingerprint'][:16]}`",
        "method": f"`{description['method']}`, norms `{description['norm']}`",
        f"test {description.get('metric') or 'accuracy'}": "not tested" if accuracy is None else f"{accuracy:.2f} %",
        "classes": f"{len(classes)}: {', '.join(classes[:20])}{', …' if len(classes) > 20 else ''}" if classes else "–",
        "images": ", ".join(f"{count} {split}" for split, count in images.items()) or "–",
        "size": f"{description['bytes']:,} bytes, {100 * description['bytes'] / (4 * base['parameters']):.1f} % of the base",
        "tuned layers": f"{account['tuned_units']} of {account['units']}",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    base_model = (
        f"base_model: {architecture if '/' in architecture else f'timm/{architecture}'}\n" if base.get("model") else ""
    )
    return f"""---
library_name: taps
pipeline_tag: image-classification
{base_model}tags: [taps, timm, image-classification]
---
# {description["task"]}

A task for `{architecture}`: small weights of its own in {len(tuned)} layers, on top of the shared base.

```python
import taps
from PIL import Image

model = taps.load("{PREFIX}{repository}")
image = model.transform("{description["task"]}")(Image.open("photo.jpg"))
probabilities = model(image[None], task="{description["task"]}").{"sigmoid()" if precise else "softmax(1)"}
```

|  |  |
|---|---|
{table}
"""
