"""
Measure clean and robust accuracy, exactly.

After `python train.py ...`, with no other flag:
$ python evaluate.py --steps 200 --eps 4
Any state dict, on 8 GPUs, as the paper measured (nothing leaves early, the verdict is the last iterate's):
$ torchrun --standalone --nproc_per_node=8 evaluate.py --weights FILE --arch resnet50 --act silu --last-iterate

An image counts as robust only if no iterate of any restart fools the model. The verdict on an image depends
on the weights, the attack and (seed, index, restart): not on batch size, order or the number of processes.

Keys: SAT is arXiv:2006.14536.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from attacks import ball, input_gradient, uniform
from models import MODELS, attacker_view, build

# --data: eps, step size (both of 255) and steps of the attack
ATTACK = {"imagenet": (4, 1, 200), "cifar10": (8, 2, 50), "shapes": (8, 2, 50)}

PAPER = {  # (arch, act, res): clean, robust in percent, PGD-200 at eps 4, ImageNet; None where only drawn
    ("resnet50", "relu", 224): (68.8, 33.0),  # Table 1
    ("resnet50", "psoftplus", 224): (None, 38.7),  # Sec. 4.1
    ("resnet50", "silu", 224): (69.7, 42.3),
    ("resnet50", "smoothrelu", 224): (69.4, 40.3),  # Sec. 4.2
    ("resnet50", "elu", 224): (None, 41.1),  # Table 2
    ("resnet101", "silu", 224): (72.9, 45.5),  # Table 3
    ("resnet152", "silu", 224): (73.9, 46.0),
    ("resnext50_32x4d", "silu", 224): (71.2, 42.5),
    ("resnext50_32x8d", "silu", 224): (73.6, 45.1),
    ("resnet50", "silu", 299): (70.9, 43.8),
    ("resnet50", "silu", 380): (71.6, 44.1),
    ("resnext152_32x8d", "silu", 380): (78.2, 51.2),
    ("resnet152", "relu", 224): (None, 39.4),  # Sec. 5.1
    ("resnext50_32x8d", "relu", 224): (None, 36.7),
    ("resnet50", "relu", 380): (None, 36.9),
    ("resnext152_32x8d", "relu", 380): (None, 46.3),
    ("efficientnet_b0", "silu", 224): (65.1, 37.6),  # Sec. 5.2
    ("efficientnet_b7", "silu", 600): (79.8, 57.0),
    ("efficientnet_l1", "silu", 600): (80.5, 58.0),
}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to measure
    p.add_argument("--out", default="out", help="a run's folder: its model.pt, its data, its network")
    p.add_argument("--weights", help="a state dict instead; its network and data in the next flags")
    p.add_argument("--data", choices=data.FOLDERS, help="default: the run's, or imagenet")
    p.add_argument("--data-dir", help="default: the run's, or data/imagenet, or data")
    p.add_argument("--arch", help="default: the run's; " + ", ".join(MODELS))
    p.add_argument("--act", help="default: the run's")
    p.add_argument("--act-alpha", type=float, help="the activation's sharpness; default: the run's, or the paper's")
    p.add_argument("--bn-eps", type=float, help="default: the run's, or SAT's 1e-5; 1e-3 for torchvision's b5 to b7")
    p.add_argument("--res", type=int, help="pixels; default: the run's, or the network's own")
    p.add_argument("--limit", type=int, help="images: the first of one fixed permutation; default: all")
    # the attack
    p.add_argument("--attack", default="pgd", choices=["pgd"], help="what attacks")
    p.add_argument("--steps", type=int, help="of PGD; default: imagenet 200, else 50")
    p.add_argument("--eps", type=float, help="L-inf radius in 1/255; default: imagenet 4, else 8")
    p.add_argument("--step-size", type=float, help="in 1/255; default: imagenet 1, else 2")
    p.add_argument("--restarts", type=int, default=1, help="random starts an image has to survive")
    p.add_argument("--last-iterate", action="store_true", help="the paper's protocol: the last iterate's verdict")
    p.add_argument("--smooth-backward", default="none", choices=["none", "attacker"], help="SAT Sec. 3.2, relu only")
    p.add_argument("--seed", type=int, default=0, help="of the random starts")
    # how
    p.add_argument("--dtype", default="fp32", choices=["fp32", "tf32", "bf16", "fp16"],
                   help="of the search; fp32 confirms every image that fell")
    p.add_argument("--batch-size", type=int, help="images in work at a time, on each device")
    p.add_argument("--workers", type=int, help="processes that read images, for each device")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--json", help="write the report to this file too")
    p.add_argument("--fresh", action="store_true", help="start over instead of going on from the ledger")
    return p.parse_args(argv)


# The machine

def open_device(name):
    """torchrun's (device, rank, world); without torchrun 0 and 1."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit(f"--device {name}, but torch sees no GPU; use --device cpu")
        name = f"cuda:{local}" if name == "cuda" else name
        torch.cuda.set_device(name)
    elif name != "cpu":
        raise SystemExit(f"--device {name} is unknown; use auto, cpu or cuda")
    if world > 1 and not dist.is_initialized():  # ranks finish an evaluation hours apart
        dist.init_process_group("nccl" if name != "cpu" else "gloo", timeout=timedelta(hours=24))
    return torch.device(name), rank, world


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def precision(dtype, device):
    """Everything inside runs in fp32 (TF32 off), tf32, or under bf16 or fp16 autocast."""
    knobs = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [knob.fp32_precision for knob in knobs]
    for knob in knobs:
        knob.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        with torch.autocast(device.type, AUTOCAST.get(dtype), enabled=dtype in AUTOCAST):
            yield
    finally:
        for knob, was in zip(knobs, before):
            knob.fp32_precision = was


