"""Vectors to codes and back: the quantizers of the VQGAN family behind one interface.

    vq      nearest code, codes learnt by gradient (van den Oord et al. 2017; taming's legacy weights on request)
    ema     nearest code, codes as moving averages of what falls to them; vector-quantize-pytorch ("vqp")
    simvq   a frozen Gaussian table behind one learnt linear map (Zhu et al. 2024, arXiv 2411.02038); vqp
    rvq     `depth` codes a position, each of what the ones before it left over (Lee et al. 2022); vqp
    gumbel  logits over codes, a Gumbel softmax in training (taming's GumbelQuantize)
    fsq     a few levels a channel (Mentzer et al. 2023, arXiv 2309.15505); vqp
    lfq     the sign of every channel, entropy terms (Yu et al. 2023, arXiv 2310.05737); vqp
    bsq     the same on the unit sphere (Zhao et al. 2024, arXiv 2406.07548); vqp

Shapes: B images, n positions, K codes a position, D size of a code's vector, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

from unitok.nn.pretrained import lacking

ROWS = 512  # positions compared with all codes at once: a [B*n, V] table would not fit the caches
JOINT_BITS = 10  # entropy terms run over all values of at most so many bits; longer codes are taken in pieces
NAMES = ("vq", "ema", "simvq", "rvq", "gumbel", "fsq", "lfq", "bsq")

Quantized = tuple[Tensor, Tensor, Tensor]


class Quantizer(nn.Module):
    """Attributes: `sizes`, of the codebooks; `books`, for each of the K codes of a position the index of its codebook.

    `dim` is the size of the vectors that go in and, but for gumbel's and rvq's, of those that come out.
    """

    sizes: tuple[int, ...]
    books: tuple[int, ...] = (0,)
    dim: int

    def forward(self, z: Tensor, step: int) -> Quantized:
        """Training: float [B, n, D] -> (vectors with gradients [B, n, D], int64 codes [B, n, K], scalar loss)."""
        raise lacking(self, "forward")

    def encode(self, z: Tensor) -> Tensor:
        """float [B, n, D] -> int64 [B, n, K], without noise."""
        raise lacking(self, "encode")

    def vectors(self, codes: Tensor) -> Tensor:
        """int64 [B, n, K] -> float [B, n, D]."""
        raise lacking(self, "vectors")


class VQ(Quantizer):
    """Args: beta weighs the commitment of vectors to their codes; `legacy`, as in taming's released code, the codes'
    term instead. normalize: lookup by the angle (ViT-VQGAN, LlamaGen). revive_after: a code that so many steps did not
    use becomes a vector of the batch; 0 never does."""

    unused: Tensor  # int64 [V]: steps since each code was used; there only where codes are revived

    def __init__(
        self, size: int, dim: int, normalize: bool = False, beta: float = 0.25, legacy: bool = False,
        revive_after: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.sizes, self.dim = (size,), dim
        self.normalize, self.beta, self.legacy, self.revive_after = normalize, beta, legacy, revive_after
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        if normalize:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        if revive_after:
            self.register_buffer("unused", torch.zeros(size, dtype=torch.int64))  # steps

    def table(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1) if self.normalize else self.embedding.weight

    def encode(self, z: Tensor) -> Tensor:
        return nearest(z, self.table()).unsqueeze(-1)  # an angle does not depend on the length of z

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes.squeeze(-1), self.table())

    def forward(self, z: Tensor, step: int) -> Quantized:
        z = F.normalize(z, dim=-1) if self.normalize else z
        codes = self.encode(z.detach())
        if self.training and self.revive_after:
            self.revive(z.detach(), codes)
        chosen = self.vectors(codes)
        to_codes, to_vectors = F.mse_loss(z, chosen.detach()), F.mse_loss(chosen, z.detach())
        loss = to_codes + self.beta * to_vectors if self.legacy else to_vectors + self.beta * to_codes
        return straight_through(z, chosen), codes, loss

    @torch.no_grad()
    def revive(self, z: Tensor, codes: Tensor) -> None:
        """Count the steps since every code was used; codes that are due become vectors of the batch."""
        used = torch.bincount(codes.flatten(), minlength=self.sizes[0]) > 0
        together = dist.is_initialized() and dist.get_world_size() > 1
        if together:
            counts = used.long()
            dist.all_reduce(counts)
            used = counts > 0
        self.unused.copy_(torch.where(used, 0, self.unused + 1))
        due = (self.unused >= self.revive_after).nonzero().flatten()
        if len(due):
            rows = z.flatten(0, 1)
            new = rows[torch.randint(len(rows), (len(due),), device=rows.device)]
            if together:
                dist.broadcast(new, 0)
            self.embedding.weight[due] = new.to(self.embedding.weight.dtype)
            self.unused[due] = 0


class EMA(Quantizer):
    def __init__(self, size: int, dim: int, normalize: bool = False, beta: float = 0.25, revive_below: float = 0.0):
        super().__init__()
        self.sizes, self.dim, self.normalize = (size,), dim, normalize
        self.layer = VectorQuantize(
            dim, size, decay=0.99, use_cosine_sim=normalize, commitment_weight=beta, rotation_trick=False,
            threshold_ema_dead_code=revive_below,
        )  # fmt: skip

    def table(self) -> Tensor:
        return self.layer._codebook.embed[0]

    def encode(self, z: Tensor) -> Tensor:
        return nearest(z, self.table()).unsqueeze(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes.squeeze(-1), self.table())

    def forward(self, z: Tensor, step: int) -> Quantized:
        chosen, codes, loss = self.layer(z)
        return chosen, codes.unsqueeze(-1), loss.sum()


class SimulatedVQ(Quantizer):
    def __init__(self, size: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.sizes, self.dim = (size,), dim
        self.layer = SimVQ(dim, size, input_to_quantize_commit_loss_weight=beta)

    def encode(self, z: Tensor) -> Tensor:
        return nearest(z, self.layer.codebook).unsqueeze(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes.squeeze(-1), self.layer.codebook)

    def forward(self, z: Tensor, step: int) -> Quantized:
        chosen, codes, loss = self.layer(z)
        return chosen, codes.unsqueeze(-1), loss


class RVQ(Quantizer):
    def __init__(self, size: int, dim: int, depth: int, beta: float = 0.25, revive_below: float = 0.0):
        super().__init__()
        self.sizes, self.books, self.dim = (size,) * depth, tuple(range(depth)), dim
        self.layer = ResidualVQ(
            dim=dim, num_quantizers=depth, codebook_size=size, decay=0.99, commitment_weight=beta, rotation_trick=False,
            threshold_ema_dead_code=revive_below,
        )  # fmt: skip

    def tables(self) -> list[Tensor]:
        return [layer._codebook.embed[0] for layer in self.layer.layers]

    def encode(self, z: Tensor) -> Tensor:
        codes = []
        for table in self.tables():
            codes.append(nearest(z, table))
            z = z - F.embedding(codes[-1], table)
        return torch.stack(codes, dim=-1)

    def vectors(self, codes: Tensor) -> Tensor:
        return sum(F.embedding(c, t) for c, t in zip(codes.unbind(-1), self.tables(), strict=True))  # type: ignore

    def forward(self, z: Tensor, step: int) -> Quantized:
        chosen, codes, losses = self.layer(z)
        return chosen, codes, losses.sum()


class Gumbel(Quantizer):
    """Args: temperature: first and last, falling geometrically over `temperature_steps`; kl_weight: of the divergence
    of the codes' distribution from the uniform one, in nats a position."""

    def __init__(
        self, size: int, dim: int, temperature: Sequence[float] = (1.0, 1 / 16), temperature_steps: int = 10_000,
        kl_weight: float = 5e-4,
    ):  # fmt: skip
        super().__init__()
        self.sizes, self.dim = (size,), dim
        self.temperature, self.temperature_steps, self.kl_weight = tuple(temperature), temperature_steps, kl_weight
        self.proj = nn.Conv2d(dim, size, 1)
        self.embed = nn.Embedding(size, dim)

    def logits(self, z: Tensor) -> Tensor:
        return F.linear(z, self.proj.weight[:, :, 0, 0], self.proj.bias)  # [B, n, V]

    def encode(self, z: Tensor) -> Tensor:
        return self.logits(z).argmax(-1, keepdim=True)  # never the noise that the published encode adds

    def vectors(self, codes: Tensor) -> Tensor:
        return self.embed(codes.squeeze(-1))

    def forward(self, z: Tensor, step: int) -> Quantized:
        logits = self.logits(z)
        soft = F.gumbel_softmax(logits, tau=self.tau(step), dim=-1)
        divergence = (logits.log_softmax(-1).exp() * logits.log_softmax(-1)).sum(-1) + math.log(self.sizes[0])
        return soft @ self.embed.weight, logits.argmax(-1, keepdim=True), self.kl_weight * divergence.mean()

    def tau(self, step: int) -> float:
        first, last = self.temperature
        return first * (last / first) ** min(1.0, step / max(1, self.temperature_steps))


