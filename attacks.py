"""
The adversary: L-infinity attacks as pure functions on pixels.

`model` is any callable from images (N, 3, H, W) in [0, 1] to logits (N, K); nothing here knows more.
No attack switches its mode, asks for a gradient of its weights or touches the global random state.

>>> x_adv = pgd(net.eval(), x, y, eps=8 / 255, step_size=2 / 255, steps=50)

Keys: PGD is Madry et al. 2018 (arXiv:1706.06083), SAT is arXiv:2006.14536.
"""
import torch
import torch.nn.functional as F
from torch import nn


# Randomness belongs to the image, not to the batch

def mix(z):
    """SplitMix64's finalizer (Steele et al. 2014) on int64, in place: a bijection, every bit matters."""
    z ^= (z >> 30) & 0x3FFFFFFFF  # torch shifts arithmetically: the mask makes it logical
    z *= -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    z ^= (z >> 31) & 0x1FFFFFFFF
    return z


def uniform(seed, index, counter, shape):
    """Uniform numbers that belong to the image -> (N, *shape) float32 in [0, 1), on index's device.

    index: (N,) int64, the numbers of the images. counter: tells this draw from the image's others, an
    int, an (N,) int64 tensor or a tuple of such. Same arguments, same numbers, on any device and batch.
    """
    key = torch.full_like(index, seed)
    for word in (index, *(counter if isinstance(counter, tuple) else (counter,))):
        key = mix(key * 3 + word + 1)
    z = torch.arange(1, torch.Size(shape).numel() + 1, device=index.device)
    z = z * -0x61C8864680B583EB + key[:, None]  # SplitMix64: the golden gamma, one stream an image
    return ((mix(z) >> 40) & 0xFFFFFF).float().mul_(2.0**-24).view(-1, *shape)


# What every attack needs: sane arguments, the box and the ball, a slope

def check_arguments(model, x, y):
    """ValueError for what makes any attack look weak: train mode, pixels outside [0, 1], odd labels."""
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise ValueError("the model is in train mode, where images change each other; call model.eval()")
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"images are {tuple(x.shape)} {x.dtype}; attacks need (N, C, H, W) float32")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"labels are {tuple(y.shape)} {y.dtype}; attacks need ({len(x)},) int64")
    if len(x) and not (x.min() >= -1e-6 and x.max() <= 1 + 1e-6):  # NaN too
        raise ValueError(f"pixels run from {x.min():.4g} to {x.max():.4g}; attacks need [0, 1], "
                         "and a model that normalises inside")


def check_labels(logits, y):
    """ValueError for labels that the logits have no class for."""
    if len(y) and not (y.min() >= 0 and y.max() < logits.shape[1]):
        raise ValueError(f"labels are {y.min()} to {y.max()}; the model has {logits.shape[1]} classes")


def ball(x, eps):
    """The pixels an attack may use -> (lower, upper), as x: x ± eps within [0, 1], rounded inwards."""
    exact = x.double()
    lower, upper = (exact - eps).float(), (exact + eps).float()
    lower = torch.where(exact - lower > eps, torch.nextafter(lower, x), lower)
    upper = torch.where(upper - exact > eps, torch.nextafter(upper, x), upper)
    return lower.clamp_(0, 1), upper.clamp_(0, 1)


def input_gradient(model, x, loss):
    """Logits (N, K) in float32, and the slope of `loss(logits)`, (N,), in each image's pixels, as x."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x).float()
        grad, = torch.autograd.grad(loss(logits).sum(), x)  # nothing else: none may reach a weight
    return logits.detach(), grad


# PGD

def pgd(model, x, y, eps, step_size, steps, noise=None, loss_scale=1.0, check=True):
    """Projected gradient ascent on the cross-entropy (SAT Sec. 3.1) -> x_adv, the last iterate, as x.

    eps, step_size: fractions of [0, 1]. noise: the start's offset, as x; None for a fresh uniform one.
    loss_scale keeps float16 gradients from underflowing, signs stay. ValueError as `check_arguments`.
    """
    if check:
        check_arguments(model, x, y)
    lower, upper = ball(x, eps)
    if noise is None:
        noise = torch.empty_like(x).uniform_(-eps, eps)
    x_adv = torch.clamp(x + noise, lower, upper)  # Differs from SAT: its start may leave [0, 1]
    for step in range(steps):
        logits, grad = input_gradient(
            model, x_adv, lambda logits: loss_scale * F.cross_entropy(logits, y, reduction="none"))
        if check and step == 0:
            check_labels(logits, y)
        x_adv = torch.clamp(x_adv + step_size * grad.sign(), lower, upper)
    return x_adv