def in_precision(net, dtype, device):
    """net as a callable that runs in `dtype` wherever it is called."""
    def model(x):
        with precision(dtype, device):
            return net(x)
    return model


# Long work shows where it is, and can be stopped anywhere

class Stopped(Exception):
    """Raised inside long work after SIGINT or SIGTERM."""


asked = SimpleNamespace(signal=None)


def listen():
    """From here on SIGINT and SIGTERM only ask; long work polls `stop_if_asked`. A second Ctrl-C ends at once."""
    def ask(number, _):
        asked.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)


def stop_if_asked():
    if asked.signal:
        raise Stopped


def show(text):
    """A line that the next one overwrites; nothing where no person looks."""
    if sys.stdout.isatty() and int(os.environ.get("RANK", 0)) == 0:
        print(f"\r\033[K{text}", end="", flush=True)


def say(text):
    """A line that stays."""
    show("")
    print(text, flush=True)


def duration(seconds):
    """3h12m, 4m05s or 7s."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


# Weights

def load_file(path):
    """A file of tensors and plain Python, on the CPU. SystemExit if it is missing, damaged or anything else."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"no file {path}; train first, or say where with --out or --weights")
    except Exception as error:  # a dozen kinds, according to where the damage is
        raise SystemExit(f"{path} is damaged or not a file of weights: {str(error).splitlines()[0]}")


def load_weights(net, path):
    """Load a state dict, bare or under "model" or "state_dict", into net; strict. SystemExit if it does not fit."""
    state = load_file(path)
    for name in ("model", "state_dict"):
        state = state.get(name, state) if isinstance(state, dict) else {}
    state = {name.removeprefix("module."): tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    mine = {name: tensor.shape for name, tensor in net.state_dict().items()}
    other = {name: tensor.shape for name, tensor in state.items()}
    odd = sorted(name for name in mine | other if mine.get(name) != other.get(name))
    if odd:
        shape = {True: "absent"}
        raise SystemExit(
            f"{path} does not fit this network: {len(odd)} of {len(mine)} tensors differ, e.g. {odd[0]}: "
            f"{tuple(other.get(odd[0], ())) or 'absent'} in the file, {tuple(mine.get(odd[0], ())) or 'absent'} here; "
            "give the --arch, --act and --data that the weights were trained with")
    net.load_state_dict(state)


# The work queue

def wrong(logits, y):
    """(N,) bool: another class than y, or no number at all."""
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)


