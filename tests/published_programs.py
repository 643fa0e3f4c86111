"""Networks of the published programs, written from their descriptions with their names of tensors, as references for importing."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

RATES = (6, 12, 18, 24)


class Branch(nn.Module):
    """One branch of the head."""

    def __init__(self, features: int, outputs: int, rate: int, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, width, 3, padding=rate, dilation=rate)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.conv3 = nn.Conv2d(width, outputs, 1)

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x).relu()).relu())


class Block(nn.Module):
    """A residual block, for DynaShare with a gate and a shortcut that is never called."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, gated: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if gated:
            self.fc1 = nn.Conv2d(inputs, 16, 1)
            self.fc1bn = nn.BatchNorm2d(16)
            self.fc2 = nn.Conv2d(16, 2, 1)
            self.shortcut = (
                nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False)) if inputs != width else nn.Sequential()
            )

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))

    def chosen(self, x):
        """1 for each image for which the gate's second logit is the larger one."""
        logits = self.fc2(self.fc1bn(self.fc1(x.mean((2, 3), keepdim=True))).relu())
        return (logits[:, 1] >= logits[:, 0]).float()[:, None]


class Backbone(nn.Module):
    def __init__(self, widths: tuple[int, ...], gated: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.blocks, self.ds = nn.ModuleList(), nn.ModuleList()
        inputs = widths[0]
        for index, (width, stride, dilation) in enumerate(zip(widths, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            project = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            self.ds.append(project if index else None)
            first = Block(inputs, width, stride, dilation, gated)
            self.blocks.append(nn.ModuleList([first, Block(width, width, 1, dilation, gated)]))
            inputs = width

    def forward(self, x, policy, rates):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1, ceil_mode=True)
        for stage, project in zip(self.blocks, self.ds, strict=True):
            for index, block in enumerate(stage):
                (run, _), rate = policy[0], rates[0]
                policy, rates = policy[1:], rates[1:]
                shortcut = project(x) if index == 0 and project is not None else x
                share = run if rate == 1 else run * block.chosen(x)
                x = share * (shortcut + block(x)).relu() + (1 - share) * shortcut
        return x


class ManyTasks(nn.Module):
    """AdaShare's network, ``gated`` for DynaShare's."""

    def __init__(
        self, outputs: tuple[int, ...], gated: bool = False, widths: tuple[int, ...] = (64, 128, 16, 20)
    ) -> None:
        super().__init__()
        self.backbone = Backbone(widths, gated)
        for task, count in enumerate(outputs, start=1):
            for index, rate in enumerate(RATES):
                self.add_module(f"task{task}_fc1_c{index}", Branch(widths[-1], count, rate))
            self.register_parameter(f"task{task}_logits", nn.Parameter(0.5 * torch.ones(8, 2)))

    def forward(self, x, task: int, policy, rates=(1,) * 8):
        features = self.backbone(x, policy.tolist(), rates)
        return sum(self.get_submodule(f"task{task}_fc1_c{index}")(features) for index in range(4))


def of_automtl(tasks: dict[str, int], choices: dict[str, list[int]]) -> tuple[dict, dict[str, nn.Module]]:
    """A state dict of AutoMTL's MobileNetV2, and the plain network of each task.

    Args:
        tasks: outputs by task.
        choices: for each task and convolution, 0 (shared), 1 (own) or 2 (skipped).
    """
    base = mobilenet_v2().features
    shake(base)
    for module in base.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Conv2d)]
    norms = [name for name, module in base.named_modules() if isinstance(module, nn.BatchNorm2d)]
    state, nets = {}, {}
    heads = nn.ModuleDict()
    for task, outputs in tasks.items():
        heads[task] = nn.ModuleDict({f"fc{index + 1}": Branch(1280, outputs, rate) for index, rate in enumerate(RATES)})
        own = copy.deepcopy(base)
        shake(own)
        plain = copy.deepcopy(base)
        for node, name in enumerate(layers):
            module, choice = own.get_submodule(name), choices[task][node]
            state[f"net.{3 * node}.taskOp.{task}.weight"] = module.weight.detach().clone()
            state[f"net.{3 * node}.policy.{task}"] = F.one_hot(torch.tensor(choice), 3).float()
            changes_shape = module.in_channels != module.out_channels or module.stride != (1, 1)
            if changes_shape:
                state[f"net.{3 * node}.dsOp.{task}.0.weight"] = torch.zeros(
                    module.out_channels, module.in_channels, 1, 1
                )
            if choice == 1:
                plain.get_submodule(name).weight.data.copy_(module.weight)
            if choice == 2:
                parent, _, last = name.rpartition(".")
                setattr(plain.get_submodule(parent), last, nn.Identity())
        for node, name in enumerate(norms):
            for key, tensor in own.get_submodule(name).state_dict().items():
                state[f"net.{3 * node + 1}.taskOp.{task}.{key}"] = tensor.clone()
            plain.get_submodule(name).load_state_dict(own.get_submodule(name).state_dict())
            state[f"net.{3 * node + 1}.policy.{task}"] = torch.zeros(3)
        nets[task] = nn.Sequential(plain, Sum(heads[task])).eval()
    for node, name in enumerate(layers):
        state[f"net.{3 * node}.basicOp.weight"] = base.get_submodule(name).weight.detach().clone()
    for node, name in enumerate(norms):
        state |= {
            f"net.{3 * node + 1}.basicOp.{k}": t.clone() for k, t in base.get_submodule(name).state_dict().items()
        }
    state |= {f"headsDict.{key}": tensor for key, tensor in heads.state_dict().items()}
    return state, nets


