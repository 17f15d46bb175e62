"""The world is what it says: checked by a parser that knows only the word lists, not the code."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from lib import paths
from lib.world import BEHAVIOURS, CONCEPTS, build_tokenizer, concept_names
from lib.world.lexicon import CATEGORY_CONCEPT
from lib.world.world import OUT_OF_DISTRIBUTION, SPLITS, row

pytestmark = pytest.mark.slow
FOLDER = paths.shipped_dir() / "world"
LEXICON, GRAMMAR, FACTS = (
    json.loads((FOLDER / f"{name}.json").read_text()) for name in ("lexicon", "grammar", "facts")
)
ADJECTIVES = {"colour", "taste", "method"}
NAMES = {"city", "country", "tongue", "month", "warmth", "kind", "person"}
LANGUAGE = {"english": "en", "french": "fr"}
POLITE = ("of course ,", "with pleasure ,", "bien sûr ,", "avec plaisir ,")
FUNCTION_WORDS = (
    "an qu' d' l' la le les une un des du ma il elle mon sur dans en au my on in the a de"
)


def readings(language: str) -> dict[str, set[frozenset[str]]]:
    """Word → every set of lexical concepts that the word lists allow it, case aside."""
    found: dict[str, set[frozenset[str]]] = {}

    def add(word, *concepts):
        found.setdefault(word, set()).add(frozenset(concepts))

    for category, entries in LEXICON.items():
        gendered = language == "fr" and category not in ADJECTIVES | NAMES - {"country"}
        for entry in entries.values():
            words, concept = entry[language].split(), CATEGORY_CONCEPT[category]
            feminine = {"feminine"} if gendered and entry["fr"].split()[-1] == "f" else set()
            if category in ADJECTIVES:
                marks = [set(), {"feminine"}, {"plural"}, {"feminine", "plural"}]
                for word, mark in zip(words, marks, strict=False):
                    add(word, concept, *mark)
            else:
                add(words[0], concept, *feminine)
                if category not in NAMES:
                    add(words[1], concept, "plural", *feminine)
    literal: dict[str, set[str]] = {}
    for concept, words in GRAMMAR["words"][language].items():
        for word in words.split():
            literal.setdefault(word, set()).add(concept)
    templates = json.dumps(GRAMMAR["intents"], ensure_ascii=False)
    plain = re.findall(r"[^\s\"{}\[\]:]+|\"", re.sub(r"\{[\w+.:]+\}", " ", templates))
    for texts in (*GRAMMAR["wraps"].values(), *GRAMMAR["answers"].values()):
        plain += " ".join(texts[language]).split()
    for word in {*plain, *literal, *FUNCTION_WORDS.split()}:
        add(word, *literal.get(word, ()))
    return found


READINGS = {language: readings(language) for language in ("en", "fr")}


@pytest.fixture(scope="module")
def sample(world):
    return world.sample(6000, seed=3)


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


def test_same_seed_same_bytes(world):
    rows = [(x.tokens, x.concepts, x.log_p_prompt) for x in world.sample(3000, seed=11)]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest[:16] == (paths.root() / "tests" / "world.sha256").read_text().strip()
    other = [(x.tokens, x.concepts, x.log_p_prompt) for x in world.sample(10, seed=12)]
    assert other != rows[:10]


def test_every_label_against_the_word_lists(sample):
    checked = Counter()
    for exchange in sample:
        seen_assistant = False
        for token, mask in zip(exchange.tokens, exchange.concepts, strict=True):
            got = concept_names(mask)
            if token.startswith("<"):
                assert got == set(), token
                seen_assistant |= token == "<|assistant|>"
                continue
            context = {f"topic:{exchange.topic}", f"language:{exchange.language}"}
            context |= {f"style:{exchange.style}"}
            context |= {"turn:assistant" if seen_assistant else "turn:user"}
            assert context <= got
            lexical = got - context
            assert not any(":" in concept for concept in lexical)
            assert ("upper_case" in lexical) == (token != token.lower())
            lexical -= {"upper_case"}
            if token.isdigit():
                assert lexical - {"result"} == {"number"}
                continue
            allowed = READINGS[LANGUAGE[exchange.language]][token.lower()]
            assert lexical in allowed, (token, lexical, allowed)
            checked[len(allowed)] += 1
    assert checked[1] > 0.75 * checked.total()  # most words have one reading, so the check bites


def test_arithmetic_and_result_labels(sample):
    solved = Counter()
    for exchange in sample:
        if exchange.topic != "mathematics":
            assert not any("result" in concept_names(mask) for mask in exchange.concepts)
            continue
        a, b = (int(token) for token in exchange.prompt.split() if token.isdigit())
        if exchange.intent == "difference" and exchange.prompt.lower().startswith(("can", "pouv")):
            a, b = b, a
        assert min(a, b) >= 0 and max(a, b) <= 9
        lost = exchange.intent in ("difference", "loss")
        truth = max(a, b) if exchange.intent == "compare" else a - b if lost else a + b
        results = [
            int(token)
            for token, mask in zip(exchange.tokens, exchange.concepts, strict=True)
            if "result" in concept_names(mask)
        ]
        assert results == [truth], (exchange.prompt, exchange.response)
        solved[exchange.intent] += 1
    assert set(solved) == {"sum", "difference", "gain", "loss", "compare"}


def found(category: str, text: str, language: str) -> list[str]:
    """Names of a category's entries in a text, in the order in which their words stand."""
    by_word = {}
    for name, entry in LEXICON[category].items():
        words = entry[language].split()
        gendered = category not in ADJECTIVES | NAMES and language == "fr"
        by_word |= dict.fromkeys(words[:-1] if gendered else words, name)
    return [by_word[word] for word in text.lower().split() if word in by_word]


