"""DAR for who trains with TRL: in a GRPO script, `GRPOConfig` and `GRPOTrainer` become `DARConfig` and `DARTrainer`."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from dar.errors import ConfigError, require_package

TESTED = ">=1.16,<1.17"
"""The versions of TRL whose loss and bookkeeping this was compared with; pyproject.toml's extra has the same."""

require_package("trl", "dar.integrations.trl")
if version("trl") not in SpecifierSet(TESTED):
    raise ConfigError(
        f"dar.integrations.trl was tested with trl{TESTED}, and trl {version('trl')} is installed: another version may "
        "compute another loss in the places that this builds on. Install one that fits: pip install 'dar-rlhf[trl]'"
    )

from dar.integrations.trl.config import DARConfig  # noqa: E402
from dar.integrations.trl.trainer import DARTrainer  # noqa: E402

__all__ = ["DARConfig", "DARTrainer"]