class Sum(nn.Module):
    def __init__(self, branches: nn.ModuleDict) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x):
        return sum(branch(x) for branch in self.branches.values())


class Transformer(nn.Module):
    """MultiViT with one ConvNeXt head: 4 × 4 outputs per patch of 16 pixels, upsampled to the image."""

    def __init__(
        self, task: str, outputs: int, side: int = 2, width: int = 192, depth: int = 12, channels: int = 4
    ) -> None:
        super().__init__()
        rgb = nn.Module()
        rgb.proj = nn.Conv2d(3, width, 16, 16)
        rgb.pos_emb = nn.Parameter(torch.randn(1, width, side, side), requires_grad=False)
        self.input_adapters = nn.ModuleDict({"rgb": rgb})
        self.global_tokens = nn.Parameter(torch.randn(1, 1, width))
        self.encoder = nn.Sequential(*(Layer(width, 3) for _ in range(depth)))
        head = nn.Module()
        head.proj_dec = nn.Linear(width, 16 * channels)
        head.blocks = nn.Sequential(*(ConvBlock(channels) for _ in range(2)))
        head.final_layer = nn.Conv2d(channels, outputs, 1)
        self.output_adapters = nn.ModuleDict({task: head})
        self.task, self.side = task, side

    def forward(self, x):
        rgb, head = self.input_adapters["rgb"], self.output_adapters[self.task]
        patches = (rgb.proj(x) + rgb.pos_emb).flatten(2).transpose(1, 2)
        tokens = self.encoder(torch.cat([patches, self.global_tokens.expand(len(x), -1, -1)], dim=1))[:, :-1]
        values = head.proj_dec(tokens).view(
            len(x), self.side, self.side, 4, 4, -1
        )  # rows, columns, rows and columns inside
        maps = values.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
        return F.interpolate(head.final_layer(head.blocks(maps)), size=x.shape[-2:], mode="bilinear")


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        query, key, value = self.attn["qkv"](self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn["proj"]((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        inner = self.norm(self.dwconv(x).movedim(1, -1))
        return x + self.pwconv2(F.gelu(self.pwconv1(inner))).movedim(-1, 1)


@torch.no_grad()
def shake(net: nn.Module) -> None:
    """Give every tensor of a network values that no other has."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.normal_(std=0.1)
