"""
The adversary: L-infinity attacks as pure functions on pixels.

`model` is any callable from images (N, C, H, W) in [0, 1] to logits (N, K). If it is an nn.Module in
train mode, `pgd` (unless check=False), `pgd_search` and `autoattack` refuse it. No attack switches that
mode or computes a gradient of the weights. None touches torch's random state, except `pgd` without
`noise`.

Start with these three: one to train, one to measure, one to measure with a stronger attack. `index`,
(N,) int64, is each image's place in the data set: its random numbers depend on that, not on the batch.
The default, None, numbers the images from 0.
>>> x_adv = pgd(net.eval(), x, y, eps=8 / 255, step_size=2 / 255, steps=10)
>>> x_adv, report = pgd_search(net.eval(), x, y, eps=8 / 255, step_size=2 / 255, steps=50, index=index)
>>> x_adv, report = autoattack(net.eval(), x, y, eps=8 / 255, index=index)

Where `model` runs in less than float32, `verify` is the float32 model: it judges the clean images and
confirms every fooled one. `progress(name, step, n_steps, n_undecided)` is called at every step and may
raise. "As x" in a docstring: of x's shape, type and device.

Keys: PGD is Madry et al. 2018 (arXiv:1706.06083), SAT is arXiv:2006.14536, AA is Croce & Hein 2020
(arXiv:2003.01690), FAB is Croce & Hein 2020b (arXiv:1907.02044), SQ is Andriushchenko et al. 2020
(arXiv:1912.00049).
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack is these, in this order
# The first word of each search's counter in `uniform`, so that no two share random numbers
START, APGD, SQUARE = 0, 1, 2
# As in SAT's code, so that small float16 gradients do not become 0. Scaling by a power of two is exact
LOSS_SCALE = 2.0**7
# Square counts its squares from 0, and halves their area after each of these (AA)
SQUARE_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


# Randomness belongs to the image, not to the batch

def mix(z):
    """SplitMix64's finalizer (Steele et al. 2014) on int64, in place: a bijection mixing all bits."""
    z ^= (z >> 30) & 0x3FFFFFFFF  # torch shifts arithmetically: the mask makes it logical
    z *= -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    z ^= (z >> 31) & 0x1FFFFFFFF
    return z


def uniform(seed, index, counter, shape):
    """Uniform numbers that belong to the image -> (N, *shape) float32 in [0, 1), on index's device.

    index: (N,) int64, the numbers of the images. counter names the draw, and another counter gives other
    numbers: an int, an (N,) int64 tensor, or a tuple of these. Same arguments, same numbers, on any
    device and in any batch.
    """
    if not isinstance(counter, tuple):
        counter = (counter,)
    key = mix(torch.full_like(index, seed))
    for word in (index, *counter):
        # Mixed after each word, so that their order matters; + 1, since zeros would leave key 0 at 0.
        # The 3 is arbitrary, but another number would change every draw
        key = mix(key * 3 + word + 1)
    n_numbers = torch.Size(shape).numel()
    # SplitMix64 from the image's key: its k-th state is key + k * 0x9E3779B97F4A7C15, here signed
    z = torch.arange(1, n_numbers + 1, device=index.device)
    z = z * -0x61C8864680B583EB + key[:, None]
    bits = (mix(z) >> 40) & 0xFFFFFF  # the upper 24: as many as a float32 holds
    return bits.float().mul_(2.0**-24).view(-1, *shape)


def random_start(x, eps, seed, index, restart=0):
    """The offset of PGD's start, uniform in ± eps -> as x. restart: which one, int or (N,) int64."""
    return (2 * uniform(seed, index, (START, restart), x.shape[1:]) - 1) * eps


# What every attack needs: valid arguments, the box and the ball, a loss and its gradient

