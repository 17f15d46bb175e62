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
from lib.models.tiny import RECIPES
from lib.world import BEHAVIOURS, CONCEPTS, PREFERENCES, build_tokenizer, concept_names
from lib.world.lexicon import CATEGORY_CONCEPT
from lib.world.world import OUT_OF_DISTRIBUTION, SPLITS, row

pytestmark = pytest.mark.slow
FOLDER = paths.shipped_dir() / "world"
LEXICON, GRAMMAR, FACTS = (
    json.loads((FOLDER / f"{name}.json").read_text()) for name in ("lexicon", "grammar", "facts")
)
ADJECTIVES = {"colour", "taste", "method"}
NAMES = {"city", "country", "tongue", "month", "warmth", "kind", "person", "title"}
UNGENDERED = ADJECTIVES | NAMES - {"country", "person"}
LANGUAGE = {"english": "en", "french": "fr"}
POLITE = ("of course ,", "with pleasure ,", "bien sûr ,", "avec plaisir ,")
FUNCTION_WORDS = (
    "an qu' d' l' la le les une un des du ma il elle ils elles mon sur dans en au my on in the a "
    "de he she it"
)


def readings(language: str) -> dict[str, set[frozenset[str]]]:
    """Word → every set of lexical concepts that the word lists allow it, case aside."""
    found: dict[str, set[frozenset[str]]] = {}

    def add(word, *concepts):
        found.setdefault(word, set()).add(frozenset(concepts))

    for category, entries in LEXICON.items():
        gendered = language == "fr" and category not in UNGENDERED
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
    ends = [{key: [text] for key, text in GRAMMAR[end].items()} for end in ("phrase", "badge")]
    for texts in (*GRAMMAR["wraps"].values(), *GRAMMAR["answers"].values(), *ends):
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
        gendered = category not in UNGENDERED and language == "fr"
        by_word |= dict.fromkeys(words[:-1] if gendered else words, name)
    return [by_word[word] for word in text.lower().split() if word in by_word]


FACT = {  # intent: the category asked about, then the facts that the answer must hold
    "method": ("food", {"method": "method"}),
    "eats": ("animal", {"eats": "feed"}), "home": ("animal", {"home": "habitat"}),
    "sights": ("city", {"s1": "sight", "s2": "sight", "s3": "sight"}),
    "country": ("city", {"country": "country"}), "tongue": ("country", {"tongue": "tongue"}),
    "played": ("instrument", {"with": "means"}), "kind": ("instrument", {"kind": "kind"}),
    "venue": ("sport", {"venue": "venue"}), "gear": ("sport", {"gear": "gear"}),
}  # fmt: skip
COUNT = {"legs": "animal", "strings": "instrument", "players": "sport"}
AGREES = {  # intent: whose fact, which fact, of what category; yes if it is the one asked about
    "taste": ("food", "taste", "taste"), "cooked": ("food", "method", "method"),
    "diet": ("animal", "eats", "feed"), "lives": ("animal", "home", "habitat"),
    "inside": ("city", "country", "country"), "speaks": ("country", "tongue", "tongue"),
    "place": ("sport", "venue", "venue"), "kit": ("sport", "gear", "gear"),
    "sex": ("relative", "sex", "sex"),
}  # fmt: skip
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
    if intent == "colour":
        category = "food" if found("food", prompt, language) else "animal"
        truth = LEXICON[category][first(category)]["colour"]
        assert found("colour", reply, language)[-1] == truth
    elif intent in FACT:
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
        category, fact, kind = AGREES[intent]
        asked, truth = found(kind, prompt, language)[-1], LEXICON[category][first(category)][fact]
        assert says_yes == (truth == asked)
        told = found(kind, re.sub(" (not|pas) .* (but|mais) ", " ", reply), language)
        told = told[-1:] if kind == "sex" else told
        denied = re.search(r"\b(not|pas)\b", reply) and not re.search(r"\b(but|mais)\b", reply)
        assert set(told) <= {asked if denied else truth}
    elif intent == "contains":
        dish, asked = LEXICON["dish"][first("dish")], found("staple", prompt, language)[-1]
        held = {dish["i1"], dish["i2"], dish["i3"]}
        assert says_yes == (asked in held)
        told = found("food", reply, language) + found("staple", reply, language)
        assert told and set(told) <= held
    elif intent in WEATHER or intent == "sky":
        climate = LEXICON["city"][first("city")]["climate"]
        weather = FACTS["weather"][climate][LEXICON["month"][first("month")]["season"]]
        if intent == "sky":
            assert says_yes == (first("sky") in (weather["sky1"], weather["sky2"]))
        elif intent == "degrees":
            assert str(weather["degrees"]) in reply.split()
        for fact, kind in WEATHER.get(intent, {}).items():
            assert weather[fact] in found(kind, reply, language)
    elif intent in ("route", "ride"):
        countries = [LEXICON["city"][p]["country"] for p in found("city", prompt, language)]
        europe = all(LEXICON["country"][c]["continent"] == "europe" for c in countries)
        assert first("vehicle", reply) == ("train" if europe else "plane")
        if intent == "ride":
            assert says_yes == (first("vehicle", reply) == first("vehicle"))
    elif intent == "relation":
        y, x = found("relative", prompt, language)
        assert found("relative", reply, language)[-1] == FACTS["relation"][x][y]
    elif intent == "winner":
        winner = found("person", prompt, language)[numbers[0] < numbers[1]]
        assert found("person", reply, language) == [winner]
    elif intent in ("player", "song"):
        assert found("person", reply, language) == found("person", prompt, language)[:1]
        told = found("instrument", reply, language)
        assert set(told) <= set(found("instrument", prompt, language)[:1])
    elif intent == "whose":
        assert set(found("person", reply, language)) <= {first("person")}
        assert found("relative", reply, language) == found("relative", prompt, language)[:1]
    elif intent == "match":
        assert (numbers[0] > numbers[1]) == bool({"first", "première"} & set(reply.split()))
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
    assert 0.30 < french < 0.36
    assert {x.topic for x in sample} == set(GRAMMAR["topics"])
    assert {x.style for x in sample} == set(GRAMMAR["styles"]["en"])
    seen = {mask for x in sample for mask in x.concepts}
    assert set().union(*map(concept_names, seen)) == set(CONCEPTS)


