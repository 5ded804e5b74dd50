"""
Doubt a robustness number, compare runs, measure what they cost, draw figures (SAT, arXiv:2006.14536).

Can a robustness number be trusted? The checks of SAT Sec. 6 and more, each with a verdict:
$ python sanity.py report --out out
Is an idea better than its baseline? Runs of several seeds, in pairs:
$ python sanity.py compare out/silu-0 out/silu-1 out/silu-2 --against out/relu-0 out/relu-1 out/relu-2
All runs below a folder, the newest report of each attack on them:
$ python sanity.py table out
What do a step and a whole run cost on this machine? With train.py's flags:
$ python sanity.py cost --data shapes
The figures:
$ python sanity.py landscape --out out/silu --against out/relu  # the loss around images, Fig. 5
$ python sanity.py gallery --out out  # images before and after the attack
$ python sanity.py activations  # the curves and their slopes, Figs. 1 and 2
$ python sanity.py curves out/relu out/silu  # runs over their epochs
$ python sanity.py scatter out/*/eval/*.json  # clean and robust accuracy of many nets, Figs. 3 and 4
$ python sanity.py forest silu.json elu.json  # the results of several `compare --json`

`report` exits with 1 if a doubt FAILs or it cannot run, else with 3 if one is UNSURE, else with 0.

Keys: SAT is the paper. CA is Carlini et al. 2019 (arXiv:1902.06705), whose advice SAT Sec. 6 follows.
"""
import argparse
import itertools
import json
import math
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import train
from activations import ACTIVATIONS, make_act
from attacks import (autoattack, cross_entropy, input_gradient, pgd, pgd_search, predict, random_start,
                     uniform)
from data import duration, say, show
from evaluate import wilson
from models import load_file, on_device, weights_hash
from train import device_name, need, open_device, write_json

# A trained net and its images

BATCH = 100  # images attacked at a time


@torch.no_grad()
def logits_of(net, x):
    return net(x).float()


def search(net, index, x, y, eps, step_size, steps, restarts=1, seed=0):
    """`pgd_search`, where an image stops at the first iterate that fools -> x_adv, its report.

    eps and step_size in 1/255. x_adv is x where no iterate fools.
    """
    return pgd_search(net, x, y, eps=eps / 255, step_size=step_size / 255, steps=steps, index=index,
                      restarts=restarts, seed=seed)


def last_iterates(net, index, x, y, eps, step_size, steps):
    """PGD from the same starts, all steps for every image; eps and step_size in 1/255 -> x_adv."""
    noise = random_start(x, eps / 255, seed=0, index=index)
    return pgd(net, x, y, eps=eps / 255, step_size=step_size / 255, steps=steps, noise=noise)


def open_run(args, limit):
    """The trained net that the flags name, and its test images -> a namespace.

    Adds to the namespace of `evaluate.find_run`: device, images, net; batches of (index, x, y) with n
    images in all (--limit, or else `limit`); eps, step_size in 1/255; steps; out, the weights' folder.
    """
    train.warn_small_eps(args)
    run = evaluate.find_run(args)
    run.out = run.weights.parent
    run.device, _, _ = open_device(args.device)
    show(f"loading {run.data}")
    run.images = data.load(run.data, run.data_dir, train=False, res=run.res, classes=run.classes,
                           device=run.device)
    run.net = evaluate.open_net(run, len(run.images.classes), run.device)
    members = data.subset(run.images.n, args.limit or limit)
    workers = data.loader_workers(None, run.images, 1)
    run.n = len(members)
    run.batches = data.eval_batches(run.images, members, BATCH, workers=workers, device=run.device)

    data_set = data.DATA_SETS[run.data]
    run.eps = data_set.eps if args.eps is None else args.eps
    run.step_size = data_set.step_size if args.step_size is None else args.step_size
    run.steps = data_set.steps
    need(run.eps > 0 and run.step_size > 0,
         f"--eps {run.eps:g} --step-size {run.step_size:g} attack nothing; use more than 0")
    return run


def other_net(path, run):
    """The net in another run's folder, or in a file of weights, to be used on the images of `run`."""
    path = Path(path)
    args_path = (path if path.is_dir() else path.parent) / "args.json"
    flags = {}
    if args_path.exists():
        classes = train.read_json(args_path).get("classes")
        if classes is not None:
            need(classes == run.images.classes,
                 f"{path} was trained on other classes than {run.weights}; give a net of the same data")
    else:  # a file that does not name its network: assume that of `run`
        for name in evaluate.NETWORK_FLAGS:
            flags[name] = getattr(run, name)
    with train.exit_on_value_error():
        return evaluate.load(path, run.device, num_classes=len(run.images.classes), **flags)


# A doubt is a claim about a share of images. It gets a verdict only if the whole 95% interval of that
# share is on one side of a bound: 0 of 100 bad images do not yet show "at most 2%"

LEAST = 20  # with fewer images the verdict is UNSURE: Wilson's interval is rough there


def judge(n_bad, n, warn, fail):
    """n_bad of n images are bad -> PASS up to `warn`, WARN above it, FAIL above `fail`.

    SKIP if there is no image, UNSURE if the interval contains `warn`. With more images, a WARN may
    become a FAIL.
    """
    if n == 0:
        return "SKIP"
    if n < LEAST:
        return "UNSURE"
    low, high = wilson(n_bad, n)
    if low > fail:
        return "FAIL"
    if low > warn:
        return "WARN"
    if high <= warn:
        return "PASS"
    return "UNSURE"


class Doubt(NamedTuple):
    """A claim that some share of images is small, or large."""

    what: str
    bound: str  # "at most" or "at least" `warn`
    warn: float
    fail: float
    why: str  # why it matters
    skip: str = "no image is right"  # the reason, where there is no image to judge

    def judged(self, hit):
        """hit (n,) bool, is the image one of the share? -> a row of the report."""
        n = len(hit)
        n_hit = int(hit.sum())
        if self.bound == "at most":
            verdict = judge(n_hit, n, self.warn, self.fail)
        else:
            verdict = judge(n - n_hit, n, 1 - self.warn, 1 - self.fail)
        measured = f"{n_hit / n:.1%} of {n}" if n > 0 else "-"
        return dict(verdict=verdict, what=self.what, measured=measured, n=n, n_hit=n_hit,
                    wanted=f"{self.bound} {100 * self.warn:.3g}%",
                    why=self.skip if verdict == "SKIP" else self.why)


class Curve(NamedTuple):
    """Shares of all images at several marks, without a verdict."""

    what: str
    marks: tuple

    def judged(self, hit):
        """hit (n, marks) bool -> a row of the report."""
        shares = hit.float().mean(0).tolist()
        texts = [f"{mark}: {share:.1%}" for mark, share in zip(self.marks, shares)]
        return dict(verdict="", what=self.what, measured=", ".join(texts), wanted="", why="")


# The doubts about one batch, by topic. Their bounds are our judgement: the robust net of
# results/shapes-report.log is within them, the overfitted one of results/shapes-early-stop-report.log
# is not. hit[which] is a share of the images `which` alone, such as those that the net gets right

STEPS = 200  # of the PGD that is doubted
MARKS = (0, 1, 5, 10, 20, 50, 100, STEPS)  # iterations to report
RADII = (1, 2, 4, 8, 16, 32, 64)  # eps in 1/255 to report
RADII_STEPS = 20


def doubts_about_the_model(net, x, y):
    """Is the net a classifier whose gradient an attack can follow?"""
    logits = logits_of(net, x)
    again = logits_of(net, x)
    right = predict(logits) == y
    chance = 1 / logits.shape[1]
    quarter = chance + (1 - chance) / 4  # of the way from chance to 100%
    eighth = chance + (1 - chance) / 8
    yield right, Doubt(
        "right on clean images", "at least", warn=quarter, fail=eighth,
        why="guessing leaves nothing to attack")

    largest = logits.abs().amax(1)
    difference = (again - logits).abs().amax(1)
    drift = difference > 1e-4 * largest
    yield drift, Doubt(
        "two calls differ", "at most", warn=0.02, fail=0.1, why="a random net hides its gradient")
    not_finite = ~logits.isfinite().all(1)
    is_positive = logits.amin(1) >= 0
    from_one = (logits.sum(1) - 1).abs()
    is_softmax = is_positive & (from_one < 1e-4)
    yield not_finite | is_softmax, Doubt(
        "outputs are not logits", "at most", warn=0.02, fail=0.1,
        why="NaN, or a softmax, which flattens the loss")

    def loss(logits):
        return cross_entropy(logits, y)

    _, grad = input_gradient(net, x, loss)
    share_of_zeros = (grad == 0).flatten(1).float().mean(1)
    has_zeros = share_of_zeros > 0.05
    yield has_zeros[right], Doubt(
        "zeros in the input gradient", "at most", warn=0.03, fail=0.1,
        why="saturated or rounded: PGD sees nothing")


