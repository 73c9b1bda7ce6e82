"""DAR, and this library's record of a run, for people who train with TRL."""

from __future__ import annotations

from dar.integrations.trl.callback import RunRecorder

__all__ = ["RunRecorder"]
