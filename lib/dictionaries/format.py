"""Dictionaries on disk, in sae-lens's own layout: `cfg.json` and `sae_weights.safetensors`.

A single-site dictionary loads in sae-lens and in what builds on it; BatchTopK stands there as
JumpReLU with its threshold, as sae-lens itself exports it. `cfg.json` keeps the config under
`metadata.latent_bench`, so what was saved here comes back as it was. Where the rest of the folder
no longer agrees with it (sae-lens keeps metadata of what it loads, changes and saves), the rest
counts.
"""

import json
import re
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.dictionaries.config import (
    DictionaryConfig,
    code_norms,
    config_from_json,
    config_to_json,
    site_norms,
)
from lib.dictionaries.rules import BatchTopK, Gated, JumpReLU, ReLU, TopK
from lib.runtime import atomic_folder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
Described = tuple[DictionaryConfig, dict[str, Tensor]]
"""What a `Dictionary` is made of: its config and its tensors by name."""
_ARCHITECTURES = {
    ReLU: "standard", Gated: "gated", JumpReLU: "jumprelu", TopK: "topk", BatchTopK: "jumprelu",
}  # fmt: skip


def require_saveable(config: DictionaryConfig) -> None:
    """Raises ValueError for a rule that the layout does not know."""
    if type(config.rule) not in _ARCHITECTURES:
        known = sorted(rule.__name__ for rule in _ARCHITECTURES)
        raise ValueError(f"cannot save {config.rule}: need a rule in {known}")


def write(folder: Path, config: DictionaryConfig, state: dict[str, Tensor]) -> Path:
    """Write the folder, whole or not at all; a dictionary that stood there is replaced.

    Args:
        state: a `Dictionary`'s tensors by name.

    Raises:
        ValueError: the folder holds anything else, which would be lost; an unknown rule.
    """
    require_saveable(config)
    others = (
        sorted({p.name for p in folder.iterdir()} - {CONFIG, WEIGHTS}) if folder.is_dir() else []
    )
    if others:
        raise ValueError(
            f"need a folder that is new or a dictionary's, got {folder} with {others[:5]}"
        )
    tensors = {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in sae_lens_tensors(config, state).items()
    }
    with atomic_folder(folder) as new:
        save_file(tensors, new / WEIGHTS)
        (new / CONFIG).write_text(json.dumps(sae_lens_config(config, state), indent=1) + "\n")
    return folder


def read(folder: Path) -> Described:
    """Config and tensors of a folder that `write` or sae-lens wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or something that `Dictionary` cannot be.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
            raise FileNotFoundError(f"need {name} in dictionary folder {folder}, got {present}")
    try:
        saved = dict(json.loads((folder / CONFIG).read_text()))
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"dictionary folder {folder} is damaged: {error}") from error
    return from_sae_lens(saved, weights, folder)


def folders(folder: Path) -> list[Path]:
    """`folder`, if it holds a dictionary, or those of its folders that do.

    Raises:
        FileNotFoundError: none does.
    """
    if (folder / CONFIG).is_file():
        return [folder]
    found = sorted(p.parent for p in folder.glob(f"[!.]*/{CONFIG}"))
    if not found:
        raise FileNotFoundError(f"need a dictionary ({CONFIG}) in {folder} or in a folder of it")
    return found


def sae_lens_config(config: DictionaryConfig, state: dict[str, Tensor]) -> dict:
    """`cfg.json`."""
    architecture = _ARCHITECTURES[type(config.rule)]
    # sae-lens's never subtract b_dec; one that does has equal widths and passes there for an SAE
    if config.out_dims is not None and not config.apply_b_dec_to_input:
        names = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
        architecture = names.get(architecture, architecture)
    hook_name = config.hook_names[0] if config.hook_names else ""
    whole_z = len(config.site_dims) == 1 and hook_name.endswith("hook_z")
    ours = config_to_json(config)
    if isinstance(config.rule, BatchTopK):
        ours["threshold"] = state["threshold"].tolist()
    written = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if whole_z else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # the layout's; without one sae-lens drops the metadata
            "model_name": config.model_name,
            **_hook_to_sae_lens(hook_name),
            "latent_bench": ours,
        },
    }
    if config.out_dims is not None:
        written["d_out"] = config.d_out
    if isinstance(config.rule, TopK):
        written |= {"k": config.rule.k, "rescale_acts_by_decoder_norm": False}
    return written


def sae_lens_tensors(config: DictionaryConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under sae-lens's names."""
    rule, tensors = config.rule, {name: state[name] for name in ("W_dec", "b_dec")}
    tensors["W_enc"] = state["W_dec"].T if config.tied else state["W_enc"]
    tensors["b_gate" if isinstance(rule, Gated) else "b_enc"] = state["b_enc"]
    if isinstance(rule, Gated):
        tensors |= {"r_mag": state["r_mag"], "b_mag": state["b_mag"]}
    if isinstance(rule, JumpReLU):
        tensors["threshold"] = state["log_threshold"].exp()
    if isinstance(rule, BatchTopK):
        by_site = config.code_norm == "decoupled"  # a latent fires where any site keeps it
        norms = (site_norms if by_site else code_norms)(config, state["W_dec"])
        norms = norms.clamp(min=1e-12) if by_site else norms
        bounds = state["threshold"][..., None] / norms
        tensors["threshold"] = bounds.amin(0) if by_site else bounds
    return tensors


