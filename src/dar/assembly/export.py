"""A trained model as others want it: merged, in another precision, its base where it is found; on the Hub, with the
report of its run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType
from safetensors.torch import load_file, save_file

from dar.config.model import ModelSourceSpec
from dar.errors import ConfigError, require_package
from dar.files.atomic import written
from dar.files.hub import upload
from dar.policies.saving import save_model
from dar.policies.text.loading import followed, load_model, load_tokenizer, resolve_model
from dar.record.folder import RunFolder
from dar.reward_model.classifier import load_classifier


def export_model(path: Path, out: Path, *, merge: bool, dtype: str | None) -> str | None:
    """Writes the folder of a policy, a reward model or an adapter again.

    Args:
        path, out: the folder, or that of a run whose `model/` is meant, and the new one.
        merge: make one model of an adapter and its base.
        dtype: `bf16` or `fp32`, of the weights; None keeps theirs.

    Returns:
        The base, a Hub id or an absolute path, that what was written needs; None where it is a whole model.

    Raises:
        ConfigError: there is no model, or the base of an adapter cannot be had, or is an adapter itself and the two are
            not to be merged.
        CheckpointError: it cannot be written.
    """
    spec = ModelSourceSpec(path=str(path))
    base, adapters = followed(spec)
    source = Path(resolve_model(spec))
    if not adapters and not (source / "config.json").is_file():
        raise ConfigError(f"{source} holds no model: name the folder of a run, or of a model")
    if len(adapters) > 1 and not merge:
        raise ConfigError(f"{source} is an adapter on top of another, which few programs can follow: add --merge")
    needs = resolve_model(base) if adapters and not merge else None
    with written(out) as scratch:
        if adapters and merge:
            is_classifier = PeftConfig.from_pretrained(adapters[-1]).task_type == TaskType.SEQ_CLS
            model = load_classifier(spec) if is_classifier else load_model(spec)
            card = source / "README.md"
            text = card.read_text(encoding="utf-8") if card.is_file() else ""
            save_model(model, load_tokenizer(spec), scratch, card=text)
        else:
            shutil.copytree(source, scratch)
        settings = scratch / ("config.json" if needs is None else "adapter_config.json")
        changes = {} if needs is None else {"base_model_name_or_path": needs}
        if dtype is not None:
            precision = torch.bfloat16 if dtype == "bf16" else torch.float32
            changes |= {"dtype": str(precision).removeprefix("torch.")} if needs is None else {}
            for file in scratch.glob("*.safetensors"):
                tensors = load_file(file).items()
                kept = {name: each.to(precision) if each.is_floating_point() else each for name, each in tensors}
                save_file(kept, file, metadata={"format": "pt"})
        found = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps(found | changes, indent=2) + "\n", encoding="utf-8")
    return needs


def push_model(folder: Path, run: Path, repository: str, **settings: Any) -> str:
    """Uploads a model's folder, and `report.html` of the run that made it, if `run` is one or is a folder in one.

    Args:
        folder, repository, settings: of `dar.files.hub.upload`, which says what is returned and raised.

    Raises:
        ConfigError: what a report is made with is not installed.
    """
    found = next((each for each in (run, run.parent) if RunFolder(each).is_run), None)
    more = {} if found is None else {"report.html": report_html(found).encode()}
    return upload(folder, repository, more=more, **settings)


def report_html(run: Path) -> str:
    """The report of a run. Raises ConfigError where what it is made with is not installed."""
    require_package("plotly", "the report of a run")
    from dar.report.page import render_page  # noqa: PLC0415 - an extra
    from dar.report.run import load_trainings  # noqa: PLC0415

    return render_page(load_trainings([run]))
