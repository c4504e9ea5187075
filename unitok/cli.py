"""The command line: `unitok VERB ...`. Exit 0 done, 1 failed with one plain line on stderr, 2 wrong usage.

Every verb imports what it needs inside its function, so that `unitok --help` starts without torch.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from unitok.console import Verbs, no_bars, print_table, program_options_first, quiet

if TYPE_CHECKING:
    from unitok.config import EvaluationRecipe
    from unitok.model import UnifiedModel

RECIPES = ("tokenizers", "training", "eval")  # folders that `list` looks into
LINE_EVERY_S = 15.0  # between lines of progress where there is no terminal to draw a bar on
SLUG = 40  # characters of a prompt in a file name

Recipe = Annotated[Path, Argument(metavar="RECIPE.yaml", help="A recipe; `unitok list` shows those at hand.")]
Overrides = Annotated[list[str] | None, Argument(metavar="key=value", help="Changes, such as steps=100.")]
Model = Annotated[str, Argument(metavar="MODEL", help="A model or adapter folder, a Hub id, or builtin:NAME.")]
Tokenizer = Annotated[str, Option("--tokenizer", metavar="T", help="An image tokenizer: a folder or a Hub id.")]
Out = Annotated[Path, Option("--out", metavar="DIR", help="The folder to write.")]
Native = Annotated[bool, Option("--native", help="Pictures as large as they are, cut to multiples of the stride.")]
Dtype = Literal["float32", "bfloat16", "auto"]
Fast = Annotated[Dtype | None, Option("--fast", help="Compile the encoder first, in about 20 s, for this type.")]
Painter = Annotated[str | None, Option("--detokenizer", metavar="D", help="Draws instead of the decoder.")]
Name = Annotated[str | None, Option("--name", help="What the model calls the tokenizer. Default: as its folder does.")]
Which = Annotated[str | None, Option("--tokenizer", metavar="NAME", help="Which one, where the model has several.")]


app = typer.Typer(
    cls=Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: the program's own) and return its exit code."""
    import unitok

    if line := unitok.foreign_distribution_line():
        print(line, file=sys.stderr)
    command = typer.main.get_command(app)
    try:
        command.main(program_options_first(sys.argv[1:] if args is None else list(args)), prog_name="unitok")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@app.callback()
def program(
    debug: Annotated[bool, Option("--debug", help="Show tracebacks, and the warnings of libraries.")] = False,
    local_rank: Annotated[int | None, Option("--local_rank", hidden=True)] = None,
) -> None:
    """Images as tokens of an ordinary language model: tokenize, expand, train, draw, ask, evaluate."""
    if local_rank is not None:  # the deepspeed launcher says it twice
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if not debug:
        quiet()


# ---- look around -----------------------------------------------------------------------------------------------------


@app.command()
def demo(
    tokenizer: Annotated[str, Option("--tokenizer", metavar="NAME", help="Which image tokenizer.")] = "fsq_split",
    from_scratch: Annotated[bool, Option("--from-scratch", help="Train the tokenizer and the base LLM too.")] = False,
    out: Annotated[Path, Option("--out", metavar="DIR", help="The folder to write.")] = Path("out/demo"),
) -> None:
    """Run the main job on the embedded default.

    Tune it, draw, answer questions, and report scores beside their baselines. It can be resumed.
    """
    from unitok.demo import run

    no_bars()
    print(run(out=out, tokenizer=tokenizer, from_scratch=from_scratch))


@app.command(name="list")
def list_() -> None:
    """List what there is to use, and the recipes at hand.

    Image tokenizers, detokenizers, evaluation tasks, builtin models, and recipes in this folder.
    """
    from unitok import detokenizers, tokenizers
    from unitok import eval as tasks
    from unitok.checkpoint import ASSETS, BUILTIN

    builtins = sorted(BUILTIN + folder.name for folder in ASSETS.glob("*") if (folder / "unitok.json").is_file())
    shown = {"image tokenizers": tokenizers.names(), "detokenizers": detokenizers.names(),
             "evaluation tasks": tasks.names(), "builtin models": builtins}  # fmt: skip
    for title, names in shown.items():
        print(f"{title:18}{', '.join(names) or 'none'}")
    recipes = [path for folder in RECIPES for path in sorted(Path(folder).glob("*.yaml"))]
    print(f"{'recipes':18}{'' if recipes else 'none in ./' + ', ./'.join(RECIPES)}".rstrip())
    width = max((len(str(path)) for path in recipes), default=0)
    for path in recipes:
        text = path.read_text(encoding="utf-8", errors="replace")
        kind = re.search(r"^kind:\s*(\w+)", text, re.MULTILINE)
        about = re.match(r"#\s*(.*)", text)
        print(f"  {path!s:{width}}  {kind[1] if kind else 'no kind':15} {about[1] if about else ''}".rstrip())


