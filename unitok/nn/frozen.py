"""Networks of others inside a model of ours: frozen, kept by name, and known again by their hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from unitok import checkpoint
from unitok.nn.pretrained import Pretrained

if TYPE_CHECKING:
    from typing import Self

FILE = "frozen.json"  # the asset with their hashes: a name or a folder does not say what is in it


class Frozen(Pretrained):
    """A model with such networks: `freeze` submodules once they are there.

    They take no gradient, stay in eval mode and out of the folder. A folder loads only with the networks it was saved
    with: ValueError otherwise.
    """

    frozen: tuple[str, ...] = ()

    def freeze(self, *names: str) -> None:
        self.frozen, self.not_saved = names, tuple(f"{name}." for name in names)
        for name in names:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def assets(self) -> dict[str, bytes]:
        hashes = {name: checkpoint.state_hash(self.get_submodule(name).state_dict()) for name in self.frozen}
        return {FILE: json.dumps(hashes).encode()} if hashes else {}

    def load_assets(self, folder: Path) -> None:
        if not self.frozen:
            return
        kept, found = checkpoint.read_json(folder / FILE), json.loads(self.assets()[FILE])
        for name in self.frozen:
            if kept.get(name) != found[name]:
                raise ValueError(
                    f"{folder.parent}: its {name} is not the one it was made with; give the folder or revision of that"
                )
