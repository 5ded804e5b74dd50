"""
Doubt a robustness number, and draw what there is to see (SAT, arXiv:2006.14536).

See every activation of the paper, no run needed:
$ python sanity.py activations
Two runs over their epochs:
$ python sanity.py curves out/relu out/silu

Keys: SAT is the paper; figures and sections are numbered as there.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from activations import ACTIVATIONS, make_act
from attacks import uniform
from evaluate import PAPER, wilson
from models import MODELS

# Drawing: one figure, one way to draw an axis

FINE = 4  # shapes are drawn this many times finer and averaged; text is drawn last, at the final size
INK, FAINT = (30, 30, 30), (224, 224, 224)
# Okabe and Ito's colours without the yellow, for any eyes; dashes tell them apart in grey
COLOURS = "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
DASHES = (), (8, 4), (10, 3, 2, 3), (2, 3)
VIRIDIS = np.array([(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
                    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)])


class Figure:
    """A white picture, `scale` pixels a unit; (0, 0) is its upper left corner."""

    def __init__(self, width, height, scale):
        self.scale, self.fine, self.words = scale, scale * FINE, []
        self.image = Image.new("RGB", (round(width * scale) * FINE, round(height * scale) * FINE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points, colour=INK, width=1.0, dash=()):
        points = np.asarray(points, float) * self.fine
        along = np.r_[0, np.hypot(*np.diff(points, axis=0).T).cumsum()]
        ends = np.r_[0, along[-1]]
        if dash:
            ends = np.r_[0, np.tile(dash, int(along[-1] / self.fine / sum(dash)) + 1).cumsum()] * self.fine
        for a, b in zip(ends[::2].clip(max=along[-1]), ends[1::2].clip(max=along[-1])):
            at = np.r_[a, along[(a < along) & (along < b)], b]
            piece = np.stack([np.interp(at, along, points[:, k]) for k in (0, 1)], axis=1)
            self.pen.line(piece.ravel().tolist(), colour, round(width * self.fine), joint="curve")

    def polygon(self, points, fill, outline=None, width=1.0):
        self.pen.polygon((np.asarray(points) * self.fine).ravel().tolist(), fill, outline,
                         round(width * self.fine))

    def disc(self, x, y, radius, fill, outline=None):
        corners = np.array([x - radius, y - radius, x + radius, y + radius]) * self.fine
        self.pen.ellipse(corners.tolist(), fill, outline, round(1.5 * self.fine))

    def paste(self, image, left, top, width, height):
        size = round(width * self.fine), round(height * self.fine)
        method = Image.NEAREST if image.width < size[0] // FINE else Image.BOX
        self.image.paste(image.resize(size, method), (round(left * self.fine), round(top * self.fine)))

    def text(self, x, y, words, anchor="ms", size=12, upright=False):
        self.words.append((x, y, words, anchor, size, upright))

    def save(self, path):
        image = self.image.reduce(FINE)
        for upright in (True, False):  # upright text is drawn level, on the picture laid on its side
            image = image.transpose(Image.ROTATE_270) if upright else image
            pen = ImageDraw.Draw(image)
            for x, y, words, anchor, size, turned in self.words:
                at = (image.width / self.scale - y, x) if turned else (x, y)
                if turned == upright:
                    pen.text(tuple(np.multiply(at, self.scale)), words, INK, font(size * self.scale), anchor)
            image = image.transpose(Image.ROTATE_90) if upright else image
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        print(path)


def font(size):
    return ImageFont.load_default(size)


def text_width(words, size=12):
    return max(font(size * 8).getlength(w) / 8 for w in words) if words else 0


def ticks(lo, hi, most):
    """Round numbers from lo to hi: multiples of 1, 2 or 5 times a power of ten, at most about `most`."""
    unit = 10 ** np.floor(np.log10((hi - lo) / most))
    unit *= next(k for k in (1, 2, 5, 10) if (hi - lo) / (k * unit) <= most)
    return np.arange(np.ceil(lo / unit - 1e-9), np.floor(hi / unit + 1e-9) + 1) * unit


def axis(fig, start, end, lo, hi, label, out, grid=0):
    """A line from start to end that counts from lo to hi; `out` is the unit vector away from the data."""
    start, end, out = np.array(start, float), np.array(end, float), np.array(out)
    side = abs(out[0]) > 0.9
    anchor = "lmr"[1 - round(np.sign(out[0]) * (abs(out[0]) > 0.4))] + ("m" if side else "a")
    marks = ticks(lo, hi, max(2, np.hypot(*(end - start)) / 48))
    numbers = [f"{mark:.6g}" for mark in marks.round(12) + 0.0]
    for mark, number in zip(marks, numbers):
        at = start + (mark - lo) / (hi - lo) * (end - start)
        fig.line([at - grid * out, at], FAINT)
        fig.line([at, at + 4 * out])
        fig.text(*(at + 7 * out), number, anchor, 11)
    fig.line([start, end])
    away = 14 + text_width(numbers, 11) if side else 22 if out[0] == 0 else 34
    fig.text(*((start + end) / 2 + away * out), label, ("ms" if out[0] < 0 else "ma") if side else anchor,
             upright=side)


def axes(fig, box, xs, ys, xlabel, ylabel, title, grid=True):
    """Two axes around box = (left, top, right, bottom) -> place(x, y), from data to the figure's units."""
    left, top, right, bottom = box
    fig.text(left, top - 10, title, "ls", 13)
    axis(fig, (left, bottom), (right, bottom), *xs, xlabel, (0, 1), grid * (bottom - top))
    axis(fig, (left, bottom), (left, top), *ys, ylabel, (-1, 0), grid * (right - left))
    return lambda x, y: np.stack([left + (np.asarray(x) - xs[0]) / (xs[1] - xs[0]) * (right - left),
                                  bottom - (np.asarray(y) - ys[0]) / (ys[1] - ys[0]) * (bottom - top)], -1)


