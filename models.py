"""
The networks of SAT (arXiv:2006.14536): ResNet, ResNeXt, EfficientNet, any activation at every site.

>>> net = build("resnet50", act="silu")  # images in [0, 1] -> logits; it normalises inside
>>> view = attacker_view(net)            # what the attack differentiates: same storage, frozen weights

Weight names and shapes are torchvision's wherever it has the network: weights travel both ways.
Numerics (precision, TF32, subnormals) are set here too: they can decide whether an image is robust.

Keys: RN is He et al. 2015 (arXiv:1512.03385), EN is Tan & Le 2019 (arXiv:1905.11946).
"""
import contextlib
import copy
import hashlib
import math
import pickle
import re
import zipfile
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from activations import ReLU, make_act

# Differs from SAT: torchvision's mean and deviation for every data set; SAT's pixels run over [-1, 1]
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def conv(inputs, outputs, kernel, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Normalised(nn.Module):
    """A network on images in [0, 1]; mean and std are buffers, but not part of the weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, x):
        return self.classify((x - self.mean) / self.std)

    def initialise_as_sat(self):
        """The first weights of SAT's released code; a network without this method keeps torch's own."""


# ResNet and ResNeXt. act() makes a fresh activation, norm(width) a fresh BatchNorm; BasicBlock takes
# groups and group_width only because Bottleneck does

class BasicBlock(nn.Module):
    """Two 3x3 convolutions (RN Fig. 5, left)."""

    expansion = 1

    def __init__(self, inputs, width, stride, groups, group_width, act, norm):
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = norm(width)
        self.act1 = act()
        self.conv2 = conv(width, width, 3)
        self.bn2 = norm(width)
        self.act2 = act()
        self.downsample = shortcut(inputs, width, stride, norm)

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + skip)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (RN Fig. 5, right), the stride on the 3x3; grouped in ResNeXt."""

    expansion = 4

    def __init__(self, inputs, width, stride, groups, group_width, act, norm):
        super().__init__()
        # group_width is the width of one group where the stage is 64 wide, and grows with the stage
        inner = groups * width * group_width // 64
        outputs = self.expansion * width
        self.conv1 = conv(inputs, inner, 1)
        self.bn1 = norm(inner)
        self.act1 = act()
        self.conv2 = conv(inner, inner, 3, stride, groups)
        self.bn2 = norm(inner)
        self.act2 = act()
        self.conv3 = conv(inner, outputs, 1)
        self.bn3 = norm(outputs)
        self.act3 = act()
        self.downsample = shortcut(inputs, outputs, stride, norm)

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.act3(self.bn3(self.conv3(x)) + skip)


def shortcut(inputs, outputs, stride, norm):
    """None for the identity, or a 1x1 convolution where the shape changes (RN option B)."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))


class ResNet(Normalised):
    """RN Table 1. With `small_input` the stem is 3x3 at stride 1 without max-pool, RN Sec. 4.2."""

    def __init__(self, block, depths, act, norm, num_classes, dropout, stochastic_depth, small_input,
                 width=64, groups=1, group_width=64):
        super().__init__()
        if stochastic_depth:
            raise ValueError("stochastic_depth is for EfficientNets, SAT's ResNets have none; use 0")
        self.conv1 = conv(3, width, 3) if small_input else conv(3, width, 7, 2)
        self.bn1 = norm(width)
        self.act = act()
        # Differs from SAT: padded on both sides, as torchvision's; there as TensorFlow's "same"
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, 2, padding=1)
        self.n_stages = len(depths)
        inputs = width
        for s, depth in enumerate(depths):
            stage_width = width * 2**s
            blocks = []
            for b in range(depth):
                stride = 2 if s > 0 and b == 0 else 1
                blocks.append(block(inputs, stage_width, stride, groups, group_width, act, norm))
                inputs = stage_width * block.expansion
            self.add_module(f"layer{s + 1}", nn.Sequential(*blocks))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, num_classes)

    def initialise_as_sat(self):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
            elif isinstance(m, BasicBlock):
                nn.init.zeros_(m.bn2.weight)  # the residual branch starts at 0
            elif isinstance(m, Bottleneck):
                nn.init.zeros_(m.bn3.weight)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def classify(self, x):
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        for s in range(self.n_stages):
            x = self.get_submodule(f"layer{s + 1}")(x)
        x = x.mean((2, 3))  # (N, C, H, W) -> (N, C)
        return self.fc(self.dropout(x))  # (N, C) -> (N, K)


# EfficientNet

class Stage(NamedTuple):
    """A row of EN Table 1, as it is at B0."""

    expansion: int
    kernel: int
    stride: int
    width: int
    depth: int


STAGES = (
    Stage(expansion=1, kernel=3, stride=1, width=16, depth=1),
    Stage(expansion=6, kernel=3, stride=2, width=24, depth=2),
    Stage(expansion=6, kernel=5, stride=2, width=40, depth=2),
    Stage(expansion=6, kernel=3, stride=2, width=80, depth=3),
    Stage(expansion=6, kernel=5, stride=1, width=112, depth=3),
    Stage(expansion=6, kernel=5, stride=2, width=192, depth=4),
    Stage(expansion=6, kernel=3, stride=1, width=320, depth=1),
)


def round_width(width):
    """To the nearest multiple of 8, but never down by more than a tenth."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


class SqueezeExcitation(nn.Module):
    """A gate in (0, 1) for each channel, computed from the means of all channels over the positions."""

    def __init__(self, width, squeezed, act):
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)  # (N, C, H, W) -> (N, C, 1, 1)
        gate = self.fc2(self.act(self.fc1(mean)))
        return x * torch.sigmoid(gate)


