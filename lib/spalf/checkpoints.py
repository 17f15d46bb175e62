"""Checkpoints of SPALF: one folder a step, complete or absent; the newest is what counts.

`model`, `whitener`, `control`, `optimizer`, `stream` (.safetensors) and `metadata.json`.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.runtime import atomic_folder
from lib.spalf.trainer import Trainer
from lib.spalf.whitening import Whitener
from lib.training.checkpoint import (
    Resumable,
    checkpoints_in,
    plain,
    remove,
    require_same,
)


def save_checkpoint(folder: Path, trainer: Trainer, stream: Any, about: dict) -> None:
    """Write `checkpoint-<step>` and then remove older ones; `about` becomes `metadata.json`."""
    step = about["step"]
    with atomic_folder(folder / f"checkpoint-{step}") as new:
        for name, tensors in _tensors(trainer).items():
            save_file(plain(tensors), new / f"{name}.safetensors")
        trainer.whitener.save(new / "whitener.safetensors")
        if isinstance(stream, Resumable):
            save_file(plain(stream.state_dict()), new / "stream.safetensors")
        (new / "metadata.json").write_text(json.dumps(about))
    for other, path in checkpoints_in(folder):
        if other != step:
            remove(path)


def load_checkpoint(folder: Path, trainer: Trainer, stream: Any, identity: dict) -> dict | None:
    """Put everything back to the newest checkpoint and give its metadata; None if there is none.

    A stream that is not `Resumable` is read and thrown away up to where it was.

    Raises:
        ValueError: it is of another config (the message lists what differs), or damaged, or the
            stream ends before it.
    """
    found = checkpoints_in(folder)
    if not found:
        return None
    newest = max(found)[1]
    about = newest_metadata(folder)
    require_same(newest, about["identity"], identity)
    try:
        names = ("model", "control", "optimizer")
        tensors = {name: load_file(newest / f"{name}.safetensors") for name in names}
        position = newest / "stream.safetensors"
        saved = load_file(position) if position.exists() else None
        whitener = Whitener.load(newest / "whitener.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {newest} is damaged: {error}") from error
    _restore(trainer, tensors, whitener)
    n_read = about["drawn"] + about["step"]
    if isinstance(stream, Resumable) and saved is not None:
        stream.load_state_dict(saved)
    elif sum(1 for _ in itertools.islice(stream, n_read)) < n_read:
        raise ValueError(f"the stream ended before batch {n_read}, where {newest} goes on")
    return about


def newest_metadata(folder: Path) -> dict:
    """Of the newest checkpoint in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    found = checkpoints_in(folder)
    if not found:
        raise FileNotFoundError(f"need a checkpoint of SPALF in {folder}, got none")
    path = max(found)[1] / "metadata.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _tensors(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    numbers = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in trainer.numbers.items()
    }
    latest = {
        f"latest.{name}": torch.tensor(g, dtype=torch.float64) for name, g in trainer.latest.items()
    }
    moments = {
        f"{name}.{key}": value
        for name, parameter in trainer.dictionary.named_parameters()
        for key, value in trainer.optimizer.state[parameter].items()
    }
    control = {f"law.{key}": value for key, value in trainer.control.state_dict().items()}
    return {
        "model": trainer.dictionary.state_dict(),
        "control": control | numbers | latest | {"since_fired": trainer.since_fired},
        "optimizer": moments | {"encoder_unit": torch.tensor(trainer.encoder_unit)},
    }


def _restore(trainer: Trainer, tensors: dict[str, dict[str, Tensor]], whitener: Whitener) -> None:
    control, device = tensors["control"], trainer.since_fired.device
    trainer.dictionary.load_state_dict(tensors["model"])
    trainer.whitener = whitener.to(device)
    trainer.numbers = {name: control[name].item() for name in trainer.numbers}
    if trainer.phase_2_at is not None:
        trainer.control.add("kl")
        trainer.latest["kl"] = 0.0
    trainer.latest = {name: control[f"latest.{name}"].item() for name in trainer.latest}
    law = {k.removeprefix("law."): v for k, v in control.items() if k.startswith("law.")}
    trainer.control.load_state_dict(law)
    trainer.since_fired.copy_(control["since_fired"])
    trainer.encoder_unit = tensors["optimizer"]["encoder_unit"].item()
    for name, parameter in trainer.dictionary.named_parameters():
        trainer.optimizer.state[parameter] = {
            key: tensors["optimizer"][f"{name}.{key}"].to(device).clone()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
