"""
The curves of Smooth Adversarial Training (SAT, arXiv:2006.14536), and ReLU with a smooth gradient.

See each curve and its derivative:
$ python sanity.py activations
Use one:
>>> act = make_act("silu")  # a fresh module for one site of one network

Keys: SAT is the paper; equations, sections and tables are numbered as there.
"""
import math
from functools import partial

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
    """Eq. 5 and 6 by hand, so that only x is kept for the backward pass, in its own precision."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        r = F.relu(x).to(alpha.dtype)  # float32 or more (SmoothReLU.alpha): alpha * x overflows float16
        return r - torch.log1p(alpha * r) / alpha

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        r = F.relu(x).to(alpha.dtype)
        slope = alpha * r / (1 + alpha * r)  # Eq. 6
        grad_x = (grad * slope).to(x.dtype)
        grad_alpha = None
        if ctx.needs_input_grad[1]:  # not in the attack, where alpha is frozen
            slope_in_alpha = (torch.log1p(alpha * r) / alpha - r / (1 + alpha * r)) / alpha
            grad_alpha = (grad * slope_in_alpha).sum()
        return grad_x, grad_alpha


class SmoothReLU(nn.Module):
    """Eq. 5: x - log(alpha x + 1) / alpha for x >= 0, else 0. alpha is learnable, one per layer."""

    def __init__(self, alpha=400.0):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(alpha).sqrt())  # 20, as in the released code

    @property
    def alpha(self):
        at_least_float32 = torch.promote_types(self.beta.dtype, torch.float32)
        return self.beta.to(at_least_float32).square() + 1e-3  # beta may cross 0, alpha stays positive

    def forward(self, x):
        value = SmoothReLUFunction.apply(x, self.alpha)
        # The cast stays outside the Function: torch 2.11 compiles the gradient of a Function to 0 if its
        # last operation is a cast that does nothing, as this one is in float32
        return value.to(x.dtype)

    def extra_repr(self):
        return f"alpha={self.alpha.item():.4g}"


class CentredSoftplus(nn.Module):
    """Softplus - log 2, 0 at 0: it trains from the first epoch on, where Softplus stalls.

    The numbers are in results/recipes.log.
    """

    def forward(self, x):
        return F.softplus(x) - math.log(2)


# A new curve is a class here and, if it has an alpha, its default below
ACTIVATIONS = {
    "relu": ReLU,
    "softplus": nn.Softplus,  # Sec. 4.1, alpha 1
    "softplus_centred": CentredSoftplus,  # not in the paper
    "psoftplus": nn.Softplus,  # Parametric Softplus, Eq. 2, with the alpha below
    "silu": nn.SiLU,  # Sec. 4.1
    "gelu": nn.GELU,  # Sec. 4.1, x Phi(x) exactly
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),  # the released code's GELU
    "elu": nn.ELU,  # Eq. 4; smooth only at alpha 1 (Sec. 4.3)
    "celu": nn.CELU,  # Eq. 8
    "smoothrelu": SmoothReLU,  # Eq. 5
    "mish": nn.Mish,  # in the released code, not in the paper
}

DEFAULT_ALPHA = {
    "psoftplus": 10.0,  # Sec. 3.2
    "elu": 1.0,  # Eq. 4
    "celu": 1.0,  # Eq. 8
    "smoothrelu": 400.0,  # Sec. 4.2, where its learnable alpha starts
}


def make_act(name, alpha=None, smooth_backward=False):
    """One fresh activation module, never in place. alpha: the curve's parameter; None: the paper's.

    ValueError for an unknown name, an alpha that is not positive or that the curve does not have, and a
    smooth backward pass (Sec. 3.2) with anything but relu.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"act {name} is unknown; use one of {', '.join(ACTIVATIONS)}")
    if smooth_backward and name != "relu":
        raise ValueError(f"smooth_backward is for relu; {name} has its own gradient")
    if alpha is not None and name not in DEFAULT_ALPHA:
        having = ", ".join(DEFAULT_ALPHA)
        raise ValueError(f"act {name} has no alpha; leave it out, or use one of {having}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha:g} is not positive and finite; the paper has "
                         f"{DEFAULT_ALPHA[name]:g}")

    if smooth_backward:
        return ReLU(smooth_backward=True)
    if name not in DEFAULT_ALPHA:
        return ACTIVATIONS[name]()
    return ACTIVATIONS[name](DEFAULT_ALPHA[name] if alpha is None else alpha)
