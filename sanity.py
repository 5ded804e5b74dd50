"""
Doubt a robustness number, and draw what there is to see (SAT, arXiv:2006.14536).

$ python sanity.py report --out out  # every doubt of Sec. 6, a verdict each; exit code 1 on a FAIL
$ python sanity.py landscape --out out/silu --against out/relu  # the loss around images, Fig. 5
$ python sanity.py gallery --out out  # images before and after the attack
$ python sanity.py activations  # the curves, and what they cost, Figs. 1 and 2
$ python sanity.py curves out/relu out/silu  # runs over their epochs
$ python sanity.py scatter results/*.json  # reports of evaluate.py beside SAT's, Figs. 3 and 4
$ python sanity.py cost --data shapes  # what the attack and each activation cost here
The first three take evaluate.py's flags too, the last train.py's. SAT is the paper, numbered as there.
"""
import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import evaluate
import train
from activations import ACTIVATIONS, make_act
from attacks import START, autoattack, cross_entropy, input_gradient, pgd, pgd_queue, uniform
from evaluate import PAPER, PGD, progress, say, wilson
from models import attacker_view, in_precision

# Drawing: one figure, one way to draw an axis

FINE = 4  # shapes are drawn this many times finer, then averaged; text comes last, at the final size
INK, FAINT = (30, 30, 30), (224, 224, 224)
# Okabe and Ito's colours without the yellow, for all eyes; dashes tell them apart in grey
COLOURS = "#000000", "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#E69F00", "#CC79A7"
DASHES = (9999, 1), (7, 5), (10, 4, 2, 4), (2, 3)
VIRIDIS = (68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)


