"""
Adversarially train an image classifier with a smooth activation (SAT, arXiv:2006.14536).

See it move on a laptop, no data needed:
$ python train.py --data shapes
The ResNet-50 / SiLU row of the README on 8 GPUs:
$ torchrun --standalone --nproc_per_node=8 train.py --arch resnet50 --act silu
What a run would cost, without data:
$ python train.py --arch efficientnet_l1 --enhanced --plan

Keys: SAT is arXiv:2006.14536.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import data
from activations import ACTIVATIONS
from attacks import pgd, uniform
from evaluate import (Stopped, asked, device_name, duration, listen, open_device, pgd_queue, progress, say, show, summed,
                      tally)
from models import MODELS, attacker_view, build, in_precision, load_file, precision

# --data picks the defaults of all other flags
RECIPES = {
    # SAT Sec. 3.1: 100 epochs, x0.1 at 30, 60 and 90, weight decay 1e-4, PGD-1 with eps 4 and step 4
    "imagenet": dict(arch="resnet50", act="silu", epochs=100, schedule="step", batch_size=1024, wd=1e-4,
                     eps=4, step_size=4, holdout=10000, val_every=1, log_every=50),
    # SAT Sec. 7 names the attack only; the schedule is that of Wong et al. 2020 (arXiv:2001.03994), twice as long
    "cifar10": dict(arch="resnet18", act="silu", epochs=30, schedule="onecycle", batch_size=128, lr=0.2, wd=5e-4,
                    eps=8, step_size=8, holdout=1000, val_every=1, log_every=50),
    "shapes": dict(arch="resnet8", act="silu", epochs=12, schedule="onecycle", batch_size=100, lr=0.2, wd=5e-4,
                   eps=8, step_size=8, holdout=500, val_every=3, log_every=20),
}
# SAT Sec. 5.2; the stochastic depth rate is EfficientNet's, dropout is each network's own
ENHANCED = dict(wd=1e-5, epochs=200, stochastic_depth=0.2, autoaugment=True, ema=True, early_stop=True)

warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # torch 2.15 renamed it, 2.11 has no other

NOISE, CLEAN_START = 2, 3  # uniform's counters in training, beside data's AUGMENT
FREE = {"out", "resume", "workers", "device", "log_every", "save_every", "download", "plan"}  # may differ on --resume


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    # data and output
    p.add_argument("--data", default="imagenet", choices=RECIPES, help="picks the defaults of all other flags")
    p.add_argument("--data-dir", help="default: data/imagenet with train/<class>/*, data with cifar-10-batches-py")
    p.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10")
    p.add_argument("--limit", type=int, help="training images: the first of one fixed permutation; default: all")
    p.add_argument("--holdout", type=int, help="training images held out for validation, at most a tenth; 0: none")
    p.add_argument("--out", default="out", help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, or start it")
    p.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints")
    # network
    p.add_argument("--arch", choices=MODELS, metavar="ARCH", help=", ".join(MODELS))
    p.add_argument("--act", choices=ACTIVATIONS, metavar="ACT", help=", ".join(ACTIVATIONS))
    p.add_argument("--act-alpha", type=float, help="sharpness; default: psoftplus 10, elu and celu 1, smoothrelu 400")
    p.add_argument("--smooth-backward", default="none", choices=["none", "attacker", "optimizer", "both"],
                   help="whose gradient of ReLU is smooth, SAT Table 1")
    p.add_argument("--bn-eps", type=float, default=1e-5, help="of BatchNorm")
    p.add_argument("--dropout", type=float, help="rate; default 0, with --enhanced the network's own")
    p.add_argument("--stochastic-depth", type=float, default=0.0, help="rate at the last block of an EfficientNet")
    # optimization
    p.add_argument("--enhanced", action="store_true", help="SAT Sec. 5.2: sets " + ", ".join(ENHANCED) + ", dropout")
    p.add_argument("--epochs", type=int, help="the schedule scales with them")
    p.add_argument("--batch-size", type=int, help="over all processes")
    p.add_argument("--accum", type=int, default=1, help="parts in which a batch is worked off, to save memory")
    p.add_argument("--lr", type=float, help="peak; default: imagenet 0.1 for each 256 of the batch, else 0.2")
    p.add_argument("--schedule", choices=["step", "onecycle"], help="x0.1 at 30%%, 60%%, 90%%; or a line down to 0")
    p.add_argument("--warmup-epochs", type=float, help="default: step 5%%, at most 5; onecycle 40%%")
    p.add_argument("--wd", type=float, help="weight decay, of convolution and linear weights only")
    p.add_argument("--nesterov", **switch, help="momentum (the released code has it)")
    p.add_argument("--label-smoothing", type=float, default=0.0, help="of the optimizer's loss (released code: 0.1)")
    p.add_argument("--autoaugment", **switch, help="torchvision's AutoAugment")
    p.add_argument("--ema", **switch, help="average the weights; the average is validated and saved")
    p.add_argument("--early-stop", **switch, help="end when robust accuracy falls 20 points, keep the best weights")
    p.add_argument("--res", type=int, help="pixels; default: the network's own, 32 for cifar10 and shapes")
    # the attack inside
    p.add_argument("--eps", type=float, help="L-inf radius in 1/255")
    p.add_argument("--step-size", type=float, help="in 1/255")
    p.add_argument("--steps", type=int, default=1, help="of PGD; 0 is normal training")
    p.add_argument("--clean-start", type=float, default=0.0, help="share of images attacked without a random start")
    p.add_argument("--attack-bn", default="eval", choices=["eval", "batch"], help="BatchNorm's statistics in the attack")
    # how
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "tf32", "bf16", "fp16"], help="auto: bf16 on a GPU")
    p.add_argument("--compile", **switch, help="torch.compile both views")
    p.add_argument("--val-every", type=int, help="epochs between validations")
    p.add_argument("--log-every", type=int, help="steps between log lines")
    p.add_argument("--workers", type=int, help="processes that read images, for each device")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--plan", action="store_true", help="say what the run would cost, and exit")

    first, _ = p.parse_known_args(argv)
    p.set_defaults(**RECIPES[first.data] | (ENHANCED if first.enhanced else {}))
    args = p.parse_args(argv)
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 256
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5, 0.05 * args.epochs) if args.schedule == "step" else 0.4 * args.epochs
    if args.dropout is None:
        args.dropout = MODELS[args.arch].dropout if args.enhanced else 0.0
    if args.dtype == "auto":
        gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
        args.dtype = "bf16" if gpu else "fp32"
    if args.res is None:
        args.res = MODELS[args.arch].res if args.data == "imagenet" else 32
    return args


def check(args, world):
    """SystemExit for what argparse cannot see: what we got, what we need."""
    def need(good, sentence):
        if not good:
            raise SystemExit(sentence)

    share = world * args.accum
    near = max(share, args.batch_size // share * share)
    need(args.batch_size % share == 0 and args.batch_size > 0, f"--batch-size {args.batch_size} does not split over "
         f"{world} processes x --accum {args.accum}; use {near} or {near + share}")
    need(args.eps >= 0, f"--eps {args.eps:g} is negative; it is a radius in 1/255, SAT trains with 4")
    need(args.steps >= 0, f"--steps {args.steps} is negative; use 0 for normal training, 1 for SAT")
    need(args.steps == 0 or args.step_size > 0, f"--steps {args.steps} with --step-size {args.step_size:g} attacks "
         f"nothing; give a step size in 1/255, e.g. {args.eps or 4:g}, or --steps 0")
    need(args.smooth_backward == "none" or args.act == "relu", f"--smooth-backward {args.smooth_backward} replaces "
         f"ReLU's gradient, {args.act} has its own; use --act relu")
    need(0 <= args.clean_start <= 1, f"--clean-start {args.clean_start:g} is a share; use 0 to 1")
    need(args.epochs > 0 and args.val_every > 0 and args.log_every > 0 and args.accum > 0 and args.save_every >= 0,
         "--epochs, --val-every, --log-every and --accum start at 1, --save-every at 0")
    need(args.limit is None or args.limit > 1, f"--limit {args.limit} leaves nothing to train on; use 2 or more")
    need(args.lr > 0 and args.wd >= 0, f"--lr {args.lr:g} --wd {args.wd:g}: give a positive rate, a decay of 0 or more")
    need(args.warmup_epochs <= args.epochs, f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    need(not args.early_stop or args.holdout, "--early-stop watches held-out images; give --holdout, or --no-early-stop")


# The pieces of a step

def lr_at(args, epoch, step, n_steps):
    """The step's learning rate: a linear warm-up, then x0.1 at 30%, 60%, 90% (SAT Sec. 3.1) or a line to 0."""
    now = epoch + step / n_steps
    warm = (now + 1 / n_steps) / args.warmup_epochs if args.warmup_epochs else 1.0
    if args.schedule == "step":
        fall = 0.1 ** sum(now >= share * args.epochs for share in (0.3, 0.6, 0.9))
    else:
        fall = (args.epochs - now) / max(args.epochs - args.warmup_epochs, 1 / n_steps)
    return args.lr * min(warm, fall, 1.0)