class MBConv(nn.Module):
    """Expand, depthwise convolution, squeeze and excite, project (EN Sec. 4)."""

    def __init__(self, inputs, outputs, expansion, kernel, stride, drop, act, norm):
        super().__init__()
        inner = round_width(inputs * expansion)
        layers = []
        if expansion > 1:
            layers.append(nn.Sequential(conv(inputs, inner, 1), norm(inner), act()))
        depthwise = conv(inner, inner, kernel, stride, groups=inner)
        layers.append(nn.Sequential(depthwise, norm(inner), act()))
        layers.append(SqueezeExcitation(inner, max(1, inputs // 4), act))
        layers.append(nn.Sequential(conv(inner, outputs, 1), norm(outputs)))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs
        self.stochastic_depth = StochasticDepth(drop, "row")

    def forward(self, x):
        if self.residual:
            return x + self.stochastic_depth(self.block(x))
        return self.block(x)


class EfficientNet(Normalised):
    """EN Table 1, scaled in width and depth. Differs from SAT: symmetric padding, as torchvision's."""

    def __init__(self, width, depth, act, norm, num_classes, dropout, stochastic_depth, small_input):
        super().__init__()
        n_blocks = sum(math.ceil(depth * stage.depth) for stage in STAGES)
        inputs = round_width(32 * width)
        stem = conv(3, inputs, 3, stride=1 if small_input else 2)
        features = [nn.Sequential(stem, norm(inputs), act())]
        n_made = 0
        for stage in STAGES:
            outputs = round_width(stage.width * width)
            blocks = []
            for b in range(math.ceil(depth * stage.depth)):
                stride = stage.stride if b == 0 else 1
                drop = stochastic_depth * n_made / n_blocks  # grows linearly from 0 at the first block
                blocks.append(MBConv(inputs, outputs, stage.expansion, stage.kernel, stride, drop,
                                     act, norm))
                inputs = outputs
                n_made += 1
            features.append(nn.Sequential(*blocks))
        head = 4 * inputs
        features.append(nn.Sequential(conv(inputs, head, 1), norm(head), act()))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head, num_classes))

    def initialise_as_sat(self):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] ** 2 * m.out_channels // m.groups
                nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        linear = self.classifier[1]
        bound = linear.out_features**-0.5  # as in EN's code
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(linear.bias)

    def classify(self, x):
        x = self.features(x).mean((2, 3))  # (N, 3, H, W) -> (N, C)
        return self.classifier(x)  # (N, C) -> (N, K)


# Every network by name

class Arch(NamedTuple):
    """How to make a network; and what train.py takes by default: pixels, and its paper's dropout."""

    make: partial
    res: int
    dropout: float = 0.0


def resnet(block, *depths, res=224, **sizes):
    return Arch(partial(ResNet, block, depths, **sizes), res)


def efficientnet(width, depth, res, dropout):
    return Arch(partial(EfficientNet, width, depth), res, dropout)


