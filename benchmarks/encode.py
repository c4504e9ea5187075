"""Pictures a second of the compiled tokenizers, beside the packages that others encode with.

    python benchmarks/encode.py                     five to eight minutes on 2 CPU cores, 6 GB of memory
    python benchmarks/encode.py --quick             small networks: a minute; the numbers mean little
    python benchmarks/encode.py --trained TOKENIZER ... --pictures DATA     what bfloat16 costs: see below

Pictures of 256 x 256, 8 at once, random weights of the published sizes, the same on both sides. Peers, each in a
process of its own: `dall_e.Encoder` (PyPI DALL-E 0.1) and diffusers' VQModel with the layers of taming's f16, in
float32 as they come. The sides take turns; `ours` and `peer` are medians of pictures a second, `spread` is (max - min)
/ median of our times. Compiling is not timed: `compile_s` tells it. `share_of_matmul`: the operations that the plain
network needs, a second, over those of a product of two matrices of 2048 x 2048 in the same type, measured between the
runs. `equal_codes`: in float32 the share of those of the peer, in bfloat16 of ours in float32. Where float32 codes
differ, `ties` is the share of these that are ties (the two nearest squared distances, or largest logits, differ by less
than 1e-5 of the second), and `widest_gap` the largest such difference among them.

--trained: PSNR in dB of pictures reconstructed in bfloat16 (`ours`) and in float32 (`peer`), means over pictures, and
the share of equal codes; random weights would say little, since their nearest codes are all but ties.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unitok.nn.compiled import Compiled
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.dvae import DVAETokenizer

ORACLES = "PyPI DALL-E is missing: make oracles"
ROWS = {  # verb, tokenizer, dtype
    "encode_dvae_fp32": ("encode", "dvae", "float32"),
    "encode_dvae_bf16": ("encode", "dvae", "bfloat16"),
    "encode_vqgan_fp32": ("encode", "vqgan", "float32"),
    "encode_vqgan_bf16": ("encode", "vqgan", "bfloat16"),
    "decode_vqgan_fp32": ("decode", "vqgan", "float32"),
}
SIDE = 2048  # of the matrices
PRODUCTS = 5  # of them between two runs
TIE = 1e-5  # relative difference of the two nearest, below which either code is right
BATCH = 100  # pictures of --trained at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trained", nargs="+", type=Path, metavar="TOKENIZER")
    parser.add_argument("--pictures", metavar="DATA", help="a folder, parquet, ...")
    parser.add_argument("--first", type=int, default=0, help="rows of DATA before the first of --trained")
    parser.add_argument("--n", type=int, default=500, help="pictures of --trained")
    arguments = parser.parse_args()
    # tokenizers.py beside this file is not the library of that name
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    if unknown := [name for name in arguments.names if name not in ROWS]:
        parser.error(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")
    if arguments.trained:
        if not arguments.pictures:
            parser.error("--trained needs --pictures DATA")
        for folder in arguments.trained:
            print_row(cost(folder, arguments))
        return
    names = arguments.names or list(ROWS)
    for verb, network in dict.fromkeys(ROWS[name][:2] for name in names):
        compare(verb, network, [name for name in names if ROWS[name][:2] == (verb, network)], arguments)


def compare(verb: str, network: str, names: list[str], arguments: argparse.Namespace) -> None:
    """Print the rows of one verb and network: one peer, and ours in one or two types."""
    if network == "dvae":
        try:
            import dall_e  # noqa: F401
        except ImportError:
            print(f"{', '.join(names)}: {ORACLES}", file=sys.stderr)
            return
    dtypes = {name: ROWS[name][2] for name in names}
    with tempfile.TemporaryDirectory() as folder, side(arguments) as peer, side(arguments) as ours:
        call(peer, prepare_peer, verb, network, folder)
        flops = call(ours, prepare_ours, verb, network, folder, sorted(set(dtypes.values())))
        compiled = {name: call(ours, run, dtype)[0] for name, dtype in dtypes.items()}
        expected, got = call(peer, outcome, "peer"), {name: call(ours, outcome, dtypes[name]) for name in names}
        apart = {name: got[name] != expected for name, dtype in dtypes.items() if dtype == "float32"}
        look = verb == "encode" and any(differ.any() for differ in apart.values())
        gaps = call(ours, distance_gaps) if look else None
        times: dict[str, list[float]] = {name: [] for name in ("peer", *names)}
        rates: dict[str, list[float]] = {dtype: [] for dtype in dtypes.values()}
        for _ in range(arguments.runs):
            times["peer"].append(call(peer, run, "peer")[1])
            for name, dtype in dtypes.items():
                times[name].append(call(ours, run, dtype)[1])
                rates[dtype] += call(ours, matmul, dtype)
    theirs = statistics.median(times["peer"])
    for name, dtype in dtypes.items():
        mine, rate = statistics.median(times[name]), statistics.median(rates[dtype])
        row = {
            "name": name, "ratio": round(theirs / mine, 2), "ours": round(arguments.batch / mine, 3),
            "peer": round(arguments.batch / theirs, 3), "unit": "images/s", "runs": arguments.runs,
            "spread": round((max(times[name]) - min(times[name])) / mine, 3),
            "share_of_matmul": round(flops * arguments.batch / mine / rate, 3),
            "matmul_gflops": round(rate / 1e9, 1), "compile_s": round(compiled[name]),
        }  # fmt: skip
        if verb == "decode":
            row["largest_difference"] = round((got[name] - expected).abs().max().item(), 7)
        else:
            right = got.get("encode_" + network + "_fp32", expected) if dtype == "bfloat16" else expected
            row["equal_codes"] = round((got[name] == right).double().mean().item(), 5)
            row["distinct_codes"] = right.unique().numel()
            if gaps is not None and name in apart and apart[name].any():
                found = gaps[apart[name]]
                row["different_codes"], row["ties"] = len(found), round((found < TIE).double().mean().item(), 5)
                row["widest_gap"] = float(f"{found.max().item():.2g}")
        print_row(row)


def print_row(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


# ---- in the processes of either side


STATE: dict[str, Any] = {}


def side(arguments: argparse.Namespace) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=begin, initargs=(vars(arguments),))


def call(executor: ProcessPoolExecutor, function: Callable, *arguments: Any) -> Any:
    return executor.submit(function, *arguments).result()


def begin(arguments: dict[str, Any]) -> None:
    torch.set_num_threads(arguments["threads"])
    torch.set_grad_enabled(False)
    size = 64 if arguments["quick"] else 256
    draw = torch.Generator().manual_seed(0)
    # noise around a colour of its own in every square of 16 pixels, so that random networks give many codes
    squares = torch.rand(arguments["batch"], 3, size // 16, size // 16, generator=draw)
    squares = squares.repeat_interleave(16, 2).repeat_interleave(16, 3)
    noise = torch.rand(squares.shape, generator=draw)
    STATE.update(arguments, size=size, images=(0.7 * squares + 0.3 * noise).to(arguments["device"]))


def run(arm: str) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of this one."""
    begun = time.perf_counter()
    STATE["outcome", arm] = STATE[arm](STATE["input"])
    if STATE["device"] != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return STATE.setdefault(("first", arm), seconds), seconds


