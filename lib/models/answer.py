"""Greedy answers of a chat model to many prompts at once."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    rows = tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []
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