def check_arguments(model, x, y, eps, step_size=0.0, steps=0, restarts=1, queries=0, verify=None):
    """ValueError for what makes any attack look weak: train mode, wrong types, pixels or numbers."""
    for net in (model, verify):
        if isinstance(net, nn.Module) and any(module.training for module in net.modules()):
            raise ValueError("the model is in train mode, where the images of a batch affect each "
                             "other; call model.eval()")
    for name, value in (("images", x), ("labels", y)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} are a {type(value).__name__}; attacks need a torch.Tensor")
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"images are {tuple(x.shape)} {x.dtype}; attacks need (N, C, H, W) "
                         "torch.float32 in [0, 1]; of bytes, x.float() / 255")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"labels are {tuple(y.shape)} {y.dtype}; attacks need ({len(x)},) torch.int64")
    in_box = (x >= -1e-6) & (x <= 1 + 1e-6)  # False for NaN
    if not in_box.all():
        raise ValueError(f"pixels run from {x.min():.4g} to {x.max():.4g}; attacks need [0, 1], "
                         "and a model that normalises inside")
    for name, value in (("eps", eps), ("step_size", step_size)):
        if not 0 <= value <= 1:  # NaN too
            raise ValueError(f"{name} is {value:g}; attacks need a fraction of [0, 1], such as 8 / 255")
    for name, value, least in (("steps", steps, 0), ("restarts", restarts, 1), ("queries", queries, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; attacks need {least} or more of them")


def check_labels(logits, y):
    """ValueError for labels that the logits have no class for."""
    known = (y >= 0) & (y < logits.shape[1])
    if not known.all():
        raise ValueError(f"labels run from {y.min()} to {y.max()}; the model has "
                         f"{logits.shape[1]} classes, numbered from 0")


def image_numbers(index, x):
    """index, a tensor, array or list of N ints, or None for 0 to N - 1 -> (N,) int64 on x's device."""
    if index is None:
        return torch.arange(len(x), device=x.device)
    index = torch.as_tensor(index, dtype=torch.int64, device=x.device)
    if index.shape != x.shape[:1]:
        raise ValueError(f"index is {tuple(index.shape)}; attacks need ({len(x)},), one per image")
    return index


def ball(x, eps):
    """The pixels an attack may use, within eps of x and in [0, 1] -> lower, upper, as x.

    In float32, x ± radius is off by less than 2^-23. The radius is that much smaller than eps, so the
    bounds stay inside the exact ball, and nothing has to be computed in float64.
    """
    radius = max(eps - 2.0**-23, 0.0)
    lower = (x - radius).clamp_(0, 1)
    upper = (x + radius).clamp_(0, 1)
    return lower, upper


def forward(model, x):
    """The model's logits -> (N, K) float32; ValueError if it gives anything else."""
    logits = model(x)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"the model gives a {type(logits).__name__}; attacks need its logits alone")
    if logits.shape[:-1] != x.shape[:1]:
        raise ValueError(f"the model gives {tuple(logits.shape)}; attacks need logits, ({len(x)}, K)")
    return logits.float()


def input_gradient(model, x, loss):
    """-> logits (N, K) float32; the gradient of the summed loss with respect to x, as x.

    `loss(logits)` is (N,). It is scaled for the backward pass, so that float16 does not underflow, and
    the gradient is scaled back.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = forward(model, x)
        scaled = LOSS_SCALE * loss(logits).sum()
        grad, = torch.autograd.grad(scaled, x)  # nothing else: no gradient may reach a weight
    return logits.detach(), grad / LOSS_SCALE


def predict(logits):
    """Logits (N, K) -> the class of each image; -1, which is no class, where a logit is NaN."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def cross_entropy(logits, y):
    """The loss of PGD and of APGD-CE -> (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


def logit_of(logits, y):
    """The logit of class y, (N,) int64 -> (N,)."""
    return logits.gather(1, y[:, None]).squeeze(1)


def without_label(logits, y):
    """The logits with the label's at -infinity: the highest is now the best wrong class -> (N, K)."""
    return logits.scatter(1, y[:, None], -torch.inf)


def margin(logits, y):
    """How far the best wrong class is above the label -> (N,)."""
    return without_label(logits, y).amax(1) - logit_of(logits, y)


# PGD

def pgd(model, x, y, eps, step_size, steps, noise=None, loss=cross_entropy, check=True):
    """Projected gradient ascent, PGD (SAT Sec. 3.1) -> x_adv, the last iterate, as x.

    It climbs `loss(logits, y)`, (N,). eps, step_size: fractions of [0, 1]. noise: the start's offset,
    as x; None for a fresh uniform one. ValueError as `check_arguments` and `check_labels`; check=False
    skips these checks, which have to wait for the device.
    """
    if check:
        check_arguments(model, x, y, eps, step_size, steps)

    def objective(logits):
        if check:
            check_labels(logits, y)
        return loss(logits, y)

    x = x.detach()
    lower, upper = ball(x, eps)
    if noise is None:
        noise = torch.empty_like(x).uniform_(-eps, eps)
    x_adv = torch.clamp(x + noise, lower, upper)  # Differs from SAT, whose start may leave [0, 1]
    for _ in range(steps):
        _, grad = input_gradient(model, x_adv, objective)
        # What is not finite becomes NaN, so that training notices and stops; sign() would hide it
        direction = torch.where(grad.isfinite(), grad.sign(), torch.nan)
        x_adv = torch.clamp(x_adv + step_size * direction, lower, upper)
    return x_adv


# The scaffold of every search: fooled images leave the batch, the rest go on

class Search:
    """What is known of all N images so far, and `rest`, the tensors of those that are not yet fooled.

    Every attribute of `rest` is a tensor with one row per image; an attack adds its own. An attack moves
    `rest.x_adv`, asks the model, and lets the fooled images leave: their rows vanish from every tensor.
    """

    def __init__(self, name, x, y, eps, verify, progress):
        self.name = name
        self.verify = verify
        self.progress = progress
        self.x_adv = x.clone()  # what fools the model, x where nothing was found
        self.fooled = torch.zeros_like(y, dtype=torch.bool)
        self.forwards = torch.zeros_like(y)  # forward passes spent on each image
        lower, upper = ball(x, eps)
        row = torch.arange(len(y), device=y.device)  # where among the N images
        self.rest = SimpleNamespace(row=row, x=x, y=y, lower=lower, upper=upper, x_adv=x)

    def until_all_fooled(self, n_steps):
        """Yields 0 to n_steps - 1 while images remain; `progress` is told each step."""
        for step in range(n_steps):
            n_undecided = len(self.rest.y)
            if n_undecided == 0:
                return
            if self.progress is not None:
                self.progress(self.name, step, n_steps, n_undecided)
            yield step

    def confirm(self, claimed):
        """Of the images claimed to be fooled, (n,) bool, those that fool `verify` too -> (n,) bool.

        The search may run in bfloat16, where a margin near zero means nothing; `verify` is float32.
        """
        if self.verify is None:
            return claimed
        chosen = claimed.nonzero().squeeze(1)
        if len(chosen) == 0:
            return claimed
        self.forwards[self.rest.row[chosen]] += 1
        guess = predict(forward(self.verify, self.rest.x_adv[chosen]))
        confirmed = claimed.clone()
        confirmed[chosen] = guess != self.rest.y[chosen]
        return confirmed

    def leave(self, fooled):
        """Images that are fooled, (n,) bool, leave with their x_adv -> their rows among the N images."""
        n_fooled = int(fooled.sum())  # the only wait for the device in a step, without verify
        n_remaining = len(fooled) - n_fooled
        order = fooled.int().argsort(stable=True)  # those that remain first
        remaining, leaving = order.split([n_remaining, n_fooled])
        rows = self.rest.row[leaving]
        if n_fooled > 0:
            self.x_adv[rows] = self.rest.x_adv[leaving]
            self.fooled[rows] = True
            for name, tensor in vars(self.rest).items():
                setattr(self.rest, name, tensor[remaining])
        return rows


def search_gradient(model, x, loss):
    """`input_gradient` for a search, which has to go on: what is not finite becomes 0."""
    logits, grad = input_gradient(model, x, loss)
    return logits, grad.nan_to_num_(0, 0, 0)


def per_image(value):
    """One number per image -> (N, 1, 1, 1), to meet pixels."""
    return value[:, None, None, None]


def linf(delta):
    """The L-infinity norm of each image's change -> (N,)."""
    return delta.abs().amax((1, 2, 3))


# What blinds an attack: warnings, each "reason: sentence"

def not_logits(logits):
    """Warnings about outputs, (N, K), that no attack can climb -> [str]."""
    warnings = []
    n_broken = int((~logits.isfinite()).any(1).sum())
    if n_broken > 0:
        warnings.append(f"not finite: {n_broken} of {len(logits)} clean images have NaN or infinite "
                        "logits; NaN counts as wrong")
    in_unit = (logits >= 0) & (logits <= 1)
    sums_to_1 = (logits.sum(1) - 1).abs() < 1e-4
    if len(logits) > 0 and in_unit.all() and sums_to_1.all():
        warnings.append("probabilities: every row of the output is in [0, 1] and sums to 1; "
                        "the attacks need logits, which come before softmax")
    return warnings


def zero_gradients(grad):
    """Warnings about gradients, as x, that carry no information -> [str]."""
    zero = (grad == 0).float().mean()  # NaN where there are no images
    if zero > 0.05:
        return [f"zero gradients: {zero:.1%} of the input gradient is exactly 0 or not finite "
                "(saturated, rounded or underflowing); PGD and APGD-CE see nothing there"]
    return []


def random_logits(logits, again):
    """Warnings about logits that differ between two calls on the same images -> [str]."""
    finite = logits.isfinite().all(1)
    logits = logits[finite]
    drift = (again[finite] - logits).abs().amax(1) / logits.abs().amax(1).clamp(min=1e-12)
    drift = drift.nan_to_num(torch.inf, torch.inf)
    if (drift > 1e-4).any():
        return [f"random logits: they change by up to {drift.max():.1%} between two calls on one image; "
                "gradients need averaging over calls, and a verdict is one draw"]
    return []


def masked_gradients(n, fooled):
    """Warnings for n images -> [str]; fooled: {attack: how many it was the first to fool}.

    A search without gradients that beats those with them has found a masked gradient.
    """
    with_gradients = [name for name in STANDARD if name in fooled and name != "square"]
    n_square = fooled.get("square", 0)
    if not with_gradients or n_square <= 0.002 * n:  # AA's authors warn at this share
        return []
    names = ", ".join(with_gradients)
    return [f"masked gradients: of {n} images, Square fooled {n_square} that {names} did not; the true "
            "robustness is lower, so attack the model adaptively"]


# PGD with verdicts: whether an image is fooled, and when

@torch.no_grad()
def pgd_search(model, x, y, eps, step_size, steps, index=None, restarts=1, seed=0, verify=None,
               last_iterate=False, progress=None):
    """PGD that asks at every iterate, the start too, whether it fools the model -> x_adv, report.

    x_adv is the iterate that fools, or x. Images that are wrong on x are not attacked, except with
    last_iterate. report is a dict:
      clean          (N,) int64: the class of x, -1 for NaN
      restart, step  (N,) int64: where the first iterate that fools was found, -1 where none was
      robust         (N,) bool: right on x, and never fooled
      forwards       (N,) int64: forward passes spent on the image
      warnings       [str], each "reason: sentence"

    `last_iterate` is SAT's protocol: every image takes all steps from one start, even if x is wrong.
    Then x_adv is the last iterate, robust (N,) bool means that this one is right, whether or not x is,
    and robust_at (N, steps + 1) bool says the same of every iterate; restart and step stay -1.
    ValueError as `check_arguments` and `check_labels`, and for last_iterate with restarts.
    """
    check_arguments(model, x, y, eps, step_size, steps, restarts, verify=verify)
    if last_iterate and restarts > 1:
        raise ValueError(f"restarts is {restarts}; the last iterate is one start's: use restarts=1")
    index = image_numbers(index, x)
    clean_logits = forward(verify or model, x)
    check_labels(clean_logits, y)
    clean = predict(clean_logits)
    warnings = not_logits(clean_logits)

    search = Search("pgd", x, y, eps, verify, progress)
    rest = search.rest
    rest.index = index
    search.forwards += 1
    restart_fooled = torch.full_like(y, -1)
    step_fooled = torch.full_like(y, -1)
    robust_at = torch.zeros(len(y), steps + 1, dtype=torch.bool, device=x.device)
    if not last_iterate:
        search.leave(clean != y)

    def objective(logits):
        return cross_entropy(logits, rest.y)

    for iterate in search.until_all_fooled(restarts * (steps + 1)):
        restart, step = divmod(iterate, steps + 1)
        if step == 0:
            moved = rest.x + random_start(rest.x, eps, seed, rest.index, restart)
        else:
            moved = rest.x_adv + step_size * rest.grad.sign()
        rest.x_adv = torch.clamp(moved, rest.lower, rest.upper)

        if step < steps:
            logits, rest.grad = search_gradient(model, rest.x_adv, objective)
            if iterate == 0:
                warnings += zero_gradients(rest.grad)
        else:
            logits = forward(model, rest.x_adv)  # nothing comes after the last iterate: no gradient
        search.forwards[rest.row] += 1
        fooled = search.confirm(predict(logits) != rest.y)
        if last_iterate:
            robust_at[:, step] = ~fooled
        else:
            rows = search.leave(fooled)
            restart_fooled[rows] = restart
            step_fooled[rows] = step

    report = dict(clean=clean, restart=restart_fooled, step=step_fooled, robust=~search.fooled,
                  forwards=search.forwards, warnings=warnings)
    if last_iterate:
        search.x_adv = rest.x_adv
        report["robust"] = robust_at[:, -1]
        report["robust_at"] = robust_at
    return search.x_adv, report


# APGD

def targeted_margin(logits, y, target):
    """How far the target, (N,) int64, is above the label -> (N,)."""
    return logit_of(logits, target) - logit_of(logits, y)


def targeted_cross_entropy(logits, y, target):
    """The loss towards a target -> (N,)."""
    return -cross_entropy(logits, target)


def targeted_dlr(logits, y, target):
    """The targeted difference of logits ratio (AA) -> (N,): no scale or shift of the logits matters."""
    first, _, third, fourth = logits.topk(4).values.unbind(1)
    return targeted_margin(logits, y, target) / (first - (third + fourth) / 2 + 1e-12)


def checkpoints(steps):
    """The steps after which APGD may halve its step size (AA): at 22, 41, 57, 70, 80, 87, 93, 99%."""
    checks = set()
    percent = 22
    width = 22
    while percent < 100:
        checks.add(-(-percent * steps // 100))  # rounded up
        width = max(width - 3, 6)
        percent += width
    return checks


@torch.no_grad()
def apgd(model, x, y, eps, index=None, seed=0, target=None, loss=cross_entropy, restart=0, steps=100,
         rho=0.75, verify=None, progress=None):
    """Auto-PGD (AA Alg. 1) -> x_adv (x where it found nothing), fooled (N,) bool, forwards (N,) int64.

    It climbs `loss(logits, y)`, or `loss(logits, y, target)` where a target, (N,) int64, is given.
    restart: which random start, an int.
    """
    search = Search("apgd", x, y, eps, verify, progress)
    rest = search.rest
    if target is not None:
        rest.target = target

    def objective(logits):
        if target is None:
            return loss(logits, rest.y)
        return loss(logits, rest.y, rest.target)

    noise = 2 * uniform(seed, image_numbers(index, x), (APGD, restart), x.shape[1:]) - 1
    start = x + eps * noise / per_image(linf(noise))
    rest.x_adv = torch.clamp(start, rest.lower, rest.upper)
    rest.x_before = rest.x_adv
    rest.x_best = rest.x_adv
    rest.grad_best = torch.zeros_like(x)
    worst = x.new_full((len(x),), -torch.inf)
    rest.loss = torch.full_like(worst, torch.inf)  # so that the first iterate is not a step up
    rest.loss_best = worst
    rest.loss_checked = worst  # loss_best at the last checkpoint
    rest.n_up = torch.zeros_like(y)  # steps up since the last checkpoint
    # Whether the last checkpoint halved the step; True before the first, which then is never "stuck"
    rest.halved = torch.ones_like(y, dtype=torch.bool)
    rest.step_size = torch.full_like(worst, 2 * eps)
    checks = checkpoints(steps)
    last_check = 0

    for step in search.until_all_fooled(steps + 1):
        logits, rest.grad = search_gradient(model, rest.x_adv, objective)
        search.forwards[rest.row] += 1
        loss_before = rest.loss
        rest.loss = objective(logits)
        rest.n_up = rest.n_up + (rest.loss > loss_before)
        fooled = search.confirm(predict(logits) != rest.y)
        search.leave(fooled)

        # The best iterate so far; NaN is above nothing
        better = rest.loss > rest.loss_best
        rest.loss_best = torch.where(better, rest.loss, rest.loss_best)
        rest.x_best = torch.where(per_image(better), rest.x_adv, rest.x_best)
        rest.grad_best = torch.where(per_image(better), rest.grad, rest.grad_best)

        # Too few steps went up, or the best has stood still: back to it, with half the step
        if step in checks:
            few = rest.n_up <= rho * (step - last_check)  # AA Condition 1, with <= as in AA's code
            stuck = ~rest.halved & (rest.loss_best == rest.loss_checked)  # AA Condition 2
            rest.halved = few | stuck
            rest.step_size = torch.where(rest.halved, rest.step_size / 2, rest.step_size)
            rest.x_adv = torch.where(per_image(rest.halved), rest.x_best, rest.x_adv)
            rest.grad = torch.where(per_image(rest.halved), rest.grad_best, rest.grad)
            rest.loss = torch.where(rest.halved, rest.loss_best, rest.loss)
            rest.loss_checked = rest.loss_best
            rest.n_up = torch.zeros_like(rest.n_up)
            last_check = step

        # A gradient step, then momentum
        ascent = rest.x_adv + per_image(rest.step_size) * rest.grad.sign()
        ascent = torch.clamp(ascent, rest.lower, rest.upper)
        a = 0.75 if step > 0 else 1.0  # alpha in AA
        momentum = (1 - a) * (rest.x_adv - rest.x_before)
        moved = rest.x_adv + a * (ascent - rest.x_adv) + momentum
        rest.x_before = rest.x_adv
        rest.x_adv = torch.clamp(moved, rest.lower, rest.upper)
    return search.x_adv, search.fooled, search.forwards


# FAB

def to_hyperplane(x, w, gap, iterations=6):
    """The smallest L-inf step inside the box that raises <w, x> by gap, (N,) -> as x (FAB).

    Every pixel moves by `reach`, or less where the box stops it. As reach grows, the box stops more and
    more pixels, so |<w, step>| grows ever more slowly: it is concave. Newton's method solves |<w, step>|
    = |gap| for reach, and from 0 it never overshoots. FAB finds the same reach by sorting the pixels.
    Six iterations are exact in float32 up to 95% of what the box can gain, for gradients as networks
    have them; beyond, or with weights of very different sizes, reach falls a little short. Where no
    point of the box gains as much as gap, the step goes towards the corner that gains most.
    """
    gap = gap.nan_to_num(0, 0, 0)  # logits that are not finite define no plane
    direction = w.sign() * per_image(gap.sign())
    room = torch.where(direction > 0, 1 - x, x)
    weight = w.abs()
    reach = torch.zeros_like(gap)
    for _ in range(iterations):
        moved = torch.minimum(room, per_image(reach))
        missing = gap.abs() - (weight * moved).sum((1, 2, 3))
        slope = (weight * (room > per_image(reach))).sum((1, 2, 3))
        further = reach + missing.clamp(min=0) / slope
        reach = torch.where(slope > 0, further, reach).clamp(max=1)
    return direction * torch.minimum(room, per_image(reach))


@torch.no_grad()
def fab(model, x, y, eps, target, steps=100, alpha_max=0.1, eta=1.05, beta=0.9, verify=None,
        progress=None):
    """Targeted Fast Adaptive Boundary attack (FAB Alg. 1) -> x_adv, fooled, forwards, as `apgd`.

    From x it looks for the nearest point across the boundary to class `target`, (N,) int64. An image is
    fooled once a point of any wrong class is within eps.
    """
    search = Search("fab", x, y, eps, verify, progress)
    rest = search.rest
    rest.target = target

    def objective(logits):
        return targeted_margin(logits, rest.y, rest.target)

    for _ in search.until_all_fooled(steps):
        logits, w = search_gradient(model, rest.x_adv, objective)
        gap = -objective(logits)  # <w, x_adv> must rise by this much to reach the boundary

        # Step past the boundary from x_adv and from x, then mix: alpha is the share of x's step
        step_adv = to_hyperplane(rest.x_adv, w, gap)
        gap_of_x = gap + (w * (rest.x_adv - rest.x)).sum((1, 2, 3))  # to the same plane, from x
        step_x = to_hyperplane(rest.x, w, gap_of_x)
        size_adv = linf(step_adv).clamp(min=1e-8)
        size_x = linf(step_x).clamp(min=1e-8)
        alpha = (size_adv / (size_adv + size_x)).clamp(max=alpha_max)
        alpha = per_image(alpha)
        from_adv = rest.x_adv + eta * step_adv
        from_x = rest.x + eta * step_x
        rest.x_adv = torch.clamp((1 - alpha) * from_adv + alpha * from_x, 0, 1)

        # A point that only rounding puts outside the ball is clamped into it and judged there
        near = linf(rest.x_adv - rest.x) < eps + 1e-6
        inside = torch.clamp(rest.x_adv, rest.lower, rest.upper)
        rest.x_adv = torch.where(per_image(near), inside, rest.x_adv)
        rest.wrong = predict(forward(model, rest.x_adv)) != rest.y
        search.forwards[rest.row] += 2
        fooled = search.confirm(rest.wrong & near)
        search.leave(fooled)

        # Across the boundary, but too far away or not confirmed: back towards x
        back = rest.x + beta * (rest.x_adv - rest.x)
        rest.x_adv = torch.where(per_image(rest.wrong), back, rest.x_adv)
    return search.x_adv, search.fooled, search.forwards


# Square

@torch.no_grad()
def square(model, x, y, eps, index=None, seed=0, queries=5000, p=0.8, verify=None, progress=None):
    """Square Attack (SQ Alg. 1 and 2), without any gradient -> x_adv, fooled, forwards, as `apgd`.

    Every pixel is always at an end of its range: SQ adds ± 2 eps to a square and clamps, which sends
    each channel of the square to one of its ends.
    """
    search = Search("square", x, y, eps, verify, progress)
    rest = search.rest
    C, H, W = x.shape[1:]
    rows = torch.arange(H, device=x.device)
    columns = torch.arange(W, device=x.device)
    rest.index = image_numbers(index, x)
    stripes = uniform(seed, rest.index, (SQUARE, 0), (C, 1, W)) < 0.5
    rest.x_adv = torch.where(stripes, rest.lower, rest.upper)
    rest.x_best = x
    rest.margin_best = x.new_full((len(x),), -torch.inf)

    for query in search.until_all_fooled(queries + 1):  # the stripes, then squares
        logits = forward(model, rest.x_adv)
        search.forwards[rest.row] += 1
        current = margin(logits, rest.y)
        better = current > rest.margin_best  # NaN is above nothing
        rest.margin_best = torch.where(better, current, rest.margin_best)
        rest.x_best = torch.where(per_image(better), rest.x_adv, rest.x_best)
        fooled = search.confirm(predict(logits) != rest.y)
        search.leave(fooled)

        # The size of the next square; its schedule is not rescaled to the number of queries (AA)
        n_halvings = sum(query > n for n in SQUARE_HALVINGS)
        area = p / 2**n_halvings * H * W
        side = max(round(area**0.5), 1)
        side = min(side, H, W)

        # Its place, and for each channel the end that its pixels go to
        if query % 100 == 0:  # random numbers for the next hundred
            rest.draws = uniform(seed, rest.index, (SQUARE, 1 + query // 100), (100, 2 + C))
        draw = rest.draws[:, query % 100]
        top = (draw[:, :1] * (H - side + 1)).long()  # (n, 1)
        left = (draw[:, 1:2] * (W - side + 1)).long()
        in_rows = (rows >= top) & (rows < top + side)  # (n, H)
        in_columns = (columns >= left) & (columns < left + side)  # (n, W)
        in_square = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (n, 1, H, W)
        to_lower = draw[:, 2:, None, None] < 0.5  # (n, C, 1, 1)
        ends = torch.where(to_lower, rest.lower, rest.upper)
        rest.x_adv = torch.where(in_square, ends, rest.x_best)
    return search.x_adv, search.fooled, search.forwards


# AutoAttack

@torch.no_grad()
def autoattack(model, x, y, eps, index=None, seed=0, verify=None, attacks=STANDARD, progress=None,
               steps=100, queries=5000):
    """The attacks in AA's order, each on the images that none has fooled yet -> x_adv, report.

    x_adv is x where nothing was found. report is a dict:
      clean      (N,) int64: the class of x, -1 for NaN
      robust     (N,) bool: right on x, and never fooled
      fooled_by  [N]: the name of the first attack that fooled the image, or None: no attack did, or x
                 was wrong already
      forwards   (N,) int64: forward passes spent on the image
      warnings   [str], each "reason: sentence"

    attacks: some of STANDARD, or one name. ValueError as `check_arguments` and `check_labels`, and for
    an unknown attack.
    """
    check_arguments(model, x, y, eps, steps=steps, queries=queries, verify=verify)
    index = image_numbers(index, x)
    attacks = [attacks] if isinstance(attacks, str) else list(attacks)
    for name in attacks:
        if name not in STANDARD:
            raise ValueError(f"attack {name} is unknown; use some of {', '.join(STANDARD)}")
    attacks = [name for name in STANDARD if name in attacks]

    # The clean images: which are right, which classes are next, and whether attacks can see the model
    def objective(logits):
        return cross_entropy(logits, y)

    judge = verify or model
    logits = forward(judge, x)
    check_labels(logits, y)
    clean = predict(logits)
    robust = clean == y
    warnings = not_logits(logits)
    warnings += random_logits(logits, forward(judge, x))  # twice the judge: model may be less precise
    forwards = torch.full_like(y, 2)
    if any(name != "square" for name in attacks):  # Square's model may have no gradient
        _, grad = search_gradient(model, x, objective)
        warnings += zero_gradients(grad[robust])
        forwards += 1
    n_classes = logits.shape[1]
    n_targets = min(9, n_classes - 1)  # AA
    targets = without_label(logits, y).topk(n_targets).indices
    targeted_loss = targeted_dlr
    if n_classes < 4 and "apgd-t" in attacks:
        targeted_loss = targeted_cross_entropy
        warnings.append(f"few classes: targeted DLR needs 4, the model has {n_classes}; "
                        "apgd-t ran targeted cross-entropy")

    x_adv = x.clone()
    fooled_by = [None] * len(y)
    for name in attacks:
        n_attempts = n_targets if name.endswith("-t") else 1  # -t is for targeted
        for attempt in range(n_attempts):
            rows = robust.nonzero().squeeze(1)

            # All attempts are reported as one long search
            def tell(_, step, n_steps, n_undecided):
                if progress is not None:
                    progress(name, attempt * n_steps + step, n_attempts * n_steps, n_undecided)

            common = dict(x=x[rows], y=y[rows], eps=eps, verify=verify, progress=tell)
            draws = dict(index=index[rows], seed=seed)
            if name == "apgd-ce":
                found = apgd(model, steps=steps, **draws, **common)
            elif name == "apgd-t":  # restart 0 is apgd-ce's
                found = apgd(model, steps=steps, target=targets[rows, attempt], loss=targeted_loss,
                             restart=1 + attempt, **draws, **common)
            elif name == "fab-t":
                found = fab(model, steps=steps, target=targets[rows, attempt], **common)
            else:
                found = square(model, queries=queries, **draws, **common)
            x_found, fooled, n_forwards = found
            x_adv[rows] = x_found
            forwards[rows] += n_forwards
            robust[rows] = ~fooled
            for row in rows[fooled].tolist():
                fooled_by[row] = name

    warnings += masked_gradients(len(y), {name: fooled_by.count(name) for name in attacks})
    report = dict(clean=clean, robust=robust, fooled_by=fooled_by, forwards=forwards, warnings=warnings)
    return x_adv, report