def limits(values, room=0.05):
    """The range of an axis that shows all values with some room."""
    lo, hi = np.min(values), np.max(values)
    room = room * (hi - lo) or 0.5
    return lo - room, hi + room


def plot(fig, box, lines, xlabel, ylabel, title):
    """Lines, each (number of its style, x, y), on axes of their own; dots where there are few points."""
    lines = [(style, *np.array(xy, float)[:, np.isfinite(xy[1])]) for style, *xy in lines if len(xy[0])]
    xs, ys = (limits(np.concatenate([line[k] for line in lines] or [[0, 1]])) for k in (1, 2))
    place = axes(fig, box, xs, ys, xlabel, ylabel, title)
    for style, x, y in lines:
        points = place(x, y)
        fig.line(points, COLOURS[style % 7], 2, DASHES[style % 4])
        for point in points if len(x) < 40 else ():
            fig.disc(*point, 3, COLOURS[style % 7])


def legend(fig, x, y, names):
    """The styles of `plot`, one line a name, beside the axes and so never on the data."""
    for i, name in enumerate(names):
        fig.line([(x, y + 20 * i), (x + 34, y + 20 * i)], COLOURS[i % 7], 2, DASHES[i % 4])
        fig.text(x + 42, y + 20 * i, name, "lm")


def viridis(v):
    """Numbers in [0, 1] -> (..., 3) uint8 colours whose lightness rises evenly."""
    return np.stack([np.interp(v, np.linspace(0, 1, 9), c) for c in VIRIDIS.T], -1).round().astype(np.uint8)


def heat_map(fig, box, z, lo, hi):
    """z (n, n), its first index to the right, its second up: colours from lo to hi, lines at the ticks."""
    left, top, right, bottom = box
    size, n = (round((right - left) * fig.fine), round((bottom - top) * fig.fine)), len(z)
    field = Image.fromarray(np.ascontiguousarray(z.T[::-1], dtype=np.float32))
    field = np.asarray(field.resize(size, Image.BILINEAR, box=(0.5, 0.5, n - 0.5, n - 0.5)))
    rgb, slope = viridis((field - lo) / (hi - lo)), np.hypot(*np.gradient(field))
    for level in ticks(lo, hi, 8):  # a line is where the level is nearer than half its width
        on = np.abs(field - level) < slope * fig.fine / 2
        rgb[on] = 255 if level < (lo + hi) / 2 else INK
    fig.image.paste(Image.fromarray(rgb), (round(left * fig.fine), round(top * fig.fine)))


