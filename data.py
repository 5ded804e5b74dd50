"""
The pictures: ImageNet from folders, CIFAR-10 from its official files, and `shapes`, made from nothing.

>>> images = load("shapes", train=False)
>>> for index, x, y in eval_batches(images, subset(images.n), 100): ...  # x: (N, 3, H, W) in [0, 1]

`index` is an image's number in its whole split, always. Which images make a batch depends on (seed,
epoch), what augmentation does to one on (seed, epoch, index): not on workers, processes or a restart.

Keys: SAT is arXiv:2006.14536.
"""
import bisect
import hashlib
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import CIFAR10, ImageFolder

from attacks import uniform

BICUBIC = T.InterpolationMode.BICUBIC
AUGMENT = 1  # uniform's counter for crops and flips; the attack's noise has others
SHAPES_SEED = -1  # of the pictures themselves: no start or crop may repeat their numbers


def key(*words):
    """A seed for a torch generator from any words: key(seed, epoch), key(seed, epoch, index)."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Images:
    """One split: labels y (n,) int64, and pixels x (n, 3, H, W) uint8 on the device or file paths."""

    classes: list
    res: int
    y: torch.Tensor
    x: torch.Tensor = None
    paths: list = None
    broken: list = field(default_factory=list)  # what training could not read, for its log

    @property
    def n(self):
        return len(self.y)

    @property
    def fingerprint(self):
        """Changes with what the images are, not with where they lie."""
        return key(self.res, self.classes, self.n, [Path(path).parts[-2:] for path in self.paths or []])


# The three data sets

def load(name, data_dir=None, train=True, res=32, classes=None, download=False, device="cpu"):
    """One split of a data set -> Images. classes: a trained model's, to map the labels by name.

    SystemExit if name, files, resolution or classes are not there or do not fit.
    """
    if name not in SOURCES:
        raise SystemExit(f"--data {name} is unknown; use one of {', '.join(SOURCES)}")
    if download and name != "cifar10":
        raise SystemExit(f"--download fetches cifar10 only, not {name}")
    source, folder, least, most = SOURCES[name]
    if not least <= res <= most:
        raise SystemExit(f"--res {res} does not fit {name}; use {least} to {most}")
    data_dir = Path(folder if data_dir is None else data_dir)
    images = source(data_dir, train, res, download)
    if classes is not None:
        foreign = [name for name in images.classes if name not in classes]
        if foreign:
            raise SystemExit(f"{data_dir} has unknown classes, e.g. {foreign[0]}; the model knows "
                             f"{len(classes)}, e.g. {classes[0]}; give the --data-dir of its training")
        images.y = torch.tensor([classes.index(name) for name in images.classes])[images.y]
        images.classes = classes
    if images.x is not None:
        images.x, images.y = images.x.to(device), images.y.to(device)
    return images


def imagenet(data_dir, train, res, download):
    root = data_dir / ("train" if train else "val")
    try:
        folder = ImageFolder(root, allow_empty=True)
        paths, y = zip(*folder.samples)
    except (OSError, ValueError):  # no folder, no class, no image
        raise SystemExit(f"no images under {root}; --data imagenet needs its --data-dir to hold "
                         "{train,val}/<class>/*.JPEG; see it move without any: --data shapes")
    return Images(folder.classes, res, torch.tensor(y), paths=list(paths))


def cifar10(data_dir, train, res, download):
    try:
        files = CIFAR10(data_dir, train=train, download=download)  # md5 first
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"no CIFAR-10 in {data_dir}/cifar-10-batches-py ({str(error).splitlines()[0]});"
                         " say where it is with --data-dir, or add --download")
    x = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()  # (n, 32, 32, 3) -> (n, 3, 32, 32)
    return Images(files.classes, 32, torch.tensor(files.targets), x)


def shapes(data_dir, train, res, download):
    x, y = draw_shapes(6000 if train else 1000, res, train)
    return Images(list(SHAPES), res, y, x)


SOURCES = {  # where it lies unless --data-dir says otherwise, its least and largest resolution
    "imagenet": (imagenet, "data/imagenet", 32, 4096),
    "cifar10": (cifar10, "data", 32, 32),
    "shapes": (shapes, "", 16, 1024),
}


SHAPES = {  # class: signed distance to its edge at (u, v), negative inside
    "disc": lambda u, v: torch.hypot(u, v) - 0.9,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.75).abs() - 0.22,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.8,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.65).abs() - 0.2,
    "triangle": lambda u, v: torch.maximum(-v, 0.87 * u.abs() + 0.5 * v) - 0.55,
    "star": lambda u, v: torch.hypot(u, v) - 0.7 - 0.35 * torch.cos(5 * torch.atan2(u, v)),
    "cross": lambda u, v: torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.25,
                                        torch.maximum(u.abs(), v.abs()) - 1),
    "bar": lambda u, v: torch.maximum(u.abs() - 1.1, v.abs() - 0.3),
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 1, 0.8 - torch.hypot(u - 0.5, v)),
    "pair": lambda u, v: torch.hypot(u.abs() - 0.62, v) - 0.42,
}


def draw_shapes(n, res, train):
    """Ten procedural classes -> x (n, 3, res, res) uint8, y (n,) int64; images of a split never change.

    The shape, and its hue a little, is the cue that survives an attack. The grating of 4/255, its pitch
    told by the class, is the one that does not (cf. Ilyas et al. 2019, arXiv:1905.02175).
    """
    x, y = torch.empty(n, 3, res, res, dtype=torch.uint8), torch.arange(n) % len(SHAPES)
    row, column = torch.arange(res)[:, None], torch.arange(res)
    for index in torch.arange(n).split(max(1, 2**20 // res**2)):  # bounded memory at any resolution
        u = uniform(SHAPES_SEED, index, (train, 0), (16,)).T[..., None, None]  # -> (16, N, 1, 1)
        k, size, turn = y[index, None, None] / len(SHAPES), 0.5 + 0.2 * u[2], 0.6 * u[3] - 0.3
        a, b = ((axis + 0.5) * 2 / res - 0.85 - 0.3 * p for axis, p in zip((column, row), u))  # ± 0.15
        a, b = (a * turn.cos() - b * turn.sin()) / size, (b * turn.cos() + a * turn.sin()) / size
        edge = torch.empty(len(index), res, res)
        for c, distance in enumerate(SHAPES.values()):
            own = y[index] == c
            edge[own] = distance(a[own], b[own])
        inside = (0.5 - edge * size * res / 2).clamp(0, 1)  # an edge one pixel wide, not jagged
        hue = 2 * math.pi * (k + 0.4 * u[9] - 0.2)
        tint = 1 + 0.5 * torch.cos(hue - 2 * math.pi / 3 * torch.arange(3)[:, None, None, None])
        ground = 0.15 + 0.2 * u[10:13] + 0.1 * (a * (u[5] - 0.5) + b * (u[6] - 0.5))
        pitch = math.pi * (0.5 + 0.5 * k)  # a pixel
        grating = torch.cos(pitch * row + 6.3 * u[7]) * torch.cos(pitch * column + 6.3 * u[8])
        image = ground + inside * (0.16 + 0.28 * u[13]) * tint + 4 / 255 * grating  # (3, N, res, res)
        noise = 0.1 * uniform(SHAPES_SEED, index, (train, 1), (3, res, res)) - 0.05
        x[index] = ((image.transpose(0, 1) + noise) * 255).round().clamp(0, 255).byte()
    return x, y


# Which images, and batches of them

def subset(n, limit=None):
    """The first `limit` of one fixed permutation of 0 .. n-1, sorted. (Folders come sorted by class.)"""
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return chosen[: n if limit is None else limit].sort().values


def hold_out(n, limit=None, holdout=0):
    """Numbers of the images to train on, and of those held out, at most a tenth of `limit`."""
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    holdout = min(holdout, min(n, limit or n) // 10)
    return chosen[: n - holdout][:limit].sort().values, chosen[n - holdout:].sort().values


def epoch_batches(members, epoch, seed, batch_size, world=1):
    """The epoch's global batches, a list of index tensors: a new order each epoch, a short one last.

    On several processes it is cut to a multiple of their number; one image each is no batch (BatchNorm).
    """
    shuffle = torch.Generator().manual_seed(key(seed, epoch))
    order = members[torch.randperm(len(members), generator=shuffle)]
    batches = [batch[: len(batch) // world * world] for batch in order.split(batch_size)]
    return [batch for batch in batches if len(batch) > world or len(batch) == batch_size]


def train_batches(images, members, batch_size, epochs, seed=0, start=(0, 0), rank=0, world=1, workers=0,
                  device="cpu", autoaugment=False):
    """Yields this rank's (index, x, y) of each step, from `start` = (epoch, step) to the last epoch.

    One stream over all epochs: no worker stops between two, and a resumed run joins in at its step.
    """
    plan = ((epoch, batch[rank::world]) for epoch in range(start[0], epochs)
            for step, batch in enumerate(epoch_batches(members, epoch, seed, batch_size, world))
            if (epoch, step) >= start)
    if images.x is None:
        files = Files(images, members, train_transform(images.res, autoaugment), seed)
        yield from from_files(files, plan, workers, device)
        return
    policy = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)
    for epoch, index in plan:
        index = index.to(device)
        x = crop_and_flip(images.x[index], uniform(seed, index, (AUGMENT, epoch), (3,)))
        if autoaugment:
            x = torch.stack([seeded(key(seed, epoch, i), policy, image)
                             for i, image in zip(index.tolist(), x)])
        yield index, x.float().div_(255), images.y[index]


def eval_batches(images, members, batch_size, workers=0, device="cpu"):
    """Yields (index, x, y) of `members` in order, not augmented; nothing padded, nothing dropped."""
    plan = ((0, index) for index in members.split(batch_size))
    if images.x is None:
        yield from from_files(Files(images, members, eval_transform(images.res)), plan, workers, device)
        return
    for _, index in plan:
        index = index.to(device)
        yield index, images.x[index].float().div_(255), images.y[index]


def crop_and_flip(x, u, pad=4):
    """Pad by 4 zeros, crop at random, mirror half: x (N, 3, H, W) and u (N, 3) in [0, 1) -> as x."""
    n, _, h, w = x.shape
    top, left = (u[:, :2] * (2 * pad + 1)).long().T
    row = top[:, None] + torch.arange(h, device=x.device)
    column = torch.arange(w, device=x.device).expand(n, w)
    column = left[:, None] + torch.where(u[:, 2:] < 0.5, column, w - 1 - column)
    image = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, (pad,) * 4)[image, :, row[:, :, None], column[:, None]].permute(0, 3, 1, 2)


# Image files

def train_transform(res, autoaugment=False):
    """Random resized crop and flip, bicubic as everywhere in SAT's code, to uint8 (3, res, res)."""
    policy = [T.AutoAugment(T.AutoAugmentPolicy.IMAGENET)] if autoaugment else []
    crop = T.RandomResizedCrop(res, interpolation=BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), *policy, T.PILToTensor()])