MODELS = {
    # for CIFAR-10, RN Sec. 4.2, with option B's shortcuts; the 3x3 stem comes with small_input
    "resnet8": resnet(BasicBlock, 1, 1, 1, width=16, res=32),  # 0.08M parameters
    "resnet20": resnet(BasicBlock, 3, 3, 3, width=16, res=32),  # 0.27M
    # for ImageNet: blocks in each stage, RN Table 1
    "resnet18": resnet(BasicBlock, 2, 2, 2, 2),  # 11.7M
    "resnet34": resnet(BasicBlock, 3, 4, 6, 3),  # 21.8M
    "resnet50": resnet(Bottleneck, 3, 4, 6, 3),  # 25.6M
    "resnet101": resnet(Bottleneck, 3, 4, 23, 3),  # 44.5M
    "resnet152": resnet(Bottleneck, 3, 8, 36, 3),  # 60.2M
    "resnext50_32x4d": resnet(Bottleneck, 3, 4, 6, 3, groups=32, group_width=4),  # 25.0M
    "resnext50_32x8d": resnet(Bottleneck, 3, 4, 6, 3, groups=32, group_width=8),  # 48.0M
    "resnext101_32x8d": resnet(Bottleneck, 3, 4, 23, 3, groups=32, group_width=8),  # 88.8M
    "resnext152_32x8d": resnet(Bottleneck, 3, 8, 36, 3, groups=32, group_width=8),  # 122.4M
    # width, depth, resolution, dropout: EN's released code; l1 from SAT's
    "efficientnet_b0": efficientnet(1.0, 1.0, 224, 0.2),  # 5.3M
    "efficientnet_b1": efficientnet(1.0, 1.1, 240, 0.2),  # 7.8M
    "efficientnet_b2": efficientnet(1.1, 1.2, 260, 0.3),  # 9.1M
    "efficientnet_b3": efficientnet(1.2, 1.4, 300, 0.3),  # 12.2M
    "efficientnet_b4": efficientnet(1.4, 1.8, 380, 0.4),  # 19.3M
    "efficientnet_b5": efficientnet(1.6, 2.2, 456, 0.4),  # 30.4M
    "efficientnet_b6": efficientnet(1.8, 2.6, 528, 0.5),  # 43.0M
    "efficientnet_b7": efficientnet(2.0, 3.1, 600, 0.5),  # 66.3M
    "efficientnet_l1": efficientnet(3.9, 3.7, 600, 0.5),  # 272.6M
}


def build(arch, act="relu", num_classes=1000, act_alpha=None, smooth_backward=False, dropout=0.0,
          stochastic_depth=0.0, small_input=False, bn_eps=1e-5, initial="sat", mean=MEAN, std=STD):
    """A fresh network: images (N, 3, H, W) float32 in [0, 1] -> logits (N, num_classes).

    small_input: a 3x3 stem with stride 1, for CIFAR-10. initial: the first weights are the released
    code's ("sat") or torch's own ("torch"). mean and std normalise red, green and blue. BatchNorm's eps,
    1e-5, is SAT's for every network; torchvision's efficientnet_b5, b6 and b7 have 1e-3. ValueError for
    what it cannot build.
    """
    if arch not in MODELS:
        raise ValueError(f"arch {arch} is unknown; use one of {', '.join(MODELS)}")
    if initial not in ("sat", "torch"):
        raise ValueError(f"initial {initial} is unknown; use sat or torch")
    check_normalisation(mean, std)

    fresh_act = partial(make_act, act, act_alpha, smooth_backward)  # called once for every site
    norm = partial(nn.BatchNorm2d, eps=bn_eps)
    net = MODELS[arch].make(act=fresh_act, norm=norm, num_classes=num_classes, dropout=dropout,
                            stochastic_depth=stochastic_depth, small_input=small_input)
    net.mean.copy_(torch.tensor(mean).view(3, 1, 1))
    net.std.copy_(torch.tensor(std).view(3, 1, 1))
    if initial == "sat":  # otherwise every layer stays as torch made it
        net.initialise_as_sat()
    return net


def check_normalisation(mean, std):
    """ValueError unless both are three finite numbers, and std's are positive."""
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} is {numbers}; use three finite numbers, for red, green and blue")
    if min(std) <= 0:
        raise ValueError(f"std is {std}; images are divided by it, so use three positive numbers")


# Two views of one network

