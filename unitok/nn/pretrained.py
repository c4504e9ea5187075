"""A model as a folder: config.json, model.safetensors, assets/, unitok.json.

unitok.json is written last and holds the hashes of the rest, so a half-written or mixed-up folder is refused at load.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from unitok import checkpoint
from unitok.manifest import Manifest

CONFIG, WEIGHTS, ASSETS = "config.json", "model.safetensors", "assets"


class Pretrained(nn.Module, PyTorchModelHubMixin):
    """A module whose constructor takes flat keyword arguments of JSON types, saved and loaded as a folder.

    A subclass says which manifest section is its own (`manifest`, `section_of`). `not_saved` holds prefixes of
    state-dict keys that stay out of the folder: frozen parts of others, critics, perceptual networks.
    """

    not_saved: tuple[str, ...] = ()
    _dropped_arguments: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any):
        instance = super().__new__(cls, *args, **kwargs)
        # the mixin leaves out what it cannot write as JSON; remember it, to refuse to save rather than lose it
        named = {**dict(zip(list(cls._hub_mixin_init_parameters)[1:], args, strict=False)), **kwargs}
        dropped = tuple(key for key, value in named.items() if not cls._is_jsonable(value))
        object.__setattr__(instance, "_dropped_arguments", dropped)
        return instance

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON gives them back (tuples are lists)."""
        return json.loads(json.dumps(self._hub_mixin_config or {}))

    def record(self, **found: Any) -> None:
        """Arguments for a saved folder: what other folders or the Hub said, which need not be there when it is read."""
        self._hub_mixin_config = {**self.config, **found}

    @property
    def device(self) -> torch.device:
        return _reference(self).device

    @property
    def dtype(self) -> torch.dtype:
        return _reference(self).dtype

    def own_state(self) -> dict[str, Tensor]:
        """What goes into model.safetensors: the state dict without `not_saved`."""
        return {k: v for k, v in self.state_dict().items() if not self.is_foreign(k)}

    def is_foreign(self, key: str) -> bool:
        return any(key.startswith(prefix) for prefix in self.not_saved)

    def load_own_state(self, state: dict[str, Tensor], what: str = "weights") -> None:
        """Copy what `own_state` gave, strictly; `what` names it in the ValueError."""
        checkpoint.load_into(self, state, allow_missing=[p + "*" for p in self.not_saved], what=what)

    def assets(self) -> dict[str, bytes]:
        """Further files by name (a text tokenizer, phrase tables), written to assets/; by default there are none."""
        return {}

    def load_assets(self, folder: Path) -> None:
        """Read assets/ back; called after the constructor and before the weights are loaded."""

    def hashes(self) -> dict[str, Any]:
        """config_hash, weight_hash and, where there are any, the sha256 of each asset."""
        found = {
            "config_hash": checkpoint.config_hash(self.config),
            "weight_hash": checkpoint.state_hash(self.own_state()),
        }
        assets = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.assets().items())}
        return {**found, "assets": assets} if assets else found

    def manifest(self) -> Manifest:
        raise lacking(self, "manifest")

    @staticmethod
    def section_of(manifest: Manifest) -> dict[str, Any] | None:
        """The section that describes the one model of a folder; None if there is not exactly one."""
        raise lacking(Pretrained, "section_of")

    @classmethod
    def check_section(cls, section: Mapping[str, Any], folder: Path) -> None:
        """ValueError where the section of a folder says something of its numbers that this class does otherwise."""

    def take_section(self, section: Mapping[str, Any]) -> None:
        """Keep what the section of the folder says beside its numbers; called at the end of loading."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: Any = None,
        model_card_kwargs: dict | None = None,
        **hub: Any,
    ) -> str | None:
        """Write the folder. The keyword arguments exist for the mixin's `push_to_hub`; no model card is made up."""
        if self._dropped_arguments:
            raise ValueError(
                f"cannot save {type(self).__name__}: its argument {self._dropped_arguments[0]!r} is not a JSON value"
            )
        folder = Path(save_directory)
        checkpoint.save_weights(folder / WEIGHTS, self.own_state())
        checkpoint.write_json(folder / CONFIG, self.config)
        for name, content in self.assets().items():
            checkpoint.write_atomic(folder / ASSETS / name, content)
        self.manifest().save(folder)
        return self.push_to_hub(repo_id or folder.name, **hub) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        **arguments: Any,
    ):
        """A saved folder or Hub id, in eval mode; `arguments` override the configuration's.

        ValueError where a file is damaged, changed or from another model.
        """
        folder = checkpoint.open_folder(pretrained_model_name_or_path, revision=revision)
        section = read_section(cls, folder)
        cls.check_section(section, folder)
        config = checkpoint.read_json(folder / CONFIG)
        _compare(folder / CONFIG, section.get("config_hash"), checkpoint.config_hash(config))
        for name, digest in section.get("assets", {}).items():
            path = folder / ASSETS / name
            _compare(path, digest, checkpoint.file_sha256(path) if path.is_file() else "of no file")
        state = checkpoint.load_weights(folder / WEIGHTS)
        _compare(folder / WEIGHTS, section.get("weight_hash"), checkpoint.state_hash(state))
        known = inspect.signature(cls.__init__).parameters
        if unknown := [key for key in config if key not in known]:
            raise ValueError(
                f"{folder / CONFIG}: {cls.__name__} takes no argument {unknown[0]!r}; "
                "the folder needs another version of unitok"
            )
        model = cls(**{**config, **arguments})
        # what the folder says, without arguments that have come since: else its own hash would no longer fit it
        model._hub_mixin_config = {**config, **arguments}
        model.load_assets(folder / ASSETS)
        model.load_own_state(state, what=str(folder / WEIGHTS))
        model.take_section(section)
        return model.to(map_location).eval()


def read_section(cls: type[Pretrained], folder: Path) -> dict[str, Any]:
    """The manifest section of a saved folder. ValueError if the folder does not hold exactly one such model."""
    section = cls.section_of(Manifest.load(folder))
    if section is None or "class" not in section:
        raise ValueError(f"{folder} does not hold one saved {cls.__name__}: its unitok.json has no such section")
    return section


def _reference(module: nn.Module) -> Tensor:
    tensors = (t for group in (module.parameters(), module.buffers()) for t in group if t.is_floating_point())
    return next(tensors, torch.empty(0))


def _compare(path: Path, expected: str | None, found: str) -> None:
    if expected != found:
        raise ValueError(
            f"{path} is damaged, changed or from another model: its hash is {found[:12]}, unitok.json "
            f"says {(expected or 'nothing')[:12]}"
        )


def lacking(owner: Any, method: str) -> NotImplementedError:
    """What a contract's method raises where a class has none of its own."""
    kind = owner if isinstance(owner, type) else type(owner)
    return NotImplementedError(f"{kind.__name__} does not define {method}()")
