"""Whether torch.compile works on this machine, and a machine where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch._inductor.config

from dar.errors import ConfigError
from dar.policies.text.compiling import require_compiler


def has_compiler() -> bool:
    try:
        require_compiler(torch.device("cpu"))
    except ConfigError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")


@contextmanager
def no_compiler() -> Iterator[None]:
    """Inside, torch finds no C++ compiler, and nothing it compiled before."""
    torch.compiler.reset()
    try:
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
            yield
    finally:
        torch.compiler.reset()