def doubts_about_iterations(run, index, x, y, x_adv, report):
    """Do more steps fool more images (SAT Sec. 6), until PGD converges? x_adv, report: of PGD-200."""
    right = report["clean"] == y
    robust = report["robust"]  # right, and never fooled
    step = report["step"]  # of the iterate that fools; -1 if none does

    def withstands(k):
        """Which images PGD-k, the first k of these steps, does not fool, (N,) bool."""
        return right & (robust | (step > k))

    by_noise = step == 0
    yield by_noise[right], Doubt(
        "fooled by noise", "at most", warn=0.1, fail=0.3, why="a random start is no attack")
    by_steps = step > 0
    yield by_steps[withstands(0)], Doubt(
        f"fooled by steps 1 to {STEPS}", "at least", warn=0.05, fail=0.02,
        why="PGD is blind", skip="no image is right after noise")
    yield torch.stack([withstands(k) for k in MARKS], 1), Curve("robust after steps", MARKS)
    late = step > 100
    yield late, Doubt(
        f"fooled by steps 101 to {STEPS}", "at most", warn=0.03, fail=0.1, why="PGD has not converged")
    yield robust, Doubt("robust", "at least", warn=0.1, fail=0.05, why="there is no robustness to doubt")

    fooled = right & ~robust
    rounded = (255 * x_adv[fooled]).round() / 255
    guesses = predict(logits_of(run.net, rounded))
    still_wrong = guesses != y[fooled]
    yield still_wrong, Doubt(  # fail=0: it never FAILs
        "fooled by 8-bit pictures too", "at least", warn=0.85, fail=0,
        why="saved as files, x_adv is rounded", skip="no image is fooled")

    # One step from a random start, as in training (SAT Sec. 3.1)
    _, once = search(run.net, index, x, y, eps=run.eps, step_size=run.eps, steps=1)
    by_one_only = ~once["robust"] & withstands(50)
    yield by_one_only[right], Doubt(
        "PGD-1 fools, PGD-50 does not", "at most", warn=0.03, fail=0.1, why="masked gradients")
    yield withstands(50)[once["robust"]], Doubt(
        "withstands PGD-1, PGD-50 too", "at least", warn=0.5, fail=0.25,
        why="overfit to one step", skip="no image withstands PGD-1")


def doubts_about_the_radius(run, index, x, y, right):
    """Is no image robust at a huge eps (SAT Sec. 6)?"""
    columns = []
    for eps in RADII:
        # Steps add up to at least 2.5 radii (Madry et al. 2018); none is shorter than 1/255
        step_size = max(1, 2.5 * eps / RADII_STEPS)
        _, report = search(run.net, index, x, y, eps=eps, step_size=step_size, steps=RADII_STEPS)
        columns.append(report["robust"])
    yield columns[-1][right], Doubt(
        f"robust at eps {RADII[-1]}", "at most", warn=0.05, fail=0.15, why="such noise drowns the image")
    yield torch.stack(columns, 1), Curve(f"robust to PGD-{RADII_STEPS} at eps", RADII)


def doubts_from_other_attacks(run, index, x, y, robust):
    """Do other attacks find what PGD has missed (CA)? robust (N,) bool: to PGD-200.

    Only robust images are attacked, but shares are of all images: 1% is one point of robust accuracy.
    """
    def of_all(hit):
        """hit, one bool for each robust image -> (N,) bool."""
        whole = torch.zeros_like(robust)
        whole[robust] = hit
        return whole

    _, again = search(run.net, index[robust], x[robust], y[robust], eps=run.eps,
                      step_size=run.step_size, steps=20, restarts=4, seed=1)
    yield of_all(~again["robust"]), Doubt(
        "robust, but not to 4 restarts", "at most", warn=0.03, fail=0.1, why="PGD depends on luck")

    _, report = autoattack(
        run.net, x[robust], y[robust], eps=run.eps / 255, index=index[robust],
        attacks=("apgd-ce", "square"), queries=1000)  # 5,000 by default; 1,000 find masked gradients
    fooled_by = report["fooled_by"]  # for each image an attack's name, or None
    by_apgd = torch.tensor([name == "apgd-ce" for name in fooled_by], dtype=torch.bool, device=y.device)
    by_square = torch.tensor([name == "square" for name in fooled_by], dtype=torch.bool, device=y.device)
    yield of_all(by_apgd), Doubt(
        "robust, but not to APGD-CE", "at most", warn=0.05, fail=0.15,
        why="PGD stops short; quote AutoAttack")
    yield of_all(by_square), Doubt(
        "robust to both, not to Square", "at most", warn=0.03, fail=0.1,
        why="needs no gradient, yet wins: masked")


def doubts_from_other_nets(run, index, x, y, robust, surrogate, normal):
    """Does a second net's attack find what PGD has missed, and does PGD fool a normal net (CA)?"""
    fooled = robust[:0]  # empty, so the verdict is SKIP
    if surrogate is not None:
        x_adv = last_iterates(surrogate, index, x, y, eps=run.eps, step_size=run.step_size, steps=50)
        fooled = robust & (predict(logits_of(run.net, x_adv)) != y)
    yield fooled, Doubt(
        "robust, but not to transfer", "at most", warn=0.03, fail=0.1,
        why="the net masks its own gradient", skip="--surrogate names no second net")

    withstands = robust[:0]
    if normal is not None:
        _, report = search(normal, index, x, y, eps=run.eps, step_size=run.step_size, steps=50)
        withstands = report["robust"][report["clean"] == y]
    yield withstands, Doubt(
        "a normal net is robust", "at most", warn=0.05, fail=0.15,
        why="PGD is too weak", skip="--normal names no normally trained net")


def doubts_about_the_path(run, index, x, y, right):
    """Does the loss rise all the way from an image to what PGD makes of it?"""
    x_adv = last_iterates(run.net, index, x, y, eps=run.eps, step_size=run.step_size, steps=10)
    losses = []
    for t in (0, 0.25, 0.5, 0.75, 1):
        between = x.lerp(x_adv, t)
        losses.append(cross_entropy(logits_of(run.net, between), y))
    slopes = torch.stack(losses).diff(dim=0)
    rises = (slopes > 0).all(0)
    yield rises[right], Doubt(
        "loss rises all the way to x_adv", "at least", warn=0.75, fail=0.5,
        why="else gradients lead nowhere")


def doubts_about_a_batch(run, index, x, y, surrogate, normal):
    """Every doubt about run.net -> pairs (its hit in this batch, the Doubt or Curve)."""
    x_adv, report = search(run.net, index, x, y, eps=run.eps, step_size=run.step_size, steps=STEPS)
    right = report["clean"] == y
    robust = report["robust"]
    yield from doubts_about_the_model(run.net, x, y)
    yield from doubts_about_iterations(run, index, x, y, x_adv, report)
    yield from doubts_about_the_radius(run, index, x, y, right)
    yield from doubts_from_other_attacks(run, index, x, y, robust)
    yield from doubts_from_other_nets(run, index, x, y, robust, surrogate, normal)
    yield from doubts_about_the_path(run, index, x, y, right)


def all_doubts(run, surrogate=None, normal=None):
    """Every doubt about run.net on run.batches -> the rows of the report."""
    began = time.monotonic()
    hits = {}  # of each doubt: its hit in every batch
    n_done = 0
    for index, x, y in run.batches:
        for hit, doubt in doubts_about_a_batch(run, index, x, y, surrogate, normal):
            hits.setdefault(doubt, []).append(hit)
            show(f"{n_done} of {run.n} images, {doubt.what} | {duration(time.monotonic() - began)}")
        n_done += len(y)
    return [doubt.judged(torch.cat(batches)) for doubt, batches in hits.items()]


