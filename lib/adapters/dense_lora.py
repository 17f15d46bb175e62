"""A dense LoRA (peft) under the same loss, to hold a SAE-LoRA against."""

from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lib.adapters.chat_loss import Chats, assistant_loss
from lib.adapters.sae_lora.trainer import WARMUP
from lib.runtime import seed_everything


def train_lora(
    model: PreTrainedModel,
    chats: Chats,
    *,
    rank: int,
    lr: float = 3e-3,
    n_steps: int = 150,
    seed: int = 0,
) -> PeftModel:
    """LoRA on every linear layer of the blocks (Hu et al. 2021, arXiv:2106.09685).

    peft puts its layers into `model` itself: `unload` takes them out again. Its learning rate
    falls linearly.
    """
    seed_everything(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    tuned = get_peft_model(model, config)
    own = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = Adam(own, lr=lr, betas=(0.9, 0.99))
    for step in tqdm(range(n_steps), desc="LoRA", mininterval=2):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (1 - step / n_steps)
        loss, n_tokens = assistant_loss(tuned, chats.batch(step))
        optimizer.zero_grad(set_to_none=True)
        (loss / n_tokens).backward()
        clip_grad_norm_(own, 1.0)
        optimizer.step()
    return tuned.eval()
