"""Whether a run that exists is the run that is wanted: resolved settings, compared field by field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockffn.experiments.suite import Experiment

# How a run is computed, not what: they may differ between the machine that made a record and this one.
MACHINE_SETTINGS = (
    "compile", "micro_batch_size", "gradient_checkpointing", "parallel", "log_every", "evaluate_every", "evaluate_rows",
    "checkpoint_every", "keep_checkpoints",
)  # fmt: skip


def resolved_settings(experiment: Experiment, data: Path) -> dict[str, Any]:
    """Settings that `blockffn train` would resolve for this experiment on this data, as plain data.

    Raises:
        ValueError: unknown method, size or setting, or `data` is not a prepared folder.
    """
    from blockffn.settings import merge, parse_overrides, to_dict
    from blockffn.training.config import train_settings
    from blockffn.training.preparation import with_vocabulary

    changes = merge({"data": {"folders": {str(data): 1.0}}}, parse_overrides(experiment.overrides))
    return to_dict(with_vocabulary(train_settings(experiment.size, experiment.method, changes)))


def saved_settings(config: Path) -> dict[str, Any]:
    """Settings of a `config.yaml`. One that has come into being since then has its default."""
    from blockffn.settings import load_yaml, to_dict
    from blockffn.training.config import TrainSettings

    return to_dict(load_yaml(TrainSettings, config))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Settings in which a found run differs from the wanted one, as `name: found X, wanted Y`.

    Where the data lies is left out (its fingerprint is compared instead), and so are `MACHINE_SETTINGS`.
    """
    left, right = _flat(found), _flat(wanted)
    return [
        f"{name}: found {_shown(left.get(name))}, wanted {_shown(right.get(name))}"
        for name in sorted(left | right)
        if left.get(name) != right.get(name) and name not in MACHINE_SETTINGS and not name.startswith("data.folders.")
    ]


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
