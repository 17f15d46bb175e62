"""What a dictionary is: its sites, its width, its rule, how they are written to JSON."""

from dataclasses import dataclass, fields

from lib.dictionaries.sparsity import Rule, rule_from_json, rule_to_json

CODE_NORMS = ("decoder", "crosscoder", "none")


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """Shape and rule of a dictionary; saved beside its weights."""

    site_dims: tuple[int, ...]
    """Width of each site that is read, in order."""
    d_sae: int
    """Number of latents."""
    rule: Rule
    hook_names: tuple[str, ...] = ()
    """Name of each site, when known."""
    out_dims: tuple[int, ...] | None = None
    """Transcoder: widths of the sites that are written instead of those read."""
    tied: bool = False
    """Encode with the decoder's rows."""
    unit_norm_decoder: bool = True
    """Decoder rows (all sites together) are kept at norm 1."""
    apply_b_dec_to_input: bool = True
    """Subtract `b_dec` from the input before encoding."""
    code_norm: str = "decoder"
    """What a latent's activation is multiplied by to compare it with others: `decoder` its row's
    norm, `crosscoder` the sum over sites of its rows' norms (Lindsey et al. 2024), `none` 1."""
    model_name: str = ""

    def __post_init__(self) -> None:
        for name in ("site_dims", "out_dims"):
            dims = getattr(self, name)
            if dims is not None and (not dims or min(dims) < 1):
                raise ValueError(f"need {name} to be widths of at least 1, got {dims}")
        if self.d_sae < 1:
            raise ValueError(f"need d_sae >= 1, got {self.d_sae}")
        k = getattr(self.rule, "k", 1)
        if k > self.d_sae:
            raise ValueError(f"need k <= d_sae {self.d_sae}, got k {k}")
        if self.hook_names and len(self.hook_names) != len(self.site_dims):
            raise ValueError(
                f"need a hook name for each of {len(self.site_dims)} sites, got {self.hook_names}"
            )
        if self.code_norm not in CODE_NORMS:
            raise ValueError(f"need code_norm in {CODE_NORMS}, got {self.code_norm!r}")
        other = self.out_dims is not None and self.out_dims != self.site_dims
        if other and (self.tied or self.apply_b_dec_to_input):
            raise ValueError(
                "a transcoder between other widths needs tied=False and "
                f"apply_b_dec_to_input=False, got {self.tied} and {self.apply_b_dec_to_input}"
            )

    @property
    def d_in(self) -> int:
        return sum(self.site_dims)

    @property
    def d_out(self) -> int:
        return sum(self.out_dims or self.site_dims)


def config_to_json(config: DictionaryConfig) -> dict:
    plain = {field.name: getattr(config, field.name) for field in fields(config)}
    return {**plain, "rule": rule_to_json(config.rule)}


def config_from_json(saved: dict) -> DictionaryConfig:
    tuples = {
        name: tuple(saved[name]) if saved[name] is not None else None
        for name in ("site_dims", "hook_names", "out_dims")
    }
    return DictionaryConfig(**{**saved, **tuples, "rule": rule_from_json(saved["rule"])})