class Figure:
    """A white picture, `scale` pixels a unit; (0, 0) is its upper left corner."""

    def __init__(self, width, height, scale):
        self.scale, self.fine, self.words = scale, scale * FINE, []
        self.image = Image.new("RGB", [round(size * scale) * FINE for size in (width, height)], "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points, colour=INK, width=1.0, style=0):
        points, dash = np.asarray(points) * self.fine, np.array(DASHES[style % 4]) * self.fine
        along = np.r_[0, np.hypot(*np.diff(points, axis=0).T).cumsum()]
        ends = np.r_[0, np.tile(dash, int(along[-1] / dash.sum()) + 1).cumsum()].clip(max=along[-1])
        for a, b in zip(ends[::2], ends[1::2]):
            at = np.r_[a, along[(a < along) & (along < b)], b]
            piece = np.stack([np.interp(at, along, p) for p in points.T], axis=1)
            self.pen.line(piece.ravel().tolist(), colour, round(width * self.fine), joint="curve")

    def disc(self, x, y, radius, fill, edge=None):
        corners = np.array([x - radius, y - radius, x + radius, y + radius]) * self.fine
        self.pen.ellipse(corners.tolist(), fill, edge, round(1.5 * self.fine))

    def paste(self, pixels, left, top, width, height):
        left, top, width, height = (round(k * self.fine) for k in (left, top, width, height))
        self.image.paste(Image.fromarray(pixels).resize((width, height), Image.NEAREST), (left, top))

    def text(self, x, y, words, anchor="ms", size=12, colour=INK):
        self.words.append(((x * self.scale, y * self.scale), words, anchor, size * self.scale, colour))

    def save(self, path):
        image = self.image.reduce(FINE)
        for at, words, anchor, size, colour in self.words:
            ImageDraw.Draw(image).text(at, words, colour, ImageFont.load_default(size), anchor)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        say(path)


def ticks(lo, hi, most):
    """Round numbers from lo to hi, about `most`: multiples of 1, 2 or 5 times a power of ten."""
    unit = 10 ** np.floor(np.log10((hi - lo) / most))
    unit *= next(k for k in (1, 2, 5, 10) if (hi - lo) / (k * unit) <= most)
    return (np.arange(np.ceil(lo / unit - 1e-9), np.floor(hi / unit + 1e-9) + 1) * unit).round(12) + 0.0


def axis(fig, start, end, lo, hi, label, out, grid=0):
    """A line from start to end that counts from lo to hi; `out`: a unit vector, away from the data."""
    start, end, out = np.array(start), np.array(end), np.array(out)
    upright = abs(out[0]) == 1
    anchor = "rml"[1 + int(np.sign(out[0]))] + ("m" if upright else "a")
    for mark in ticks(lo, hi, np.hypot(*(end - start)) / (32 if upright else 48)):
        at = start + (mark - lo) / (hi - lo) * (end - start)
        fig.line([at - grid * out, at], FAINT)
        fig.line([at, at + 4 * out])
        fig.text(*(at + 7 * out), f"{mark:.6g}", anchor)
    fig.line([start, end])
    middle = (start + end) / 2 + (24 if out[0] == 0 else 36) * out
    fig.text(*(end - (0, 9) if upright else middle), label, "ms" if upright else anchor)


def axes(fig, box, xs, ys, xlabel, ylabel, title="", room=0.0, grid=True):
    """Two axes around box = (left, top, right, bottom), with room -> place(x, y), data to figure."""
    left, top, right, bottom = box
    xs, ys = (np.array([-room, room]) * (np.ptp(v) or 10) + [np.min(v), np.max(v)] for v in (xs, ys))
    fig.text((left + right) / 2, top - 28, title, "ms", 13)
    axis(fig, (left, bottom), (right, bottom), *xs, xlabel, (0, 1), grid * (bottom - top))
    axis(fig, (left, bottom), (left, top), *ys, ylabel, (-1, 0), grid * (right - left))
    return lambda x, y: np.stack([np.interp(x, xs, (left, right)), np.interp(y, ys, (bottom, top))], -1)


def plots(args, path, names, columns, panels):
    """Panels (title, xlabel, ylabel, lines) in rows; lines (x, y), one a name, with dots if short."""
    fig = Figure(340 * columns + 240, 340 * (len(panels) // columns) + 20, args.scale)
    for p, (title, xlabel, ylabel, lines) in enumerate(panels):
        left, top = 60 + 340 * (p % columns), 60 + 340 * (p // columns)
        xs, ys = (np.concatenate([line[k] for line in lines]) for k in (0, 1))
        place = axes(fig, (left, top, left + 270, top + 240), xs, ys, xlabel, ylabel, title, 0.05)
        for i, (x, y) in enumerate(lines):
            fig.line(place(x, y), COLOURS[i % 7], 2, i)
            for point in place(x, y) if len(x) < 40 else ():
                fig.disc(*point, 3, COLOURS[i % 7])
    for i, name in enumerate(names):  # beside the axes, never on the data
        x, y = 340 * columns + 30, 70 + 20 * i
        fig.line([(x, y), (x + 34, y)], COLOURS[i % 7], 2, i)
        fig.text(x + 42, y, name, "lm")
    fig.save(args.png or path)


def viridis(v):
    """Numbers (...) in [0, 1] -> (..., 3) uint8 colours whose lightness rises evenly."""
    return np.stack([np.interp(v, np.linspace(0, 1, 5), c) for c in zip(*VIRIDIS)], -1).astype(np.uint8)


def heat_map(fig, box, z, lo, hi):
    """z (n, n), first index to the right, second up, in colours from lo to hi, with contour lines."""
    left, top, right, bottom = box
    n, size = len(z) - 0.5, [round(k * fig.fine) for k in (right - left, bottom - top)]
    field = np.asarray(Image.fromarray(z.T[::-1].copy()).resize(size, Image.BILINEAR, (0.5, 0.5, n, n)))
    pixels, slope = viridis((field - lo) / (hi - lo)), np.hypot(*np.gradient(field))
    for level in ticks(lo, hi, (bottom - top) / 32):  # a line is what is within half its width
        pixels[np.abs(field - level) < slope * fig.fine / 2] = 255 if level < (lo + hi) / 2 else 0
    fig.paste(pixels, left, top, right - left, bottom - top)


def surface_3d(fig, x, y, size, z, lo, hi, unit, labels):
    """z (n, n) as a shaded surface, farthest patch first; (x, y) is the middle of its floor."""
    def place(a, b, c):  # a and b from -1 to 1, c from 0 to 1
        across, depth = 0.75 * a - 0.66 * b, 0.66 * a + 0.75 * b
        return np.stack([x + size * across, y - size * (0.42 * depth + 1.1 * c)], -1)
    n, c = len(z) - 1, (z - lo) / (hi - lo)
    points = place(np.linspace(-1, 1, n + 1)[:, None], np.linspace(-1, 1, n + 1), c) * fig.fine
    slope_a, slope_b = np.gradient(c, 2 / n)
    light = (0.45 * slope_a - 0.25 * slope_b + 0.85) / np.sqrt(1 + slope_a**2 + slope_b**2)
    colours = (viridis(c) * (0.55 + 0.45 * light.clip(0, 1))[..., None]).astype(int)
    for i, j in np.argwhere(np.ones((n, n)))[::-1]:
        patch = points[[i, i + 1, i + 1, i], [j, j, j + 1, j + 1]].ravel().tolist()
        fig.pen.polygon(patch, tuple(colours[i, j]), tuple(colours[i, j] * 9 // 10))
    axis(fig, place(-1, -1, 0), place(1, -1, 0), -unit, unit, labels[0], (0.45, 0.89))
    axis(fig, place(-1, -1, 0), place(-1, 1, 0), -unit, unit, labels[1], (-0.45, 0.89))
    axis(fig, place(-1, 1, 0), place(-1, 1, 1), lo, hi, labels[2], (-1, 0))


def derivatives(act, x):
    """The curve at x (n,) float64, its slope and its curvature, by autograd -> (3, n)."""
    y = act.double()(x := x.clone().requires_grad_())
    slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
    curvature = torch.autograd.grad(slope.sum(), x)[0] if slope.requires_grad else torch.zeros_like(x)
    return torch.stack([y, slope, curvature]).detach()


def act_cost(act, x):
    """Seconds forward and backward; bytes that an element of x costs in memory between the two."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), kept.get):
        act(x)
    saved, began = sum(t.nbytes for t in kept.values()) / x.numel(), train.clock(x.device, True)
    y, middle = act(x), train.clock(x.device, True)
    torch.autograd.grad(y, [x, *act.parameters()], x)
    return middle - began, train.clock(x.device, True) - middle, saved


def activations(args):
    torch.set_num_threads(1)  # threads that wait for each other would hide what a curve costs
    device, _, _ = evaluate.open_device("auto")
    x = torch.randn(2**17 if device.type == "cpu" else 2**24, device=device, requires_grad=True)
    acts = [make_act(name).to(device) for name in ACTIVATIONS]
    costs = np.median([[act_cost(act, x) for act in acts] for _ in range(103)][2:], axis=0)  # 2 warm up
    say(f"{f'on {device}':<11}class  jump of f'(0)  largest f''  saved bytes fwd/ReLU  bwd/ReLU")
    around = torch.cat([torch.tensor([-1e-9, 1e-9]), torch.linspace(-6, 6, 12001)]).double()
    for name, (forward, backward, saved) in zip(ACTIVATIONS, costs / (*costs[0, :2], 1)):
        _, slope, curvature = derivatives(make_act(name), around)
        jump, kink = slope[1] - slope[0], curvature[1] - curvature[0]
        kind = "C0" if jump.abs() > 1e-3 else "C1" if kink.abs() > 1e-3 else "C2+"
        bend = torch.inf if kind == "C0" else curvature.abs().max()
        say(f"{name:<11}{kind:<5}{jump:15.3f}{bend:13.3f}{saved:13.1f}{forward:9.2f}{backward:10.2f}")
    shown = ("f(x)", "Activations"), ("f '(x)", "Derivatives")
    places = [torch.linspace(-reach, reach, 801).double() for reach in (4, 0.3)]
    plots(args, "out/activations.png", ACTIVATIONS, 2, [
        (title, "x", label, [(at, derivatives(make_act(name), at)[k]) for name in ACTIVATIONS])
        for at in places for k, (label, title) in enumerate(shown)])


def curves(args):
    logs, panels = [], []
    for path in [Path(out) / "log.jsonl" for out in args.rest]:
        if not path.exists():
            raise SystemExit(f"no run in {path.parent} ({path} is missing); give folders of train.py")
        logs.append([*map(json.loads, path.read_text().split("\n")[:-1])])  # the last may be torn
    for kind, field, scale, label, title in (
            ("epoch", "loss", 1, "cross-entropy", "Training loss, attacked images"),
            ("val", "clean", 100, "accuracy (%)", "Clean accuracy, held-out images"),
            ("val", "robust", 100, "accuracy (%)", "Robust accuracy, held-out images")):
        seen = [[(v["epoch"], scale * v[field]) for v in log if v["kind"] == kind] for log in logs]
        panels.append((title, "epoch", label, [np.transpose(points or [(0, 0)]) for points in seen]))
    plots(args, Path(args.rest[0]) / "curves.png", args.rest, 3, panels)


def scatter(args):
    """A panel for each attack; a cross is two 95% intervals, a point's number is in the legend."""
    panels, keys = {}, {}
    for path in map(Path, args.rest):
        r = json.loads(path.read_text()) if path.exists() else {}
        if "n_robust" not in r:
            say(f"{path} is no report of evaluate.py --json: left out")
            continue
        attack = {"pgd": f"PGD-{r.get('steps')}"}.get(r["attack"], r["attack"])
        last = ", last iterate" * r.get("last_iterate", False)
        panel = panels.setdefault(f"{r['data']}, {attack}{last}, eps {r['eps']:g}/255", {})
        panel[r["arch"], r["act"], r["res"], str(path)] = 100 * np.array(
            [(k / r["n"], *wilson(k, r["n"])) for k in (r["n_robust"], r["n_correct"])])
        if (r["data"], r["eps"]) == ("imagenet", 4):
            panel.update({(*key, ""): [[p[1]] * 3, [p[0]] * 3] for key, p in PAPER.items() if p[0]})
    wide, high = min(3, len(panels)), -(-len(panels) // 3)
    fig = Figure(540 * wide + 300, max(560 * high, 60 + 20 * sum(map(len, panels.values()))), args.scale)
    for p, (title, panel) in enumerate(panels.items()):
        left, top = 60 + 540 * (p % 3), 60 + 560 * (p // 3)
        xs, ys = (np.ravel([rates[i] for rates in panel.values()]) for i in (0, 1))
        place = axes(fig, (left, top, left + 480, top + 440), xs, ys, "robust accuracy (%)",
                     "clean accuracy (%)", f"{title}; disc: ours, ring: SAT's", 0.1)
        taken = [place(x[0], y[0]) for x, y in panel.values()]
        for (*key, ours), (x, y), point in zip(panel, panel.values(), taken[:]):
            for bar in (place(x[1:], [y[0]] * 2), place([x[0]] * 2, y[1:])):
                fig.line(bar, COLOURS[2])
            fig.disc(*point, 4.5, *((COLOURS[2], None) if ours else ("white", COLOURS[1])))
            spots = [point + (r * a, r * b) for r in (9, 14, 19, 24) for a in (1, -1) for b in (-1, 1)]
            room = [min(np.hypot(*(spot - t)) for t in taken) for spot in spots]
            taken.append(spots[np.argmax(np.minimum(room, 12))])  # the nearest with room for a number
            fig.text(*taken[-1], str(keys.setdefault(tuple(key), len(keys) + 1)), "mm", 10)
    for (arch, act, res), number in keys.items():
        fig.text(540 * wide + 60, 40 + 20 * number, f"{number}  {arch}, {act}, {res} px", "lm")
    fig.save(args.png or Path(args.rest[0]).parent / "scatter.png")


# A trained net and its images

SLOTS = 100  # images in work at a time
MARKS = 1, 5, 10, 20, 50, 100, 200  # iterations to report
RADII, SWEEP = (0, 1, 2, 4, 8, 16, 32, 64), 20  # eps in 1/255, steps at each
parts = lambda *tensors: zip(*(t.split(SLOTS) for t in tensors))


def open_run(args, limit):
    """The run that evaluate.py's flags name: its net, its first test images, the attack's numbers."""
    flags = evaluate.get_args(args.rest)
    run = evaluate.find_run(flags)
    run.device, _, _ = evaluate.open_device(flags.device)
    run.images = data.load(run.data, run.data_dir, False, run.res, run.classes, device=run.device)
    run.net, run.digest = evaluate.open_model(run, run.images, run.device)
    members = data.subset(run.images.n, flags.limit or limit)
    run.index, run.x, run.y = next(data.eval_batches(run.images, members, len(members), 0, run.device))
    attack = zip((flags.eps, flags.step_size, flags.steps), PGD[run.data])
    run.eps, run.step_size, run.steps = (b if a is None else a for a, b in attack)
    return argparse.Namespace(**vars(run), out=run.weights.parent, json=flags.json)


def other_net(path, run):
    """The net of another folder, or of a file (like `run`'s unless args.json says), and its name."""
    folder, weights = (Path(path), None) if Path(path).is_dir() else (Path(path).parent, path)
    flags = dict(data=None, arch=None, act=None) if (folder / "args.json").exists() else vars(run)
    other = evaluate.find_run(argparse.Namespace(**flags | dict(out=folder, weights=weights)))
    return evaluate.open_model(other, run.images, run.device)[0], f"{other.arch} {other.act}"


def pgd_from(net, index, x, y, eps, step_size, steps):
    """PGD from evaluation's starts, eps and step_size in 1/255 -> its last iterates, as x."""
    noise = (2 * uniform(0, index, (START, 0), x.shape[1:]) - 1) * eps / 255
    sizes = eps / 255, step_size / 255, steps
    return torch.cat([pgd(net, a, b, *sizes, c) for a, b, c in parts(x, y, noise)])


@torch.no_grad()
def logits_of(net, x):
    return torch.cat([net(part).float() for part in x.split(SLOTS)])


# The doubts: SAT Sec. 6, and Carlini et al. 2019 (arXiv:1902.06705), which it follows

def judge(what, hit, warn, fail, why, note=""):
    """A doubt about a share of images, hit (n,) bool; past a bound is where all its 95% interval is."""
    k, n, most = int(hit.sum()), len(hit), warn < fail
    low, high = wilson(k, n)
    failed, warned = (low > bound if most else high < bound for bound in (fail, warn))
    verdict = "FAIL" if failed else "WARN" if warned else "PASS" if n else "SKIP"
    return dict(verdict=verdict, what=what, measured=f"{k / max(n, 1):.1%} of {n}{note}", why=why,
                wanted=f"at {'most' if most else 'least'} {100 * warn:.3g}%")


def doubts(net, index, x, y, eps, step_size, surrogate=None, normal=None, watch=lambda *where: None):
    """All ways to doubt a net in eval mode, on images sorted by index; eps, step_size in 1/255."""
    def fall(what, net, chosen, eps, step_size, steps, **more):
        """The step at which each image fell in the work queue: inf if robust, -1 if wrong as it is."""
        lines, batches = [], parts(index[chosen], x[chosen], y[chosen])
        for line in pgd_queue(net, batches, SLOTS, eps / 255, step_size / 255, steps, **more,
                              tick=lambda: watch(what, len(lines), len(y[chosen]))):
            lines.append(line)
        lines.sort(key=lambda line: line["index"])
        return torch.tensor([line["fell"][1] if line["fell"] else inf if line["clean"] == line["label"]
                             else -1 for line in lines], device=x.device)

    # The net by itself
    inf, logits, again = torch.inf, logits_of(net, x), logits_of(net, x)
    right, chance = logits.argmax(1) == y, 1 / logits.shape[1]
    yield judge("right on clean images", right, 2 * chance, chance, "guessing leaves nothing to attack")
    drift = (again - logits).abs().amax(1) > 1e-4 * logits.abs().amax(1)
    yield judge("two calls differ", drift, 0, 0.1, "a random net hides its slope; a verdict is one draw")
    odd = ~logits.isfinite().all(1) | (logits.amin(1) >= 0) & ((logits.sum(1) - 1).abs() < 1e-4)
    yield judge("outputs that are no logits", odd, 0, 0.1, "a second softmax flattens the loss")
    low = logits_of(in_precision(net, "bf16", x.device), x).argmax(1)
    yield judge("bf16 decides otherwise", low != logits.argmax(1), 0.05, 0.2, "rounding decides")
    batch = logits_of(attacker_view(net, batch_stats=True), x).argmax(1) == y
    yield judge("right by batch statistics only", batch & ~right, 0.1, 0.3, "BatchNorm is off")
    slopes = [input_gradient(net, a, lambda z: cross_entropy(z, b))[1] for a, b in parts(x, y)]
    zero = (torch.cat(slopes) == 0).flatten(1).float().mean(1) > 0.05
    yield judge("zeros in the input gradient", zero[right], 0.02, 0.1, "saturated or rounded")
    # Iterations, from one run
    fell = fall("iterations", net, slice(None), eps, step_size, max(MARKS))
    curve = "; after " + ", ".join(f"{k}: {(fell > k).float().mean():.1%}" for k in MARKS)
    yield judge("fooled by noise", fell[right] == 0, 0.1, 0.3, "a random start is no attack")
    yield judge("fooled by steps 1 to 200", fell[fell > 0] < inf, 0.05, 0.02, "PGD is blind", curve)
    yield judge("fooled by steps 101 to 200", fell[fell > 100] < inf, 0.05, 0.2, "PGD has not converged")
    yield judge("robust", fell[right] == inf, 0.1, 0.05, "there is no robustness to doubt")
    once = fall("PGD-1", net, slice(None), eps, eps, 1)
    yield judge("PGD-1 fools, PGD-50 does not", ((fell > 50) & (once <= 1))[right], 0.02, 0.1, "masked")
    yield judge("robust to PGD-1, and to PGD-50", (fell > 50)[once > 1], 0.5, 0.25, "one-step overfit")
    falls = [fall(f"eps {e}", net, right, e, max(1, 2.5 * e / SWEEP), SWEEP) for e in RADII]
    stand = torch.stack(falls) == inf
    curve = "; eps " + ", ".join(f"{e}: {k / len(y):.1%}" for e, k in zip(RADII, stand.sum(1)))
    lost = (stand[1:] & ~stand[:-1]).any(0)
    yield judge("falls to an eps, not to the next", lost, 0.05, 0.15, "a larger eps does less", curve)
    yield judge(f"robust at eps {RADII[-1]}", stand[-1], 0.05, 0.15, "it drowns the image")
    # Other attacks, on what PGD left
    left, by = fell == inf, []
    more = fall("restarts", net, left, eps, step_size, 20, restarts=4, seed=1)
    yield judge("left, then fooled by 4 restarts", more < inf, 0.05, 0.2, "PGD depends on luck")
    for a, b, i in parts(x[left], y[left], index[left]):
        tell = lambda name, step, steps, n: watch(name, len(by) + len(b) * step / steps, int(left.sum()))
        attacks = dict(attacks=("apgd-ce", "square"), queries=1000, progress=tell)
        by += autoattack(net, a, b, eps / 255, i, **attacks)[1]["fooled_by"]
    square = torch.tensor([name == "square" for name in by if name != "apgd-ce"])
    yield judge("left, by APGD too; Square fools", square, 0.02, 0.1, "black box beats white: masked")
    tried = left if surrogate else left & False
    moved = pgd_from(surrogate or net, index[tried], x[tried], y[tried], eps, step_size, 50)
    moved = logits_of(net, moved).argmax(1) != y[tried]
    yield judge("left, then fooled by transfer", moved, 0.02, 0.1, "own slope is masked; --surrogate")
    x_adv = pgd_from(net, index[right], x[right], y[right], eps, step_size, 10)
    losses = [cross_entropy(logits_of(net, x[right].lerp(x_adv, k / 4)), y[right]) for k in range(5)]
    rise = (torch.stack(losses).diff(dim=0) > 0).all(0)
    yield judge("loss rises towards the attack", rise, 0.75, 0.5, "in 4 steps; else PGD is blind")
    stood = fall("normal net", normal or net, slice(len(y) if normal else 0), eps, step_size, 50)
    yield judge("a normal net stands", stood[stood >= 0] == inf, 0.05, 0.15, "PGD is too weak; --normal")


def report(args):
    run, began, found = open_run(args, 256), {"": time.monotonic()}, {}
    say(f"{run.weights}: {run.arch} {run.act}, {len(run.y)} images of {run.data}, eps {run.eps:g}")
    others = [path and other_net(path, run)[0] for path in (args.surrogate, args.normal)]
    watch = lambda what, k, n: progress(began.setdefault(what, time.monotonic()), k, n, f"{what}: ")
    for doubt in doubts(run.net, run.index, run.x, run.y, run.eps, run.step_size, *others, watch):
        found[doubt["what"]] = doubt
        say("{verdict:<4} | {what:<32} | {measured} | {wanted} | {why}".format(**doubt))
    verdicts = [doubt["verdict"] for doubt in found.values()]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("PASS", "WARN", "FAIL", "SKIP")]
    say(f"{', '.join(counts)}; {evaluate.duration(time.monotonic() - began[''])}")
    if run.json:
        found.update(hash=run.digest, n=len(run.y), eps=run.eps)
        Path(run.json).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    raise SystemExit(int("FAIL" in verdicts))


def directions(delta, index, seed=0):
    """The attack's delta (1, C, H, W) and a random direction at right angles, both of mean square 1."""
    random = uniform(seed, index, 0, delta.shape[1:]) - 0.5
    random = random - (random * delta).sum() / delta.square().sum() * delta
    return [d / d.square().mean().sqrt() for d in (delta, random)]


def loss_surface(model, x, y, d1, d2, radius, n):
    """Cross-entropies (n, n) at x + a d1 + b d2, a, b within ±radius (SAT Fig. 5); x (1, C, H, W)."""
    # Pixels may leave [0, 1]: clipped, they would put kinks into the picture that the network has not
    steps = torch.linspace(-radius, radius, n, device=x.device).view(n, 1, 1, 1)
    rows = [cross_entropy(logits_of(model, x + a * d1 + steps * d2), y.expand(n)) for a in steps]
    return torch.stack(rows).cpu().numpy()


def roughness(surface):
    """Mean squared second difference, in both directions; compare at the same radius and n only."""
    return np.mean([np.square(np.diff(surface, 2, k)).mean() for k in (0, 1)])


def landscape(args):
    run, began, shown, titles = open_run(args, 20), time.monotonic(), [], []
    nets = [(run.net, f"{run.arch} {run.act}")] + [other_net(path, run) for path in args.against]
    n, unit = len(run.y), 2 * run.eps
    for net, name in nets:
        x_adv, seen = pgd_from(net, run.index, run.x, run.y, run.eps, run.step_size, 20), []
        for i in range(n):
            progress(began, len(shown) * n + i, len(nets) * n, "loss around ")
            index, x, y, delta = (t[i : i + 1] for t in (run.index, run.x, run.y, x_adv - run.x))
            seen.append(loss_surface(net, x, y, *directions(delta, index), unit / 255, 31))
        shown, rough = shown + [seen[0]], list(map(roughness, seen))
        titles.append(f"{name}: roughness {rough[0]:.2g}")
        say(f"{titles[-1]}; over {n} images {np.mean(rough):.2g} ± {1.96 * np.std(rough) / n**0.5:.1g}")
    lo, hi, right = np.min(shown), np.max(shown), 400 * len(shown)
    labels = "attack (1/255)", "random (1/255)", "cross-entropy"
    fig = Figure(right + 50, 700, args.scale)
    for k, (z, title) in enumerate(zip(shown, titles)):
        box = 70 + 400 * k, 390, 330 + 400 * k, 650
        fig.text(210 + 400 * k, 24, title, "ms", 14)
        surface_3d(fig, 210 + 400 * k, 240, 110, z, lo, hi, unit, labels)
        heat_map(fig, box, z, lo, hi)
        axes(fig, box, (-unit, unit), (-unit, unit), *labels[:2], grid=False)
    fig.paste(viridis(np.linspace(1, 0, 256))[:, None], right - 24, 390, 14, 260)
    axis(fig, (right - 10, 650), (right - 10, 390), lo, hi, labels[2], (1, 0))
    fig.save(args.png or run.out / "landscape.png")


def gallery(args):
    run, side = open_run(args, 6), 150
    x_adv = pgd_from(run.net, run.index, run.x, run.y, run.eps, run.step_size, run.steps)
    names, magnify = run.images.classes, round(127 / run.eps)
    fig = Figure(3 * (side + 20) + 20, len(x_adv) * (side + 34) + 40, args.scale)
    titles = "clean", f"attacked, eps {run.eps:g}/255", f"difference x {magnify}, grey is 0"
    for k, x in enumerate((run.x, x_adv, magnify * (x_adv - run.x) + 0.5)):
        left, (p, seen) = 20 + k * (side + 20), logits_of(run.net, x).softmax(1).max(1)
        fig.text(left, 28, titles[k], "ls", 13)
        for i, picture in enumerate(x.cpu()):
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # -> (H, W, 3)
            fig.paste(pixels.numpy(), left, 40 + i * (side + 34), side, side)
            words = f"{names[seen[i]]}, {p[i]:.0%}" if k < 2 else f"label: {names[run.y[i]]}"
            fig.text(left, 45 + side + i * (side + 34), words, "la")
    fig.save(args.png or run.out / "gallery.png")


def step_cost(run, index, x):
    """One step of train.py on images x -> seconds, the attack's share, peak MiB above the weights."""
    held, began = np.nan, train.clock(run.device, True)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    share = train.train_step(run, index, x, index % 1000, True)
    ended = train.clock(run.device, True)
    return ended - began, share, (torch.cuda.max_memory_allocated() - held) / 2**20


def cost(args):
    first, runs, rounds, began = train.get_args(args.rest), {}, [], time.monotonic()
    device, _, _ = evaluate.open_device(first.device, first.dtype)
    for c, act, k in itertools.product(range(1 + first.compile), args.acts, args.pgd):
        run = argparse.Namespace(**vars(first) | dict(act=act, steps=k, compile=c, lr=1e-9))
        runs[act, k, c] = train.assemble(run, device, 0, 1, 1000)
    n = first.batch_size if "--batch-size" in str(args.rest) else 32 if device.type == "cpu" else 128
    index, x = torch.arange(n, device=device), torch.rand(n, 3, first.res, first.res, device=device)
    while len(rounds) < 2 + args.rounds:  # all kinds in turn; the first two rounds warm up
        progress(began, len(rounds) * n * len(runs), (2 + args.rounds) * n * len(runs), "steps on ")
        rounds.append([step_cost(run, index, x) for run in runs.values()])
    costs = dict(zip(runs, np.median(rounds[2:], axis=0)))
    say(f"{first.arch}, {first.res} px, {n} images, {first.dtype}, {evaluate.device_name(device)}")
    say("act         PGD  compiled  ms/step  img/s  attack  PGD-0: 1  (FLOPs)  ReLU: 1  peak MiB")
    for (act, k, c), (seconds, share, memory) in costs.items():  # FLOPs: an attack step 2, the update 3
        plain, relu = (costs.get(kind, [np.nan])[0] for kind in ((act, 0, c), ("relu", k, c)))
        say(f"{act:<11}{k:4}{('no', 'yes')[c]:>10}{1e3 * seconds:9.1f}{n / seconds:7.0f}{share:8.0%}"
            f"{seconds / plain:10.2f}{(2 * k + 3) / 3:9.2f}{seconds / relu:9.2f}{memory:10.0f}")
    try:
        images = data.load(first.data, first.data_dir, True, first.res)
    except SystemExit as reason:
        return say(f"loader: {reason}")
    stream, began = data.train_batches(images, torch.arange(images.n), n, 10**6), time.monotonic()
    torch.set_num_threads(1)
    wait = sum(1 for _ in zip(range(20), stream)) and (time.monotonic() - began) / 20
    say(f"loader: {n / wait:.0f} img/s on one core, {wait / seconds:.1%} of the last row's step")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
                                allow_abbrev=False)  # --act is another script's, not our --acts
    p.add_argument("command", choices="report landscape gallery activations curves scatter cost".split())
    p.add_argument("--surrogate", help="report: a second net's folder or file, whose attacks are tried")
    p.add_argument("--normal", help="report: a normally trained net's folder or file; it has to fall")
    p.add_argument("--against", nargs="+", default=[], help="landscape: other nets' folders or files")
    p.add_argument("--png", help="the picture's file; default: in the run's folder")
    p.add_argument("--scale", type=float, default=1, help="pixels a unit; 2 for fine screens")
    p.add_argument("--acts", nargs="+", default=[*ACTIVATIONS], help="cost: of which activations")
    p.add_argument("--pgd", nargs="+", type=int, default=[0, 1], help="cost: steps of the attack, or 0")
    p.add_argument("--rounds", type=int, default=15, help="cost: steps of each kind")
    args, rest = p.parse_known_args(argv)  # the rest: folders, files, or another script's flags
    if bool(rest) != dict(activations=False, curves=True, scatter=True).get(args.command, bool(rest)):
        p.error("curves takes folders of runs, scatter takes reports, activations takes nothing more")
    return argparse.Namespace(**vars(args), rest=rest)


def main():
    args = get_args()
    evaluate.listen()
    try:
        globals()[args.command](args)
    except evaluate.Stopped:
        raise SystemExit(75)


if __name__ == "__main__":
    main()
