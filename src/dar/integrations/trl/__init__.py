"""DAR for who trains with TRL, and this library's record of any online run of TRL."""

from dar.integrations import require_tested

TESTED = ">=1.16,<1.17"
"""The versions of TRL whose loss and bookkeeping this was compared with; pyproject.toml's extra has the same."""

require_tested("trl", TESTED)

from dar.integrations.trl.callback import RunRecorder  # noqa: E402
from dar.integrations.trl.config import DARConfig  # noqa: E402
from dar.integrations.trl.trainer import DARTrainer  # noqa: E402

__all__ = ["DARConfig", "DARTrainer", "RunRecorder"]
