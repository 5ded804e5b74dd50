"""
Doubt a robustness number, compare runs, count what they cost, and draw (SAT, arXiv:2006.14536).

Can a robustness number be trusted? The doubts of SAT Sec. 6 and more, each with a verdict:
$ python sanity.py report --out out
Is an idea better than its baseline? Runs of several seeds, in pairs:
$ python sanity.py compare out/silu-0 out/silu-1 out/silu-2 --against out/relu-0 out/relu-1 out/relu-2
What do the attack and each activation cost here, and what a whole run? With train.py's flags:
$ python sanity.py cost --data shapes
$ python sanity.py plan --arch efficientnet_l1 --enhanced
The figures:
$ python sanity.py landscape --out out/silu --against out/relu  # the loss around images, Fig. 5
$ python sanity.py gallery --out out  # images before and after the attack
$ python sanity.py activations  # the curves, and what they cost, Figs. 1 and 2
$ python sanity.py curves out/relu out/silu  # runs over their epochs
$ python sanity.py scatter out/*/eval/*.json  # clean and robust accuracy of many nets, Figs. 3 and 4
$ python sanity.py forest silu.json elu.json  # what several `compare --json` have found

`report` exits with 1 if a doubt FAILs (or if it cannot run), else with 2 if one is UNSURE (use more
images) or a flag is unknown, else with 0.

Keys: SAT is the paper, its sections and figures numbered as there. CA is Carlini et al. 2019
(arXiv:1902.06705), whose advice SAT Sec. 6 follows.
"""
import argparse
import json
import math
import signal
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":  # importing torch takes seconds; a Ctrl-C meanwhile prints no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import train
from activations import ACTIVATIONS, make_act
from attacks import (autoattack, cross_entropy, input_gradient, pgd, pgd_search, predict, random_start,
                     uniform)
from data import duration, say, show
from evaluate import make_folder, wilson
from models import attacker_view, in_precision, precision, weights_hash
from train import check_ranges, device_name, need, open_device, write_json

# A trained net and its images

BATCH = 100  # images attacked at a time


def batches(*tensors):
    """Pieces of BATCH rows, side by side, of tensors with one row an image."""
    pieces = [tensor.split(BATCH) for tensor in tensors]
    return zip(*pieces)


@torch.no_grad()
def logits_of(net, x):
    return torch.cat([net(x_part).float() for x_part in x.split(BATCH)])


def pgd_from(net, index, x, y, eps, step_size, steps):
    """PGD from evaluation's starts, eps and step_size in 1/255 -> its last iterates, as x."""
    x_adv = []
    for index_part, x_part, y_part in batches(index, x, y):
        noise = random_start(x_part, eps / 255, seed=0, index=index_part)
        x_adv.append(pgd(net, x_part, y_part, eps=eps / 255, step_size=step_size / 255, steps=steps,
                         noise=noise))
    return torch.cat(x_adv)


def open_run(args, limit):
    """The run that evaluate.py's flags name -> the namespace of evaluate.find_run, and in it

      net, digest, device, images   the network, its weights' hash, where it is, the test set
      index, x, y                   --limit of its images (default: `limit`), as in evaluate.py
      eps, step_size, steps         of the attack; the first two in 1/255
      out                           the folder of the weights
    """
    run = evaluate.find_run(args)
    run.device, _, _ = open_device(args.device)
    show(f"loading {run.data}")
    run.images = data.load(run.data, run.data_dir, train=False, res=run.res, classes=run.classes,
                           device=run.device)
    run.net = evaluate.open_net(run, len(run.images.classes), run.device)
    run.digest = weights_hash(run.net)
    run.out = run.weights.parent
    members = data.subset(run.images.n, args.limit or limit)
    all_at_once = data.eval_batches(run.images, members, batch_size=len(members), device=run.device)
    run.index, run.x, run.y = next(all_at_once)

    data_set = data.DATA_SETS[run.data]
    run.eps = data_set.eps if args.eps is None else args.eps
    run.step_size = data_set.step_size if args.step_size is None else args.step_size
    run.steps = data_set.steps
    need(run.eps > 0 and run.step_size > 0,
         f"--eps {run.eps:g} --step-size {run.step_size:g} attack nothing; use more than 0")
    return run


def other_net(path, run):
    """Another run's folder, or a file of weights, for the images of `run` -> its net, its name."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    flags = SimpleNamespace(out=folder, weights=None if path.is_dir() else path)
    has_args = (folder / "args.json").exists()
    for name in ("data", "data_dir", "arch", "act", "act_alpha", "bn_eps", "res"):
        # Without args.json the file is taken for a network like run's
        setattr(flags, name, None if has_args else getattr(run, name))
    other = evaluate.find_run(flags)
    need(other.data == run.data and other.classes in (None, run.images.classes),
         f"{path} was trained on other data or classes than {run.weights}; give a net of the same data")
    net = evaluate.open_net(other, len(run.images.classes), run.device)
    return net, f"{other.arch} {other.act}"


def check_json(path):
    """Make the folder of --json now, so that a wrong path fails before the work."""
    if path is not None:
        need(not Path(path).is_dir(), f"{path} is a folder; name a file in it")
        make_folder(Path(path).parent)


# Verdicts. A doubt is about a share of images, and before a verdict is given the whole 95% interval of
# that share has to be on one side of a bound: 0 of 1 proves nothing, and 0 of 100 not yet "at most 2%"

LEAST = 20  # fewer images settle nothing, and Wilson's interval is rough there


def judge(n_bad, n, warn, fail):
    """The verdict on a share of bad images: PASS up to `warn`, WARN above it, FAIL above `fail`.

    SKIP without any image, UNSURE where n_bad of n leave open whether it is above `warn`. A WARN may
    still turn out to be a FAIL with more images.
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


def n_to_settle(n_bad, n, warn, fail):
    """About how many images would settle an UNSURE if the share stayed; None: more than a million."""
    n_more = n
    while n_more < 10**6:
        n_more = math.ceil(1.02 * n_more)
        if judge(n_bad / n * n_more, n_more, warn, fail) != "UNSURE":
            return n_more
    return None


def doubt(what, hit, n_bad, wanted, warn, fail, why, skip, note):
    """What `at_most` and `at_least` share -> one verdict with its reasons, a dict."""
    n = len(hit)
    n_hit = int(hit.sum())
    verdict = judge(n_bad, n, warn, fail)
    measured = f"{n_hit / n:.1%} of {n}" if n > 0 else "-"
    n_needed = n_to_settle(n_bad, n, warn, fail) if verdict == "UNSURE" else None
    return dict(verdict=verdict, what=what, measured=measured, wanted=wanted, n=n, n_hit=n_hit,
                n_needed=n_needed, why=skip if verdict == "SKIP" else why, note=note)


def at_most(what, hit, warn, fail, why, skip="no image to judge", note=""):
    """A share, of hit (n,) bool, that should be small: WARN above warn, FAIL above fail."""
    n_bad = int(hit.sum())
    return doubt(what, hit, n_bad, wanted=f"at most {100 * warn:.3g}%", warn=warn, fail=fail, why=why,
                 skip=skip, note=note)


def at_least(what, hit, warn, fail, why, skip="no image to judge", note=""):
    """A share, of hit (n,) bool, that should be large: WARN below warn, FAIL below fail."""
    n_bad = int((~hit).sum())
    return doubt(what, hit, n_bad, wanted=f"at least {100 * warn:.3g}%", warn=1 - warn, fail=1 - fail,
                 why=why, skip=skip, note=note)


# The doubts, by topic. Their bounds are our judgement: the robust net of results/shapes-report.log stays
# within, the overfitted one of results/shapes-early-stop-report.log does not

STEPS = 200  # of the PGD that is doubted
MARKS = (0, 1, 5, 10, 20, 50, 100, STEPS)  # iterations to report
RADII = (1, 2, 4, 8, 16, 32, 64)  # eps in 1/255 to report
RADII_STEPS = 20


class Found(NamedTuple):
    """What a search for adversarial images has found, a row an image."""

    x_adv: torch.Tensor  # the iterate that fooled, or x
    right: torch.Tensor  # bool: on x itself
    robust: torch.Tensor  # bool: right, and never fooled
    step: torch.Tensor  # int64: that of the iterate that fooled; -1 if none did


def search(what, net, index, x, y, eps, step_size, steps, restarts=1, seed=0):
    """`pgd_search` on any number of images, eps and step_size in 1/255 -> Found. `what` is shown."""
    began = time.monotonic()
    pieces = []
    for number, (index_part, x_part, y_part) in enumerate(batches(index, x, y)):

        def progress(_, step, n_steps, n_undecided):
            show(f"{what}: {number * BATCH} of {len(x)} images, step {step} of {n_steps} | "
                 f"{duration(time.monotonic() - began)}")

        x_adv, report = pgd_search(
            net, x_part, y_part, eps=eps / 255, step_size=step_size / 255, steps=steps, index=index_part,
            restarts=restarts, seed=seed, progress=progress)
        right = report["clean"] == y_part
        pieces.append((x_adv, right, report["robust"], report["step"]))
    columns = [torch.cat(column) for column in zip(*pieces)]
    return Found(*columns)


def doubts_about_the_model(run):
    """Is it a classifier whose gradient an attack can follow?"""
    logits = logits_of(run.net, run.x)
    again = logits_of(run.net, run.x)
    right = predict(logits) == run.y
    chance = 1 / logits.shape[1]  # the bounds are a quarter and an eighth of the way to perfect
    yield at_least("right on clean images", right, warn=chance + (1 - chance) / 4,
                   fail=chance + (1 - chance) / 8, why="guessing leaves nothing to attack")

    largest = logits.abs().amax(1)
    drift = (again - logits).abs().amax(1) > 1e-4 * largest
    yield at_most("two calls differ", drift, warn=0.02, fail=0.1,
                  why="a random net hides its gradient")
    not_finite = ~logits.isfinite().all(1)
    sums_to_one = (logits.amin(1) >= 0) & ((logits.sum(1) - 1).abs() < 1e-4)
    yield at_most("outputs are no logits", not_finite | sums_to_one, warn=0.02, fail=0.1,
                  why="NaN, or a softmax, which flattens the loss")

    grads = []
    for x_part, y_part in batches(run.x, run.y):

        def loss(logits):
            return cross_entropy(logits, y_part)

        _, grad = input_gradient(run.net, x_part, loss)
        grads.append(grad)
    share_of_zeros = (torch.cat(grads) == 0).flatten(1).float().mean(1)
    has_many = share_of_zeros > 0.05
    yield at_most("zeros in the input gradient", has_many[right], warn=0.03, fail=0.1,
                  why="saturated or rounded: PGD sees nothing", skip="no image is right")