def surface_3d(fig, x, y, size, z, lo, hi, radius, labels):
    """z (n, n) as a shaded surface from lo to hi, far patches first; (x, y) is the middle of its floor."""
    def place(a, b, c):  # a and b from -1 to 1, c from 0 to 1
        across, depth = 0.75 * a - 0.66 * b, 0.66 * a + 0.75 * b
        return np.stack([x + size * across, y - size * (0.42 * depth + 1.1 * c)], -1)

    n, ab, height = len(z), np.linspace(-1, 1, len(z)), (z - lo) / (hi - lo)
    points = place(ab[:, None], ab, height)
    patches = np.stack([points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]], 2)
    middle = (height[1:, 1:] + height[:-1, :-1] + height[1:, :-1] + height[:-1, 1:]) / 4
    slope_a = np.diff(height, axis=0)[:, 1:] * (n - 1) / 2
    slope_b = np.diff(height, axis=1)[1:] * (n - 1) / 2
    light = (0.45 * slope_a - 0.25 * slope_b + 0.85) / np.sqrt(1 + slope_a**2 + slope_b**2)
    colour = (viridis(middle) * (0.55 + 0.45 * light.clip(0, 1))[..., None]).astype(np.uint8)
    corners = np.array([(-1, 1, 0), (1, 1, 0), (1, -1, 0), (1, 1, 0), (1, 1, 1), (-1, 1, 1), (1, 1, 1), (1, -1, 1)])
    fig.line(place(*corners.T), FAINT)
    for i in reversed(range(n - 1)):
        for j in reversed(range(n - 1)):
            fig.polygon(patches[i, j], tuple(colour[i, j]), tuple((colour[i, j] * 0.85).astype(int)), 0.25)
    unit = radius * 255
    axis(fig, place(-1, -1, 0), place(1, -1, 0), -unit, unit, labels[0], (0.45, 0.89))
    axis(fig, place(-1, -1, 0), place(-1, 1, 0), -unit, unit, labels[1], (-0.45, 0.89))
    axis(fig, place(-1, 1, 0), place(-1, 1, 1), lo, hi, labels[2], (-1, 0))


# The curves: SAT Figs. 1 and 2

WIDE = torch.linspace(-6, 6, 12001).double()


def derivatives(act, x):
    """The curve at x (n,) float64, its slope and its curvature, each (n,), by autograd."""
    x = x.requires_grad_()
    y = act.double()(x)
    slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
    curvature = torch.zeros_like(x)
    if slope.requires_grad:
        curvature, = torch.autograd.grad(slope.sum(), x, materialize_grads=True)
    return y.detach(), slope.detach(), curvature


def smoothness(act):
    """A class, the slope's jump at 0 and the largest curvature, as measured."""
    _, slope, curvature = derivatives(act, torch.cat([torch.tensor([-1e-9, 1e-9]).double(), WIDE]))
    jumps = [(d[1] - d[0]).abs().item() for d in (slope, curvature)]
    kind = "C0" if jumps[0] > 1e-3 else "C1" if jumps[1] > 1e-3 else "Cinf"
    return kind, jumps[0], float("inf") if kind == "C0" else curvature.abs().max().item()


def saved_bytes(act, x):
    """What one float32 element costs in memory until the backward pass."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = act(x)
    return sum(t.numel() * t.element_size() for t in kept.values()) / y.numel()


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def act_times(acts, x, rounds=31):
    """Median seconds of a forward and a backward pass for each activation, taken in turn -> (acts, 2)."""
    spent = np.zeros((rounds, len(acts), 2))
    for r in range(-2, rounds):  # the first two warm up
        for a, act in enumerate(acts):
            start = clock(x.device)
            y = act(x)
            middle = clock(x.device)
            torch.autograd.grad(y, [x, *act.parameters()], x)
            spent[r, a] = middle - start, clock(x.device) - middle
    return np.median(spent, axis=0)


def activations(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(1 << 20, device=device).requires_grad_()
    acts = [make_act(name).to(device) for name in ACTIVATIONS]
    times = act_times(acts, x)
    print(f"{'':11}class  jump of f'(0)  largest f''  saved bytes  forward  backward (against ReLU, {device})")
    sharp = []
    for name, act, spent in zip(ACTIVATIONS, acts, times / times[0]):
        kind, jump, bend = smoothness(make_act(name))
        print(f"{name:<11}{kind:<5}{jump:15.3f}{bend:13.3f}{saved_bytes(act, x):13.1f}{spent[0]:9.2f}{spent[1]:10.2f}")
        sharp.append(bend > 2)
    fig = Figure(880, 660, args.scale)
    for row, (reach, title) in enumerate(((0.5, "Like ReLU, near 0"), (4, "All others, and ReLU"))):
        at = torch.linspace(-reach, reach, 801).double()
        shown = [i for i in range(len(sharp)) if sharp[i] == (row == 0) or i == 0]
        for k, what in enumerate(("f(x)", "f '(x)")):
            lines = [(i, at, derivatives(make_act(list(ACTIVATIONS)[i]), at.clone())[k]) for i in shown]
            box = 70 + 350 * k, 40 + 320 * row, 360 + 350 * k, 280 + 320 * row
            plot(fig, box, lines, "x", what, title + (", the derivative" if k else ""))
    legend(fig, 745, 150, list(ACTIVATIONS))
    fig.save(args.png or "out/activations.png")


# Runs and results

def read_log(folder):
    """The lines of a run's log.jsonl -> a list of dicts."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        raise SystemExit(f"no run in {folder} ({path} is missing); give folders that train.py --out made")
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # the last may be torn


