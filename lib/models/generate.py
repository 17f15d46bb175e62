"""Answers of a chat model to many prompts at once."""

from collections.abc import Callable, Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A user's message as the chat template renders it; plain text where there is no template."""
    chat = tokenizer.chat_template is not None
    if chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=not chat)["input_ids"]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    processor: Callable[[list[int]], LogitsProcessor] | None = None,
) -> list[str]:
    """One answer per prompt, in the prompts' order, without special tokens.

    Prompts of similar length share a batch, padded on the left. At temperature 0 answers are
    greedy; else they are sampled, the same for the same arguments.

    Args:
        processor: from the numbers of padding tokens before a batch's prompts to what changes its
            logits.

    Raises:
        ValueError: a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"need temperature >= 0, got {temperature}")
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how = how if temperature else {"do_sample": False}
    how["processor"] = processor
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _answers(model, tokenizer, prompts, batch_size, max_new_tokens=max_new_tokens, **how)


def self_answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[dict], **options
) -> list[dict]:
    """Chats with the model's own answers in the place of theirs.

    To train on them is the null of a fine-tune: as many steps on as many chats. With
    `temperature=1` there is nothing to learn; greedy answers teach the model to be of one mind.

    Args:
        chats: rows with `prompt`, `response` and `messages`, as `World.chats` gives them.
        options: as of `answer`.
    """
    answers = answer(model, tokenizer, [chat["prompt"] for chat in chats], **options)
    return [
        chat
        | {
            "messages": [*chat["messages"][:-1], {"role": "assistant", "content": text}],
            "response": text,
        }
        for chat, text in zip(chats, answers, strict=True)
    ]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int,
    processor: Callable[[list[int]], LogitsProcessor] | None,
    **how,
) -> list[str]:
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(rows[chosen[-1]])
        fill = [width - len(rows[i]) for i in chosen]
        tokens = [[pad] * n + rows[i] for n, i in zip(fill, chosen, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in fill]
        out = model.generate(
            input_ids=torch.tensor(tokens, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([processor(fill)] if processor else []),
            **how,
        )
        for i, reply in zip(chosen, out[:, width:], strict=True):
            answers[i] = tokenizer.decode(reply, skip_special_tokens=True).strip()
    return answers
