"""The contract of image tokenizers: pictures -> codes -> pictures, and the checks that every tokenizer shares.

Shapes: B images, 3 channels, H x W pixels, N tokens (the product of the grid), M positions, D embedding size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from unitok import checkpoint
from unitok.manifest import Manifest
from unitok.nn.pretrained import Pretrained, lacking, read_section

FITS = ("squash", "crop")
STRIP = 16  # longer side over shorter side, beyond which a picture is cropped before it is scaled
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class ImageTokenizer(Pretrained):
    """Base of every image tokenizer.

    `encode`, `decode` and `embed` of a subclass are wrapped: their input is checked against the contract and moved to
    the module's device (and floating-point type), so a subclass holds only the computation. `encode` and `decode` run
    without gradients; training goes through `loss`.
    """

    image_size: int
    resize: str = "squash-bicubic"
    codebook_sizes: tuple[int, ...]
    token_order: str = "raster"  # another name where tokens come otherwise: it changes whenever the order does
    vocabulary: str = "codes"  # "codes": new rows in the LLM; "text": words, through to_text
    stages: tuple[str, ...] = ("main",)  # (): nothing is trained
    text_stages: tuple[str, ...] = ()  # those whose loss reads batch["texts"]
    exact: tuple[str, ...] | None = None  # what stays in float32 where the rest is bfloat16: modules that choose codes
    fully_convolutional: bool = False  # True: any grid of positive height and width can be decoded
    stride: int  # pixels a position and side, of a fully convolutional one
    tokens: int = 0  # N of one that takes pictures of image_size alone; 0: it has a grid of its own
    provenance: Mapping[str, Any] = MappingProxyType({})  # where converted weights came from; only informs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, wrap in (("encode", _checked_encode), ("decode", _checked_decode), ("embed", _checked_embed)):
            if name in cls.__dict__:
                setattr(cls, name, wrap(cls.__dict__[name]))

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """The grid of an image of height x width pixels (default: image_size). ValueError for an impossible size.

        A fully convolutional tokenizer has one position a `stride`, one of `tokens` these; others define their own.
        """
        if not self.fully_convolutional and not self.tokens:
            raise lacking(self, "grid")
        height, width = (self.image_size if n is None else n for n in (height, width))
        if not self.fully_convolutional:
            if (height, width) != (self.image_size, self.image_size):
                raise ValueError(f"image height and width must be {self.image_size}, got {height} x {width}")
            return (self.tokens,)
        if min(height, width) < self.stride or height % self.stride or width % self.stride:
            raise ValueError(
                f"image height and width must be positive multiples of {self.stride}, got {height} x {width}"
            )
        return height // self.stride, width // self.stride

    def token_codebook(self, grid: tuple[int, ...] | None = None) -> Tensor:
        """int64 [N]: the index of the codebook that token j is drawn from."""
        return torch.zeros(math.prod(self.check_grid(grid)), dtype=torch.int64)

    def preprocess(self, image: Image.Image) -> Tensor:
        """A PIL picture of any mode and size -> float [3, image_size, image_size] in [0, 1], by the `resize` rule."""
        return to_tensor(fit(image, self.image_size, self.resize))

    def encode(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [0, 1] -> int64 [B, N]; deterministic in eval mode."""
        raise lacking(self, "encode")

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """int64 [B, N] -> float [B, 3, H, W] in [0, 1]; deterministic in eval mode.

        NotImplementedError where codes need a detokenizer.
        """
        self.check_codes(codes, grid)
        raise NotImplementedError(f"{type(self).__name__} has no decode(): its codes need a detokenizer")

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """int64 [B, N] -> float [B, M, D]: what a detokenizer is conditioned on."""
        raise lacking(self, "embed")

    def to_text(self, codes: Tensor) -> list[str]:
        """int64 [B, N] -> B texts; only where `vocabulary` is "text"."""
        raise ValueError(f"{type(self).__name__} emits codes, not words: it has no to_text")

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """batch["images"]: float [B, 3, H, W] in [0, 1] -> (scalar, dict of detached scalars).

        In a stage of `text_stages`, batch["texts"] holds B strings, a caption of each picture.
        """
        raise lacking(self, "loss")

    def critic(self) -> nn.Module | None:
        """The adversary: a module with its own loss(batch, step); None where training has none."""
        return None

    @classmethod
    def tiny(cls) -> ImageTokenizer:
        """A small one for tests: no network, seconds on one core."""
        raise lacking(cls, "tiny")

    def check_grid(self, grid: tuple[int, ...] | None) -> tuple[int, ...]:
        """`grid` as a tuple (None: the grid at image_size). ValueError where this tokenizer cannot have it."""
        default = self.grid()
        if grid is None:
            return default
        grid = tuple(int(n) for n in grid)
        free = 2 if self.fully_convolutional else 0
        if len(grid) != len(default) or min(grid) < 1 or grid[free:] != default[free:]:
            expected = "(height, width)" + (f" + {default[2:]}" if default[2:] else "") if free else str(default)
            raise ValueError(f"grid {grid} does not fit {type(self).__name__}: expected {expected}")
        return grid

    def check_images(self, images: Tensor) -> None:
        """ValueError naming what is wrong, unless images is a finite float [B, 3, H, W] in [0, 1] of a usable size."""
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a torch tensor [B, 3, H, W], got {type(images).__name__}")
        if images.ndim != 4:
            raise ValueError(f"images must have 4 axes [B, 3, H, W], got shape {tuple(images.shape)}")
        if images.shape[1] != 3:
            raise ValueError(f"images must have 3 channels [B, 3, H, W], got shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
        self.grid(*images.shape[2:])
        if images.numel() == 0:
            raise ValueError(f"images must hold at least one picture, got shape {tuple(images.shape)}")
        low, high = (v.item() for v in torch.aminmax(images.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("images must be finite, got NaN or infinity")
        if low < 0 or high > 1:
            raise ValueError(f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}")

    def check_codes(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The grid of these codes. ValueError unless codes is int64 [B, N], each within its own codebook."""
        if not isinstance(codes, Tensor):
            raise ValueError(f"codes must be a torch tensor [B, N], got {type(codes).__name__}")
        if codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64, got {codes.dtype}")
        if codes.ndim != 2:
            raise ValueError(f"codes must have 2 axes [B, N], got shape {tuple(codes.shape)}")
        grid = self.check_grid(grid)
        if codes.shape[1] != math.prod(grid) or codes.shape[0] == 0:
            raise ValueError(f"codes must have shape [B, {math.prod(grid)}] for grid {grid}, got {tuple(codes.shape)}")
        books = self.token_codebook(grid)
        size = torch.tensor(self.codebook_sizes)[books].to(codes.device)
        bad = (codes < 0) | (codes >= size)
        if bad.any():
            b, j = bad.nonzero()[0].tolist()
            raise ValueError(
                f"code out of range: {codes[b, j].item()} at image {b}, token {j}; expected 0 to {size[j].item() - 1}"
            )
        return grid

    def manifest(self) -> Manifest:
        from unitok import tokenizers

        name = tokenizers.name_of(type(self))
        licence = self.provenance.get("licence")
        return Manifest(tokenizers={name: tokenizer_section(self)}, licences=[licence] if licence else [])

    @staticmethod
    def section_of(manifest: Manifest) -> dict[str, Any] | None:
        sections = list(manifest.tokenizers.values())
        return sections[0] if len(sections) == 1 else None

    @classmethod
    def check_section(cls, section: Mapping[str, Any], folder: Path) -> None:
        order = section.get("token_order", ImageTokenizer.token_order)
        if order != cls.token_order:
            raise ValueError(
                f"{folder}: its codes stand in the order {order!r}, those of {cls.__name__} in {cls.token_order!r}; "
                "use the version of unitok that made it, or train it again"
            )

    def take_section(self, section: Mapping[str, Any]) -> None:
        self.provenance = dict(section.get("source", {}))


def _checked_encode(method: Callable) -> Callable:
    @functools.wraps(method)
    @torch.no_grad()
    def encode(self: ImageTokenizer, images: Tensor) -> Tensor:
        self.check_images(images)
        return method(self, images.to(self.device, self.dtype))

    return encode


def _checked_decode(method: Callable) -> Callable:
    @functools.wraps(method)
    @torch.no_grad()
    def decode(self: ImageTokenizer, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        grid = self.check_codes(codes, grid)
        return method(self, codes.to(self.device), grid)

    return decode


def _checked_embed(method: Callable) -> Callable:
    @functools.wraps(method)
    def embed(self: ImageTokenizer, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        grid = self.check_codes(codes, grid)
        return method(self, codes.to(self.device), grid)

    return embed


# ---- folders


def tokenizer_section(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """What a manifest says about a tokenizer: enough to tell whether codes of one fit another."""
    from unitok import tokenizers

    return {
        "class": tokenizers.name_of(type(tokenizer)),
        **tokenizer.hashes(),
        "image_size": tokenizer.image_size,
        "resize": tokenizer.resize,
        "pixels": "float01",
        "codebook_sizes": list(tokenizer.codebook_sizes),
        "grid": list(tokenizer.grid()),
        "vocabulary": tokenizer.vocabulary,
        **({"token_order": tokenizer.token_order} if tokenizer.token_order != ImageTokenizer.token_order else {}),
        **({"token_codebook": tokenizer.token_codebook().tolist()} if len(tokenizer.codebook_sizes) > 1 else {}),
        **({"source": dict(tokenizer.provenance)} if tokenizer.provenance else {}),
    }


def load_tokenizer(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", *, revision: str | None = None
) -> ImageTokenizer:
    """A saved tokenizer (a folder or a Hub id), in eval mode. ValueError where its files do not fit together.

    A model folder with one image tokenizer stands for that tokenizer.
    """
    from unitok import tokenizers

    folder = tokenizer_folder(checkpoint.open_folder(path_or_hub_id, revision=revision))
    section = read_section(ImageTokenizer, folder)
    return tokenizers.get(section["class"]).from_pretrained(folder, map_location=device)


def tokenizer_folder(folder: Path) -> Path:
    """The folder itself, or the one tokenizer inside a model folder; ValueError where there are several."""
    inside = sorted(p for p in (folder / "image_tokenizers").glob("*") if p.is_dir())
    if len(inside) > 1:
        raise ValueError(f"{folder} has several image tokenizers: name one, such as {inside[0]}")
    return inside[0] if inside else folder


# ---- pictures


def open_image(source: str | Path | bytes) -> Image.Image:
    """A picture file (or its bytes) as an RGB image, upright. ValueError with one line where it cannot be read."""
    what = source if isinstance(source, (str, Path)) else "picture"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{what}: no such file") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{what}: cannot be read as a picture ({str(error).splitlines()[0]})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB: turned upright by EXIF, alpha laid over white, 16-bit grey scaled down."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a PIL image, got {type(image).__name__}")
    if min(image.size) < 1:
        raise ValueError(f"picture of {image.size[0]} x {image.size[1]} pixels is empty")
    if image.mode == "RGB" and not image.has_transparency_data and not image.getexif():
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert("RGB") would cut every value above 255
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pictures of mode {image.mode!r} have no agreed range; convert to 8-bit RGB first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, rule: str) -> Image.Image:
    """A picture as RGB of size x size pixels. Rules are FIT-FILTER.

    "squash" changes the aspect ratio; "crop" scales the shorter side to `size` and cuts the centre out.
    """
    how, resample = parse_resize(rule)
    image = to_rgb(image)
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if how == "squash":
        return image.resize((size, size), resample)
    if max(width, height) > STRIP * min(width, height):  # the ends are cropped anyway; scaled up they would be huge
        image = _centre(image, *(min(n, STRIP * min(width, height)) for n in image.size))
        width, height = image.size
    scale = size / min(width, height)
    return _centre(image.resize((round(width * scale), round(height * scale)), resample), size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def parse_resize(rule: str) -> tuple[str, Image.Resampling]:
    """ "crop-lanczos" -> ("crop", Resampling.LANCZOS); ValueError for a rule that does not exist."""
    how, _, name = str(rule).partition("-")
    if how not in FITS or name not in FILTERS:
        raise ValueError(
            f"unknown resize rule {rule!r}: expected FIT-FILTER with FIT one of {', '.join(FITS)} "
            f"and FILTER one of {', '.join(FILTERS)}"
        )
    return how, Image.Resampling[name.upper()]


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous().float() / 255


def to_pil(image: Tensor) -> Image.Image:
    """float [3, H, W] in [0, 1] -> RGB picture, values rounded to 8 bits."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"expected one image [3, H, W], got shape {tuple(image.shape)}")
    pixels = (image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
