"""DAR for who trains with verl: a plug-in that verl loads by itself, wherever dar is installed beside it."""

import sys
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet

from dar.errors import ConfigError, require_package

TESTED = ">=0.9,<0.10"
"""The versions of verl that this was compared with; pyproject.toml's extra has the same."""

_CHANGES = {
    "verl.trainer.ppo.utils": "ask_for_reference",
    "verl.trainer.ppo.core_algos": "add_loss",
    "verl.trainer.ppo.ray_trainer": "add_weights",
    "verl.trainer.ppo.v1.trainer_base": "add_metrics",
}
"""What of `method` is called with a module of verl once a process has imported it; one that never does pays nothing."""


class _AfterImport(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        change = _CHANGES.pop(fullname, None)
        # Asked again, the other finders answer, for this one no longer knows the name.
        if change is None or (spec := util.find_spec(fullname)) is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: Any) -> None:
            execute(module)
            getattr(import_module(f"{__name__}.method"), change)(module)

        spec.loader.exec_module = execute_and_change
        return spec


require_package("verl", "dar.integrations.verl")
if version("verl") not in SpecifierSet(TESTED) or _CHANGES.keys() & sys.modules.keys():
    raise ConfigError(
        f"dar.integrations.verl was tested with verl{TESTED}, here is {version('verl')}; and it must come before "
        "verl's trainer: pip install 'dar-rlhf[verl]', and let verl load it, or import it first"
    )
sys.meta_path.insert(0, _AfterImport())
