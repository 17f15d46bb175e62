"""Scores what a method found against differences that were planted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lib.analysis.diffing.findings import MIN_FIRINGS, Finding, N, along, firings, places
from lib.analysis.diffing.scores import Move, auc, gap_closed, precision_at
from lib.data.corpus import Corpus, of_exchanges
from lib.latents import LatentRecord
from lib.runtime import require_at_least
from lib.world import BEHAVIOURS, CONCEPTS, Rewriter, World
from lib.world.differences import Planted, planted_chats
from lib.world.lexicon import LANGUAGES

NAMED = {behaviour.name: behaviour for behaviour in BEHAVIOURS}


@dataclass(frozen=True, eq=False)
class Truth:
    """Where and what the behaviours are in a held-out corpus."""

    chats: Sequence[Planted]
    corpus: Corpus
    """One chat a row."""
    behaviours: tuple[str, ...]
    of_token: Int[Tensor, " n"]
    """Of every real token the behaviour whose it is, from 1; 0: none's."""
    decided: Int[Tensor, " n"]
    """The same, or else that of the next token in the row."""
    answers: Bool[Tensor, "rows seq"]
    """Tokens of answers that a behaviour changed."""
    rows: Int[Tensor, " rows"]
    """The behaviour at work in a row, from 1; 0: none."""

    @classmethod
    def of(
        cls,
        chats: Sequence[Planted],
        behaviours: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int = 64,
    ) -> "Truth":
        corpus = of_exchanges([chat.exchange for chat in chats], tokenizer, seq_len=seq_len)
        names = ["", *behaviours]
        which, answers = torch.zeros_like(corpus.ids), torch.zeros_like(corpus.mask)
        for i, chat in enumerate(chats):
            own = torch.tensor(chat.tokens[:seq_len])
            which[i, : len(own)] = own * names.index(chat.behaviour)
            answers[i, chat.exchange.n_prompt : len(own)] = bool(chat.behaviour)
        rows = torch.tensor([names.index(chat.behaviour) for chat in chats])
        decided = which.clone()
        decided[:, :-1] = torch.where(which[:, :-1] > 0, which[:, :-1], which[:, 1:])
        of_token, decided = (x[corpus.mask].long() for x in (which, decided))
        return cls(chats, corpus, tuple(behaviours), of_token, decided, answers, rows)

    @classmethod
    def drawn(
        cls,
        behaviours: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        n_tokens: int,
        split: str = "train",
        seed: int = 0,
        seq_len: int = 64,
    ) -> "Truth":
        """Chats of the world under the behaviours, until there are so many tokens."""
        require_at_least(1, n_tokens=n_tokens)
        chats, n = [], 0
        for chat in planted_chats(Rewriter(World()), behaviours, split=split, seed=seed):
            chats.append(chat)
            n += min(len(chat.tokens), seq_len)
            if n >= n_tokens:
                return cls.of(chats, behaviours, tokenizer, seq_len=seq_len)
        raise ValueError(f"need {n_tokens} tokens of split {split}, got {n}")

    def prompts(self, n: int) -> list[str]:
        """Of the first `n` chats."""
        return [chat.exchange.prompt for chat in self.chats[:n]]

    def only(self, behaviour: int, n: int) -> tuple[Corpus, Bool[Tensor, "rows seq"]]:
        """The first `n` rows in which a behaviour is at work, and their answers."""
        rows = (self.rows == behaviour).nonzero()[:n, 0]
        return self.corpus.take(rows), self.answers[rows]

    def concepts(self, behaviour: str) -> set[str]:
        """Names of the world that would be right for it: its topic, style and language."""
        known = NAMED[behaviour]
        right = {f"topic:{known.topic}"}
        if known.new:
            return right
        if known.language:
            right.add(f"language:{LANGUAGES[known.language]}")
        if known.style:
            right.add(f"style:{known.style}")
        return right | ({"upper_case"} if known.style == "shouting" else set())

    def words(self, behaviour: str) -> set[int]:
        """Tokens that are the behaviour's own in at least half of all places where they stand."""
        ids = self.corpus.ids[self.corpus.mask].long()
        size = int(ids.max()) + 1
        own = torch.bincount(ids[self.of_token == self.number(behaviour)], minlength=size)
        mostly = (own > 0) & (2 * own >= torch.bincount(ids, minlength=size))
        return set(mostly.nonzero()[:, 0].tolist())

    def number(self, behaviour: str) -> int:
        return self.behaviours.index(behaviour) + 1


def behaviour_mass(
    record: LatentRecord, truth: Truth, *, power: float = 1.0, share: bool = True
) -> Float[Tensor, "n_latents behaviours"]:
    """Of each latent the share of its activation on each behaviour's tokens.

    The token before one of a behaviour's counts too: what comes next is decided there.

    Args:
        power: of activations, before they are summed.
        share: divide by the sum over all tokens.
    """
    acts = record.acts
    sums = torch.zeros(len(truth.behaviours) + 1, record.n_latents)
    which = truth.decided[places(record, truth.corpus)][acts.rows.long()]
    sums.index_put_((which, acts.indices.long()), acts.values.pow(power), accumulate=True)
    total = sums.sum(0).clamp(min=1e-9) if share else 1.0
    return (sums / total)[1:].T


