"""
Measure clean and robust accuracy, image by image.

After `python train.py ...`; network, weights and data come from the run's folder:
$ python evaluate.py --steps 200 --eps 4
The number to quote:
$ python evaluate.py --attack autoattack
SAT's protocol (arXiv:2006.14536), here on 8 GPUs and for weights from elsewhere:
$ torchrun --nproc_per_node=8 evaluate.py --last-iterate --weights FILE --arch resnet50 --act silu

An image counts as robust if it is classified correctly and no iterate of any restart fools the model; in
SAT's protocol, if the last iterate is classified correctly, even where the image itself is not. The
verdict depends on the weights, the attack, the image and its number; rounding aside, no batch size,
order or number of processes changes it. Verdicts are kept in a ledger, one JSON line per image, under
OUT/eval (eval-NAME for another file of weights). A stopped evaluation goes on with the same command; a
finished one, on the same images, only reports again.

Keys: SAT is the paper; its sections are numbered as there.
"""
import argparse
import ast
import fcntl
import inspect
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist

import activations
import attacks
import data
import models
from attacks import STANDARD, autoattack, masked_gradients, pgd_search
from data import duration, say, show
from models import (MEAN, MODELS, STD, attacker_view, build, in_precision, load_weights, on_device,
                    weights_hash)
from train import (check_numbers, contradictions, device_name, exit_on_value_error, flag, in_255, need,
                   open_device, read_json, warn_small_eps, write_json)


class Attack(NamedTuple):
    """What --attack calls, which flags are its own, and the searches that it may consist of.

    search: (model, x, y, eps, index, seed, verify, progress, and its own flags) -> x_adv, report, as of
    `autoattack` or `pgd_search`. `verdict_lines` says what of the report goes into the ledger.
    """

    search: Callable
    flags: tuple = ()
    # The parts that report["fooled_by"] and the calls of progress name, each with its share of a
    # batch's time, a guess for the eta; main counts the images per part. {}: the attack has no parts
    searches: dict = {}


# A new attack is its function, a line here, and in get_args its flags if it has any. A flag that is not
# given takes the data set's value or, where that has none, the function's default
ATTACKS = {
    "pgd": Attack(pgd_search, flags=("step_size", "steps", "restarts", "last_iterate")),
    "apgd": Attack(partial(autoattack, attacks=STANDARD[:2]), searches={"apgd-ce": 0.1, "apgd-t": 0.9}),
    "autoattack": Attack(autoattack, searches={"apgd-ce": 0.03, "apgd-t": 0.25, "fab-t": 0.25,
                                               "square": 0.47}),
}
# What args.json says of a network; a flag must not contradict it
NETWORK_FLAGS = ("data", "arch", "act", "act_alpha", "bn_eps", "mean", "std")


