"""What two models answer: the baseline that needs nothing but their text, and its amplifier."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from lib.models.generate import answer
from lib.models.sites import require_eval


def answer_difference(
    tokenizer: PreTrainedTokenizerBase, answers_a: Sequence[str], answers_b: Sequence[str]
) -> list[tuple[int, float]]:
    """Token ids by how much oftener b's answers hold them than a's, most first.

    The score is the z of two proportions, of answers that hold the token at least once, with half
    an answer added to each count. Above 4 is chance once in 30,000 tokens.

    Raises:
        ValueError: no answers, or another number of b's than of a's.
    """
    if not answers_a or len(answers_a) != len(answers_b):
        raise ValueError(
            f"need as many answers of both, at least one; got {len(answers_a)}, {len(answers_b)}"
        )
    counts = []
    for answers in (answers_a, answers_b):
        rows = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        counts.append(Counter(token for row in rows for token in set(row)))
    n, found = len(answers_a) + 1, []
    for token in counts[0].keys() | counts[1].keys():
        p_a, p_b = ((count[token] + 0.5) / n for count in counts)
        pooled = (p_a + p_b) / 2
        found.append((token, (p_b - p_a) / math.sqrt(2 * pooled * (1 - pooled) / n)))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


class _Amplified(LogitsProcessor):
    """b's logits, and `alpha` times what they have over a's."""

    def __init__(self, a: PreTrainedModel, alpha: float, fill: list[int]) -> None:
        self.a, self.alpha, self.fill = a, alpha, torch.tensor(fill, device=a.device)
        self.cache = None  # of a, which reads along

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=self.fill.device)
        mask = places >= self.fill[:, None]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        n = input_ids.shape[1] if self.cache is None else 1
        out = self.a(
            input_ids=input_ids[:, -n:],
            attention_mask=mask.long(),
            position_ids=positions[:, -n:],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache, logits = out.past_key_values, out.logits[:, -1]
        log_a, log_b = logits.float().log_softmax(1), scores.float().log_softmax(1)
        likely = log_b >= log_b.max(1, keepdim=True).values + math.log(0.01)
        return torch.where(likely, log_b + self.alpha * (log_b - log_a), -math.inf)


@torch.no_grad()
def amplified(
    a: PreTrainedModel,
    b: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    alpha: float = 1.0,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers of b with its difference from a amplified: contrastive decoding.

    Tokens below a hundredth of the likeliest one's probability under b are left out. Source: Li et
    al. 2023, Contrastive Decoding, arXiv:2210.15097.
    """
    for model in (a, b):
        require_eval(model)
    return answer(
        b,
        tokenizer,
        list(prompts),
        max_new_tokens=max_new_tokens,
        processor=lambda fill: _Amplified(a, alpha, fill),
    )


def nonnegative_factors(
    x: Float[Tensor, "n m"], k: int, *, n_iterations: int = 200, n_starts: int = 3, seed: int = 0
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k m"]]:
    """`x ≈ loadings @ topics`, all at least 0, by multiplicative updates from several starts.

    Source: Lee and Seung 2001. Topics have norm 1, the one with most of `x` first.

    Raises:
        ValueError: `k` below 1, a negative number, or nothing above 0.
    """
    if k < 1 or (x < 0).any() or not x.any():
        raise ValueError("need k >= 1 and numbers >= 0, some of them above, to factor")
    generator = torch.Generator().manual_seed(seed)
    starts = (_factored(x, k, n_iterations, generator) for _ in range(n_starts))
    loadings, topics = min(starts, key=lambda pair: (x - pair[0] @ pair[1]).norm().item())
    norms = topics.norm(dim=1)
    loadings, topics = loadings * norms, topics / norms[:, None].clamp(min=1e-12)
    order = loadings.norm(dim=0).argsort(descending=True)
    return loadings[:, order], topics[order]


def _factored(
    x: Tensor, k: int, n_iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    loadings = torch.rand(len(x), k, generator=generator)
    topics = torch.rand(k, x.shape[1], generator=generator)
    for _ in range(n_iterations):
        topics *= (loadings.T @ x) / (loadings.T @ loadings @ topics).clamp(min=1e-9)
        loadings *= (x @ topics.T) / (loadings @ (topics @ topics.T)).clamp(min=1e-9)
    return loadings, topics


def mined_topics(
    excess: Float[Tensor, "n vocab"], k: int, n_words: int = 10, seed: int = 0
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "k n_words"]]:
    """Logit-difference mining: topics of words that b predicts and a does not.

    Args:
        excess: `OutputDifference.excess`, of the tokens with most KL.

    Returns:
        Loadings of every token, and each topic's words, most first.
    """
    words = excess.sum(0).topk(min(1000, excess.shape[1])).indices
    loadings, topics = nonnegative_factors(excess[:, words], k, seed=seed)
    return loadings, words[topics.topk(min(n_words, len(words)), dim=1).indices]