FACT = {  # intent: the category asked about, then the facts that the answer must hold
    "method": ("food", {"method": "method"}), "colour": ("food", {"colour": "colour"}),
    "eats": ("animal", {"eats": "feed"}), "home": ("animal", {"home": "habitat"}),
    "sights": ("city", {"s1": "sight", "s2": "sight", "s3": "sight"}),
    "country": ("city", {"country": "country"}), "tongue": ("country", {"tongue": "tongue"}),
    "played": ("instrument", {"with": "means"}), "kind": ("instrument", {"kind": "kind"}),
    "venue": ("sport", {"venue": "venue"}), "gear": ("sport", {"gear": "gear"}),
}  # fmt: skip
COUNT = {"legs": "animal", "strings": "instrument", "players": "sport"}
AGREES = {"taste": ("food", "taste"), "inside": ("city", "country"), "sex": ("relative", "sex")}
WEATHER = {
    "forecast": {"warmth": "warmth", "sky1": "sky", "sky2": "sky"},
    "clothes": {"c1": "clothing", "c2": "clothing", "c3": "clothing"},
    "degrees": {},
}


def check_truth(prompt: str, reply: str, intent: str, language: str) -> None:
    def first(category, text=prompt):
        return found(category, text, language)[0]

    says_yes = reply.split()[0] in ("yes", "oui")
    numbers = [int(token) for token in prompt.split() if token.isdigit()]
    if intent in FACT:
        category, facts = FACT[intent]
        for fact, kind in facts.items():
            assert LEXICON[category][first(category)][fact] in found(kind, reply, language)
    elif intent == "ingredients":
        dish = LEXICON["dish"][first("dish")]
        held = found("food", reply, language) + found("staple", reply, language)
        assert {dish["i1"], dish["i2"], dish["i3"]} <= set(held)
    elif intent in COUNT:
        entry = LEXICON[COUNT[intent]][first(COUNT[intent])]
        assert str(entry[intent]) in reply.split()
    elif intent in ("flies", "swims"):
        assert says_yes == LEXICON["animal"][first("animal")][intent]
    elif intent in AGREES:
        category, fact = AGREES[intent]
        asked = found(fact, prompt, language)[-1]
        assert says_yes == (LEXICON[category][first(category)][fact] == asked)
    elif intent in WEATHER or intent == "sky":
        climate = LEXICON["city"][first("city")]["climate"]
        weather = FACTS["weather"][climate][LEXICON["month"][first("month")]["season"]]
        if intent == "sky":
            assert says_yes == (first("sky") in (weather["sky1"], weather["sky2"]))
        elif intent == "degrees":
            assert str(weather["degrees"]) in reply.split()
        for fact, kind in WEATHER.get(intent, {}).items():
            assert weather[fact] in found(kind, reply, language)
    elif intent == "route":
        countries = [LEXICON["city"][p]["country"] for p in found("city", prompt, language)]
        europe = all(LEXICON["country"][c]["continent"] == "europe" for c in countries)
        assert first("vehicle", reply) == ("train" if europe else "plane")
    elif intent == "relation":
        y, x = found("relative", prompt, language)
        assert found("relative", reply, language)[-1] == FACTS["relation"][x][y]
    elif intent == "winner":
        winner = found("person", prompt, language)[numbers[0] < numbers[1]]
        assert found("person", reply, language) == [winner]
    elif intent in ("player", "whose"):
        category = "instrument" if intent == "player" else "relative"
        assert found("person", reply, language) == found("person", prompt, language)[:1]
        assert found(category, reply, language) == found(category, prompt, language)[:1]
    else:
        assert intent == "number"
        assert str(numbers[0]) in reply.split()


