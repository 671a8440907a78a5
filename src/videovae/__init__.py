"""A trainer for causal video VAEs, on top of rankwise.

`load(DIR)` gives a model of a folder in the layout of diffusers; the command `videovae` does the rest. Importing this
package imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from videovae.models.pretrained import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        try:
            from videovae.models import pretrained
        except ModuleNotFoundError as error:
            raise ImportError(
                f"videovae.{name} needs {error.name}, which is not installed: pip install 'rankwise[videovae]'"
            ) from error
        return getattr(pretrained, name)
    raise AttributeError(f"module 'videovae' has no attribute {name!r}")
