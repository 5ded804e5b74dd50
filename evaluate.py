"""
Measure clean and robust accuracy, image by image.

After `python train.py ...`; network, weights and data come from the run's folder:
$ python evaluate.py --steps 200 --eps 4
The number to quote:
$ python evaluate.py --attack autoattack
SAT's protocol (arXiv:2006.14536), here on 8 GPUs and for weights from elsewhere:
$ torchrun --nproc_per_node=8 evaluate.py --last-iterate --weights FILE --arch resnet50 --act silu

An image counts as robust if no iterate of any restart fools the model; in SAT's protocol, if the last
iterate does not fool it. Its verdict is a function of the weights, the attack and the image; rounding
aside, no batch size, order or number of processes changes it. Verdicts are kept in a ledger under
OUT/eval, one JSON line per image: a stopped evaluation goes on with the same command, and a finished
one only reads the images to see that they are the same.

Keys: SAT is the paper; its sections are numbered as there.
"""
import argparse
import ast
import fcntl
import hashlib
import inspect
import json
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # importing torch takes seconds; a Ctrl-C meanwhile prints no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist

import activations
import attacks
import data
import models
from attacks import STANDARD, autoattack, masked_gradients, pgd_search
from data import duration, say, show
from models import MODELS, attacker_view, build, in_precision, load_weights, weights_hash
from train import all_ranks, check_ranges, device_name, flag, need, open_device, read_json, write_json

# What --attack may be, and which of AutoAttack's four searches it runs
ATTACKS = {"pgd": (), "apgd": STANDARD[:2], "autoattack": STANDARD}
PGD_FLAGS = ("steps", "step_size", "restarts", "last_iterate")  # the other attacks have none of these


def add_common_flags(p):
    """Those of sanity.py too: which net, which images, how far the attack may go, and where."""
    p.add_argument("--out", default="out", help="a run's folder: its model.pt, network and data")
    p.add_argument("--weights", help="a state dict; the rest: args.json beside it, or these flags")
    p.add_argument("--data", choices=data.DATA_SETS, help="default: the run's, or imagenet")
    p.add_argument("--data-dir", help="default: the run's, or data/imagenet, or data")
    p.add_argument("--arch", help="default: the run's; " + ", ".join(MODELS))
    p.add_argument("--act", help="default: the run's")
    p.add_argument("--act-alpha", type=float, help="the curve's parameter; default: the run's")
    p.add_argument("--bn-eps", type=float, help="default: the run's; torchvision's b5 to b7: 1e-3")
    p.add_argument("--res", type=int, help="pixels; default: the run's, or the network's own")
    p.add_argument("--limit", type=int, help="images: the first of one fixed permutation")
    p.add_argument("--eps", type=float, help="L-inf radius in 1/255; default: imagenet 4, else 8")
    p.add_argument("--step-size", type=float, help="of PGD, in 1/255; default: imagenet 1, else 2")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_common_flags(p)
    # the attack
    p.add_argument("--attack", default="pgd", choices=ATTACKS, help="apgd: AutoAttack's first two")
    p.add_argument("--steps", type=int, help="of PGD; default: imagenet 200, else 50")
    p.add_argument("--restarts", type=int, help="random starts of PGD to withstand; default: 1")
    p.add_argument("--last-iterate", action="store_true", help="SAT's protocol: the last decides")
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
    check_ranges(args)
    need(args.out.strip(), "--out is empty; name a run's folder, such as --out out")
    if args.attack != "pgd":
        for name in PGD_FLAGS:
            value = getattr(args, name)
            need(value is None or value is False,
                 f"{flag(name)} is PGD's, --attack {args.attack} has its own published "
                 "numbers; drop it")
    need(not args.last_iterate or args.restarts in (None, 1),
         f"--restarts {args.restarts} with --last-iterate: the last iterate is that of one start; use "
         "--restarts 1")
    need(args.steps == 0 or args.step_size is None or args.step_size > 0,
         "--step-size 0 is no attack; use --step-size 1, or --steps 0")
    if args.json:
        path = Path(args.json)
        need(not path.is_dir(), f"--json {path} is a folder; name a file in it")
        make_folder(path.parent)


