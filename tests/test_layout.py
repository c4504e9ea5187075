"""The layout: import layers, recipes, the package list, and a README that maps every file."""

from __future__ import annotations

import ast
import glob
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import unitok
import unitok.detokenizers
from unitok.config import (
    ClipRecipe,
    DetokenizerRecipe,
    EvaluationRecipe,
    LanguageModelRecipe,
    TokenizerRecipe,
    load_recipe,
)

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; tomli comes with pytest there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unitok"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

LAYERS = [  # from the bottom; a set is one room, and rooms of one row do not import each other
    [{"config", "manifest", "vocab", "checkpoint", "registry", "pickles"}],
    [{"nn"}],
    [{"tokenizers"}, {"detokenizers"}, {"lm"}],
    [{"data"}, {"sampling"}, {"convert"}],
    [{"model"}],
    [{"eval"}, {"training"}],
    [{"__main__", "cli", "console", "demo", "demo_seed", "report", "inspection", "stages", "weights", "serving"}],
]
PLACE = {name: (row, room) for row, rooms in enumerate(LAYERS) for room, names in enumerate(rooms) for name in names}
RECIPES = {
    "tokenizers": TokenizerRecipe,
    "training": LanguageModelRecipe | DetokenizerRecipe | ClipRecipe,
    "eval": EvaluationRecipe,
}
ROOMS = ("unitok", "tests", "benchmarks", "docs", *RECIPES)
MAX_LINES = 500


def listing(*folders: str, suffix: str = "") -> list[Path]:
    """Files of the project, relative to its root, without what tools leave behind."""
    found = [path for path in ROOT.iterdir() if path.is_file()] if not folders else []
    for folder in folders or ROOMS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = [path.relative_to(ROOT) for path in found if path.suffix != ".pyc"]
    return sorted(path for path in found if path.name.endswith(suffix) and not path.name.startswith("."))


MODULES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in listing("unitok", suffix=".py")
}


# ---- imports ---------------------------------------------------------------------------------------------------------


def resolve(module: str, name: str = "") -> str | None:
    """The module of ours that `import module`, or `from module import name`, reaches; None for somebody else's."""
    if module.partition(".")[0] != "unitok":
        return None
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    return unitok._HOMES.get(name, module) if module == "unitok" else module


