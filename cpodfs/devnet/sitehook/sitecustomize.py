"""Lets unmodified yapapi scripts resolve their VM images at the local market.

Python imports this at the start of every process whose PYTHONPATH begins with this folder, so it
must be quick, must not fail, and imports nothing that is not loaded anyway. It changes nothing
but two defaults of ``yapapi.payload.vm``, when and if that is imported, and then runs the
sitecustomize that would have run without it.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TARGET = "yapapi.payload.vm"
_VARIABLE = "CPODFS_REGISTRY_URL"


class _Hook:
    """A meta-path finder that waits for one module, adapts it and removes itself."""

    def __init__(self, registry_url: str) -> None:
        self._registry_url = registry_url

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_adapt(module: ModuleType) -> None:
            load(module)
            _adapt(module, self._registry_url)

        spec.loader.exec_module = load_and_adapt  # type: ignore[method-assign]
        return spec


def _adapt(vm: ModuleType, registry_url: str) -> None:
    defaults = getattr(getattr(vm, "repo", None), "__kwdefaults__", None)
    if not defaults or "repository_url" not in defaults or not hasattr(vm, "check_package_url"):
        sys.stderr.write("cpodfs: this yapapi is not known, images may not resolve locally\n")
        return
    defaults["repository_url"] = vm.DEFAULT_REPOSITORY_URL = registry_url  # type: ignore[attr-defined]

    async def local_package_url(image_url: str, image_hash: str) -> str:
        return f"hash:sha3:{image_hash}:{image_url}"

    vm.check_package_url = local_package_url  # type: ignore[attr-defined]


def _run_the_next_one() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    rest = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is None or spec.loader is None:
        return
    module = sys.modules[__name__]
    module.__spec__, module.__file__, module.__loader__ = spec, spec.origin, spec.loader
    spec.loader.exec_module(module)


if os.environ.get(_VARIABLE):
    sys.meta_path.insert(0, _Hook(os.environ[_VARIABLE]))
_run_the_next_one()
