"""SAE-LoRA on disk: `params.safetensors` and `metadata.json`, weights of the support alone."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.runtime import atomic_folder

PARAMS, METADATA, KIND = "params.safetensors", "metadata.json", "sae_lora"


def write(folder: Path, tensors: dict[str, Tensor], about: dict, metadata: dict) -> Path:
    """Write both files or neither; see `SaeLora.save`."""
    others = sorted({p.name for p in folder.glob("*")} - {PARAMS, METADATA})
    if others or folder.is_file():
        got = f"{folder} with {others[:5]}" if others else f"the file {folder}"
        raise ValueError(f"need a folder that is new or an adapter's, got {got}")
    about = {"kind": KIND, **about}
    if taken := about.keys() & metadata.keys():
        raise ValueError(f"need metadata without {sorted(about)}, got {sorted(taken)}")
    with atomic_folder(folder) as new:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, new / PARAMS)
        text = json.dumps({**about, **metadata}, indent=1)
        (new / METADATA).write_text(text + "\n", encoding="utf-8")
    return folder


def read(folder: Path) -> tuple[int, SaeLoraConfig, dict[str, Tensor]]:
    """d_sae, config and tensors of what `SaeLora.save` wrote; see `SaeLora.load`."""
    for name in (PARAMS, METADATA):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"need {name} in adapter folder {folder}")
    try:
        about = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        if about["kind"] != KIND:
            raise ValueError(f"need kind {KIND!r}, got {about['kind']!r}")
        d_sae, config = about["d_sae"], SaeLoraConfig(**about["config"])
        tensors = load_file(folder / PARAMS)
        n_read, n_write, rank = len(tensors["read"]), len(tensors["write"]), config.rank
        shapes = {"read": (n_read,), "write": (n_write,), "scale": (rank,)}
        shapes |= {"lora_A": (rank, n_read), "lora_B": (n_write, rank)}
        for name, needed in shapes.items():
            if tensors[name].shape != needed or not tensors[name].isfinite().all():
                got = tuple(tensors[name].shape)
                raise ValueError(f"need finite {name} of shape {needed}, got shape {got}")
        for name in ("read", "write"):
            if not ((tensors[name] >= 0) & (tensors[name] < d_sae)).all():
                raise ValueError(f"need latents in 0 to {d_sae - 1} in {name}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no complete SAE-LoRA: {error}") from error
    return d_sae, config, tensors