def check_json(path):
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
    """Network and data: flags first, then the args.json beside the weights -> namespace.

    args.json says which network and which data, and nothing about the attack or the numerics: those of
    training do not count here. SystemExit where something is missing or damaged.
    """
    folder = Path(args.weights).parent if args.weights else Path(args.out)
    train_args = None
    if (folder / "args.json").exists():
        train_args = read_json(folder / "args.json")
        saved = dict(train_args)  # a copy: the report shows train_args as they were
    elif args.weights is None:
        raise SystemExit(f"no run in {folder} (no args.json); train one, python train.py --data shapes, "
                         "or give --weights FILE --arch ARCH --act ACT --data DATA")
    else:
        need(args.arch and args.act,
             f"--weights {args.weights} needs the --arch and --act that it was trained with")
        saved = {"data": args.data or "imagenet"}
    if args.data is not None and args.data != saved.get("data"):
        saved.update(data_dir=None, res=None)  # other data has its own

    # A flag that is given wins over what the run was trained with
    run = SimpleNamespace()
    for name in ("data", "data_dir", "arch", "act", "act_alpha", "bn_eps", "res"):
        given = getattr(args, name)
        setattr(run, name, saved.get(name) if given is None else given)
    run.classes = saved.get("classes")
    run.small_input = saved.get("small_input")
    run.weights = Path(args.weights or folder / "model.pt")
    run.out = Path(args.out)
    run.mean = run.std = None
    run.train_args = train_args
    # Defaults for what neither the flags nor args.json give
    source = folder / "args.json"
    need(str(run.data) in data.DATA_SETS, f"{source} has the unknown data {run.data}; use --data with "
         f"one of {', '.join(data.DATA_SETS)}")
    data_set = data.DATA_SETS[run.data]
    if run.small_input is None:
        run.small_input = data_set.small_input
    if run.bn_eps is None:
        run.bn_eps = 1e-5
    if run.res is None:
        run.res = data_set.res
    if run.res is None:
        run.res = MODELS[run.arch].res if run.arch in MODELS else 224
    types = dict(arch=str, act=str, act_alpha=float | None, res=int, bn_eps=float, small_input=bool,
                 data_dir=str | None, classes=list | None)
    for name, wanted in types.items():
        value = getattr(run, name)
        need(isinstance(value, wanted),
             f"{source} is damaged ({name} is {value!r}); restore it, or move the weights to another "
             "folder and give --weights with --arch, --act and --data")
    return run


def load(path, device="cpu", num_classes=1000, **flags):
    where = "out" if Path(path).is_dir() else "weights"
    args = SimpleNamespace(**{**vars(get_args([])), where: str(path), **flags})
    run = find_run(args)
    return open_net(run, len(run.classes or range(num_classes)), torch.device(device))


def open_net(run, n_classes, device):
    """The trained network in eval mode, channels last on a GPU."""
    net = build(run.arch, run.act, n_classes, act_alpha=run.act_alpha, small_input=run.small_input,
                bn_eps=run.bn_eps)
    load_weights(net, run.weights)
    run.taken = ""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return net.to(device, memory_format=layout).eval()