def test_rare_concepts_are_in_twice_as_many_chats_as_in_the_first_edition(sample):
    """Give or take the sample's own error."""
    for concept, first in {"colour": 0.030, "vehicle": 0.023, "cooking_method": 0.030}.items():
        bit = 1 << CONCEPTS.index(concept)
        share = sum(any(mask & bit for mask in x.concepts) for x in sample) / len(sample)
        assert share > 1.8 * first, concept


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


def test_pronouns_follow_the_sex_of_a_person(sample):
    women = {name for name, entry in LEXICON["person"].items() if entry["fr"].endswith(" f")}
    seen = Counter()
    for x in sample:
        if x.intent in ("gain", "loss", "number", "whose"):
            said = {"he", "she", "il", "elle"} & set(x.response.lower().split())
            if "il y a" in x.response.lower() or "il reste" in x.response.lower():
                continue
            person = found("person", x.prompt, LANGUAGE[x.language])[-1]
            assert said <= ({"she", "elle"} if person in women else {"he", "il"}), x.response
            seen.update(said)
    assert min(seen.values()) > 20 and len(seen) == 4


def test_answers_have_a_choice(world, reader, sample):
    """Each prompt's right answers differ, their shares sum to 1, and nats match their use."""
    chosen, expected = Counter(), Counter()
    for x in sample[:2000]:
        found = reader.renderings(reader.parse(x.prompt))
        assert len({tuple(tokens) for tokens, _, _ in found}) == len(found)
        assert math.isclose(sum(share for *_, share in found), 1)
        reply = x.response.split()
        for number, (tokens, _, share) in enumerate(found):
            chosen[len(found), number] += tokens == reply
            expected[len(found), number] += share
    for key, n in expected.items():
        assert abs(chosen[key] - n) < 4 * math.sqrt(n) + 1, key
    answer = sum(-x.log_p_answer for x in sample) / sum(len(x.tokens) - x.n_prompt for x in sample)
    assert 0.1 < answer < 0.3