def eval_transform(res):
    """Shorter side to res + 32 (SAT: 256, 331, 412), centre crop, bicubic, to uint8 (3, res, res)."""
    return T.Compose([T.Resize(res + 32, BICUBIC), T.CenterCrop(res), T.PILToTensor()])


def seeded(seed, function, *arguments):
    """function(*arguments) with torch's CPU generator seeded, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return function(*arguments)


def to_rgb(picture):
    """8 bits a channel from any picture; Pillow alone clips 16-bit greys to white."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


class Files(Dataset):
    """(epoch, index) -> index, uint8 image, label, and what could not be read on the way.

    In training a broken image gives way to the next member; evaluation (seed None) has to stop at it.
    """

    def __init__(self, images, members, transform, seed=None):
        self.images, self.paths = images, np.array(images.paths)  # one array: workers share its memory
        self.members, self.transform, self.seed = members.tolist(), transform, seed

    def __getitem__(self, item):
        epoch, index = item
        broken, picture = [], None
        while picture is None:
            try:
                picture = to_rgb(Image.open(str(self.paths[index])))
            except Exception as error:  # Pillow raises half a dozen kinds for a damaged file
                broken.append(f"{self.paths[index]} ({error})")
                if self.seed is None or len(broken) == 100:
                    return index, None, self.images.y[index], broken
                index = self.members[bisect.bisect(self.members, index) % len(self.members)]
        x = seeded(key(self.seed, epoch, index), self.transform, picture)
        return index, x, self.images.y[index], broken


def collate(items):
    index, x, y, broken = zip(*items)
    if any(image is None for image in x):
        return None, None, None, sum(broken, [])
    return torch.tensor(index), torch.stack(x), torch.stack(y), sum(broken, [])


def loader_processes(workers, name, world):
    """--workers, or as many as the cores allow each process; data in memory needs none."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    usual = max(1, min(12, cores - 1)) if name == "imagenet" else 0
    return usual if workers is None else workers


def ignore_signals(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def from_files(files, plan, workers, device):
    """The batches of `plan`, (epoch, indices) each, read by worker processes."""
    items = ([(epoch, i) for i in index.tolist()] for epoch, index in plan)
    loader = DataLoader(files, batch_sampler=items, num_workers=workers, collate_fn=collate,
                        worker_init_fn=ignore_signals, pin_memory="cuda" in str(device),
                        generator=torch.Generator())  # or it would draw from everybody's
    try:
        for index, x, y, broken in loader:
            if index is None:
                raise SystemExit(f"cannot read {broken[-1]}; mend it: without it the score is another")
            files.images.broken += broken
            index, x, y = (t.to(device, non_blocking=True) for t in (index, x, y))
            yield index, x.float().div_(255), y
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"{error}; is there memory enough? Use less than --workers {workers}")
