"""DAR for who trains with verl: a plug-in that verl loads by itself, wherever dar is installed beside it."""

import sys
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from dar.errors import ConfigError
from dar.integrations import require_tested

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


require_tested("verl", "dar.integrations.verl")
if _CHANGES.keys() & sys.modules.keys():
    raise ConfigError("dar.integrations.verl must come before verl's trainer: let verl load it, or import it first")
sys.meta_path.insert(0, _AfterImport())
