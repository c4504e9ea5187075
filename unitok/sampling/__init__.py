"""Sampling: ids from a language model, under the grammar of a joint vocabulary."""
