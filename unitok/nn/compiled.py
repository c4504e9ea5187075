"""A tokenizer made fast for many pictures of one size: its encoder and decoder compiled, in float32 or bfloat16.

What makes it fast, in the order of what it brings on CPUs: layouts with channels last and weights packed for them
(inductor's freezing); few pictures at once, so that a layer finds in the caches what the last one wrote; memory that
stays with the process, instead of being returned and zeroed again for every layer; group norm and activation in two
passes over the data; nearest-neighbour upsampling within the convolution behind it. The codes are those of the plain
tokenizer; in bfloat16 the convolutions round, but codes are still chosen in float32.

Shapes: B pictures, H x W pixels, h x w positions, N tokens, C channels, G groups.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import functools
import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.nn.taming import Upsample

DTYPES = ("float32", "bfloat16", "auto")
PIXELS = 2**16  # of the pictures that a CPU takes at once
WORTH = 1.1  # bfloat16 must be so many times as fast as float32 for "auto" to take it
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def speak(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Compiled:
    """`encode` and `decode` of an image tokenizer for pictures of one size.

    Each is compiled when it is first called, which takes about 20 seconds: it pays from about a hundred pictures of
    256 pixels a side on. Where that fails, as it does without a C++ compiler, one line says so and the rest is as
    described above, but not compiled. The tokenizer itself is left as it is. Inductor's files go into a temporary
    folder, or into $TORCHINDUCTOR_CACHE_DIR, which makes the next time shorter. On a CPU the whole process keeps the
    memory that it frees from then on.

    Args:
        tokenizer: an ImageTokenizer.
        dtype: "float32", "bfloat16", or "auto": the one in which this machine convolves faster, measured in a moment.
        height, width: of the pictures; by default the tokenizer's image_size.
        batch_size: pictures that mostly come at once. The compiled network takes so many, on a CPU those of 2**16
            pixels at most; what is missing in the last ones is filled up.
        say: takes lines about what is going on; by default they go to stderr.
    """

    def __init__(
        self, tokenizer: Any, dtype: str = "float32", *, height: int | None = None, width: int | None = None,
        batch_size: int = 64, say: Callable[[str], None] = speak,
    ):  # fmt: skip
        self.tokenizer, self.say = tokenizer, say
        self.size = (height or tokenizer.image_size, width or tokenizer.image_size)
        self.grid = tuple(tokenizer.grid(*self.size))
        self.dtype = choose_dtype(dtype, tokenizer, say)
        on_cpu = tokenizer.device.type == "cpu"
        fit = max(1, PIXELS // (self.size[0] * self.size[1]))
        self.at_once = min(batch_size, fit) if on_cpu else batch_size
        if on_cpu:
            keep_memory()
        self.plain = _converted(tokenizer, self.dtype)
        self.calls: dict[str, Callable[[Tensor], Tensor]] = {}

    @torch.no_grad()  # as when compiling: another mode would be compiled again, without freezing
    def encode(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [0, 1] -> int64 [B, N]. Pictures of another size are encoded too, not compiled."""
        self.tokenizer.check_images(images)
        images = images.to(self.plain.device, self.dtype)
        if tuple(images.shape[2:]) == self.size:
            return self._all("encode", images)
        return torch.cat([_call(self.plain, "encode")(_last(image)) for image in images.split(1)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, N] -> float [B, 3, H, W] in [0, 1]."""
        self.tokenizer.check_codes(codes, self.grid)
        return self._all("decode", codes.to(self.plain.device))

    def _all(self, verb: str, batch: Tensor) -> Tensor:
        """`at_once` at a time; the last ones are filled up with zeros, and those cut off again."""
        made = []
        for some in batch.split(self.at_once):
            count = len(some)
            if count < self.at_once:
                some = torch.cat([some, some.new_zeros(self.at_once - count, *some.shape[1:])])
            if verb not in self.calls:
                self.calls[verb] = self._compiled(verb, _last(some))
            made.append(self.calls[verb](_last(some))[:count])
        return torch.cat(made)

    def _compiled(self, verb: str, example: Tensor) -> Callable[[Tensor], Tensor]:
        begun = time.perf_counter()
        where = f"{self.size[0]} x {self.size[1]} pixels in {str(self.dtype).removeprefix('torch.')}"
        try:
            import torch._inductor.config as inductor

            _cache_folder()
            # freezing must be set while the network is traced too, so it cannot be an option of torch.compile
            with inductor.patch(freezing=True):
                run = torch.compile(_call(_fused(copy.deepcopy(self.plain)), verb, self.grid), dynamic=False)
                run(example)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.say(f"{verb} is not compiled for {where}, and slower: {reason}")
            return _call(self.plain, verb, self.grid)
        self.say(f"{verb} compiled for {where} in {time.perf_counter() - begun:.0f} s")
        return run


def choose_dtype(dtype: str, tokenizer: Any, say: Callable[[str], None] = speak) -> torch.dtype:
    """The torch type of that name; for "auto" the faster one on the tokenizer's device, and says so.

    ValueError for another name, or bfloat16 where the tokenizer does not say what of it must stay in float32.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if tokenizer.exact is None and dtype != "float32":
        line = f"{type(tokenizer).__name__} computes in float32 only"
        if dtype == "bfloat16":
            raise ValueError(f"{line}, got dtype {dtype!r}")
        say(line)
        return torch.float32
    if dtype != "auto":
        return getattr(torch, dtype)
    ratio = bfloat16_speed(tokenizer.device)
    chosen = torch.bfloat16 if ratio >= WORTH else torch.float32
    say(f"{str(chosen).removeprefix('torch.')}: bfloat16 convolutions are {ratio:.2g} times as fast as float32 here")
    return chosen


@torch.no_grad()
def bfloat16_speed(device: torch.device, runs: int = 5) -> float:
    """How many times as fast as in float32 a convolution is in bfloat16; a tenth of a second."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for run in range(runs + 1):
        for dtype in best:
            x = _last(torch.ones(1, 128, 64, 64, dtype=dtype, device=device))
            weight = _last(torch.ones(128, 128, 3, 3, dtype=dtype, device=device))
            begun = time.perf_counter()
            F.conv2d(x, weight, padding=1).sum().item()  # the number is waited for
            if run:  # the first one is slower
                best[dtype] = min(best[dtype], time.perf_counter() - begun)
    return best[torch.float32] / best[torch.bfloat16]


def keep_memory() -> None:
    """Have glibc keep what is freed: a buffer of megabytes is otherwise returned to the system after each layer, and
    mapped and zeroed again for the next, which costs a tenth to a quarter of the time. Other libraries: no change."""
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError, TypeError):
        pass


@functools.cache
def _cache_folder() -> None:
    """A place for inductor's files; it is gone with the process unless the user named one."""
    if CACHE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="unitok-", ignore_cleanup_errors=True)
        os.environ[CACHE] = folder.name
        atexit.register(folder.cleanup)