def add_common_flags(p):
    """The flags that sanity.py has too: which net, which images, how far the attack may go, where."""
    p.add_argument("--out", help="a run's folder; default: out. With --weights, only reports go there")
    p.add_argument("--weights", help="a state dict; the rest: args.json beside it, or these flags")
    p.add_argument("--data", choices=data.DATA_SETS, help="default: the run's, or imagenet")
    p.add_argument("--data-dir", help="default: the run's, or data/imagenet, or data")
    p.add_argument("--arch", help="default: the run's; " + ", ".join(MODELS))
    p.add_argument("--act", help="default: the run's")
    p.add_argument("--act-alpha", type=float, help="the curve's parameter; default: the run's")
    p.add_argument("--bn-eps", type=float, help="default: the run's; torchvision's b5 to b7: 1e-3")
    p.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"),
                   help="of pixels in [0, 1]; default: the run's, or ImageNet's; the file's own wins")
    p.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="the same")
    p.add_argument("--res", type=int, help="pixels; default: the run's, or the network's own")
    p.add_argument("--limit", type=int, help="images: the first of one fixed permutation")
    p.add_argument("--eps", type=in_255, help="L-inf radius in 1/255; default: imagenet 4, else 8")
    p.add_argument("--step-size", type=in_255, help="of PGD, in 1/255; default: imagenet 1, else 2")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw,
                                usage="python evaluate.py [flags]; --help lists them")
    add_common_flags(p)
    # the attack
    p.add_argument("--attack", default="pgd", choices=ATTACKS, help="apgd: AutoAttack's first two")
    p.add_argument("--steps", type=int, help="of PGD; default: imagenet 200, else 50")
    p.add_argument("--restarts", type=int, help="random starts of PGD to withstand; default: 1")
    p.add_argument("--last-iterate", action="store_true", default=None,
                   help="SAT's protocol: the last decides")
    p.add_argument("--smooth-backward", default="none", choices=["none", "attacker"],
                   help="attacker: through ReLU with a smooth gradient (SAT Sec. 3.2)")
    p.add_argument("--seed", type=int, default=0, help="of the random starts")
    # how
    p.add_argument("--dtype", default="fp32", choices=["fp32", "tf32", "bf16", "fp16"],
                   help="of the search; fp32 confirms every image that is fooled")
    p.add_argument("--batch-size", type=int, help="images at a time, on each device")
    p.add_argument("--workers", type=int, help="processes that read images, for each device")
    p.add_argument("--json", help="write the report to this file too")
    p.add_argument("--fresh", action="store_true", help="start over instead of going on from the ledger")
    return p.parse_args(argv)


def check(args):
    """SystemExit for flags that argparse cannot judge alone."""
    check_numbers(args)
    warn_small_eps(args)
    need(args.out is None or args.out.strip(), "--out is empty; name a run's folder, such as --out out")
    for other, attack in ATTACKS.items():
        for name in attack.flags:
            need(name in ATTACKS[args.attack].flags or getattr(args, name) is None,
                 f"{flag(name)} is a flag of --attack {other} and not of {args.attack}; drop it")
    need(args.steps == 0 or args.step_size is None or args.step_size > 0,
         "--step-size 0 is no attack; use --step-size 1, or --steps 0")
    check_json(args.json)


def check_json(path):
    """Make the folder of --json now, so that a wrong path fails before the work."""
    if path is not None:
        need(not Path(path).is_dir(), f"--json {path} is a folder; name a file in it")
        make_folder(Path(path).parent)


def make_folder(folder):
    """With its parents. SystemExit where that cannot be, such as below a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot make the folder {folder} ({error.strerror}); choose another place")


# What is measured

def find_run(args):
    """Network and data: the args.json beside the weights, or flags -> namespace.

    Of args.json only the network and the data count here, not the attack or the numerics of training.
    SystemExit where something is missing, damaged, or contradicts it.
    """
    folder = Path(args.weights).parent if args.weights else Path(args.out or "out")
    weights = Path(args.weights or folder / "model.pt")
    source = folder / "args.json"
    given = {name: getattr(args, name) for name in NETWORK_FLAGS}
    saved = dict(data="imagenet", bn_eps=1e-5, mean=list(MEAN), std=list(STD))  # unless args.json says
    train_args = None
    if source.exists():
        train_args = read_json(source)
        saved |= train_args
        clauses = contradictions(saved, given)
        need(not clauses, f"{source} says {', '.join(clauses)}; drop the flag, or move weights of "
             "another network to a folder of their own")
    elif args.weights is None:
        raise SystemExit(f"no run in {folder} (no args.json); train one, python train.py --data shapes, "
                         "or give --weights FILE --arch ARCH --act ACT --data DATA")
    else:
        need(args.arch and args.act,
             f"--weights {weights} needs the --arch and --act that it was trained with")
    if args.weights is None and not weights.exists() and (folder / "last.pt").exists():
        raise SystemExit(f"no {weights} yet, before the first validation; --weights "
                         f"{shlex.quote(str(folder / 'last.pt'))} measures the last checkpoint")

    run = SimpleNamespace(weights=weights, train_args=train_args)
    for name in (*NETWORK_FLAGS, "data_dir", "res"):
        value = getattr(args, name)
        setattr(run, name, saved.get(name) if value is None else value)
    # Reports on the folder's model.pt go to eval, on another file to eval-NAME
    home = Path(args.out or folder)
    is_own = weights.resolve() == (home / "model.pt").resolve()
    run.reports = home / ("eval" if is_own else f"eval-{weights.stem}")
    run.classes = saved.get("classes")
    run.small_input = saved.get("small_input")
    # Defaults that depend on the data and the network
    need(str(run.data) in data.DATA_SETS,
         f"the data {run.data} is unknown; the known are {', '.join(data.DATA_SETS)}")
    data_set = data.DATA_SETS[run.data]
    if run.small_input is None:
        run.small_input = data_set.small_input
    if run.res is None:
        run.res = data_set.res
    if run.res is None:
        run.res = MODELS[run.arch].res if run.arch in MODELS else 224  # build refuses an unknown arch
    return run


def open_net(run, n_classes, device):
    """The trained network in eval mode. run.mean and run.std become the file's where it holds them."""
    with exit_on_value_error():
        net = build(run.arch, run.act, n_classes, act_alpha=run.act_alpha, small_input=run.small_input,
                    bn_eps=run.bn_eps, mean=run.mean, std=run.std)
        taken = load_weights(net, run.weights)
    if taken:
        say(taken)
    for name, values in (("mean", net.mean), ("std", net.std)):
        if not values.flatten().equal(torch.tensor(getattr(run, name))):  # the file has its own
            setattr(run, name, [round(value, 6) for value in values.flatten().tolist()])
    return on_device(net, device).eval()


