"""
The adversary: L-infinity attacks as pure functions on pixels.

`model` is any callable from images (N, 3, H, W) in [0, 1] to logits (N, K); nothing here knows more.
No attack switches its mode or asks for a gradient of its weights; none but `pgd` without `noise` touches
the global random state.

>>> x_adv = pgd(net.eval(), x, y, eps=8 / 255, step_size=2 / 255, steps=50)
>>> x_adv, report = autoattack(net.eval(), x, y, eps=8 / 255, index=torch.arange(len(x)))

Keys: PGD is Madry et al. 2018 (arXiv:1706.06083), SAT is arXiv:2006.14536, AA is Croce & Hein 2020
(arXiv:2003.01690), FAB is Croce & Hein 2020b (arXiv:1907.02044), SQ is Andriushchenko et al. 2020
(arXiv:1912.00049).
"""
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

STANDARD = "apgd-ce", "apgd-t", "fab-t", "square"  # AutoAttack is these, in this order
START, APGD, SQUARE = 0, 1, 2  # first words of the counters of their random numbers


# Randomness belongs to the image, not to the batch

def mix(z):
    """SplitMix64's finalizer (Steele et al. 2014) on int64, in place: a bijection, all bits matter."""
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
    key = mix(torch.full_like(index, seed))  # alone: else seed 1 is seed 0, three images further on
    for word in (index, *(counter if isinstance(counter, tuple) else (counter,))):
        key = mix(key * 3 + word + 1)
    z = torch.arange(1, torch.Size(shape).numel() + 1, device=index.device)
    z = z * -0x61C8864680B583EB + key[:, None]  # SplitMix64: the golden gamma, one stream an image
    return ((mix(z) >> 40) & 0xFFFFFF).float().mul_(2.0**-24).view(-1, *shape)


# What every attack needs: sane arguments, the box and the ball, a slope

def check_arguments(model, x, y):
    """ValueError for what makes any attack look weak: train mode, pixels outside [0, 1], odd labels."""
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise ValueError("the model is in train mode: images change each other; call model.eval()")
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


def input_gradient(model, x, loss, loss_scale=1.0):
    """Logits (N, K) in float32, and the slope of `loss(logits)`, (N,), in each image's pixels, as x.

    loss_scale keeps float16 from underflowing on the way back; the slope returned is without it.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x).float()
        loss = loss_scale * loss(logits).sum()
        grad, = torch.autograd.grad(loss, x)  # nothing else: none may reach a weight
    return logits.detach(), (grad / loss_scale).nan_to_num_(0, 0, 0)  # not finite points nowhere


# PGD

def pgd(model, x, y, eps, step_size, steps, noise=None, loss_scale=1.0, check=True):
    """Projected gradient ascent on the cross-entropy (SAT Sec. 3.1) -> x_adv, the last iterate, as x.

    eps, step_size: fractions of [0, 1]. noise: the start's offset, as x; None for a fresh uniform one.
    loss_scale keeps float16 gradients from underflowing, signs stay. ValueError as `check_arguments`.
    """
    if check:
        check_arguments(model, x, y)
    x = x.detach()
    lower, upper = ball(x, eps)
    if noise is None:
        noise = torch.empty_like(x).uniform_(-eps, eps)
    x_adv = torch.clamp(x + noise, lower, upper)  # Differs from SAT: its start may leave [0, 1]

    def loss(logits):
        if check:
            check_labels(logits, y)
        return F.cross_entropy(logits, y, reduction="none")

    for _ in range(steps):
        _, grad = input_gradient(model, x_adv, loss, loss_scale)
        x_adv = torch.clamp(x_adv + step_size * grad.sign(), lower, upper)
    return x_adv


# What AutoAttack's three searches share: who is still in the fight, who has fallen, what it cost

def predict(logits):
    """Logits (N, K) -> the class of each row; -1, no class, where a logit is NaN."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def image(value):
    """One number an image -> (N, 1, 1, 1), to meet pixels."""
    return value[:, None, None, None]


class Undecided(SimpleNamespace):
    """The images a search still works on: every attribute is a tensor with a row for each of them."""

    def keep(self, stay):
        vars(self).update({name: rows[stay] for name, rows in vars(self).items()})


