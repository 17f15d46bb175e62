"""A full fine-tune, which may be anchored to the model that it began as."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lib.adapters.chat_loss import Chats, assistant_loss
from lib.adapters.sae_lora.trainer import WARMUP
from lib.models.sites import require_eval
from lib.runtime import require_at_least


def fine_tune(
    model: PreTrainedModel,
    chats: Chats,
    *,
    n_steps: int,
    lr: float = 1e-3,
    anchor: float = 0.0,
    free: Sequence[bool] = (),
) -> PreTrainedModel:
    """A copy of `model`, all of its weights trained on the answers of `chats`.

    Args:
        lr: AdamW's; it rises for some steps and falls linearly to 0.
        anchor: Weight of a penalty on change, `Σ over layers ‖h - h₀‖² / ‖h₀‖²` averaged over
            tokens; h is the residual stream after each block (after the last, normed). A plain
            fine-tune drifts on every token, so that most of the difference of the two models has
            nothing to do with what was learned.
        free: For each row of `chats`, whether its answer may change: the penalty leaves those
            tokens out. Needed with `anchor`.

    Raises:
        ValueError: `anchor` below 0, another number of rows than `chats` has, or a model in
            training mode.
        FloatingPointError: the loss is not finite.
    """
    require_at_least(1, n_steps=n_steps)
    require_eval(model)
    if anchor < 0 or (anchor and len(free) != len(chats)):
        raise ValueError(
            f"need anchor >= 0, and with it `free` for {len(chats)} rows; got {anchor} and "
            f"{len(free)} rows"
        )
    tuned = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    for step in tqdm(range(n_steps), desc="fine-tune", mininterval=2):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (1 - step / n_steps)
        batch, hidden, before = chats.batch(step), [], []
        loss, n_tokens = assistant_loss(tuned, batch, hidden if anchor else None)
        loss = loss / n_tokens
        if anchor:
            with torch.no_grad():
                assistant_loss(model, batch, before)
            moving = torch.tensor([free[row] for row in chats.chosen(step)])
            loss = loss + anchor * _change(hidden, before, _held(batch, moving))
        if not loss.isfinite():
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        loss.backward()
        clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return tuned.eval()


def _held(batch: dict[str, Tensor], moving: Tensor) -> Tensor:
    """Real tokens `[batch seq]` that the penalty counts.

    What an answer says is decided one token earlier, so of a row whose answer may change the
    tokens that predict it are left out too.
    """
    answers = batch["labels"] >= 0
    answers[:, :-1] |= answers[:, 1:].clone()
    return batch["attention_mask"].bool() & ~(answers & moving[:, None])


def _change(after: list[Tensor], before: list[Tensor], held: Tensor) -> Tensor:
    total = 0.0
    for h, h0 in zip(after[1:], before[1:], strict=True):
        kept = held.to(h.device)
        ratio = (h - h0).square().sum(2) / h0.square().sum(2).clamp(min=1e-6)
        total = total + ratio[kept].mean()
    return total