def parameter_groups(net, wd):
    """Decay for the weights of convolutions and linear layers; none for BatchNorm, biases, SmoothReLU's alpha."""
    decayed = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    others = [p for p in net.parameters() if all(p is not d for d in decayed)]
    return [{"params": decayed, "weight_decay": wd}, {"params": others, "weight_decay": 0.0}]


def averaged(net):
    """torch's running average of weights and buffers, decay min(0.9999, (1 + t) / (10 + t)) after t updates."""
    def average(means, news, _):
        if means[0].is_floating_point():
            t = int(ema.n_averaged)  # on the CPU: no sync
            torch._foreach_lerp_(means, news, 1 - min(0.9999, (1 + t) / (10 + t)))
        else:
            torch._foreach_copy_(means, news)

    ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    return ema


def share_statistics(net, world):
    """Average BatchNorm's running statistics over the ranks: all attack, validate and save one network."""
    statistics = [b for name, b in net.named_buffers() if "running" in name]
    if world > 1 and statistics:
        flat = torch.cat(statistics)
        dist.all_reduce(flat)
        torch._foreach_copy_(statistics, list((flat / world).split([len(b) for b in statistics])))


def loss_scale(args):
    return 128.0 if args.dtype == "fp16" else 1.0  # of the attack, as in the released code


