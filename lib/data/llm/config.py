"""Which model, where it is served, and what a job may cost there."""

import ipaddress
import math
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dotenv import dotenv_values

from lib import paths

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True, kw_only=True)
class LlmConfig:
    model: str
    """The model's name on that server."""
    base_url: str | None = None
    """The server, mostly ending in `/v1`. None: `OPENAI_BASE_URL`, else OpenAI."""
    budget_usd: float = 1.0
    """Most that one `Llm` may spend, USD. The cache is free; a reply lost to a time-out counts as
    free too, though some servers bill it."""
    usd_per_million_input: float | None = None
    """Price of a million prompt tokens. Needed unless the server is on this machine; 0 is free."""
    usd_per_million_output: float | None = None
    """Price of a million answer tokens."""
    max_concurrency: int = 8
    """Most requests in flight."""
    timeout: float = 120.0
    """Seconds to wait for one reply."""
    max_retries: int = 5
    """Times that a request is sent again after 429, 5xx, a time-out or a dropped connection."""
    temperature: float = 0.0
    """Sampling temperature."""
    extra_output_tokens: int = 0
    """Added to every answer's limit, for models that think first or guidelines that lengthen."""
    cache_dir: str | None = None
    """Folder of `answers.jsonl`, without the key. None: `llm_cache` in the data folder."""

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError(f"need the model's name, got {self.model!r}")
        for name in ("max_concurrency", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"need {name} > 0, got {getattr(self, name)}")
        for name in (
            "budget_usd",
            "usd_per_million_input",
            "usd_per_million_output",
            "max_retries",
            "temperature",
            "extra_output_tokens",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"need {name} >= 0 and finite, got {value}")


@dataclass(frozen=True)
class Address:
    url: str
    local: bool
    """On this machine, so it needs neither key nor prices."""
    key: str = field(repr=False)


def find_address(base_url: str | None) -> Address:
    """Address and key; the environment wins over `.env` in the project's root.

    Raises:
        ValueError: no address of a server, or no key for one that is elsewhere.
    """
    saved = dotenv_values(paths.root() / ".env")

    def setting(name: str) -> str:
        return (os.environ.get(name) or saved.get(name) or "").strip()

    url = (base_url or setting("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
    parts, key = urlsplit(url), setting("OPENAI_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ValueError("need base_url like https://host/v1, without user, password or query")
    local = _is_local(parts.hostname)
    if not key and not local:
        raise ValueError(
            f"no key for {url}: set OPENAI_API_KEY in the environment or in .env "
            "(any word where the server wants none)"
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "OPENAI_API_KEY holds characters that no key has (a line break, an accent)"
        )
    return Address(url, local, key)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
