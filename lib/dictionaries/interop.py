"""Dictionaries from and to other libraries; those libraries are imported only where they are used.

Nothing here executes what it reads: tensors come from safetensors, from NumPy archives of plain
arrays, and from `torch.load` restricted to tensors.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lib.dictionaries import format
from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.hub import Card, from_hub, push_to_hub
from lib.dictionaries.rules import BatchTopK, Gated, JumpReLU, ReLU, TopK

__all__ = [
    "Card",
    "from_crosscoder",
    "from_dictionary_learning",
    "from_hub",
    "from_pretrained",
    "from_sae_lens",
    "push_to_hub",
    "to_sae_lens",
]

# dictionary-learning's classes: rule, and whether b_dec is subtracted before encoding
_CLASSES = {
    "AutoEncoder": (ReLU, True),
    "AutoEncoderNew": (ReLU, False),
    "AutoEncoderTopK": (TopK, True),
    "BatchTopKSAE": (BatchTopK, True),
    "MatryoshkaBatchTopKSAE": (BatchTopK, True),
    "GatedAutoEncoder": (Gated, True),
    "JumpReluAutoEncoder": (JumpReLU, False),
}
# what its crosscoders call their code norms, by number
_CODE_NORMS = {1: "crosscoder", 2: "decoder", 3: "mixed", 4: "none", 5: "decoupled"}
# and its names of tensors; the weight matrices of its linear layers are transposed
_TENSORS = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc",
    "bias": "b_dec", "decoder.bias": "b_dec", "decoder_bias": "b_dec",
    "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip


def from_sae_lens(sae: nn.Module) -> Dictionary:
    """A sae-lens SAE or transcoder, of inference or training, as sae-lens would export it.

    BatchTopK becomes JumpReLU, and a rescaling by decoder norms is folded into the weights. A SAE
    of `hook_z` takes `[… n_heads d_head]` there and `[… n_heads*d_head]` here.

    Raises:
        ValueError: an architecture or an option that `Dictionary` does not have.
    """
    from sae_lens import TrainingSAE

    weights = sae.state_dict()
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(weights)
        saved = sae.cfg.get_inference_sae_cfg_dict()
    else:
        sae.process_state_dict_for_saving(weights)
        saved = sae.cfg.to_dict()
    found = format.from_sae_lens(saved, dict(weights), type(sae).__name__)
    return Dictionary.of(*found).to(sae.W_dec.device)


def to_sae_lens(dictionary: Dictionary) -> nn.Module:
    """The sae-lens SAE or transcoder of what `Dictionary.save` writes; several sites become one.

    Raises:
        ValueError: a TopK or Gated transcoder between widths, or decoupled norms, which sae-lens
            does not have.
    """
    from sae_lens import SAE

    d = dictionary
    if d.d_in != d.d_out and isinstance(d.config.rule, Gated | TopK):
        rule = type(d.config.rule).__name__
        raise ValueError(f"sae-lens has no {rule} transcoder, got one from {d.d_in} to {d.d_out}")
    if d.config.code_norm == "decoupled":
        raise ValueError("sae-lens has no decoupled norms: its SAE would write other sites")
    state = d.held_state()
    sae = SAE.from_dict(format.sae_lens_config(d.config, state))
    tensors = format.sae_lens_tensors(d.config, state)
    sae.load_state_dict({name: value.float() for name, value in tensors.items()})
    return sae.to(d.W_dec.device)


def from_pretrained(release: str | Path, sae_id: str = "") -> Dictionary:
    """A published dictionary, such as Gemma Scope's.

    Args:
        release: A local folder, else a release or a hub repository that sae-lens can load.
        sae_id: Folder or id inside it. A local folder holds `params.npz` (Gemma Scope), taken as
            it stands, or what `Dictionary.load` reads.

    Raises:
        FileNotFoundError: a local folder holds neither.
        ValueError: unknown release or id, damaged file, or something that `Dictionary` cannot be.
    """
    folder = Path(release) / sae_id
    if (folder / "params.npz").is_file():
        return _from_gemma_scope(folder / "params.npz")
    if folder.is_dir():
        return Dictionary.load(folder)
    from sae_lens import SAE

    return from_sae_lens(SAE.from_pretrained(str(release), sae_id))


def _from_gemma_scope(file: Path) -> Dictionary:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (AttributeError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is no archive of plain arrays: {error}") from error
    saved = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    return Dictionary.of(*format.from_sae_lens(saved, weights, file))


def from_dictionary_learning(folder: str | Path) -> Dictionary:
    """What dictionary-learning's trainers save: `ae.pt` and `config.json`.

    Weights are taken as they stand, where the package's own loader divides the decoder rows of an
    `AutoEncoder` by their norms. A threshold that was never estimated (-1) becomes 0.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `ae.pt` holds more than tensors (none of it is executed), a file is damaged, or
            another class.
    """
    folder = Path(folder)
    trainer = _trainer_config(folder)
    rule_class, applied = _CLASSES[trainer["dict_class"]]
    state = _plain_tensors(folder / "ae.pt")
    k = int(state.pop("k", trainer.get("k", 0)))
    weights = _renamed(state)
    if not all(name in weights and weights[name].ndim == 2 for name in ("W_enc", "W_dec")):
        raise ValueError(f"{folder / 'ae.pt'}: need two weight matrices, got {sorted(state)}")
    if rule_class is TopK:
        weights.pop("threshold", None)  # its encoder ignores it unless told otherwise
    threshold = 0.0
    if rule_class is BatchTopK:
        if "threshold" not in weights or weights["threshold"].ndim:
            raise ValueError(f"{folder / 'ae.pt'}: need a scalar threshold, got {sorted(state)}")
        threshold = max(weights["threshold"].item(), 0.0)
        weights["threshold"] = torch.full(weights["W_enc"].shape[1:], threshold)
    config = DictionaryConfig(
        site_dims=(weights["W_enc"].shape[0],),
        d_sae=weights["W_enc"].shape[1],
        rule=rule_class(k=k) if rule_class in (TopK, BatchTopK) else rule_class(),
        hook_names=_hook_names(trainer),
        model_name=trainer.get("lm_name") or "",
        unit_norm_decoder=format.has_unit_rows(weights["W_dec"]),
        apply_b_dec_to_input=applied,
        code_norm="none" if rule_class is BatchTopK else "decoder",
    )
    state = format.checked_state(config, weights, folder / "ae.pt", threshold)
    return Dictionary.of(config, state)


def from_crosscoder(folder: str | Path, *, code_norm: str = "", revision: str = "") -> Dictionary:
    """A `CrossCoder` or `BatchTopKCrossCoder` of dictionary-learning's fork for crosscoders.

    Args:
        folder: What its trainers save (`ae.pt` and `config.json`), what it uploads
            (`model.safetensors` and `config.json`), or a hub id of the latter.
        code_norm: of weights that do not say; theirs is taken where they do.
        revision: Branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: anything else than tensors (none of it is executed), tensors of other shapes,
            weights that keep statistics to normalise with, an unknown code norm.
    """
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "model.safetensors", "ae.pt"]
        folder = snapshot_download(str(folder), revision=revision or None, allow_patterns=patterns)
    files = [Path(folder) / name for name in ("model.safetensors", "ae.pt", "config.json")]
    file = next((file for file in files[:2] if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"need model.safetensors or ae.pt in crosscoder folder {folder}")
    saved = json.loads(files[2].read_text()) if files[2].is_file() else {}
    options = {**saved, **saved.get("trainer", {})}
    try:
        state = load_file(file) if file.suffix == ".safetensors" else _plain_tensors(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    state = {name.removeprefix("_orig_mod."): value.float() for name, value in state.items()}
    kind = _CODE_NORMS.get(int(state.pop("code_normalization_id", 0)), code_norm)
    if not kind:
        raise ValueError(f"{file} names no code norm: need code_norm, such as 'crosscoder'")
    k, threshold, _ = (state.pop(name, None) for name in ("k", "threshold", "target_rms"))
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    n, d, d_sae = [*shapes.get("encoder.weight", ()), 0, 0, 0][:3]
    needed = {"encoder.weight": (n, d, d_sae), "encoder.bias": (d_sae,)}
    needed |= {"decoder.weight": (n, d_sae, d), "decoder.bias": (n, d)}
    if shapes != needed:
        raise ValueError(f"{file}: need a crosscoder's {sorted(needed)} alone, got {shapes}")
    alphas = (("code_normalization_alpha_sae", 1.0), ("code_normalization_alpha_cc", 0.1))
    bounds = (n,) if kind == "decoupled" else ()
    if (k is None) != (threshold is None) or (k is not None and threshold.shape != bounds):
        raise ValueError(f"{file}: need k and a threshold {bounds}, got {k} and {threshold}")
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{file}: NaN or infinite values in {bad}")
    config = DictionaryConfig(
        site_dims=(d,) * n,
        d_sae=d_sae,
        rule=ReLU() if threshold is None else BatchTopK(k=int(k)),
        model_name=options.get("lm_name") or "",
        unit_norm_decoder=False,
        apply_b_dec_to_input=False,
        code_norm=kind,
        mix=tuple(options.get(name, default) for name, default in alphas),
    )
    tensors = {
        "W_enc": state["encoder.weight"].flatten(0, 1),
        "W_dec": state["decoder.weight"].transpose(0, 1).flatten(1),
        "b_enc": state["encoder.bias"],
        "b_dec": state["decoder.bias"].flatten(),
    }
    if threshold is not None:
        tensors["threshold"] = threshold.clamp(min=0)
    return Dictionary.of(config, tensors)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under sae-lens's names; matryoshka's group sizes are of use in training only."""
    return {
        _TENSORS.get(name, name): value.float().T if name.endswith(".weight") else value.float()
        for name, value in state.items()
        if name != "group_sizes"
    }


def _trainer_config(folder: Path) -> dict:
    for name in ("config.json", "ae.pt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"need {name} in dictionary-learning folder {folder}")
    file = folder / "config.json"
    try:
        trainer = json.loads(file.read_text())["trainer"]
        dict_class = trainer["dict_class"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: need trainer.dict_class, got {error!r}") from error
    if dict_class not in _CLASSES:
        raise ValueError(f"{file}: need dict_class in {sorted(_CLASSES)}, got {dict_class!r}")
    return trainer


def _plain_tensors(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a pickle of anything else, or a damaged one, raises almost anything
        raise ValueError(f"{file} does not hold plain tensors; nothing in it was run") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file}: need a dict of tensors, got {type(state).__name__}")
    return dict(state)


def _hook_names(trainer: dict) -> tuple[str, ...]:
    """Its trainers name the residual stream after a layer `resid_post_layer_N`, others freely."""
    known = str(trainer.get("submodule_name") or "").startswith("resid_post")
    return (f"blocks.{trainer['layer']}.hook_resid_post",) if known and "layer" in trainer else ()
