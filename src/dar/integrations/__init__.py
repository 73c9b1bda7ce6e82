"""DAR in other trainers: each adapter is an extra, and says at import which versions it was tested with."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from dar.errors import ConfigError, require_package


def require_tested(package: str, versions: str) -> None:
    """Raises ConfigError where an adapter's package is missing, or of none of the versions it was compared with."""
    require_package(package, f"dar.integrations.{package}")
    if version(package) not in SpecifierSet(versions):
        raise ConfigError(
            f"dar.integrations.{package} was tested with {package}{versions}, and {package} {version(package)} is "
            "installed: another version may compute something else in the places that this builds on. Install one that "
            f"fits: pip install 'dar-rlhf[{package}]'"
        )