def attacker_view(train_net, smooth_backward=False):
    """A second module tree over train_net's storage: eval mode, frozen parameters, its buffers.

    An attack through it computes no weight gradient, even when compiled, and leaves BatchNorm's
    statistics, train mode and DDP alone. smooth_backward replaces the network's own setting in this
    view, on or off: row "attacker" of SAT Table 1. Make it once the network is on its device; then move
    neither network nor view.
    """
    # deepcopy copies only what is not in its memo: new modules over shared tensors
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in train_net.parameters()}
    shared |= {id(b): b for b in train_net.buffers()}
    view = copy.deepcopy(train_net, shared).eval()

    relus = [module for module in view.modules() if isinstance(module, ReLU)]
    if smooth_backward and not relus:
        raise ValueError("smooth_backward is for ReLU, and this network has none; build it with relu")
    for relu in relus:
        relu.smooth_backward = smooth_backward
    return view


# How a network runs

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def on_device(net, device):
    """net, moved to a device; on a GPU in the layout in which convolutions are fastest."""
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
    return net.to(device, memory_format=layout)


def set_numerics(dtype):
    """Once, before anything is computed: TF32 only where asked for, subnormal numbers are 0.

    The tail of a smooth curve produces subnormal numbers, on which a CPU is many times slower. New
    threads inherit the setting from this one; threads that torch has already started keep their own.
    Backward passes run outside of `precision`, so TF32 has to be off globally too.
    """
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"


@contextlib.contextmanager
def precision(dtype, device):
    """What runs inside runs in fp32 (TF32 off), tf32, or under bf16 or fp16 autocast.

    An evaluation that searches in TF32 confirms in float32, so the global switch is not enough.
    """
    # Not torch's newer names for these switches: the compiler reads the old ones
    matmul_before = torch.backends.cuda.matmul.allow_tf32
    cudnn_before = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        with torch.autocast(device.type, AUTOCAST.get(dtype), enabled=dtype in AUTOCAST):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul_before
        torch.backends.cudnn.allow_tf32 = cudnn_before


def in_precision(net, dtype, device):
    """net as a plain callable that runs in `dtype` wherever it is called."""
    def model(x):
        with precision(dtype, device):
            return net(x)
    return model


# Where weights come from

# What an average is called where it lies beside the raw weights
AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|average|averaged)([._]|$)")
# What a normalisation in front of a network calls its buffers
NORMALISATION = {"mean": "mean", "mu": "mean", "new_mean": "mean",
                 "std": "std", "sigma": "std", "new_std": "std"}


def load_file(path):
    """A file of tensors and plain Python, on the CPU. ValueError if it is missing or anything else."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no file {path}; train first, or give the path of a file that exists")
    except Exception as error:  # a dozen kinds, depending on where the damage is
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise ValueError(
                f"{path} holds {forbidden[1]} beside its weights, and reading that can run code; if you "
                "trust the file, write its weights alone into another, here those under 'state_dict': "
                f"python -c \"import torch; torch.save(torch.load({str(path)!r}, weights_only=False)"
                "['state_dict'], 'weights.pt')\"")
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, (KeyError, pickle.UnpicklingError)):  # their text helps nobody
            reason = "torch cannot read it"
        raise ValueError(f"{path} is damaged or not a file of weights ({reason}); give another file")


def flatten(content, prefix=""):
    """Dicts in dicts -> {dotted name: tensor}; of all else only a normalisation's lists are kept."""
    tensors = {}
    for name, value in content.items():
        whole_name = f"{prefix}{name}"
        if isinstance(value, dict):
            tensors |= flatten(value, f"{whole_name}.")
        elif torch.is_tensor(value):
            tensors[whole_name] = value
        elif name in NORMALISATION and isinstance(value, (list, tuple)):
            if all(isinstance(number, float) for number in value):
                tensors[whole_name] = torch.tensor(value)
    return tensors


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def below(prefix, tensors, wanted):
    """The tensors under a prefix, by their names without it.

    Weights that `wanted` lacks stay in, for the caller to refuse or to report; other tools' counters go:
    integers such as n_averaged, and a profiler's floats of shape (1,), such as total_ops.
    """
    found = {}
    for whole_name, tensor in tensors.items():
        name = whole_name.removeprefix(prefix)
        is_weight = tensor.is_floating_point() and tensor.shape != (1,)
        if whole_name.startswith(prefix) and (name in wanted or is_weight):
            found[name] = tensor
    return found