def imports(module: str) -> set[str]:
    """Modules of ours that a file imports anywhere in it: inside functions and for type checks too."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {resolve(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports here are absolute"
            found |= {resolve(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            found.add(resolve(name))
    return {name for name in found if name is not None} - {module}


def place(module: str) -> tuple[int, int]:
    room = module.split(".")[1]
    assert room in PLACE, f"{module} has no layer: say in LAYERS where it belongs"
    return PLACE[room]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"unitok"}))
def test_a_file_imports_only_from_below(module):
    row, room = place(module)
    for target in imports(module) - {"unitok"}:
        its_row, its_room = place(target)
        assert its_row < row or (its_row, its_room) == (row, room), f"{module} must not import {target}"


def test_the_walk_sees_imports_in_functions_and_type_checks():
    assert "unitok.tokenizers.base" in imports("unitok.data.shards")  # in a function
    assert "unitok.model" in imports("unitok")  # for type checks
    assert resolve("unitok", "load") == "unitok.model"


@pytest.mark.parametrize("room", ["tokenizers", "detokenizers"])
def test_a_system_stands_on_the_contract_and_shared_blocks_alone(room):
    for module in MODULES:
        if module.startswith(f"unitok.{room}.") and not module.endswith(".base"):
            for target in imports(module) - {f"unitok.{room}.base"}:
                assert place(target)[0] < PLACE[room][0], f"{module} must not import {target}"


def test_sampling_knows_tensors_and_vocabularies_not_folders():
    for module in MODULES:
        if module.startswith("unitok.sampling"):
            rooms = {target.split(".")[1] for target in imports(module)}
            assert rooms <= {"sampling", "vocab", "nn"}, module


def test_nothing_imports_the_command_line():
    assert {module for module in MODULES if "unitok.cli" in imports(module)} <= {"unitok.__main__"}


def test_looking_around_imports_no_torch():
    """What the command line needs before it knows what to do: names of packages, recipes, vocabularies."""
    light = [module for module, path in MODULES.items() if path.name == "__init__.py"]
    light += ["unitok.cli", "unitok.config", "unitok.manifest", "unitok.vocab", "unitok.registry"]
    code = f"import sys, {', '.join(light)}; print(sorted({{'torch', 'transformers', 'diffusers'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"


def test_pickles_are_read_by_checkpoint_alone():
    found = [str(path) for path in MODULES.values() if "torch.load(" in (ROOT / path).read_text(encoding="utf-8")]
    assert found == ["unitok/checkpoint.py"]


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", RECIPES)
def test_recipe_folders_cannot_be_imported(folder):
    assert not listing(folder, suffix=".py"), "a root package of this name would shadow another library's"
    assert listing(folder, suffix=".yaml")


@pytest.mark.parametrize("path", listing(*RECIPES, suffix=".yaml"), ids=str)
def test_a_recipe_parses_and_says_how_to_run_it(path, monkeypatch):
    monkeypatch.setenv("UNITOK_DATA", "somewhere")
    recipe = load_recipe(ROOT / path)
    assert isinstance(recipe, RECIPES[path.parts[0]])
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert re.search(r"\b(unitok \w+|unitok\.\w+|make \w+|deepspeed) ?", head), "the opening comment shows the command"
    assert re.search(r"^# Cost: \S", head, re.MULTILINE), "the opening comment says what it costs"
    for named in re.findall(rf"\b(?:{'|'.join(RECIPES)})/\S+\.(?:yaml|json)\b", head):
        assert (ROOT / named).is_file(), f"the opening comment names {named}, which is not there"
    if isinstance(recipe, TokenizerRecipe):
        assert ":" in recipe.tokenizer.name or recipe.tokenizer.name in unitok.tokenizers.names()
    elif isinstance(recipe, LanguageModelRecipe):
        assert recipe.deepspeed is None or (ROOT / recipe.deepspeed).is_file()
    elif isinstance(recipe, DetokenizerRecipe):
        named = recipe.detokenizer and recipe.detokenizer.name
        assert named is None or ":" in named or named in unitok.detokenizers.names()
    elif isinstance(recipe, EvaluationRecipe):
        assert ":" in recipe.task or recipe.task in unitok.eval.names()


@pytest.mark.parametrize("path", listing("training", suffix=".json"), ids=str)
def test_a_deepspeed_file_is_json_for_any_batch_and_precision(path):
    settings = json.loads((ROOT / path).read_text(encoding="utf-8"))
    assert settings["train_micro_batch_size_per_gpu"] == settings["bf16"]["enabled"] == "auto"
    assert settings["zero_optimization"]["stage"] in (0, 1, 2, 3)


# ---- benchmarks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", listing("benchmarks", suffix=".py"), ids=str)
def test_a_benchmark_runs_by_its_path(path):
    """Its folder is then first on sys.path, and holds a tokenizers.py that must not stand for the library."""
    told = subprocess.run([sys.executable, ROOT / path, "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "usage:" in told.stdout, told.stderr


# ---- packaging -------------------------------------------------------------------------------------------------------


def test_the_package_list_is_complete():
    folders = {".".join(path.parent.parts) for path in listing("unitok", suffix=".py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders
    assert all((ROOT / name.replace(".", "/") / "__init__.py").is_file() for name in folders)


def test_every_file_of_the_package_goes_into_the_wheel():
    """By the globs that setuptools expands: "*" in every package, the others in their own."""
    packages, data = (PYPROJECT["tool"]["setuptools"][key] for key in ("packages", "package-data"))
    shipped = set()
    for package in packages:
        folder = Path(package.replace(".", "/"))
        for pattern in [*data.get("*", ()), *data.get(package, ())]:
            shipped |= {folder / name for name in glob.glob(pattern, root_dir=ROOT / folder, recursive=True)}
    assert {path for path in listing("unitok") if path.suffix != ".py"} - shipped == set()


def test_torchvision_is_absent():
    for path in listing("unitok", "benchmarks", suffix=".py"):
        names = set(re.findall(r"^\s*(?:import|from)\s+(\w+)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE))
        assert "torchvision" not in names, path
    seen: set[str] = set()
    wanted = [*PYPROJECT["project"]["dependencies"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    while wanted:  # what the dependencies bring along, as far as it is installed
        requirement = Requirement(wanted.pop())
        name = requirement.name.lower().replace("_", "-")
        needed = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}
        )
        if name in seen or not needed:
            continue
        seen.add(name)
        try:
            below = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        wanted += [text for text in below if "extra ==" not in text]
    assert "torch" in seen and "torchvision" not in seen


def test_what_was_tested_together_covers_what_is_needed():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pinned[requirement.name.lower().replace("_", "-")] = requirement.specifier
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert all(requirement.specifier.contains(pin.version) for pin in pinned[name]), name


# ---- files -----------------------------------------------------------------------------------------------------------


def test_readme_maps_every_file():
    """One line a file: `path   what it is`. A folder's line stands for its __init__.py; one of assets for all below."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("## Every file")[2].split("```")[1].splitlines()[1:]
    lines = [line.split(maxsplit=1) for line in block if line.strip()]
    assert all(len(line) == 2 for line in lines), "a path without a description"
    mapped = [line[0] for line in lines]
    assert len(mapped) == len(set(mapped)), "a path twice"
    folders = tuple(name for name in mapped if name.startswith("unitok/assets/") and name.endswith("/"))
    files = {str(path) for path in listing() if not str(path).startswith(folders)}
    files = {name.removesuffix("__init__.py") for name in files}
    absent = {name for name in mapped if not (ROOT / name).exists()}
    assert not absent, "the map names what is not there"
    assert files - set(mapped) == set(), "the map lacks these"


@pytest.mark.parametrize("path", [path for path in listing() if path.suffix in (".py", ".yaml", ".md")], ids=str)
def test_a_file_is_short_and_names_no_machine(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    found = re.search(r"(?<![\w.])(/(?:home|root|work|tmp|Users|mnt|scratch)/[\w.-]+|[A-Z]:\\\w)", text)
    assert found is None, f"a path of some machine: {found and found.group()}"
