"""Tokenised chats: the assistant mask against an oracle, truncation, streams, refusals."""

import json
from importlib.resources import files

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lib.data.chats import load_chats
from lib.data.tokens import IGNORED, collate, tokenize_chats

U, A, S = "user", "assistant", "system"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_BENCH_DATA", str(tmp_path / "cached"))


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def left_behind(tmp_path):
    return [file for file in (tmp_path / "cached").rglob("*") if file.is_file()]


HELLO = turns((U, "hi"), (A, "yo"))
SPECIAL = "</s> <|im_start|> <|im_end|> <start_of_turn> <end_of_turn> [INST] [/INST]".split()


def each(body, prompt=""):
    end = "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    return "{% for m in messages %}" + body + end


def from_trl(name):
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def chatml(role, text):
    return [(f"<|im_start|>{role}\n", 0), (f"{text}<|im_end|>", role == A), ("\n", 0)]


def gemma(role, text):
    head = f"<start_of_turn>{'model' if role == A else role}\n"
    return [(head, 0), (f"{text.strip()}<end_of_turn>", role == A), ("\n", 0)]


def mistral(role, text):
    return [(f" {text}</s>", 1)] if role == A else [(f"[INST] {text} [/INST]", 0)]


IS_A, END = "{% if m.role == 'assistant' %}", "{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
INST = IS_A + "{{ ' ' + m.content + eos_token }}{% else %}[INST] {{ m.content }} [/INST]" + END
MARKED = (
    "<|im_start|>assistant\n{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
)
CHATML = each(TURN, "<|im_start|>assistant\n")
TEMPLATES = {  # and their turns by hand: pieces of text, and whether the mask covers them
    "chatml": (CHATML, chatml),
    "gemma": (from_trl("gemma"), gemma),
    "mistral": (each(INST), mistral),
    "generation": (each(IS_A + MARKED + "{% else %}" + TURN + END), chatml),
}
HEADS = ("assistant\n", "user\n", "model\n", " ")  # that a content is merged with
ONE_TWO = "<think>\n1 + 1\n</think>\n\nIt is 2."
CHATS = [
    HELLO,
    turns((U, "Say: yes."), (A, "yes."), (U, "yes."), (A, "yes."), (U, "no"), (A, "Say: yes.")),
    turns(
        (U, "é 🙂 naïve"), (A, "çà 🙂\n\nva  bien\n"), (U, " spaces "), (A, "  two  \n spaces  ")
    ),
    turns((U, "user assistant"), (A, "assistant\nuser"), (U, "assistant"), (A, "model")),
    turns((U, "sum"), (A, ONE_TWO), (U, "so"), (A, "It is 2.")),
    turns((U, "a"), (A, "b"), (U, "sum"), (A, ONE_TWO)),
    turns((U, "x"), (A, "ends in a space "), (U, "y"), (A, "z ")),
    turns((U, "x"), (A, "\n\nassistant\n\n"), (U, "\n"), (A, " [a] <b> ] ")),
]


