"""The world's tokens and its tokenizer: one token per lexeme and per special token."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lib.world.parser import renderings
from lib.world.world import ASSISTANT, BOS, EOS, USER, World

PAD, UNKNOWN = "<pad>", "<unk>"
SPECIAL = (PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' <|user|> ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' <|assistant|> ' }}"
    "{% generation %}{{ message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the world knows the roles user and assistant, got ' "
    "+ message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|>' }}{% endif %}"
)


def vocabulary(world: World) -> list[str]:
    """Every token the world can produce; its order is the token ids'. Behaviours add none."""
    tokens = {t for _, _, rendering in renderings(world, answers=False) for t, _ in rendering}
    words = sorted(tokens, key=lambda token: (token.isalpha(), not token.islower(), token))
    return [*SPECIAL, *words]


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Word-level tokenizer on whitespace, with the chat template; reloads by `AutoTokenizer`."""
    ids = {token: i for i, token in enumerate(vocabulary(world))}
    backend = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