@app.command()
def inspect(
    target: Annotated[str, Argument(metavar="RECIPE|SHARDS|MODEL", help="A recipe, token shards, or a model.")],
    n: Annotated[int, Option("--n", min=1, help="How many documents or pictures are shown.")] = 3,
    out: Annotated[Path | None, Option("--out", metavar="DIR", help="Also write them here, and the pictures.")] = None,
) -> None:
    """Show what a model will see, before it is trained.

    Documents with ids, loss and image borders, their pictures, counts of ids, and the memory that training takes.
    """
    from unitok.inspection import inspect as look

    no_bars()
    look(target, n=n, out=out)


# ---- data and models -------------------------------------------------------------------------------------------------


@app.command()
def tokenize(
    data: Annotated[str, Argument(metavar="DATA", help="JSON lines, an image folder, WebDataset tars or parquet.")],
    tokenizer: Tokenizer,
    out: Out,
    workers: Annotated[int, Option("--workers", min=0, help="Threads that read and resize pictures.")] = 0,
    strict: Annotated[bool, Option("--strict", help="Stop at the first row that cannot be used.")] = False,
    column: Annotated[
        list[str] | None, Option("--column", metavar="OURS=THEIRS", help="A column of another name, as text=title.")
    ] = None,
    name: Name = None,
    native: Native = False,
    fast: Fast = None,
) -> None:
    """Turn the pictures of documents into token shards.

    They serve every language model. The same command goes on with a stopped run.
    """
    from tqdm import tqdm

    from unitok.data.shards import census_line, summary_line
    from unitok.data.shards import tokenize as run

    spoke = time.monotonic()
    with tqdm(unit=" rows", disable=None) as bar:

        def progress(counts: dict[str, Any]) -> None:
            nonlocal spoke
            bar.update(counts["rows"] - bar.n)
            if bar.disable and time.monotonic() - spoke > LINE_EVERY_S:
                spoke = time.monotonic()
                print(f"{counts['rows']} rows, {counts['images']} images", file=sys.stderr)

        summary = run(
            data, tokenizer, out, workers=workers, strict=strict, columns=_columns(column or ()), name=name,
            native=native, fast=fast, device=_device(), report=progress,
        )  # fmt: skip
    print(summary_line(summary))
    if summary["images"]:
        print(census_line(summary))


def _columns(pairs: Iterable[str]) -> dict[str, str]:
    columns = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise typer.BadParameter(f"{wrong[0]!r} is not of the form OURS=THEIRS", param_hint="--column")
    return columns


@app.command()
def convert(
    format: Annotated[str, Argument(metavar="FORMAT", help="The published layout, such as taming.")],
    files: Annotated[list[Path], Argument(metavar="FILE", help="The published weights: files, or a folder.")],
    out: Out,
    config: Annotated[
        Path | None, Option("--config", metavar="FILE", help="Their .yaml or .json: what it says must fit the weights.")
    ] = None,
    image_size: Annotated[
        int | None, Option("--image-size", min=1, metavar="N", help="Pixels a side, where any size will do.")
    ] = None,
) -> None:
    """Turn a published checkpoint into an image tokenizer; nothing in its files is executed.

    Formats: openai-dvae, flava, taming, ldm, gumbel-f8, chameleon, janus, llamagen, diffusers, amused, emu3,
    open-magvit2, show-o, titok, seed.
    """
    from unitok.convert import convert as run

    no_bars()
    run(format, files, out, config=config, image_size=image_size)


