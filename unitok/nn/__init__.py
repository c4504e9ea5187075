"""Blocks used by two or more systems."""