class Found:
    """What a search has found and spent, a row an image: x_adv (x where nothing), fooled, forwards.

    `verify` has the last word: the search may run in bfloat16, where a margin near zero means nothing.
    """

    def __init__(self, verify, x, y):
        self.verify, self.x_adv = verify, x.clone()
        self.fooled, self.forwards = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y)

    def settle(self, s, x_adv, claimed):
        """Those of `claimed`, (n,) bool, that `verify` too gets wrong leave `s`; the rest go on."""
        claimed = claimed.nonzero().squeeze(1)  # the only wait for the device in a step
        if len(claimed):
            self.forwards[s.row[claimed]] += 1
            won = claimed[predict(self.verify(x_adv[claimed])) != s.y[claimed]]
            self.x_adv[s.row[won]], self.fooled[s.row[won]] = x_adv[won], True
            stay = torch.ones_like(s.y, dtype=torch.bool)
            stay[won] = False
            s.keep(stay)


def silent(*where):
    """The progress callback of someone who does not want to know; one that raises stops the search."""


# PGD on a stream: the work queue

def pgd_queue(model, batches, slots, eps, step_size, steps, restarts=1, seed=0, exact=None,
              last_iterate=False, loss_scale=1.0, tick=lambda: None):
    """PGD on a stream of (index, x, y) batches; yields a ledger line, a dict, as an image is decided.

    A step is one forward and one input gradient on all slots, each at its own step of its own image.
    The forward's logits say whether its iterate fools: then the image leaves and the next moves in, so
    the batch stays full and no work goes to decided images. Steps count gradients, 0 is the start.
    exact: the float32 model, asked before an image is called fooled. tick: called at every step.
    With last_iterate nothing leaves early; "verdicts" has a 1 for each iterate that does not fool.
    """
    source, more, n_busy, s = iter(batches), True, 0, None
    waiting = None  # index, x, y, clean prediction of the images that have no slot yet
    while True:
        # Read until every free slot can be filled; what the model gets wrong by itself is decided
        while more and (waiting is None or len(waiting[0]) < slots - n_busy):
            batch = next(source, None)
            if batch is None:
                more = False
                break
            tick()
            index, x, y = batch
            with torch.no_grad():
                clean = predict((exact or model)(x))
            attacked = (clean == y) | last_iterate
            for i, label, guess in torch.stack((index, y, clean), 1)[~attacked].tolist():
                yield {"index": i, "label": label, "clean": guess, "fell": None, "forwards": 1}
            arrived = [rows[attacked] for rows in (index, x, y, clean)]
            waiting = arrived if waiting is None else [torch.cat(pair) for pair in zip(waiting, arrived)]
        if s is None:
            if waiting is None or len(waiting[0]) == 0:
                return
            slots = min(slots, len(waiting[0]))
            x, zero = waiting[1][:slots], torch.zeros_like(waiting[0][:slots])
            s = Undecided(
                index=zero.clone(), x=x.clone(), y=zero.clone(), clean=zero.clone(), lower=x.clone(),
                upper=x.clone(), x_adv=x.clone(), step=zero.clone(), restart=zero.clone(),
                forwards=zero.clone(), busy=zero.bool(), robust=zero.bool().repeat(steps + 1, 1).T)

        # Move in, and when nothing is left to, shrink by halves: each new shape costs a compiled graph
        k = min(slots - n_busy, len(waiting[0]))
        if k:
            free = (~s.busy).nonzero().flatten()[:k]
            s.index[free], s.x[free], s.y[free], s.clean[free] = (rows[:k] for rows in waiting)
            waiting = [rows[k:] for rows in waiting]
            s.lower[free], s.upper[free] = ball(s.x[free], eps)
            s.busy[free], s.restart[free], s.step[free], s.forwards[free] = True, 0, -1, 1
            n_busy += k
        if n_busy == 0:
            return
        while n_busy <= slots // 2:
            slots //= 2
            s.keep(s.busy.long().argsort(descending=True, stable=True)[:slots])

        # A random start, a function of (seed, index, restart), then one step
        tick()
        new = (s.step < 0).nonzero().flatten()
        if len(new):
            noise = (2 * uniform(seed, s.index[new], (START, s.restart[new]), x.shape[1:]) - 1) * eps
            s.x_adv[new] = torch.clamp(s.x[new] + noise, s.lower[new], s.upper[new])
            s.step[new] = 0
        if bool((s.busy & (s.step < steps)).any()):
            logits, grad = input_gradient(model, s.x_adv, lambda z: cross_entropy(z, s.y), loss_scale)
        else:
            with torch.no_grad():
                logits, grad = model(s.x_adv), torch.zeros_like(s.x_adv)
        s.forwards += s.busy
        fooled = (predict(logits) != s.y) & s.busy
        doubt = fooled.nonzero().flatten() if exact else ()
        if len(doubt):
            with torch.no_grad():
                fooled[doubt] = predict(exact(s.x_adv[doubt])) != s.y[doubt]
            s.forwards[doubt] += 1

        # Leave, begin again, or go on
        at_end = s.busy & (s.step >= steps)
        if last_iterate:
            s.robust.scatter_(1, s.step.clamp(max=steps)[:, None], ~fooled[:, None])
        leaves = at_end if last_iterate else (fooled | at_end & (s.restart + 1 >= restarts))
        gone = leaves.nonzero().flatten()
        facts = torch.stack((s.index, s.y, s.clean, s.forwards, s.restart, s.step, fooled), 1)[gone]
        for (i, label, guess, forwards, *fell), robust in zip(facts.tolist(), s.robust[gone].tolist()):
            verdict = {"fell": fell[:2] if fell[2] else None}
            if last_iterate:
                verdict = {"verdicts": "".join("01"[r] for r in robust)}
            yield {"index": i, "label": label, "clean": guess, **verdict, "forwards": forwards}
        s.busy &= ~leaves
        n_busy -= len(gone)
        s.x_adv = torch.clamp(s.x_adv + step_size * grad.sign(), s.lower, s.upper)
        s.step += 1
        again = at_end & ~leaves
        s.restart += again
        s.step = torch.where(again, -1, s.step)


