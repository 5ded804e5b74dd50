"""
Adversarially train an image classifier with a smooth activation (SAT, arXiv:2006.14536).

See it move on a laptop, no data needed:
$ python train.py --data shapes
The ResNet-50 / SiLU row of the README on 8 GPUs:
$ torchrun --standalone --nproc_per_node=8 train.py --arch resnet50 --act silu
Go on after a kill, a Ctrl-C or a full disk: the same command with --resume.

The run's folder (--out) gets
  args.json           all flags, the classes of the data, versions, the commit
  log.txt, log.jsonl  what the screen showed, and the same numbers as one JSON object a line
  model.pt            the weights to use: the average with --ema, the best with --early-stop
  best.pt             the weights that were most robust on the held-out images
  last.pt             everything that --resume needs; last.prev.pt is the one before

On a machine that is busy with other work set OMP_NUM_THREADS=1: threads that wait for each other make a
step many times slower than one thread does.

Keys: SAT is the paper; equations, sections and tables are numbered as there.
"""
import argparse
import contextlib
import copy
import ctypes
import fcntl
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # importing torch takes seconds; a Ctrl-C meanwhile prints no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from activations import ACTIVATIONS
from attacks import pgd, predict, random_start
from data import duration, say, show
from models import (MODELS, attacker_view, build, in_precision, load_file, precision, read_state_dict,
                    set_numerics, shares_storage)

# --data picks the defaults of all other flags
RECIPES = {
    # SAT Sec. 3.1: 100 epochs, x0.1 at 30, 60 and 90, weight decay 1e-4, PGD-1 with eps 4 and step 4
    "imagenet": dict(arch="resnet50", act="silu", epochs=100, schedule="step", batch_size=1024, wd=1e-4,
                     eps=4, step_size=4, holdout=10000, val_every=1, log_every=50),
    # SAT Sec. 7 names network and attack; the schedule is Wong et al. 2020's (arXiv:2001.03994), longer
    "cifar10": dict(arch="resnet18", act="silu", epochs=30, schedule="onecycle", batch_size=128, lr=0.2,
                    wd=5e-4, eps=8, step_size=8, holdout=1000, val_every=1, log_every=50),
    "shapes": dict(arch="resnet8", act="silu", epochs=8, schedule="onecycle", batch_size=64, lr=0.1,
                   wd=5e-4, eps=8, step_size=8, holdout=500, val_every=2, log_every=20),
}
# SAT Sec. 5.2; stochastic depth as in EfficientNet. --enhanced also means each network's own dropout
ENHANCED = dict(wd=1e-5, epochs=200, stochastic_depth=0.2, autoaugment=True, ema=True, early_stop=True)

# The least and the most that each flag with a number takes, in this script and those that import it
RANGES = {
    # data and output
    "limit": (1, 10**9), "holdout": (0, 10**9), "save_every": (0, 10**6), "res": (16, 4096),
    # network
    "act_alpha": (1e-6, 1e6), "dropout": (0, 1), "stochastic_depth": (0, 1), "bn_eps": (1e-12, 1),
    # optimization
    "epochs": (1, 10**6), "batch_size": (1, 10**6), "accum": (1, 10**6), "lr": (1e-12, 1000),
    "warmup_epochs": (0, 10**6), "wd": (0, 1000), "label_smoothing": (0, 1),
    # attack
    "eps": (0, 255), "step_size": (0, 255), "steps": (0, 10**6), "restarts": (1, 10**6),
    "clean_start": (0, 1),
    # how
    "val_every": (1, 10**6), "log_every": (1, 10**6), "workers": (0, 1000), "seed": (0, 2**63 - 1),
    "rounds": (1, 10**6), "scale": (0.5, 4),
}

RUN_FILES = ("args.json", "log.txt", "log.jsonl", "model.pt", "best.pt", "last.pt", "last.prev.pt")
# Flags that --resume may change: the result does not depend on them (--init is not read again, and the
# images below --data-dir are compared by their names)
FREE = ("out", "resume", "init", "workers", "device", "log_every", "save_every", "download", "data_dir")

# Newer versions of torch warn about arguments that the oldest one we support needs, and about the layout
# of 1x1 convolutions' gradients in DDP, which costs nothing
warnings.filterwarnings("ignore", message=".*broadcast_buffers.*|.*barrier.*|.*Grad strides.*")


# Flags

