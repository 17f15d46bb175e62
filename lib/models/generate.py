"""Greedy answers of a chat model to many prompts at once."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
) -> list[str]:
    """One greedy answer per prompt, in the prompts' order, without special tokens.

    Prompts of equal length share a batch, so none needs padding and none depends on another.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    answers = [""] * len(prompts)
    for length, members in by_length.items():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            tokens = torch.tensor([rows[i] for i in chosen], device=model.device)
            out = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, reply in zip(chosen, out[:, length:], strict=True):
                answers[i] = tokenizer.decode(reply, skip_special_tokens=True).strip()
    return answers
