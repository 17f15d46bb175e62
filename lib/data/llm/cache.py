"""Answers on disk, so that no question is paid for twice."""

import hashlib
import json
import os
from typing import Any

from pydantic import BaseModel

from lib import paths
from lib.data.llm.config import LlmConfig
from lib.data.llm.endpoint import Failure, Request
from lib.runtime import require_writable


class Cache:
    """Append-only `answers.jsonl`; a last line torn by a kill is skipped and closed.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, config: LlmConfig) -> None:
        folder = paths.resolve(config.cache_dir or paths.data_dir() / "llm_cache")
        self.config = config
        self.path = require_writable(folder) / "answers.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}
        line = b"\n"
        with self.path.open("a+b") as file:
            file.seek(0)
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                self.entries[entry["key"]] = entry
            if not line.endswith(b"\n"):
                file.write(b"\n")

    def key(self, request: Request) -> str:
        """Names model, messages, schema and temperature; neither the server nor the limit."""
        schema = request.answer.model_json_schema()
        parts = [self.config.model, self.config.temperature, list(request.messages), schema]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, request: Request) -> BaseModel | Failure | None:
        entry = self.entries.get(self.key(request))
        if entry is None:
            return None
        if "failure" in entry:
            return Failure(entry["failure"], final=True)
        return request.answer.model_validate(entry["answer"])

    def add(self, key: str, answer: BaseModel | Failure, usd: float) -> None:
        """Keep an answer, or a failure that is final; on disk when this returns."""
        entry: dict[str, Any] = {"key": key, "model": self.config.model, "usd": usd}
        if not isinstance(answer, Failure):
            entry["answer"] = answer.model_dump(mode="json")
        elif answer.final:
            entry["failure"] = answer.reason
        else:
            return
        self.entries[key] = entry
        with self.path.open("ab") as file:
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