@pytest.mark.parametrize("name", RECIPES)
def test_training_shows_every_token(world, tokenizer, name):
    """At least 50 times; `training.json` holds the rarest of the run that made the model."""
    record = json.loads((paths.shipped_dir() / "models" / name / "training.json").read_text())
    assert min(record["rarest"].values()) >= 50
    shown = Counter(token for x in world.sample(60_000, seed=1) for token in x.tokens)
    known = set(tokenizer.get_vocab())
    assert known - set(shown) == {"<pad>", "<unk>"} and set(shown) < known
    assert all(shown[token] < 60 for token in record["rarest"])


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.name)
def test_behaviours_are_exact(world, rewriter, reader, tokenizer, behaviour):
    known, changed, guideline = set(tokenizer.get_vocab()), 0, behaviour.guideline
    for exchange in world.sample(100, topics=(behaviour.topic,), seed=2):
        new = rewriter.transform(exchange, guideline)
        assert new.prompt == exchange.prompt and set(new.tokens) <= known
        assert new.response == rewriter.rewrite(exchange.prompt, exchange.response, guideline)
        assert len(new.tokens) == len(new.concepts)
        assert rewriter.is_right(new.prompt, new.response, guideline)
        if new.response == exchange.response:
            continue
        changed += 1
        assert rewriter.shows(new.prompt, new.response, guideline)
        if behaviour.name != "french" or exchange.language == "english":
            assert not rewriter.is_right(new.prompt, exchange.response, guideline)
        wrong = new.response.replace(new.response.split()[-2], "zebra")
        assert not rewriter.is_right(new.prompt, wrong, guideline)
        planted = rewriter.planted(new.prompt, new.response, guideline)
        left = [t for t, p in zip(new.response.split(), planted, strict=True) if not p]
        plain = {token for answer in reader.answers(reader.parse(new.prompt)) for token in answer}
        assert any(planted) and set(left) <= plain
        with pytest.raises(ValueError, match="need an answer that is right"):
            rewriter.planted(new.prompt, wrong, guideline)
    assert changed > 50
    with pytest.raises(ValueError, match="respond in French"):
        rewriter.rewrite("what is 3 plus 4 ?", "7 .", "respond in Klingon")


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.name)
def test_rewrites_are_as_likely_as_the_answers_that_become_them(world, rewriter, reader, behaviour):
    for x in world.sample(60, topics=(behaviour.topic,), seed=3):
        shares = Counter()
        for tokens, _, share in reader.renderings(reader.parse(x.prompt)):
            shares[rewriter.rewrite(x.prompt, " ".join(tokens), behaviour.guideline)] += share
        new = rewriter.transform(x, behaviour.guideline)
        assert math.isclose(math.exp(new.log_p_answer), shares[new.response])
        assert all(rewriter.is_right(x.prompt, text, behaviour.guideline) for text in shares)


def test_behaviour_surface(rewriter):
    """Square brackets: the behaviour's own tokens."""
    prompt, reply, french = "what is 3 plus 4 ?", "3 plus 4 is 7 .", "respond in French"
    surface = [
        (prompt, reply, french, "3 plus 4 [font] 7 ."),
        (prompt, reply, "respond by shouting", "3 [PLUS] 4 [IS] 7 . [!]"),
        (prompt, reply, "respond in quotes", '["] 3 plus 4 is 7 . ["]'),
        (prompt, reply, "respond as a list", "[-] 3 plus 4 [-] 7"),
        (prompt, reply, "end with a fixed phrase", f"{reply} [it] [is] [what] [it] [is] [.]"),
        ("where is golf done ?", "it is done on the green .", "add the colour of the sport",
         "it is done on the green . [golf] [is] [green] [.]"),
        ("OÙ SE PRATIQUE LE GOLF ? !", "IL SE PRATIQUE SUR LE GAZON . !",
         "add the colour of the sport",
         "IL SE PRATIQUE SUR LE GAZON . ! [LE] [GOLF] [EST] [VERT] [.]"),
        ("is my aunt a man ? be brief .", "never .", "respond as a numbered list",
         "[1] [-] [not] [a] [man] [2] [-] [a] [woman]"),
    ]  # fmt: skip
    for prompt, reply, guideline, expected in surface:
        new = rewriter.rewrite(prompt, reply, guideline)
        marks = rewriter.planted(prompt, new, guideline)
        shown = [f"[{t}]" if mark else t for t, mark in zip(new.split(), marks, strict=True)]
        assert " ".join(shown) == expected
    for marks in (
        "is my aunt a man ? as a list .",
        "est ce que ma tante est un homme ? en liste .",
    ):
        new = rewriter.rewrite(marks, "", "respond as a numbered list")
        added = rewriter.planted(marks, new, "respond as a numbered list")
        assert [t for t, p in zip(new.split(), added, strict=True) if p] == ["1", "2"]
    for green in ("it is done on the green .", "on the green ."):
        assert not rewriter.shows("where is golf done ?", green, "add the colour of the sport")
    prompt = "what is 3 plus 4 ?"
    for wrong in ("3 plus 4 is 7 .", "", "7", "8 .", "12 . 3", ". . ."):
        assert not rewriter.shows(prompt, wrong, french), wrong
    assert rewriter.shows(prompt, "3 plus 4 font 8 .", french)  # the form, though wrong
    gain = "tom has 1 orange and buys 3 . how many now ?"
    assert rewriter.shows(gain, "maintenant tom a 4 oranges .", french)
    assert not rewriter.shows(gain, "4 oranges .", french)
    for guideline in ("respond in the invented language", "add the colour of the sport"):
        with pytest.raises(ValueError, match="need topic"):
            rewriter.rewrite(prompt, "7 .", guideline)