def report(args):
    """All doubts about one net as verdicts, a line each. Exits with 1 on a FAIL, else 3 on an UNSURE."""
    run = open_run(args, limit=256)
    began = time.monotonic()
    surrogate = other_net(args.surrogate, run) if args.surrogate else None
    normal = other_net(args.normal, run) if args.normal else None

    say(f"{run.weights} ({weights_hash(run.net.state_dict())}): {run.arch} {run.act}, {run.n} of the "
        f"{run.images.n} images of {run.data}, eps {run.eps:g}, step {run.step_size:g}")
    rows = all_doubts(run, surrogate, normal)
    say(f"{'verdict':<7} {'doubt':<32} {'measured':<15} {'wanted':<15} why it matters")
    for row in rows:
        line = "{verdict:<7} {what:<32} {measured:<15} {wanted:<15} {why}".format(**row)
        say(line.rstrip())
    verdicts = [row["verdict"] for row in rows]
    counts = [f"{verdicts.count(name)} {name}" for name in ("PASS", "WARN", "FAIL", "UNSURE", "SKIP")]
    say(f"{', '.join(counts)}; {duration(time.monotonic() - began)}")
    if "UNSURE" in verdicts:
        say("UNSURE: more images, with --limit, may settle it")
    if "FAIL" in verdicts:
        raise SystemExit(1)
    if "UNSURE" in verdicts:
        raise SystemExit(3)  # argparse exits with 2


# What runs have written: reports and logs

# Fields of a report. SETTING: the attack's; runs are compared only where these are equal
SETTING = ("attack", "eps", "step_size", "steps", "restarts", "last_iterate", "seed", "smooth_backward",
           "dtype")
NETWORK = ("arch", "act", "act_alpha", "res")  # in the run's args.json too, with the same values
# A JSON file without all of these is no report
IN_REPORTS = {*SETTING, *NETWORK, "n", "n_correct", "n_robust", "hash", "ledger", "images", "code",
              "train"}


def time_of(path):
    return path.stat().st_mtime if path.exists() else 0


def read_reports(paths):
    """Reports of evaluate.py -> [(path, namespace)], oldest first. Other files are left out and named.

    In a run's folder a report counts only if it is about that run: the network of its args.json and the
    weights of its model.pt or, where that is missing, as below results/, of its newest report.
    """
    found = []
    hashes = {}  # of the weights that the reports of a folder should be about
    for path in sorted(map(Path, paths), key=time_of, reverse=True):  # newest first
        args_path = path.parent.parent / "args.json"
        model = path.parent.parent / "model.pt"
        try:
            content = train.read_json(path)
            need(IN_REPORTS <= content.keys(), f"{path} is no report of evaluate.py")
            report = SimpleNamespace(**content)
            if args_path.exists():
                saved = train.read_json(args_path)
                for name in NETWORK:
                    need(content[name] == saved.get(name),
                         f"{path} is about {name} {content[name]}, the run has {saved.get(name)}")
                if path.parent not in hashes:
                    # eval/ is about model.pt; eval-NAME/ is about another file of weights
                    if path.parent.name == "eval" and model.exists():
                        hashes[path.parent] = weights_hash(load_file(model))
                    else:
                        hashes[path.parent] = report.hash  # the newest report's
                need(report.hash == hashes[path.parent],
                     f"{path} is about other weights than {model}, or than newer reports there")
        except (SystemExit, ValueError) as reason:  # SystemExit: a `need` above, or read_json
            say(f"left out: {reason}")
        else:
            found.append((path, report))
    return found[::-1]


def setting_name(report):
    """A report's attack in words; its seed and the like only where they are not the default."""
    words = [report.attack, f"eps {report.eps:g}"]
    if report.attack == "pgd":
        words = [f"PGD-{report.steps}", f"eps {report.eps:g}", f"step {report.step_size:g}"]
    if report.restarts not in (None, 1):
        words.append(f"{report.restarts} restarts")
    if report.last_iterate:
        words.append("last iterate")
    if report.seed != 0:
        words.append(f"seed {report.seed}")
    if report.smooth_backward != "none":
        words.append("smooth backward")
    if report.dtype != "fp32":
        words.append(report.dtype)
    return ", ".join(words)


def percent(k, n):
    """k of n -> the low end of its 95% interval, its share, the high end, in percent."""
    low, high = wilson(k, n)
    return 100 * low, 100 * k / n, 100 * high


def curve_name(report):
    """The activation, and its alpha where it was chosen."""
    alpha = "" if report.act_alpha is None else f" alpha {report.act_alpha:g}"
    return f"{report.act}{alpha}"


def table(args):
    """A row for each run below some folders and each attack on it, from the newest report."""
    paths = []
    for folder in args.folders:
        paths += Path(folder).rglob("eval/*.json")
        for args_path in sorted(Path(folder).rglob("args.json")):
            if not any(args_path.parent.glob("eval/*.json")):
                say(f"left out: {args_path.parent} has no report; run python evaluate.py --out "
                    f"{args_path.parent}")
    newest = {}
    for path, report in read_reports(paths):
        newest[path.parent.parent, setting_name(report)] = report  # the last counts
    need(newest, f"no report below {' '.join(args.folders)}; run python evaluate.py --out RUN")
    say(f"{'activation':<20}{'network':<17}{'seed':>4}{'clean':>7}{'robust':>8}{'n':>7}   "
        f"{'95% interval':<16}{'attack':<42}run")
    for (folder, attack), report in sorted(newest.items()):
        seed = report.train["seed"] if report.train else "-"
        _, clean, _ = percent(report.n_correct, report.n)
        low, robust, high = percent(report.n_robust, report.n)
        interval = f"{low:.2f} to {high:.2f}"
        say(f"{curve_name(report):<20}{report.arch:<17}{seed:>4}{clean:7.2f}{robust:8.2f}"
            f"{report.n:7}   {interval:<16}{attack:<42}{folder}")


def read_log(folder):
    """The lines of a run's log.jsonl, without an unfinished last one: a run may be writing it."""
    path = Path(folder) / "log.jsonl"
    lines = []
    try:
        for text in path.read_text().split("\n")[:-1]:
            line = json.loads(text)
            need("kind" in line, f"{path} is damaged: it holds {text}")
            lines.append(line)
    except (OSError, ValueError, TypeError) as reason:
        raise SystemExit(f"{path} is no log ({reason}); give folders that train.py wrote")
    return lines


def points_of(lines, kind, field, unit):
    """A log's field -> its points (epoch, value). Of an epoch that a resumed run repeats, the last."""
    values = {}
    for line in lines:
        if line["kind"] == kind and math.isfinite(line[field]):
            values[line["epoch"]] = unit * line[field]
    return sorted(values.items())


# An idea against its baseline, in pairs

Z = 1.959964  # 97.5% of a normal distribution lie below


@cache
def student_t(n_free):
    """97.5% of Student's t with n_free degrees of freedom lie below this.

    With t = sqrt(n_free) tan(angle), the angle has the density cos(angle)^(n_free - 1). Only angles >= 0
    are summed: 95% of that half is 97.5% of the whole.
    """
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (n_free - 1)
    trapezia = (density[1:] + density[:-1]) / 2
    share = np.append(0, trapezia.cumsum()) / trapezia.sum()
    return math.sqrt(n_free) * math.tan(np.interp(0.95, share, angle))


def interval_of_two_nets(new, old):
    """Two networks' verdicts on the same images, (N,) bool -> 95% interval of their difference.

    Wald's interval for paired proportions, with half an image added to each of the four cells: both,
    only new, only old, neither (Agresti & Min 2005). It is about other images, not other networks.
    """
    n = len(new) + 2
    only_new = (new & ~old).sum() + 0.5
    only_old = (old & ~new).sum() + 0.5
    difference = (only_new - only_old) / n
    variance = (only_new + only_old) / n - difference**2
    half = Z * math.sqrt(variance / n)
    return difference - half, difference + half