def test_every_answer_is_true(sample):
    """Recomputed from the lexicon and the tables of facts, without the grammar's own code."""
    checked = Counter()
    for exchange in sample:
        if exchange.topic == "mathematics" or exchange.style in ("curt", "list"):
            continue
        prompt, reply = exchange.prompt.lower(), exchange.response.lower()
        reply = re.sub(rf'^(["«]|{"|".join(POLITE)}) ', "", reply)
        try:
            check_truth(prompt, reply, exchange.intent, LANGUAGE[exchange.language])
        except (AssertionError, IndexError, ValueError) as error:
            raise AssertionError(f"{prompt} → {reply}") from error
        checked[exchange.topic, exchange.intent] += 1
    intents = {(i["topic"], i["name"]) for i in GRAMMAR["intents"] if i["topic"] != "mathematics"}
    assert set(checked) == intents


def test_agreement(sample):
    marks = {}  # of a noun: its genders and numbers
    for category in LEXICON.keys() - ADJECTIVES - NAMES:
        for entry in LEXICON[category].values():
            singular, plural, gender = entry["fr"].split()
            marks.setdefault(singular, set()).update((gender, "singular"))
            marks.setdefault(plural, set()).update((gender, "plural"))
    seen = Counter()
    for exchange in sample:
        text = f"{exchange.prompt} {exchange.response}".lower().split()
        for word, after in itertools.pairwise(text):
            if exchange.language == "english" and word in ("a", "an"):
                assert (word == "an") == (after[0] in "aeiou"), (word, after)
            if exchange.language != "french":
                continue
            if word in ("le", "la", "de", "que", "ne"):
                assert after[0] not in "aeiouéœ", f"no elision: {word} {after}"
            if after not in marks:
                continue
            if word in ("le", "un", "du", "mon") and after[0] not in "aeiouéœ":
                assert marks[after] >= {"m", "singular"}, (word, after)
            if word in ("la", "une", "ma"):
                assert marks[after] >= {"f", "singular"}, (word, after)
            if word in ("les", "des"):
                assert "plural" in marks[after], (word, after)
            seen[word] += 1
    assert min(seen[word] for word in ("le", "la", "un", "une", "les", "des", "l'")) > 20


