"""What we ask of any ``nn.Module``, ours or not: its logits, its penultimate features, and to be held still."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


def logits_of(model: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
    """The logits of a model that returns them, or an object with ``.logits``.

    Raises:
        ValueError: what came back is no tensor of shape ``(b, k)``.
    """
    out = model(x)
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != x.shape[0]:
        what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the model must return logits (b, k) for {x.shape[0]} images, not {what}")
    return out


def penultimate(model: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """The features that a model's last linear layer sees, differentiable with respect to ``x``.

    They are ``model.features(x)`` where that is a method; otherwise the input of the linear layer that ran last. (In
    torchvision's AlexNet and VGG ``features`` is a stage of the network and not its penultimate layer.)

    Raises:
        ValueError: the model has neither.
    """
    method = getattr(model, "features", None)
    if callable(method) and not isinstance(method, nn.Module):
        return cast(Tensor, method(x))
    seen: list[Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = inputs[:1]

    hooks = [m.register_forward_pre_hook(remember) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(f"{type(model).__name__} ran no nn.Linear and has no features(): no penultimate features")
    return seen[0]


@contextlib.contextmanager
def still(
    models: Sequence[nn.Module], *, freeze: bool, device: torch.device | None = None
) -> Generator[None, None, None]:
    """Hold models still: eval mode, full precision, the global random state kept; everything is put back.

    In eval mode batch normalisation uses its running statistics, which do not drift, and dropout is off. Full
    precision means float32 also under autocast, and convolutions and matrix products without TensorFloat-32: the signs
    of small gradients matter to those who call this.

    Args:
        models: what is held.
        freeze: whether the parameters need no gradient, which saves half of the work where only pixels do.
        device: where the work is done; by default where the first parameter is.

    Raises:
        TypeError: a parameter is of lower precision than float32.
    """
    parameters = [(name, p) for model in models for name, p in model.named_parameters()]
    for name, parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"parameter {name!r} is {parameter.dtype}; float32 is needed here: pass model.float()")
    device = device or next((p.device for _, p in parameters), torch.device("cpu"))
    modes = [(module, module.training) for model in models for module in model.modules()]
    frozen = [p for _, p in parameters if p.requires_grad] if freeze else []
    try:
        for model in models:
            model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(False),
            torch.enable_grad(),
            _without_tf32(device),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Generator[None, None, None]:
    """IEEE float32 in convolutions and matrix products of a GPU, whose default rounds the inputs to 10 bits."""
    if device.type != "cuda":
        yield
        return
    switches = (getattr(torch.backends.cudnn, "conv"), torch.backends.cuda.matmul)  # noqa: B009
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def weights_hash(model: nn.Module) -> str:
    """sha256 over the names, shapes and values of a model's parameters and buffers."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(f"{name}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
