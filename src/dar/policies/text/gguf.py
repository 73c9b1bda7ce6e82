"""GGUF files: dequantised once into a cache of ordinary safetensors folders, then loaded from there."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dar.errors import ConfigError, require_package
from dar.files.atomic import written
from dar.files.intake import sha256_of
from dar.files.paths import cache_root


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
        digest = sha256_of(file)
    except OSError as error:
        raise ConfigError(f"cannot read the model file {file}: {error}") from error
    if sha256 and digest != sha256.lower():
        raise ConfigError(
            f"{file} ({file.stat().st_size:,} bytes) is not the expected file: its SHA-256 is {digest}, expected "
            f"{sha256}. It may be a truncated download or another version; fetch it again or drop model.sha256."
        )
    target = cache_root() / "gguf" / f"{file.stem}-{digest[:16]}"
    if (target / "config.json").exists():
        return target
    require_package("gguf", str(file))
    try:
        with written(target) as scratch:
            _convert(file, scratch)
    except OSError as error:
        raise ConfigError(f"cannot write the model cache {target.parent}: {error}; set DAR_CACHE") from error
    return target


def _convert(file: Path, folder: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        raise ConfigError(f"{file} cannot be read as a GGUF language model: {type(error).__name__}: {error}") from error
    # The weights are plain fp32 now; left in place, the quantiser would refuse to save them.
    setattr(model, "hf_quantizer", None)  # noqa: B010 - nn.Module's annotations do not know the attribute
    delattr(model.config, "quantization_config")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