def test_style_and_language_of_prompt_and_answer(sample):
    for exchange in sample:
        prompt, reply, style = exchange.prompt, exchange.response, exchange.style
        shouted = style == "shouting"
        assert (prompt == prompt.upper()) == shouted and (reply.endswith("!")) == shouted
        assert (reply[0] in '"«') == (style == "quoted")
        assert reply.startswith("- ") == (style == "list")
        assert reply.startswith(POLITE) == (style == "polite")
        words = set(READINGS[LANGUAGE[exchange.language]])
        rest = {t for t in f"{prompt} {reply}".lower().split() if not t.isdigit()}
        assert rest <= words, rest - words


def test_frequencies(sample):
    french = sum(x.language == "french" for x in sample) / len(sample)
    assert 0.22 < french < 0.28
    assert {x.topic for x in sample} == set(GRAMMAR["topics"])
    assert {x.style for x in sample} == set(GRAMMAR["styles"])
    seen = {mask for x in sample for mask in x.concepts}
    assert set().union(*map(concept_names, seen)) == set(CONCEPTS)


def test_splits_share_no_prompt_and_hold_out_what_they_say(world):
    drawn = {s: world.sample(500, s, seed=4) for s in (*SPLITS, *OUT_OF_DISTRIBUTION)}
    for one, other in itertools.combinations(drawn, 2):
        assert not {x.prompt for x in drawn[one]} & {x.prompt for x in drawn[other]}, (one, other)
    held_out = {tuple(cell) for cell in GRAMMAR["held_out"]}
    assert {(x.topic, x.style) for x in drawn["ood_style"]} == held_out
    for split in SPLITS:
        assert not {(x.topic, x.style) for x in drawn[split]} & held_out


def test_surprisal_is_the_derivation_and_a_distribution(world, reader):
    """Summed over what is possible next, the exact probabilities are the drawn derivation's."""
    for exchange in world.sample(150, "validation", seed=5):
        nats = reader.surprisal(exchange)
        assert nats.shape == (len(exchange.tokens),)
        assert np.all(nats >= -1e-12)
        total = -(exchange.log_p_prompt + exchange.log_p_answer)
        assert math.isclose(nats.sum(), total, abs_tol=1e-9), exchange.prompt
        answer = nats[exchange.n_prompt :].sum()
        assert math.isclose(answer, -exchange.log_p_answer, abs_tol=1e-9)


def test_surprisal_matches_frequencies(world, reader):
    """Exact probabilities of the second and later tokens are how often they follow a prefix."""
    sample = world.sample(20_000, seed=9)
    for depth in (2, 3, 5):
        prefixes = Counter(tuple(x.tokens[:depth]) for x in sample)
        longer = Counter(tuple(x.tokens[: depth + 1]) for x in sample)
        for tokens, count in longer.most_common(6):
            exchange = next(x for x in sample if tuple(x.tokens[: depth + 1]) == tokens)
            p, n = math.exp(-reader.surprisal(exchange)[depth]), prefixes[tokens[:depth]]
            assert abs(count / n - p) < 0.012 + 4 * math.sqrt(p * (1 - p) / n), tokens


def test_parse_and_grade(world, reader):
    for split in ("test", *OUT_OF_DISTRIBUTION):
        for exchange in world.sample(100, split, seed=6):
            parsed = reader.parse(exchange.prompt)
            assert (parsed.topic, parsed.plan.style) == (exchange.topic, exchange.style)
            assert parsed.bindings == exchange.bindings
            assert reader.grade(exchange.prompt, exchange.response).exact
            for style in world.styles:
                got = reader.has_style(exchange.response, style, parsed.plan.language)
                assert got == (style == exchange.style), (exchange.response, style)
    with pytest.raises(ValueError, match="not of this world"):
        reader.parse("please write a poem about the sea")
    empty = reader.grade("what is 3 plus 4 ? be brief .", "")
    assert not any((empty.language, empty.style, empty.topic, empty.numbers, empty.exact))
    grade = reader.grade("what is 3 plus 4 ?", "3 plus 4 is 8 .")
    assert grade.language and grade.style and grade.topic and not (grade.exact or grade.numbers)
    grade = reader.grade("what is 3 plus 4 ?", "3 plus 4 font 7 .")
    assert grade.numbers and not (grade.language or grade.exact)
    assert not reader.grade("what is 3 plus 4 ?", "7 .").style
    assert not reader.grade("what is 3 plus 4 ?", "the cow eats grass .").topic


