"""An optimiser for deltas that have to be small in bytes, and Adam for norms and heads, in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch

from taps.errors import UserError

#: factor on the learning rate, which is one for SGD, of the other two
FACTOR = 0.3
#: a: how much of the size of a layer's own gradients its steps are divided by, 0..1; the rest is that of all layers
LAYERWISE = 0.25
#: c: a layer's step is at most lr · c · w · m / r, with w the root mean square of its weights
TRUST = 32.0
#: w of tensors that are not added to weights: no bound
_ANY = 1e9
#: root mean square of a network's weights from which deltas take the full rate
_TYPICAL = 0.08


class _Optimizer(torch.optim.Optimizer):
    """An optimiser whose scalars keep their precision when they are loaded."""

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            if "square" in state:  # torch would give it a half-precision parameter's
                self.state[parameters[index]]["square"] = state["square"].to(parameters[index].device, torch.float32)


class NormalizedMomentum(_Optimizer):
    r"""Momentum, divided for each tensor by a size of its gradients.

    With m the mean of recent gradients and r the root of the mean of recent squares (both as in Adam, bias-corrected), r of all
    tensors together R, a step is lr · m / (rᵃ · R¹⁻ᵃ). a = 0 is SGD with a rate for any scale of the loss, a = 1 divides by a
    second moment for each layer as NovoGrad does (Ginsburg et al., 2019, arXiv 1905.11286). Weights of one tensor are not treated
    apart, so that few of them change far more than the others, as in SGD.

    Where the size w of the weights that a tensor is added to is known, a step is at most lr · c · w · m / r, so that no layer
    changes far more than the others for its size (the clipped form of LARS; You et al., 2017, arXiv 1708.03888). Otherwise the
    first layer of a ResNet-18, which has few weights and large gradients, changes by a third of its size in each early step.

    Args:
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups.
        lr: learning rate, > 0.
        betas: decay of m and of r².
        layerwise: a, 0..1.
        weight_decay: λ of λ · w, which is added to the gradient.
        sizes: w by tensor, > 0.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        layerwise: float = LAYERWISE,
        weight_decay: float = 0.0,
        sizes: Mapping[torch.Tensor, float] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.betas, self.layerwise, self.sizes = betas, layerwise, sizes or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        used = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not used:
            return loss
        parameters = [p for p, _ in used]
        device = parameters[0].device
        gradients = [p.grad.add(p, alpha=own["weight_decay"]) if own["weight_decay"] else p.grad for p, own in used]
        states = [self.state[p] for p in parameters]
        for state, p in zip(states, parameters, strict=True):
            if not state:
                state.update(step=torch.tensor(0.0), mean=torch.zeros_like(p), square=torch.zeros((), device=device))
            state["step"] += 1
        means = [state["mean"] for state in states]
        torch._foreach_lerp_(means, gradients, 1.0 - self.betas[0])
        # Few numbers, one per tensor, made on the host and copied without waiting.
        done, counts = torch.stack([state["step"] for state in states]), torch.tensor([p.numel() for p in parameters])
        rates = torch.tensor([own["lr"] for _, own in used]) / (1.0 - self.betas[0] ** done)
        most = TRUST * torch.tensor([self.sizes.get(p, _ANY) for p in parameters])
        known = torch.stack([rates, 1.0 - self.betas[1] ** done, counts, counts / counts.sum(), most])
        rates, correction, counts, share, most = known.to(device, non_blocking=True)
        squares = torch.stack([state["square"] for state in states])
        squares.lerp_(torch.stack(torch._foreach_norm(gradients)).float().square() / counts, 1.0 - self.betas[1])
        torch._foreach_copy_([state["square"] for state in states], list(squares))
        corrected = squares / correction
        own, of_all = corrected.sqrt(), (corrected * share).sum().sqrt()
        divisor = own**self.layerwise * of_all ** (1.0 - self.layerwise)
        steps = torch.minimum(rates / (divisor + 1e-12), rates * most / (own + 1e-12))
        torch._foreach_sub_(parameters, torch._foreach_mul(means, [*steps.to(means[0].dtype)]))
        return loss


