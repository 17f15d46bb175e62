"""Hook names in TransformerLens form, on a Hugging Face model: read, replace, add.

| `blocks.N.…` | what | shape |
|---|---|---|
| `hook_resid_pre` | residual stream that enters the block | `[batch seq d_model]` |
| `attn.hook_z` | input of attention's output projection | `[batch seq n_heads d_head]` |
| `hook_attn_out` | what attention adds to the residual stream | `[batch seq d_model]` |
| `hook_resid_mid` | residual stream between attention and MLP | `[batch seq d_model]` |
| `hook_mlp_out` | what the MLP adds to the residual stream | `[batch seq d_model]` |
| `hook_resid_post` | residual stream that leaves the block | `[batch seq d_model]` |

Gemma 2 and 3 normalise a sublayer's output before adding it: `hook_attn_out` and `hook_mlp_out`
are the values **after** that norm, so `resid_pre + attn_out = resid_mid` and
`resid_mid + mlp_out = resid_post` in every sequential block. GPT-NeoX runs both sublayers on
`resid_pre` (`use_parallel_residual`), so there is no `hook_resid_mid` and
`resid_pre + attn_out + mlp_out = resid_post`. Both as in TransformerLens's `TransformerBridge`.

Contexts at one site act in the order in which they were entered: a read entered after an edit
sees the edited value, a read entered before it sees the value the edit was given. Hooks live as
long as their context; with gradient checkpointing keep it open over `backward`, which runs the
blocks again.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib.models.families import SITES, family_of, hugging_face

Activation = Float[Tensor, "batch seq *d"]
Look = Callable[[Tensor], Tensor | None]  # what it returns takes the activation's place, None not


def sites(model: nn.Module) -> list[str]:
    """All hook names of `model`, in the order in which a forward pass reaches them.

    Raises:
        ValueError: an architecture that is not in `FAMILIES`.
    """
    base = hugging_face(model)
    family = family_of(base)
    here = [site for site in SITES if not (site == "hook_resid_mid" and family.mid is None)]
    n_layers = len(base.get_submodule(family.layers))
    return [f"blocks.{layer}.{site}" for layer in range(n_layers) for site in here]


def site_dim(model: nn.Module, hook_name: str) -> int:
    """Width of the activation at `hook_name`; at `hook_z`, of all heads together.

    Raises:
        ValueError: `model` has no such hook name.
    """
    site, _, _ = _find(model, hook_name)
    config = hugging_face(model).config.get_text_config()
    if site != "attn.hook_z":
        return config.hidden_size
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * d_head


def hook_layer(hook_name: str) -> int:
    """The block that `hook_name` lies in.

    Raises:
        ValueError: not a hook name.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if match is None or match[2] not in SITES:
        raise ValueError(f"need blocks.N.SITE with SITE in {list(SITES)}, got {hook_name!r}")
    return int(match[1])


def module_at(model: nn.Module, hook_name: str) -> nn.Module:
    """The module whose input or output (see `SITES`) is the activation at `hook_name`.

    Raises:
        ValueError: `model` has no such hook name.
    """
    return _find(model, hook_name)[2]


@contextlib.contextmanager
def read(
    model: nn.Module, hook_names: Iterable[str], *, stop: bool = False
) -> Iterator[dict[str, Activation]]:
    """Yield a dict that every forward pass inside the context fills, by hook name.

    The tensors are the model's own, with their graph unless the caller is under `no_grad`: detach
    or copy what you keep, write into none. A second forward pass overwrites the first's.

    Args:
        stop: end the forward pass, and with it the `with` block, once the last of the sites is
            read. Later layers never run; statements after the model's call are skipped.

    Raises:
        ValueError: no hook name, or one that `model` does not have.
    """
    names = list(dict.fromkeys(hook_names))
    if not names:
        raise ValueError("need at least one hook name to read, got none")
    acts: dict[str, Activation] = {}
    token = object()

    def keep(name: str, x: Tensor) -> None:
        acts[name] = x
        if stop and name == last:
            raise _Stop(token)

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(_hooked(model, name, lambda x, name=name: keep(name, x)))
        last = max(names, key=sites(model).index)
        try:
            yield acts
        except _Stop as reached:
            if reached.token is not token:  # an enclosing `read` asked for it
                raise


@contextlib.contextmanager
def replace(
    model: nn.Module, hook_name: str, fn: Callable[[Activation], Activation]
) -> Iterator[None]:
    """Put `fn(activation)` in the activation's place; gradients flow through `fn`.

    `fn` returns a new tensor of the same shape and must not write into its argument. The result
    is cast to the activation's dtype and device, so a float32 `fn` may edit a bfloat16 model.

    At `hook_resid_mid` the change also reaches `hook_resid_post`, past the MLP, as a difference
    that is added there; in half precision it is exact only to the rounding of the old value.
    transformers' own `output_hidden_states` may show a layer's output before an edit of
    `hook_resid_post`: use `read`.

    Raises:
        ValueError: `model` has no such hook name; in the forward pass, `fn` changed the shape.
    """

    def edit(x: Tensor) -> Tensor:
        y = fn(x)
        if y.shape != x.shape:
            raise ValueError(f"need shape {tuple(x.shape)} at {hook_name}, got {tuple(y.shape)}")
        return y.to(x)

    with _hooked(model, hook_name, edit):
        yield


