"""AdamW for a pack: every run has its own learning rate, gradient norm, clip and fate, in tensors of `[runs]`.

    m ← β1 m + (1-β1) g        v ← β2 v + (1-β2) g²
    p ← p (1 - lr λ) - lr · (m / (1-β1ᵗ)) / (sqrt(v / (1-β2ᵗ)) + ε)          (Loshchilov & Hutter 2019, algorithm 2)

Nothing here waits for the device: norms, clips and divergence are decided on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from suite.specs import Recipe


def schedule(recipe: Recipe, steps: int) -> Tensor:
    """Factor on the peak learning rate at each of `steps` steps, `[steps]`: linear warm-up, then the recipe's fall.

    The first step already moves (factor 1 / warm-up steps) and the last is the first above the final ratio.
    """
    warmup = math.ceil(recipe.warmup_ratio * steps)
    factors = []
    for step in range(steps):
        if step < warmup:
            factors.append((step + 1) / warmup)
            continue
        progress = (step - warmup) / max(1, steps - warmup)
        fall = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        floor = 0.0 if recipe.schedule == "constant" else recipe.final_lr_ratio
        factors.append(floor + (1 - floor) * fall[recipe.schedule])
    return torch.tensor(factors, dtype=torch.float64)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class PackedAdamW:
    """AdamW over tensors that hold one slice per run.

    Each parameter is seen as `[runs, scalars]`; a solo run's parameters need no run axis of their own, since one run
    makes the whole tensor one row. `learning_rates` is the peak rate of each run.

    A parameter narrower than float32 (a bfloat16 base that is trained itself) has a float32 master that is updated in its
    place and rounded into it: a step is mostly smaller than what bfloat16 can show.
    """

    def __init__(self, parameters: Iterable[tuple[nn.Parameter, Tensor | None]], runs: int,
                 learning_rates: Sequence[float], recipe: Recipe) -> None:
        self.parameters: list[nn.Parameter] = []
        self.ratios: list[Tensor | None] = []
        for parameter, ratio in parameters:
            self.parameters.append(parameter)
            self.ratios.append(None if ratio is None else ratio.to(parameter.device, _wide(parameter))[:, None])
        self.runs = runs
        self.recipe = recipe
        self.device = self.parameters[0].device
        dtype = _wide(self.parameters[0])
        self.rates = torch.tensor(learning_rates, dtype=dtype, device=self.device)[:, None]  # [runs, 1]
        self.masters = [p.detach().to(_wide(p)) if p.dtype != _wide(p) else None for p in self.parameters]
        self.m = [torch.zeros_like(p, dtype=_wide(p)) for p in self.parameters]
        self.v = [torch.zeros_like(p, dtype=_wide(p)) for p in self.parameters]
        self.alive = torch.ones(runs, dtype=torch.bool, device=self.device)
        self.steps = 0

    @torch.no_grad()
    def step(self, losses: Tensor, factor: float) -> Tensor:
        """One update from the gradients at hand, which stay until `drop_gradients`; returns gradient norms `[runs]`.

        `losses [runs]`. A run whose loss or gradient norm is not finite stops for good: its parameters keep their
        last values, whatever its neighbours do.
        """
        self.steps += 1
        recipe = self.recipe
        with_gradient = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        squares = [self._rows(self.parameters[i].grad).to(self.m[i].dtype).square().sum(1) for i in with_gradient]
        norms = torch.stack(squares).sum(0).sqrt()  # [runs]
        self.alive &= torch.isfinite(norms) & torch.isfinite(losses)
        clip = norms.new_ones(()) if recipe.clip is None else (recipe.clip / (norms + 1e-6)).clamp(max=1.0)
        scale = torch.where(self.alive, clip, 0.0)[:, None]
        rates = torch.where(self.alive[:, None], self.rates * factor, 0.0)
        correction1 = 1 - recipe.beta1**self.steps
        correction2 = 1 - recipe.beta2**self.steps
        for i in with_gradient:
            parameter = self.parameters[i]
            # nan_to_num: zero times NaN would still be NaN in a run that has stopped.
            gradient = torch.nan_to_num(self._rows(parameter.grad), posinf=0.0, neginf=0.0) * scale
            master = self.masters[i]
            p = self._rows(parameter if master is None else master)
            m, v = self._rows(self.m[i]), self._rows(self.v[i])
            ratio = self.ratios[i]
            rate = rates if ratio is None else rates * ratio
            m.lerp_(gradient, 1 - recipe.beta1)
            v.mul_(recipe.beta2).addcmul_(gradient, gradient, value=1 - recipe.beta2)
            denominator = (v / correction2).sqrt_().add_(recipe.epsilon)
            if recipe.weight_decay:
                p.mul_(1 - rate * recipe.weight_decay)
            p.sub_(rate * (m / correction1) / denominator)
            if master is not None:
                parameter.copy_(master)
        return norms

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def restart(self) -> None:
        """Forget both moments and the step count, as a fresh optimiser; runs that have stopped stay stopped."""
        for moment in (*self.m, *self.v):
            moment.zero_()
        self.steps = 0

    def snapshot(self) -> dict[str, Tensor]:
        """All that steps change beside the parameters, by name; the tensors live on and are not copies."""
        moments = {f"{name}.{i}": moment for name, held in (("m", self.m), ("v", self.v)) for i, moment in enumerate(held)}
        masters = {f"w.{i}": master for i, master in enumerate(self.masters) if master is not None}
        return {**moments, **masters, "alive": self.alive, "steps": torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `snapshot` gave."""
        self.steps = int(tensors["steps"])
        self.alive.copy_(tensors["alive"])
        for name, held in (("m", self.m), ("v", self.v)):
            for i, moment in enumerate(held):
                moment.copy_(tensors[f"{name}.{i}"])
        for i, master in enumerate(self.masters):
            if master is not None:
                master.copy_(tensors[f"w.{i}"])

    def _rows(self, tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor.view(self.runs, -1)