def outcome(arm: str) -> Tensor:
    if ("outcome", arm) not in STATE:
        run(arm)
    return STATE["outcome", arm].cpu()


def distance_gaps() -> Tensor:
    """float64 [B, N]: by how much the second nearest code is farther than the nearest, relative, in the plain network.

    Squared distances; logits, from their largest, where the codes are chosen by these.
    """
    tokenizer, found = STATE["tokenizer"], []
    for image in STATE["images"].split(1):
        if isinstance(tokenizer, DVAETokenizer):
            logits = tokenizer.encoder(0.8 * image + 0.1).flatten(2).transpose(1, 2).double()  # [1, N, V]
            first, second = logits.topk(2, -1).values.unbind(-1)
        else:
            vectors, table = tokenizer.vectors(2 * image - 1).double(), tokenizer.quantize.embedding.weight.double()
            nearest = torch.cdist(vectors, table[None]).square().topk(2, -1, largest=False)
            first, second = nearest.values.unbind(-1)
        found.append((second - first).abs() / second.abs())
    return torch.cat(found).cpu()


def matmul(dtype: str) -> list[float]:
    """Operations a second of a product of matrices, a few times."""
    matrix = torch.ones(SIDE, SIDE, dtype=getattr(torch, dtype), device=STATE["device"])
    out, rates = torch.empty_like(matrix), []
    for _ in range(PRODUCTS):
        begun = time.perf_counter()
        torch.mm(matrix, matrix, out=out)
        out[0, 0].item()
        rates.append(2 * SIDE**3 / (time.perf_counter() - begun))
    return rates


def prepare_ours(verb: str, network: str, folder: str, dtypes: list[str]) -> int:
    """Set up the arms -> the operations of one picture."""
    tokenizer = dvae() if network == "dvae" else load_tokenizer(folder)
    STATE["tokenizer"] = tokenizer.to(STATE["device"])
    image = STATE["images"][:1]
    STATE["input"] = STATE["images"]
    if verb == "decode":
        STATE["input"] = codes(tokenizer.codebook_sizes[0], *tokenizer.grid())
    with FlopCounterMode(display=False) as counter:
        tokenizer.encode(image) if verb == "encode" else tokenizer.decode(STATE["input"][:1])
    for dtype in dtypes:
        compiled = Compiled(tokenizer, dtype, batch_size=STATE["batch"])
        STATE[dtype] = compiled.encode if verb == "encode" else compiled.decode
    return counter.get_total_flops()


