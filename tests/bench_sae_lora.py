"""What an attached SAE-LoRA costs beside its dictionary: `python -m tests.bench_sae_lora`.

ms of one thread on a CPU, without gradients: the dictionary's own `encode`, and `adapter(x)` with
32 read and 32 write latents, which is all that attaching it adds to a forward pass. Both take
turns, so that a drift of the machine's speed meets both; the ratio is the median over the turns.
"""

import statistics
import time
from functools import partial

import torch

from lib import paths
from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import JumpReLU, TopK
from lib.models import load_model, read
from tests.bench_measure import seconds

SITE = "blocks.1.hook_resid_post"
N_TOKENS, N_LATENTS, SECONDS = 512, 32, 6.0


def random_dictionary(d: int, d_sae: int, rule, x: torch.Tensor) -> Dictionary:
    """Random unit rows; a JumpReLU threshold that about 1 % of the pre-activations pass."""
    config = DictionaryConfig(site_dims=(d,), d_sae=d_sae, rule=rule, hook_names=(SITE,))
    dictionary = Dictionary(config).requires_grad_(False)
    if isinstance(rule, JumpReLU):
        bound = dictionary.pre_acts(x[:64]).quantile(0.99, dim=1).mean()
        dictionary.log_threshold.fill_(bound.log())
    return dictionary


def restricted_to_active(dictionary: Dictionary, x: torch.Tensor) -> SaeLora:
    """Reads the latents that fire most often, writes others."""
    adapter = SaeLora(dictionary, SaeLoraConfig(n_read=N_LATENTS, n_write=N_LATENTS))
    often = (dictionary.encode(x) > 0).sum(0).argsort(descending=True)
    masks = torch.zeros(2, adapter.d_sae, dtype=torch.bool)
    for mask, latents in zip(masks, often.split(N_LATENTS), strict=False):
        mask[latents] = True
    adapter = adapter.restricted(read=masks[0], write=masks[1])
    adapter.scale.fill_(1.0)
    assert not torch.equal(adapter(x), x)
    return adapter


def measure(name: str, dictionary: Dictionary, x: torch.Tensor) -> None:
    adapter = restricted_to_active(dictionary, x)
    functions = partial(dictionary.encode, x), partial(adapter, x)
    taken, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(taken) < 8:
        taken.append([1000 * seconds(function, cuda=False) for function in functions])
    encode, added = (statistics.median(spent) for spent in zip(*taken[3:], strict=True))
    ratio = statistics.median(b / a for a, b in taken[3:])
    print(
        f"{name:28s} encode {encode:8.2f} ms, adapter {added:8.2f} ms, ratio {ratio:.2f} "
        f"(median of {len(taken) - 3})",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, _ = load_model(paths.shipped_dir() / "models" / "tiny-gemma2")
    ids = torch.randint(6, model.config.vocab_size, (8, N_TOKENS // 8))
    with read(model, [SITE], stop=True) as acts:
        model(input_ids=ids)
    x = acts[SITE].flatten(0, 1).clone()
    shipped = Dictionary.load(paths.shipped_dir() / "saes" / "tiny-gemma2" / "topk")
    print(f"{N_TOKENS} tokens, {N_LATENTS} latents read and as many written, 1 thread; bar: 1.1")
    measure("128 x 1024 TopK (shipped)", shipped, x)
    measure("128 x 1024 JumpReLU", random_dictionary(128, 1024, JumpReLU(), x), x)
    x = torch.randn(N_TOKENS, 2304)
    measure("2304 x 16384 JumpReLU", random_dictionary(2304, 16384, JumpReLU(), x), x)
    measure("2304 x 16384 TopK 32", random_dictionary(2304, 16384, TopK(k=32), x), x)


if __name__ == "__main__":
    main()
