"""Adam, clipping in the same pass, with its moments in float32 or in 8 bits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.sparse import release


class Rows(nn.Parameter):
    """The same memory as `parameter`, contiguous: of a matrix held by columns, its transpose.

    Fused optimisers copy what is not contiguous, at every step.
    """

    def __new__(cls, parameter: nn.Parameter):
        data = parameter.data
        return super().__new__(cls, data if data.is_contiguous() else data.T)

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def take_grad_(self) -> None:
        """Take over the gradient of the parameter, which is left without."""
        grad, self.parameter.grad = self.parameter.grad, None
        self.grad = grad if grad is None or grad.shape == self.shape else grad.T


class Optimizer:
    """torch's fused Adam: 8 bytes of moments for each parameter."""

    def __init__(self, module: nn.Module, betas: tuple[float, float]) -> None:
        self.parameters = {name: Rows(p) for name, p in module.named_parameters()}
        self.adam = self._made(list(self.parameters.values()), betas)

    def _made(self, parameters: list[Rows], betas: tuple[float, float]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, betas=betas, fused=True)

    def step(self, lr: float, divisor: Float[Tensor, ""]) -> None:
        """One step along the gradient over `divisor`; gradients are gone afterwards."""
        for rows in self.parameters.values():
            rows.take_grad_()
        for group in self.adam.param_groups:
            group["lr"] = lr
        self._divide(divisor)
        self.adam.step()
        for rows in self.parameters.values():
            release(rows.grad)  # to the next step, or the next trainer
        self.adam.zero_grad(set_to_none=True)

    def _divide(self, divisor: Float[Tensor, ""]) -> None:
        self.adam.grad_scale = divisor  # in the same pass over memory as all else

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, besides the parameters."""
        return {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.adam.state[parameter].items()
            if not key.startswith("qmap")  # a table that is the same for all
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state`. A parameter that never had a gradient has none."""
        for i, (name, parameter) in enumerate(self.parameters.items()):
            saved = {
                k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")
            }
            if saved:
                moved = {key: value.to(parameter.device).clone() for key, value in saved.items()}
                self.adam.state[parameter] = self._restored(i, parameter, moved)

    def _restored(self, i: int, parameter: Rows, saved: dict[str, Tensor]) -> dict:
        return saved

    def forget(self, name: str, latents: Int[Tensor, "few"]) -> None:
        """Both moments of these latents at zero."""
        state = self.adam.state[self.parameters[name]]
        state["exp_avg"][latents] = 0
        state["exp_avg_sq"][latents] = 0


class Optimizer8bit(Optimizer):
    """bitsandbytes' Adam: 2 bytes for each parameter, and 8 for every 256.

    A block of 256 moments shares its scale, so it is at its best where rows of the weights are
    whole blocks. Parameters of fewer than 4,096 numbers keep float32.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """

    def _made(self, parameters: list[Rows], betas: tuple[float, float]) -> torch.optim.Optimizer:
        from bitsandbytes.optim import Adam8bit  # an extra

        return Adam8bit(parameters, betas=betas)

    def _divide(self, divisor: Float[Tensor, ""]) -> None:
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(divisor)

    def _restored(self, i: int, parameter: Rows, saved: dict[str, Tensor]) -> dict:
        self.adam.init_state(self.adam.param_groups[0], parameter, 0, i)
        return {**self.adam.state[parameter], **saved, "step": int(saved["step"])}

    def forget(self, name: str, latents: Int[Tensor, "few"]) -> None:
        """Both moments of these latents at the number that stands for zero."""
        state = self.adam.state[self.parameters[name]]
        for moment, table in (("state1", "qmap1"), ("state2", "qmap2")):
            state[moment][latents] = int(state[table].abs().argmin()) if table in state else 0


OPTIMIZERS = {"float32": Optimizer, "8bit": Optimizer8bit}
