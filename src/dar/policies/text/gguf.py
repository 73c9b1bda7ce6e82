"""GGUF files: dequantised once into a cache of ordinary safetensors folders, then loaded from there."""

from __future__ import annotations

import functools
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dar.console import waiting
from dar.errors import ConfigError, require_package
from dar.files.intake import sha256_of
from dar.policies.cached import made_once


def converted(file: Path, *, sha256: str | None = None) -> Path:
    """The folder with the file's model and tokenizer as safetensors, converted now unless it was before.

    Args:
        file: a `.gguf` file.
        sha256: the digest the file must have.

    Raises:
        ConfigError: the digest is another one, the file cannot be read as a causal language model, or the cache
            folder cannot be written.
    """
    try:
        found = file.stat()
        digest = _digest(file.absolute(), found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise ConfigError(f"cannot read the model file {file}: {error}") from error
    if sha256 and digest != sha256.lower():
        raise ConfigError(
            f"{file} ({found.st_size:,} bytes) is not the expected file: its SHA-256 is {digest}, expected "
            f"{sha256}. It may be a truncated download or another version; fetch it again or drop model.sha256."
        )
    return made_once(f"gguf/{file.stem}-{digest[:16]}", lambda folder: _convert(file, folder))


def _convert(file: Path, folder: Path) -> None:
    require_package("gguf", str(file))
    with waiting(f"converting {file.name}, once"):
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{file} cannot be read as a GGUF language model: {said}") from error
        # The weights are plain fp32 now; left in place, the quantiser would refuse to save them.
        setattr(model, "hf_quantizer", None)  # noqa: B010 - nn.Module's annotations do not know the attribute
        delattr(model.config, "quantization_config")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@functools.lru_cache(maxsize=8)
def _digest(file: Path, _mtime_ns: int, _size: int) -> str:
    """SHA-256 of a file; a start asks for its configuration, tokenizer and weights, and reads gigabytes once."""
    return sha256_of(file)
