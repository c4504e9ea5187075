"""unitok: image tokenizers, the language models that speak them, and the way back to pixels.

The names below are imported when first used: `import unitok` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Condition": "unitok.detokenizers.base",
    "Detokenizer": "unitok.detokenizers.base",
    "ImageTokenizer": "unitok.tokenizers.base",
    "JointVocab": "unitok.vocab",
    "Part": "unitok.data.schema",
    "load": "unitok.model",
    "load_tokenizer": "unitok.tokenizers.base",
}
_REGISTRIES = ("detokenizers", "eval", "tokenizers")  # packages with names() and get(name)
__all__ = [
    "Condition",
    "Detokenizer",
    "ImageTokenizer",
    "JointVocab",
    "Part",
    "__version__",
    "foreign_distribution_line",
    "load",
    "load_tokenizer",
]

if TYPE_CHECKING:
    from unitok.data.schema import Part
    from unitok.detokenizers.base import Condition, Detokenizer
    from unitok.model import load
    from unitok.tokenizers.base import ImageTokenizer, load_tokenizer
    from unitok.vocab import JointVocab


def __getattr__(name: str):
    if name in _REGISTRIES:
        return importlib.import_module(f"unitok.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'unitok' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__) | set(_REGISTRIES))


def foreign_distribution_line() -> str | None:
    """One line for the user if the unrelated distribution `unitok` is installed beside ours (`unitok-mm`), else None.

    Both own the import name and the command `unitok`, so whichever was installed last wrote over the other's files.
    """
    from importlib import metadata

    try:
        version = metadata.version("unitok")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"the unrelated package 'unitok' {version} is installed and owns the same import name and command as unitok-mm;"
        " repair with: pip uninstall unitok, then pip install --force-reinstall --no-deps unitok-mm"
    )
