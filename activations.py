"""
The curves of Smooth Adversarial Training (SAT, arXiv:2006.14536), and ReLU with a smooth gradient.

See each curve, its derivative and what it costs:
$ python sanity.py activations
Use one:
>>> act = make_act("silu")  # a fresh module for one site of one network

Keys: SAT is the paper; equations, sections and tables are numbered as there.
"""
import torch
import torch.nn.functional as F
from torch import nn

BACKWARD_ALPHA = 10.0  # sharpness of the substituted gradient, SAT Sec. 3.2


class SmoothBackward(torch.autograd.Function):
    """ReLU forward, Parametric Softplus' derivative sigmoid(10 x) backward: Eq. 3, Sec. 3.2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return grad * torch.sigmoid(BACKWARD_ALPHA * x)


class ReLU(nn.Module):
    """max(x, 0); with `smooth_backward` the same values to the bit and the gradient of Eq. 3."""

    def __init__(self, smooth_backward=False):
        super().__init__()
        self.smooth_backward = smooth_backward

    def forward(self, x):
        return SmoothBackward.apply(x) if self.smooth_backward else F.relu(x)

    def extra_repr(self):
        return "smooth_backward=True" if self.smooth_backward else ""


class SmoothReLUFunction(torch.autograd.Function):
    """Eq. 5 and 6, by hand: only x is kept for the backward pass, and in its own precision."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        r = F.relu(x).to(alpha.dtype)  # float32: alpha * x leaves float16 at x = 164
        return (r - torch.log1p(alpha * r) / alpha).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        r = F.relu(x).to(alpha.dtype)
        slope = alpha * r / (1 + alpha * r)  # Eq. 6
        grad_x = (grad * slope).to(x.dtype)
        grad_alpha = None
        if ctx.needs_input_grad[1]:  # never in the attack
            grad_alpha = (grad * (torch.log1p(alpha * r) / alpha - r / (1 + alpha * r))).sum() / alpha
        return grad_x, grad_alpha


class SmoothReLU(nn.Module):
    """Eq. 5: x - log(alpha x + 1) / alpha for x >= 0, else 0. alpha is learnable, one a layer."""

    def __init__(self, alpha=400.0):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(alpha).sqrt())  # 20, as in the released code

    @property
    def alpha(self):
        wide = torch.promote_types(self.beta.dtype, torch.float32)
        return self.beta.to(wide).square() + 1e-3  # a hair: beta may cross 0, alpha may not

    def forward(self, x):
        return SmoothReLUFunction.apply(x, self.alpha)

    def extra_repr(self):
        return f"alpha={self.alpha.item():.4g}"


# Above this, torch takes softplus for x: 2e-9 off at its default of 20, nothing in float64 at 40.
SOFTPLUS_THRESHOLD = 40

# name: (default alpha, alpha -> a fresh module). None: this curve has no alpha.
ACTIVATIONS = {
    "relu": (None, lambda _: ReLU()),
    "softplus": (None, lambda _: nn.Softplus(threshold=SOFTPLUS_THRESHOLD)),  # Sec. 4.1
    "psoftplus": (10.0, lambda alpha: nn.Softplus(alpha, SOFTPLUS_THRESHOLD)),  # Eq. 2
    "silu": (None, lambda _: nn.SiLU()),  # Sec. 4.1
    "gelu": (None, lambda _: nn.GELU()),  # Sec. 4.1, x Phi(x) exactly
    "gelu_tanh": (None, lambda _: nn.GELU(approximate="tanh")),  # the released code's GELU
    "elu": (1.0, nn.ELU),  # Eq. 4; smooth only at alpha 1 (Sec. 4.3)
    "celu": (1.0, nn.CELU),  # Eq. 8
    "smoothrelu": (400.0, SmoothReLU),  # Eq. 5
    "mish": (None, lambda _: nn.Mish()),  # in the released code, not in the paper
}


def make_act(name, alpha=None, smooth_backward=False):
    """One fresh activation module, never in place. alpha: its sharpness, None for the paper's value.

    SystemExit for an unknown name, an alpha that is not positive or that the curve does not have, and a
    smooth backward pass (Sec. 3.2) with anything but relu.
    """
    if name not in ACTIVATIONS:
        raise SystemExit(f"--act {name} is unknown; use one of {', '.join(ACTIVATIONS)}")
    default, make = ACTIVATIONS[name]
    if alpha is not None and default is None:
        having = ", ".join(n for n, (a, _) in ACTIVATIONS.items() if a is not None)
        raise SystemExit(f"--act {name} has no --act-alpha; drop it, or use one of {having}")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise SystemExit(f"--act-alpha {alpha:g} is not positive; the paper has {default:g} for {name}")
    if smooth_backward and name != "relu":
        raise SystemExit(f"--smooth-backward is for ReLU, {name} has its own gradient; use --act relu")
    if smooth_backward:
        return ReLU(smooth_backward=True)
    return make(default if alpha is None else float(alpha))
