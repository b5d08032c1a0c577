"""Tokenised samples, made once and then memory-mapped by every rank.

A split's samples lie in a folder of plain arrays, named by a digest of everything that they depend on: another file,
mapping, objective, tokenizer or length is another folder, and nothing stale is ever read. A folder is filled under
another name and renamed: what has its name is whole. No pickle is read or written.
"""

from loomtune.samples.cache import default_cache, of_run, open_samples, prepare
from loomtune.samples.making import Source, chain
from loomtune.samples.stored import Samples

__all__ = ["Samples", "Source", "chain", "default_cache", "of_run", "open_samples", "prepare"]