def load(path, device="cpu", num_classes=1000, **flags):
    """A run's folder, or a file of weights -> its net in eval mode, ready to attack.

    >>> net = load("out")
    >>> net = load("resnet50.pth", arch="resnet50", act="relu")  # any of NETWORK_FLAGS

    num_classes: of a file without a run's args.json beside it. ValueError in the script's words.
    """
    if not Path(path).exists():
        raise ValueError(f"there is no {path}; give a run's folder or a file of weights")
    args = get_args(["--out" if Path(path).is_dir() else "--weights", str(path)])
    for name, value in flags.items():
        if name not in NETWORK_FLAGS:
            raise ValueError(f"load knows no {name}; use {', '.join(NETWORK_FLAGS)}")
        setattr(args, name, list(value) if isinstance(value, tuple) else value)  # lists, as in args.json
    try:
        run = find_run(args)
        net = open_net(run, len(run.classes or range(num_classes)), device)
    except SystemExit as error:
        raise ValueError(str(error)) from None
    return net


def code_digest():
    """A hex digest of the code that decides a verdict: an edit of it starts a new ledger.

    Docstrings count, comments do not; another version of Python may also start a new ledger. This file
    does not count: after an edit here that changes verdicts, use --fresh.
    """
    # Of data.py what makes pixels of a file: the images' fingerprint sees files by name and size only
    parts = (activations, models, attacks, data.read_picture, data.to_rgb, data.eval_transform)
    trees = [ast.dump(ast.parse(inspect.getsource(part))) for part in parts]
    return f"{data.key(*trees):016x}"