def random_start(x, eps, seed, index, restart):
    """The offset of a PGD start, as x: a function of (seed, index, restart) alone."""
    return (2 * uniform(seed, index, (0, restart), x.shape[1:]) - 1) * eps


def pgd_queue(model, batches, slots, eps, step_size, steps, restarts=1, seed=0, exact=None,
              last_iterate=False, loss_scale=1.0, tick=lambda: None):
    """PGD on every image of `batches`, (index, x, y) each; yields a ledger line, a dict, as one is decided.

    Every step is one forward and one input gradient on all slots, each slot at its own step of its own
    image. The forward's logits say whether its iterate fools: then the image leaves and the next moves in,
    so the batch stays full and no work goes to decided images. Steps count gradients: 0 is the random start.
    exact: the float32 model, which has to agree before an image is called fooled. tick: called at each step.
    With last_iterate nothing leaves early, and "verdicts" holds a 1 for each iterate that does not fool.
    """
    source, more, n_busy, s = iter(batches), True, 0, None
    waiting = None  # index, x, y, clean prediction of the images without a slot
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
                logits = (exact or model)(x)
            clean = torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
            attacked = torch.ones_like(y, dtype=torch.bool) if last_iterate else clean == y
            for i, label, guess in torch.stack((index, y, clean), 1)[~attacked].tolist():
                yield {"index": i, "label": label, "clean": guess, "fell": None, "forwards": 1}
            arrived = [t[attacked] for t in (index, x, y, clean)]
            waiting = arrived if waiting is None else [torch.cat(pair) for pair in zip(waiting, arrived)]
        if s is None:
            if waiting is None or not len(waiting[0]):
                return
            slots = min(slots, len(waiting[0]))
            s = empty_slots(waiting, slots, steps)

        # Move in
        k = min(slots - n_busy, len(waiting[0]))
        if k:
            free = (~s.busy).nonzero().flatten()[:k]
            s.index[free], s.x[free], s.y[free], s.clean[free] = (t[:k] for t in waiting)
            waiting = [t[k:] for t in waiting]
            s.lower[free], s.upper[free] = ball(s.x[free], eps)
            s.busy[free], s.restart[free], s.forwards[free] = True, 0, 1
            begin(s, free, eps, seed)
            n_busy += k
        if n_busy == 0:
            return
        while n_busy <= slots // 2:  # nothing is left to move in: shrink by halves, each shape costs a graph
            slots //= 2
            busiest = s.busy.long().argsort(descending=True, stable=True)[:slots]
            s = SimpleNamespace(**{name: t[busiest] for name, t in vars(s).items()})

        # One step
        tick()
        if bool((s.busy & (s.step < steps)).any()):
            logits, grad = input_gradient(
                model, s.x_adv, lambda logits: loss_scale * F.cross_entropy(logits, s.y, reduction="none"))
        else:
            with torch.no_grad():
                logits, grad = model(s.x_adv), torch.zeros_like(s.x_adv)
        s.forwards += s.busy
        fooled = wrong(logits, s.y) & s.busy
        if exact is not None:
            doubt = fooled.nonzero().flatten()
            with torch.no_grad():
                fooled[doubt] = wrong(exact(s.x_adv[doubt]), s.y[doubt]) if len(doubt) else fooled[doubt]
            s.forwards[doubt] += 1

        # Leave, begin again, or go on
        at_end = s.step >= steps
        if last_iterate:
            s.robust.scatter_(1, s.step.clamp(max=steps)[:, None], ~fooled[:, None])
            again, leaves = torch.zeros_like(at_end), s.busy & at_end
        else:
            again = s.busy & ~fooled & at_end & (s.restart + 1 < restarts)
            leaves = s.busy & (fooled | at_end) & ~again
        gone = leaves.nonzero().flatten()
        facts = torch.stack((s.index, s.y, s.clean, s.forwards, s.restart, s.step, fooled), 1)[gone].tolist()
        for (i, label, guess, forwards, restart, step, fell), robust in zip(facts, s.robust[gone].tolist()):
            verdict = {"verdicts": "".join(map(str, map(int, robust)))} if last_iterate else {
                "fell": [restart, step] if fell else None}
            yield {"index": i, "label": label, "clean": guess, **verdict, "forwards": forwards}
        s.busy &= ~leaves
        n_busy -= len(gone)
        s.x_adv = torch.clamp(s.x_adv + step_size * grad.sign(), s.lower, s.upper)
        s.step += 1
        if restarts > 1 and len(again := again.nonzero().flatten()):
            s.restart[again] += 1
            begin(s, again, eps, seed)