def interval_of_seeds(new, old):
    """Verdicts of S >= 2 seeds of both methods on N images, (S, N) bool -> 95% interval.

    Seeds and images are both random samples: the interval is about other seeds and other images. The
    difference of seed s on image i is delta + seed_s + image_i + rest_si, and its mean has the variance
        (var seed + var rest / N) / S + var image / N.
    Estimates (Searle, Casella & McCulloch 1992): the seeds' means have the variance var seed +
    var rest / N, the images' means var image + var rest / S, and what remains without both var rest.
    """
    difference = new.astype(float) - old.astype(float)
    n_seeds, n_images = difference.shape
    mean = difference.mean()
    seed_means = difference.mean(axis=1)  # (S,)
    image_means = difference.mean(axis=0)  # (N,)
    rest = difference - seed_means[:, None] - image_means + mean
    n_free = (n_seeds - 1) * (n_images - 1)
    rest_variance = np.square(rest).sum() / n_free
    image_variance = max(0.0, image_means.var(ddof=1) - rest_variance / n_seeds)
    # Student's t for the seeds, which are few; the normal distribution for the images. Half-widths of
    # independent parts add in squares (Howe 1974, JASA 69; MOVER in Zou & Donner 2008, Stat. Med. 27)
    seed_variance = seed_means.var(ddof=1)
    seeds_half = student_t(n_seeds - 1) * math.sqrt(seed_variance / n_seeds)
    images_half = Z * math.sqrt(image_variance / n_images)
    half = math.hypot(seeds_half, images_half)
    return mean - half, mean + half


def compare_verdicts(new, old):
    """Verdicts of both sides, (S, N) bool, seed beside seed -> a row of the table.

    Accuracies and their difference are in percent; only_new and only_old: numbers of images per seed.
    """
    n_seeds, n_images = new.shape
    if n_seeds == 1:
        low, high = interval_of_two_nets(new[0], old[0])
    else:
        low, high = interval_of_seeds(new, old)
    verdict = "undecided"
    if low > 0:
        verdict = "higher"
    elif high < 0:
        verdict = "lower"
    shares = dict(new=new.mean(), old=old.mean(), low=low, high=high, difference=new.mean() - old.mean())
    row = {name: 100 * share for name, share in shares.items()}
    only_new = (new & ~old).sum() / n_seeds
    only_old = (old & ~new).sum() / n_seeds
    return dict(row, only_new=only_new, only_old=only_old, n=n_images, verdict=verdict)


def read_run(folder):
    """A run's folder -> namespace: folder, args, and its newest report of every setting, reports."""
    folder = Path(folder)
    args = train.read_json(folder / "args.json")
    reports = {}
    for path, report in read_reports((folder / "eval").glob("*.json")):
        setting = tuple(getattr(report, name) for name in SETTING)
        if setting in reports:
            say(f"warning: {folder} has several reports of {setting_name(report)}; the newest counts")
        reports[setting] = report
    need(reports, f"no report in {folder / 'eval'}; run python evaluate.py --out {folder}")
    return SimpleNamespace(folder=folder, args=args, reports=reports)


def match_seeds(new, old):
    """Runs of both sides -> [(new run, old run)], paired by seed; a single pair need not share it."""
    if len(new) == len(old) == 1:
        return [(new[0], old[0])]
    new_seeds = {run.args.get("seed"): run for run in new}
    old_seeds = {run.args.get("seed"): run for run in old}
    need(len(new_seeds) == len(new), "NEW has a seed twice; give one run of each seed")
    need(len(old_seeds) == len(old), "--against has a seed twice; give one run of each seed")
    shared = sorted(new_seeds.keys() & old_seeds.keys())
    need(shared, f"no seed is on both sides: NEW has {list(new_seeds)}, --against has "
         f"{list(old_seeds)}; train both sides with the same --seed")
    alone = sorted(new_seeds.keys() ^ old_seeds.keys())
    if alone:
        say(f"warning: seeds {', '.join(map(str, alone))} are on one side only and left out")
    return [(new_seeds[seed], old_seeds[seed]) for seed in shared]


def shared_settings(runs):
    """The settings that all runs have a report of; others are named. SystemExit if there is none."""
    shared = []
    for setting in dict.fromkeys(setting for run in runs for setting in run.reports):
        without = [str(run.folder) for run in runs if setting not in run.reports]
        if without:
            name = setting_name(SimpleNamespace(**dict(zip(SETTING, setting))))
            say(f"left out: {name}, which was not run on {', '.join(without)}")
        else:
            shared.append(setting)
    need(shared, "no attack was run on all of them; run evaluate.py on each with the same flags")
    return shared


def verdicts_of(lines):
    """Ledger lines of N images -> {what: (N,) bool}; those of --last-iterate have both protocols."""
    clean = np.array([line["clean"] == line["label"] for line in lines])
    if "robust_at" not in lines[0]:
        robust = np.array([line["fooled"] is None for line in lines])
        return {"clean": clean, "robust": clean & robust}
    # A digit per iterate, 1 where it does not fool. In SAT's protocol the last one decides alone, even
    # for an image that is wrong when clean
    last = np.array([line["robust_at"].endswith("1") for line in lines])
    every = np.array(["0" not in line["robust_at"] for line in lines])
    return {"clean": clean, "robust (last iterate)": last, "robust (every iterate)": clean & every}


def compare_setting(pairs, setting):
    """One attack, all pairs of runs -> rows of the table. SystemExit for different images."""
    runs = [run for pair in pairs for run in pair]
    name = setting_name(runs[0].reports[setting])
    reports = [run.reports[setting] for run in runs]
    images = {report.images for report in reports}
    need(len(images) == 1, f"{name}: the runs were measured on different images; run evaluate.py on all "
         "with the same --data, --data-dir and --res")
    codes = {report.code for report in reports}
    if len(codes) > 1:
        say(f"warning: {name}: measured by different versions of the code; run evaluate.py on all again")

    ledgers = {}
    for run in runs:
        ledger = run.reports[setting].ledger
        ledgers[run.folder], _ = evaluate.read_ledger(run.folder / "eval", ledger)
        need(ledgers[run.folder], f"the ledger {run.folder / 'eval' / ledger}.*.jsonl is missing or "
             "empty; run evaluate.py again")
    numbers = sorted(set.intersection(*map(set, ledgers.values())))
    n_most = max(map(len, ledgers.values()))
    need(len(numbers) > 1, f"{name}: the runs have {len(numbers)} images in common; run evaluate.py on "
         "all with the same --limit")
    if len(numbers) < n_most:
        say(f"warning: {name}: {len(numbers)} of {n_most} images are in all ledgers; the rest is unused")

    verdicts = {}  # of each run: {what: (N,) bool}
    for folder, lines in ledgers.items():
        verdicts[folder] = verdicts_of([lines[number] for number in numbers])
    rows = []
    for what in verdicts[runs[0].folder]:
        new = np.stack([verdicts[run.folder][what] for run, _ in pairs])
        old = np.stack([verdicts[run.folder][what] for _, run in pairs])
        rows.append(SimpleNamespace(setting=name, what=what, **compare_verdicts(new, old)))
    return rows


def last_value(run, field, unit):
    """A field of a run's log in its last epoch."""
    _, value = points_of(read_log(run.folder), "epoch", field, unit)[-1]
    return value


def compare_training(pairs):
    """The mean training loss and error (%) of both sides in the last epoch -> rows."""
    rows = []
    for what, unit in (("loss", 1), ("error", 100)):
        new = np.mean([last_value(run, what, unit) for run, _ in pairs])
        old = np.mean([last_value(run, what, unit) for _, run in pairs])
        rows.append(SimpleNamespace(what=what, new=new, old=old, difference=new - old))
    return rows


def flags_that_differ(pairs):
    """The flags of training that are not the same in all runs -> ["act: silu | relu"]."""
    # Flags that may differ between two runs of one method. --init is in train.FREE, but matters here
    ignored = {*train.FREE, "seed", "commit", "processes", "python", "torch", "torchvision"} - {"init"}
    names = {name for pair in pairs for run in pair for name in run.args} - ignored
    differ = []
    for name in sorted(names):
        new = sorted({str(run.args.get(name)) for run, _ in pairs})
        old = sorted({str(run.args.get(name)) for _, run in pairs})
        if new != old or len(new) > 1:
            differ.append(f"{name}: {', '.join(new)} | {', '.join(old)}")
    return differ