def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    # data and output
    p.add_argument("--data", default="imagenet", choices=RECIPES, help="picks all other defaults")
    p.add_argument("--data-dir", help="default: data/imagenet, or data for cifar10")
    p.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10")
    p.add_argument("--limit", type=int, help="training images, of one fixed permutation; default: all")
    p.add_argument("--holdout", type=int, help="training images kept to validate on, at most a tenth")
    p.add_argument("--out", default="out", help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, or start it")
    p.add_argument("--init", help="start from the weights in this file, torchvision's too")
    p.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints")
    # network
    p.add_argument("--arch", choices=MODELS, metavar="ARCH", help=", ".join(MODELS))
    p.add_argument("--act", choices=ACTIVATIONS, metavar="ACT", help=", ".join(ACTIVATIONS))
    p.add_argument("--act-alpha", type=float, help="the curve's parameter; default: the paper's")
    p.add_argument("--smooth-backward", default="none", help="Table 1: who gets a smooth gradient",
                   choices=["none", "attacker", "optimizer", "both"])
    p.add_argument("--dropout", type=float, help="rate; default: 0, with --enhanced the network's own")
    p.add_argument("--stochastic-depth", type=float, default=0.0,
                   help="the rate towards which EfficientNet's blocks rise")
    p.add_argument("--bn-eps", type=float, default=1e-5, help="BatchNorm's; torchvision b5-b7: 1e-3")
    p.add_argument("--res", type=int, help="pixels; default: the network's own, cifar10 and shapes 32")
    # optimization
    p.add_argument("--enhanced", action="store_true", help="Sec. 5.2: dropout, " + ", ".join(ENHANCED))
    p.add_argument("--epochs", type=int, help="the schedule scales with them")
    p.add_argument("--batch-size", type=int, help="images of one update, over all processes")
    p.add_argument("--accum", type=int, default=1, help="parts a batch is split into, to save memory")
    p.add_argument("--lr", type=float, help="peak; default: imagenet 0.1 for each 256 of the batch")
    p.add_argument("--schedule", choices=["step", "onecycle"], help="x0.1 at 30, 60, 90%%; line to 0")
    p.add_argument("--warmup-epochs", type=float, help="default: 5%%, at most 5; onecycle 40%%")
    p.add_argument("--wd", type=float, help="weight decay of convolution and linear weights")
    p.add_argument("--nesterov", **switch, help="momentum, as the released code has")
    p.add_argument("--label-smoothing", type=float, default=0.0, help="released code: 0.1")
    p.add_argument("--autoaugment", **switch, help="torchvision's AutoAugment")
    p.add_argument("--ema", **switch, help="average the weights; validate and keep the average")
    p.add_argument("--early-stop", **switch, help="end when robustness drops 20 points; keep the best")
    # the attack inside
    p.add_argument("--eps", type=float, help="L-inf radius in 1/255")
    p.add_argument("--step-size", type=float, help="in 1/255")
    p.add_argument("--steps", type=int, default=1, help="of PGD; 0 is normal training")
    p.add_argument("--clean-start", type=float, default=0.0, help="share attacked from the clean image")
    # how
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "tf32", "bf16", "fp16"],
                   help="auto: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    p.add_argument("--val-every", type=int, help="epochs between validations")
    p.add_argument("--log-every", type=int, help="steps between log lines")
    p.add_argument("--workers", type=int, help="processes that read images, for each device")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")

    # Parsed twice: --data and --enhanced decide what the other flags are by default
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**RECIPES[first.data])
    if first.enhanced:
        p.set_defaults(**ENHANCED)
    args = p.parse_args(argv)

    # What is still open depends on other flags
    if args.res is None:
        args.res = data.DATA_SETS[args.data].res or MODELS[args.arch].res
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 256
    if args.dropout is None:
        args.dropout = MODELS[args.arch].dropout if args.enhanced else 0.0
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5, 0.05 * args.epochs) if args.schedule == "step" else 0.4 * args.epochs
    if args.dtype == "auto":
        args.dtype = "bf16" if wants_gpu(args) else "fp32"
    if args.compile is None:
        args.compile = wants_gpu(args)
    return args


def wants_gpu(args):
    """Whether --device names a GPU, or leaves the choice and there is one."""
    return args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())


def need(condition, sentence):
    """SystemExit with a sentence: what we got, what we need, what to type."""
    if not condition:
        raise SystemExit(sentence)


def flag(name):
    """The flag that fills args.name."""
    return "--" + name.replace("_", "-")


def check_ranges(args):
    """SystemExit for a number that is not finite or not in its range, RANGES."""
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None:  # and NaN is in no range
            need(least <= value <= most, f"{flag(name)} {value} is out of range; use {least} to {most}")


@contextlib.contextmanager
def sentences():
    try:
        yield
    except ValueError as error:
        raise SystemExit(str(error))


def check_numbers(args):
    check_ranges(args)


def warn_small_eps(args):
    pass