def empty_slots(like, slots, steps):
    """Room for `slots` images shaped as those in `like`."""
    index, x = like[0], like[1][:slots]
    number = torch.zeros_like(index[:slots])
    return SimpleNamespace(
        x=x.clone(), x_adv=x.clone(), lower=x.clone(), upper=x.clone(), y=number.clone(), index=number.clone(),
        clean=number.clone(), step=number.clone(), restart=number.clone(), forwards=number.clone(),
        busy=number.bool(), robust=torch.zeros(slots, steps + 1, dtype=torch.bool, device=x.device))


def begin(s, where, eps, seed):
    """Put the slots `where` at the random start of their image's current restart."""
    noise = random_start(s.x[where], eps, seed, s.index[where], s.restart[where])
    s.x_adv[where] = torch.clamp(s.x[where] + noise, s.lower[where], s.upper[where])
    s.step[where] = 0


def tally(lines, steps):
    """Ledger lines -> dict of counts: n, n_correct, n_robust, robust_after each step, forwards."""
    correct = [line for line in lines if line["clean"] == line["label"]]
    if lines and "verdicts" in lines[0]:
        after = [sum(line["verdicts"][k] == "1" for line in lines) for k in range(steps + 1)]
        n_robust = after[-1]
    else:
        fell = [line["fell"] for line in correct]
        n_robust = fell.count(None)
        at = [f[1] for f in fell if f and f[0] == 0]  # in the first restart
        after = [len(fell) - sum(step <= k for step in at) for k in range(steps + 1)]
    return {"n": len(lines), "n_correct": len(correct), "n_robust": n_robust, "robust_after": after,
            "forwards": sum(line["forwards"] for line in lines)}


def summed(counts, device):
    """Counts of one process -> counts of all: exact integers, nothing padded, nothing counted twice."""
    flat = torch.tensor([v for c in counts.values() for v in (c if isinstance(c, list) else [c])], device=device)
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat = iter(flat.tolist())
    return {name: [next(flat) for _ in c] if isinstance(c, list) else next(flat) for name, c in counts.items()}


def wilson(k, n, z=1.959964):
    """95% interval of a fraction of which k of n were seen (Wilson 1927)."""
    if n == 0:
        return [0.0, 1.0]
    p, z2 = k / n, z * z / n
    middle, half = p + z2 / 2, z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return [max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))]


# The ledger: a JSON line an image, one file a process

class Ledger:
    """What is decided already, by any number of processes before us, and this process's file to go on in."""

    def __init__(self, folder, name, rank, fresh):
        folder.mkdir(parents=True, exist_ok=True)
        self.report = folder / f"{name}.json"
        if fresh and rank == 0:
            for path in (self.report, *folder.glob(f"{name}.*.jsonl")):
                path.unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()
        self.file = open(folder / f"{name}.{rank}.jsonl", "a+", buffering=1)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another evaluate.py writes {self.file.name}; wait for it, or stop it")
        self.file.seek(0)
        whole = self.file.read().rpartition("\n")[0]
        self.file.truncate(len(whole) + bool(whole))  # a line torn by a kill is dropped
        self.lines = {}
        for path in folder.glob(f"{name}.*.jsonl"):
            for line in path.read_text().split("\n")[:-1]:
                self.add(json.loads(line))

    def add(self, line):
        self.lines.setdefault((line["index"], line.get("attack")), line)

    def write(self, line):
        self.add(line)
        self.file.write(json.dumps(line) + "\n")