# APGD

def margin(logits, y, target=None):
    """How far the target, by default the best wrong class, is above the label -> (N,)."""
    if target is None:
        wrong = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    else:
        wrong = logits.gather(1, target[:, None])[:, 0]
    return wrong - logits.gather(1, y[:, None])[:, 0]


def cross_entropy(logits, y, target=None):
    """The loss of APGD-CE -> (N,); with a target, towards it."""
    return F.cross_entropy(logits, y, reduction="none") if target is None else \
        -F.cross_entropy(logits, target, reduction="none")


def targeted_dlr(logits, y, target):
    """The targeted difference of logits ratio (AA) -> (N,): no scale or shift of the logits matters."""
    first, _, third, fourth = logits.topk(4).values.unbind(1)
    return margin(logits, y, target) / (first - (third + fourth) / 2 + 1e-12)


def checkpoints(steps):
    """The steps after which APGD may halve its step size (AA): 22, 41, 57, 70, 80, 87, 93, 99%."""
    percent = width = 22
    while percent < 100:
        yield -(-percent * steps // 100)  # rounded up
        width = max(width - 3, 6)
        percent += width


@torch.no_grad()
def apgd(model, x, y, eps, index, seed=0, target=None, loss=cross_entropy, run=0, steps=100, rho=0.75,
         verify=None, progress=silent, loss_scale=1.0):
    """Auto-PGD (AA Alg. 1) -> x_adv (x where it found nothing), fooled (N,) bool, forwards (N,) int64.

    Climbs `loss(logits, y, target)`, target (N,) int64 or None. `run` numbers the random starts.
    """
    found = Found(verify or model, x, y)
    lower, upper = ball(x, eps)
    t = uniform(seed, index, (APGD, run), x.shape[1:]) * 2 - 1
    start = torch.clamp(x + eps * t / t.abs().amax((1, 2, 3), keepdim=True), lower, upper)
    worst = torch.full_like(x[:, 0, 0, 0], -torch.inf)
    s = Undecided(
        row=torch.arange(len(x), device=x.device), y=y, target=y if target is None else target,
        lower=lower, upper=upper, x_adv=start, x_before=start, loss=-worst,
        x_best=start, grad_best=torch.zeros_like(x), loss_best=worst, loss_checked=worst,
        step_size=torch.full_like(worst, 2 * eps), halved=torch.ones_like(y, dtype=torch.bool),
        n_up=torch.zeros_like(y))
    objective = lambda logits: loss(logits, s.y, None if target is None else s.target)
    checks, last_check = set(checkpoints(steps)), 0
    for step in range(steps + 1):
        progress(step, len(s.y))
        logits, s.grad = input_gradient(model, s.x_adv, objective, loss_scale)
        found.forwards[s.row] += 1
        loss_before, s.loss = s.loss, objective(logits).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        s.n_up = s.n_up + (s.loss > loss_before)
        found.settle(s, s.x_adv, predict(logits) != s.y)
        if step == steps or len(s.y) == 0:
            break

        # The best iterate so far
        better = s.loss > s.loss_best
        s.loss_best = torch.where(better, s.loss, s.loss_best)
        s.x_best = torch.where(image(better), s.x_adv, s.x_best)
        s.grad_best = torch.where(image(better), s.grad, s.grad_best)

        # Too few steps went up, or the best has stood still: back to it, with half the step
        if step in checks:
            few = s.n_up < rho * (step - last_check)  # AA Condition 1
            stuck = ~s.halved & (s.loss_best == s.loss_checked)  # AA Condition 2
            s.halved, s.loss_checked, s.n_up = few | stuck, s.loss_best, torch.zeros_like(s.n_up)
            s.step_size = torch.where(s.halved, s.step_size / 2, s.step_size)
            s.x_adv = torch.where(image(s.halved), s.x_best, s.x_adv)
            s.grad = torch.where(image(s.halved), s.grad_best, s.grad)
            s.loss = torch.where(s.halved, s.loss_best, s.loss)
            last_check = step

        # A gradient step, then momentum
        z = torch.clamp(s.x_adv + image(s.step_size) * s.grad.sign(), s.lower, s.upper)
        a = 0.75 if step else 1.0
        z = s.x_adv + a * (z - s.x_adv) + (1 - a) * (s.x_adv - s.x_before)
        s.x_before, s.x_adv = s.x_adv, torch.clamp(z, s.lower, s.upper)
    return found.x_adv, found.fooled, found.forwards


# FAB

def to_hyperplane(x, w, gap, iterations=6):
    """The smallest L-inf step (n, C, H, W) inside the box that moves <w, x> by gap, (n,) (FAB).

    Every pixel moves by `reach` or until it meets the box, so <w, step> is concave in the reach: Newton
    finds it from below without sorting pixels. A plane that misses the box: into the nearest corner.
    """
    gap = gap.nan_to_num(0, 0, 0)  # logits without a difference name no plane
    direction = w.sign() * image(gap.sign())
    room, w = torch.where(direction > 0, 1 - x, x), w.abs()
    reach = torch.zeros_like(gap)
    for _ in range(iterations):
        moved = torch.minimum(room, image(reach))
        missing = gap.abs() - (w * moved).sum((1, 2, 3))
        slope = (w * (room > image(reach))).sum((1, 2, 3))
        reach = torch.where(slope > 0, reach + missing.clamp(min=0) / slope, reach).clamp(max=1)
    return direction * torch.minimum(room, image(reach))


@torch.no_grad()
def fab(model, x, y, eps, target, steps=100, alpha_max=0.1, eta=1.05, beta=0.9, verify=None,
        progress=silent, loss_scale=1.0):
    """Targeted Fast Adaptive Boundary attack (FAB Alg. 1) -> x_adv, fooled, forwards, as `apgd`.

    It looks for the nearest point of class `target`, (N,) int64, from x on; within eps of x it is done.
    """
    found = Found(verify or model, x, y)
    lower, upper = ball(x, eps)
    s = Undecided(row=torch.arange(len(x), device=x.device), x=x, y=y, target=target, lower=lower,
                  upper=upper, x_adv=x)
    for step in range(steps):
        progress(step, len(s.y))
        logits, w = input_gradient(
            model, s.x_adv, lambda logits: margin(logits, s.y, s.target), loss_scale)
        gap = -margin(logits, s.y, s.target)  # the boundary is where <w, .> is higher by this

        # Overstep the boundary seen from x_adv, with a bias towards the same boundary seen from x
        d_adv = to_hyperplane(s.x_adv, w, gap)
        d = to_hyperplane(s.x, w, gap + (w * (s.x_adv - s.x)).sum((1, 2, 3)))
        size_adv, size = (move.abs().amax((1, 2, 3)).clamp(min=1e-8) for move in (d_adv, d))
        alpha = image((size_adv / (size_adv + size)).clamp(max=alpha_max))
        s.x_adv = torch.clamp((1 - alpha) * (s.x_adv + eta * d_adv) + alpha * (s.x + eta * d), 0, 1)

        s.wrong = predict(model(s.x_adv).float()) != s.y
        found.forwards[s.row] += 2
        near = (s.x_adv - s.x).abs().amax((1, 2, 3)) < eps + 1e-6  # a hair for rounding: it is clamped
        found.settle(s, torch.clamp(s.x_adv, s.lower, s.upper), s.wrong & near)
        if len(s.y) == 0:
            break
        s.x_adv = torch.where(image(s.wrong), s.x + beta * (s.x_adv - s.x), s.x_adv)  # back towards x
    return found.x_adv, found.fooled, found.forwards


# Square

@torch.no_grad()
def square(model, x, y, eps, index, seed=0, queries=5000, p=0.8, verify=None, progress=silent):
    """Square Attack (SQ Alg. 1 and 2), no gradient at all -> x_adv, fooled, forwards, as `apgd`.

    Every pixel is always at an end of its range, so a square of ± 2 eps, clamped, is a square of ends.
    """
    found = Found(verify or model, x, y)
    lower, upper = ball(x, eps)
    C, H, W = x.shape[1:]
    stripes = uniform(seed, index, (SQUARE, 0), (C, 1, W)) < 0.5
    s = Undecided(row=torch.arange(len(x), device=x.device), y=y, index=index, lower=lower, upper=upper,
                  x_adv=torch.where(stripes, lower, upper), x_best=x,
                  best=torch.full_like(x[:, 0, 0, 0], -torch.inf))
    rows, columns = (torch.arange(n, device=x.device) for n in (H, W))
    for query in range(queries + 1):  # the stripes, then squares
        progress(query, len(s.y))
        logits = model(s.x_adv).float()
        found.forwards[s.row] += 1
        climbed = margin(logits, s.y).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        better = climbed > s.best
        s.best = torch.where(better, climbed, s.best)
        s.x_best = torch.where(image(better), s.x_adv, s.x_best)
        found.settle(s, s.x_adv, predict(logits) != s.y)
        if query == queries or len(s.y) == 0:
            break

        # The next square: never rescaled to the number of queries, as in AutoAttack
        area = p / 2 ** sum(query >= n for n in (10, 50, 200, 500, 1000, 2000, 4000))
        side = min(max(round((area * H * W) ** 0.5), 1), H, W)
        if query % 100 == 0:
            s.draws = uniform(seed, s.index, (SQUARE, 1 + query // 100), (100, 2 + C))
        draw = s.draws[:, query % 100]
        row = rows - (draw[:, :1] * (H - side + 1)).long()  # (n, H), 0 at the square's top
        column = columns - (draw[:, 1:2] * (W - side + 1)).long()  # (n, W)
        row, column = (row >= 0) & (row < side), (column >= 0) & (column < side)
        ends = torch.where(draw[:, 2:, None, None] < 0.5, s.lower, s.upper)
        s.x_adv = torch.where(row[:, None, :, None] & column[:, None, None, :], ends, s.x_best)
    return found.x_adv, found.fooled, found.forwards


# AutoAttack

def blind_spots(logits, again, grad):
    """What blinds an attack, from the logits (N, K), those of a second call, and the slope -> strs."""
    finite = logits.isfinite().all(1)
    first, again = logits[finite], again[finite]
    if not finite.all():
        yield (f"not finite: {(~finite).sum()} of {len(finite)} clean images have NaN or infinite "
               "logits; NaN counts as wrong")
    drift = (again - first).abs().amax(1) / first.abs().amax(1).clamp(min=1e-12)
    if (drift > 1e-4).any():
        yield (f"random logits: they change by up to {drift.max():.1%} between two calls on one image; "
               "gradients need averaging over calls, and a verdict is one draw")
    if len(first) and first.min() >= 0 and first.max() <= 1 and (first.sum(1) - 1).abs().max() < 1e-4:
        yield ("probabilities: every row of the output is in [0, 1] and sums to 1; "
               "the attacks need logits, what comes before softmax")
    zero = (grad == 0).float().mean() if len(grad) else 0
    if zero > 0.05:
        yield (f"zero gradients: {zero:.1%} of the input gradient is exactly 0 (saturated, rounded or "
               "underflowing); PGD and APGD-CE see nothing there")


def doubts(n, fooled):
    """What the counts say against a result on n images: {attack: how many only it fooled} -> [str].

    A search without gradients that beats those with them has found a masked gradient.
    """
    gradient = [name for name in STANDARD[:3] if name in fooled]
    if gradient and fooled.get("square", 0) > 0.002 * n:  # the share is the one AA's authors warn at
        return [f"masked gradients: Square fooled {fooled['square']} of {n} images that "
                f"{', '.join(gradient)} did not; the true robustness is lower, attack it adaptively"]
    return []


@torch.no_grad()
def autoattack(model, x, y, eps, index, seed=0, verify=None, attacks=STANDARD, progress=silent,
               steps=100, queries=5000, loss_scale=1.0):
    """The attacks in AA's order, each on the images that none has fooled yet -> x_adv, report.

    x_adv is x where nothing was found. report: clean (N,) int64, the class of x, -1 where a logit is
    NaN; fooled_by [N], a name or None; forwards (N,) int64, all that the image cost; attacks {"clean"
    or name: {"seconds", "forwards", "fooled"}}; warnings [str], each "reason: sentence". `verify` is
    the float32 model where `model` runs lower. `progress(name, step, steps, n_undecided)` comes at
    every step and may raise. ValueError as `check_arguments`, and for an attack that does not exist.
    """
    verify, index, x_adv = verify or model, index.to(x.device), x.clone()
    check_arguments(model, x, y)
    check_arguments(verify, x, y)
    if not set(attacks) <= set(STANDARD):
        raise ValueError(f"attacks are {', '.join(attacks)}; there are {', '.join(STANDARD)}")
    forwards, fooled_by, spent, warnings = torch.zeros_like(y), [None] * len(y), {}, []
    report = dict(clean=y, forwards=forwards, fooled_by=fooled_by, attacks=spent, warnings=warnings)
    if len(y) == 0:
        return x_adv, report

    # The clean images: who is right, which classes are next, and whether attacks can see the model
    began = time.perf_counter()
    logits = verify(x).float()
    check_labels(logits, y)
    report["clean"] = predict(logits)
    robust = report["clean"] == y
    again, grad = input_gradient(model, x, lambda logits: cross_entropy(logits, y), loss_scale)
    if verify is not model:
        again = verify(x).float()
    warnings += blind_spots(logits, again, grad[robust])
    forwards += 2 if verify is model else 3
    n_classes = logits.shape[1]
    targets = logits.scatter(1, y[:, None], -torch.inf).topk(min(9, n_classes - 1)).indices
    spent["clean"] = dict(seconds=time.perf_counter() - began, forwards=int(forwards.sum()),
                          fooled=int((~robust).sum()))

    loss = targeted_dlr if n_classes > 3 else cross_entropy
    n_runs = {"apgd-ce": 1, "apgd-t": targets.shape[1], "fab-t": targets.shape[1], "square": 1}
    if "apgd-t" in attacks and n_classes == 3:
        warnings.append("few classes: targeted DLR needs 4, the model has 3; apgd-t ran targeted "
                        "cross-entropy")
    if "apgd-t" in attacks and n_classes < 3:
        n_runs["apgd-t"] = 0
        warnings.append(f"few classes: apgd-t skipped, with {n_classes} it would only repeat apgd-ce")

    for name in (name for name in STANDARD if name in attacks):
        began, cost = time.perf_counter(), int(forwards.sum())
        for run in range(n_runs[name]):
            rows = robust.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            total = queries if name == "square" else steps
            shared = dict(verify=verify, progress=lambda step, n: progress(
                name, run * total + step, n_runs[name] * total, n))
            slopes = dict(steps=steps, loss_scale=loss_scale, **shared)
            images, target = (model, x[rows], y[rows], eps), targets[rows, run]
            if name == "apgd-ce":
                found = apgd(*images, index[rows], seed, **slopes)
            elif name == "apgd-t":
                found = apgd(*images, index[rows], seed, target, loss, 1 + run, **slopes)
            elif name == "fab-t":
                found = fab(*images, target, **slopes)
            else:
                found = square(*images, index[rows], seed, queries, **shared)
            x_adv[rows], fooled, calls = found
            forwards[rows] += calls
            robust[rows] = ~fooled
            for row in rows[fooled].tolist():
                fooled_by[row] = name
        spent[name] = dict(seconds=time.perf_counter() - began, forwards=int(forwards.sum()) - cost,
                           fooled=fooled_by.count(name))
    warnings += doubts(len(y), {name: spent[name]["fooled"] for name in spent})
    return x_adv, report