def without_docstrings(tree):
    """The syntax tree with every docstring taken out."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return tree


def code_digest():
    """A hex digest of the code that decides a verdict: an edited comment does not change it.

    It is of the syntax trees of activations.py, models.py, attacks.py and the evaluation transform.
    This file is not among them: it calls them and counts. After an edit here that changes verdicts, use
    --fresh.
    """
    sources = [inspect.getsource(module) for module in (activations, models, attacks)]
    sources += [inspect.getsource(function) for function in (data.eval_transform, data.to_rgb)]
    digest = hashlib.sha256()
    for source in sources:
        tree = without_docstrings(ast.parse(source))
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


# The ledger: one JSON line per image, one file per process

# Of PGD:                {"index": 7, "label": 3, "clean": 3, "forwards": 12, "fooled": [restart, step]}
# of its last iterate:   {..., "robust_at": "1100"}, one digit per iterate, 1 where it does not fool
# of APGD, AutoAttack:   {..., "fooled": "square"}; null where an image is not fooled, here as above
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

    A last line torn by a kill is ignored. SystemExit for any other line that is no verdict.
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
            need(is_ledger_line(line), f"{path} holds a line that is no verdict; delete the file, or "
                 "start over with --fresh")
            if "warning" in line:
                warnings.append(line["warning"])
            else:
                verdicts[line["index"]] = line
    return verdicts, warnings


class Ledger:
    """The verdicts so far, by any number of processes, and this process's file to go on in.

    Rank 0 holds a lock, so that two evaluations cannot write one ledger; it takes it before anything is
    read or deleted.
    """

    def __init__(self, folder, name, rank, fresh):
        make_folder(folder)
        if rank == 0:
            self.lock = open(folder / f"{name}.lock", "w")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            except BlockingIOError:
                raise SystemExit(f"another evaluation writes {folder / name}; wait for it, or stop it")
            if fresh:
                for path in [folder / f"{name}.json", *folder.glob(f"{name}.*.jsonl")]:
                    path.unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()
        self.verdicts, self.warnings = read_ledger(folder, name)
        if dist.is_initialized():
            dist.barrier()  # nobody writes while others read
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


def verdict_lines(index, y, report):
    """The lines of a batch, from the report of `pgd_search` or `autoattack`.

    index, y: (N,) int64, the images' numbers in the whole split and their labels.
    """
    lines = []
    clean = report["clean"].tolist()
    forwards = report["forwards"].tolist()
    labels = y.tolist()
    for row, number in enumerate(index.tolist()):
        line = {"index": number, "label": labels[row], "clean": clean[row], "forwards": forwards[row]}
        if "fooled_by" in report:
            line["fooled"] = report["fooled_by"][row]
        elif "robust_at" in report:
            digits = report["robust_at"][row].int().tolist()
            line["robust_at"] = "".join(map(str, digits))
        else:
            step = int(report["step"][row])
            line["fooled"] = [int(report["restart"][row]), step] if step >= 0 else None
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


def tally(lines, steps):
    """Ledger lines of PGD -> dict: n, n_correct, n_robust, robust_after each step, forwards.

    robust_after[k] counts the images that no iterate 0 .. k of the first restart fools; with
    --last-iterate, those that iterate k does not fool, whatever the earlier ones did.
    """
    n_correct = 0
    n_robust = 0
    robust_after = [0] * (steps + 1)
    for line in lines:
        is_correct = line["clean"] == line["label"]
        n_correct += is_correct
        if "robust_at" in line:
            robust_at = [digit == "1" for digit in line["robust_at"]]
            n_robust += robust_at[-1]  # whatever the verdict on the clean image
        else:
            n_robust += is_correct and line["fooled"] is None
            first_fooled = steps + 1  # the first iterate of the first restart that fools; none yet
            if not is_correct:
                first_fooled = 0
            elif line["fooled"] is not None and line["fooled"][0] == 0:
                first_fooled = line["fooled"][1]
            robust_at = [k < first_fooled for k in range(steps + 1)]
        for k, is_robust in enumerate(robust_at):
            robust_after[k] += is_robust
    return {"n": len(lines), "n_correct": n_correct, "n_robust": n_robust, "robust_after": robust_after,
            "forwards": sum(line["forwards"] for line in lines)}


def tally_autoattack(lines, names):
    """Ledger lines of AutoAttack -> dict: n, n_correct, n_robust, fooled_by {name: n}, forwards."""
    n_correct = 0
    n_robust = 0
    fooled_by = dict.fromkeys(names, 0)
    for line in lines:
        if line["clean"] == line["label"]:
            n_correct += 1
            if line["fooled"] is None:
                n_robust += 1
            else:
                fooled_by[line["fooled"]] += 1
    return {"n": len(lines), "n_correct": n_correct, "n_robust": n_robust, "fooled_by": fooled_by,
            "forwards": sum(line["forwards"] for line in lines)}


def sum_over_ranks(counts, device):
    """Counts of one process, ints or lists or dicts of ints by name -> counts of all processes."""
    total = {}
    for name, value in counts.items():
        if isinstance(value, dict):
            total[name] = sum_over_ranks(value, device)
        else:
            total[name] = all_ranks(torch.tensor(value, device=device)).tolist()
    return total


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

    yield (f"{report['weights']}: {report['arch']} {report['act']} on {report['data']} at "
           f"{report['res']} px")
    attack = report["attack"]
    if attack == "pgd":
        attack = f"PGD-{report['steps']}, step {report['step_size']:g}, restarts {report['restarts']}"
    protocol = "the last iterate, SAT's protocol" if report["last_iterate"] else "every iterate"
    yield (f"{attack}, eps {report['eps']:g}, seed {report['seed']}, {report['dtype']}, verdict of "
           f"{protocol}")
    yield share("clean", report["n_correct"])
    yield share("robust", report["n_robust"])
    if report["attack"] == "pgd":
        steps = report["steps"]
        marks = [k for k in (0, 1, 2, 5, 10, 20, 50, 100) if k < steps] + [steps]
        after = [f"{k}: {100 * report['robust_after'][k] / n:.2f}%" for k in marks]
        yield "after     " + "  ".join(after)
    for name, n_fooled in report.get("fooled_by", {}).items():
        yield f"{name:<9} {-100 * n_fooled / n:6.2f}%  {n_fooled} fooled"  # points of accuracy it takes
    part = ""
    if report["n_timed"] < n:  # the other verdicts were in the ledger
        part = f" for the {report['n_timed']} images measured now"
    yield (f"cost      {report['forwards']} forwards, {duration(report['seconds'])}{part} on "
           f"{report['processes']} x {report['device']}")
    for warning in report["warnings"]:
        yield f"warning   {warning}"


def main():
    args = get_args()
    check(args)
    run = find_run(args)
    device, rank, world = open_device(args.device, args.dtype, timeout=timedelta(hours=24))
    data_set = data.DATA_SETS[run.data]
    eps = data_set.eps if args.eps is None else args.eps
    steps = data_set.steps if args.steps is None else args.steps
    step_size = data_set.step_size if args.step_size is None else args.step_size
    restarts = args.restarts or 1
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = 100 if device.type == "cpu" else data_set.eval_batch

    # The images and the network. The search may run below float32; float32 then confirms
    show(f"loading {run.data}")
    images = data.load(run.data, run.data_dir, train=False, res=run.res, classes=run.classes,
                       device=device)
    net = open_net(run, len(images.classes), device)
    view = attacker_view(net, smooth_backward=args.smooth_backward == "attacker")
    model = in_precision(view, args.dtype, device)
    verify = None if args.dtype == "fp32" else in_precision(attacker_view(net), "fp32", device)
    workers = data.loader_workers(args.workers, images, world)

    # The ledger's name changes with everything that can change a verdict
    # (not with batch size, workers, number of processes or --limit, which cannot)
    digest = weights_hash(net)
    code = code_digest()

    def reading(n_read, n):
        show(f"fingerprint of the images: {n_read}/{n} files")

    fingerprint = images.fingerprint(progress=reading)
    numbers = ""
    if args.attack == "pgd":
        last = "-last" if args.last_iterate else ""
        numbers = f"-step{step_size:g}-{steps}x{restarts}{last}"
    identity = data.key(digest, code, fingerprint, run.arch, run.act, run.act_alpha, run.bn_eps, run.res,
                        run.small_input, eps, step_size, args.smooth_backward, args.dtype, device.type)
    name = f"{args.attack}-eps{eps:g}{numbers}-seed{args.seed}-{identity % 16**8:08x}"
    folder = run.out / "eval"
    ledger = Ledger(folder, name, rank, args.fresh)
    own = data.subset(images.n, args.limit)[rank::world].tolist()
    remaining = [number for number in own if number not in ledger.verdicts]
    if ledger.verdicts and rank == 0:
        say(f"{len(ledger.verdicts)} verdicts are in {folder / name}.*; --fresh starts over")

    # One pass over what is not decided yet: the attack, then its lines. It runs eagerly, since batches
    # shrink while images are fooled and each new shape would have to be compiled
    began = time.monotonic()
    n_done = 0

    def progress(attack, step, n_steps, n_undecided):
        spent = time.monotonic() - began
        eta = "?"  # no batch is done yet
        if n_done > 0:
            eta = duration(spent / n_done * (len(remaining) - n_done))
        show(f"{n_done}/{len(remaining)} images | {attack} step {step}/{n_steps}, {n_undecided} open"
             f" | {duration(spent)} | eta {eta}")

    batches = data.eval_batches(images, torch.tensor(remaining, dtype=torch.long), batch_size,
                                workers=workers, device=device)
    for index, x, y in batches:
        if args.attack == "pgd":
            _, report = pgd_search(
                model, x, y, eps=eps / 255, step_size=step_size / 255, steps=steps, index=index,
                restarts=restarts, seed=args.seed, verify=verify, last_iterate=args.last_iterate,
                progress=progress)
        else:
            _, report = autoattack(
                model, x, y, eps=eps / 255, index=index, seed=args.seed, verify=verify,
                attacks=ATTACKS[args.attack], progress=progress)
            for warning in first_of_each_reason(report["warnings"]):
                if not warning.startswith("masked gradients"):  # judged below, over all images
                    ledger.write({"warning": warning})
        for line in verdict_lines(index, y, report):
            ledger.write(line)
        n_done += len(y)
    seconds = round(time.monotonic() - began, 1)

    # Counts over all processes
    lines = [ledger.verdicts[number] for number in own]
    if args.attack == "pgd":
        counts = tally(lines, steps)
    else:
        counts = tally_autoattack(lines, ATTACKS[args.attack])
    n_nan = sum(line["clean"] == -1 for line in lines)
    counts.update(n_nan=n_nan, n_timed=len(remaining))
    counts = sum_over_ranks(counts, device)
    warnings = ledger.warnings
    if world > 1:
        every_rank = [None] * world
        dist.all_gather_object(every_rank, ledger.warnings)
        warnings = sum(every_rank, [])
    if counts["n_nan"] > 0:  # first, so that this total is kept and not the sentence of one batch
        not_finite = (f"not finite: {counts['n_nan']} of {counts['n']} clean images have NaN logits; "
                      "NaN counts as wrong")
        warnings = [not_finite, *warnings]
    warnings = first_of_each_reason(warnings)
    warnings += masked_gradients(counts["n"], counts.get("fooled_by", {}))

    # The report: what was measured with which numbers, what was counted, and where it comes from
    if rank == 0:
        path = folder / f"{name}.json"
        earlier = read_json(path) if path.exists() else {"n": 0}
        if counts["n_timed"] == 0 and earlier["n"] == counts["n"]:
            # Nothing was measured now: the time is that of the earlier report
            seconds = earlier.get("seconds", seconds)
            counts["n_timed"] = earlier.get("n_timed", counts["n"])
        report = {
            "weights": str(run.weights), "hash": digest, "arch": run.arch, "act": run.act,
            "act_alpha": run.act_alpha, "data": run.data, "res": run.res,
            "attack": args.attack, "eps": eps, "steps": steps, "step_size": step_size,
            "restarts": restarts, "last_iterate": args.last_iterate, "seed": args.seed,
            "smooth_backward": args.smooth_backward, "dtype": args.dtype,
            **counts, "interval": wilson(counts["n_robust"], counts["n"]), "warnings": warnings,
            "ledger": name, "images": fingerprint, "code": code, "seconds": seconds, "processes": world,
            "device": device_name(device), "commit": None, "torch": None, "train": None}
        if args.attack != "pgd":
            report.update(steps=None, step_size=None, restarts=None)
        if run.train_args is not None:  # of the training run
            report["commit"] = run.train_args.get("commit")
            report["torch"] = run.train_args.get("torch")
            of_training = ("seed", "epochs", "batch_size", "lr", "eps", "step_size", "steps",
                           "smooth_backward")
            report["train"] = {key: run.train_args.get(key) for key in of_training}
        for line in report_lines(report):
            say(line)
        if earlier["n"] > counts["n"]:  # a look at fewer images does not replace it
            say(f"{path} keeps its {earlier['n']} images")
        else:
            write_json(path, report)
        if args.json:
            try:
                Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
            except OSError as error:
                raise SystemExit(f"cannot write {args.json} ({error.strerror}); give another file")
    if dist.is_initialized():
        dist.destroy_process_group()


def how_to_go_on():
    """The command that goes on where this one was stopped, ready to paste.

    Without --fresh, which would start over.
    """
    words = [word for word in sys.argv if word != "--fresh"]
    world = os.environ.get("LOCAL_WORLD_SIZE")
    start = "python" if world is None else f"torchrun --nproc_per_node={world}"
    return f"{start} {shlex.join(words)}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(1)
        raise SystemExit(f"\nstopped; go on with: {how_to_go_on()}")