def doubts_about_iterations(run, found):
    """Does PGD do more when it goes on (SAT Sec. 6), and what does it find? found: by PGD-200.

    Shares are of all images, unless `skip` is given: skip="no image is right" goes with a share of the
    images that are right. PGD-50 means the first 50 of the 200 steps.
    """
    right = found.right

    def withstands(k):
        """Which images no iterate up to k fools, (N,) bool."""
        return right & (found.robust | (found.step > k))

    shares = [f"{k}: {withstands(k).float().mean():.1%}" for k in MARKS]
    curve = "robust after steps " + ", ".join(shares)
    yield at_most("fooled by noise", (found.step == 0)[right], warn=0.1, fail=0.3,
                  why="a random start is no attack", skip="no image is right")
    yield at_least(f"fooled by steps 1 to {STEPS}", (found.step > 0)[withstands(0)], warn=0.05,
                   fail=0.02, why="PGD is blind", skip="no image is right after noise", note=curve)
    yield at_most(f"fooled by steps 101 to {STEPS}", found.step > 100, warn=0.03, fail=0.1,
                  why="PGD has not converged")
    yield at_least("robust", found.robust, warn=0.1, fail=0.05, why="there is no robustness to doubt")

    fooled = right & ~found.robust
    rounded = (255 * found.x_adv[fooled]).round() / 255
    still_wrong = predict(logits_of(run.net, rounded)) != run.y[fooled]
    yield at_least("fooled by 8-bit pictures too", still_wrong, warn=0.85, fail=0,  # never a FAIL
                   why="saved as files, x_adv is rounded", skip="no image is fooled")

    # One step from a random start, as in training (SAT Sec. 3.1)
    once = search("PGD-1", run.net, run.index, run.x, run.y, eps=run.eps, step_size=run.eps, steps=1)
    yield at_most("PGD-1 fools, PGD-50 does not", (~once.robust & withstands(50))[right], warn=0.03,
                  fail=0.1, why="masked gradients", skip="no image is right")
    yield at_least("withstands PGD-1, PGD-50 too", withstands(50)[once.robust], warn=0.5, fail=0.25,
                   why="overfit to one step", skip="no image withstands PGD-1")


def doubts_about_the_radius(run, found):
    """Is nothing robust at a huge eps (SAT Sec. 6)? The curve over all radii is a note."""
    right = found.right
    shares = []
    for eps in RADII:
        # 2.5 radii in all (Madry et al. 2018), more below eps 8, where a step is 1
        step_size = max(1, 2.5 * eps / RADII_STEPS)
        at_eps = search(f"eps {eps}", run.net, run.index[right], run.x[right], run.y[right], eps=eps,
                        step_size=step_size, steps=RADII_STEPS)
        shares.append(f"{eps}: {at_eps.robust.sum() / len(right):.1%}")
    curve = f"robust to PGD-{RADII_STEPS} at eps " + ", ".join(shares)
    yield at_most(f"robust at eps {RADII[-1]}", at_eps.robust, warn=0.05, fail=0.15,
                  why="such noise drowns the image", skip="no image is right", note=curve)


def doubts_from_other_attacks(run, found, surrogate=None, normal=None):
    """Do other attacks find what PGD has missed (CA)?

    The first four shares are of all images, so that 1% is a point of the robust accuracy. The last two
    are of the images that the net in question gets right.
    """
    net = run.net
    robust = found.robust
    index = run.index[robust]
    x = run.x[robust]
    y = run.y[robust]
    nobody = "no image to judge"
    no_rows = robust[:0]  # makes the verdict SKIP

    def of_all(hit):
        """hit, a row for each robust image -> a row for each image; no row at all if none is robust."""
        everywhere = torch.zeros_like(robust)
        everywhere[robust] = hit
        return everywhere if robust.any() else no_rows

    again = search("4 restarts", net, index, x, y, eps=run.eps, step_size=run.step_size, steps=20,
                   restarts=4, seed=1)
    yield at_most("robust, but not to 4 restarts", of_all(~again.robust), warn=0.03, fail=0.1,
                  why="PGD depends on luck", skip=nobody)

    fooled_by = []
    for index_part, x_part, y_part in batches(index, x, y):

        def progress(name, step, n_steps, n_undecided):
            show(f"{name}: {len(fooled_by)} of {len(x)} images, step {step} of {n_steps}")

        _, report = autoattack(
            net, x_part, y_part, eps=run.eps / 255, index=index_part, attacks=("apgd-ce", "square"),
            queries=1000,  # of 5,000: enough to tell masked gradients
            progress=progress)
        fooled_by += report["fooled_by"]
    by_apgd = torch.tensor([name == "apgd-ce" for name in fooled_by], dtype=torch.bool, device=y.device)
    by_square = torch.tensor([name == "square" for name in fooled_by], dtype=torch.bool, device=y.device)
    yield at_most("robust, but not to APGD", of_all(by_apgd), warn=0.05, fail=0.15,
                  why="PGD stops short; quote AutoAttack", skip=nobody)
    yield at_most("robust to both, not to Square", of_all(by_square), warn=0.03, fail=0.1,
                  why="needs no gradient, yet wins: masked", skip=nobody)

    moved = no_rows
    if surrogate is not None:
        x_adv = pgd_from(surrogate, index, x, y, eps=run.eps, step_size=run.step_size, steps=50)
        moved = of_all(predict(logits_of(net, x_adv)) != y)
    yield at_most("robust, but not to transfer", moved, warn=0.03, fail=0.1,
                  why="the net masks its own gradient",
                  skip="--surrogate names no second net" if surrogate is None else nobody)

    right = found.right
    x = run.x[right]
    y = run.y[right]
    x_adv = pgd_from(net, run.index[right], x, y, eps=run.eps, step_size=run.step_size, steps=10)
    losses = []
    for t in (0, 0.25, 0.5, 0.75, 1):
        between = x.lerp(x_adv, t)
        losses.append(cross_entropy(logits_of(net, between), y))
    rises = (torch.stack(losses).diff(dim=0) > 0).all(0)
    yield at_least("loss rises all the way to x_adv", rises, warn=0.75, fail=0.5,
                   why="else gradients lead nowhere", skip="no image is right")

    withstands = no_rows
    if normal is not None:
        of_normal = search("normal net", normal, run.index, run.x, run.y, eps=run.eps,
                           step_size=run.step_size, steps=50)
        withstands = of_normal.robust[of_normal.right]
    yield at_most("a normal net is robust", withstands, warn=0.05, fail=0.15, why="PGD is too weak",
                  skip="--normal names no normally trained net" if normal is None else nobody)


def all_doubts(run, surrogate=None, normal=None):
    """Every doubt about run.net on run.index, x, y, with run.eps and step_size in 1/255."""
    yield from doubts_about_the_model(run)
    found = search(f"PGD-{STEPS}", run.net, run.index, run.x, run.y, eps=run.eps,
                   step_size=run.step_size, steps=STEPS)
    yield from doubts_about_iterations(run, found)
    yield from doubts_about_the_radius(run, found)
    yield from doubts_from_other_attacks(run, found, surrogate, normal)


def doubt_lines(row, n_used, n_available):
    """A doubt as a person reads it, from a report on n_used images of n_available."""
    yield (f"{row['verdict']:<7} {row['what']:<32} {row['measured']:<15} {row['wanted']:<15} "
           f"{row['why']}")
    if row["verdict"] == "UNSURE":
        advice = "its share is too near to the bound to be settled by more images"
        if row["n_needed"] is not None:
            limit = math.ceil(row["n_needed"] * n_used / row["n"])
            advice = f"about --limit {limit} would settle it, the data have {n_available} images"
        yield f"        {advice}"
    if row["note"]:
        yield f"        {row['note']}"


def report(args):
    check_json(args.json)
    run = open_run(args, limit=256)
    began = time.monotonic()
    surrogate = None
    normal = None
    if args.surrogate:
        surrogate, _ = other_net(args.surrogate, run)
    if args.normal:
        normal, _ = other_net(args.normal, run)

    say(f"{run.weights}: {run.arch} {run.act}, {len(run.y)} images of {run.data}, eps {run.eps:g}, "
        f"step {run.step_size:g}")
    say(f"{'verdict':<7} {'doubt':<32} {'measured':<15} {'wanted':<15} why it matters")
    rows = {}
    for row in all_doubts(run, surrogate, normal):
        rows[row["what"]] = row
        for line in doubt_lines(row, len(run.y), run.images.n):
            say(line)
    verdicts = [row["verdict"] for row in rows.values()]
    counts = [f"{verdicts.count(name)} {name}" for name in ("PASS", "WARN", "FAIL", "UNSURE", "SKIP")]
    say(f"{', '.join(counts)}; {duration(time.monotonic() - began)}")
    if args.json:
        write_json(Path(args.json), {**rows, "hash": run.digest, "n": len(run.y), "eps": run.eps})
    if "FAIL" in verdicts:
        raise SystemExit(1)
    if "UNSURE" in verdicts:
        raise SystemExit(2)


# An idea against its baseline, in pairs

# Two evaluations are comparable if these agree
SETTING = ("attack", "eps", "step_size", "steps", "restarts", "last_iterate", "seed", "smooth_backward",
           "dtype")
