"""Image tokenizers, one system per file: the folder is the registry.

A new tokenizer is one new file here with one public `ImageTokenizer` class in it. Nothing is imported until asked for.
"""

from unitok.registry import Registry

registry = Registry("unitok.tokenizers", base="unitok.tokenizers.base:ImageTokenizer", kind="tokenizer")
names, get, name_of = registry.names, registry.get, registry.name_of

__all__ = ["get", "name_of", "names", "registry"]