@pytest.fixture(scope="module", params=[420, 256], ids=["merging", "bytes"])
def bpe(request):
    """Byte-level BPE that merges over any border, or never; trims spaces off offsets as GPT-2's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{head}{turn['content']}\n" for head in HEADS for chat in CHATS for turn in chat]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=request.param, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def wrapped(bpe, template, end="</s>"):
    options = {"chat_template": template, "eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


def as_dataset(chats):
    return Dataset.from_list([{"id": str(i), "messages": chat} for i, chat in enumerate(chats)])


def masked_text(tokenizer, row):
    kept = [i for i, m in zip(row["input_ids"], row["assistant_mask"], strict=True) if m]
    return tokenizer.decode(kept)


def expected_mask(tokenizer, ids, pieces):
    """Counts bytes of tokens and of pieces; knows nothing of offsets or of Jinja."""
    wanted = b"".join(bytes([flag]) * len(text.encode()) for text, flag in pieces)
    mask, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        length = len(token)  # in a byte-level vocabulary a character is a byte; specials are ASCII
        mask.append(int(1 in wanted[at : at + length]))
        at += length
    assert at == len(wanted)
    return mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_right_for_the_template(name, bpe):
    template, by_hand = TEMPLATES[name]
    tokenizer = wrapped(bpe, template)
    tokens, truncation = tokenize_chats(as_dataset(CHATS), tokenizer, max_len=10_000)
    crossed = 0
    for chat, row in zip(CHATS, tokens, strict=True):
        pieces = [piece for turn in chat for piece in by_hand(turn["role"], turn["content"])]
        assert tokenizer.decode(row["input_ids"]) == "".join(text for text, _ in pieces)
        assert row["assistant_mask"] == expected_mask(tokenizer, row["input_ids"], pieces)
        exact = "".join(text for text, flag in pieces if flag)
        crossed += masked_text(tokenizer, row) != exact
        assert len(masked_text(tokenizer, row)) >= len(exact)
    assert truncation.n_tokens_cut == truncation.n_dropped == 0
    if name == "chatml":  # does it merge over the border? else no test
        assert bool(crossed) == (bpe.get_vocab_size(with_added_tokens=False) > 256)


def test_masked_text_is_the_answers_and_their_ends(bpe):
    chat = turns((S, "sys"), (U, "one"), (A, "uno"), (U, "uno"), (A, "1"))
    tokenizer = wrapped(bpe, CHATML, "<|im_end|>")
    row = tokenize_chats(as_dataset([chat]), tokenizer, max_len=1000)[0][0]
    longer = {"input_ids": row["input_ids"] + [5], "assistant_mask": row["assistant_mask"] + [0]}
    batch = collate([row, longer], tokenizer.pad_token_id)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORED]) == "uno<|im_end|>1<|im_end|>"
    assert batch["attention_mask"][0].tolist() == [1] * len(row["input_ids"]) + [0]
    assert (batch["input_ids"][0, -1], labels[-1]) == (tokenizer.pad_token_id, IGNORED)
    assert all(value.dtype == torch.long for value in batch.values())


def test_trl_knows_how_to_train_on_a_template_that_cuts_thoughts(bpe):
    tokenizer = wrapped(bpe, from_trl("qwen3"))
    chat = turns((U, "sum"), (A, ONE_TWO), (U, "so"), (A, "4"))
    row = tokenize_chats(as_dataset([chat]), tokenizer, max_len=1000)[0][0]
    end = "<|im_end|>"
    assert masked_text(tokenizer, row) == f"{ONE_TWO}{end}<think>\n\n</think>\n\n4{end}"
    assert ONE_TWO not in tokenizer.apply_chat_template(chat, tokenize=False)


def test_a_block_may_end_in_a_space_that_offsets_leave_out(bpe):
    marked = "{% generation %}{{ m.content }}</s> {% endgeneration %}"
    tokenizer = wrapped(bpe, each(IS_A + marked + "{% else %}" + TURN + END))
    row = tokenize_chats(as_dataset([HELLO * 2]), tokenizer, max_len=1000)[0][0]
    assert masked_text(tokenizer, row) == "yo</s>yo</s>"


@pytest.mark.parametrize("streaming", [False, True])
def test_truncation_says_what_it_cut(bpe, streaming):
    tokenizer = wrapped(bpe, CHATML)
    chats = as_dataset([*CHATS, turns((U, "long " * 40), (A, "lost"))])
    full, _ = tokenize_chats(chats, tokenizer, max_len=10_000)
    max_len = sorted(len(ids) for ids in full["input_ids"])[3]
    n_longer = sum(len(ids) > max_len for ids in full["input_ids"])
    given = chats.to_iterable_dataset() if streaming else chats
    cut, truncation = tokenize_chats(given, tokenizer, max_len=max_len)
    assert isinstance(cut, IterableDataset if streaming else Dataset)
    for _ in range(2):  # a second pass counts afresh
        kept = [row for row in full if any(row["assistant_mask"][:max_len])]
        want = [(row["id"], row["input_ids"][:max_len]) for row in kept]
        assert [(row["id"], row["input_ids"]) for row in cut] == want
        n_cut = sum(sum(mask[max_len:]) for mask in full["assistant_mask"])
        assert vars(truncation) == {
            "n_chats": len(chats),
            "n_tokens": sum(map(len, full["input_ids"])),
            "n_chats_cut": n_longer,
            "n_tokens_cut": sum(len(ids[max_len:]) for ids in full["input_ids"]),
            "n_assistant_tokens_cut": n_cut,
            "n_dropped": len(chats) - len(kept),
        }
        assert truncation.n_dropped >= 1
    assert str(truncation).startswith(f"cut {n_longer} of {len(chats)} chats")


def test_a_stream_reads_no_further_than_it_is_asked(bpe, tmp_path):
    path, good = tmp_path / "a.jsonl", json.dumps({"prompt": "p", "response": "r"}) + "\n"
    path.write_text(good * 600 + good.replace('r"}', '"}'))
    rows, _ = tokenize_chats(load_chats(path, streaming=True), wrapped(bpe, CHATML), max_len=99)
    assert len([row for row, _ in zip(rows, range(300), strict=False)]) == 300
    with pytest.raises(ValueError, match=r"a.jsonl row 601: response: need text"):
        list(rows)
    assert left_behind(tmp_path) == []


def test_the_same_chats_under_two_templates_are_not_confused(bpe):
    both = [wrapped(bpe, template) for template in (CHATML, TEMPLATES["mistral"][0])]
    one, two = (tokenize_chats(as_dataset(CHATS), t, max_len=99)[0]["input_ids"][:] for t in both)
    assert list(map(len, one)) != list(map(len, two))


def test_tokenising_refuses_what_it_cannot_do(bpe, tmp_path):
    refusing = "{{ raise_exception('no systems') if messages[0].role == 'system' }}x"
    reversing = CHATML.replace("m.content", "(m.content | reverse) + m.content")
    cutting = CHATML.replace(
        "m.content", "('' if m.role == 'assistant' and not loop.last else m.content)"
    )
    upper = CHATML.replace("m.content", "m.content | upper")
    one, system = turns((U, "a"), (A, "xy")), turns((S, "s")) + HELLO
    no_messages = Dataset.from_list([{"prompt": "p"}])
    no_ids = Dataset.from_list([{"messages": HELLO}, {"messages": HELLO[:1]}])
    slow = ByT5Tokenizer(chat_template=CHATML)
    for chats, tokenizer, max_len, message in (
        (as_dataset(CHATS), wrapped(bpe, None), 8, "no chat template"),
        (as_dataset(CHATS), wrapped(bpe, CHATML), 0, "max_len >= 1, got 0"),
        (as_dataset(CHATS), slow, 8, "ByT5Tokenizer gives no character offsets"),
        (no_messages, wrapped(bpe, CHATML), 8, "need a column messages, got"),
        (no_ids, wrapped(bpe, CHATML), 8, "chat in row 2: need an assistant turn at the end"),
        (as_dataset([one]), wrapped(bpe, reversing), 8, r"turn 2: cannot tell .* rewrites it"),
        (as_dataset([one]), wrapped(bpe, upper), 8, r"chat 0, turn 2: cannot tell"),
        (as_dataset([one]), wrapped(bpe, each(TURN)), 8, r"chat 0, turn 2: cannot tell"),
        (as_dataset([HELLO * 2]), wrapped(bpe, cutting), 8, r"chat 0, turn 2: cannot tell"),
        (as_dataset([system]), wrapped(bpe, refusing), 8, "refuses chat 0: no systems"),
        (as_dataset([HELLO[:1]]), wrapped(bpe, CHATML), 8, "chat 0: need an assistant turn at"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_chats(chats, tokenizer, max_len=max_len)
    assert left_behind(tmp_path) == []
