"""DAR for who trains with TRL, and this library's record of any online run of TRL."""

from dar.integrations import require_tested

require_tested("trl", "dar.integrations.trl")

from dar.integrations.trl.callback import RunRecorder  # noqa: E402
from dar.integrations.trl.config import DARConfig  # noqa: E402
from dar.integrations.trl.trainer import DARTrainer  # noqa: E402

__all__ = ["DARConfig", "DARTrainer", "RunRecorder"]