@app.command()
def expand(
    llm: Annotated[str, Argument(metavar="LLM", help="Any causal LM: a folder, a Hub id, or a model folder.")],
    tokenizer: Tokenizer,
    out: Out,
    name: Name = None,
    layout: Annotated[Literal["codes", "rows"], Option(help="rows: sizes may differ and stand in the ids.")] = "codes",
    detokenizer: Painter = None,
) -> None:
    """Give any causal LM the rows of an image tokenizer.

    The result is a model folder, ready to train, that stock transformers loads.
    """
    from unitok.lm.expand import LAYOUTS, expand_folder
    from unitok.manifest import Manifest
    from unitok.vocab import JointVocab

    no_bars()
    model = expand_folder(llm, tokenizer, out, name, layout=LAYOUTS[layout], detokenizer=detokenizer)
    vocab = JointVocab.from_dict(Manifest.load(model).vocab or {})
    new = f"of which {vocab.rows - vocab.text_rows} stand for {', '.join(vocab.images)}" if vocab.images else "none new"
    print(f"{out}: {vocab.rows} rows, {new}")


@app.command()
def export(
    model: Model,
    out: Out,
    token_strings: Annotated[bool, Option("--token-strings", help="Also give every code a token string.")] = False,
) -> None:
    """Write a plain Hugging Face checkpoint.

    Adapters are merged, and nothing of unitok is needed to load it.
    """
    from unitok.lm.export import export as run

    no_bars()
    print(run(model, out, token_strings=token_strings))


