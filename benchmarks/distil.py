"""Base weights where a network's own are not available: its features learn to predict those of EfficientNet-Lite0.

    python benchmarks/distil.py resnet18 resnet18.safetensors                  # hours on two CPU cores, minutes on a GPU
    python benchmarks/distil.py vit_tiny_patch16_224 vit.safetensors
    python benchmarks/quality.py --model_type resnet18 --model_path resnet18.safetensors

Images of 64 pixels are parts of the pictures that scikit-image brings along and of the demo's development copy, which has no pixel
of the demo's test images; each is flipped, recoloured, blurred, made noisy or mixed with another. The loss is the squared error of
the teacher's standardised features (Hinton et al., 2015, with features instead of probabilities; Romero et al., 2015).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import taps  # noqa: E402
from taps.data.generated.demo import make_demo  # noqa: E402
from taps.data.opening import needs_image_size  # noqa: E402

SIDE = 64
PICTURES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip


def source_images(count: int, demo: Path) -> Tensor:
    """Return images, uint8, shape (N, 3, 64, 64): ``count`` parts of each picture, and the demo's development copy."""
    chosen, images = np.random.default_rng(0), []
    for name in PICTURES:
        picture = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for _ in range(count):
            side = int(chosen.integers(48, min(picture.size)))
            x, y = (int(chosen.integers(0, length - side + 1)) for length in picture.size)
            images.append(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + side, y + side)))
    images += [Image.open(path).convert("RGB") for path in sorted(demo.rglob("*.png"))]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def changed(x: Tensor) -> Tensor:
    """Return images in 0..1 after random changes, most of which apply to a part of the batch."""

    def some(probability: float) -> Tensor:
        return torch.rand(len(x), 1, 1, 1, device=x.device) < probability

    def factor(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(len(x), channels, 1, 1, device=x.device) * (high - low) + low

    x = torch.where(some(0.5), x.flip(3), x)
    x = torch.where(some(0.25), x.transpose(2, 3), x)
    x = torch.where(some(0.2), x.mean(1, keepdim=True), x)
    x = torch.where(some(0.2), x.roll(1, 1), x)
    x = torch.where(some(0.2), 1 - x, x)
    x = torch.where(some(0.2), nn.functional.avg_pool2d(x, 3, 1, 1), x)
    x = torch.where(some(0.5), x * factor(0.6, 1.4) + factor(-0.2, 0.2, 3), x)
    x = torch.where(some(0.2), x + 0.1 * torch.randn_like(x), x)
    share = torch.where(some(0.3), factor(0.3, 0.7), torch.ones_like(factor(0, 1)))
    return (share * x + (1 - share) * x.roll(1, 0)).clamp(0, 1)


def features(net: nn.Module, x: Tensor) -> Tensor:
    """Return a network's features of images in 0..1, which it wants with its own mean and spread of pixels."""
    mean, std = (torch.tensor(net.pretrained_cfg[key], device=x.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return net((x - mean) / std)


def distil(name: str, steps: int, batch: int, rate: float, images: Tensor, device: torch.device) -> nn.Module:
    """Return a network whose features predict those of EfficientNet-Lite0."""
    size = {"img_size": SIDE} if needs_image_size(name, SIDE) else {}
    student = taps.create_backbone(name, pretrained=False, **size).to(device).train()
    teacher = taps.create_backbone("tf_efficientnet_lite0").to(device).eval()
    predict = nn.Linear(student.num_features, teacher.num_features).to(device)
    parameters = [*student.parameters(), *predict.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    images = images.to(device)
    standard = nn.BatchNorm1d(teacher.num_features, affine=False).to(device)
    shown = trange(steps, file=sys.stderr, mininterval=5)
    for step in shown:
        x = changed(images[torch.randint(len(images), (batch,), device=device)].float() / 255)
        with torch.no_grad():
            target = standard(features(teacher, x))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.mse_loss(predict(features(student, x)).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            shown.set_postfix(error=f"{loss.item():.3f}")
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_type")
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=1000, help="parts of each picture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    demo = ROOT / "datasets/demo_development"
    given.file.parent.mkdir(parents=True, exist_ok=True)
    make_demo(demo, development=True)
    torch.manual_seed(0)
    images = source_images(given.count, demo)
    net = distil(given.model_type, given.steps, given.batch_size, given.lr, images, torch.device(given.device))
    save_file({key: tensor.cpu().contiguous() for key, tensor in net.state_dict().items()}, given.file)
    print(f"weights: {given.file}")


if __name__ == "__main__":
    main()