class SplitOptimizer(_Optimizer):
    """:class:`NormalizedMomentum` for deltas, Adam for norms and heads (or deltas too), SGD with momentum for all other roles.

    Adam changes all weights of a layer about as much; SGD, and :class:`NormalizedMomentum`, some far more than others: in the demo
    SGD's deltas take 14 to 42 % fewer bits than Adam's at the same error (0.24 to 0.7). Norms and heads are small, and Adam trains
    them to a higher accuracy.

    Steps of both kinds do not scale with the gradients. They have to shrink as 1/fan-in, while trained weights shrink about as
    1/√fan-in (Yang et al., 2022, arXiv 2203.03466, table 3). If the sizes of weights are known, the deltas' rate is therefore
    multiplied by (w / 0.08)², at most 1, rounded to one digit; w is the root mean square of the network's weights.

    Args:
        groups: parameter groups with ``lr``, ``initial_lr``, ``weight_decay`` and ``role``.
        momentum: of SGD.
        betas: β of Adam and of :class:`NormalizedMomentum`.
        adaptive: roles for Adam.
        rate: factor on the learning rates of all parts.
        sizes: by delta, the root mean square of the weights that it is added to, > 0.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        momentum: float,
        betas: tuple[float, float],
        adaptive: Sequence[str] = ("norm", "head"),
        rate: float = 1.0,
        sizes: Mapping[torch.Tensor, float] | None = None,
    ) -> None:
        normalized = {"delta"} - set(adaptive)
        shares = {"delta": _share_of_rate(sizes or {})}
        factors = [
            rate * (FACTOR if role in (*normalized, *adaptive) else 1.0) * shares.get(role, 1.0)
            for role in (group["role"] for group in groups)
        ]
        scaled = [
            {**group, "lr": factor * group["lr"], "initial_lr": factor * group["initial_lr"]}
            for group, factor in zip(groups, factors, strict=True)
        ]
        deltas = [group for group in scaled if group["role"] in normalized]
        with_adam = [group for group in scaled if group["role"] in adaptive]
        others = [group for group in scaled if group["role"] not in (*normalized, *adaptive)]
        self._parts: list[torch.optim.Optimizer] = []
        if deltas:
            self._parts.append(NormalizedMomentum(deltas, betas=betas, sizes=sizes))
        if with_adam:
            self._parts.append(torch.optim.Adam(with_adam, betas=betas))
        if others:
            self._parts.append(torch.optim.SGD(others, lr=1.0, momentum=momentum))
        self._lengths = [len(part.param_groups) for part in self._parts]
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state.

        Raises:
            UserError: if a part's is another optimiser's, as before version 0.15.
        """
        super().load_state_dict(state_dict)
        entries = {NormalizedMomentum: "mean", torch.optim.Adam: "exp_avg", torch.optim.SGD: "momentum_buffer"}
        groups = iter(self.param_groups)
        for part, length in zip(self._parts, self._lengths, strict=True):
            parameters = [p for group in islice(groups, length) for p in group["params"]]
            if any(self.state.get(p) and entries[type(part)] not in self.state[p] for p in parameters):
                raise UserError("the checkpoint was written with another optimiser; start again with --overwrite")

    def step(self, closure: Callable[[], float] | None = None):  # type: ignore[override]
        loss, start = None if closure is None else closure(), 0
        for part, length in zip(self._parts, self._lengths, strict=True):
            # All work on this optimiser's groups and state, which load_state_dict replaces.
            part.param_groups, part.state = self.param_groups[start : start + length], self.state
            part.step()
            start += length
        return loss


def _share_of_rate(sizes: Mapping[torch.Tensor, float]) -> float:
    """Return the part of the rate that deltas take, from the sizes of the weights that they are added to."""
    if not sizes:
        return 1.0
    part = root_mean_square(sizes) / _TYPICAL
    return min(float(f"{part**2:.1g}"), 1.0)  # rounded, so that noise in the weights hardly ever changes it


def root_mean_square(sizes: Mapping[torch.Tensor, float]) -> float:
    """Return the root mean square of all weights from those of each tensor; biases do not count."""
    squares = [(p.numel(), p.numel() * size**2) for p, size in sizes.items() if p.dim() > 1]
    return math.sqrt(sum(square for _, square in squares) / max(sum(count for count, _ in squares), 1))