Z = 1.959964  # 97.5% of a normal distribution lie below
MOST_SEEDS = 1000  # where the search for enough seeds ends


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

    Wald's interval for paired proportions, with half an image added to each of the four cells: both
    right, only new, only old, neither (Agresti & Min 2005). The images vary, the two networks do not.
    """
    n = len(new) + 2
    only_new = (new & ~old).sum() + 0.5
    only_old = (old & ~new).sum() + 0.5
    difference = (only_new - only_old) / n
    variance = (only_new + only_old) / n - difference**2
    half = Z * math.sqrt(variance / n)
    return difference - half, difference + half


class Spread(NamedTuple):
    """What makes a mean difference uncertain, as variances."""

    n_seeds: int
    seed_variance: float  # between the means of single seeds
    images_variance: float  # of the images' part of the mean: more seeds do not shrink it


def spread_of(difference):
    """Differences of verdicts, -1, 0 or 1, of S >= 2 seeds on N images, (S, N) -> Spread.

    The difference of seed s on image i is delta + seed_s + image_i + rest_si, so the mean over all
    varies by
        (var seed + var rest / N) / S + var image / N.
    Three estimates give it (Searle, Casella & McCulloch 1992). The variance of the seeds' means
    estimates var seed + var rest / N. The variance of the images' means estimates var image + var rest
    / S. What remains of the table without the means of its rows and columns estimates var rest.
    """
    n_seeds, n_images = difference.shape
    mean = difference.mean()
    seed_means = difference.mean(axis=1)  # (S,)
    image_means = difference.mean(axis=0)  # (N,)
    rest = difference - seed_means[:, None] - image_means + mean
    rest_variance = np.square(rest).sum() / ((n_seeds - 1) * (n_images - 1))
    one_image_variance = max(0.0, image_means.var(ddof=1) - rest_variance / n_seeds)
    return Spread(n_seeds, seed_means.var(ddof=1), one_image_variance / n_images)


def half_width(spread, n_seeds):
    """Half of the 95% interval that n_seeds have, if they spread like these.

    Student's t for the seeds, which are few; the normal distribution for the images. Half-widths of
    independent parts add in squares (Howe 1974, JASA 69; MOVER in Zou & Donner 2008, Stat. Med. 27).
    """
    seeds_half = student_t(n_seeds - 1) * math.sqrt(spread.seed_variance / n_seeds)
    images_half = Z * math.sqrt(spread.images_variance)
    return math.hypot(seeds_half, images_half)


def interval_of_seeds(new, old):
    """Verdicts of S >= 2 seeds of either side on N images, (S, N) bool -> 95% interval, Spread.

    Seeds and images are both taken for random, so the interval is about the method, on such images.
    """
    difference = new.astype(float) - old.astype(float)
    spread = spread_of(difference)
    half = half_width(spread, spread.n_seeds)
    return difference.mean() - half, difference.mean() + half, spread


def n_seeds_to_decide(difference, spread):
    """How many seeds would decide if difference and spread stayed; None: not even MOST_SEEDS would."""
    for n_seeds in range(spread.n_seeds + 1, MOST_SEEDS + 1):
        if half_width(spread, n_seeds) < abs(difference):
            return n_seeds
    return None


def compare_verdicts(new, old):
    """Verdicts of both sides, (S, N) bool, seed beside seed -> a row of the table.

    Accuracies and their difference are in percent; only_new and only_old: numbers of images per seed.
    """
    n_seeds, n_images = new.shape
    spread = None
    if n_seeds == 1:
        low, high = interval_of_two_nets(new[0], old[0])
    else:
        low, high, spread = interval_of_seeds(new, old)
    difference = new.mean() - old.mean()

    verdict = "undecided"
    if low > 0:
        verdict = "higher"
    elif high < 0:
        verdict = "lower"
    advice = ""
    if verdict == "undecided" and n_seeds >= 3:  # from two, the spread itself is a guess
        n_needed = n_seeds_to_decide(difference, spread)
        advice = f"; about {n_needed} seeds would decide"
        if n_needed is None:
            advice = f"; {MOST_SEEDS} seeds would not decide on these images"
    return dict(new=100 * new.mean(), old=100 * old.mean(), difference=100 * difference, low=100 * low,
                high=100 * high, only_new=(new & ~old).sum() / n_seeds,
                only_old=(old & ~new).sum() / n_seeds, n=n_images, verdict=verdict + advice)


# What compare reads: runs, their reports and ledgers

def read_run(folder):
    """A run's folder -> namespace: folder, args, and its newest report of every setting, reports."""
    folder = Path(folder)
    args = train.read_json(folder / "args.json")
    reports = {}
    paths = list((folder / "eval").glob("*.json"))
    for path in sorted(paths, key=newest_last):
        content = train.read_json(path)
        need({*SETTING, "ledger", "images", "code"} <= content.keys(),
             f"{path} is no report that names its ledger; run evaluate.py again, or move it elsewhere")
        setting = tuple(content[name] for name in SETTING)
        if setting in reports:
            say(f"warning: {folder} has several reports of {setting_name(content)}; the newest counts")
        reports[setting] = content
    need(reports, f"no report in {folder / 'eval'}; run python evaluate.py --out {folder}")
    return SimpleNamespace(folder=folder, args=args, reports=reports)


def newest_last(path):
    return path.stat().st_mtime


def setting_name(report):
    """What a report's attack was, in words; seed, restarts and the like only where they are unusual."""
    words = [report["attack"]]
    if report["attack"] == "pgd":
        words = [f"PGD-{report['steps']}"]
    words.append(f"eps {report['eps']:g}")
    if report["attack"] == "pgd":
        words.append(f"step {report['step_size']:g}")
    if report["restarts"] not in (None, 1):
        words.append(f"{report['restarts']} restarts")
    if report["last_iterate"]:
        words.append("last iterate")
    if report["seed"] != 0:
        words.append(f"seed {report['seed']}")
    if report["smooth_backward"] != "none":
        words.append("smooth backward")
    if report["dtype"] != "fp32":
        words.append(report["dtype"])
    return ", ".join(words)


def by_seed(runs, side):
    """Runs of one side -> {seed: run}."""
    seeds = {}
    for run in runs:
        seed = run.args.get("seed")
        need(seed is not None, f"{run.folder / 'args.json'} names no seed; give runs of train.py")
        need(seed not in seeds, f"{side} has seed {seed} twice; give one run of each seed")
        seeds[seed] = run
    return seeds


def match_seeds(new, old):
    """Runs of both sides -> [(new run, old run)], seed beside seed. One run a side: these two."""
    if len(new) == len(old) == 1:
        return [(new[0], old[0])]
    new_seeds = by_seed(new, "NEW")
    old_seeds = by_seed(old, "--against")
    shared = sorted(new_seeds.keys() & old_seeds.keys())
    need(shared, f"no seed is on both sides: NEW has {sorted(new_seeds)}, --against has "
         f"{sorted(old_seeds)}; train both sides with the same --seed")
    alone = sorted(new_seeds.keys() ^ old_seeds.keys())
    if alone:
        say(f"warning: seeds {', '.join(map(str, alone))} are on one side only and left out")
    return [(new_seeds[seed], old_seeds[seed]) for seed in shared]


def shared_settings(runs):
    """The settings that all runs have a report of. SystemExit if there is none."""
    shared = [setting for setting in runs[0].reports if all(setting in run.reports for run in runs)]
    if not shared:
        measured = []
        for run in runs:
            names = [setting_name(content) for content in run.reports.values()]
            measured.append(f"{run.folder} has {' and '.join(names)}")
        raise SystemExit(f"no attack was run on all: {'; '.join(measured)}; run evaluate.py on each "
                         "with the same flags")
    return shared


def read_verdicts(run, setting):
    """The ledger of one report -> {index: line}. SystemExit where there is none."""
    name = run.reports[setting]["ledger"]
    lines, _ = evaluate.read_ledger(run.folder / "eval", name)
    need(lines, f"the ledger {run.folder / 'eval' / name}.*.jsonl is missing or empty; run evaluate.py "
         "again")
    return lines


def verdicts_of(line):
    """A ledger line's verdicts -> {what: bool}; a line of --last-iterate has those of both protocols."""
    is_correct = line["clean"] == line["label"]
    if "robust_at" in line:
        every = "0" not in line["robust_at"]
        return {"clean": is_correct, "robust (last iterate)": line["robust_at"].endswith("1"),
                "robust (every iterate)": is_correct and every}
    return {"clean": is_correct, "robust": is_correct and line["fooled"] is None}


def table_of(ledgers, numbers):
    """Ledgers [{index: line}] of S runs, numbers of N images -> {what: (S, N) bool}."""
    columns = {}
    for lines in ledgers:
        verdicts = [verdicts_of(lines[number]) for number in numbers]
        for what in verdicts[0]:
            row = [verdict[what] for verdict in verdicts]
            columns.setdefault(what, []).append(row)
    return {what: np.array(rows) for what, rows in columns.items()}


def compare_setting(pairs, setting):
    """One attack, all pairs of runs -> rows of the table. SystemExit for different images."""
    runs = [run for pair in pairs for run in pair]
    first = runs[0]
    name = setting_name(first.reports[setting])
    for run in runs:
        need(run.reports[setting]["images"] == first.reports[setting]["images"],
             f"{name}: {first.folder} and {run.folder} were measured on different images; run "
             "evaluate.py on both with the same --data, --data-dir and --res")
    if len({run.reports[setting]["code"] for run in runs}) > 1:
        say(f"warning: {name}: measured by different versions of the code; run evaluate.py on all again")

    ledgers = {run.folder: read_verdicts(run, setting) for run in runs}
    numbers = sorted(set.intersection(*map(set, ledgers.values())))
    n_most = max(map(len, ledgers.values()))
    need(len(numbers) > 1, f"{name}: the runs have {len(numbers)} images in common; run evaluate.py on "
         "all with the same --limit")
    if len(numbers) < n_most:
        say(f"warning: {name}: {len(numbers)} of {n_most} images are in all ledgers; the rest is unused")
    for number in numbers:
        labels = {lines[number]["label"] for lines in ledgers.values()}
        need(len(labels) == 1, f"{name}: image {number} has the labels {labels}; run evaluate.py on all "
             "with the same data")

    new = table_of([ledgers[run.folder] for run, _ in pairs], numbers)
    old = table_of([ledgers[run.folder] for _, run in pairs], numbers)
    rows = []
    for what in new:
        rows.append({"setting": name, "what": what, **compare_verdicts(new[what], old[what])})
    return rows


def training_of(run):
    """The last epoch's line of a run's log -> dict with its loss and error; None without one."""
    last = None
    if (run.folder / "log.jsonl").exists():
        for line in read_log(run.folder):
            if line["kind"] == "epoch":
                last = line
    return last


def compare_training(pairs):
    """The last epoch's mean loss and error in training, under its attack -> rows, without intervals."""
    lines = [(training_of(new), training_of(old)) for new, old in pairs]
    rows = []
    if all(new and old for new, old in lines):
        for what, unit in (("loss", 1), ("error", 100)):
            new_mean = np.mean([unit * new[what] for new, _ in lines])
            old_mean = np.mean([unit * old[what] for _, old in lines])
            rows.append(dict(what=what, new=new_mean, old=old_mean, difference=new_mean - old_mean))
    return rows


def flags_that_differ(pairs):
    """The flags of training that are not the same in all runs -> ["act: silu | relu"]."""
    # Not listed: the flags of train.FREE (`init` is there, but its init_hash is listed), and what may
    # differ between two runs of one method: the seed, the commit, and what depends on the machine
    ignored = {*train.FREE, "seed", "commit", "processes", "python", "torch", "torchvision", "compile"}
    names = {name for pair in pairs for run in pair for name in run.args} - ignored
    differ = []
    for name in sorted(names):
        new = list(dict.fromkeys(str(run.args.get(name)) for run, _ in pairs))
        old = list(dict.fromkeys(str(run.args.get(name)) for _, run in pairs))
        if new != old or len(new) > 1:
            differ.append(f"{name}: {', '.join(new)} | {', '.join(old)}")
    return differ


