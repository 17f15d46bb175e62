"""Where a TransformerBridge, TransformerLens's or sae-lens's, keeps a site."""

import sys

from torch import nn


def is_bridge(model: nn.Module) -> bool:
    """Without importing TransformerLens, which takes seconds, unless someone already has."""
    bridges = sys.modules.get("transformer_lens.model_bridge")
    return bridges is not None and isinstance(model, bridges.TransformerBridge)


def name_in_bridge(bridge: nn.Module, hook_name: str) -> str:
    """What the bridge itself calls the site.

    sae-lens's bridge does not know other names, such as `hook_resid_post`, and a hook at a name
    that a bridge does not know is left out without a word.
    """
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

    if hook_name.endswith("hook_resid_mid"):
        raise ValueError(
            f"a bridge hands a change at {hook_name} to the MLP alone, not to the residual stream; "
            "need another site, or the Hugging Face model"
        )
    point = TransformerBridge.hook_dict.fget(bridge).get(hook_name)
    if point is None:
        raise ValueError(f"no hook name {hook_name!r} in this bridge")
    if not isinstance(point, HookPoint):
        raise ValueError(f"need a bridge without a SAE of sae-lens at {hook_name}, got one")
    return point.name
