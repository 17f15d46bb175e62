"""From a row of any recognised schema to one checked chat or preference pair.

| schema | columns |
|---|---|
| preferences | `chosen`, `rejected`: answers with `prompt`, whole chats, or HH transcripts |
| messages | `messages`: `{role, content}` |
| ShareGPT | `conversations`: `{from, value}` |
| Alpaca | `instruction`, `output`, optional `input` |
| prompt/response | `prompt`, `response`; HelpSteer is this with its five scores |
| prompt/completion | `prompt`, `completion` |

A chat is: one system turn or none, then user and assistant in turn, ending with the assistant;
no empty turn. Most chat templates raise on, or quietly drop, anything else.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]

SCHEMAS: dict[str, tuple[str, ...]] = {
    "preferences": ("chosen", "rejected"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt/response": ("prompt", "response"),
    "prompt/completion": ("prompt", "completion"),
}
"""Columns that tell a schema; the first whose columns are all there is taken."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class BadRow(ValueError):
    """One row cannot be used; the others may be."""


def schema_of(columns: Sequence[str], where: str) -> str:
    """Raises ValueError naming the columns seen and every set that would do."""
    for schema, needed in SCHEMAS.items():
        if set(needed) <= set(columns):
            return schema
    wanted = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in SCHEMAS.items())
    seen = ", ".join(sorted(map(str, columns))) or "none"
    raise ValueError(f"{where}: unknown schema. Columns seen: {seen}. Needed, one of: {wanted}")


def read_row(row: Mapping[str, Any], schema: str) -> dict[str, Any]:
    """`{"messages"}`, or for preferences `{"prompt", "chosen", "rejected"}`, each a message list.

    Raises:
        BadRow: empty or missing text, or turns in an order that no chat has.
    """
    if schema == "preferences":
        return _preference(row)
    if schema == "messages":
        messages = _messages(row["messages"], "messages")
    elif schema == "ShareGPT":
        messages = _messages(row["conversations"], "conversations")
    elif schema == "Alpaca":
        extra = f"\n\n{row['input']}" if row.get("input") else ""
        prompt = checked_text(row["instruction"], "instruction") + extra
        messages = [_turn("user", prompt), *_answer(row, "output")]
    else:
        messages = [*_prompt(row), *_answer(row, SCHEMAS[schema][1])]
    check_messages(messages)
    return {"messages": messages}


def check_messages(messages: Sequence[Message]) -> None:
    """Raises BadRow saying which turn breaks the form that the module's docstring gives."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, turn in enumerate(turns):
        needed = ("user", "assistant")[number % 2]
        if turn["role"] != needed:
            position = len(messages) - len(turns) + number + 1
            raise BadRow(f"turn {position} has role {turn['role']!r}; need {needed!r} there")
    if not turns:
        raise BadRow("no user and assistant turns")
    if turns[-1]["role"] != "assistant":
        missing = "it has no assistant turn" if len(turns) == 1 else "it ends with a user turn"
        raise BadRow(f"{missing}; need an assistant turn at the end")


def checked_text(value: Any, field: str) -> str:
    """The value, if it is text that UTF-8 can hold and is not blank; BadRow otherwise."""
    if not isinstance(value, str):
        raise BadRow(f"{field}: need text, got {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"{field} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{field}: character {error.start} is half a surrogate pair") from None
    return value


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"{field}: need a list of turns, got {type(value).__name__}")
    messages = []
    for number, turn in enumerate(value, start=1):
        here = f"{field} turn {number}"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{here}: need role and content, got {type(turn).__name__}")
        role = turn.get("role", turn.get("from"))
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"{here}: unknown role {role!r}; need system, user or assistant")
        messages.append(_turn(role, checked_text(turn.get("content", turn.get("value")), here)))
    return messages


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """HelpSteer writes earlier turns into `prompt`, set off by `<extra_id_1>User`."""
    value = row.get("prompt")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _messages(value, "prompt")
    text = checked_text(value, "prompt")
    if "helpfulness" not in row:
        return [_turn("user", text)]
    first, *rest = _HELPSTEER_TURN.split(text)
    turns = [("user", first), *zip(map(str.lower, rest[::2]), rest[1::2], strict=True)]
    return [_turn(role, checked_text(content, "prompt")) for role, content in turns]


def _answer(row: Mapping[str, Any], field: str) -> list[Message]:
    value = row.get(field)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _messages(value, field)
    return [_turn("assistant", checked_text(value, field))]


def _transcript(text: str, field: str) -> list[Message]:
    """The HH form: `\\n\\nHuman: …\\n\\nAssistant: …`."""
    _, *rest = _HH_TURN.split(text)
    roles = ["user" if name == "Human" else "assistant" for name in rest[::2]]
    return [
        _turn(role, checked_text(part.strip(), field))
        for role, part in zip(roles, rest[1::2], strict=True)
    ]


def _preference(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    sides = {}
    for field in ("chosen", "rejected"):
        value = row[field]
        if isinstance(value, str) and row.get("prompt") is None and value.startswith("\n\nHuman:"):
            sides[field] = _transcript(value, field)
        else:
            sides[field] = _answer(row, field)
    chosen, rejected = sides["chosen"], sides["rejected"]
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if [turn["role"] for turn in chosen] == ["assistant"]:
        if row.get("prompt") is None:
            raise BadRow("chosen is an answer alone; need its prompt")
        prompt = _prompt(row)
    else:
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], _after(chosen[:-1], rejected)
    check_messages([*prompt, *chosen])
    check_messages([*prompt, *rejected])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _after(prompt: list[Message], chat: list[Message]) -> list[Message]:
    if chat[:-1] != prompt:
        raise BadRow("chosen and rejected differ before their last turn")
    return chat[-1:]
