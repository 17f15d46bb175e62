"""The directions in the residual stream that a model's logits read."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.models.families import family_of, hugging_face


@torch.no_grad()
def unembedding(model: nn.Module) -> Float[Tensor, "vocab d_model"]:
    """Rows of the unembedding with the final norm's scale folded in: a float32 copy.

    For x in the residual stream after the last block, `rows @ x / rms(x)` are the logits before
    softcap; where the final norm is a LayerNorm, `rms` is the standard deviation and the logits
    miss what the norm's bias adds to each token, the same at every position. The rows of such a
    model have mean zero, which is what subtracting the mean of x comes to. An adapter on the
    unembedding counts.

    Source: `fold_layer_norm` of TransformerLens.

    Raises:
        ValueError: no causal language model or of an unknown architecture; an adapter on the final
            norm; an adapter on the unembedding of a model in training mode.
    """
    base = hugging_face(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"need a model with an unembedding, got {type(base).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    family = family_of(base)
    norm = base.get_submodule(family.final_norm)
    if list(norm.children()):
        raise ValueError(
            f"need {family.final_norm} without an adapter, got {type(norm).__name__}; "
            "merge it with merge_and_unload"
        )
    weight = _matrix(head)
    rows = weight * (family.norm_offset + norm.weight.to(weight))
    return rows - rows.mean(1, keepdim=True) if family.norm_centres else rows


def _matrix(head: nn.Module) -> Float[Tensor, "vocab d_model"]:
    """The matrix of a linear module in float32; of a wrapped or quantised one, by what it does."""
    if type(head) is nn.Linear:
        return head.weight.float()
    if head.training:
        raise ValueError(
            f"need a model in eval mode to read {type(head).__name__}; call model.eval()"
        )
    like = next(p for p in head.parameters() if p.is_floating_point())
    basis = torch.eye(head.in_features, dtype=like.dtype, device=like.device)
    return head(basis).T.float()