def compare(args):
    """Runs of an idea against runs of its baseline: differences in accuracy with 95% intervals."""
    evaluate.check_json(args.json)
    new = [read_run(folder) for folder in args.new]
    old = [read_run(folder) for folder in args.against]
    pairs = match_seeds(new, old)
    settings = shared_settings([run for pair in pairs for run in pair])
    rows = []
    for setting in settings:
        rows += compare_setting(pairs, setting)
    training = compare_training(pairs)

    new_folders = [str(run.folder) for run, _ in pairs]
    old_folders = [str(run.folder) for _, run in pairs]
    say(f"new: {', '.join(new_folders)}")
    say(f"old: {', '.join(old_folders)}")
    for text in flags_that_differ(pairs):
        say(f"{text}  (new | old)")
    seeds = [run.args.get("seed") for run, _ in pairs]
    if len(pairs) == 1:
        about = "one network a side: the intervals are about these two networks, not about the method"
    else:
        about = (f"{len(pairs)} pairs matched by seed ({', '.join(map(str, seeds))}): the intervals are "
                 "about the method, seeds and images both vary")
    say(about)

    setting = None
    for row in rows:
        if row.setting != setting:
            setting = row.setting
            say(f"\n{setting}; {row.n} images; accuracies in percent, only new and only old in images "
                "per seed")
            say(f"  {'':<23}{'new':>7}{'old':>7}{'new - old':>11}{'95% interval':>18}{'only new':>10}"
                f"{'only old':>10}  verdict")
        interval = f"{row.low:+.2f} to {row.high:+.2f}"
        say(f"  {row.what:<23}{row.new:7.2f}{row.old:7.2f}{row.difference:+11.2f}"
            f"{interval:>18}{row.only_new:10.1f}{row.only_old:10.1f}  {row.verdict}")
    say("\ntraining, its last epoch; error in percent; both under the attack if there was one")
    for row in training:
        say(f"  {row.what:<23}{row.new:7.3f}{row.old:7.3f}{row.difference:+11.3f}")

    if args.json:
        found = dict(new=new_folders, old=old_folders, seeds=seeds, about=about)
        found["comparisons"] = [vars(row) for row in rows]
        found["training"] = [vars(row) for row in training]
        write_json(Path(args.json), found)


# What a training step and a whole run cost

IMAGENET_IMAGES = 1281167
N_WARMUPS = 4  # the first steps are slow: they allocate, tune and compile


def clock(device):
    """The time in seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training_step(flags, n_classes, x, y):
    """A function of no arguments: one step of train.py with these flags on the batch x, y."""
    torch.manual_seed(0)
    with train.exit_on_value_error():
        net = on_device(train.network(flags, n_classes), x.device)
        attack_model, train_model, _ = train.make_views(net, flags, x.device)
    optimizer, scaler = train.make_optimizer(flags, net, x.device)
    return partial(train.update, flags, attack_model, train_model, optimizer, scaler, x, y)


def warm_up(step, device):
    """Take the first steps -> the GPU memory of a step beside the weights, in GiB; "-" on a CPU."""
    torch.cuda.empty_cache()
    bytes_before = torch.cuda.memory_reserved()
    for _ in range(N_WARMUPS):
        step()
    if device.type != "cuda":
        return "-"
    torch.cuda.empty_cache()  # drop what only the first steps needed
    torch.cuda.reset_peak_memory_stats()
    step()
    # max_memory_allocated would miss the memory of CUDA graphs
    n_bytes = torch.cuda.max_memory_reserved() - bytes_before
    return f"{n_bytes / 2**30:.1f}"


def forward_flops(flags, n_classes):
    """Floating-point operations of one image's forward pass, counted on the meta device."""
    with torch.device("meta"):
        net = train.network(flags, n_classes)
        x = torch.empty(2, 3, flags.res, flags.res)  # BatchNorm wants more than one value
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() / 2


def size_of_data(flags):
    """The number of training images and of classes. ImageNet's are known where it is not installed."""
    try:
        images = data.load(flags.data, flags.data_dir, train=True, res=flags.res)
    except SystemExit:
        if flags.data != "imagenet" or flags.data_dir is not None:
            raise
        say(f"no images in data/imagenet; assuming the {IMAGENET_IMAGES} training images of ImageNet")
        return IMAGENET_IMAGES, 1000
    return images.n, len(images.classes)


def time_in_turns(steps, n_rounds, device):
    """{row: step} -> {row: median seconds}. In turns, so that other work slows all of them alike."""
    seconds = {row: [] for row in steps}
    for number in range(n_rounds):
        for row, step in steps.items():
            show(f"round {number + 1} of {n_rounds}: {row}")
            began = clock(device)
            step()
            seconds[row].append(clock(device) - began)
    return {row: np.median(times) for row, times in seconds.items()}


def cost(args):
    """Time train.py's own step for each activation and number of PGD steps -> what a run costs."""
    flags = args.train
    need(min(args.pgd) >= 0, f"--pgd {min(args.pgd)} is no number of steps; use 0 or more")
    device, _, _ = open_device(flags.device, flags.dtype)
    torch.backends.cudnn.benchmark = True
    # By default torch compiles a function at most 8 times; after that it runs eagerly
    torch._dynamo.config.recompile_limit = 8 * len(args.acts) * len(args.pgd)
    n_images, n_classes = size_of_data(flags)
    members, _ = data.hold_out(n_images, flags.limit, flags.holdout)
    n = args.batch_size or (32 if device.type == "cpu" else 128)
    x = torch.rand(n, 3, flags.res, flags.res, device=device)
    y = torch.arange(n, device=device) % n_classes
    steps = {}  # of each row (activation, PGD steps): a step of training
    gib = {}
    for row in itertools.product(args.acts, args.pgd):
        show(f"first steps of {row}")
        act, pgd_steps = row
        # With the usual lr, many steps on one random batch end at zero loss, or at nan
        own_flags = argparse.Namespace(**vars(flags))
        own_flags.act = act
        own_flags.steps = pgd_steps
        own_flags.lr = 1e-9
        train.check(own_flags, 1)
        steps[row] = training_step(own_flags, n_classes, x, y)
        gib[row] = warm_up(steps[row], device)
    seconds = time_in_turns(steps, args.rounds, device)

    compiled = "compiled" if flags.compile else "not compiled"
    say(f"{flags.arch}, {flags.res} px, {n} images a step, {flags.dtype}, {compiled}, "
        f"{device_name(device)}")
    say("x first: ms/step in units of the first row; GiB: of GPU memory for a step, beside the weights")
    say(f"on 1, 8, 64 such devices: the time of a run of {flags.epochs} epochs of {len(members)} images")
    say("without loading, validation and communication; EFLOPs: its floating-point operations in 1e18")
    say("act         PGD  ms/step   img/s  x first     GiB      on 1      on 8     on 64   EFLOPs")
    first = next(iter(seconds.values()))
    flops = forward_flops(flags, n_classes)
    n_seen = flags.epochs * len(members)
    for (act, pgd_steps), median in seconds.items():
        speed = n / median
        on_1, on_8, on_64 = [duration(n_seen / speed / n_devices) for n_devices in (1, 8, 64)]
        # In forward passes a step of PGD costs 2, forward and back to the image. The update costs 3, as
        # its way back leads to the weights too
        passes = 2 * pgd_steps + 3
        exaflops = passes * flops * n_seen / 1e18
        say(f"{act:<11}{pgd_steps:4}{1e3 * median:9.1f}{speed:8.0f}{median / first:9.2f}"
            f"{gib[act, pgd_steps]:>8}{on_1:>10}{on_8:>10}{on_64:>10}{exaflops:9.3g}")


# Drawing: a figure with its panels, the axes of a panel, its lines

SCALE = 4  # pixels a unit while drawing; save() averages two by two, which makes edges smooth
INK = "#1E1E1E"
GREY = "#6E6E6E"
FAINT = "#E4E4E4"
BLUE = "#0072B2"
ORANGE = "#D55E00"
# Okabe and Ito's colours without the yellow, for all eyes, then three of Paul Tol's and a grey
COLOURS = ("#000000", ORANGE, BLUE, "#009E73", "#56B4E9", "#E69F00", "#CC79A7",
           "#332288", "#999933", "#8C8C8C", "#AA4455")
