"""A Hugging Face causal language model and its tokenizer, from the hub or from a folder."""

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.models.families import hugging_face
from lib.paths import resolve
from lib.runtime import resolve_device, resolve_dtype

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | dict[str, int | str] | None = None,
    load_in_4bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode, and its tokenizer.

    A relative folder is looked for below the project's root; what is no folder is a hub id. A
    tokenizer without a pad token pads with its eos token, so a mask by `input_ids != pad` would
    drop true ends of sequence: use the attention mask.

    Args:
        dtype: float32, bfloat16 or float16; with 4-bit weights, the type they are computed in.
        device: auto, cpu, cuda, cuda:N or mps; the whole model goes there.
        device_map: accelerate's map, such as "auto", to spread over several devices instead.
        load_in_4bit: NF4 weights through bitsandbytes; needs a CUDA GPU.

    Raises:
        FileNotFoundError: the folder, its config.json or its tokenizer is missing.
        OSError: neither a folder nor a hub id that can be loaded.
        ValueError: an impossible dtype or device, both `device` and `device_map`, or weights that
            are not in the files, such as a headless model's unembedding.
        ImportError, RuntimeError: 4-bit without bitsandbytes, or without a CUDA GPU.
    """
    if device_map is not None and device != "auto":
        raise ValueError(f"need device or device_map, got both: {device!r} and {device_map!r}")
    placement = device_map if device_map is not None else {"": str(resolve_device(device))}
    compute_dtype = resolve_dtype(dtype)
    quantization = four_bit(compute_dtype) if load_in_4bit else None
    source = locate(name_or_path)
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(
            f"cannot load {str(name_or_path)!r}: it is neither a folder ({resolve(name_or_path)}) "
            f"with a readable config.json nor a hub id that can be loaded; {error}"
        ) from error

    tokenizer = AutoTokenizer.from_pretrained(source, config=config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=compute_dtype,
        device_map=placement,
        quantization_config=quantization,
        output_loading_info=True,
    )
    if report["missing_keys"]:  # a model without its unembedding, say: it would be made up
        missing = sorted(report["missing_keys"])
        raise ValueError(f"need all weights in {source}, got none for {', '.join(missing[:3])}")
    return model.eval(), tokenizer


def locate(name_or_path: str | Path) -> str:
    """The folder as an absolute path, checked; or the hub id as it came.

    Raises:
        FileNotFoundError: see `load_model`.
    """
    name, folder = str(name_or_path), resolve(name_or_path)
    if folder.is_dir():
        require_model_files(folder)
        return str(folder)
    is_hub_id = isinstance(name_or_path, str) and name.count("/") <= 1 and name[:1] not in "/.~"
    if is_hub_id and not folder.exists():
        return name
    raise FileNotFoundError(
        f"need a model folder or a hub id ('name' or 'owner/name'), got {name!r}: "
        f"{folder} is not a folder"
    )


def require_model_files(folder: Path) -> None:
    """Raise FileNotFoundError unless `folder` has a config and a tokenizer.

    Without vocabulary files AutoTokenizer makes up an almost empty tokenizer and says nothing.
    """
    present = sorted(path.name for path in folder.iterdir())
    if "config.json" not in present:
        hint = (
            "; this is a PEFT adapter: load its base model, then PeftModel.from_pretrained"
            if "adapter_config.json" in present
            else ""
        )
        raise FileNotFoundError(f"need config.json in model folder {folder}, got {present}{hint}")
    if not set(VOCABULARY_FILES) & set(present):
        raise FileNotFoundError(
            f"need a tokenizer in model folder {folder} (one of {', '.join(VOCABULARY_FILES)}), "
            f"got {present}; save it there with tokenizer.save_pretrained"
        )


def four_bit(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314).

    Raises:
        RuntimeError: no CUDA GPU.
        ImportError: bitsandbytes is not installed.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("load_in_4bit needs a CUDA GPU, got none; use load_in_4bit=False")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the config, and over every weight's rows and columns, summed as integers.

    Integer sums are exact, so neither device nor threads matter, and reading the weights is
    all it costs; whatever changes a single weight changes it.
    """
    config = hugging_face(model).config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        numbers = weight.detach().contiguous().view(integers[weight.element_size()])
        axes = (0, 1) if numbers.ndim > 1 else ()
        sums = [numbers.flatten(1).sum(axis, dtype=torch.int64) for axis in axes]
        for part in sums or [numbers]:
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()