def attack(args, model, x, y, index, epoch):
    """The training attack (SAT Sec. 3.1) -> x_adv: PGD from a start that belongs to (seed, epoch, image)."""
    if args.steps == 0:
        return x
    eps, step_size = args.eps / 255, args.step_size / 255
    noise = (2 * uniform(args.seed, index, (NOISE, epoch), x.shape[1:]) - 1) * eps
    if args.clean_start:
        noise *= uniform(args.seed, index, (CLEAN_START, epoch), (1, 1, 1)) >= args.clean_start
    return pgd(model, x, y, eps, step_size, args.steps, noise, loss_scale(args), check=False)


def validate(run, net):
    """Clean and PGD-10 accuracy, step eps / 4, on this rank's share of the held-out images -> counts."""
    args, held = run.args, run.held[run.rank::run.world]
    exact = in_precision(attacker_view(net), "fp32", run.device)
    model = exact if args.dtype == "fp32" else in_precision(attacker_view(net), args.dtype, run.device)
    slots = min(250, args.batch_size // run.world)
    batches = data.eval_batches(run.images, held, slots, run.workers, run.device)
    began, lines = time.time(), []

    queue = pgd_queue(model, batches, slots, args.eps / 255, args.eps / 4 / 255, 10, seed=args.seed,
                      exact=None if model is exact else exact, loss_scale=loss_scale(args),
                      tick=lambda: progress(began, len(lines), len(held), "validation "))
    for line in queue:
        lines.append(line)
    return tally(lines, 10)


# The run's folder

def write(path, content):
    """Save tensors under a temporary name, flush to disk, rename: path is whole, old or new, at any moment."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.pt" and path.exists():
            path.replace(path.with_name("last.prev.pt"))
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise SystemExit(f"cannot write {path} ({str(error).splitlines()[0]}); the checkpoint before it is whole: make "
                         "room and go on with --resume")


class Log:
    """log.txt and log.jsonl of rank 0; silent on the others. log.txt is locked: one run at a time in a folder."""

    def __init__(self, out, active):
        self.active = active
        if active:
            self.txt = open(out / "log.txt", "a", buffering=1)
            try:
                fcntl.lockf(self.txt, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with its owner; flock outlives a kill -9
            except OSError:
                raise SystemExit(f"another run writes into {out}; wait for it, or choose another --out")
            self.jsonl = open(out / "log.jsonl", "a", buffering=1)

    def __call__(self, text, **values):
        if self.active:
            say(text)
            self.txt.write(text + "\n")
            if values:
                self.jsonl.write(json.dumps(values) + "\n")

    def lengths(self):
        return [self.txt.tell(), self.jsonl.tell()] if self.active else []

    def cut_back(self, lengths):
        for file, length in zip((self.txt, self.jsonl), lengths) if self.active else ():
            file.truncate(length)
            file.seek(0, os.SEEK_END)


def open_folder(args, rank, world, facts, notes):
    """The run's log, and its last whole checkpoint or None. SystemExit rather than losing a run."""
    out = Path(args.out)
    if rank == 0:
        holds = [name for name in ("args.json", "last.pt", "model.pt", "log.txt") if (out / name).exists()]
        if holds and not args.resume:
            raise SystemExit(f"{out} holds a run already ({holds[0]}); go on with --resume, or choose another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"cannot write into {out} ({error.strerror}); choose another --out")
    log = Log(out, rank == 0)
    if world > 1:
        dist.barrier()

    state, damaged = None, []
    for path in (out / "last.pt", out / "last.prev.pt"):
        if args.resume and state is None and path.exists():
            try:
                state = load_file(path)
            except SystemExit as reason:
                damaged.append(str(reason))
    if damaged and state is None:
        raise SystemExit(f"{'; '.join(damaged)}: nothing to go on from; choose another --out to start again")
    for reason in damaged:
        log(f"{reason}: going on from {out / 'last.prev.pt'}")

    mine = {**vars(args), **facts}
    if state is not None:
        theirs = json.loads((out / "args.json").read_text())
        differ = [f"--{name.replace('_', '-')} {theirs.get(name)} (now {mine[name]})" for name in sorted(mine)
                  if name not in FREE and theirs.get(name) != mine[name]]
        if differ:
            raise SystemExit(f"the run in {out} was started with {', '.join(differ)}; type these, or another --out")
        log.cut_back(state["log"])
        if state["world"] != world:
            log(f"going on with {world} processes instead of {state['world']}: not bit-exact")
    elif rank == 0:
        log.cut_back([0, 0])
        (out / "args.json").write_text(json.dumps({**mine, **notes}, indent=1) + "\n")
    return log, state


def commit():
    """Of the code that runs, "-dirty" where it was edited; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# The run

def assemble(args, device, rank, world, num_classes, small_input, weights=None):
    """The network, both views of it and the optimizer, in the order that keeps one storage -> namespace."""
    torch.manual_seed(args.seed)
    net = build(args.arch, args.act, num_classes, args.act_alpha, args.smooth_backward in ("optimizer", "both"),
                args.dropout, args.stochastic_depth, small_input, args.bn_eps)
    net.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    if weights:
        net.load_state_dict(weights)
    view = attacker_view(net, args.smooth_backward in ("attacker", "both"), args.attack_bn == "batch")
    compiled = partial(torch.compile, dynamic=False) if args.compile else lambda module: module
    trainee = compiled(net.train())
    if world > 1:
        trainee = DistributedDataParallel(trainee, device_ids=[device] if device.type == "cuda" else None,
                                          broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(parameter_groups(net, args.wd), args.lr, momentum=0.9, nesterov=args.nesterov,
                                fused=device.type == "cuda")
    return SimpleNamespace(
        args=args, device=device, rank=rank, world=world, net=net, view=view, trainee=trainee, optimizer=optimizer,
        attacker=in_precision(compiled(view), args.dtype, device), ema=averaged(net) if args.ema else None,
        scaler=torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16"),
        # where we are, the best so far, and over the epoch the sums of [loss, errors, images, losses not finite]
        epoch=0, step=0, ended="", best=-1.0, best_epoch=0, top=0.0, skipped=0,
        sums=torch.zeros(4, dtype=torch.float64, device=device))


PROGRESS = ("epoch", "step", "ended", "best", "best_epoch", "top", "skipped")  # in a checkpoint, beside the sums


def set_up(args):
    """Data, folder, network, and all of it as the last checkpoint left it -> namespace."""
    device, rank, world = open_device(args.device)
    check(args, world)
    if args.download and rank == 0:
        data.load(args.data, args.data_dir, True, args.res, download=True)
    if args.download and world > 1:
        dist.barrier()
    images = data.load(args.data, args.data_dir, True, args.res, device=device)
    members, held = data.hold_out(images.n, args.limit, args.holdout)
    n_steps = len(data.epoch_batches(members, 0, args.seed, args.batch_size, world))
    if n_steps == 0:
        raise SystemExit(f"{len(members)} training images make no batch on {world} processes; give more images")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__}
    facts = {"classes": images.classes, "num_classes": len(images.classes), "small_input": images.small_input,
             "n_images": images.n}
    log, state = open_folder(args, rank, world, facts, {"commit": commit(), "versions": versions, "world": world})

    run = assemble(args, device, rank, world, len(images.classes), images.small_input, state and state["model"])
    if state:
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        if run.ema:
            run.ema.load_state_dict(state["ema"])
        vars(run).update({name: state[name] for name in PROGRESS})
        run.sums += torch.tensor(state["sums"], dtype=torch.float64, device=device) * (rank == 0)
    for mine, theirs in zip(run.net.parameters(), run.view.parameters()):
        assert mine.data_ptr() == theirs.data_ptr(), "the two views must share their storage"
    vars(run).update(
        images=images, members=members, held=held, n_steps=n_steps, log=log, out=Path(args.out), saved=time.time(),
        unreadable=set(), workers=data.loader_processes(args.workers, args.data, world),
        votes=dist.new_group(backend="gloo", timeout=timedelta(hours=24)) if world > 1 else None)
    return run


def all_ranks(run, sums):
    """The sums over all processes."""
    total = sums.clone()
    if run.world > 1:
        dist.all_reduce(total)
    return total


def save(run):
    """last.pt: everything to go on exactly. Weights that are not finite are never written. All ranks call it."""
    total = all_ranks(run, run.sums)
    run.sums = total * (run.rank == 0)  # a resumed run starts from rank 0's share alone
    refuse_nonfinite(run, total)
    if run.rank == 0:
        state = {"model": run.net.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "scaler": run.scaler.state_dict(), "ema": run.ema and run.ema.state_dict(), "sums": total.tolist(),
                 "world": run.world, "log": run.log.lengths(), **{name: vars(run)[name] for name in PROGRESS}}
        write(run.out / "last.pt", state)
    run.saved = time.time()


def refuse_nonfinite(run, sums):
    """SystemExit if a loss was not finite (fp16 skips such steps), or a weight is not."""
    lost = sums[3] > 0 and run.args.dtype != "fp16"
    if lost or not torch.stack([t.isfinite().all() for t in run.net.state_dict().values()]).all():
        lr = run.optimizer.param_groups[0]["lr"]
        good = [str(p) for p in (run.out / "last.pt", run.out / "last.prev.pt") if p.exists()]
        raise SystemExit(f"loss or weights not finite at epoch {run.epoch + 1}, step {run.step} (lr {lr:.3g}); "
                         f"last good checkpoint: {good[0] if good else 'none'}; try a smaller --lr")


def train_step(run, index, x, y, timed):
    """One update from one batch: attack, forward, backward, step -> share of the time that the attack took."""
    args, attacking, began = run.args, 0.0, clock(run.device, timed)
    torch.manual_seed(data.key(args.seed, run.epoch, run.step, run.rank))  # dropout, stochastic depth
    parts = list(zip(x.chunk(args.accum), y.chunk(args.accum), index.chunk(args.accum)))
    for part, (x_part, y_part, index_part) in enumerate(parts):
        start = clock(run.device, timed)
        x_adv = attack(args, run.attacker, x_part, y_part, index_part, run.epoch)
        attacking += clock(run.device, timed) - start
        last = part == len(parts) - 1
        with contextlib.nullcontext() if last or run.world == 1 else run.trainee.no_sync():
            with precision(args.dtype, run.device):
                logits = run.trainee(x_adv).float()
                loss = F.cross_entropy(logits, y_part, label_smoothing=args.label_smoothing)
            run.scaler.scale(loss * len(y_part) / len(y)).backward()
        with torch.no_grad():  # what the paper reports: unsmoothed loss and error on the attacked batch
            plain = F.cross_entropy(logits.detach(), y_part, reduction="sum")
            errors = (logits.argmax(1) != y_part).sum()
            run.sums += torch.stack([plain.nan_to_num(0, 0, 0), errors.float(), torch.full_like(plain, len(y_part)),
                                     (~plain.isfinite()).float()])
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.skipped += run.scaler.get_scale() < scale
    run.optimizer.zero_grad(set_to_none=True)
    share_statistics(run.net, run.world)
    if run.ema:
        run.ema.update_parameters(run.net)
    return attacking / (clock(run.device, timed) - began) if timed else 0.0


def clock(device, timed):
    if timed and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def vote(run):
    """Whether any rank was asked to stop, and whether rank 0 finds a checkpoint due: one answer for all ranks."""
    due = run.rank == 0 and time.time() - run.saved > 60 * run.args.save_every
    ballot = torch.tensor([bool(asked.signal), due], dtype=torch.int32)
    if run.world > 1:
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=run.votes)
    return ballot.bool().tolist()


def stop(run):
    save(run)
    run.log(f"stopped at epoch {run.epoch + 1}, step {run.step}; go on with --resume")
    raise SystemExit(75)  # torchrun's own code is 1


def log_step(run, share, line):
    """The line of the log, over all ranks since `line` = (sums, time, steps) of the one before -> the new `line`."""
    args, total, now = run.args, all_ranks(run, run.sums), time.time()
    refuse_nonfinite(run, total)
    name_unreadable(run)
    loss, errors, n = (total - line[0])[:3].tolist()
    n_done = run.epoch * run.n_steps + run.step
    eta = (now - run.began) / (n_done - run.began_at) * (args.epochs * run.n_steps - n_done)
    lr, speed = run.optimizer.param_groups[0]["lr"], n / (now - line[1])
    run.log(f"epoch {run.epoch + 1:3d}/{args.epochs} | step {run.step:5d}/{run.n_steps} | loss {loss / n:7.4f} | "
            f"adv {100 - 100 * errors / n:5.2f}% | lr {lr:.4f} | {speed:5.0f} img/s | attack {100 * share:2.0f}% | "
            f"eta {duration(eta)}", kind="step", epoch=run.epoch + 1, step=run.step, loss=loss / n, error=errors / n,
            lr=lr, speed=speed, attack_share=share)
    return total, now


def name_unreadable(run):
    """Name in the log each image file that could not be read, once, whichever rank met it."""
    met = [run.images.broken]
    if run.world > 1:
        met = [None] * run.world
        dist.all_gather_object(met, run.images.broken, group=run.votes)
    for reason in sorted({r for broken in met for r in broken} - run.unreadable):
        run.unreadable.add(reason)
        run.log(f"cannot read {reason}; its neighbour stands in ({len(run.unreadable)} such files)")
    run.images.broken.clear()


def end_epoch(run, began):
    """Log the epoch, validate, keep the best weights, look for catastrophic overfitting, save."""
    args, total = run.args, all_ranks(run, run.sums)
    refuse_nonfinite(run, total)
    name_unreadable(run)
    counted, final = {}, run.epoch + 1 == args.epochs
    if len(run.held) and (final or (run.epoch + 1) % args.val_every == 0):
        with contextlib.suppress(Stopped):
            counted["raw"] = validate(run, run.net)
            counted["kept"] = validate(run, run.ema.module) if run.ema else counted["raw"]
        if vote(run)[0]:
            stop(run)
        counted = {name: summed(counts, run.device) for name, counts in counted.items()}

    run.epoch, run.step = run.epoch + 1, 0
    loss, error = (total[:2] / total[2]).tolist()
    run.log(f"epoch {run.epoch:3d}/{args.epochs} | train loss {loss:.4f} | train error {100 * error:.2f}% | "
            f"{duration(time.time() - began)}" + (f" | {run.skipped} steps skipped" if run.skipped else ""),
            kind="epoch", epoch=run.epoch, loss=loss, error=error, skipped=run.skipped)
    kept = (run.ema.module if run.ema else run.net).state_dict()
    better = False
    if counted:
        clean, robust = (counted["kept"][name] / counted["kept"]["n"] for name in ("n_correct", "n_robust"))
        raw = counted["raw"]["n_robust"] / counted["raw"]["n"]  # an average would show a collapse too late
        better, run.top = robust > run.best, max(run.top, raw)
        if better:
            run.best, run.best_epoch = robust, run.epoch
        run.log(f"epoch {run.epoch:3d}/{args.epochs} | held-out clean {100 * clean:.2f}% | robust {100 * robust:.2f}% "
                f"(PGD-10, eps {args.eps:g}, n {counted['kept']['n']}) | best {100 * run.best:.2f}% at epoch "
                f"{run.best_epoch}", kind="val", epoch=run.epoch, n=counted["kept"]["n"], clean=clean, robust=robust,
                raw_robust=raw)
        if args.early_stop and run.top - raw > 0.2:
            run.ended = (f"robust accuracy fell from {100 * run.top:.1f}% to {100 * raw:.1f}%: catastrophic overfitting; "
                         f"stopped early, model.pt is best.pt of epoch {run.best_epoch}")
    run.sums.zero_()
    if run.rank == 0 and better:
        write(run.out / "best.pt", kept)
    if run.rank == 0 and (better or not args.early_stop):
        write(run.out / "model.pt", kept)
    save(run)


def main():
    args = get_args()
    if args.plan:
        return plan(args)
    run = set_up(args)
    n_parameters = sum(p.numel() for p in run.net.parameters())
    run.log(f"{args.arch} {args.act}, {n_parameters / 1e6:.2f}M parameters; {args.data}, {len(run.members)} images and "
            f"{len(run.held)} held out; {run.n_steps} steps of {min(args.batch_size, len(run.members))} an epoch; "
            f"{args.dtype} on {run.world} x {device_name(run.device)}")
    if args.epochs <= run.epoch or run.ended:
        run.log(f"this run is finished after epoch {run.epoch}; measure it with python evaluate.py --out {args.out}")
        return
    if run.epoch or run.step:
        run.log(f"going on at epoch {run.epoch + 1}, step {run.step}")
    listen()
    run.began, run.began_at, shown = time.time(), run.epoch * run.n_steps + run.step, 0.0
    stream = data.train_batches(run.images, run.members, args.batch_size, args.epochs, args.seed, (run.epoch, run.step),
                                run.rank, run.world, run.workers, run.device, args.autoaugment)
    while run.epoch < args.epochs and not run.ended:
        began, line = time.time(), (all_ranks(run, run.sums), time.time())
        while run.step < run.n_steps:
            lr = lr_at(args, run.epoch, run.step, run.n_steps)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            timed = (run.step + 1) % args.log_every == 0 or run.step + 1 == run.n_steps
            share = train_step(run, *next(stream), timed)
            run.step += 1
            if timed:
                line = log_step(run, share, line)
            elif time.time() - shown > 0.2:
                shown = time.time()
                show(f"epoch {run.epoch + 1:3d}/{args.epochs} | step {run.step:5d}/{run.n_steps}")
            asked_to_stop, due = vote(run)
            if asked_to_stop:
                stop(run)
            if due:
                save(run)
        end_epoch(run, began)
    run.log(run.ended or f"finished in {duration(time.time() - run.began)}: the best epoch on held-out images was "
            f"{run.best_epoch}")
    run.log(f"measure it on the test set with python evaluate.py --out {args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


# What would it cost?

def plan(args):
    """Print what a run is made of and how long it would take: one step is timed here, the rest is arithmetic."""
    device, _, _ = open_device(args.device)
    n, classes, source = 1281167, 1000, "assumed: ImageNet's, since its folder is not here"
    try:
        images = data.load(args.data, args.data_dir, True, args.res)
        n, classes, source = len(data.hold_out(images.n, args.limit, args.holdout)[0]), len(images.classes), "counted"
    except SystemExit:
        if args.data != "imagenet":
            raise
    small = args.data != "imagenet"

    # On the meta device a forward pass costs nothing, yet its FLOPs and what it keeps for the backward can be counted
    kept = {}
    with torch.device("meta"):
        net = build(args.arch, args.act, classes, args.act_alpha, small_input=small)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage()._cdata, t).nbytes and t, lambda t: t)
        with FlopCounterMode(display=False) as counter, hooks:
            net(torch.empty(2, 3, args.res, args.res))
    n_parameters = sum(p.numel() for p in net.parameters())
    forward = counter.get_total_flops() / 2
    passes = 2 * args.steps + 3  # an attack step is a forward and an input gradient, training a forward and two
    n_steps = -(-n // args.batch_size)
    activations = sum(t.nbytes for t in kept.values() if t.shape[:1] == (2,)) / 2
    activations *= 0.5 if args.dtype in ("bf16", "fp16") else 1.0
    weights = n_parameters * 4 * (4 if args.ema else 3)  # weights, gradients, momentum, average

    # Time one step at the largest size that fits 20 seconds
    run, speed, size = assemble(args, device, 0, 1, classes, small), None, None
    for res, batch in ((args.res // 4, 2), (args.res // 2, 2), (args.res, 2), (args.res, 8), (args.res, 32)):
        cost = passes * forward * (res / args.res) ** 2 * batch
        if res < 32 or (speed and cost / speed > 20):
            continue
        x = torch.rand(batch, 3, res, res, device=device)
        for _ in range(2 if speed is None else 1):  # the first step of all allocates and tunes
            began = clock(device, True)
            train_step(run, torch.arange(batch, device=device), x, torch.zeros(batch, dtype=torch.long, device=device), False)
            seconds = clock(device, True) - began
        speed, size = cost / seconds, (batch, res, seconds)

    hours = passes * forward * args.batch_size * n_steps * args.epochs / speed / 3600
    say(f"{args.arch} {args.act} at {args.res} px: {n_parameters / 1e6:.1f}M parameters, "
        f"{forward / 1e9:.2f} GFLOPs forward an image")
    say(f"{n} images, {classes} classes ({source}); {n_steps} steps of {args.batch_size} an epoch, {args.epochs} epochs")
    say(f"PGD-{args.steps}: {passes} forward passes' worth a step, {passes * forward * args.batch_size / 1e12:.1f} TFLOPs; "
        f"{n_steps * args.epochs} steps, {n_steps * args.epochs * args.batch_size / 1e6:.1f}M images")
    say(f"memory: {weights / 2**30:.1f} GiB for weights and optimizer, and {activations / 2**20:.0f} MiB for each "
        f"image of a device's share (estimate)")
    say(f"timed: one step of {size[0]} images at {size[1]} px took {size[2]:.1f} s on {device_name(device)} in {args.dtype}; "
        "the rest is scaled by FLOPs: forward counted, backward taken as twice that; no loading, no validation")
    say("hours: " + ", ".join(f"{hours / k:,.1f} on {k}" for k in (1, 8, 64)) + f" x {device_name(device)}")


if __name__ == "__main__":
    main()
