"""What a method does once, before its first step."""

from __future__ import annotations

from collections.abc import Iterator

from dar.assembly.data import RunData
from dar.data.logged import LoggedSet
from dar.policies.protocol import Policy
from dar.record.folder import RunFolder
from dar.run.display import Display


class Before:
    """Nothing; a method that needs something says here what, and when."""

    def passes(self, data: RunData) -> Iterator[str]:
        """What is done, in words."""
        yield from ()

    def look(self, data: RunData, folder: RunFolder, *, resume: bool) -> None:
        """What needs no weights, or for a resumed run what was found at its start. Raises DarError."""

    def measure(self, data: RunData, policy: Policy, display: Display) -> LoggedSet | None:
        """What the initial weights are needed for; the completions of the data as the method then reads them.

        A resumed run has not restored its weights yet when this is called.
        """
        return data.logged

    def keep(self, folder: RunFolder) -> None:
        """Writes down what was found, once there is a run."""
