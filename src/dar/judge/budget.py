"""What a judge may cost."""

from __future__ import annotations

from dar.config.judge import JudgeBudgetSpec
from dar.errors import BudgetError


class Budget:
    """Counts requests and tokens, and stops before a request that would be one too many.

    Retries of the same request are not counted. Tokens are known only afterwards: requests that are under way when the
    last one is spent still finish.
    """

    def __init__(self, spec: JudgeBudgetSpec) -> None:
        self.spec = spec
        self.requests = 0
        self.tokens = 0

    def require(self, requests: int) -> None:
        """Refuses a batch that would not fit, before any of it is asked for.

        Raises:
            BudgetError: fewer requests than that are left, or no tokens.
        """
        if self.spec.requests is not None and self.requests + requests > self.spec.requests:
            raise BudgetError(
                f"the judge's budget of {self.spec.requests} requests is used up: {self.requests} were made, "
                f"{requests} more are due. Raise the reward's budget.requests, and continue with --resume "
                "--allow-changed-recipe."
            )
        if requests and self.spec.tokens is not None and self.tokens >= self.spec.tokens:
            raise BudgetError(
                f"the judge's budget of {self.spec.tokens} tokens is used up: {self.tokens} were spent in "
                f"{self.requests} requests. Raise the reward's budget.tokens, and continue with --resume "
                "--allow-changed-recipe."
            )

    def begin(self) -> None:
        """Takes one request from the budget.

        Raises:
            BudgetError: no request, or no token, is left.
        """
        self.require(1)
        self.requests += 1