# ---- the network


def _converted(tokenizer: Any, dtype: torch.dtype) -> Any:
    """A copy with channels last and in `dtype`, but for the modules that choose codes."""
    own = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    for parameter in own.parameters():
        parameter.data = _last(parameter.data)
    if dtype != own.dtype:
        modules = dict(own.named_modules())
        exact = {name: modules[name] for name in own.exact if name in modules}
        for name in exact:
            own.set_submodule(name, nn.Identity())
        own.to(dtype)
        for name, module in exact.items():
            own.set_submodule(name, module)
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    # without its checks, which have been made, and in `dtype`: the vectors come out of a module in float32
    own.embed = functools.partial(_embed, own, dtype)
    return own


def _embed(tokenizer: Any, dtype: torch.dtype, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
    return inspect.unwrap(type(tokenizer).embed)(tokenizer, codes, grid).to(dtype)


def _call(tokenizer: Any, verb: str, grid: tuple[int, ...] | None = None) -> Callable[[Tensor], Tensor]:
    """Its encode or decode without the checks around them."""
    method = inspect.unwrap(getattr(type(tokenizer), verb))

    def call(batch: Tensor) -> Tensor:
        return method(tokenizer, batch) if verb == "encode" else method(tokenizer, batch, grid)

    # code of its own: dynamo compiles the same code object for a few callers only, and then goes on without a word
    call.__code__ = call.__code__.replace()
    return call


def _last(batch: Tensor) -> Tensor:
    return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch


def _fused(module: nn.Module) -> nn.Module:
    """The same with layers that compile to less work, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm) and child.affine:
            setattr(module, name, GroupNorm(child))
        elif isinstance(child, Upsample):
            setattr(module, name, UpsampledConv(child.conv))
        else:
            _fused(child)
    return module


class GroupNorm(nn.Module):
    """nn.GroupNorm for channels that lie last: sums and squares a channel, then one multiplication and addition.

    As inductor takes the original apart, a fifth of the encoder's time goes into scalar loops over groups. Sums between
    channels and groups are matrix products here, since what stands behind those is computed once, not for each pixel.
    """

    mean: Tensor  # [C, G]: of channels, by group
    spread: Tensor  # [G, C]: to the channels of each
    scale: Tensor  # [G, C]: the same, times the weights
    shift: Tensor  # [C]

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.eps = norm.eps
        own = norm.num_channels // norm.num_groups
        spread = torch.eye(norm.num_groups, device=norm.weight.device).repeat_interleave(own, 1)
        self.register_buffer("mean", spread.T / own)
        self.register_buffer("spread", spread)
        self.register_buffer("scale", spread * norm.weight.float())
        self.register_buffer("shift", norm.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.movedim(1, -1).float()  # [B, H, W, C]
        # moments about a value of the group, lest the difference of large squares lose the variance
        origin = pixels[:, 0, 0] @ self.mean @ self.spread  # [B, C]
        moved = pixels - origin[:, None, None]
        count = x.shape[2] * x.shape[3]
        first = moved.sum(2).sum(1) / count @ self.mean  # [B, G]
        second = moved.square().sum(2).sum(1) / count @ self.mean
        factor = (second - first.square() + self.eps).rsqrt()
        scale = factor @ self.scale  # [B, C]
        shift = self.shift - (first * factor) @ self.scale
        return (moved * scale[:, None, None] + shift[:, None, None]).to(x.dtype).movedim(-1, 1)


class UpsampledConv(nn.Module):
    """Doubling by nearest neighbours and a 3 x 3 convolution, as one of 2 x 2 for each of the four places within a
    pixel: 4/9 of the multiplications, since pixels that are equal share the sum of their weights."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        rows = _pairs(conv.weight.double(), 2)  # [2, O, C, 2, 3], by the place's row
        weight = torch.stack([_pairs(row, 3) for row in rows])  # [2, 2, O, C, 2, 2]
        self.weight = nn.Parameter(_last(weight.flatten(0, 2).to(conv.weight.dtype)), requires_grad=False)
        assert conv.bias is not None
        self.bias = nn.Parameter(conv.bias.repeat(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        four = F.conv2d(x, self.weight, self.bias, padding=1).movedim(1, -1).unflatten(3, (2, 2, -1))
        places = [  # four: [B, H + 1, W + 1, 2, 2, O]
            torch.stack([four[:, i : i + height, j : j + width, i, j] for j in range(2)], 3) for i in range(2)
        ]
        return torch.stack(places, 2).flatten(3, 4).flatten(1, 2).movedim(-1, 1)  # [B, O, 2 H, 2 W]


def _pairs(weight: Tensor, axis: int) -> Tensor:
    """Three weights on an axis -> two, for the first and for the second of two equal neighbours: [2, ...]."""
    before, here, after = weight.unbind(axis)
    return torch.stack([torch.stack([before, here + after], axis), torch.stack([before + here, after], axis)])