# What is measured

def find_run(args):
    """The network and the data: flags first, then the args.json beside the weights -> namespace."""
    folder = Path(args.weights).parent if args.weights else Path(args.out)
    path = folder / "args.json"
    if path.exists():
        run = json.loads(path.read_text())
    elif args.weights is None:
        raise SystemExit(f"no run in {args.out} ({path} is missing); train one with python train.py --data shapes, "
                         "or give --weights FILE --arch ARCH --act ACT --data DATA")
    elif args.arch is None or args.act is None:
        raise SystemExit(f"--weights {args.weights} needs --arch and --act of the network that has these weights")
    else:
        run = {"data": "imagenet"}
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = ("data", "data_dir", "arch", "act", "act_alpha", "bn_eps", "res", "num_classes", "classes", "small_input")
    found = {name: given.get(name, run.get(name)) for name in names}
    if found["data"] != run["data"]:  # other data: its own folder, its own classes
        found.update(data_dir=args.data_dir, res=args.res)
    run = SimpleNamespace(**found, weights=Path(args.weights or folder / "model.pt"))
    run.res = run.res or (MODELS[run.arch].res if run.data == "imagenet" and run.arch in MODELS else 32)
    return run


def open_model(run, device, classes=None):
    """A trained network in eval mode, channels last on a GPU, and a hash of its weights."""
    net = build(run.arch, run.act, run.num_classes or len(classes), run.act_alpha, bn_eps=run.bn_eps or 1e-5,
                small_input=run.data != "imagenet" if run.small_input is None else run.small_input)
    load_weights(net, run.weights)
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return net.to(device, memory_format=layout).eval(), digest.hexdigest()[:12]


def report_lines(r):
    """The report of a JSON object, as a person reads it."""
    def line(name, k):
        low, high = wilson(k, r["n"])
        return f"{name:<9} {100 * k / r['n']:6.2f}%  {k} of {r['n']}, 95% interval {100 * low:.2f} to {100 * high:.2f}"

    attack = f"PGD-{r['steps']}, step {r['step_size']:g}, restarts {r['restarts']}, " + (
        "verdict of the last iterate (SAT's protocol)" if r["last_iterate"] else "verdict of every iterate")
    yield f"{r['weights']}: {r['arch']} {r['act']} on {r['data']} at {r['res']} px"
    yield f"eps {r['eps']:g}/255, {attack}, {r['dtype']}, seed {r['seed']}"
    yield line("clean", r["n_correct"])
    yield line("robust", r["n_robust"])
    marks = [k for k in (0, 1, 2, 5, 10, 20, 50, 100, 200) if k < r["steps"]] + [r["steps"]]
    yield "after     " + "  ".join(f"{k}: {100 * r['robust_after'][k] / r['n']:.2f}%" for k in marks)
    yield f"cost      {r['forwards']} forwards, {duration(r['seconds'])} on {r['processes']} x {r['device']}"
    if r["paper"]:
        clean, robust = ("-" if v is None else f"{v}%" for v in r["paper"])
        yield f"paper     clean {clean}, robust {robust} (PGD-200, eps 4, step 1, last iterate, 50,000 images)"


