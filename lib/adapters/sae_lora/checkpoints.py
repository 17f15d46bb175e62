"""Checkpoints of a SAE-LoRA's training: one folder a step, complete or absent."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.runtime import atomic_folder
from lib.training.checkpoint import checkpoints_in, plain, remove, require_same

if TYPE_CHECKING:
    from lib.adapters.sae_lora.trainer import Training

_NUMBERS = ("step", "history", "seconds", "since_best")


def save_checkpoint(folder: Path, run: "Training", identity: dict) -> None:
    """Write `checkpoint-<step>` and then remove older ones."""
    tensors = run.weights() | {
        "weights": run.regularizer.weights,
        "log_alpha": run.regularizer.log_alpha,
        "started": torch.tensor(run.regularizer.started),
    }
    for i, state in enumerate(run.optimizer.state.values()):
        tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
    about = {name: getattr(run, name) for name in _NUMBERS} | {"identity": identity}
    if run.best is not None:
        about["best"] = run.best[0]
        tensors |= {f"best.{name}": value for name, value in run.best[1].items()}
    with atomic_folder(folder / f"checkpoint-{run.step}") as new:
        save_file(plain(tensors), new / "training.safetensors")
        (new / "state.json").write_text(json.dumps(about))
    for step, path in checkpoints_in(folder):
        if step != run.step:
            remove(path)


def load_checkpoint(folder: Path, run: "Training", identity: dict) -> None:
    """Put `run` back to the newest checkpoint in `folder`; nothing happens if there is none.

    Raises:
        ValueError: it is damaged, or of another config; the message lists what differs.
    """
    found = checkpoints_in(folder)
    if not found:
        return
    newest = max(found)[1]
    try:
        about = json.loads((newest / "state.json").read_text())
        tensors = load_file(newest / "training.safetensors")
        then = about["identity"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {newest} is damaged: {error}") from error
    require_same(newest, then, identity)
    run.restore_({name: tensors[name] for name in run.weights()})
    run.regularizer.weights.copy_(tensors["weights"])
    run.regularizer.log_alpha.data.copy_(tensors["log_alpha"])
    run.regularizer.started = tuple(tensors["started"].tolist())
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        own = {
            key.rsplit(".", 1)[1]: value
            for key, value in tensors.items()
            if key.startswith(f"adam.{i}.")
        }
        if own:
            run.optimizer.state[parameter] = {
                key: value.to("cpu" if key == "step" else parameter.device)
                for key, value in own.items()
            }
    for name in _NUMBERS:
        setattr(run, name, about[name])
    if "best" in about:
        run.best = about["best"], {name: tensors[f"best.{name}"] for name in run.weights()}
