"""Pure Python today; compiled extensions from `csrc/` are added here. Everything else is in pyproject.toml."""

from setuptools import setup

setup()
