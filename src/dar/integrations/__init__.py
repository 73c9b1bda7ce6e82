"""DAR in other programs: each adapter is an extra, used with the versions that it was tested with and no others."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from dar.errors import EXTRAS, ConfigError, require_package

TESTED = {"trl": ">=1.16,<1.17", "verl": ">=0.9,<0.10", "lm_eval": ">=0.4.13,<0.5"}
"""By package, the versions that an adapter was compared with; pyproject.toml's extras have the same."""


def require_tested(package: str, what: str) -> None:
    """Raises ConfigError where an adapter's package is missing, or of none of the versions it was compared with.

    Args:
        package: as it is imported.
        what: needs it, for the message.
    """
    require_package(package, what)
    if version(package) not in SpecifierSet(TESTED[package]):
        raise ConfigError(
            f"{what} was tested with {package}{TESTED[package]}, and {package} {version(package)} is installed: "
            "another version may compute something else in the places that this builds on. Install one that fits: "
            f"pip install 'dar-rlhf[{EXTRAS[package]}]'"
        )