@contextlib.contextmanager
def add(model: nn.Module, hook_name: str, vector: Float[Tensor, "*batch_seq d"]) -> Iterator[None]:
    """Add `vector` to the activation: one direction, or one for each position or sequence.

    Args:
        vector: `d` is `site_dim`, so at `hook_z` the heads are flattened.

    Raises:
        ValueError: `model` has no such hook name, or `vector` has another width.
    """
    d = site_dim(model, hook_name)
    if vector.shape[-1] != d:
        raise ValueError(f"need a vector [..., {d}] at {hook_name}, got {tuple(vector.shape)}")
    with replace(model, hook_name, lambda x: x + vector.to(x).unflatten(-1, x.shape[2:])):
        yield


class _Stop(Exception):
    """Ends a forward pass; the `read` that owns `token` catches it.

    A fresh one is raised each time: kept, its traceback would keep the whole pass's tensors.
    """

    def __init__(self, token: object) -> None:
        self.token = token


def _find(model: nn.Module, hook_name: str) -> tuple[str, nn.Module, nn.Module]:
    """The site of `hook_name`, its layer, and the module whose input or output it is."""
    names = sites(model)
    if hook_name not in names:
        near = difflib.get_close_matches(hook_name, names, n=3, cutoff=0.4) or names[:3]
        raise ValueError(
            f"no hook name {hook_name!r} in this model; near ones: {', '.join(near)} "
            "(all: lib.models.sites.sites(model))"
        )
    _, index, site = hook_name.split(".", 2)
    base = hugging_face(model)
    family = family_of(base)
    layer = base.get_submodule(f"{family.layers}.{index}")
    part = SITES[site][0]
    return site, layer, layer if part == "layer" else layer.get_submodule(getattr(family, part))


@contextlib.contextmanager
def _hooked(model: nn.Module, hook_name: str, fn: Look) -> Iterator[None]:
    """Show `fn` the activation while the context is open."""
    site, layer, module = _find(model, hook_name)
    if site == "attn.hook_z":
        n_heads = hugging_face(model).config.get_text_config().num_attention_heads
        handles = [_on_input(module, _per_head(fn, n_heads))]
    elif site == "hook_resid_mid":
        handles = _on_resid_mid(module, layer, fn)
    elif SITES[site][1] == "input":
        handles = [_on_input(module, fn)]
    else:
        handles = [module.register_forward_hook(lambda _, args, output: _edited(output, fn))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edited(value: Tensor | tuple, fn: Look) -> Tensor | tuple:
    """Apply `fn` to an activation, or to the one that a tuple starts with: layers return either."""
    x = value[0] if isinstance(value, tuple) else value
    y = fn(x)
    if y is None:
        return value
    return (y, *value[1:]) if isinstance(value, tuple) else y


def _on_input(module: nn.Module, fn: Look) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return _edited(args, fn), kwargs
        return args, kwargs | {"hidden_states": _edited(kwargs["hidden_states"], fn)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _per_head(fn: Look, n_heads: int) -> Look:
    def flat(x: Tensor) -> Tensor:
        z = x.unflatten(-1, (n_heads, -1))
        y = fn(z)
        return (z if y is None else y).flatten(-2)  # through z, so that a read z is in the graph

    return flat


def _on_resid_mid(norm: nn.Module, layer: nn.Module, fn: Look) -> list[RemovableHandle]:
    """The norm's input is a branch of the residual stream: an edit there must go round the MLP."""
    delta: Tensor | None = None

    def before_norm(x: Tensor) -> Tensor | None:
        nonlocal delta
        y = fn(x)
        delta = None if y is None else y - x
        return y

    def after_layer(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return _edited(output, lambda x: None if delta is None else x + delta)

    # first of the layer's hooks: whoever looks at hook_resid_post comes after hook_resid_mid
    return [_on_input(norm, before_norm), layer.register_forward_hook(after_layer, prepend=True)]


def require_eval(model: nn.Module) -> None:
    """Raises ValueError for a model in training mode, where dropout acts."""
    if model.training:
        raise ValueError("need a model in eval mode; call model.eval()")


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` enters a graph that is built in here."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def split_head(hook_name: str) -> tuple[str, int | None]:
    """The site in the model, and the head."""
    match = re.fullmatch(r"(.+\.hook_z)\.(\d+)", hook_name)
    return (match[1], int(match[2])) if match else (hook_name, None)


def width_at(model: nn.Module, hook_name: str) -> int:
    site, head = split_head(hook_name)
    width = site_dim(model, site)
    if head is None:
        return width
    n_heads = hugging_face(model).config.get_text_config().num_attention_heads
    if head >= n_heads:
        raise ValueError(f"{hook_name}: need a head in 0 to {n_heads - 1}, got {head}")
    return width // n_heads