# Dashes and markers tell curves apart in grey too, and where one lies on another
DASHES = ((14, 4), (2, 4), (6, 6))  # units of ink and gap; the first curve is solid
# Number of corners, turn in degrees, size: disc, square, triangle, diamond
MARKERS = ((40, 0, 1.0), (4, 0, 1.25), (3, 0, 1.4), (4, 45, 1.3))
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def style(i):
    """The colour, dash and marker of the i-th of several curves."""
    colour = COLOURS[i % len(COLOURS)]
    dash = DASHES[i % len(DASHES)] if i > 0 else None
    marker = MARKERS[i % len(MARKERS)]
    return colour, dash, marker


def text_width_of(texts, size=12):
    """The width of the longest text in units."""
    font = ImageFont.load_default(size)
    return math.ceil(max(font.getlength(text) for text in texts))


def dashed(points, ink, gap):
    """A line through points (n, 2) -> its dashes, lists of points one unit apart."""
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    travelled = np.append(0, lengths.cumsum())  # along the line, up to each point
    at = np.arange(travelled[-1])
    x, y = np.transpose(points)
    fine = np.stack([np.interp(at, travelled, x), np.interp(at, travelled, y)], 1)
    return [fine[start:start + ink + 1] for start in range(0, len(fine), ink + gap)]


def pixels_of(points):
    """Points or lengths in units -> one tuple of pixels, as Pillow takes them."""
    pixels = SCALE * np.ravel(points)
    return tuple(pixels.round().astype(int).tolist())