def main():
    args = get_args()
    run = find_run(args)
    device, rank, world = open_device(args.device)
    eps, step_size, steps = (default if given is None else given for given, default in
                             zip((args.eps, args.step_size, args.steps), ATTACK[run.data]))
    if not (eps >= 0 and step_size >= 0 and steps >= 0 and (steps == 0 or step_size > 0)):
        raise SystemExit(f"--eps {eps:g} --step-size {step_size:g} --steps {steps} attack nothing; eps has to be >= 0, "
                         "and steps need a step size > 0")
    if args.restarts < 1 or (args.last_iterate and args.restarts > 1):
        raise SystemExit(f"--restarts {args.restarts}: at least 1, and with --last-iterate no more than 1")
    if args.limit is not None and args.limit < 1:
        raise SystemExit(f"--limit {args.limit} leaves no image; use 1 or more")

    images = data.load(run.data, run.data_dir, False, run.res, run.classes, device=device)
    net, digest = open_model(run, device, images.classes)
    n_classes = run.num_classes or len(images.classes)
    plain = attacker_view(net)
    exact = in_precision(plain, "fp32", device)
    model = exact
    if args.dtype != "fp32" or args.smooth_backward != "none":
        model = in_precision(attacker_view(net, args.smooth_backward == "attacker"), args.dtype, device)

    # The ledger's name changes with everything that can change a verdict
    identity = data.key(digest, images.fingerprint, run.arch, run.act, run.act_alpha, run.bn_eps, args.smooth_backward,
                        args.dtype, device.type)
    name = (f"pgd-eps{eps:g}-step{step_size:g}-{steps}x{args.restarts}-seed{args.seed}"
            f"{'-last' if args.last_iterate else ''}-{identity:016x}"[:-8])
    ledger = Ledger(Path(args.out) / "eval", name, rank, args.fresh)
    members = data.subset(images.n, args.limit)[rank::world]
    left = torch.tensor([i for i in members.tolist() if (i, None) not in ledger.lines], dtype=torch.long)
    finished = len(members) - len(left)
    if rank == 0 and finished:
        say(f"{finished} of {len(members)} images are decided already ({ledger.file.name}); --fresh starts over")

    listen()
    batch_size = args.batch_size or (100 if device.type == "cpu" else 256 if run.data == "imagenet" else 512)
    workers = loader_processes(args.workers, run.data, world)
    began, n_done = time.time(), 0

    def tick():
        stop_if_asked()
        spent = time.time() - began
        show(f"{finished + n_done}/{len(members)} images | {duration(spent)} | "
             f"eta {duration(spent / n_done * (len(left) - n_done)) if n_done else '?'}")

    queue = pgd_queue(
        model, data.eval_batches(images, left, batch_size, workers, device), batch_size, eps / 255, step_size / 255,
        steps, args.restarts, args.seed, None if model is exact else exact, args.last_iterate,
        128.0 if args.dtype == "fp16" else 1.0, tick)
    try:
        for line in queue:
            ledger.write(line)
            n_done += 1
    except Stopped:
        say(f"stopped at {finished + n_done}/{len(members)} images; the same command goes on")
        raise SystemExit(75)

    counts = summed(tally([ledger.lines[i, None] for i in members.tolist()], steps), device)
    paper = PAPER.get((run.arch, run.act, run.res)) if run.data == "imagenet" and (eps, n_classes) == (4, 1000) else None
    report = {
        "weights": str(run.weights), "hash": digest, "data": run.data, "arch": run.arch, "act": run.act,
        "act_alpha": run.act_alpha, "res": run.res, "attack": "pgd", "eps": eps, "step_size": step_size, "steps": steps,
        "restarts": args.restarts, "last_iterate": args.last_iterate, "smooth_backward": args.smooth_backward,
        "seed": args.seed, "dtype": args.dtype, **counts, "interval": wilson(counts["n_robust"], counts["n"]),
        "seconds": round(time.time() - began, 1), "processes": world, "device": device_name(device), "paper": paper}
    if rank == 0:
        if not len(left) and ledger.report.exists() and not args.limit:
            report = json.loads(ledger.report.read_text())
        ledger.report.write_text(json.dumps(report))
        for text in report_lines(report):
            say(text)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def loader_processes(workers, name, world):
    """--workers, or as many as the cores allow each process; data in memory needs none."""
    if workers is not None:
        return workers
    return 0 if name != "imagenet" else max(1, min(12, len(os.sched_getaffinity(0)) // world - 1))


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
