"""The same network, cheaper: what friendly noise calls twenty times for every image.

In eval mode a batch normalisation behind a convolution is a factor and an offset per channel, and so is a division by
a standard deviation in front of one; both go into the convolution's weights. What is left runs channels-last, which
is what convolutions on processors and on tensor cores are written for.

Which layers belong together is not guessed from names or from the order in which modules were registered: the network
is run once on a few images, and every operation that touches a layer's output is looked at. A pair is folded only if
nothing but the second layer ever sees what the first one made. While the folded network is in use, every pair checks at
every call that this is still so, and where it is not (a network whose path depends on its input), or where the logits
of the folded network are not those of the original, the original does the work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from friends.modules import logits_of

Logits = Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b k"]]

Precision = Literal["auto", "float32", "bfloat16"]

PROBE = 4
"""How many images the network is looked at with."""

TOLERANCE = 1e-3
"""How far folded logits may be from the original's, relative to their spread: above rounding, below mistakes."""


def lean(model: nn.Module, x: Float[Tensor, "b c h w"], precision: Precision = "float32") -> Logits:
    """The logits of ``model``, made as cheaply as is safe.

    Args:
        model: held still (:func:`friends.modules.still`): eval mode, no gradients of parameters. It is not changed; a
            folded copy of it is used as long as the returned function is.
        x: some images that it takes, at least one.
        precision: of convolutions and matrix products; ``"auto"`` is bfloat16 where the device multiplies it faster.

    Returns:
        A function of images that equals ``logits_of(model, images)`` up to rounding.
    """
    half = precision == "bfloat16" or (precision == "auto" and _multiplies_bfloat16(x.device))
    return _Lean(model, x[:PROBE], half=half)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: on GPUs that have it, and processors with matrix units for it.

    Without those, a processor takes ten times as long for it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])
    return device.type == "cpu" and bool(capabilities().get("amx_bf16", False))