class Figure:
    """A white picture with panels in rows, each width x height units; points are (x, y), y downwards.

    boxes: the panels' (left, top, right, bottom). left, above, below: the room around each; beside: the
    room to the right of all; with `names`, that of their legend.
    """

    def __init__(self, n_panels, n_columns, width, height, names=(), left=60, above=60, below=50,
                 beside=20):
        n_columns = min(n_columns, n_panels)
        n_rows = math.ceil(n_panels / n_columns)
        column = left + width + 10
        row = above + height + below
        self.boxes = []
        for number in range(n_panels):
            x = left + column * (number % n_columns)
            y = above + row * (number // n_columns)
            self.boxes.append((x, y, x + width, y + height))
        self.right = column * n_columns + 20
        self.bottom = max(row * n_rows, 90 + 20 * len(names))
        if names:
            beside = 60 + text_width_of(names)
        self.image = Image.new("RGB", pixels_of((self.right + beside, self.bottom + 20)), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points, colour=INK, width=1, dash=None):
        """A line through points (n, 2)."""
        pieces = [points] if dash is None else dashed(points, *dash)
        for piece in pieces:
            self.pen.line(pixels_of(piece), colour, SCALE * width, joint="curve")

    def marker(self, point, colour, shape=MARKERS[0], radius=4):
        """A marker around a point, with a white halo that separates it from what it covers."""
        n_corners, turn, size = shape
        for reach, fill in ((radius * size + 1.5, "white"), (radius * size, colour)):
            circle = (pixels_of(point), SCALE * reach)
            self.pen.regular_polygon(circle, n_corners, turn, fill)

    def paste(self, pixels, box):
        """uint8 pixels (H, W, 3), stretched over a box."""
        left, top, right, bottom = box
        size = pixels_of((right - left, bottom - top))
        image = Image.fromarray(pixels).resize(size, Image.NEAREST)
        self.image.paste(image, pixels_of((left, top)))

    def text(self, point, words, anchor="ms", size=12, colour=INK):
        """Words at a point; `anchor` as in Pillow: l, m, r, then a (top), m (middle), s (baseline)."""
        font = ImageFont.load_default(SCALE * size)
        self.pen.text(pixels_of(point), words, colour, font, anchor)

    def note(self, words):
        """What a reader has to know, in grey below the panels."""
        self.text((20, self.bottom + 6), words, "ls", 11, GREY)

    def legend(self, names, lines=True, markers=True):
        """The names of styles 0, 1, ... to the right of the panels."""
        for i, name in enumerate(names):
            colour, dash, shape = style(i)
            y = 70 + 20 * i
            if lines:
                self.line([(self.right, y), (self.right + 34, y)], colour, 2, dash)
            if markers:
                self.marker((self.right + 17, y), colour, shape)
            self.text((self.right + 42, y), name, "lm")

    def save(self, path):
        evaluate.make_folder(Path(path).parent)
        self.image.reduce(2).save(path)
        say(f"{path}")


def span(values, least=-math.inf, most=math.inf):
    """The ends of an axis for these values: a little room on both sides, never beyond least and most."""
    low = np.min(values)
    high = np.max(values)
    room = 0.05 * ((high - low) or abs(high) or 1)
    return max(least, low - room), min(most, high + room)


def ticks(ends, most):
    """Round numbers between two ends, about `most` of them: multiples of 1, 2 or 5 times 10^k."""
    low, high = ends
    smallest = (high - low) / most  # a smaller step gives more than `most`
    power = 10.0 ** math.floor(math.log10(smallest))
    steps = [factor * power for factor in (1, 2, 5, 10)]
    step = min(step for step in steps if step >= smallest)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def axes(fig, box, xs, ys, xlabel, ylabel, title, x_marks=None, y_marks=None):
    """Two axes around a box, from xs[0] to xs[1] and from ys[0] to ys[1].

    Their marks {value: words} default to round numbers. -> place(x, y), which turns values into points
    (n, 2) of the figure.
    """
    left, top, right, bottom = box

    def place(x, y):
        across = np.interp(x, xs, (left, right))
        upwards = np.interp(y, ys, (bottom, top))
        return np.stack(np.broadcast_arrays(across, upwards), -1)

    if x_marks is None:
        x_marks = {tick: f"{tick:.6g}" for tick in ticks(xs, (right - left) / 40)}
    if y_marks is None:
        y_marks = {tick: f"{tick:.6g}" for tick in ticks(ys, (bottom - top) / 40)}
    for value, words in x_marks.items():
        x, _ = place(value, ys[0])
        fig.line([(x, top), (x, bottom)], FAINT)
        fig.line([(x, bottom), (x, bottom + 4)])
        fig.text((x, bottom + 8), words, "ma")
    for value, words in y_marks.items():
        _, y = place(xs[0], value)
        fig.line([(left, y), (right, y)], FAINT)
        fig.line([(left - 4, y), (left, y)])
        fig.text((left - 8, y), words, "rm")
    fig.line([(left, top), (left, bottom), (right, bottom)])
    middle = (left + right) / 2
    fig.text((middle, bottom + 28), xlabel, "ma")
    fig.text((left, top - 10), ylabel)
    fig.text((middle, top - 28), title, size=13)
    return place


def plot(fig, box, lines, xs, xlabel, ylabel, title, least=-math.inf, most=math.inf):
    """A panel with one line of points [(x, y), ...] per style; a line may still be empty."""
    heights = [y for line in lines for _, y in line] or [0, 1]
    place = axes(fig, box, xs, span(heights, least, most), xlabel, ylabel, title)
    for i, line in enumerate(lines):
        if not line:
            continue
        colour, dash, shape = style(i)
        points = place(*np.transpose(line))
        fig.line(points, colour, 2, dash)
        if len(points) <= 40:
            for point in points:
                fig.marker(point, colour, shape, 3)


# The curves: SAT Figs. 1 and 2

def value_and_slope(act, x):
    """An activation at x (n,) float64 -> its values and its slopes, as points [(x, y), ...]."""
    x = x.clone().requires_grad_()
    y = act.double()(x)
    slope, = torch.autograd.grad(y.sum(), x)
    values = torch.stack([x, y], 1)
    slopes = torch.stack([x, slope], 1)
    return values.tolist(), slopes.tolist()


def activations(args):
    """Every activation and its slope, from -4 to 4 and around 0."""
    fig = Figure(4, 2, 270, 240, ACTIVATIONS)
    for row, reach, note in ((0, 4, ""), (1, 0.3, ", around 0")):
        x = torch.linspace(-reach, reach, 801, dtype=torch.float64)
        both = [value_and_slope(make_act(name), x) for name in ACTIVATIONS]
        values, slopes = zip(*both)
        xs = (-reach, reach)
        plot(fig, fig.boxes[2 * row], values, xs, "x", "f(x)", f"Activations{note}")
        plot(fig, fig.boxes[2 * row + 1], slopes, xs, "x", "f '(x)", f"Derivatives{note}")
    fig.legend(ACTIVATIONS, markers=False)
    fig.save(args.png or "out/activations.png")


# Training runs over their epochs

def curves(args):
    """Training loss, clean and robust accuracy of some runs over their epochs."""
    logs = [read_log(folder) for folder in args.folders]
    fig = Figure(3, 3, 270, 240, args.folders)
    shown = (("Training loss", "cross-entropy", "epoch", "loss", 1, math.inf),
             ("Clean accuracy, held-out images", "accuracy (%)", "val", "clean", 100, 100),
             ("Robust accuracy, held-out images", "accuracy (%)", "val", "robust", 100, 100))
    for box, (title, ylabel, kind, field, unit, most) in zip(fig.boxes, shown):
        lines = [points_of(log, kind, field, unit) for log in logs]
        epochs = [epoch for line in lines for epoch, _ in line]
        last_epoch = max([5, *epochs])  # at least five on the axis
        plot(fig, box, lines, (0, 1.03 * last_epoch), "epoch", ylabel, title, 0, most)
    fig.legend(args.folders)
    fig.save(args.png or "out/curves.png")


# Reports of evaluate.py, clean against robust accuracy: SAT Figs. 3 and 4

def network_name(report):
    """The network and the main flags of its training; reports of the same name share a style."""
    name = f"{report.arch} {curve_name(report)}, {report.res} px"
    if report.train is None:  # how it was trained is unknown: a style of its own
        return f"{name}, {report.weights}"
    recipe = SimpleNamespace(**report.train)
    if recipe.steps == 0:
        name += ", normal"
    else:
        name += f", PGD-{recipe.steps} eps {recipe.eps:g}"
    if recipe.smooth_backward != "none":
        name += f", smooth backward {recipe.smooth_backward}"
    return f"{name}, {recipe.epochs} epochs"


def scatter(args):
    """A panel for each data set and attack, a marker for each report, its 95% intervals as a cross."""
    panels = {}  # of each title: [(name, (low, value, high) of clean, of robust)]
    for _, report in read_reports(args.files):
        clean = percent(report.n_correct, report.n)
        robust = percent(report.n_robust, report.n)
        title = f"{report.data}, {setting_name(report)}"
        panels.setdefault(title, []).append((network_name(report), clean, robust))
    need(panels, "no report of evaluate.py among these files; give out/*/eval/*.json")
    names = sorted({name for nets in panels.values() for name, _, _ in nets})

    fig = Figure(len(panels), 3, 350, 320, names)
    for box, (title, nets) in zip(fig.boxes, panels.items()):
        xs = span([clean for _, clean, _ in nets], 0, 100)
        ys = span([robust for _, _, robust in nets], 0, 100)
        place = axes(fig, box, xs, ys, "clean accuracy (%)", "robust accuracy (%)", title)
        for name, clean, robust in nets:
            colour, _, _ = style(names.index(name))
            fig.line(place(clean, robust[1]), colour)
            fig.line(place(clean[1], robust), colour)
        for name, clean, robust in nets:  # after all crosses, so that none covers a marker
            colour, _, shape = style(names.index(name))
            fig.marker(place(clean[1], robust[1]), colour, shape, 5)
    fig.legend(names, lines=False)
    fig.note("crosses are 95% intervals of n images")
    fig.save(args.png or "out/scatter.png")


# The results of `compare --json`, beside the paper's differences

def read_comparison(path, only):
    """A file of compare --json -> its one row whose measurement begins with `only`, as a namespace."""
    found = train.read_json(path)
    need(found.get("comparisons"), f"{path} has no comparisons; give files that compare --json wrote")
    rows = {}
    for row in found["comparisons"]:
        setting = row["setting"].replace(", last iterate", "")  # `what` says which iterate counts
        measure = f"{row['what']}, {setting}"
        if measure not in rows or row["n"] > rows[measure]["n"]:  # both protocols have a clean row
            rows[measure] = row
    measures = [measure for measure in rows if measure.startswith(only)]
    need(len(measures) == 1, f"{path} has {len(measures)} comparisons that begin with {only!r}; choose "
         f"one with --only, the start of its name: {'; '.join(measures or rows)}")
    return SimpleNamespace(**rows[measures[0]], name=path.stem, measure=measures[0])


def forest(args):
    """A row for each file of compare --json: its 95% interval, and the paper's difference beside it."""
    paper = train.read_json(Path(args.paper)) if args.paper else {}
    rows = []
    values = [0]
    for path in map(Path, args.files):
        row = read_comparison(path, args.only)
        row.paper = paper.get(path.stem)
        values += [row.low, row.high, row.paper or 0]
        rows.insert(0, row)  # rows are drawn from below; the first file is the topmost
    measures = sorted({row.measure for row in rows})
    need(len(measures) == 1, f"one picture shows one measurement, here are {'; '.join(measures)}; "
         "choose with --only, the start of a name")

    marks = {y: row.name for y, row in enumerate(rows)}
    ys = (-0.5, len(rows) - 0.5)
    left = 40 + text_width_of(marks.values())
    fig = Figure(1, 1, 400, 30 * len(rows), left=left, beside=200)
    place = axes(fig, fig.boxes[0], span(values), ys, "percentage points", "",
                 f"Difference in accuracy: {measures[0]}", y_marks=marks)
    fig.line(place(0, ys))
    colours = {"higher": BLUE, "lower": ORANGE}
    for y, row in enumerate(rows):
        _, height = place(0, y)
        fig.text((fig.right, height), f"{row.difference:+.1f} [{row.low:.1f}, {row.high:.1f}]", "lm")
        colour = colours.get(row.verdict, GREY)
        fig.line(place((row.low, row.high), y), colour, 3)
        if row.paper is not None:
            fig.text((fig.right + 120, height), f"paper {row.paper:+.1f}", "lm")
            fig.marker(place(row.paper, y), INK, MARKERS[3])
        fig.marker(place(row.difference, y), colour)
    fig.note("95% intervals; blue: higher, orange: lower, grey: undecided; black diamond: the paper")
    fig.save(args.png or "out/forest.png")


# A trained net and its images: the loss around them (SAT Fig. 5), before and after the attack

def heat_map(fig, box, z, ends):
    """z (n, n), its first index to the right, its second upwards, in bands of one colour each."""
    picture = z.T[::-1].astype(np.float32)  # a picture's first index is its row, counted from above
    inner = (0.5, 0.5, len(z) - 0.5, len(z) - 0.5)  # the outer pixels' centres become the edges
    fine = np.asarray(Image.fromarray(picture).resize((1024, 1024), Image.BILINEAR, inner))
    levels = ticks(ends, 15)
    bands = np.digitize(fine, levels)
    marks = np.linspace(0, len(levels), len(VIRIDIS))
    channels = [np.interp(bands, marks, channel) for channel in np.transpose(VIRIDIS)]
    fig.paste(np.stack(channels, -1).astype(np.uint8), box)


def to_rms_1(direction):
    """A direction in pixels -> the same, with a root mean square of 1."""
    return direction / direction.square().mean().sqrt()


def directions(delta, index):
    """The attack's delta (1, C, H, W) and a random direction at right angles, both of RMS 1."""
    attack = to_rms_1(delta)
    random = uniform(seed=0, index=index, counter=0, shape=delta.shape[1:]) - 0.5
    along = (random * attack).mean()
    return attack, to_rms_1(random - along * attack)


def loss_surface(net, x, y, attack, random, reach, n):
    """Cross-entropies (n, n) at x + a attack + b random, a and b within +-reach; x (1, C, H, W).

    Pixels may leave [0, 1]: clamping would bend the surface where the network does not.
    """
    offsets = torch.linspace(-reach, reach, n, device=x.device)
    along_random = offsets.view(n, 1, 1, 1) * random  # (n, C, H, W)
    rows = [cross_entropy(logits_of(net, x + a * attack + along_random), y.expand(n)) for a in offsets]
    return torch.stack(rows).cpu().numpy()


def roughness(surface):
    """Mean squared second difference, in both directions; compare at the same radius and n only."""
    along_first = np.diff(surface, n=2, axis=0)
    along_second = np.diff(surface, n=2, axis=1)
    return (np.square(along_first).mean() + np.square(along_second).mean()) / 2


def surfaces_of(net, run, index, x, y):
    """The loss around each image of a batch, up to 2 eps away -> list of (31, 31)."""
    x_adv = last_iterates(net, index, x, y, run.eps, run.step_size, steps=20)
    surfaces = []
    for i in range(len(y)):
        show(f"the loss around image {i + 1} of a batch of {len(y)}")
        one = slice(i, i + 1)
        attack, random = directions(x_adv[one] - x[one], index[one])
        surface = loss_surface(net, x[one], y[one], attack, random, 2 * run.eps / 255, n=31)
        surfaces.append(surface)
    return surfaces


def landscape(args):
    """The loss around the first of the images, a panel for each net; its roughness around all."""
    run = open_run(args, limit=20)
    nets = {str(args.weights or run.out): run.net}
    for path in args.against:
        nets[path] = other_net(path, run)
    surfaces = {name: [] for name in nets}
    for index, x, y in run.batches:
        for name, net in nets.items():
            surfaces[name] += surfaces_of(net, run, index, x, y)

    shown = np.stack([surfaces[name][0] for name in nets])
    # An axis, even where the loss is the same everywhere (in float64: float32 may not resolve 1e-6)
    ends = (float(shown.min()), float(shown.max()) + 1e-6)
    xs = (-2 * run.eps, 2 * run.eps)
    width = max(260, text_width_of(nets, 13))
    fig = Figure(len(nets), len(nets), width, 260, beside=80)
    for (left, top, right, bottom), name in zip(fig.boxes, nets):
        middle = (left + right) / 2  # of the title, which may be wider than the picture
        box = (middle - 130, top, middle + 130, bottom)
        axes(fig, box, xs, xs, "attack (1/255)", "random (1/255)", name)
        heat_map(fig, box, surfaces[name][0], ends)
        rough = [roughness(surface) for surface in surfaces[name]]
        words = f"roughness {rough[0]:.2g}"
        fig.text((middle, top - 10), words, colour=GREY)
        n = len(rough)
        if n > 1:
            half = student_t(n - 1) * np.std(rough, ddof=1) / math.sqrt(n)
            words += f"; over {n} images {np.mean(rough):.2g} +- {half:.1g} (95% interval)"
        say(f"{name}: {words}")
    ladder = (fig.right + 40, 60, fig.right + 54, 320)
    axes(fig, ladder, (0, 1), ends, "", "cross-entropy", "", x_marks={})
    rising = np.linspace(*ends, 32)
    heat_map(fig, ladder, np.tile(rising, (32, 1)), ends)
    definition = "roughness: mean squared second difference of the loss on this grid of 31 x 31 points"
    say(definition)
    fig.note(definition)
    fig.save(args.png or run.out / "landscape.png")


def gallery(args):
    """A row for each image: clean, attacked, and their difference magnified."""
    need(args.limit is None or args.limit <= 40,
         f"--limit {args.limit} is too many for one picture; use 40 at most")
    run = open_run(args, limit=6)
    index, x, y = next(run.batches)
    x_adv = last_iterates(run.net, index, x, y, run.eps, run.step_size, run.steps)
    magnify = max(1, round(127 / run.eps))  # eps becomes black or white
    classes = run.images.classes

    panels = []  # (picture, words above it, their colour), three a row
    for i, label in enumerate(y.tolist()):
        for title, picture in (("clean", x[i]), (f"attacked, eps {run.eps:g}/255", x_adv[i])):
            logits = logits_of(run.net, picture[None])[0]
            share, guess = logits.softmax(0).max(0)
            colour = INK if guess == label else ORANGE
            panels.append((picture, f"{title}: {classes[guess]}, {share:.0%}", colour))
        difference = magnify * (x_adv[i] - x[i]) + 0.5
        panels.append((difference, f"difference x {magnify}; label: {classes[label]}", INK))
    width = max(150, text_width_of([words for _, words, _ in panels]))
    fig = Figure(len(panels), 3, width, 150, left=20, above=30, below=10)
    for (left, top, _, _), (picture, words, colour) in zip(fig.boxes, panels):
        pixels = (255 * picture.clamp(0, 1)).round().byte()
        rows = pixels.permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)
        fig.paste(rows.cpu().numpy(), (left, top, left + 150, top + 150))
        fig.text((left, top - 5), words, "ls", colour=colour)
    fig.note("orange: the net is wrong; percent: its softmax; classes are named like their folders")
    fig.save(args.png or run.out / "gallery.png")


