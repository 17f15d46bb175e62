"""Dictionaries on the Hugging Face hub, each with a model card."""

import html
import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lib.dictionaries.config import config_to_json
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.format import CONFIG, WEIGHTS

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_FOLDER = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says beside the dictionary's config."""

    title: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name and value, such as fvu, l0, loss_recovered."""
    base_model: str = ""
    """Hub id of the model whose activations are explained."""
    dataset: str = ""
    """Hub id of the text that it was trained on."""
    license: str = ""
    """Hub identifier, such as `mit`."""
    notes: str = ""
    """Plain text; blank lines part paragraphs."""

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ValueError("need a title, got none")
        for name in ("base_model", "dataset", "license"):
            value = getattr(self, name)
            if value and not _HUB_ID.fullmatch(value):
                raise ValueError(f"need {name} as the hub names it, got {value!r}")
        bad = {name: value for name, value in self.metrics.items() if not math.isfinite(value)}
        if bad:
            raise ValueError(f"need finite metrics, got {bad}")

    def text(self, dictionary: Dictionary, repo_id: str, subfolder: str = "") -> str:
        """`README.md`: nothing in it but its own headings, tables and code is markup."""
        config = config_to_json(dictionary.config)
        del config["model_name"]  # may be a folder of the machine that trained it
        where = ", ".join(json.dumps(part) for part in (repo_id, subfolder) if part)
        paragraphs = [_plain(part) for part in re.split(r"\n\s*\n", self.notes) if part.strip()]
        return "\n".join(
            [
                *self._header(),
                f"# {_plain(self.title)}",
                "",
                *[line for part in paragraphs for line in (part, "")],
                *(_table("metric", self.metrics) if self.metrics else []),
                *_table("config", config),
                "```python",
                "from lib.dictionaries.interop import from_hub",
                "",
                f"dictionary = from_hub({where})",
                "```",
                "",
                f"`{CONFIG}` and `{WEIGHTS}` are in sae-lens's layout.",
                "",
            ]
        )

    def _header(self) -> list[str]:
        facts = {
            "library_name": "saelens",
            "tags": ["latent-bench", "sparse-autoencoder"],
            "license": self.license,
            "base_model": self.base_model,
            "datasets": [self.dataset] if self.dataset else [],
        }
        # JSON is YAML
        lines = [f"{name}: {json.dumps(value)}" for name, value in facts.items() if value]
        return ["---", *lines, "---", ""]


def push_to_hub(
    dictionary: Dictionary,
    repo_id: str,
    card: Card,
    *,
    subfolder: str = "",
    private: bool = False,
) -> None:
    """Upload what `save` writes, and its card, in one commit; the repository is made if need be.

    Raises:
        ValueError: a repository or folder that cannot exist.
    """
    from huggingface_hub import HfApi

    _check_place(repo_id, subfolder)
    with tempfile.TemporaryDirectory() as parent:
        folder = dictionary.save(Path(parent) / "dictionary")
        (folder / "README.md").write_text(
            card.text(dictionary, repo_id, subfolder), encoding="utf-8"
        )
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder or None,
            commit_message=f"Add {subfolder or 'dictionary'}",
        )


def from_hub(repo_id: str, subfolder: str = "", *, revision: str | None = None) -> Dictionary:
    """A dictionary that `push_to_hub` or sae-lens uploaded.

    Args:
        revision: Branch, tag or commit; None is the main branch as it is now.

    Raises:
        FileNotFoundError: the repository has no dictionary there.
        ValueError: as `Dictionary.load`, or a repository or folder that cannot exist.
    """
    from huggingface_hub import snapshot_download

    _check_place(repo_id, subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    files = [prefix + CONFIG, prefix + WEIGHTS]
    folder = snapshot_download(repo_id, revision=revision, allow_patterns=files)
    return Dictionary.load(Path(folder) / subfolder)


def _check_place(repo_id: str, subfolder: str) -> None:
    if not _HUB_ID.fullmatch(repo_id):
        raise ValueError(f"need repo_id as 'owner/name', got {repo_id!r}")
    if subfolder and not _FOLDER.fullmatch(subfolder):
        raise ValueError(f"need subfolder as 'name' or 'name/name', got {subfolder!r}")


def _plain(text: object) -> str:
    """One line of markdown that shows `text` as it is."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]~|#!])", r"\\\1", escaped)


def _table(name: str, rows: Mapping) -> list[str]:
    body = [
        f"| {_plain(key)} | {_plain(json.dumps(value, ensure_ascii=False))} |"
        for key, value in rows.items()
    ]
    return [f"| {name} | |", "|---|---|", *body, ""]