def curves(args):
    logs = [read_log(out) for out in args.outs]
    names = [Path(out).resolve().name for out in args.outs]
    names = names if len(set(names)) == len(names) else args.outs
    fig = Figure(1060 + text_width(names), 340, args.scale)
    for k, (kind, field, unit, label, title) in enumerate((
            ("epoch", "loss", 1, "cross-entropy", "Training loss, attacked"),
            ("val", "clean", 100, "accuracy (%)", "Clean accuracy, held out"),
            ("val", "robust", 100, "accuracy (%)", "Robust accuracy, held out"))):
        logged = [[line for line in log if line["kind"] == kind and field in line] for log in logs]
        lines = [(i, [l["epoch"] for l in log], [unit * l[field] for l in log]) for i, log in enumerate(logged)]
        plot(fig, (70 + 330 * k, 40, 330 + 330 * k, 280), lines, "epoch", label, title)
    legend(fig, 1010, 60, names)
    fig.save(args.png or Path(args.outs[0]) / "curves.png")


def write_labels(fig, box, points, names):
    """Each name beside its point, where it covers neither a point nor another name."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for (x, y), name in zip(points, names):
        width = text_width([name], 11) * bool(name)
        for away in (9, 18, 28, 40, 54, 70):
            for turn in (0, 4, 2, 6, 1, 7, 3, 5):
                dx, dy = np.cos(turn * np.pi / 4), np.sin(turn * np.pi / 4)
                cx, cy = x + dx * (away + width / 2), y + dy * (away + 4)
                spot = cx - width / 2 - 2, cy - 7, cx + width / 2 + 2, cy + 7
                inside = spot[0] > box[0] and spot[2] < box[2] and spot[1] > box[1] and spot[3] < box[3]
                if inside and not any(spot[0] < t[2] and t[0] < spot[2] and spot[1] < t[3] and t[1] < spot[3]
                                      for t in taken):
                    break
            else:
                continue
            break
        taken.append(spot)
        if away > 18:
            fig.line([(x, y), (x + dx * away, y + dy * away)], (150, 150, 150), 0.7)
        fig.text(cx, cy, name, "mm", 11)


def scatter(args, paper=PAPER):
    panels = {}
    for path in args.reports:
        r = json.loads(Path(path).read_text())
        attack = f"PGD-{r['steps']}" if r["attack"] == "pgd" else r["attack"]
        key = r["arch"], r["act"], r["res"]
        rates = [[100 * v for v in (r[k] / r["n"], *wilson(r[k], r["n"]))] for k in ("n_correct", "n_robust")]
        panels.setdefault((r["data"], attack, r["eps"]), []).append((key, *rates))
    fig = Figure(540 * len(panels) + 150, 500, args.scale)
    for k, ((name, attack, eps), ours) in enumerate(panels.items()):
        box = 70 + 540 * k, 40, 550 + 540 * k, 440
        theirs = {key: p for key, p in paper.items() if (name, eps) == ("imagenet", 4) and p[0] is not None}
        clean = [v for _, rate, _ in ours for v in rate] + [p[0] for p in theirs.values()]
        robust = [v for _, _, rate in ours for v in rate] + [p[1] for p in theirs.values()]
        place = axes(fig, box, limits(robust, 0.1), limits(clean, 0.1), "robust accuracy (%)", "clean accuracy (%)",
                     f"{name}, {attack}, eps {eps:g}/255")
        points, names = [], []
        for key, a, b in ours:
            fig.line(place([b[1], b[2]], [a[0]] * 2), COLOURS[2])
            fig.line(place([b[0]] * 2, [a[1], a[2]]), COLOURS[2])
            if key in theirs:
                fig.line([place(b[0], a[0]), place(theirs[key][1], theirs[key][0])], (150, 150, 150), 1, (2, 2))
            points.append(place(b[0], a[0]))
            names.append(" ".join(key[:2]) + f" {key[2]} px" * (key[2] != MODELS[key[0]].res and name == "imagenet"))
        for key, p in theirs.items():
            points.append(place(p[1], p[0]))
            known = any(key == o[0] for o in ours)  # then the dotted line says whose it is
            names.append("" if known else " ".join(key[:2]) + f" {key[2]} px" * (key[2] != MODELS[key[0]].res))
        write_labels(fig, box, points, names)
        for i, point in enumerate(points):
            fig.disc(*point, 4.5, *((COLOURS[2], COLOURS[2]) if i < len(ours) else ("white", COLOURS[1])))
    x = 540 * len(panels) + 40
    for y, name, fill, edge in ((60, "ours, 95%", COLOURS[2], COLOURS[2]), (82, "SAT's", "white", COLOURS[1])):
        fig.disc(x, y, 4.5, fill, edge)
        fig.text(x + 14, y, name, "lm")
    fig.save(args.png or Path(args.reports[0]).parent / "scatter.png")


# The loss around an image: SAT Sec. 6, Fig. 5

def directions(delta, index, seed=0):
    """The attack's delta (1, C, H, W) and a random direction at right angles to it, both as long as 1 / pixel."""
    random = uniform(seed, index, 0, delta.shape[1:]) - 0.5
    random = random - (random * delta).sum() / (delta * delta).sum() * delta
    return [d / d.square().mean().sqrt() for d in (delta, random)]