def from_sae_lens(saved: dict, weights: dict[str, Tensor], where: object) -> Described:
    """Config and tensors of a `Dictionary`, from those of sae-lens.

    Raises:
        ValueError: something that `Dictionary` cannot be; the message begins with `where`.
    """
    weights = {name: value.float().cpu() for name, value in weights.items()}
    if "scaling_factor" in weights and bool((weights["scaling_factor"] == 1).all()):
        del weights["scaling_factor"]  # sae-lens once wrote it with every SAE
    try:
        ours = (saved.get("metadata") or {}).get("latent_bench")
        if ours is not None:
            plain = {name: value for name, value in ours.items() if name != "threshold"}
            config = config_from_json(plain)
            state = checked_state(config, weights, where, ours.get("threshold", 0.0))
            if _agrees(config, state, saved, weights):
                return config, state
        config = _config_of_sae_lens(saved, weights, where)
        return config, checked_state(config, weights, where)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {CONFIG} is damaged: {error!r}") from error


def checked_state(
    config: DictionaryConfig,
    weights: dict[str, Tensor],
    where: object,
    threshold: float | list[float] = 0.0,
) -> dict[str, Tensor]:
    """A `Dictionary`'s tensors, from those under sae-lens's names; `threshold` is BatchTopK's.

    Raises:
        ValueError: a tensor is missing, one too many, of another shape, or not finite.
    """
    _check(config, weights, where)
    rule, state = config.rule, {name: weights[name] for name in ("W_dec", "b_dec")}
    if not config.tied:
        state["W_enc"] = weights["W_enc"]
    state["b_enc"] = weights["b_gate" if isinstance(rule, Gated) else "b_enc"]
    if isinstance(rule, Gated):
        state |= {name: weights[name] for name in ("r_mag", "b_mag")}
    if isinstance(rule, JumpReLU):
        state["log_threshold"] = weights["threshold"].clamp(min=1e-30).log()
    if isinstance(rule, BatchTopK):
        found = torch.tensor(threshold, dtype=torch.float32)
        sites = (len(config.site_dims),) if config.code_norm == "decoupled" else ()
        if found.shape != sites or not found.isfinite().all():
            raise ValueError(f"{where}: need a finite threshold of shape {sites}, got {threshold}")
        state["threshold"] = found
    return state


def _agrees(
    config: DictionaryConfig,
    state: dict[str, Tensor],
    saved: dict,
    weights: dict[str, Tensor],
) -> bool:
    """Whether sae-lens would read the same dictionary from the folder."""
    written = sae_lens_config(config, state)
    decisive = written.keys() - {"d_out", "dtype", "device", "metadata"}
    return all(saved.get(name) == written[name] for name in decisive) and all(
        torch.allclose(value, weights[name], equal_nan=True)
        for name, value in sae_lens_tensors(config, state).items()
    )