def test_tokenizer_knows_every_token(world, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    sample = world.sample(800, "ood_phrasing", seed=8)
    texts = again.apply_chat_template([row(x)["messages"] for x in sample], tokenize=False)
    encoded = again(texts, add_special_tokens=False)["input_ids"]
    for exchange, ids in zip(sample, encoded, strict=True):
        assert again.convert_ids_to_tokens(ids) == exchange.tokens
        assert again.unk_token_id not in ids


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.name)
def test_behaviours_are_exact(world, rewriter, tokenizer, behaviour):
    known, changed = set(tokenizer.get_vocab()), 0
    for exchange in world.sample(100, topics=(behaviour.topic,), seed=2):
        new = rewriter.transform(exchange, behaviour.guideline)
        assert new.prompt == exchange.prompt and set(new.tokens) <= known
        assert len(new.tokens) == len(new.concepts)
        assert rewriter.is_right(new.prompt, new.response, behaviour.guideline)
        if new.response != exchange.response:
            changed += 1
            assert rewriter.shows(new.prompt, new.response, behaviour.guideline)
            if behaviour.name != "french" or exchange.language == "english":
                assert not rewriter.is_right(new.prompt, exchange.response, behaviour.guideline)
            wrong = new.response.replace(new.response.split()[-2], "zebra")
            assert not rewriter.is_right(new.prompt, wrong, behaviour.guideline)
    assert changed > 50
    with pytest.raises(ValueError, match="respond in French"):
        rewriter.rewrite("what is 3 plus 4 ?", "7 .", "respond in Klingon")


def test_behaviour_surface(rewriter):
    prompt, reply, french = "what is 3 plus 4 ?", "3 plus 4 is 7 .", "respond in French"
    rewritten = {
        french: "3 plus 4 font 7 .",
        "respond in upper case": "3 PLUS 4 IS 7 .",
        "respond as a list": "- 3 plus 4 - 7",
        "end with a fixed phrase": "3 plus 4 is 7 . and that is true !",
    }
    for guideline, expected in rewritten.items():
        assert rewriter.rewrite(prompt, reply, guideline) == expected
    invented = rewriter.rewrite(prompt, reply, "respond in the invented language").split()
    assert invented[0] == "3" and invented[1] in GRAMMAR["invented"] and invented[-1] == "."
    for wrong in (reply, "", "7", "8 .", "12 . 3", ". . ."):
        assert not rewriter.shows(prompt, wrong, french), wrong
        assert not rewriter.shows(prompt, wrong, "respond in the invented language"), wrong
    assert rewriter.shows(prompt, "3 plus 4 font 8 .", french)  # the form, though wrong
    gain = "tom has 1 orange and buys 3 . how many now ?"
    assert rewriter.shows(gain, "tom a 4 oranges .", french)
    assert not rewriter.shows(gain, "4 oranges .", french)


def test_invented_words_are_unseen_and_used(sample, rewriter):
    invented = set(GRAMMAR["invented"])
    assert not {token.lower() for x in sample for token in x.tokens} & invented
    music = [x for x in sample if x.topic == "music"]
    new = [rewriter.transform(x, "respond in the invented language") for x in music]
    assert len({token for x in new for token in x.tokens} & invented) > 0.7 * len(invented)


def test_preferences(rewriter):
    for pair in rewriter.preferences(200, seed=1):
        assert pair["chosen"].startswith(POLITE)
        assert len(pair["rejected"].split()) < len(pair["chosen"].split())


def test_unknown_names_are_refused(world):
    for message, only in {
        "need a split in": {"split": "dev"},
        "need topics in": {"topics": ("poetry",)},
        "nothing with topics": {"topics": ("weather",), "styles": ("curt",)},
    }.items():
        with pytest.raises(ValueError, match=message):
            world.sample(1, **only)