class _Lean:
    """Calls the folded network, or for good the original once the folded one is found wanting."""

    def __init__(self, model: nn.Module, x: Tensor, *, half: bool) -> None:
        self.model, self.folded, self.half = model, _folded(model, x), half

    def __call__(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            return self._logits(x).to(x.dtype)

    def _logits(self, x: Tensor) -> Tensor:
        if self.folded is not None:
            try:
                return self.folded(x)
            except _OtherPathError:
                self.folded = None
        return logits_of(self.model, x)


class _OtherPathError(Exception):
    """A folded layer was called in another way than when the network was looked at."""


class _Folded:
    """A copy of a network in which pairs of layers are one."""

    def __init__(self, model: nn.Module, pairs: Sequence[_Pair]) -> None:
        self.model, self.pairs = model, pairs

    def __call__(self, x: Tensor) -> Tensor:
        out = logits_of(self.model, x)
        if any(pair.made is not None for pair in self.pairs):
            raise _OtherPathError
        return out


def _folded(model: nn.Module, x: Tensor) -> _Folded | None:
    """The folded copy, or None if nothing can be folded or the copy does not say the same."""
    try:
        copied = copy.deepcopy(model)
    except Exception:  # modules that cannot be copied are their authors' right
        return None
    with torch.no_grad():
        pairs, expected = _fold_all(copied, x)
        if not pairs:
            return None
        folded = _Folded(copied, pairs)
        try:
            found = folded(x.contiguous(memory_format=torch.channels_last))
        except _OtherPathError:
            return None
        spread = (expected - expected.mean(1, keepdim=True)).abs().amax()
        same = bool(((found - expected).abs().amax() <= TOLERANCE * spread.clamp(min=1e-6)).all())
    return folded if same else None


class _Pair:
    """Two layers that only mean the right thing one behind the other: the second checks what it is given."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.made: Tensor | None = None
        first.register_forward_hook(self._note)
        second.register_forward_pre_hook(self._check)

    def _note(self, _: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
        if self.made is not None:
            raise _OtherPathError
        self.made = out

    def _check(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs or inputs[0] is not self.made:
            raise _OtherPathError
        self.made = None


def _fold_all(model: nn.Module, x: Tensor) -> tuple[list[_Pair], Tensor]:
    """Fold every pair of neighbours that can be folded; they are found before the first is changed.

    Returns:
        The pairs, and what the network says of the images unfolded.
    """
    pairs: list[_Pair] = []
    with _Watching(model) as watching:
        logits = logits_of(model, x)
    for first, second, between in watching.neighbours():
        if _plain_convolution(first) and type(second) is nn.BatchNorm2d and _fixed(second):
            _fold_behind(cast(nn.Conv2d, first), second)
        elif _plain_convolution(second) and (moments := _moments(first, x, between)) is not None:
            _fold_before(first, cast(nn.Conv2d, second), *moments)
        else:
            continue
        pairs.append(_Pair(first, second))
    return pairs, logits


class _Watching(TorchDispatchMode):
    """Notes which layer made and which used every tensor while a network runs.

    Only layers without parts and without hooks of their own are told apart; what happens elsewhere counts as used by
    ``None``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = [m for m in model.modules() if not list(m.children()) and not _hooked(m)]
        self.calls: dict[nn.Module, int] = {}
        self.made: list[tuple[nn.Module, Tensor]] = []
        self.given: dict[nn.Module | None, Tensor] = {}
        self.users: dict[int, set[nn.Module | None]] = {}
        self._alive: list[Tensor] = []  # an id names a tensor only as long as it lives
        self._inside: nn.Module | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watching:
        for layer in self.layers:
            self._hooks += [layer.register_forward_pre_hook(self._enters), layer.register_forward_hook(self._leaves)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def neighbours(self) -> list[tuple[nn.Module, nn.Module, Tensor]]:
        """Pairs of layers, each called once, of which the second alone uses what the first one made, and that itself.

        With what is between them.
        """
        once = {layer for layer, calls in self.calls.items() if calls == 1}
        found: list[tuple[nn.Module, nn.Module, Tensor]] = []
        for layer, out in self.made:
            users = self.users.get(id(out), set())
            if layer in once and len(users) == 1:
                (user,) = users
                if user in once and self.given.get(user) is out:
                    found.append((layer, user, out))
        return found

    def _enters(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside = layer
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            self.given[layer] = inputs[0]

    def _leaves(self, layer: nn.Module, _: tuple[Any, ...], out: Any) -> None:
        self._inside = None
        if isinstance(out, Tensor):
            self.made.append((layer, out))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for used in tree_leaves((args, kwargs)):
            if isinstance(used, Tensor):
                self.users.setdefault(id(used), set()).add(self._inside)
                self._alive.append(used)
        return func(*args, **kwargs)


def _hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its forward."""
    own = vars(module)
    return "forward" in own or any(
        own.get(hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )


def _plain_convolution(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d


def _fixed(norm: nn.BatchNorm2d) -> bool:
    """Whether a batch normalisation uses its running statistics."""
    return not norm.training and norm.running_mean is not None and norm.running_var is not None


def _fold_behind(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """``norm(conv(x))`` as one convolution: a factor and an offset for each output channel, computed in float64."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    factor = (variance + norm.eps).rsqrt()
    weight, bias = cast("Tensor | None", norm.weight), cast("Tensor | None", norm.bias)  # None where affine=False
    factor = factor if weight is None else factor * weight.double()
    offset = -mean * factor if bias is None else bias.double() - mean * factor
    if conv.bias is not None:
        offset = offset + conv.bias.double() * factor
    _set(conv, conv.weight.double() * factor.view(-1, 1, 1, 1), offset)
    norm.forward = _unchanged  # pyright: ignore[reportAttributeAccessIssue]


def _fold_before(norm: nn.Module, conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    """``conv((x - mean) / std)`` with the division in the weights.

    The subtraction stays: a convolution pads with zeros, and those are pixels of the mean colour.
    """

    def centred(x: Tensor) -> Tensor:
        # a mean for every pixel: to repeat one along channels that are last in memory takes three times as long
        whole = mean.expand(1, *x.shape[1:]).contiguous(memory_format=torch.channels_last)
        return x - whole

    norm.forward = centred
    _set(conv, conv.weight.double() / std.double(), None if conv.bias is None else conv.bias.double())


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    """New parameters: the old ones may be shared with another layer."""
    like = conv.weight
    conv.weight = nn.Parameter(weight.to(like).contiguous(memory_format=torch.channels_last), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.to(like), requires_grad=False)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _moments(module: nn.Module, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation, if what a layer did to the images was to subtract one and divide by the other."""
    mean, std = getattr(module, "mean", None), getattr(module, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor) or not mean.numel() == std.numel() == x.shape[1]:
        return None
    mean, std = mean.detach().view(1, -1, 1, 1), std.detach().view(1, -1, 1, 1)
    return (mean, std) if torch.equal((x - mean) / std, out) else None