def has_unit_rows(W_dec: Float[Tensor, "d_sae d_out"]) -> bool:
    return bool(((W_dec.norm(dim=1) - 1).abs() < 1e-4).all())


def _hook_to_sae_lens(hook_name: str) -> dict:
    """sae-lens names the head of `blocks.2.attn.hook_z.3` apart from the hook."""
    head = re.fullmatch(r"(.*hook_z)\.(\d+)", hook_name)
    if head is None:
        return {"hook_name": hook_name}
    return {"hook_name": head[1], "hook_head_index": int(head[2])}


def _config_of_sae_lens(saved: dict, weights: dict[str, Tensor], where: object) -> DictionaryConfig:
    """Also the form that sae-lens wrote before version 6; folds a rescaling into `weights`."""
    architecture = saved.get("architecture", "standard")
    k = saved.get("k")
    activation = saved.get("activation_fn") or saved.get("activation_fn_str") or "relu"
    if activation == "topk":
        architecture, k = "topk", (saved.get("activation_fn_kwargs") or {}).get("k", k)
    rules = {
        "standard": ReLU, "gated": Gated, "jumprelu": JumpReLU, "topk": TopK,
        "transcoder": ReLU, "jumprelu_transcoder": JumpReLU,
    }  # fmt: skip
    if architecture not in rules:
        raise ValueError(f"{where}: need architecture in {sorted(rules)}, got {architecture!r}")
    # expected_average_only_in (once True) is folded into the weights before sae-lens saves them
    normalize = saved.get("normalize_activations") or "none"
    if normalize not in ("none", True, "expected_average_only_in"):
        raise ValueError(f"{where}: need normalize_activations 'none', got {normalize!r}")
    if activation not in ("relu", "topk"):
        raise ValueError(f"{where}: need activation_fn 'relu', got {activation!r}")
    if not all(name in weights and weights[name].ndim == 2 for name in ("W_enc", "W_dec")):
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        raise ValueError(f"{where}: need matrices W_enc and W_dec, got {shapes}")
    if architecture == "topk" and saved.get("rescale_acts_by_decoder_norm"):
        norms = weights["W_dec"].norm(dim=1).clamp(min=1e-8)
        weights["W_enc"] = weights["W_enc"] * norms
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    metadata = {**saved, **(saved.get("metadata") or {})}
    hook_name, head = metadata.get("hook_name"), metadata.get("hook_head_index")
    if hook_name and head is not None:
        hook_name = f"{hook_name}.{head}"
    transcoder = architecture.endswith("transcoder")
    return DictionaryConfig(
        site_dims=(weights["W_enc"].shape[0],),
        d_sae=weights["W_dec"].shape[0],
        out_dims=(weights["W_dec"].shape[1],) if transcoder else None,
        rule=TopK(k=int(k)) if architecture == "topk" else rules[architecture](),
        hook_names=(hook_name,) if hook_name else (),
        model_name=metadata.get("model_name") or "",
        unit_norm_decoder=has_unit_rows(weights["W_dec"]),
        apply_b_dec_to_input=not transcoder and bool(saved.get("apply_b_dec_to_input", True)),
    )


def _check(config: DictionaryConfig, weights: dict[str, Tensor], where: object) -> None:
    """Exactly the tensors of `config`, of their shapes, finite."""
    expected = {
        "W_enc": (config.d_in, config.d_sae),
        "W_dec": (config.d_sae, config.d_out),
        "b_dec": (config.d_out,),
    }
    jump = ("b_enc", "threshold")
    latent = {Gated: ("b_gate", "r_mag", "b_mag"), JumpReLU: jump, BatchTopK: jump}
    expected |= dict.fromkeys(latent.get(type(config.rule), ("b_enc",)), (config.d_sae,))
    got = {name: tuple(value.shape) for name, value in weights.items()}
    if got != expected:
        raise ValueError(f"{where}: need tensors {expected}, got {got}")
    # a BatchTopK row of norm 0 has the threshold inf: it never fires
    free = {"threshold"} if isinstance(config.rule, BatchTopK) else set()
    bad = [name for name in expected.keys() - free if not weights[name].isfinite().all()]
    if bad:
        raise ValueError(f"{where}: NaN or infinite values in {', '.join(sorted(bad))}")
