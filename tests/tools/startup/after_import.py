"""Change a module right after its import. On PYTHONPATH of the stages that a sitecustomize.py beside this folder changes."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the module of a name as it is, and then calls `change` with it. Takes effect from sys.meta_path, once."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name, *_):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.change(module)
