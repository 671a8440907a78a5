"""A running average of a network's weights, which reconstructs better than the weights of any one step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from videovae.errors import ConfigError, WeightsError


class ExponentialAverage:
    """The average of a module's parameters over its updates; recent ones count most.

    Every parameter is averaged, frozen or not: training freezes and thaws whole networks, so what is frozen
    now says nothing. Buffers are copied.

    Args:
        module: the bare network, not its DDP wrapper; the average starts as its weights, on its device.
        decay: share of the old average that an update keeps.
    Ranks: local; the averages agree across ranks because the weights do.
    Source: average <- decay * average + (1 - decay) * parameter, without warm-up, as Open-Sora-Plan has it.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"EMA decay={decay} is outside [0, 1). Give the share to keep, such as 0.999.")
        self.decay = decay
        self._parameter_names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        self._values: dict[str, Tensor] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for name in self._parameter_names:
            # At decay 0.999 an update is smaller than the spacing of bfloat16, and would be lost.
            self._values[name] = self._values[name].to(_averaging_dtype(self._values[name]))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average a little towards the module's weights, and copy its buffers."""
        live = self._live(module)
        averages = [self._values[name] for name in self._parameter_names]
        parameters = [live.pop(name).to(_averaging_dtype(self._values[name])) for name in self._parameter_names]
        torch._foreach_lerp_(averages, parameters, 1 - self.decay)
        for name, buffer in live.items():
            self._values[name].copy_(buffer)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Lend the module the averaged weights; the raw ones return bit by bit, even after an error."""
        live = self._live(module)
        raw = {name: tensor.clone() for name, tensor in live.items()}
        try:
            _copy(self._values, live)
            yield
        finally:
            _copy(raw, live)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the module's own names, so that a module of its kind loads them strictly."""
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved average.

        Raises:
            WeightsError: a name is missing, unknown, or has another shape.
        """
        _check(state, self._values, "saved average")
        _copy(state, self._values)

    def _live(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's tensors by name, sharing its memory."""
        live = module.state_dict()
        _check(live, self._values, type(module).__name__)
        return dict(live)


def _averaging_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], owner: str) -> None:
    """Raise where the names or shapes are not those of the average."""
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise WeightsError(
            f"The {owner} and the running average differ in {len(odd)} names, {odd[0]} among them. "
            "Use the bare network that the average was made of, not a wrapper and not another model."
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise WeightsError(
                f"The {owner} has {name} of shape {tuple(found[name].shape)}, and the running average has "
                f"{tuple(tensor.shape)}. Use the model that the average was made of."
            )
