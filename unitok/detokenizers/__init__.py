"""Detokenizers, one system per file: the folder is the registry. Priors (text -> vectors) live here as prior_*.py."""

from unitok.registry import Registry

registry = Registry(
    "unitok.detokenizers", base="unitok.detokenizers.base:Detokenizer", kind="detokenizer", skip=("prior_",)
)
names, get, name_of = registry.names, registry.get, registry.name_of

__all__ = ["get", "name_of", "names", "registry"]
