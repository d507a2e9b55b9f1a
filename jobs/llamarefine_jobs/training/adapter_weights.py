"""The adapter's weights, gradients and optimizer state, each as one flat fp32 tensor.

One flat gradient is cleared, clipped and summed over processes by one operation each, and AdamW is one kernel.
"""

from collections.abc import Mapping
from typing import Any

import torch

_SQUARES = "exp_avg_sq"
_ALIGNED = 32  # numbers; each weight begins at a multiple of 128 bytes, as in torch's own allocations
_MOMENTS = ("exp_avg", _SQUARES)  # AdamW's names of its state


class AdapterWeights:
    """The trainable weights of a model, moved into one flat tensor, with AdamW over it.

    The model's parameters and their `grad` become views, so a backward pass adds to the flat gradient in place.
    """

    def __init__(self, model: Any, *, weight_decay: float, most_gradient_norm: float) -> None:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        places, total = {}, 0
        for name, weight in trained.items():
            places[name] = slice(total, total + weight.numel())
            total += -(-weight.numel() // _ALIGNED) * _ALIGNED
        device = next(iter(trained.values())).device
        self._flat = torch.nn.Parameter(torch.zeros(total, device=device))
        self.gradient = torch.zeros(total, device=device)
        self._flat.grad = self.gradient
        self._most_norm = most_gradient_norm
        self._shapes = {name: (places[name], weight.shape) for name, weight in trained.items()}
        for name, weight in trained.items():
            view = self._flat.data[places[name]].view(weight.shape)
            view.copy_(weight.data)
            weight.data = view
            weight.grad = self.gradient[places[name]].view(weight.shape)
        self._optimizer = torch.optim.AdamW([self._flat], lr=0.0, weight_decay=weight_decay, fused=True)
        self._optimizer.step()  # makes the state; with a learning rate of 0 and no gradient it changes no weight
        self._set_updates(0)

    @property
    def values(self) -> Any:
        """All weights, as one tensor."""
        return self._flat.data

    def clear_gradient(self) -> None:
        self.gradient.zero_()

    def update(self, learning_rate: float) -> None:
        """Clip the gradient to its largest norm, make one step of AdamW, and clear the gradient.

        The same as torch.nn.utils.clip_grad_norm_, but without waiting for the device to know the norm.
        """
        norm = torch.linalg.vector_norm(self.gradient)
        self.gradient.mul_((self._most_norm / (norm + 1e-6)).clamp(max=1.0))
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self.clear_gradient()

    def is_finite(self) -> bool:
        return bool(self.values.isfinite().all())

    def optimizer_state(self) -> dict[str, Any]:
        """Return AdamW's state as tensors on the CPU, with names such as `exp_avg.<weight's name>`."""
        state = self._optimizer.state[self._flat]
        found = {
            f"{moment}.{name}": state[moment][place].view(shape).cpu().clone()
            for moment in _MOMENTS
            for name, (place, shape) in self._shapes.items()
        }
        return found | {"step": state["step"].cpu().clone()}

    def load_optimizer_state(self, saved: Mapping[str, Any], updates: int) -> None:
        """Restore what `optimizer_state` returned after so many updates.

        Raises ValueError if names, shapes or numbers do not fit.
        """
        expected = {f"{moment}.{name}": shape for moment in _MOMENTS for name, (_, shape) in self._shapes.items()}
        found = {name: tensor.shape for name, tensor in saved.items() if name != "step"}
        if found != expected or "step" not in saved or saved["step"].numel() != 1:
            raise ValueError("the optimizer's state is of another adapter")
        if not all(bool(tensor.isfinite().all()) for tensor in saved.values()):
            raise ValueError("the optimizer's state holds NaN or infinity")
        if float(saved["step"]) != updates:
            raise ValueError(f"the optimizer's state is of step {float(saved['step']):g}, expected {updates}")
        if any(bool((tensor < 0).any()) for name, tensor in saved.items() if name.startswith(_SQUARES)):
            raise ValueError("the optimizer's state holds negative squares")
        state = self._optimizer.state[self._flat]
        for moment in _MOMENTS:
            for name, (place, shape) in self._shapes.items():
                state[moment][place].view(shape).copy_(saved[f"{moment}.{name}"])
        self._set_updates(updates)

    def _set_updates(self, count: float) -> None:
        """Set AdamW's number of updates, from which it computes the bias corrections of its moments."""
        self._optimizer.state[self._flat]["step"].fill_(count)