def from_rank_0(value):
    """Rank 0's value, on every rank; no rank continues until rank 0 gets here."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


# The ledger: one JSON line per image, one file per process

# Every verdict:         {"index": 7, "label": 3, "clean": 3, "forwards": 12} and one key more,
# of PGD:                "fooled": [restart, step]; null where none fools, or "clean" is wrong already
# of its last iterate:   "robust_at": "1100", one digit per iterate, 1 where it does not fool
# of all other attacks:  "fooled": "square"; null as above
# beside the verdicts:   {"warning": "reason: sentence"}

def is_ledger_line(line):
    """Whether a JSON value is a verdict or a warning."""
    if not isinstance(line, dict):
        return False
    has_verdict = "fooled" in line or "robust_at" in line
    is_warning = isinstance(line.get("warning"), str)
    return is_warning or (has_verdict and {"index", "label", "clean", "forwards"} <= line.keys())


def read_ledger(folder, name):
    """What all processes have written, ever -> ({index: line}, [warning]).

    A last line torn by a kill is ignored. SystemExit for any other line that is neither.
    """
    verdicts = {}
    warnings = []
    for path in sorted(folder.glob(f"{name}.*.jsonl")):
        try:
            texts = path.read_text().split("\n")[:-1]  # after the last newline: nothing, or a torn line
            lines = [json.loads(text) for text in texts]
        except ValueError:
            lines = [None]  # refused below
        for line in lines:
            need(is_ledger_line(line), f"{path} holds a line that is neither a verdict nor a warning; "
                 "delete the file, or start over with --fresh")
            if "warning" in line:
                warnings.append(line["warning"])
            else:
                verdicts[line["index"]] = line
    return verdicts, warnings


class Ledger:
    """The verdicts so far, by any number of processes, and this process's file to go on in.

    Rank 0 holds a lock, so that two evaluations cannot write one ledger; it takes it before anything is
    read or deleted. Where nothing can be written or locked, `obstacle` says so, and what is there can
    still be read.
    """

    def __init__(self, folder, name, rank, fresh):
        make_folder(folder)
        self.obstacle = None
        if rank == 0:
            try:
                self.lock = open(folder / f"{name}.lock", "w")
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            except BlockingIOError:
                raise SystemExit(f"another evaluation writes {folder / name}; wait for it, or stop it")
            except OSError as error:
                self.obstacle = (f"cannot write or lock {folder / name}.lock ({error.strerror}); give "
                                 "--weights FILE --out FOLDER with a folder on another disk")
            if fresh and not self.obstacle:
                for path in [folder / f"{name}.json", *folder.glob(f"{name}.*.jsonl")]:
                    path.unlink(missing_ok=True)
        self.obstacle = from_rank_0(self.obstacle)
        if fresh and self.obstacle:
            raise SystemExit(self.obstacle)
        self.verdicts, self.warnings = read_ledger(folder, name)
        if dist.is_initialized():
            dist.barrier()  # nobody writes while others read
        if not self.obstacle:
            path = folder / f"{name}.{rank}.jsonl"
            self.file = open(path, "a", buffering=1)
            end_of_lines = path.read_bytes().rfind(b"\n") + 1
            self.file.truncate(end_of_lines)  # without a line torn by a kill

    def write(self, line):
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise SystemExit(f"cannot write {self.file.name} ({error.strerror}): is the disk full? Make "
                             "room; the same command goes on")
        if "warning" in line:
            self.warnings.append(line["warning"])
        else:
            self.verdicts[line["index"]] = line


def verdict_lines(attack, index, y, report):
    """The lines of a batch, from the report of the search of --attack `attack`.

    index, y: (N,) int64, the images' numbers in the whole split and their labels.
    """
    if "step" in report:  # PGD's; -1, -1 where nothing fools
        fooled_by = torch.stack([report["restart"], report["step"]], 1).tolist()
    else:  # a new attack without parts has no fooled_by: its own name
        fooled_by = report.get("fooled_by", [attack] * len(y))
    lines = []
    labels = y.tolist()
    clean = report["clean"].tolist()
    robust = report["robust"].tolist()
    forwards = report["forwards"].tolist()
    for row, number in enumerate(index.tolist()):
        line = {"index": number, "label": labels[row], "clean": clean[row], "forwards": forwards[row]}
        if "robust_at" in report:
            digits = report["robust_at"][row].int().tolist()
            line["robust_at"] = "".join(map(str, digits))
        else:
            is_fooled = clean[row] == labels[row] and not robust[row]
            line["fooled"] = fooled_by[row] if is_fooled else None
        lines.append(line)
    return lines


# Counts

def wilson(k, n, z=1.959964):
    """95% interval of a proportion, seen in k of n cases (Wilson 1927) -> [low, high]."""
    if n == 0:
        return [0.0, 1.0]
    p = k / n
    z2_n = z * z / n
    middle = p + z2_n / 2
    half = z * math.sqrt(p * (1 - p) / n + z2_n / (4 * n))
    return [max(0.0, (middle - half) / (1 + z2_n)), min(1.0, (middle + half) / (1 + z2_n))]


def robust_at(line, steps):
    """Whether no iterate 0 .. k of PGD's first restart fools, for k = 0 .. steps -> [bool].

    With --last-iterate: whether iterate k itself does not fool, whatever the earlier ones did.
    """
    if "robust_at" in line:
        return [digit == "1" for digit in line["robust_at"]]
    first_fooled = steps + 1
    if line["clean"] != line["label"]:
        first_fooled = 0
    elif line["fooled"] is not None and line["fooled"][0] == 0:
        first_fooled = line["fooled"][1]
    return [k < first_fooled for k in range(steps + 1)]


def tally(lines, steps=None, searches=()):
    """Ledger lines -> dict: n, n_correct, n_robust, n_nan, forwards.

    With PGD's steps also robust_after, the sums of `robust_at`; with searches also fooled_by, {name: n}.
    """
    n_correct = 0
    n_robust = 0
    n_nan = 0
    forwards = 0
    fooled_by = dict.fromkeys(searches, 0)
    for line in lines:
        is_correct = line["clean"] == line["label"]
        n_correct += is_correct
        n_nan += line["clean"] == -1
        forwards += line["forwards"]
        if "robust_at" in line:
            n_robust += line["robust_at"].endswith("1")  # whatever the verdict on the clean image
        else:
            n_robust += is_correct and line["fooled"] is None
        if fooled_by and line["fooled"] is not None:
            fooled_by[line["fooled"]] += 1
    counts = dict(n=len(lines), n_correct=n_correct, n_robust=n_robust, n_nan=n_nan, forwards=forwards)
    if fooled_by:
        counts["fooled_by"] = fooled_by
    if steps is not None:
        counts["robust_after"] = [0] * (steps + 1)
        for line in lines:
            for k, is_robust in enumerate(robust_at(line, steps)):
                counts["robust_after"][k] += is_robust
    return counts


def warnings_of(lines, counts, classes):
    """Warnings that only the verdicts of all images together can give -> [str]."""
    warnings = []
    if counts["n_nan"] > 0:
        warnings.append(f"not finite: {counts['n_nan']} of {counts['n']} clean images have NaN logits; "
                        "NaN counts as wrong")
    labels = {line["label"] for line in lines}
    guesses = {line["clean"] for line in lines}
    if len(labels) > 1 and len(guesses) == 1 and counts["n_nan"] == 0:
        warnings.append(f"one class: every image is classified as {classes[guesses.pop()]}; a network "
                        "that learned nothing cannot be fooled, so its robust accuracy means nothing")
    return warnings + masked_gradients(counts["n"], counts.get("fooled_by", {}))


def first_of_each_reason(warnings):
    """Warnings are "reason: sentence": one of each reason is enough."""
    by_reason = {}
    for warning in warnings:
        by_reason.setdefault(warning.partition(":")[0], warning)
    return list(by_reason.values())


def report_lines(report):
    """A report as a person reads it."""
    n = report["n"]

    def share(name, k):
        low, high = wilson(k, n)
        return f"{name:<9} {100 * k / n:6.2f}%  {k} of {n}, 95%: {100 * low:.2f} to {100 * high:.2f}"

    normalised = ""
    if (report["mean"], report["std"]) != (list(MEAN), list(STD)):
        normalised = f", mean {report['mean']}, std {report['std']}"
    yield (f"{report['weights']}: {report['arch']} {report['act']} on {report['data']} at "
           f"{report['res']} px{normalised}")
    settings = report["attack"]
    for name in ATTACKS[report["attack"]].flags:
        if name != "last_iterate":  # the end of this line says it
            settings += f", {name} {report[name]:g}"
    protocol = "the last iterate, SAT's protocol" if report["last_iterate"] else "every iterate"
    yield (f"{settings}, eps {report['eps']:g}, seed {report['seed']}, {report['dtype']}, verdict of "
           f"{protocol}")
    yield share("clean", report["n_correct"])
    yield share("robust", report["n_robust"])
    if "robust_after" in report:
        steps = report["steps"]
        marks = [k for k in (0, 1, 2, 5, 10, 20, 50, 100) if k < steps] + [steps]
        after = [f"{k}: {100 * report['robust_after'][k] / n:.2f}%" for k in marks]
        of_first = "  (first restart)" if report["restarts"] > 1 else ""
        yield "after     " + "  ".join(after) + of_first
    for name, n_fooled in report.get("fooled_by", {}).items():
        yield f"{name:<9} {-100 * n_fooled / n:6.2f}%  {n_fooled} fooled"  # minus: accuracy it costs
    took = duration(report["seconds"])
    if report["n_timed"] == 0:
        took = "all in the ledger already"
    elif report["n_timed"] < n:
        took += f" for the {report['n_timed']} images measured last"
    yield (f"cost      {report['forwards']} forwards, {took} on {report['processes']} x "
           f"{report['device']}")
    for warning in report["warnings"]:
        yield f"warning   {warning}"


def own_numbers(args, data_set):
    """The attack's own flags, {name: value}: as given, or the data set's, or the function's default."""
    attack = ATTACKS[args.attack]
    parameters = inspect.signature(attack.search).parameters
    numbers = {}
    for name in attack.flags:
        numbers[name] = getattr(args, name)
        if numbers[name] is None:
            numbers[name] = getattr(data_set, name, parameters[name].default)
    return numbers