def check(args, world):
    """SystemExit for flags that argparse cannot judge alone."""
    check_ranges(args)
    n_parts = world * args.accum
    fewer = max(1, args.batch_size // n_parts) * n_parts
    need(args.out.strip(), "--out is empty; name a folder, such as --out out")
    need(args.batch_size % n_parts == 0,
         f"--batch-size {args.batch_size} does not split over {world} processes x --accum {args.accum}; "
         f"use {fewer} or {fewer + n_parts}")
    need(args.steps == 0 or args.step_size > 0,
         f"--step-size {args.step_size:g} is no attack; use --step-size {args.eps or 4:g}, or --steps 0 "
         "for normal training")
    need(args.smooth_backward == "none" or args.act == "relu",
         f"--smooth-backward is for ReLU, {args.act} has its own gradient; use --act relu")
    need(not args.early_stop or args.holdout > 0,
         "--early-stop needs held-out images; use --holdout 1000, or --no-early-stop")
    need(not args.early_stop or args.steps > 0,
         "--early-stop keeps the most robust weights and --steps 0 trains no robustness; add "
         "--no-early-stop")
    need(wants_gpu(args) or not args.compile or args.dtype != "bf16",
         "--compile with --dtype bf16 gave NaN gradients on a CPU; use --dtype fp32 or --no-compile")


# The machine

PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when the one that started it ends


def open_device(name, dtype="fp32", timeout=timedelta(minutes=30)):
    """Where this process runs -> device, and torchrun's rank and world (0 and 1 without torchrun).

    timeout: how long the processes wait for each other.
    """
    set_numerics(dtype)
    # torchrun sets these three; without it this is the only process
    numbers = []
    for variable, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(variable, str(default))
        need(text.isdigit(), f"{variable}={text} is no number; start with torchrun, or unset {variable}")
        numbers.append(int(text))
    rank, world, local_rank = numbers
    need(world == 1 or "RANK" in os.environ,
         f"WORLD_SIZE is {world} and RANK is not set; start with torchrun, or unset WORLD_SIZE")

    need(name != "mps", "--device mps is not supported: losses are summed in float64, which it lacks; "
         "use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    # One process a GPU, which is how torchrun numbers them
    known = ["cpu"] + [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    need(name in known, f"--device {name} is not here; use {', '.join(known)}, or fewer processes")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and sys.platform == "linux":  # torchrun ends its processes, but not if it is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    return device, rank, world


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def all_ranks(tensor):
    """Its sum over all processes."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def listen():
    """From here on SIGINT and SIGTERM only set the event returned; a second Ctrl-C ends at once."""
    stop_asked = threading.Event()

    def ask(number, frame):
        stop_asked.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop_asked


# The run's folder

class Log:
    """log.txt and log.jsonl, by rank 0. log.txt is locked: two runs cannot write into one folder."""

    def __init__(self, out, rank):
        self.active = rank == 0
        if not self.active:
            return
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.text = open(out / "log.txt", "a", buffering=1)
            self.json = open(out / "log.jsonl", "a", buffering=1)
            # Not flock: the loader's workers would inherit it and outlive this process
            fcntl.lockf(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run writes into {out}; wait for it, or choose another --out")
        except OSError as error:
            raise SystemExit(f"cannot write into {out} ({error.strerror}); choose another --out")

    def __call__(self, text, **values):
        if not self.active:
            return
        say(text)
        try:
            self.text.write(text + "\n")
            if values:
                self.json.write(json.dumps(values) + "\n")
        except OSError as error:
            raise SystemExit(f"cannot write the log ({error.strerror}): is the disk full? Make room, "
                             "then go on with --resume")


def save_file(path, content, previous=None):
    """Write tensors under a temporary name, flush, rename: no file is ever half-written.

    previous: the name that the old file gets first. SystemExit where the disk is full or read-only.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "torch stopped in the middle"
        raise SystemExit(f"cannot write {path} ({reason}): is the disk full? What was written before is "
                         "whole; make room, then go on with --resume")


def read_json(path):
    """A JSON object. SystemExit if it is missing, damaged, or anything else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"no file {path}; is {path.parent} the folder of a run?")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is damaged ({error}); restore it, or use another folder")
    need(isinstance(content, dict), f"{path} holds no JSON object; restore it, or use another folder")
    return content


def write_json(path, content):
    """A JSON object, whole or not at all. SystemExit where the disk is full or read-only."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SystemExit(f"cannot write {path} ({error.strerror}): is the disk full? Make room, then "
                         "give the same command again")


def read_checkpoint(out, log):
    """last.pt, or last.prev.pt where last.pt is damaged or missing -> its content; None without both."""
    damaged = []
    for path in (out / "last.pt", out / "last.prev.pt"):
        if path.exists():
            try:
                state = load_file(path)
                need(isinstance(state, dict) and "optimizer" in state, f"{path} is no checkpoint")
            except SystemExit as error:
                damaged.append(str(error))
                continue
            for sentence in damaged:
                log(f"{sentence}: going on from {path}")
            return state
    need(not damaged, f"{'; '.join(damaged)}: nothing to go on from; start again in another --out")
    return None


def differences(saved, args, facts):
    """What --resume would change although the result depends on it -> clauses for a sentence."""
    clauses = []
    for name, value in vars(args).items():
        if name not in FREE and saved.get(name) != value:
            clauses.append(f"{flag(name)} {saved.get(name)} (now {value})")
    if saved.get("n_images") != facts["n_images"]:
        clauses.append(f"{saved.get('n_images')} images in its data (now {facts['n_images']})")
    elif saved.get("classes") != facts["classes"]:
        clauses.append("other classes in its data")
    elif saved.get("names") != facts["names"]:
        clauses.append("other file names or other labels in its data")
    return clauses


def init_from(net, path):
    """Take every tensor of the file that fits by name and shape -> a sentence for the log.

    It names what stays at its initialisation, such as a classifier for other classes.
    """
    wanted = net.state_dict()
    found = read_state_dict(path)
    taken = {}
    for name, tensor in found.items():
        if name in wanted and wanted[name].shape == tensor.shape:
            taken[name] = tensor
    n_weights = sum(tensor.ndim > 0 for tensor in taken.values())  # BatchNorm's 0-d counters fit any
    need(n_weights > 0, f"--init {path}: no tensor fits this network by name and shape; use the file's "
         "own --arch")
    net.load_state_dict(taken, strict=False)
    missing = [name for name in wanted if name not in taken]
    sentence = f"--init {path}: {len(taken)} of {len(wanted)} tensors taken"
    if missing:
        shown = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
        sentence += f"; {len(missing)} stay at their initialisation: {shown}"
    if len(found) > len(taken):
        sentence += f"; {len(found) - len(taken)} of the file are unused"
    return sentence


# The pieces of a step

def network(args, num_classes):
    """The network that the flags describe, as the optimizer sees it."""
    return build(
        args.arch, args.act, num_classes, act_alpha=args.act_alpha,
        smooth_backward=args.smooth_backward in ("optimizer", "both"), dropout=args.dropout,
        stochastic_depth=args.stochastic_depth, small_input=data.DATA_SETS[args.data].small_input,
        bn_eps=args.bn_eps)


def parameter_groups(net, wd):
    """Decay for convolution and linear weights; none for norms, biases and SmoothReLU's alpha.

    The released code adds wd / 2 |w|^2 to the loss, which is what torch's weight_decay does.
    """
    decayed = []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            decayed.append(module.weight)
    decayed_ids = {id(p) for p in decayed}
    others = [p for p in net.parameters() if id(p) not in decayed_ids]
    return [{"params": decayed, "weight_decay": wd}, {"params": others, "weight_decay": 0.0}]


def lr_at(args, epoch, step, n_steps):
    """This step's learning rate: warm-up, then x0.1 at 30, 60 and 90% (SAT Sec. 3.1), or a line to 0."""
    now = epoch + step / n_steps
    warmup = 1.0
    if args.warmup_epochs > 0:
        warmup = min(1.0, (now + 1 / n_steps) / args.warmup_epochs)
    if args.schedule == "step":
        n_drops = sum(now >= share * args.epochs for share in (0.3, 0.6, 0.9))
        decay = 0.1**n_drops
    else:
        decay = (args.epochs - now) / max(args.epochs - args.warmup_epochs, 1 / n_steps)
    return args.lr * min(warmup, decay)


def attack(args, model, x, y):
    """The training attack (SAT Sec. 3.1) -> x_adv. Its random start comes from torch's generator."""
    if args.steps == 0:
        return x
    eps = args.eps / 255
    noise = torch.empty_like(x).uniform_(-eps, eps)
    if args.clean_start > 0:
        is_random = torch.rand(len(x), 1, 1, 1, device=x.device) >= args.clean_start
        noise = noise * is_random
    return pgd(model, x, y, eps=eps, step_size=args.step_size / 255, steps=args.steps, noise=noise,
               check=False)


@torch.no_grad()
def batch_sums(logits, y):
    """What is logged of a batch -> (4,) float64: cross-entropy, errors, images, losses not finite.

    The loss here has no label smoothing. All stays on the device, for which a step does not wait.
    """
    losses = F.cross_entropy(logits, y, reduction="none").double()
    loss_sum = losses.nan_to_num(0, 0, 0).sum()
    n_errors = (logits.argmax(1) != y).sum().double()
    n_images = torch.full_like(loss_sum, len(y))
    n_not_finite = (~losses.isfinite()).sum().double()
    return torch.stack([loss_sum, n_errors, n_images, n_not_finite])


@torch.no_grad()
def average_batchnorm_statistics(net, world):
    """One all-reduce after each step, so that every rank attacks, validates and saves the same network.

    Differs from SAT: its code keeps one process's statistics.
    """
    statistics = [b for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if world > 1 and statistics:
        flat = torch.cat(statistics)
        dist.all_reduce(flat)
        means = (flat / world).split([len(b) for b in statistics])
        torch._foreach_copy_(statistics, list(means))


@torch.no_grad()
def update_ema(ema, net, n_updates):
    """ema, a copy of net, moves towards it, buffers too; decay min(0.9999, (1 + n) / (10 + n))."""
    decay = min(0.9999, (1 + n_updates) / (10 + n_updates))
    for mean, value in zip(ema.state_dict().values(), net.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def make_views(net, args, device, world=1, kept=None):
    view = attacker_view(net, smooth_backward=args.smooth_backward in ("attacker", "both"))
    train_model = net.train()
    if args.compile:
        view = torch.compile(view, dynamic=False)
        train_model = torch.compile(net, dynamic=False)
    return in_precision(view, args.dtype, device), train_model, None


def make_optimizer(args, net, device):
    optimizer = torch.optim.SGD(parameter_groups(net, args.wd), args.lr, momentum=0.9,
                                nesterov=args.nesterov, fused=device.type == "cuda")
    return optimizer, torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")


def update(args, attack_model, train_model, optimizer, scaler, x, y):
    sums = 0
    for x_part, y_part in zip(x.chunk(args.accum), y.chunk(args.accum)):
        x_adv = attack(args, attack_model, x_part, y_part)
        with precision(args.dtype, x.device):
            logits = train_model(x_adv)
        loss = F.cross_entropy(logits.float(), y_part, label_smoothing=args.label_smoothing)
        scaler.scale(loss * len(x_part) / len(x)).backward()
        sums = sums + batch_sums(logits.float(), y_part)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums


def validate(args, model, images, held_out, workers, device, rank, world):
    """PGD-10 (step eps / 4, last iterate) on the held-out images -> n, n_correct, n_robust of all ranks.

    The starts belong to the images: every epoch attacks from the same ones.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    own = held_out[rank::world]
    batch_size = min(250, max(1, args.batch_size // (world * args.accum)))
    eps = args.eps / 255
    for index, x, y in data.eval_batches(images, own, batch_size, workers=workers, device=device):
        show(f"validation {int(counts[0])}/{len(own)}")
        noise = random_start(x, eps, args.seed, index)
        x_adv = pgd(model, x, y, eps=eps, step_size=eps / 4, steps=10, noise=noise)
        with torch.no_grad():
            correct = predict(model(x)) == y
            robust = correct & (predict(model(x_adv)) == y)
        counts += torch.stack([torch.ones_like(y).sum(), correct.sum(), robust.sum()])
    return all_ranks(counts).tolist()


def name_unreadable(images, named, log, group):
    """Name on the log, once, each image file that could not be read, whichever rank met it."""
    every_rank = [images.unreadable]
    if group is not None:
        every_rank = [None] * dist.get_world_size()
        dist.all_gather_object(every_rank, images.unreadable, group=group)
    for reasons in every_rank:
        for reason in reasons:
            if reason not in named:
                named.add(reason)
                log(f"cannot read {reason}; the next image is used instead ({len(named)} such files)")
    images.unreadable.clear()


def main():
    args = get_args()
    device, rank, world = open_device(args.device, args.dtype)
    check(args, world)
    out = Path(args.out)

    # Data
    if args.download and rank == 0:
        data.load(args.data, args.data_dir, train=True, res=args.res, download=True)
    if args.download and world > 1:
        dist.barrier()
    show(f"loading {args.data}")
    images = data.load(args.data, args.data_dir, train=True, res=args.res, device=device)
    members, held_out = data.hold_out(images.n, args.limit, args.holdout)
    n_steps = len(data.epoch_batches(members, 0, args.seed, args.batch_size, world))
    need(n_steps > 0, f"{len(members)} training images make no batch for {world} processes; use more "
         "images or fewer processes")
    n_available = min(images.n, args.limit or images.n)
    need(len(held_out) > 0 or not args.early_stop,
         f"--early-stop needs held-out images, and a tenth of {n_available} is none; use more images")
    workers = data.loader_workers(args.workers, images, world)

    # The network. The seed alone decides its first weights, whatever the activation
    torch.manual_seed(args.seed)
    net = network(args, len(images.classes))
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    net.to(device, memory_format=layout)

    # The run's folder: a checkpoint to go on from, weights to start from, or neither. No run overwrites
    # another's files; empty ones hold no run
    existing = [name for name in RUN_FILES if (out / name).exists() and (out / name).stat().st_size > 0]
    need(not existing or args.resume or rank > 0,
         f"{out} holds a run ({', '.join(existing)}); go on with --resume, or in another --out")
    log = Log(out, rank)
    if world > 1:
        dist.barrier()
    state = read_checkpoint(out, log) if args.resume else None
    results = [name for name in existing if name != "args.json"]
    need(state or not results or rank > 0,
         f"{out} holds a run ({', '.join(results)}) and no checkpoint to go on from; start again in "
         "another --out")
    facts = dict(classes=images.classes, n_images=images.n, names=images.names_hash(),
                 small_input=data.DATA_SETS[args.data].small_input)
    if state:
        clauses = differences(read_json(out / "args.json"), args, facts)
        need(not clauses, f"the run in {out} has {', '.join(clauses)}; use its flags and its data, or "
             "another --out")
        try:
            net.load_state_dict(state["model"])
        except RuntimeError:
            raise SystemExit(f"{out / 'last.pt'} is not of the network in args.json; use another --out")
        if state["world"] != world:
            log(f"going on with {world} processes instead of {state['world']}: not bit-exact")
    elif args.init:
        init_sentence = init_from(net, args.init)
        facts["init_hash"] = hashlib.sha256(Path(args.init).read_bytes()).hexdigest()[:12]
    if rank == 0 and not state:
        folder = shlex.quote(str(Path(__file__).parent))
        facts["commit"] = subprocess.getoutput(f"git -C {folder} describe --always --dirty 2>/dev/null")
        facts["processes"] = world
        facts["python"] = sys.version.split()[0]
        facts["torch"] = torch.__version__
        facts["torchvision"] = torchvision.__version__
        write_json(out / "args.json", {**vars(args), **facts})

    # Two views over one storage, the attacker's and the optimizer's; from here on nothing may move it.
    # The attacker's is in eval mode, outside DDP, and frozen: even compiled, its backward pass computes
    # no weight gradient, and an attack step costs 2 forwards instead of 3
    #     net       the network, as the optimizer sees it      -> train_model   compiled, in DDP
    #     view      the same network, as the attacker sees it  -> attack_model  compiled, in --dtype
    #     kept_net  net, or with --ema its average             -> val_model     a view of it in --dtype
    view = attacker_view(net, smooth_backward=args.smooth_backward in ("attacker", "both"))
    attack_model = view
    train_model = net.train()
    if args.compile:
        attack_model = torch.compile(view, dynamic=False)
        train_model = torch.compile(net, dynamic=False)
    attack_model = in_precision(attack_model, args.dtype, device)
    if world > 1:  # average_batchnorm_statistics sees to the buffers
        device_ids = [device] if device.type == "cuda" else None
        train_model = DistributedDataParallel(train_model, device_ids=device_ids,
                                              broadcast_buffers=False, gradient_as_bucket_view=True)
    ema = copy.deepcopy(net).eval().requires_grad_(False) if args.ema else None
    kept_net = ema if args.ema else net  # the weights that are validated and kept
    val_model = in_precision(attacker_view(kept_net), args.dtype, device)

    # Optimizer and scaler (which does nothing except in float16)
    optimizer = torch.optim.SGD(parameter_groups(net, args.wd), args.lr, momentum=0.9,
                                nesterov=args.nesterov, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # Where we are, the best so far, and this epoch's sums (batch_sums)
    epoch = 0
    step = 0
    n_updates = 0
    n_skipped = 0  # steps that float16 skipped
    best = -1.0
    best_epoch = 0
    ended = ""
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():
            for name, value in moments.items():
                # Not as it was saved: the strides of a CPU's tensors differ from a GPU's
                if torch.is_tensor(value) and value.shape == p.shape:
                    moments[name] = torch.empty_like(p).copy_(value)
        scaler.load_state_dict(state["scaler"])
        if args.ema:
            ema.load_state_dict(state["ema"])
        epoch = state["epoch"]
        step = state["step"]
        n_updates = state["n_updates"]
        n_skipped = state["n_skipped"]
        best = state["best"]
        best_epoch = state["best_epoch"]
        ended = state["ended"]
        if rank == 0:  # saved as the sum over all ranks, so only one rank may add it
            sums += torch.tensor(state["sums"], dtype=torch.float64, device=device)
    assert shares_storage(net, view), "the two views must share their storage"
    cpu_group = None  # for votes and checks
    if world > 1:
        cpu_group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        places = [None] * world
        dist.all_gather_object(places, (epoch, step), group=cpu_group)
        need(len(set(places)) == 1, f"the processes see different checkpoints in {out}, (epoch, step) "
             f"{places}; --out needs to be one folder for all nodes")

    # The next two functions read main's variables as they are at the time of the call, and change none
    def refuse_not_finite(total):
        """SystemExit if a loss of this epoch, or a weight, is not finite."""
        weights_finite = torch.stack([t.isfinite().all() for t in net.state_dict().values()]).all()
        _, _, n_seen, n_not_finite = total.tolist()
        if n_not_finite == 0 and weights_finite:
            return
        sentence = (f"loss or weights are not finite at epoch {epoch + 1}, step {step} (lr {lr:.3g}); "
                    f"last good checkpoint: {out / 'last.pt'}")
        if n_not_finite < n_seen:  # it began well, so it was not the data but the updates
            sentence += "; try a smaller --lr"
        raise SystemExit(sentence)

    def save():
        """last.pt: everything to go on exactly, and nothing that is not finite. All ranks call it."""
        total = all_ranks(sums)
        refuse_not_finite(total)
        if rank == 0:
            save_file(out / "last.pt", {
                "model": net.state_dict(), "ema": ema.state_dict() if args.ema else None,
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "epoch": epoch, "step": step, "sums": total.tolist(), "world": world,
                "n_updates": n_updates, "n_skipped": n_skipped,
                "best": best, "best_epoch": best_epoch, "ended": ended,
            }, previous=out / "last.prev.pt")

    # The loop. From here on there is always a checkpoint to go on from
    lr = args.lr
    if not state:
        save()
    size = sum(p.numel() for p in net.parameters()) / 1e6
    log(f"{args.arch} {args.act}, {size:.2f}M parameters; {args.data}, {len(members)} images, "
        f"{len(held_out)} held out; {n_steps} steps of {min(args.batch_size, len(members))}; "
        f"{args.dtype} on {world} {device_name(device)}")
    if args.init and not state:
        log(init_sentence)
    if state and epoch < args.epochs and not ended:
        log(f"going on at epoch {epoch + 1}, step {step}", kind="resume", epoch=epoch + 1, step=step)
    torch.backends.cudnn.benchmark = True
    stop_asked = listen()
    began = time.monotonic()
    last_save = began
    n_done_before = epoch * n_steps + step  # by earlier processes
    seconds_validating = 0.0
    n_validations = 0
    named_unreadable = set()
    advised = False  # about a slow loader
    batches = data.train_batches(
        images, members, args.batch_size, args.epochs, seed=args.seed, start=(epoch, step), rank=rank,
        world=world, workers=workers, device=device, autoaugment=args.autoaugment)

    while epoch < args.epochs and not ended:
        epoch_began = time.monotonic()
        line_began = epoch_began
        line_total = all_ranks(sums)
        seconds_waiting = 0.0
        while step < n_steps:
            wait_began = time.monotonic()
            index, x, y = next(batches)
            seconds_waiting += time.monotonic() - wait_began

            # One update. The attack's start, dropout and stochastic depth draw from torch's generator,
            # seeded anew each step: nothing random needs saving, a resumed run is the same run
            torch.manual_seed(data.key(args.seed, epoch, step, rank))
            lr = lr_at(args, epoch, step, n_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x_parts = x.chunk(args.accum)
            y_parts = y.chunk(args.accum)
            for number, (x_part, y_part) in enumerate(zip(x_parts, y_parts)):
                x_adv = attack(args, attack_model, x_part, y_part)
                if world > 1:  # gradients are summed over the ranks once, with the last part
                    train_model.require_backward_grad_sync = number + 1 == len(x_parts)
                with precision(args.dtype, device):
                    logits = train_model(x_adv)
                logits = logits.float()
                loss = F.cross_entropy(logits, y_part, label_smoothing=args.label_smoothing)
                scaler.scale(loss * len(x_part) / len(x)).backward()
                sums += batch_sums(logits, y_part)
            scale_before = scaler.get_scale()  # always 1 except in float16
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale_before:
                n_skipped += 1
            optimizer.zero_grad(set_to_none=True)
            average_batchnorm_statistics(net, world)
            n_updates += 1
            if args.ema:
                update_ema(ema, net, n_updates)
            step += 1

            # A log line, over all ranks since the line before. This is where a step waits for the device
            if step % args.log_every == 0 or step == n_steps:
                total = all_ranks(sums)
                refuse_not_finite(total)
                name_unreadable(images, named_unreadable, log, cpu_group)
                now = time.monotonic()
                loss_sum, n_errors, n_seen, _ = (total - line_total).tolist()
                mean_loss = loss_sum / n_seen
                error = n_errors / n_seen
                # Time left: the steps to come at the mean pace so far, and the validations to come
                speed = n_seen / (now - line_began)
                waiting = seconds_waiting / (now - line_began)
                n_done = epoch * n_steps + step
                n_remaining = args.epochs * n_steps - n_done
                seconds_a_step = (now - began - seconds_validating) / (n_done - n_done_before)
                eta = n_remaining * seconds_a_step
                if n_validations:
                    n_validations_ahead = math.ceil((args.epochs - epoch) / args.val_every)
                    eta += n_validations_ahead * seconds_validating / n_validations
                log(f"epoch {epoch + 1:3d}/{args.epochs} | step {step:5d}/{n_steps} | "
                    f"loss {mean_loss:7.4f} | adv {100 * (1 - error):5.2f}% | "
                    f"lr {lr:.4f} | {speed:5.0f} img/s | wait {100 * waiting:2.0f}% | "
                    f"eta {duration(eta)}",
                    kind="step", epoch=epoch + 1, step=step, loss=mean_loss, error=error, lr=lr,
                    speed=speed, waiting=waiting)
                # The first line waits for the workers to start, which says nothing
                workers_started = n_done - n_done_before > args.log_every
                if waiting > 0.1 and images.paths is not None and workers_started and not advised:
                    advised = True
                    short = round(args.res * 288 / 224)  # 288 px for 224
                    log(f"{100 * waiting:.0f}% of the time is spent waiting for images: raise --workers "
                        f"(now {workers}) up to the cores, or shrink the files once with python data.py "
                        f"shrink FROM TO --short {short}")
                line_total = total
                line_began = now
                seconds_waiting = 0.0
            else:
                show(f"epoch {epoch + 1}/{args.epochs} | step {step}/{n_steps}")

            # All ranks stop or save together, if any was asked to stop or rank 0 finds a checkpoint due.
            # Not at every step: between many GPUs even a small reduce takes time
            if world == 1 or step % 10 == 0 or step == n_steps:
                due = rank == 0 and time.monotonic() - last_save > 60 * args.save_every
                votes = torch.tensor([stop_asked.is_set(), due], dtype=torch.int32)
                if world > 1:
                    dist.all_reduce(votes, dist.ReduceOp.MAX, group=cpu_group)
                stop, due = votes.bool().tolist()
                if stop or due or step == n_steps:  # an epoch is saved before it is validated
                    save()
                    last_save = time.monotonic()
                if stop:
                    log(f"stopped at epoch {epoch + 1}, step {step}; go on with --resume")
                    raise SystemExit(75)  # EX_TEMPFAIL in sysexits.h

        # The epoch is over and saved. A kill from here on costs the validation, which --resume repeats
        loss_sum, n_errors, n_seen, _ = all_ranks(sums).tolist()
        epoch_loss = loss_sum / n_seen
        epoch_error = n_errors / n_seen
        skipped = f" | {n_skipped} steps skipped" if n_skipped else ""
        name = f"epoch {epoch + 1:3d}/{args.epochs}"
        log(f"{name} | train loss {epoch_loss:.4f} | train error {100 * epoch_error:.2f}% | "
            f"{duration(time.monotonic() - epoch_began)}{skipped}",
            kind="epoch", epoch=epoch + 1, loss=epoch_loss, error=epoch_error, skipped=n_skipped)
        # The held-out images decide which weights are the best, and whether robustness has collapsed
        is_best = False
        if len(held_out) and ((epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs):
            val_began = time.monotonic()
            n, n_correct, n_robust = validate(args, val_model, images, held_out, workers, device,
                                              rank, world)
            clean = n_correct / n
            robust = n_robust / n
            if args.early_stop and best - robust > 0.2:
                ended = (f"stopped early: robust accuracy dropped from {best:.1%} to {robust:.1%}, "
                         f"catastrophic overfitting; model.pt is best.pt, from epoch {best_epoch}")
            is_best = robust > best
            if is_best:
                best = robust
                best_epoch = epoch + 1
            log(f"{name} | held-out clean {100 * clean:.2f}% | robust {100 * robust:.2f}% (PGD-10, eps "
                f"{args.eps:g}, n {n}) | best {100 * best:.2f}% at epoch {best_epoch}",
                kind="val", epoch=epoch + 1, n=n, clean=clean, robust=robust)
            seconds_validating += time.monotonic() - val_began
            n_validations += 1
        epoch += 1
        step = 0
        sums.zero_()
        if rank == 0 and is_best:
            save_file(out / "best.pt", kept_net.state_dict())
        if rank == 0 and (is_best or not args.early_stop):
            save_file(out / "model.pt", kept_net.state_dict())
        save()
        last_save = time.monotonic()

    log(ended or f"finished epoch {epoch} after {duration(time.monotonic() - began)}")
    log(f"measure it on the test set with python evaluate.py --out {shlex.quote(args.out)}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped before the first step")
