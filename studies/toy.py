"""The toy language's runs, by `dar compare`: what is there already is not run again.

python -m studies.toy tune runs/study/tune
python -m studies.toy confirm runs/study/confirm --tuned studies/results/toy_tuned.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.frontier import area
from studies.methods import STRENGTHS, VARIANTS

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
COMPLETIONS = 128
"""A step's, of every method."""


def arm(name: str, settings: Mapping[str, Any], *others: str) -> str:
    """As `dar compare -a` has it."""
    settings = dict(settings)
    kind = settings.pop("type")
    if (number := settings.pop("num_generations", None)) is not None:
        others = (*others, f"num_generations={number}", f"prompts_per_step={COMPLETIONS // number}")
    overrides = [f"algorithm.{key}={json.dumps(value)}" for key, value in settings.items()]
    return ",".join([f"{name}:{kind}", *overrides, *others])


def tuning_arms(methods: Sequence[str]) -> list[str]:
    """Every strength of each method; the learning rates are the command's."""
    return [
        arm(f"{name}-{strength:g}", {**STRENGTHS[name][0], STRENGTHS[name][1]: strength})
        for name in methods
        for strength in STRENGTHS[name][2]
    ]


def confirmation_arms(tuned: Mapping[str, Any]) -> list[str]:
    """Each method at its best settings, and `dar` with one thing changed."""

    def best(name: str, method: str, changes: Mapping[str, Any], *others: str) -> str:
        found = tuned[method]
        rate = f"optim.learning_rate={found['rate']}"
        return arm(name, {**found["settings"], **changes}, rate, *others)

    return [
        *(best(name, name, {}) for name in tuned),
        *(best(name, "dar", changes) for name, changes in VARIANTS.items()),
        best("half", "dar", {}, "prompts_per_step=16"),
    ]


def choose(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method the strength and rate with the largest mean area under the proxy's frontier."""
    groups: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        kls, rewards = zip(*((row["kl_ref"], row["reward"]) for row in run["curve"]), strict=True)
        groups.setdefault((run["method"], run["learning_rate"]), []).append(area(kls, rewards))
    best: dict[str, dict[str, Any]] = {}
    for (name, rate), areas in groups.items():
        method, strength = name.rsplit("-", 1)
        fixed, key, values = STRENGTHS[method]
        mean = sum(areas) / len(areas)
        if method not in best or mean > best[method]["area"]:
            value = next(each for each in values if f"{each:g}" == strength)
            best[method] = {"settings": {**fixed, key: value}, "rate": rate, "area": mean, "num_runs": len(areas)}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["tune", "confirm"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tuned", type=Path, default=Path("studies/results/toy_tuned.json"))
    parser.add_argument("--methods", default=",".join(STRENGTHS))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--parallel", default="2")
    asked = parser.parse_args()
    if asked.stage == "tune":
        arms = tuning_arms(asked.methods.split(","))
        plan = ["--learning-rates", ",".join(map(str, RATES)), "--seeds", str(asked.seeds or 2), "--first-seed", "1000"]
    else:
        arms = confirmation_arms(json.loads(asked.tuned.read_text()))
        plan = ["--seeds", str(asked.seeds or 20)]
    chosen = [part for each in arms for part in ("-a", each)]
    line = ["-m", "dar", "compare", "studies/toy.yaml", *chosen, *plan, "-j", asked.parallel, "-o", str(asked.out)]
    code = subprocess.run([sys.executable, *line], check=False).returncode
    if code in (0, 1) and asked.stage == "tune":
        found = choose(json.loads((asked.out / "comparison.json").read_text())["runs"])
        asked.tuned.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