def share_done(searches, name, step, n_steps):
    """How much of a batch's attack is done at a step of the search `name`, as a fraction."""
    if not searches:  # the attack is one
        return step / n_steps
    done = 0
    for search, share in searches.items():
        if search == name:
            return done + share * step / n_steps
        done += share


def main():
    args = get_args()
    check(args)
    run = find_run(args)
    device, rank, world = open_device(args.device, args.dtype, timeout=timedelta(hours=24))
    data_set = data.DATA_SETS[run.data]
    attack = ATTACKS[args.attack]
    numbers = own_numbers(args, data_set)
    eps = data_set.eps if args.eps is None else args.eps
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = 100 if device.type == "cpu" else data_set.eval_batch

    # The images and the network. The search may run below float32; float32 then confirms
    show(f"loading {run.data}")
    images = data.load(run.data, run.data_dir, train=False, res=run.res, classes=run.classes,
                       device=device)
    net = open_net(run, len(images.classes), device)
    with exit_on_value_error():
        view = attacker_view(net, smooth_backward=args.smooth_backward == "attacker")
    model = in_precision(view, args.dtype, device)
    verify = None if args.dtype == "fp32" else in_precision(view, "fp32", device)
    workers = data.loader_workers(args.workers, images, world)

    # The ledger's name changes with everything that can change a verdict
    # (not with batch size, workers, number of processes or --limit, which cannot)
    digest = weights_hash(net.state_dict())
    code = code_digest()
    fingerprint = from_rank_0(images.fingerprint() if rank == 0 else None)
    network = (digest, run.arch, run.act, run.act_alpha, run.bn_eps, run.mean, run.std, run.small_input)
    exact = {word: float(value) for word, value in dict(numbers, eps=eps).items()}  # 8 is 8.0
    identity = data.key(network, code, fingerprint, run.res, exact, args.smooth_backward, args.dtype,
                        device.type)
    name = f"{args.attack}-eps{eps:g}"
    for word, value in numbers.items():
        if value is not False:
            name += f"-{word}{value:g}"
    name += f"-seed{args.seed}-{identity % 16**8:08x}"
    ledger = Ledger(run.reports, name, rank, args.fresh)
    own = data.subset(images.n, args.limit)[rank::world].tolist()
    remaining = [number for number in own if number not in ledger.verdicts]
    if remaining and ledger.obstacle:
        raise SystemExit(ledger.obstacle)
    if ledger.verdicts:
        say(f"{len(ledger.verdicts)} verdicts are in {run.reports / name}.*; --fresh starts over")

    # One pass over what is not decided yet: the attack, then its lines. It runs eagerly, since batches
    # shrink while images are fooled and each new shape would have to be compiled
    began = time.monotonic()
    last_line = began
    n_done = 0

    def progress(search, step, n_steps, n_undecided):
        nonlocal last_line
        now = time.monotonic()
        n = n_done + len(y) * share_done(attack.searches, search, step, n_steps)  # y: of the loop below
        eta = duration((now - began) / n * (len(remaining) - n)) if n > 0 else "?"
        text = (f"{n_done}/{len(remaining)} images | {search} step {step}/{n_steps}, {n_undecided} open"
                f" | {duration(now - began)} | eta {eta}")
        show(text)
        if not sys.stdout.isatty() and now - last_line > 60:  # where show is silent
            say(text)
            last_line = now

    arguments = dict(eps=eps / 255, seed=args.seed, verify=verify, progress=progress, **numbers)
    if "step_size" in arguments:
        arguments["step_size"] /= 255
    batches = data.eval_batches(images, torch.tensor(remaining, dtype=torch.long), batch_size,
                                workers=workers, device=device)
    for index, x, y in batches:
        with exit_on_value_error():
            _, report = attack.search(model, x, y, index=index, **arguments)
        for warning in report["warnings"]:
            if not warning.startswith("masked gradients"):  # judged below, over all images
                ledger.write({"warning": f"{warning} (in a batch of {len(y)})"})
        for line in verdict_lines(args.attack, index, y, report):
            ledger.write(line)
        n_done += len(y)

    # Counts over all processes
    own_lines = [ledger.verdicts[number] for number in own]
    own_part = (own_lines, ledger.warnings, n_done)
    every_rank = [own_part]
    if world > 1:
        every_rank = [None] * world
        dist.all_gather_object(every_rank, own_part)
    seconds = round(time.monotonic() - began, 1)  # of the slowest process
    lines = []
    warnings = []
    n_timed = 0
    for rank_lines, rank_warnings, n_measured in every_rank:
        lines += rank_lines
        warnings += rank_warnings
        n_timed += n_measured
    pgd_steps = numbers["steps"] if args.attack == "pgd" else None
    counts = tally(lines, pgd_steps, attack.searches)
    warnings = first_of_each_reason(warnings_of(lines, counts, images.classes) + warnings)

    # The report: what was measured with which numbers, what was counted, and where it comes from
    if rank == 0:
        report = {
            "weights": str(run.weights), "hash": digest, "arch": run.arch, "act": run.act,
            "act_alpha": run.act_alpha, "bn_eps": run.bn_eps, "mean": run.mean, "std": run.std,
            "data": run.data, "res": run.res, "attack": args.attack, "eps": eps, "steps": None,
            "step_size": None, "restarts": None, "last_iterate": False, **numbers, "seed": args.seed,
            "smooth_backward": args.smooth_backward, "dtype": args.dtype,
            **counts, "interval": wilson(counts["n_robust"], counts["n"]), "warnings": warnings,
            "ledger": name, "images": fingerprint, "code": code, "n_timed": n_timed, "seconds": seconds,
            "processes": world, "device": device_name(device), "torch": torch.__version__,
            "train": None}
        if run.train_args is not None:
            of_training = ("commit", "torch", "seed", "epochs", "batch_size", "lr", "eps", "step_size",
                           "steps", "smooth_backward")
            report["train"] = {key: run.train_args.get(key) for key in of_training}
        path = run.reports / f"{name}.json"
        earlier = read_json(path) if path.exists() else {"n": 0}
        if n_timed == 0 and earlier["n"] == counts["n"]:  # nothing was measured now
            for key in ("n_timed", "seconds", "processes", "device", "torch"):
                report[key] = earlier.get(key, report[key])
        keeps_earlier = earlier["n"] > counts["n"]  # a look at fewer images does not replace it
        if not keeps_earlier and not ledger.obstacle:
            write_json(path, report)
        if args.json:
            write_json(Path(args.json), report)
        for line in report_lines(report):
            say(line)
        if keeps_earlier:
            say(f"{path} keeps its {earlier['n']} images")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on (without --fresh)")
    except RuntimeError as error:  # torch raises it wherever the process is when a worker dies
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"{error}; is there enough memory? Use fewer --workers")