def best_prefixes(tensors, wanted):
    """The prefixes, such as "state_dict.module.", under which most of `wanted` is found, shapes too."""
    first_name = next(iter(wanted))
    wanted_shapes = shapes_of(wanted)
    n_fitting = {"": 0}
    for whole_name in tensors:
        if whole_name.endswith(first_name):
            prefix = whole_name.removesuffix(first_name)
            found = below(prefix, tensors, wanted)
            fitting = shapes_of(found).items() & wanted_shapes.items()
            n_fitting[prefix] = sum(shape != () for _, shape in fitting)  # a counter fits any network
    most = max(n_fitting.values())
    if most == 0:
        return [""]  # the caller refuses what is there
    return [prefix for prefix in n_fitting if n_fitting[prefix] == most]


def read_state_dict(path, wanted):
    """What a file holds for a network whose state dict is `wanted` -> {name: tensor}, sentence.

    The weights are where most of `wanted` fits, whatever keys and prefixes come before their names. An
    average is preferred to the raw weights beside it. A normalisation is returned as "mean" and "std",
    (3, 1, 1). The sentence says what was taken; it is "" for a plain state dict. ValueError if the file
    holds no weights, several sets that fit equally well and differ, or a weight that is not finite.
    """
    content = load_file(path)
    if not isinstance(content, dict):
        content = {}  # is refused below
    tensors = {}
    normalisation = {}
    for name, tensor in flatten(content).items():
        last_word = name.rpartition(".")[2].strip("_")
        if last_word in NORMALISATION and tensor.numel() == 3:
            kind = NORMALISATION[last_word]
            value = tensor.float().view(3, 1, 1)
            if kind in normalisation and not normalisation[kind].equal(value):
                raise ValueError(f"{path} holds several normalisations, e.g. {name}; save the weights "
                                 "and the one to use in a file of their own")
            normalisation[kind] = value
        else:
            tensors[name] = tensor
    if not tensors:
        raise ValueError(f"{path} holds no state dict; give a file of named weights, such as a model.pt")

    prefixes = best_prefixes(tensors, wanted)
    averages = [prefix for prefix in prefixes if AVERAGE.search(prefix)]
    candidates = averages or prefixes
    prefix = candidates[0]
    found = below(prefix, tensors, wanted)
    for other in candidates[1:]:
        for name, tensor in below(other, tensors, wanted).items():
            if name not in found or not found[name].float().equal(tensor.float()):
                raise ValueError(f"{path} holds several networks that fit, {prefix[:-1]} and "
                                 f"{other[:-1]}; save the one to use in a file of its own")
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite; give weights from before training diverged")

    said = []
    if prefix:
        said.append(f"weights taken from {prefix[:-1]}")
    if candidates != prefixes:
        said.append("an average that lies beside the raw ones")
    for name, values in normalisation.items():
        numbers = [f"{value:g}" for value in values.flatten()]
        said.append(f"{name} {' '.join(numbers)}")
    sentence = f"{path}: {', '.join(said)}" if said else ""
    return found | normalisation, sentence


def load_weights(net, path):
    """Load what `read_state_dict` finds, its normalisation too -> its sentence.

    ValueError unless every tensor fits; only counters, on which no verdict depends, may be missing.
    """
    wanted = net.state_dict()
    found, sentence = read_state_dict(path, wanted)
    mean = found.pop("mean", net.mean)
    std = found.pop("std", net.std)
    check_normalisation(mean.flatten().tolist(), std.flatten().tolist())
    for name, tensor in wanted.items():
        if not tensor.is_floating_point():  # a counter: one that the file lacks stays as it is
            found.setdefault(name, tensor)

    in_net = shapes_of(wanted)
    in_file = shapes_of(found)
    differ = []
    for name in sorted(in_net | in_file):
        if in_net.get(name) != in_file.get(name):
            differ.append(name)
    last = list(wanted)[-1]  # the bias of the last layer
    if len(differ) == 2 and last in differ and last in found:
        n_file = len(found[last])
        n_net = len(wanted[last])
        raise ValueError(f"{path} has {n_file} classes and the data {n_net}; use data with its {n_file} "
                         f"classes, or train on the {n_net}, starting from this file")
    if differ:
        name = differ[0]
        raise ValueError(
            f"{path} does not fit this network: {len(differ)} of its tensors differ, e.g. {name}, "
            f"{in_file.get(name, 'absent')} in the file and {in_net.get(name, 'absent')} in the "
            "network; name the network, the curve and the data that it was trained with")
    net.load_state_dict(found)
    net.mean.copy_(mean)
    net.std.copy_(std)
    return sentence


def weights_hash(state):
    """A hex digest of all weights and buffers of a state dict, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
