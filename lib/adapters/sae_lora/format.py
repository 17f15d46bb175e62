"""SAE-LoRA on disk: `params.safetensors` and `metadata.json`, weights of the support alone."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.dictionaries import Dictionary
from lib.runtime import atomic_folder

PARAMS, METADATA = "params.safetensors", "metadata.json"


def save(adapter: SaeLora, folder: Path, metadata: dict) -> Path:
    """See `SaeLora.save`."""
    require_own(folder)
    read, write = adapter.read_support.sort().values, adapter.write_support.sort().values
    gates = adapter.gates or (adapter.read_mask, adapter.write_mask)
    tensors = {
        "read": read,
        "write": write,
        "lora_A": (adapter.lora_A * gates[0]).detach()[:, read],
        "lora_B": (adapter.lora_B * gates[1][:, None]).detach()[write],
        "scale": adapter.scale.detach(),
    }
    about = {"kind": "sae_lora", "d_sae": adapter.d_sae, "config": asdict(adapter.config)}
    if taken := about.keys() & metadata.keys():
        raise ValueError(f"need metadata without {sorted(about)}, got {sorted(taken)}")
    with atomic_folder(folder) as new:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, new / PARAMS)
        text = json.dumps({**about, **metadata}, indent=1)
        (new / METADATA).write_text(text + "\n", encoding="utf-8")
    return folder


@torch.no_grad()
def load(folder: Path, dictionary: Dictionary | nn.Module) -> SaeLora:
    """See `SaeLora.load`."""
    d_sae, config, tensors = _read(folder)
    adapter = SaeLora(dictionary, config)
    if d_sae != adapter.d_sae:
        raise ValueError(
            f"need the dictionary of {d_sae} latents that {folder} was trained on, "
            f"got one of {adapter.d_sae}"
        )
    for weights, mask, kept in (
        (adapter.lora_A, adapter.read_mask, tensors["read"]),
        (adapter.lora_B.T, adapter.write_mask, tensors["write"]),
    ):
        weights.zero_()
        mask.zero_()[kept] = 1.0
    adapter.lora_A[:, tensors["read"]] = tensors["lora_A"].to(adapter.lora_A)
    adapter.lora_B[tensors["write"]] = tensors["lora_B"].to(adapter.lora_B)
    adapter.scale.copy_(tensors["scale"])
    return adapter


def require_own(folder: Path) -> None:
    """Raises ValueError where saving would replace what is no adapter's."""
    is_file = folder.exists() and not folder.is_dir()
    found = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(found - {PARAMS, METADATA})[:5]
    if is_file or others:
        got = f"{folder} with {others}" if others else f"the file {folder}"
        raise ValueError(f"need a folder that is new or an adapter's, got {got}")


def _read(folder: Path) -> tuple[int, SaeLoraConfig, dict[str, Tensor]]:
    """d_sae, config and tensors of what `SaeLora.save` wrote; see `SaeLora.load`."""
    for name in (PARAMS, METADATA):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"need {name} in adapter folder {folder}")
    try:
        about = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        if about["kind"] != "sae_lora":
            raise ValueError(f"need kind 'sae_lora', got {about['kind']!r}")
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