def compare(args):
    check_picture(args)
    check_json(args.json)
    new = [read_run(folder) for folder in args.new]
    old = [read_run(folder) for folder in args.against]
    pairs = match_seeds(new, old)
    for new_run, old_run in pairs:
        need(new_run.folder.resolve() != old_run.folder.resolve(),
             f"{new_run.folder} is on both sides; give --against the baseline's runs")
    settings = shared_settings([run for pair in pairs for run in pair])
    rows = []
    for setting in settings:
        rows += compare_setting(pairs, setting)
    training = compare_training(pairs)

    say("new: " + ", ".join(str(run.folder) for run, _ in pairs))
    say("old: " + ", ".join(str(run.folder) for _, run in pairs))
    for text in flags_that_differ(pairs):
        say(f"{text}  (new | old)")
    seeds = [run.args.get("seed") for run, _ in pairs]
    about = "one network a side: the intervals are about these two networks, not about the method"
    if len(pairs) > 1:
        about = (f"{len(pairs)} pairs matched by seed ({', '.join(map(str, seeds))}): the intervals are "
                 "about the method, seeds and images both vary")
    if len(pairs) == 2:
        about += "; two seeds tell little about how seeds spread, so use three or more"
    say(about)

    setting = None
    for row in rows:
        if row["setting"] != setting:
            setting = row["setting"]
            say(f"\n{setting}; {row['n']} images; accuracies in percent, "
                "only new and only old in images per seed")
            say(f"  {'':<23}{'new':>7}{'old':>7}{'new - old':>11}{'95% interval':>18}{'only new':>10}"
                f"{'only old':>10}  verdict")
        interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
        say(f"  {row['what']:<23}{row['new']:7.2f}{row['old']:7.2f}{row['difference']:+11.2f}"
            f"{interval:>18}{row['only_new']:10.1f}{row['only_old']:10.1f}  {row['verdict']}")
    if training:
        say("\nlast epoch of training, under its attack if it had one")
    for row in training:
        say(f"  {row['what']:<23}{row['new']:7.3f}{row['old']:7.3f}{row['difference']:+11.3f}")

    if args.json:
        write_json(Path(args.json), dict(
            new=[str(run.folder) for run, _ in pairs], old=[str(run.folder) for _, run in pairs],
            seeds=seeds, about=about, comparisons=rows, training=training))
    if args.png:
        bars = []
        for row in rows:
            if row["what"] != "clean":
                bars.append(dict(name=f"{row['what']}, {row['setting']}", difference=row["difference"],
                                 low=row["low"], high=row["high"], reference=None))
        forest_plot(bars, args.png, args.scale)


# What a training step costs

def clock(device):
    """Seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


CLASSES = 1000  # ImageNet's; `cost` takes it whatever --data: the last layer costs next to nothing


def make_trainer(flags, n_classes, compiled, device):
    """What train.main makes for its loop -> namespace.

    flags, device; attack_model, train_model: the two views of one network; optimizer, scaler.
    """
    train.check(flags, 1)
    torch.manual_seed(0)
    net = train.network(flags, n_classes)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    net.to(device, memory_format=layout)
    # The view stays in eval mode
    view = attacker_view(net, smooth_backward=flags.smooth_backward in ("attacker", "both"))
    attack_model = view
    train_model = net.train()
    if compiled:
        attack_model = torch.compile(view, dynamic=False)
        train_model = torch.compile(net, dynamic=False)
    # A learning rate at which the weights hardly move: all steps are on one random batch, which the net
    # would otherwise fit or diverge on
    optimizer = torch.optim.SGD(train.parameter_groups(net, flags.wd), lr=1e-9, momentum=0.9,
                                nesterov=flags.nesterov, fused=device.type == "cuda")
    return SimpleNamespace(
        flags=flags, device=device, attack_model=in_precision(attack_model, flags.dtype, device),
        train_model=train_model, optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=flags.dtype == "fp16"))


class StepCost(NamedTuple):
    attack_seconds: float
    seconds: float  # the attack's too
    peak_bytes: int  # on a GPU, above what lay there before the step; else 0


def timed_step(trainer, x, y):
    """The attack and the update of train.main's loop on one batch -> StepCost."""
    flags = trainer.flags
    device = trainer.device
    bytes_before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        bytes_before = torch.cuda.memory_allocated()

    began = clock(device)
    x_adv = train.attack(flags, trainer.attack_model, x, y)
    attacked = clock(device)
    with precision(flags.dtype, device):
        logits = trainer.train_model(x_adv)
    loss = F.cross_entropy(logits.float(), y, label_smoothing=flags.label_smoothing)
    trainer.scaler.scale(loss).backward()
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    ended = clock(device)

    peak_bytes = 0
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated() - bytes_before
    return StepCost(attacked - began, ended - began, peak_bytes)


def loader_speed(flags, batch_size):
    """Images a second that one core makes ready for training."""
    images = data.load(flags.data, flags.data_dir, train=True, res=flags.res)
    torch.set_num_threads(1)  # one core
    endless = 10**6  # epochs
    loader = data.train_batches(images, torch.arange(images.n), batch_size, endless,
                                autoaugment=flags.autoaugment)
    next(loader)
    began = time.monotonic()
    n_images = 0
    while time.monotonic() - began < 2:  # seconds
        _, x, _ = next(loader)
        n_images += len(x)
    return n_images / (time.monotonic() - began)


class Variant(NamedTuple):
    """What one row of the cost table is about."""

    act: str
    steps: int
    compiled: bool


def cost(args):
    flags = args.train
    device, _, _ = open_device(flags.device, flags.dtype)
    torch.backends.cudnn.benchmark = True
    need(min(args.pgd) >= 0, f"--pgd {min(args.pgd)} is no number of steps; use 0 for none, or more")
    n = args.batch_size or (32 if device.type == "cpu" else 128)
    how_to_run = [False, True] if flags.compile else [False]  # compiled or not
    if flags.compile:  # all variants run the same code: past this limit torch would run them eagerly
        usual_limit = 8  # torch's, which is meant for one network
        torch._dynamo.config.recompile_limit = usual_limit * len(args.acts) * len(args.pgd)
    trainers = {}
    for compiled in how_to_run:
        for act in args.acts:
            for steps in args.pgd:
                changed = dict(act=act, steps=steps, early_stop=False)  # --early-stop needs steps > 0
                own_flags = argparse.Namespace(**{**vars(flags), **changed})
                trainer = make_trainer(own_flags, CLASSES, compiled, device)
                trainers[Variant(act, steps, compiled)] = trainer

    # The variants take turns, so that other work on the machine slows all of them alike
    x = torch.rand(n, 3, flags.res, flags.res, device=device)
    y = torch.arange(n, device=device) % CLASSES
    rounds = {variant: [] for variant in trainers}
    n_warmups = 2
    for number in range(n_warmups + args.rounds):
        for variant, trainer in trainers.items():
            show(f"round {number + 1} of {n_warmups + args.rounds}: {variant.act}, PGD-{variant.steps}")
            step_cost = timed_step(trainer, x, y)
            if number >= n_warmups:
                rounds[variant].append(step_cost)
    medians = {variant: StepCost(*np.median(costs, axis=0)) for variant, costs in rounds.items()}

    say(f"{flags.arch}, {flags.res} px, {n} images, {flags.dtype}, {device_name(device)}")
    on_gpu = device.type == "cuda"
    say("act         PGD  compiled  ms/step  img/s  attack  x PGD-0  expected  x ReLU"
        + ("  peak MiB" if on_gpu else ""))
    for variant, median in medians.items():
        to_plain = ratio(median, medians.get(variant._replace(steps=0)))
        to_relu = ratio(median, medians.get(variant._replace(act="relu")))
        line = (f"{variant.act:<11}{variant.steps:4}{'yes' if variant.compiled else 'no':>10}"
                f"{1e3 * median.seconds:9.1f}{n / median.seconds:7.0f}"
                f"{median.attack_seconds / median.seconds:8.0%}{to_plain:>9}"
                f"{passes_of(variant.steps) / passes_of(0):10.2f}{to_relu:>8}")
        if on_gpu:
            line += f"{median.peak_bytes / 2**20:10.0f}"
        say(line)
    try:
        speed = loader_speed(flags, n)
    except SystemExit as reason:
        say(f"loader: {reason}")
        return
    last = list(medians.values())[-1]
    share = n / speed / last.seconds
    say(f"loader: {speed:.0f} img/s on one core, {share:.1%} of the last row's step")


def passes_of(steps):
    """The cost of a training step in forward passes.

    A forward pass costs 1, a backward pass to the image alone 1, one with the weights 2: so a step of
    the attack costs 2 and the update 3.
    """
    return 2 * steps + 3


def ratio(median, reference):
    """A step's seconds relative to the reference's; - where that was not measured."""
    if reference is None:
        return "-"
    return f"{median.seconds / reference.seconds:.2f}"


# What a whole run costs

IMAGENET_IMAGES = 1281167


class Size(NamedTuple):
    """Of a network: its parameters; of one image: FLOPs forward, bytes kept for the backward pass."""

    n_parameters: int
    flops: float
    kept_bytes: float


def saved_tensors(net, x):
    """What net's forward pass on x keeps for the backward pass: tensors, one for each storage."""
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor  # unlike data_ptr, not 0 on the meta device
        return tensor

    def hand_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, hand_back):
        net(x)
    return list(saved.values())


def size_of(flags, n_classes, res):
    """The Size of train.py's network at res pixels, on the meta device: nothing is computed."""
    with torch.device("meta"):
        net = train.network(flags, n_classes)
        x = torch.empty(2, 3, res, res)  # two images, since BatchNorm wants more than one value
    with FlopCounterMode(display=False) as counter:
        tensors = saved_tensors(net, x)
    n_bytes = 0
    for tensor in tensors:
        if tensor.shape[:1] == (2,):  # a row an image: no weight
            n_bytes += tensor.nbytes
    n_parameters = sum(p.numel() for p in net.parameters())
    return Size(n_parameters, counter.get_total_flops() / 2, n_bytes / 2)


def median_step(trainer, n_classes, n, res, n_warmups, n_timed):
    """The median of some steps on n images, after some that allocate, tune and compile -> StepCost."""
    x = torch.rand(n, 3, res, res, device=trainer.device)
    y = torch.arange(n, device=trainer.device) % n_classes
    costs = []
    for number in range(n_warmups + n_timed):
        show(f"step {number + 1} of {n_warmups + n_timed}, {n} images at {res} px")
        costs.append(timed_step(trainer, x, y))
    return StepCost(*np.median(costs[n_warmups:], axis=0))


def time_a_gpu(trainer, n_classes, n, res):
    """Time steps on the batch that one GPU has in the run -> images a second, what was timed."""
    try:
        median = median_step(trainer, n_classes, n, res, n_warmups=3, n_timed=5)
    except torch.cuda.OutOfMemoryError:
        raise SystemExit(f"{n} images at {res} px do not fit a {device_name(trainer.device)}; use more "
                         "--processes, or train.py's --accum")
    return n / median.seconds, (f"{n} images at {res} px took {median.seconds:.3f} s and "
                                f"{median.peak_bytes / 2**30:.1f} GiB beside weights and momentum")