class Finite(Quantizer):
    """fsq. The codes of one step of rounding are kept: putting vectors through it again would move them."""

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.sizes, self.dim = (math.prod(levels),), len(levels)
        self.layer = FSQ(list(levels))
        everything = torch.arange(self.sizes[0], dtype=torch.int32)
        if not everything.is_meta and not torch.equal(
            self.layer.codes_to_indices(self.layer.implicit_codebook), everything
        ):
            raise ValueError(f"levels {tuple(levels)} cannot be told apart in float32; use fewer or smaller ones")

    def encode(self, z: Tensor) -> Tensor:
        return self.layer(z)[1].long().unsqueeze(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.layer.indices_to_codes(codes.squeeze(-1))

    def forward(self, z: Tensor, step: int) -> Quantized:
        chosen, codes = self.layer(z)
        return chosen, codes.long().unsqueeze(-1), z.new_zeros(())


class Signs(Quantizer):
    """lfq and bsq: one bit a channel; `bits` says how many channels make each of the K codes of a position.

    Args:
        spherical: bsq: vectors on the unit sphere, each code's by itself.
        lsb_first: the first channel is a code's lowest bit (Open-MAGVIT2), else its highest (vqp, Show-o).
        entropy_weight: of the mean entropy of a vector's soft assignment less the entropy of their mean; over pieces
            of at most JOINT_BITS bits, since 2**18 codes a position would fill the memory.
        entropy_temperature: of that assignment. The published 0.01 feels only vectors within 0.02 of a border.
        beta: commitment, |z - sign z|^2.
    """

    def __init__(
        self, bits: Sequence[int], spherical: bool = False, lsb_first: bool = False, entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01, beta: float = 0.25,
    ):  # fmt: skip
        super().__init__()
        self.bits, self.spherical, self.lsb_first = tuple(bits), spherical, lsb_first
        self.entropy_temperature = entropy_temperature
        self.sizes, self.books = tuple(2**b for b in bits), tuple(range(len(bits)))
        self.dim = sum(bits)
        self.pieces = [piece for b in bits for piece in _pieces(b)]
        options = {"spherical": spherical, "entropy_loss_weight": entropy_weight, "commitment_loss_weight": beta}
        self.layers = nn.ModuleList(LFQ(dim=b, channel_first=False, **options) for b in self.pieces)
        for layer in self.layers:  # a constant: it does not belong into a file
            layer._non_persistent_buffers_set.add("mask")

    def encode(self, z: Tensor) -> Tensor:
        return bits_to_codes(z > 0, self.bits, self.lsb_first)

    def vectors(self, codes: Tensor) -> Tensor:
        signs = codes_to_bits(codes, self.bits, self.lsb_first).float() * 2 - 1
        return self.scaled(signs)

    def scaled(self, signs: Tensor) -> Tensor:
        if not self.spherical:
            return signs
        parts = zip(signs.split(self.bits, -1), self.bits, strict=True)
        return torch.cat([part / math.sqrt(b) for part, b in parts], -1)

    def forward(self, z: Tensor, step: int) -> Quantized:
        loss = z.new_zeros(())
        for layer, part in zip(self.layers, z.split(self.pieces, -1), strict=True):
            loss = loss + layer(part, inv_temperature=1 / self.entropy_temperature).entropy_aux_loss
        if self.spherical:
            z = torch.cat([F.normalize(part, dim=-1) for part in z.split(self.bits, -1)], -1)
        chosen = self.scaled(torch.where(z > 0, 1.0, -1.0))
        return straight_through(z, chosen), self.encode(z), loss


def make(
    name: str, *, size: int, dim: int, levels: Sequence[int] = (), bits: Sequence[int] = (), depth: int = 1,
    **options: Any,
) -> Quantizer:  # fmt: skip
    """The quantizer called `name`; ValueError where its sizes cannot be."""
    if name not in NAMES:
        raise ValueError(f"unknown quantizer {name!r}; known: {', '.join(NAMES)}")
    if name == "fsq":
        if not levels or any(n < 3 for n in levels):
            raise ValueError(f"quantizer fsq needs levels, integers of 3 or more, got {tuple(levels)}")
        return Finite(levels)
    if name in ("lfq", "bsq"):
        if not bits or any(not 1 <= b <= 24 for b in bits):
            raise ValueError(f"quantizer {name} needs bits, 1 to 24 for each code of a position, got {tuple(bits)}")
        return Signs(bits, spherical=name == "bsq", **options)
    if size < 2 or dim < 1:
        raise ValueError(f"quantizer {name} needs codebook_size >= 2 and code_dim >= 1, got {size} and {dim}")
    if name == "rvq":
        if depth < 1:
            raise ValueError(f"quantizer rvq needs depth >= 1, got {depth}")
        return RVQ(size, dim, depth, **options)
    return {"vq": VQ, "ema": EMA, "simvq": SimulatedVQ, "gumbel": Gumbel}[name](size, dim, **options)


# ---- numbers


@torch.no_grad()
def nearest(z: Tensor, table: Tensor) -> Tensor:
    """float [..., D] and [V, D] -> int64 [...]: the row of least Euclidean distance, found ROWS vectors at a time.

    In float32 whatever the types: half precision would move vectors across the borders of their cells.
    """
    table = table.float()
    half = table.square().sum(-1) / 2  # [V]
    found = [torch.addmm(half, rows, table.T, alpha=-1).argmin(-1) for rows in z.float().flatten(0, -2).split(ROWS)]
    return torch.cat(found).unflatten(0, z.shape[:-1])


def straight_through(z: Tensor, chosen: Tensor) -> Tensor:
    """`chosen`, with the gradient of `z`."""
    return z + (chosen - z).detach()


def bits_to_codes(bits: Tensor, sizes: Sequence[int], lsb_first: bool = False) -> Tensor:
    """bool [..., sum(sizes)] -> int64 [..., len(sizes)]."""
    codes = [(part.long() << _places(part.shape[-1], lsb_first, bits.device)).sum(-1) for part in bits.split(sizes, -1)]
    return torch.stack(codes, -1)


def codes_to_bits(codes: Tensor, sizes: Sequence[int], lsb_first: bool = False) -> Tensor:
    """int64 [..., len(sizes)] -> bool [..., sum(sizes)]."""
    parts = [
        (code.unsqueeze(-1) >> _places(b, lsb_first, codes.device)) & 1
        for code, b in zip(codes.unbind(-1), sizes, strict=True)
    ]
    return torch.cat(parts, -1).bool()


def _places(bits: int, lsb_first: bool, device: torch.device) -> Tensor:
    places = torch.arange(bits, device=device)
    return places if lsb_first else places.flip(0)


def _pieces(bits: int) -> list[int]:
    """`bits` in as few and as equal parts of at most JOINT_BITS as possible."""
    count = math.ceil(bits / JOINT_BITS)
    return [bits // count + (i < bits % count) for i in range(count)]