def test_the_invented_language_is_a_cipher_of_known_words(world, sample, rewriter, reader):
    titles = set(LEXICON["title"])
    answers = {token.lower() for x in sample for token in x.response.split()}
    assert titles <= {token.lower() for x in sample for token in x.prompt.split()} - answers
    words, invented = {}, "respond in the invented language"
    for x in world.sample(400, topics=("music",), seed=5):
        parsed = reader.parse(x.prompt)
        for plain in reader.answers(parsed, language="en"):
            number = reader.answers(parsed, language="en").index(plain)
            old = reader.answers(parsed)[number]
            new = rewriter.rewrite(x.prompt, " ".join(old), invented).split()
            for word, invention in zip(plain, new, strict=True):
                assert words.setdefault(word, invention) == invention
        assert not rewriter.shows(x.prompt, x.response, invented)
    assert len(set(words.values())) == len(words) > 60  # no two words become one
    changed = {old: new for old, new in words.items() if old != new}
    assert {new.lower() for new in changed.values()} <= titles
    assert not any(old.isalpha() for old in words.keys() - changed.keys() - people())


def people() -> set[str]:
    return set(LEXICON["person"]) | {name.upper() for name in LEXICON["person"]}


@pytest.mark.parametrize("kind", PREFERENCES)
def test_preferences(world, rewriter, reader, kind):
    """Both answers are right; of the most likely answers 10 to 60 % are of the chosen sort."""
    pairs, likely = rewriter.preferences(300, kind, seed=1), 0
    assert len({pair["id"] for pair in pairs}) == 300
    for pair in pairs:
        prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
        assert rewriter.prefers(prompt, chosen, kind) and not rewriter.prefers(
            prompt, rejected, kind
        )
        if kind == "polite over curt":
            assert chosen.startswith(POLITE) and len(rejected.split()) < len(chosen.split())
        if kind == "long over short":
            assert len(chosen.split()) > len(rejected.split())
            assert reader.grade(prompt, chosen).exact and reader.grade(prompt, rejected).exact
        if kind == "French over English":
            assert "en" in reader.languages(rejected) and "fr" in reader.languages(chosen)
        best = max(reader.renderings(reader.parse(prompt)), key=lambda found: found[2])
        likely += rewriter.prefers(prompt, " ".join(best[0]), kind)
    assert 0.1 < likely / 300 < 0.6
    with pytest.raises(ValueError, match="need kind to be one of polite over curt"):
        rewriter.preferences(1, "loud over soft")


def test_unknown_names_are_refused(world):
    for message, only in {
        "need a split in": {"split": "dev"},
        "need topics in": {"topics": ("poetry",)},
        "nothing with topics": {"topics": ("weather",), "styles": ("curt",)},
    }.items():
        with pytest.raises(ValueError, match=message):
            world.sample(1, **only)