@torch.no_grad()
def loss_surface(model, x, y, d1, d2, radius, n):
    """Cross-entropies (n, n) at x + a d1 + b d2, a and b from -radius to radius; x (1, C, H, W), y (1,).

    Pixels may leave [0, 1]: cutting them would put kinks into the picture that the network does not have.
    """
    a = torch.linspace(-radius, radius, n, device=x.device).view(n, 1, 1, 1)
    rows = [F.cross_entropy(model(x + s * d1 + a * d2).float(), y.expand(n), reduction="none") for s in a]
    return torch.stack(rows).cpu().numpy()


def roughness(surface):
    """Mean squared second difference, along both sides."""
    return np.mean([np.square(np.diff(surface, 2, axis)).mean() for axis in (0, 1)])


def draw_landscape(surfaces, titles, radius, scale):
    """One or more surfaces (n, n) side by side, all on one scale -> Figure."""
    lo, hi = min(s.min() for s in surfaces), max(s.max() for s in surfaces)
    fig, unit = Figure(400 * len(surfaces) + 90, 680, scale), 255 * radius
    for k, (z, title) in enumerate(zip(surfaces, titles)):
        left = 400 * k
        fig.text(left + 230, 24, title, "ms", 14)
        surface_3d(fig, left + 230, 235, 110, z, lo, hi, radius, ("attack (1/255)", "random (1/255)", "cross-entropy"))
        box = left + 90, 380, left + 350, 640
        heat_map(fig, box, z, lo, hi)
        axes(fig, box, (-unit, unit), (-unit, unit), "attack direction (1/255)", "random direction (1/255)", "", False)
    right = 400 * len(surfaces)
    fig.paste(Image.fromarray(viridis(np.linspace(1, 0, 256))[:, None]), right - 10, 380, 14, 260)
    axis(fig, (right + 4, 640), (right + 4, 380), lo, hi, "cross-entropy", (1, 0))
    return fig


def draw_gallery(x, x_adv, captions, eps, scale, side=150):
    """Rows of clean, attacked and magnified difference; captions: a (before, after) pair for each image."""
    magnify = round(0.5 / eps)
    fig = Figure(3 * (side + 20) + 20, len(x) * (side + 34) + 40, scale)
    for k, title in enumerate(("clean", f"attacked, eps {255 * eps:g}/255", f"difference x {magnify} (grey: none)")):
        fig.text(20 + k * (side + 20), 26, title, "ls", 12)
    for i, (a, b, words) in enumerate(zip(x.cpu(), x_adv.cpu(), captions)):
        for k, picture in enumerate((a, b, 0.5 + magnify * (b - a))):
            left, top = 20 + k * (side + 20), 40 + i * (side + 34)
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            fig.paste(Image.fromarray(pixels), left, top, side, side)
            if k < 2:
                fig.text(left, top + side + 5, words[k], "la", 11)
    return fig


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("activations", help="every curve and its derivative (SAT Figs. 1 and 2)")
    c.set_defaults(run=activations)
    c = commands.add_parser("curves", help="loss and accuracies of runs over their epochs")
    c.set_defaults(run=curves)
    c.add_argument("outs", nargs="+", help="folders of runs")
    c = commands.add_parser("scatter", help="accuracy against robustness (SAT Figs. 3 and 4)")
    c.set_defaults(run=scatter)
    c.add_argument("reports", nargs="+", help="what evaluate.py --json wrote")
    for c in commands.choices.values():
        c.add_argument("--png", help="the picture; default: in the run's folder")
        c.add_argument("--scale", type=float, default=1, help="pixels a unit of the picture: 2 is twice as sharp")
    return p.parse_args(argv)


def main():
    args = get_args()
    args.run(args)


if __name__ == "__main__":
    main()
