"""Language models: load one, name the sites inside it, read and change what flows there.

The list of a model's hook names is `lib.models.sites.sites`; the module keeps its name here.
"""

from lib.models.load import load_model
from lib.models.sites import add, hook_layer, module_at, read, replace, site_dim

__all__ = ["add", "hook_layer", "load_model", "module_at", "read", "replace", "site_dim"]
