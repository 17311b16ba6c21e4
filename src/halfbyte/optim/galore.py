"""GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2): AdamW in a subspace of the gradient that is chosen anew.

Every `galore_update_proj_gap` updates the gradient's singular vectors give a projection P. The moments are those of the
projected gradient, rank x n instead of m x n, and go on when P changes. With P of the left side:

    R = P^T G;   N = AdamW's normalized step of R;   W -= learning rate * alpha * P N

Which side is projected, when P is made, and that its rank is cut at the matrix's own are the reference repository's
rules (`galore_torch`, GaLoreProjector); `std` projects the shorter side, so that the moments are rank x the longer one.
What differs from that repository: P and the step are float32 for bfloat16 weights too, which keep their lower 16 bits
as elsewhere in this package; epsilon is added to the corrected square root, as in the paper; weight decay comes first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.errors import UsageError
from halfbyte.optim.moments import LOW_BITS, State, layout
from halfbyte.optim.options import OptimOptions
from halfbyte.optim.slots import Slot

NOT_PROJECTED = ("model.embed_tokens.weight", "lm_head.weight", "score.weight")
"""Matrices of a model that are no linears of its layers."""


def is_target(name: str, parameter: nn.Parameter) -> bool:
    """Whether GaLore projects this parameter: the matrices of the model's linears, by their Hugging Face names."""
    return parameter.ndim == 2 and name.endswith(".weight") and name not in NOT_PROJECTED


def require_targets(parameters: dict[str, nn.Parameter]) -> None:
    if not any(is_target(name, parameter) for name, parameter in parameters.items()):
        raise UsageError("optim galore_… projects the matrices of full fine-tuning: use it with method full")


@dataclass(frozen=True)
class Projection:
    """The sides of a gradient [m, n] that are projected to rank r.

    left    P [m, r] exists: R = P^T G;   right    Q [r, n] exists: R = G Q^T;   both: R = P^T G Q^T
    """

    m: int
    n: int
    rank: int
    left: bool
    right: bool

    @classmethod
    def of(cls, shape: tuple[int, int], options: OptimOptions) -> "Projection":
        m, n = shape
        kind = options.galore_proj_type
        if kind in ("std", "reverse_std"):
            right = (m >= n) == (kind == "std")
            left = not right
        else:
            left, right = kind in ("left", "full"), kind in ("right", "full")
        return cls(m, n, min(options.galore_rank, m, n), left, right)

    @property
    def low_shape(self) -> tuple[int, int]:
        return self.rank if self.left else self.m, self.rank if self.right else self.n

    def factors(self, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(P, Q) from the largest singular vectors of `gradient`, float32."""
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        return u[:, : self.rank] if self.left else None, v[: self.rank] if self.right else None

    def down(self, gradient: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
        if p is not None:
            gradient = p.t() @ gradient
        return gradient if q is None else gradient @ q.t()

    def up(self, step: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
        if p is not None:
            step = p @ step
        return step if q is None else step @ q


class GaloreSlot(Slot):
    """A matrix with moments of its projected gradient.

    left, right   P [m, r] and Q [r, n], float32; None on a side that is not projected
    made          updates that this matrix has had, int64 [1]: a new projection is due where the gap divides it
    """

    def __init__(self, name: str, parameter: nn.Parameter, options: OptimOptions) -> None:
        super().__init__(name, parameter, options.in_bytes)
        self.options, self.device_of_state = options, parameter.device
        self.projection = Projection.of((parameter.shape[0], parameter.shape[1]), options)
        rows, columns = self.projection.low_shape
        count, device = rows * columns, parameter.device
        self.in_bytes = options.in_bytes and count >= 4096
        places = layout(count, self.in_bytes, False)
        tensors = {end: torch.empty(n, dtype=dtype, device=device) for end, (dtype, n) in places.items()}
        self.state = State.over(tensors)
        self.state.reset()
        p = self.projection
        self.left = torch.zeros(p.m, p.rank, device=device) if p.left else None
        self.right = torch.zeros(p.rank, p.n, device=device) if p.right else None
        self.made = torch.zeros(1, dtype=torch.int64)
        self.low_bits = torch.zeros(self.numel, dtype=torch.int16, device=device) if self.half else None

    def tensors(self) -> dict[str, Tensor]:
        """All state by the end of its key, the storage itself."""
        found = self.state.tensors() | {".galore_updates": self.made}
        named = {".galore_left": self.left, ".galore_right": self.right, LOW_BITS: self.low_bits}
        return found | {end: tensor for end, tensor in named.items() if tensor is not None}

    @torch.no_grad()
    def reset(self) -> None:
        """The state as before the first update, its next projection due."""
        self.state.reset()
        for tensor in (self.left, self.right, self.low_bits, self.made):
            if tensor is not None:
                tensor.zero_()

    def update(self, learning_rate: float, scale: float, updates: int) -> None:
        """One update, number `updates` of the run, from the parameter's gradient times `scale`."""
        options, projection = self.options, self.projection
        gradient = self.parameter.grad
        assert gradient is not None
        g_MN = gradient.detach().float()
        if scale != 1.0:
            g_MN = g_MN * scale
        if int(self.made) % options.galore_update_proj_gap == 0:
            for held, made in zip((self.left, self.right), projection.factors(g_MN), strict=True):
                if held is not None and made is not None:
                    held.copy_(made)
        self.made += 1
        low = projection.down(g_MN, self.left, self.right).reshape(-1)
        m, v = self.state.exp_avg.load(), self.state.exp_avg_sq.load()
        m.lerp_(low, 1 - options.adam_beta1)
        v.mul_(options.adam_beta2).addcmul_(low, low, value=1 - options.adam_beta2)
        denominator = v.sqrt().div_((1 - options.adam_beta2**updates) ** 0.5).add_(options.adam_epsilon)
        normalized = m / denominator
        step_MN = projection.up(normalized.view(projection.low_shape), self.left, self.right)
        self.state.exp_avg.store(m)
        self.state.exp_avg_sq.store(v)

        whole = State(self.state.exp_avg, self.state.exp_avg_sq, self.low_bits)
        held = self.weight(0, self.numel)
        weight = whole.load_weight(held)
        if options.weight_decay:
            weight.mul_(1 - learning_rate * options.weight_decay)
        factor = learning_rate * options.galore_scale / (1 - options.adam_beta1**updates)
        weight.add_(step_MN.reshape(-1), alpha=-factor)
        whole.store_weight(held, weight)