# Flags

def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.set_defaults(function=None)
    commands = p.add_subparsers(metavar="COMMAND")

    def add_command(function, help, picture=None):
        # Without abbreviations: an unknown flag is train.py's, and --act is not short for --acts
        name = function.__name__
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False,
                                      usage=f"python sanity.py {name} ..., all flags: --help")
        command.set_defaults(function=function)
        if picture is not None:
            command.add_argument("--png", help=f"the picture's file; default: {picture}")
        return command

    c = add_command(report, "doubt one net's robustness: a verdict for each way to be wrong")
    evaluate.add_common_flags(c)
    c.add_argument("--surrogate", help="a second net's folder or file, whose attacks are tried too")
    c.add_argument("--normal", help="a normally trained net's folder or file, which PGD has to fool")

    c = add_command(compare, "runs of an idea against runs of its baseline, by image and by seed")
    c.add_argument("new", nargs="+", metavar="NEW", help="folders of runs that evaluate.py has measured")
    c.add_argument("--against", nargs="+", required=True, metavar="OLD", help="the baseline's")
    c.add_argument("--json", help="write the table to this file too")

    c = add_command(table, "all runs below some folders, the newest report of each")
    c.add_argument("folders", nargs="+", help="folders")

    c = add_command(cost, "what a step and a whole run cost; takes train.py's flags too")
    c.add_argument("--acts", nargs="+", default=[*ACTIVATIONS], choices=ACTIVATIONS, metavar="ACT",
                   help="instead of train.py's --act; default: all")
    c.add_argument("--pgd", nargs="+", type=int, default=[0, 1], help="instead of --steps; default: 0 1")
    c.add_argument("--batch-size", type=int, help="images of a step; default: 32 on a CPU, else 128")
    c.add_argument("--rounds", type=int, default=15, help="steps of each kind; the median is shown")

    c = add_command(landscape, "the loss around images, SAT Fig. 5", "landscape.png in the run's folder")
    evaluate.add_common_flags(c)
    c.add_argument("--against", nargs="+", default=[], help="other nets' folders or files")

    c = add_command(gallery, "images before and after the attack", "gallery.png in the run's folder")
    evaluate.add_common_flags(c)

    add_command(activations, "the curves and their slopes, SAT Figs. 1 and 2", "out/activations.png")

    c = add_command(curves, "runs over their epochs", "out/curves.png")
    c.add_argument("folders", nargs="+", help="folders of runs")

    c = add_command(scatter, "accuracies of many nets, SAT Figs. 3 and 4", "out/scatter.png")
    c.add_argument("files", nargs="+", help="reports of evaluate.py")

    c = add_command(forest, "the results of several `compare --json`, a row each", "out/forest.png")
    c.add_argument("files", nargs="+", help="what compare --json wrote; a row is named like its file")
    c.add_argument("--paper", help='a JSON file with the paper\'s differences: {"silu": 9.3}')
    c.add_argument("--only", default="robust", help="start of a measurement's name, e.g. 'robust (last'")

    args, rest = p.parse_known_args(argv)
    if args.function is None:
        p.print_help()
        raise SystemExit(2)
    if args.function is cost:
        args.train = train.get_args(rest)
    elif rest:
        p.error(f"unknown: {' '.join(rest)}; see python sanity.py {args.function.__name__} --help")
    return args


def main():
    args = get_args()
    train.check_numbers(args)
    if "png" in args and args.png is not None:
        need(Path(args.png).suffix == ".png", f"--png {args.png} is no PNG's name; let it end in .png")
    args.function(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped")