def prepare_peer(verb: str, network: str, folder: str) -> None:
    if network == "dvae":
        STATE["peer"], STATE["input"] = dall_e_encoder(), STATE["images"]
        return
    model = vq_model(folder)
    height = width = STATE["size"] >> (len(model.config.block_out_channels) - 1)
    shape = (STATE["batch"], height, width, model.config.vq_embed_dim)

    def encode(images: Tensor) -> Tensor:
        return model.quantize(model.encode(2 * images - 1).latents)[2][2].reshape(len(images), -1)

    def decode(chosen: Tensor) -> Tensor:
        vectors = model.quantize.get_codebook_entry(chosen.flatten(), shape)
        return (model.decode(vectors, force_not_quantize=True).sample / 2 + 0.5).clamp(0, 1)

    STATE["peer"] = encode if verb == "encode" else decode
    STATE["input"] = STATE["images"] if verb == "encode" else codes(model.config.num_vq_embeddings, height, width)


def codes(size: int, height: int, width: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(size, (STATE["batch"], height * width), generator=draw).to(STATE["device"])


def dvae() -> DVAETokenizer:
    """Random weights, the same in either process; all codes are about as likely."""
    torch.manual_seed(0)
    sizes = {"width": 32, "vocab_size": 256} if STATE["quick"] else {}
    tokenizer = DVAETokenizer(STATE["size"], **sizes, decoder=False).eval()
    last: Any = tokenizer.encoder.output
    last.conv.bias -= tokenizer.encoder(0.8 * STATE["images"][:1].cpu() + 0.1).mean((0, 2, 3))
    return tokenizer


def dall_e_encoder() -> Callable[[Tensor], Tensor]:
    import warnings

    tokenizer = dvae()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dall_e import map_pixels
        from dall_e.encoder import Encoder

        width, vocab = tokenizer.config.get("width", 256), tokenizer.codebook_sizes[0]
        encoder = Encoder(n_hid=width, vocab_size=vocab).eval()
    ends = {"weight": "w", "bias": "b"}
    state = {}
    for name, tensor in tokenizer.encoder.state_dict().items():
        layer, _, end = name.rpartition(".")
        state[f"blocks.{layer}.{ends[end]}"] = tensor
    encoder.load_state_dict(state)
    encoder.to(STATE["device"])
    return lambda images: encoder(map_pixels(images)).argmax(1).flatten(1)


def vq_model(folder: str) -> Any:
    """diffusers' VQModel with random weights; `folder` holds the same converted. Its codes are vectors
    that it met, moved a little."""
    from diffusers import VQModel

    from unitok.convert import convert

    torch.manual_seed(0)
    widths = (32, 64) if STATE["quick"] else (128, 128, 256, 256, 512)
    levels = len(widths)
    model = VQModel(
        block_out_channels=widths, layers_per_block=2, latent_channels=256, vq_embed_dim=256, num_vq_embeddings=1024,
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1), sample_size=STATE["size"],
    ).eval()  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    met = torch.cat([model.encode(2 * image.cpu() - 1).latents for image in STATE["images"].split(1)])
    met = met.movedim(1, -1).flatten(0, 2)  # [n, D]
    some = met[torch.randint(len(met), (1024,), generator=draw)]
    model.quantize.embedding.weight.copy_(some + 0.1 * met.std() * torch.randn(some.shape, generator=draw))
    published = Path(folder) / "published"
    model.save_pretrained(published)
    with contextlib.redirect_stdout(sys.stderr):
        convert("diffusers", [published], Path(folder), image_size=STATE["size"])
    return model.to(STATE["device"])


# ---- what bfloat16 costs


def cost(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from unitok.config import DataSource
    from unitok.data.encoding import as_pixels
    from unitok.data.sources import read_image
    from unitok.eval.rows import load_rows

    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(folder, arguments.device)
    last = arguments.first + arguments.n
    rows = load_rows([DataSource(path=arguments.pictures, limit=last)], "picture")[arguments.first :]
    arms = {dtype: Compiled(tokenizer, dtype, batch_size=BATCH) for dtype in ("float32", "bfloat16")}
    found: dict[str, list[Tensor]] = {"float32": [], "bfloat16": [], "codes": []}
    for start in range(0, len(rows), BATCH):
        some = torch.stack([as_pixels(tokenizer, read_image(row["image"])) for row in rows[start : start + BATCH]])
        made = {dtype: arm.encode(some) for dtype, arm in arms.items()}
        found["codes"].append((made["float32"] == made["bfloat16"]).double().mean(1).cpu())
        for dtype, arm in arms.items():
            error = (arm.decode(made[dtype]).cpu().float() - some).square().mean((1, 2, 3))
            found[dtype].append(-10 * error.clamp_min(1e-10).log10())
    ours, peer, equal = (torch.cat(found[key]).mean().item() for key in ("bfloat16", "float32", "codes"))
    return {
        "name": f"bf16_{folder.name}", "ratio": round(10 ** ((ours - peer) / 10), 4), "ours": round(ours, 3),
        "peer": round(peer, 3), "unit": "dB", "runs": 1, "spread": 0.0, "equal_codes": round(equal, 4), "n": len(rows),
    }  # fmt: skip


if __name__ == "__main__":
    main()