def time_a_cpu(trainer, n_classes, size, passes):
    """Time a step as large as some seconds allow, scale by FLOPs -> images a second, what was timed."""
    full_res = trainer.flags.res
    speed = None  # FLOPs a second
    # Ever larger steps, and none that the last speed says would take more than 5 seconds
    for n, shrink in ((2, 8), (2, 4), (2, 2), (2, 1), (8, 1), (32, 1)):
        res = full_res // shrink
        if res < min(32, full_res):
            continue
        n_flops = passes * n * size_of(trainer.flags, n_classes, res).flops
        if speed is not None and n_flops / speed > 5:
            break
        median = median_step(trainer, n_classes, n, res, n_warmups=1, n_timed=1)
        speed = n_flops / median.seconds
        timed = f"{n} images at {res} px took {median.seconds:.2f} s; scaled by FLOPs"
    return speed / (passes * size.flops), timed


def plan(args):
    """What a run is made of and how long it takes: steps are timed, the rest is arithmetic."""
    flags = args.train
    need(args.processes >= 1, f"--processes {args.processes} trains nothing; use 1 or more")
    train.check(flags, args.processes)
    device, _, _ = open_device(flags.device, flags.dtype)
    try:
        images = data.load(flags.data, flags.data_dir, train=True, res=flags.res)
        n_images = images.n
        n_classes = len(images.classes)
        source = "counted"
    except SystemExit:
        if flags.data != "imagenet" or flags.data_dir is not None:
            raise
        n_images = IMAGENET_IMAGES
        n_classes = CLASSES
        source = "ImageNet's: no folder is here"
    members, _ = data.hold_out(n_images, flags.limit, flags.holdout)
    batch_size = min(flags.batch_size, len(members))
    n_steps = len(members) // batch_size  # a short last batch is dropped
    n_seen = flags.epochs * n_steps * batch_size

    size = size_of(flags, n_classes, flags.res)
    passes = passes_of(flags.steps)
    n_on_device = max(1, batch_size // (args.processes * flags.accum))
    trainer = make_trainer(flags, n_classes, flags.compile, device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        speed, timed = time_a_gpu(trainer, n_classes, n_on_device, flags.res)
    else:
        speed, timed = time_a_cpu(trainer, n_classes, size, passes)
    hours = n_seen / speed / 3600

    copies = 4 if flags.ema else 3  # weights, gradients, momentum; with --ema the average
    weight_bytes = copies * 4 * size.n_parameters
    kept_bytes = size.kept_bytes
    if flags.dtype in ("bf16", "fp16"):
        kept_bytes = kept_bytes / 2
    name = device_name(device)
    n_flops = passes * size.flops
    say(f"network  {flags.arch} {flags.act} at {flags.res} px, {size.n_parameters / 1e6:.1f}M "
        f"parameters, {size.flops / 1e9:.2f} GFLOPs forward an image")
    say(f"data     {len(members)} images to train on, {n_classes} classes ({source})")
    say(f"step     {n_flops * batch_size / 1e12:.1f} TFLOPs; PGD-{flags.steps} and the update are "
        f"{passes} forwards")
    say(f"run      {flags.epochs} epochs x {n_steps} steps x {batch_size} images = {n_seen / 1e6:.1f}M "
        f"images, {n_flops * n_seen / 1e18:.3g} EFLOPs")
    say(f"memory   {weight_bytes / 2**30:.1f} GiB for weights and optimizer; about "
        f"{n_on_device * kept_bytes / 2**30:.0f} GiB for the {n_on_device} images that each of "
        f"{args.processes} devices holds, {kept_bytes / 2**20:.0f} MiB each")
    say(f"timed    {timed}; on {name} in {flags.dtype}, without loading, averaging and validation")
    say(f"hours    {hours:,.1f} on 1, {hours / 8:,.1f} on 8, {hours / 64:,.1f} on 64 x {name}")


# Drawing: one figure, and one way to draw an axis

FINE = 4  # shapes are drawn this many times finer and then averaged, which makes their edges smooth
INK = "#1E1E1E"
GREY = "#6E6E6E"
FAINT = "#E4E4E4"
BLUE = "#0072B2"
ORANGE = "#D55E00"
# Okabe and Ito's colours without the yellow, for all eyes, then two of Paul Tol's and a grey
COLOURS = ("#000000", ORANGE, BLUE, "#009E73", "#56B4E9", "#E69F00", "#CC79A7",
           "#332288", "#999933", "#8C8C8C")
# Dashes and markers tell curves apart in grey too. A dash is lengths of ink and gap in turn; None: solid
DASHES = (None, (6, 4), (14, 4), (2, 3))
# A marker is its number of corners, the angle of the first in degrees, and its size relative to a disc's
DISC = (40, 0, 1.0)
SQUARE = (4, 45, 1.25)
TRIANGLE = (3, -90, 1.4)
DIAMOND = (4, 0, 1.3)
MARKERS = (DISC, SQUARE, TRIANGLE, DIAMOND)
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def check_picture(args):
    """Refuse a --png that cannot be drawn, before the work."""
    if args.png is not None:
        need(Path(args.png).suffix == ".png", f"--png {args.png} is no PNG's name; let it end in .png")
        need(not Path(args.png).is_dir(), f"--png {args.png} is a folder; give the name of a file in it")


def text_width_of(texts, size=12):
    """The width of the longest text in units."""
    font = ImageFont.load_default(size)
    return math.ceil(max(font.getlength(text) for text in texts))


class Style(NamedTuple):
    """How the i-th of several curves or markers looks."""

    colour: str
    dash: tuple
    shape: tuple


def style(i):
    """Twenty styles; then they begin again."""
    return Style(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])


def point_between(start, end, share):
    """The point at a share of the way from start to end."""
    start_x, start_y = start
    end_x, end_y = end
    return start_x + share * (end_x - start_x), start_y + share * (end_y - start_y)


def dashed(points, dash):
    """A line through points [(x, y), ...] -> the pieces that are drawn; dash: ink and gap in turn."""
    pieces = []
    piece = [points[0]]
    turn = 0  # which length of the pattern; ink at even turns
    remaining = dash[0]
    for start, end in zip(points, points[1:]):
        while math.dist(start, end) > remaining:  # the turn ends inside this segment
            share = remaining / math.dist(start, end)
            start = point_between(start, end, share)
            piece.append(start)
            if turn % 2 == 0:
                pieces.append(piece)
            piece = [start]
            turn = (turn + 1) % len(dash)
            remaining = dash[turn]
        remaining -= math.dist(start, end)
        piece.append(end)
    if turn % 2 == 0:
        pieces.append(piece)
    return pieces


class Figure:
    """A white picture of width x height units, `scale` pixels a unit; (0, 0) is its upper left unit.

    A line of width 1 at whole numbers fills whole pixels. Text waits for `save`: it is sharpest
    when drawn at its final size.
    """

    def __init__(self, width, height, scale):
        self.scale = scale
        size = (round(width * scale), round(height * scale))
        self.image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.texts = []

    def fine(self, length):
        """Units -> pixels of the fine image."""
        return round(length * self.scale * FINE)

    def fine_points(self, points):
        """Points [(x, y), ...], the middles of units -> in pixels of the fine image."""
        # The middle of a unit lies between two fine pixels, b - 1 and b. Pillow centres a line of even
        # width, drawn to the right or down through pixel p, between p and p + 1: so p has to be b - 1
        return [(self.fine(x + 0.5) - 1, self.fine(y + 0.5) - 1) for x, y in points]

    def line(self, points, colour=INK, width=1.0, dash=None):
        """A line through points [(x, y), ...]; `dash`: lengths of ink and gap in turn."""
        pieces = [points] if dash is None else dashed(points, dash)
        for piece in pieces:
            if len(piece) == 2:
                piece = sorted(piece)  # to the right or down: other lines Pillow shifts the other way
            self.pen.line(self.fine_points(piece), colour, self.fine(width), joint="curve")

    def polygon(self, points, colour):
        self.pen.polygon(self.fine_points(points), colour)

    def marker(self, point, radius, colour, shape=DISC, hollow=False):
        """A marker around a point, with a white halo that parts it from what it covers."""
        n_corners, first, size = shape
        edge = 1.5 / math.cos(math.pi / n_corners)  # at the corners, for 1.5 units along the sides
        layers = [(radius * size + edge, "white"), (radius * size, colour)]
        if hollow:
            layers.append((radius * size - edge, "white"))
        x, y = point
        for reach, fill in layers:
            corners = []
            for k in range(n_corners):
                angle = math.radians(first + 360 * k / n_corners)
                corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
            self.polygon(corners, fill)

    def paste(self, pixels, left, top, width, height):
        """uint8 pixels (H, W, 3), stretched over a rectangle."""
        image = Image.fromarray(pixels).resize((self.fine(width), self.fine(height)), Image.NEAREST)
        self.image.paste(image, (self.fine(left), self.fine(top)))

    def text(self, x, y, words, anchor="ms", size=12, colour=INK):
        """Words at a point; `anchor` as in Pillow: l, m, r, then a (top), m (middle), s (baseline)."""
        self.texts.append((x, y, words, anchor, size, colour))

    def save(self, path):
        image = self.image.reduce(FINE)
        pen = ImageDraw.Draw(image)
        for x, y, words, anchor, size, colour in self.texts:
            font = ImageFont.load_default(size * self.scale)
            pen.text(((x + 0.5) * self.scale, (y + 0.5) * self.scale), words, colour, font, anchor)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        except OSError as reason:
            raise SystemExit(f"cannot write {path} ({reason.strerror}); give another file with --png")
        say(f"{path}")


def span(values, least=-math.inf, most=math.inf):
    """The ends of an axis for these values: a little room on both sides, never beyond least and most."""
    low = min(values)
    high = max(values)
    room = 0.05 * ((high - low) or abs(high) or 1)
    return max(least, low - room), min(most, high + room)


def ticks(low, high, most):
    """Round numbers from low to high, about `most` of them: multiples of 1, 2 or 5 times 10^k."""
    smallest = (high - low) / most  # the smallest step that gives no more
    power = 10.0 ** math.floor(math.log10(smallest))
    step = min(factor * power for factor in (1, 2, 5, 10) if factor * power >= smallest)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def axis(fig, start, end, low, high, label, away):
    """A line from start to end with numbers from low to high.

    away: the direction from the line to its numbers, a unit vector.
    """
    across, down = away
    upright = down == 0
    side = "m"
    if across != 0:
        side = "r" if across < 0 else "l"
    anchor = side + ("m" if upright else "a")

    def beside(point, distance):
        x, y = point
        return x + distance * across, y + distance * down

    spacing = 32 if upright else 48  # of the numbers, at least
    for tick in ticks(low, high, math.dist(start, end) / spacing):
        x, y = point_between(start, end, (tick - low) / (high - low))
        point = (round(x), round(y))  # whole pixels: a sharp line
        fig.line([point, beside(point, 4)])
        fig.text(*beside(point, 7), f"{tick:.6g}", anchor)
    fig.line([start, end])
    if upright:
        x, y = end
        fig.text(x, y - 10, label, "ms")
    else:
        distance = 24 if across == 0 else 36  # beyond the numbers
        fig.text(*beside(point_between(start, end, 0.5), distance), label, anchor)


def axes(fig, box, xs, ys, xlabel, ylabel, title="", grid=True):
    """Two axes around box = (left, top, right, bottom); xs and ys are their ends.

    -> place(x, y): the point of the figure that belongs to a point of the data.
    """
    left, top, right, bottom = box
    x_low, x_high = xs
    y_low, y_high = ys

    def place(x, y):
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    if grid:
        for tick in ticks(x_low, x_high, (right - left) / 48):
            x, _ = place(tick, y_low)
            fig.line([(round(x), top), (round(x), bottom)], FAINT)
        for tick in ticks(y_low, y_high, (bottom - top) / 32):
            _, y = place(x_low, tick)
            fig.line([(left, round(y)), (right, round(y))], FAINT)
    fig.text((left + right) / 2, top - 28, title, "ms", 13)
    axis(fig, (left, bottom), (right, bottom), x_low, x_high, xlabel, (0, 1))
    axis(fig, (left, bottom), (left, top), y_low, y_high, ylabel, (-1, 0))
    return place


class Panel(NamedTuple):
    """One diagram of several: what its axes say and where they end, and its lines."""

    title: str
    xlabel: str
    ylabel: str
    xs: tuple  # the ends of the axis
    ys: tuple
    lines: list  # for each name its points [(x, y), ...]; none: nothing is drawn


def panel_boxes(n_panels, n_columns, width, height):
    """Panels in rows, each width x height -> their boxes, and how far right and down they reach."""
    boxes = []
    for p in range(n_panels):
        left = 60 + (width + 70) * (p % n_columns)
        top = 60 + (height + 100) * (p // n_columns)
        boxes.append((left, top, left + width, top + height))
    n_rows = math.ceil(n_panels / n_columns)
    return boxes, 60 + (width + 70) * n_columns, 20 + (height + 100) * n_rows


def draw_panels(panels, names, n_columns, path, scale):
    """Panels in rows, one line for each name in each, and the names beside them, never on the data."""
    boxes, right, bottom = panel_boxes(len(panels), n_columns, 270, 240)
    width = right + 42 + text_width_of(names) + 20
    fig = Figure(width, max(bottom, 90 + 20 * len(names)), scale)

    for panel, box in zip(panels, boxes):
        if not any(panel.lines):  # no axis without a number
            left, top, right_of_box, bottom_of_box = box
            middle = point_between((left, top), (right_of_box, bottom_of_box), 0.5)
            fig.text(*middle, f"{panel.title}: nothing yet", colour=GREY)
            continue
        place = axes(fig, box, panel.xs, panel.ys, panel.xlabel, panel.ylabel, panel.title)
        for i, line in enumerate(panel.lines):
            colour, dash, shape = style(i)
            points = [place(x, y) for x, y in line]
            if len(points) > 1:
                fig.line(points, colour, 2, dash)
            if len(points) <= 40:
                for point in points:
                    fig.marker(point, 3, colour, shape)

    y = 70
    for i, name in enumerate(names):
        colour, dash, _ = style(i)
        fig.line([(right, y), (right + 34, y)], colour, 2, dash)
        fig.text(right + 42, y, name, "lm")
        y += 20
    fig.save(path)


# The curves, and what they cost: SAT Figs. 1 and 2

ROUNDS = 101  # of timing; the median counts
EDGE = 1e-9  # left and right of 0, where a curve may have a jump or a kink


def derivatives(act, x):
    """An activation at x (n,) float64 -> its value, slope and curvature, each (n,)."""
    x = x.clone().requires_grad_()
    y = act.double()(x)
    slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
    curvature = torch.zeros_like(x)
    if slope.requires_grad:  # not that of torch.where or clamp: it is constant between kinks
        curvature, = torch.autograd.grad(slope.sum(), x)
    return y.detach(), slope.detach(), curvature


def smoothness(act):
    """How smooth a curve is -> C0, C1 or C2+, the jump of its slope at 0, its largest curvature.

    A jump below 1e-3 is rounding, or a continuous slope that rises between -EDGE and EDGE.
    """
    _, slope, curvature = derivatives(act, torch.tensor([-EDGE, EDGE], dtype=torch.float64))
    jump = slope.diff().abs().item()
    kink = curvature.diff().abs().item()
    if jump > 1e-3:
        return "C0", jump, math.inf
    at = torch.cat([torch.linspace(-6, 6, 12001), torch.tensor([-EDGE, EDGE])])
    _, _, curvature = derivatives(act, at.double())
    largest = curvature.abs().max().item()
    return "C1" if kink > 1e-3 else "C2+", jump, largest


def bytes_saved(act, x):
    """The bytes that the forward pass keeps for the backward pass, for each element of x."""
    return sum(tensor.nbytes for tensor in saved_tensors(act, x)) / x.numel()


def act_seconds(act, x):
    """Seconds of one forward pass and of one backward pass."""
    start = clock(x.device)
    y = act(x)
    middle = clock(x.device)
    torch.autograd.grad(y, [x, *act.parameters()], x)  # x stands in for the gradient from above
    return middle - start, clock(x.device) - middle


def print_costs():
    """A row for each curve: how smooth it is, and what it costs on this machine, in units of ReLU."""
    device, _, _ = open_device("auto", "fp32")
    n = 2**17 if device.type == "cpu" else 2**24
    x = torch.randn(n, device=device, requires_grad=True)
    acts = {name: make_act(name).to(device) for name in ACTIVATIONS}

    seconds = {name: [] for name in acts}
    for k in range(2 + ROUNDS):  # all curves in turn; the first two rounds warm up
        show(f"timing the activations, round {k + 1} of {2 + ROUNDS}")
        for name, act in acts.items():
            seconds[name].append(act_seconds(act, x))
    medians = {name: np.median(rounds[2:], axis=0) for name, rounds in seconds.items()}

    where = f"on {device}"
    say(f"{where:<11}class  jump of f'(0)  largest f''  saved bytes  fwd/ReLU  bwd/ReLU")
    for name in acts:
        kind, jump, largest = smoothness(make_act(name))
        forward, backward = medians[name] / medians["relu"]
        saved = bytes_saved(acts[name], x)
        curve = f"{name:<11}{kind:<5}{jump:15.3f}{largest:13.3f}"
        say(f"{curve}{saved:13.1f}{forward:10.2f}{backward:10.2f}")


def activations(args):
    check_picture(args)
    torch.set_num_threads(1)  # threads that wait for each other would hide what a curve costs
    print_costs()
    panels = []
    for reach, note in ((4, ""), (0.3, ", around 0")):
        at = torch.linspace(-reach, reach, 801, dtype=torch.float64)
        values = []
        slopes = []
        for name in ACTIVATIONS:
            value, slope, _ = derivatives(make_act(name), at)
            values.append(list(zip(at.tolist(), value.tolist())))
            slopes.append(list(zip(at.tolist(), slope.tolist())))
        for title, label, lines in (("Activations", "f(x)", values), ("Derivatives", "f '(x)", slopes)):
            heights = [y for line in lines for _, y in line]
            panels.append(Panel(title + note, "x", label, span([-reach, reach]), span(heights), lines))
    draw_panels(panels, list(ACTIVATIONS), 2, args.png or "out/activations.png", args.scale)


# Training runs over their epochs

def read_log(folder):
    """A run's log.jsonl -> its lines; a last one without its end is left out: it is being written."""
    path = Path(folder) / "log.jsonl"
    wanted = "give folders that train.py wrote"
    try:
        texts = path.read_text().split("\n")[:-1]
        lines = [json.loads(text) for text in texts]
    except OSError as reason:
        raise SystemExit(f"no run in {folder}: {path} cannot be read ({reason.strerror}); {wanted}")
    except ValueError as reason:
        raise SystemExit(f"{path} is damaged ({reason}); {wanted}")
    for line in lines:
        need(isinstance(line, dict) and "kind" in line, f"{path} is damaged (it holds {line}); {wanted}")
    return lines


def points_of(lines, kind, field, unit):
    """The points (epoch, value) of a log's field. A resumed run may repeat an epoch: the last counts."""
    values = {}
    for line in lines:
        if line["kind"] == kind and math.isfinite(line[field]):
            values[line["epoch"]] = unit * line[field]
    return sorted(values.items())


def curves(args):
    check_picture(args)
    logs = [read_log(folder) for folder in args.folders]
    names = []
    for folder, log in zip(args.folders, logs):
        is_validated = any(line["kind"] == "val" for line in log)
        names.append(folder if is_validated else f"{folder} (not validated yet)")
    panels = []
    shown = (("Training loss", "cross-entropy", "epoch", "loss", 1, math.inf),
             ("Clean accuracy, held-out images", "accuracy (%)", "val", "clean", 100, 100),
             ("Robust accuracy, held-out images", "accuracy (%)", "val", "robust", 100, 100))
    for title, ylabel, kind, field, unit, most in shown:
        lines = [points_of(log, kind, field, unit) for log in logs]
        points = [point for line in lines for point in line]
        last_epoch = max([5] + [epoch for epoch, _ in points])  # an axis of five epochs at least
        ys = span([y for _, y in points] or [1], 0, most)
        panels.append(Panel(title, "epoch", ylabel, (0, 1.03 * last_epoch), ys, lines))
    draw_panels(panels, names, 3, args.png or "out/curves.png", args.scale)


# Reports of evaluate.py, clean against robust accuracy: SAT Figs. 3 and 4

def load_json(path, wanted):
    """What a JSON file holds; SystemExit if there is none."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as reason:
        raise SystemExit(f"cannot read {path} ({reason.strerror}); give {wanted}")
    except ValueError:
        raise SystemExit(f"{path} holds no JSON, or is damaged; give {wanted}")


class Measured(NamedTuple):
    """What a report says of a network: accuracies (low, value, high) in percent, with 95% intervals."""

    title: str  # data and attack: of its panel
    name: str  # of network_name
    is_normal: bool  # known to be trained without an attack
    clean: tuple
    robust: tuple


def network_name(report):
    """The network and the main flags of its training; runs that share them share colour and marker."""
    name = f"{report['arch']} {report['act']}"
    if report.get("act_alpha") is not None:
        name += f" alpha {report['act_alpha']:g}"
    name += f", {report['res']} px"
    recipe = report.get("train")
    if recipe is None:  # nothing is known of its training, so it stands for itself
        return f"{name}, {report['weights']}"
    if recipe["steps"] == 0:
        name += ", normal"
    else:
        name += f", PGD-{recipe['steps']} eps {recipe['eps']:g}"
    if recipe["smooth_backward"] != "none":
        name += f", smooth backward {recipe['smooth_backward']}"
    return f"{name}, {recipe['epochs']} epochs"


def percent(k, n):
    """k of n -> the low end of its 95% interval, its share, the high end, in percent."""
    low, high = wilson(k, n)
    return 100 * low, 100 * k / n, 100 * high


def read_report(path):
    """A report of evaluate.py -> Measured."""
    wanted = "reports of evaluate.py, out/eval/*.json"
    report = load_json(path, wanted)
    is_report = isinstance(report, dict) and {*SETTING, "n_robust", "n_correct"} <= report.keys()
    need(is_report, f"{path} is no report of evaluate.py; give {wanted}")
    n = report["n"]
    need(n > 0, f"{path} is a report on no images; give {wanted}")
    recipe = report.get("train")
    is_normal = recipe is not None and recipe["steps"] == 0
    clean = percent(report["n_correct"], n)
    robust = percent(report["n_robust"], n)
    title = f"{report['data']}, {setting_name(report)}"
    return Measured(title, network_name(report), is_normal, clean, robust)


def read_paper(path):
    """The paper's networks: [{"name", "clean", "robust"}, ...], in percent."""
    wanted = 'a list like [{"name": "ResNet-50 SiLU", "clean": 69.7, "robust": 42.3}]'
    paper = load_json(path, wanted)
    need(isinstance(paper, list), f"{path} holds no list; give {wanted}")
    for reference in paper:
        is_whole = isinstance(reference, dict) and {"name", "clean", "robust"} <= set(reference)
        need(is_whole, f"{path} holds {reference}; give {wanted}")
    return paper


def draw_ring(fig, point, number):
    """One of the paper's networks: a ring with its number in the legend."""
    x, y = point
    fig.marker(point, 8, GREY, hollow=True)
    fig.text(x, y, f"{number}", "mm", 10, GREY)


def scatter(args):
    """A panel for each data set and attack, a marker for each report, its 95% intervals as a cross."""
    check_picture(args)
    nets = [read_report(path) for path in args.files]
    paper = read_paper(args.paper) if args.paper else []
    titles = list(dict.fromkeys(net.title for net in nets))  # each once, in the order of the files
    styles = {}
    hollow = {}
    for net in nets:
        if net.name not in styles:
            styles[net.name] = style(len(styles))
            hollow[net.name] = net.is_normal

    legend = list(styles) + [reference["name"] for reference in paper]
    boxes, right, bottom = panel_boxes(len(titles), min(3, len(titles)), 350, 320)
    width = right + 16 + text_width_of(legend) + 24
    fig = Figure(width, max(bottom, 90 + 20 * len(legend)), args.scale)

    for title, box in zip(titles, boxes):
        shown = [net for net in nets if net.title == title]
        cleans = [reference["clean"] for reference in paper]
        robusts = [reference["robust"] for reference in paper]
        for net in shown:
            cleans += net.clean
            robusts += net.robust
        xs = span(cleans, 0, 100)
        ys = span(robusts, 0, 100)
        place = axes(fig, box, xs, ys, "clean accuracy (%)", "robust accuracy (%)", title)
        for number, reference in enumerate(paper, 1):
            draw_ring(fig, place(reference["clean"], reference["robust"]), number)
        for net in shown:
            colour = styles[net.name].colour
            clean_low, clean, clean_high = net.clean
            robust_low, robust, robust_high = net.robust
            fig.line([place(clean_low, robust), place(clean_high, robust)], colour)
            fig.line([place(clean, robust_low), place(clean, robust_high)], colour)
        for net in shown:  # all markers lie on all crosses
            _, clean, _ = net.clean
            _, robust, _ = net.robust
            colour, _, shape = styles[net.name]
            fig.marker(place(clean, robust), 5, colour, shape, hollow[net.name])

    y = 70
    for name, (colour, _, shape) in styles.items():
        fig.marker((right, y), 5, colour, shape, hollow[name])
        fig.text(right + 16, y, name, "lm")
        y += 20
    for number, reference in enumerate(paper, 1):
        draw_ring(fig, (right, y), number)
        fig.text(right + 16, y, reference["name"], "lm")
        y += 20
    fig.save(args.png or "out/scatter.png")


# What `compare --json` found, beside the paper's differences

class Mark(NamedTuple):
    """The colour and marker of a verdict; the marker alone is enough in grey."""

    name: str
    colour: str
    shape: tuple
    hollow: bool


HIGHER = Mark("higher", BLUE, DISC, False)
LOWER = Mark("lower", ORANGE, SQUARE, False)
UNDECIDED = Mark("undecided", GREY, DISC, True)
PAPER = Mark("the paper", INK, DIAMOND, True)
ROW = 30  # the height of a row


def draw_difference(fig, row, y, across):
    """A row's interval as a line, its mean as a marker, the paper's value; across(value) -> x."""
    mark = UNDECIDED
    if row["low"] > 0:
        mark = HIGHER
    elif row["high"] < 0:
        mark = LOWER
    fig.line([(across(row["low"]), y), (across(row["high"]), y)], mark.colour, 3)
    if row.get("reference") is not None:
        fig.marker((across(row["reference"]), y), 5, PAPER.colour, PAPER.shape, PAPER.hollow)
    fig.marker((across(row["difference"]), y), 5, mark.colour, mark.shape, mark.hollow)


def forest_plot(rows, path, scale, title="Difference in accuracy"):
    """Differences with their 95% intervals, one row each, and the paper's beside them.

    A row is a dict: name; difference, low, high in percentage points; reference, the paper's or None.
    """
    has_reference = any(row.get("reference") is not None for row in rows)
    left = 24 + text_width_of([row["name"] for row in rows], 13) + 28
    right = left + 400
    width = right + (220 if has_reference else 160)
    top = 72
    bottom = top + ROW * len(rows)
    fig = Figure(max(width, 48 + text_width_of([title], 15)), bottom + 94, scale)

    values = [0]
    for row in rows:
        values += [row["low"], row["high"]]
        if row.get("reference") is not None:
            values.append(row["reference"])
    low, high = span(values)

    def across(value):
        return left + (value - low) / (high - low) * (right - left)

    fig.text(24, 32, title, "ls", 15)
    fig.text(right + 82, top - 12, "difference [95%]", "ms", 11, GREY)
    if has_reference:
        fig.text(width - 24, top - 12, "paper", "rs", 11, GREY)
    for i in range(0, len(rows), 2):  # a tint under every second row leads the eye along it
        y = top + ROW * i
        fig.polygon([(12, y), (width - 12, y), (width - 12, y + ROW), (12, y + ROW)], "#F5F5F5")
    for tick in ticks(low, high, (right - left) / 48):
        x = round(across(tick))
        fig.line([(x, top), (x, bottom)], INK if tick == 0 else FAINT)
    axis(fig, (left, bottom), (right, bottom), low, high, "percentage points", (0, 1))

    for i, row in enumerate(rows):
        y = top + ROW * i + ROW / 2
        fig.text(24, y, row["name"], "lm", 13)
        draw_difference(fig, row, y, across)
        fig.text(right + 60, y, f"{row['difference']:+.1f}", "rm", 13)
        fig.text(right + 68, y, f"[{row['low']:.1f}, {row['high']:.1f}]", "lm", 12, GREY)
        if row.get("reference") is not None:
            fig.text(width - 24, y, f"{row['reference']:+.1f}", "rm", 13)

    x = left
    y = bottom + 70
    for mark in (HIGHER, LOWER, UNDECIDED, PAPER):
        if mark is not PAPER or has_reference:
            fig.marker((x, y), 5, mark.colour, mark.shape, mark.hollow)
            fig.text(x + 12, y, mark.name, "lm", 11, GREY)
            x += 40 + text_width_of([mark.name], 11)
    fig.save(path)


def forest(args):
    """A row for each comparison; its name is that of its file, without the ending."""
    check_picture(args)
    wanted = "files that compare --json wrote"
    example = '{"silu": 9.3}, names and percentage points'
    paper = load_json(args.paper, example) if args.paper else {}
    need(isinstance(paper, dict), f"{args.paper} holds no differences; give {example}")
    rows = []
    measures = []
    for path in args.files:
        found = load_json(path, wanted)
        has_rows = isinstance(found, dict) and found.get("comparisons")
        need(has_rows, f"{path} has no comparisons; give {wanted}")
        for comparison in found["comparisons"]:
            measure = f"{comparison['what']}, {comparison['setting']}"
            if measure.startswith(args.only):
                measures.append(measure)
                name = Path(path).stem
                rows.append(dict(name=name, difference=comparison["difference"], low=comparison["low"],
                                 high=comparison["high"], reference=paper.get(name)))
    need(rows, f"no comparison is named like --only {args.only!r}; leave it out for robust accuracy")
    different = list(dict.fromkeys(measures))
    need(len(different) == 1, f"one picture shows one measurement, here are {len(different)}: "
         f"{'; '.join(different)}; choose with --only, the start of a name")
    for row in rows:
        if args.paper and row["reference"] is None:
            say(f"{args.paper} has no {row['name']!r}: drawn without the paper's value")
    title = f"Difference in accuracy: {different[0]}"
    forest_plot(rows, args.png or "out/forest.png", args.scale, title)


# A trained net and its images: the loss around them (SAT Fig. 5), before and after the attack

def viridis(values):
    """Numbers (...) in [0, 1] -> uint8 colours (..., 3), whose lightness rises evenly."""
    marks = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(values, marks, channel) for channel in np.transpose(VIRIDIS)]
    return np.stack(channels, -1).astype(np.uint8)


def heat_map(fig, box, z, low, high):
    """z (n, n), first index to the right, second upwards, in colours from low to high, with contours."""
    left, top, right, bottom = box
    size = (fig.fine(right - left), fig.fine(bottom - top))
    picture = z.T[::-1].astype(np.float32)  # a picture's first index is its row, counted from above
    inner = (0.5, 0.5, len(z) - 0.5, len(z) - 0.5)  # from the middle of the first to that of the last
    field = np.asarray(Image.fromarray(picture).resize(size, Image.BILINEAR, inner))
    pixels = viridis((field - low) / (high - low))
    # On a contour: within half a line's width of where the field crosses the level
    slope = np.hypot(*np.gradient(field))
    for level in ticks(low, high, (bottom - top) / 32):
        on_line = np.abs(field - level) < slope * fig.fine(1) / 2
        pixels[on_line] = 255 if level < (low + high) / 2 else 0
    fig.paste(pixels, left, top, right - left, bottom - top)


def surface_3d(fig, middle, size, z, low, high, reach, labels):
    """z (n, n) as a shaded surface over a floor from -reach to reach; `middle`: where its floor is."""
    n = len(z)
    height = (z - low) / (high - low)  # in [0, 1]
    middle_x, middle_y = middle

    def project(a, b, c):
        """The first index a and the second b in [-1, 1], height c in [0, 1] -> a point of the figure.

        The angles of view and of the light below were chosen by eye.
        """
        across = 0.75 * a - 0.66 * b
        depth = 0.66 * a + 0.75 * b
        up = 0.42 * depth + 1.1 * c
        return middle_x + size * across, middle_y - size * up

    # Lambert: brightness is the cosine between the normal (-slope_a, -slope_b, 1) and the light
    light_a, light_b, light_c = (-0.45, 0.25, 0.85)
    slope_a, slope_b = np.gradient(height, 2 / (n - 1))
    along = light_c - light_a * slope_a - light_b * slope_b
    cosine = along / np.sqrt(1 + slope_a**2 + slope_b**2)
    shade = 0.55 + 0.45 * cosine.clip(0, 1)
    colours = (viridis(height) * shade[:, :, None]).astype(int)

    at = np.linspace(-1, 1, n)
    for i in reversed(range(n - 1)):  # the farthest patch first: nearer ones cover it
        for j in reversed(range(n - 1)):
            patch = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            corners = [project(at[k], at[m], height[k, m]) for k, m in patch]
            fig.polygon(corners, tuple(colours[i, j]))
    front = project(-1, -1, 0)
    right = project(1, -1, 0)
    left = project(-1, 1, 0)
    left_top = project(-1, 1, 1)
    a_label, b_label, c_label = labels
    axis(fig, front, right, -reach, reach, a_label, (0.45, 0.89))
    axis(fig, front, left, -reach, reach, b_label, (-0.45, 0.89))
    axis(fig, left, left_top, low, high, c_label, (-1, 0))


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
    """Cross-entropies (n, n) at x + a attack + b random, a and b within +-reach; x (1, C, H, W)."""
    # Pixels may leave [0, 1]: clamping would put kinks into the picture that are not the network's
    offsets = torch.linspace(-reach, reach, n, device=x.device)
    rows = []
    for a in offsets:
        row = x + a * attack + offsets.view(n, 1, 1, 1) * random
        rows.append(cross_entropy(logits_of(net, row), y.expand(n)))
    return torch.stack(rows).cpu().numpy()


def roughness(surface):
    """Mean squared second difference, in both directions; compare at the same radius and n only."""
    along_first = np.diff(surface, n=2, axis=0)
    along_second = np.diff(surface, n=2, axis=1)
    return (np.square(along_first).mean() + np.square(along_second).mean()) / 2


def surfaces(net, name, run, n):
    """The loss around each image of a run, within twice eps -> list of (n, n)."""
    reach = 2 * run.eps / 255
    x_adv = pgd_from(net, run.index, run.x, run.y, run.eps, run.step_size, steps=20)
    delta = x_adv - run.x
    around = []
    for i in range(len(run.y)):
        show(f"the loss of {name} around image {i + 1} of {len(run.y)}")
        row = slice(i, i + 1)
        attack, random = directions(delta[row], run.index[row])
        around.append(loss_surface(net, run.x[row], run.y[row], attack, random, reach, n))
    return around


def landscape(args):
    """The loss around the first of the images, each net a column: as a surface, and from above."""
    check_picture(args)
    run = open_run(args, limit=20)
    nets = [(run.net, f"{run.arch} {run.act}, {args.weights or args.out}")]
    for path in args.against:
        net, name = other_net(path, run)
        nets.append((net, f"{name}, {path}"))
    shown = []
    titles = []
    for net, name in nets:
        around = surfaces(net, name, run, n=31)
        rough = [roughness(surface) for surface in around]
        shown.append(around[0])
        titles.append((name, f"roughness {rough[0]:.2g}"))
        spread = ""
        if len(rough) > 1:
            half = student_t(len(rough) - 1) * np.std(rough, ddof=1) / math.sqrt(len(rough))
            spread = f" +- {half:.1g}"
        say(f"{name}: roughness {rough[0]:.2g}; over {len(rough)} images {np.mean(rough):.2g}{spread}")

    low = np.min(shown)
    high = max(np.max(shown), low + 1e-6)  # a loss that is the same everywhere has an axis too
    reach = 2 * run.eps
    labels = ("attack (1/255)", "random (1/255)", "cross-entropy")
    column = max(400, 40 + text_width_of([name for name, _ in titles], 14))
    right = column * len(shown)
    fig = Figure(right + 60, 720, args.scale)
    for k, surface in enumerate(shown):
        middle = column * k + 210
        box = (middle - 130, 410, middle + 130, 670)
        name, note = titles[k]
        fig.text(middle, 28, name, "ms", 14)
        fig.text(middle, 46, note, "ms", 12, GREY)
        surface_3d(fig, (middle, 260), 110, surface, low, high, reach, labels)
        heat_map(fig, box, surface, low, high)
        axes(fig, box, (-reach, reach), (-reach, reach), labels[0], labels[1], grid=False)
    ladder = viridis(np.linspace(1, 0, 256))[:, None]  # (256, 3) -> (256, 1, 3)
    fig.paste(ladder, right - 24, 410, 14, 260)
    axis(fig, (right - 10, 670), (right - 10, 410), low, high, labels[2], (1, 0))
    fig.save(args.png or run.out / "landscape.png")


class Column(NamedTuple):
    """A column of the gallery: pictures x (N, 3, H, W), and what stands below each of them."""

    title: str
    x: torch.Tensor
    words: list
    colours: list


def column_of_guesses(title, run, x):
    """Pictures with what a net takes them for; what is wrong is orange."""
    shares, guesses = logits_of(run.net, x).softmax(1).max(1)
    words = []
    colours = []
    for share, guess, label in zip(shares.tolist(), guesses.tolist(), run.y.tolist()):
        words.append(f"{run.images.classes[guess]}, {share:.0%}")
        colours.append(INK if guess == label else ORANGE)
    return Column(title, x, words, colours)


def gallery(args):
    """A row for each image: clean, attacked, and their difference magnified."""
    check_picture(args)
    need(args.limit is None or args.limit <= 40,
         f"--limit {args.limit} is too long for a picture; use 40 at most")
    run = open_run(args, limit=6)
    steps = run.steps if args.steps is None else args.steps
    x_adv = pgd_from(run.net, run.index, run.x, run.y, run.eps, run.step_size, steps)
    magnify = max(1, round(127 / run.eps))  # eps becomes black or white
    difference = magnify * (x_adv - run.x) + 0.5
    labels = [f"label: {run.images.classes[label]}" for label in run.y.tolist()]
    columns = [column_of_guesses("clean", run, run.x),
               column_of_guesses(f"attacked, eps {run.eps:g}/255", run, x_adv),
               Column(f"difference x {magnify}, grey is 0", difference, labels, [INK] * len(labels))]

    side = 150
    gap = 20
    column_widths = []  # as wide as the longest words
    for column in columns:
        longest = max(text_width_of([column.title], 13), text_width_of(column.words))
        column_widths.append(max(side, longest))
    width = gap + sum(column_widths) + gap * len(columns)
    height = 50 + (side + 34) * len(x_adv)
    fig = Figure(width, height, args.scale)
    left = gap
    for column, column_width in zip(columns, column_widths):
        fig.text(left, 30, column.title, "ls", 13)
        top = 44
        for picture, words, colour in zip(column.x.cpu(), column.words, column.colours):
            pixels = (255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0)  # -> (H, W, 3)
            fig.paste(pixels.numpy(), left, top, side, side)
            fig.text(left, top + side + 5, words, "la", colour=colour)
            top += side + 34
        left += column_width + gap
    fig.save(args.png or run.out / "gallery.png")


# Flags

def add_picture_flags(p, where):
    p.add_argument("--png", help=f"the picture's file; default: {where}")
    p.add_argument("--scale", type=float, default=1, help="pixels a unit; 2 for fine screens")


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = p.add_subparsers(metavar="COMMAND", required=True)

    def add_command(function, help):
        # Without abbreviations: what is not known here is train.py's, and --act is not short for --acts
        command = commands.add_parser(function.__name__, help=help, description=help, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    c = add_command(report, "doubt one net's robustness: a verdict for each way to be wrong")
    evaluate.add_common_flags(c)
    c.add_argument("--surrogate", help="a second net's folder or file, whose attacks are tried too")
    c.add_argument("--normal",
                   help="a normally trained net's folder or file; if it seems robust, PGD is too weak")
    c.add_argument("--json", help="write the verdicts to this file too")

    c = add_command(compare, "runs of an idea against runs of its baseline, by image and by seed")
    c.add_argument("new", nargs="+", metavar="NEW", help="folders of runs that evaluate.py has measured")
    c.add_argument("--against", nargs="+", required=True, metavar="OLD", help="the baseline's")
    c.add_argument("--json", help="write the table to this file too")
    add_picture_flags(c, "none is drawn")

    c = add_command(cost, "what the attack and each activation cost; takes train.py's flags too")
    c.add_argument("--acts", nargs="+", default=[*ACTIVATIONS], choices=ACTIVATIONS, metavar="ACT",
                   help="instead of train.py's --act; default: all")
    c.add_argument("--pgd", nargs="+", type=int, default=[0, 1],
                   help="instead of train.py's --steps; default: 0 1")
    c.add_argument("--batch-size", type=int, help="images of a step; default: 32 on a CPU, else 128")
    c.add_argument("--rounds", type=int, default=15, help="steps of each kind; the median is shown")

    c = add_command(plan, "what a run would cost; takes train.py's flags, and needs no ImageNet")
    c.add_argument("--processes", type=int, default=8, help="devices that share a batch")

    c = add_command(landscape, "the loss around images, SAT Fig. 5")
    evaluate.add_common_flags(c)
    c.add_argument("--against", nargs="+", default=[], help="other nets' folders or files")
    add_picture_flags(c, "landscape.png in the run's folder")

    c = add_command(gallery, "images before and after the attack")
    evaluate.add_common_flags(c)
    c.add_argument("--steps", type=int, help="of PGD; default: imagenet 200, else 50")
    add_picture_flags(c, "gallery.png in the run's folder")

    c = add_command(activations, "the curves and what they cost, SAT Figs. 1 and 2")
    add_picture_flags(c, "out/activations.png")

    c = add_command(curves, "runs over their epochs")
    c.add_argument("folders", nargs="+", help="folders of runs")
    add_picture_flags(c, "out/curves.png")

    c = add_command(scatter, "clean and robust accuracy of many nets, SAT Figs. 3 and 4")
    c.add_argument("files", nargs="+", help="reports of evaluate.py")
    c.add_argument("--paper", help="a JSON file with the paper's nets, which become rings")
    add_picture_flags(c, "out/scatter.png")

    c = add_command(forest, "what several `compare --json` have found, a row each")
    c.add_argument("files", nargs="+", help="what compare --json wrote")
    c.add_argument("--paper", help='a JSON file with the paper\'s differences: {"silu": 9.3}')
    c.add_argument("--only", default="robust", help="start of a measurement's name, e.g. 'robust (last'")
    add_picture_flags(c, "out/forest.png")

    args, rest = p.parse_known_args(argv)
    if args.function in (cost, plan):
        args.train = train.get_args(rest)
    elif rest:
        p.error(f"unknown: {' '.join(rest)}; see python sanity.py {args.function.__name__} --help")
    return args


def main():
    args = get_args()
    check_ranges(args)
    args.function(args)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped")