def where(finding: Finding, truth: Truth) -> dict[str, float]:
    """AUC and precision of the token score on the behaviours' tokens; none without a score."""
    if finding.scores is None:
        return {}
    own = truth.of_token > 0
    n = max(1, int(own.sum()) // 10)
    return {"auc": auc(finding.scores, own), "precision": precision_at(n, finding.scores, own)}


def what(finding: Finding, truth: Truth, n_words: int = N, n_concepts: int = 3) -> list[str]:
    """The behaviours that it names: by one of its words, or by a right concept."""
    words, concepts = set(finding.words[:n_words]), set(finding.concepts[:n_concepts])
    return [
        name
        for name in truth.behaviours
        if words & truth.words(name) or concepts & truth.concepts(name)
    ]


def named_by_chance(truth: Truth, n_draws: int = 200, seed: int = 0) -> float:
    """Behaviours that random words and concepts of the corpus name, on average; see `what`."""
    words = truth.corpus.ids[truth.corpus.mask].long().unique()
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for _ in range(n_draws):
        drawn = words[torch.randperm(len(words), generator=generator)[:N]].tolist()
        order = torch.randperm(len(CONCEPTS), generator=generator).tolist()
        concepts = [CONCEPTS[i] for i in order[:N]]
        named = Finding(method="chance", access="", words=drawn, concepts=concepts)
        total += len(what(named, truth))
    return total / n_draws


def flagged(
    finding: Finding,
    truth: Truth,
    record: LatentRecord,
    latents: Int[Tensor, " k"] | None = None,
) -> dict:
    """How many latents are said to differ, how many rightly, and which behaviours they are.

    A latent is right where half of its activation lies on the tokens of behaviours, strictly where
    0.8 lies on those of one.

    Args:
        latents: judged in the place of the finding's own.
    """
    chosen = finding.latents if latents is None else latents
    mass = behaviour_mass(record, truth)[chosen]
    right = mass.sum(1) >= 0.5
    found = {truth.behaviours[i] for i in mass[right].argmax(1).tolist()}
    strict = mass.max(1).values >= 0.8
    return {
        "flagged": len(mass),
        "right": right.float().mean().item(),  # NaN of none
        "strict": strict.float().mean().item(),
        "found": [name for name in truth.behaviours if name in found],
    }


def causal(
    findings: Sequence[tuple[Finding, LatentRecord | None]],
    truth: Truth,
    a: nn.Module,
    b: nn.Module,
    hook_name: str,
    *,
    n_rows: int = 100,
    seed: int = 0,
    back: bool = False,
    skip_special: bool = False,
) -> list[dict[str, float]]:
    """Share of the KL gap on each behaviour's answers that a finding closes, and their `mean`.

    Of latents the ten that move most on the behaviour's tokens are handed over, among those that
    the method ranks in its first half; `random` is as many others of like firing rates. Of
    directions all.

    Args:
        back: the share that taking the finding away from b removes, instead: see `gap_closed`.
        skip_special: leave special tokens as they are, as harvesting did.
    """
    found: list[dict[str, float]] = [{} for _ in findings]
    generator = torch.Generator().manual_seed(seed)
    for number, name in enumerate(truth.behaviours, 1):
        moves: list[Move] = []
        keys: list[tuple[int, str]] = []
        for i, (finding, record) in enumerate(findings):
            if finding.directions is not None:
                moves.append(along(finding.directions))
                keys.append((i, name))
            elif finding.move is not None and record is not None:
                chosen = _of_behaviour(finding, record, truth, number)
                moves += [finding.move(chosen), finding.move(_random(record, chosen, generator))]
                keys += [(i, name), (i, f"random, {name}")]
        corpus, counted = truth.only(number, n_rows)
        options = {"counted": counted, "back": back, "skip_special": skip_special}
        closed = gap_closed(a, b, hook_name, corpus, moves, **options)
        for (i, key), share in zip(keys, closed, strict=True):
            found[i][key] = share
    for row in found:
        for key, names in (
            ("mean", truth.behaviours),
            ("random", [f"random, {b}" for b in truth.behaviours]),
        ):
            if names[0] in row:
                row[key] = sum(row[name] for name in names) / len(names)
    return found


def _of_behaviour(
    finding: Finding, record: LatentRecord, truth: Truth, number: int
) -> Int[Tensor, " k"]:
    mass = behaviour_mass(record, truth, power=2.0, share=False)[:, number - 1]
    mass = torch.where(firings(record) >= MIN_FIRINGS, mass * finding.size.square(), -1.0)
    low = finding.order < finding.order[firings(record) >= MIN_FIRINGS].median()
    mass[low] = -1.0
    return mass.topk(N).indices


def _random(
    record: LatentRecord, latents: Int[Tensor, " k"], generator: torch.Generator
) -> Int[Tensor, " k"]:
    """Other latents, each drawn among the twenty whose firing rate is nearest."""
    rates, taken = record.firing_rate().log(), set(latents.tolist())
    drawn = []
    for latent in latents.tolist():
        near = (rates - rates[latent]).abs().argsort().tolist()
        near = [j for j in near if j not in taken][:20]
        drawn.append(near[int(torch.randint(len(near), (), generator=generator))])
        taken.add(drawn[-1])
    return torch.tensor(drawn)


def false_alarms(finding: Finding, null: Finding) -> int:
    """Findings, of ten at most, on a pair without a difference.

    Of a method that decides itself, all; else those as strong as its last one on this pair.
    """
    if null.decides:
        return len(null.latents[:N])
    if not finding.strength:
        return len(null.strength)
    return sum(strength >= finding.strength[-1] for strength in null.strength)
