"""Hides torch from the processes that tests start: a plain install has none.

Where it is installed, transformers imports it with everything behind it, which takes longer than most of these tests.
"""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Finds all modules on the path but torch and torchvision."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        return None if fullname in ("torch", "torchvision") else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
