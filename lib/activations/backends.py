"""Three ways to run a model up to its highest site; they give the same numbers.

Each function here prepares one model and returns a `Forward`. The model itself keeps its own
modules and hooks in every case.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lib.models.families import SITES, hugging_face
from lib.models.sites import module_at, read, sites

Forward = Callable[[Int[Tensor, "rows seq"], Bool[Tensor, "rows seq"]], dict[str, Tensor]]
"""From token ids and the mask of real tokens to activations by hook name, `hook_z` by head."""


def hf(model: nn.Module, hook_names: Sequence[str]) -> Forward:
    """Forward hooks on the Hugging Face model: `lib.models.sites.read`."""

    @torch.no_grad()
    def forward(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with read(model, hook_names, stop=True) as acts:
            model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        return acts

    return forward


def nnsight(model: nn.Module, hook_names: Sequence[str]) -> Forward:
    """A trace of nnsight over the same modules, stopped after the last."""
    from nnsight import NNsight

    base = hugging_face(model)
    n_heads = base.config.get_text_config().num_attention_heads
    paths = {module: path for path, module in base.named_modules()}
    wrapped = NNsight(base)
    places = [  # nnsight reads in the order in which the forward pass gets there
        (name, wrapped.get(paths[module_at(base, name)]), SITES[name.split(".", 2)[2]][1])
        for name in sites(base)
        if name in hook_names
    ]

    @torch.no_grad()
    def forward(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        acts = {}
        with wrapped.trace(**inputs) as tracer:
            for name, envoy, side in places:
                value = envoy.input if side == "input" else envoy.output
                acts[name] = value[0] if isinstance(value, tuple) else value
            tracer.stop()
        return {
            name: x.unflatten(-1, (n_heads, -1)) if name.endswith("hook_z") else x
            for name, x in acts.items()
        }

    return forward


def transformer_lens(model: nn.Module, hook_names: Sequence[str]) -> Forward:
    """Hook points of a TransformerBridge, stopped at the last.

    The bridge puts its own modules into a model, so it gets a copy that shares the weights.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    base = hugging_face(model)
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    bridge = TransformerBridge.boot_transformers(
        base.config.model_type,
        hf_model=copy.deepcopy(base, shared),
        tokenizer=_nameless_tokenizer(),
        device=base.get_input_embeddings().weight.device,
        dtype=base.dtype,
    )
    last = max(hook_names, key=sites(base).index)

    @torch.no_grad()
    def forward(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        acts = {}

        def keep(x: Tensor, name: str) -> None:
            acts[name] = x
            if name == last:
                raise StopAtLayerException(x)  # the bridge catches it

        hooks = [(name, lambda x, hook, name=name: keep(x, name)) for name in hook_names]
        bridge.run_with_hooks(ids, fwd_hooks=hooks, attention_mask=mask.long(), use_cache=False)
        return acts

    return forward


def _nameless_tokenizer() -> PreTrainedTokenizerFast:
    """The bridge insists on a tokenizer, though it only ever sees token ids here."""
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    names = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)