@app.command()
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train an image tokenizer, a detokenizer, a language model or a small CLIP.

    The same command goes on with a stopped run. For several processes: deepspeed --module unitok train RECIPE.yaml
    """
    from unitok.config import load_recipe

    plan = load_recipe(recipe, overrides or ())
    if plan.kind == "evaluation":
        raise ValueError(f"recipe {recipe} is an {plan.kind}: run it with `unitok evaluate`")
    more = {}
    if plan.kind == "language_model":
        from unitok.training.samples import Samples

        more["sampler"] = Samples.of(plan)
    import_module(f"unitok.training.{plan.kind}").train(plan, **more)  # an engine is named after its kind


# ---- use -------------------------------------------------------------------------------------------------------------


@app.command()
def reconstruct(
    tokenizer: Annotated[str, Argument(metavar="TOKENIZER", help="An image tokenizer: a folder or a Hub id.")],
    images: Annotated[list[str], Argument(metavar="IMAGES", help="Pictures, folders, or other data with pictures.")],
    out: Out,
    detokenizer: Painter = None,
    perceptual: Annotated[
        str | None,
        Option("--perceptual", metavar="FILE", help="Weights of a network, or module:function."),
    ] = None,
    native: Native = False,
) -> None:
    """Encode and decode pictures, and measure what is lost.

    Writes a sheet of originals over reconstructions, every picture, and a table: PSNR, SSIM and, where a network is
    given, a perceptual distance, each beside that of block means; the use of the codebooks; bits.
    """
    from unitok.eval import images as task
    from unitok.eval.results import table

    scores, files = task.reconstruct(
        tokenizer, images, out, detokenizer=detokenizer, perceptual=perceptual, native=native, device=_device()
    )
    print_table(table(scores))
    print(*files, sep="\n")


@app.command()
def sample(
    model: Model,
    prompts: Annotated[list[str], Argument(metavar="PROMPT", help="What to draw, each in quotes.")],
    out: Out,
    image: Annotated[list[Path] | None, Option("--image", metavar="FILE", help="A picture before the prompt.")] = None,
    guidance: Annotated[float, Option("--guidance", min=0, help="Classifier-free guidance; 1 is none.")] = 1.0,
    temperature: Annotated[float, Option("--temperature", min=0, help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, Option("--top-k", min=0, help="The k likeliest codes only; 0 is all.")] = 0,
    top_p: Annotated[float, Option("--top-p", min=0, max=1, help="The likeliest codes of this mass only.")] = 1.0,
    seed: Annotated[int, Option("--seed", help="The same seed draws the same pictures.")] = 0,
    n: Annotated[int, Option("--n", min=1, help="Pictures a prompt.")] = 1,
    candidates: Annotated[int, Option("--candidates", min=1, help="Draw so many for each, keep the likeliest.")] = 1,
    tokenizer: Which = None,
) -> None:
    """Draw pictures of prompts; prints the names of the files."""
    from unitok.data.schema import image_part, text_part
    from unitok.data.sources import read_image

    given = [image_part(read_image(file), loss=False) for file in image or ()]
    drawn = _open(model, tokenizer).images(
        [[*given, text_part(prompt)] for prompt in prompts], n=n, guidance=guidance, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed, candidates=candidates,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(drawn):
        prompt, draw = divmod(number, n)
        words = re.sub(r"[^a-z0-9]+", "-", prompts[prompt].lower())[:SLUG].strip("-")
        file = out / f"{prompt:03d}-{words}-{draw:03d}.png"
        picture.save(file)
        print(file)


@app.command()
def ask(
    model: Model,
    image: Annotated[Path, Argument(metavar="IMAGE", help="The picture.")],
    question: Annotated[str, Argument(metavar="QUESTION", help="The question, in quotes.")],
    shots: Annotated[
        Path | None, Option("--shots", metavar="FILE.jsonl", help="Examples before it: image, question, answers.")
    ] = None,
    guidance: Annotated[float, Option("--guidance", min=0, help="Of the answer, against no picture; 1 is none.")] = 1.0,
    tokenizer: Which = None,
) -> None:
    """Answer a question about a picture."""
    from unitok.config import DataSource
    from unitok.data.sources import read_image
    from unitok.eval.rows import load_rows, with_picture
    from unitok.eval.vqa import consensus

    shown = read_image(image)
    rows = load_rows([DataSource(path=str(shots))], "question") if shots else []
    examples = [{**with_picture(row), "answers": [consensus(row["answers"])]} for row in rows]
    print(_open(model, tokenizer).answer(shown, question, examples, guidance=guidance))


@app.command()
def evaluate(
    recipe: Annotated[Path | None, Argument(metavar="RECIPE.yaml", help="An evaluation recipe.")] = None,
    overrides: Overrides = None,
    compare: Annotated[
        tuple[Path, Path] | None, Option("--compare", metavar="A B", help="Compare two results, row by row.")
    ] = None,
) -> None:
    """Score a model, or compare two results.

    Prints a table of scores beside their baselines and writes results.json into the recipe's `out`.
    """
    if compare is not None and recipe is None:
        from unitok.eval.results import compare as run

        run(*compare, echo=print_table)
        return
    if compare is not None or recipe is None:
        raise typer.BadParameter("give a recipe, or --compare A B", param_hint="RECIPE.yaml")
    from unitok.config import load_recipe

    plan = load_recipe(recipe, overrides or ())
    if plan.kind != "evaluation":
        raise ValueError(f"recipe {recipe} is a {plan.kind}: run it with `unitok train`")
    _evaluate(plan)


def _evaluate(recipe: EvaluationRecipe) -> None:
    from dataclasses import replace

    from unitok import eval as tasks
    from unitok.eval.results import table, write_results

    task, begun = tasks.get(recipe.task), time.perf_counter()
    if recipe.model is None and recipe.task in tasks.names():
        raise ValueError(f"task {recipe.task} needs a model: give the recipe model, or model=MODEL behind it")
    model = None
    if recipe.model is not None:
        model = _tokenizer_or_model(recipe)
    loaded = time.perf_counter()
    scores = task.run(model, recipe)
    seconds = {"load": loaded - begun, "evaluate": time.perf_counter() - loaded}
    told = {"task": recipe.task, "version": recipe.version, "model": recipe.model}
    told |= {"template": recipe.template} if recipe.template else {}
    scores = [replace(score, protocol={**score.protocol, **told}) for score in scores]
    print_table(table(scores))
    print(write_results(recipe.out, scores, seconds) if recipe.out else "the recipe names no out: nothing is written")


def _tokenizer_or_model(recipe: EvaluationRecipe) -> Any:
    from unitok.checkpoint import open_folder
    from unitok.manifest import FILE, Manifest
    from unitok.tokenizers.base import load_tokenizer

    name = recipe.model or ""
    manifest = open_folder(name) / FILE
    alone = recipe.task == "images" and manifest.is_file() and Manifest.load(manifest).vocab is None
    return load_tokenizer(name, _device()) if alone else _open(name, recipe.tokenizer, recipe.template)


def _open(model: str, tokenizer: str | None = None, template: dict[str, Any] | None = None) -> UnifiedModel:
    from unitok.model import load

    no_bars()
    return load(model, _device(), tokenizer=tokenizer, template=template)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
