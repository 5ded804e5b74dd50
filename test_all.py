"""
What this project claims, in the order of its files.

$ python test_all.py  # a few minutes on two cores, no network, no data; or a part of it:
$ python -m unittest test_all.TestModels

"The paper", Sec., Table and Fig. are those of Smooth Adversarial Training (SAT), arXiv:2006.14536.
"""
import argparse
import contextlib
import errno
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from functools import cache, partial, wraps
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.error import URLError

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import data
import evaluate
import models
import sanity
import train
from activations import ACTIVATIONS, ReLU, SmoothReLU, make_act
from attacks import (SQUARE, STANDARD, apgd, autoattack, ball, cross_entropy, fab, input_gradient,
                     logit_of, masked_gradients, pgd, pgd_search, random_start, search_gradient,
                     square, targeted_dlr, to_hyperplane, uniform)
from models import (MODELS, attacker_view, build, in_precision, load_file, load_weights, on_device,
                    precision, set_numerics, weights_hash)

ROOT = Path(__file__).resolve().parent
MODULES = ("activations", "models", "attacks", "data", "train", "evaluate", "sanity")

# The claims are about the CPU, whatever the machine has; `python test_all.py gpu` is about its GPU
ON_GPU = "gpu" in sys.argv[1:]
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# One thread, here and in every process that a test starts: bits are compared between processes
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


# Helpers that several parts use

def assert_sentence(test, text, words):
    """A script or an error ends with one sentence, in which the pattern `words` is found."""
    test.assertRegex(str(text), rf"\A.*(?:{words}).*\Z")  # "." matches no newline: one line
    test.assertGreater(len(str(text).split()), 5)


def refuses(test, error, words, function, *args, **kwargs):
    """`function` must stop with one sentence in which the pattern `words` is found."""
    with test.assertRaises(error) as caught:
        function(*args, **kwargs)
    assert_sentence(test, caught.exception, words)


def quietly(main, *flags):
    """Run a script's main as its command line would -> what it printed, its exit code or sentence."""
    text = io.StringIO()
    argv = ["script.py", *map(str, flags)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(text):
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():  # train.main sets its own
                signal.signal(number, handler)
    return text.getvalue(), code


def randomize_norms(net):
    """Random BatchNorm statistics and gammas, since zero gammas would hide what a branch computes."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def small(arch="resnet8", **kwargs):
    """A network for ten classes of small images, the same at every call."""
    torch.manual_seed(0)
    net = build(arch, num_classes=10, small_input=True, **kwargs)
    return randomize_norms(net)


def traces(net, *others):
    """All that an attack could leave behind, to compare before and after.

    Weights and buffers, modes, gradients, other tensors that are given, the state of torch's generator.
    """
    tensors = (*net.state_dict().values(), *others, torch.get_rng_state())
    bits = [tensor.numpy().tobytes() for tensor in tensors]
    modes = [module.training for module in net.modules()]
    gradients = [(p.grad, p.requires_grad) for p in net.parameters()]
    return bits, modes, gradients


class TensorCase(unittest.TestCase):
    """What tests claim about tensors."""

    def assert_same(self, tensor, expected, name=None):
        """They are equal to the bit."""
        self.assertTrue(torch.equal(tensor, expected), (name, tensor, expected))

    def assert_differ(self, tensor, other):
        self.assertFalse(torch.equal(tensor, other), tensor)

    def assert_close(self, tensor, expected, delta):
        """No entry is further than delta from what is expected, which may be in float64."""
        error = (tensor - expected).abs().max()
        self.assertLess(error, delta)

    def assert_inside(self, x_adv, x, eps):
        """In the box, and in the ball without any tolerance; NaN is in neither."""
        distance = (x_adv.double() - x.double()).abs().max()
        self.assertLessEqual(distance, eps)
        self.assertGreaterEqual(x_adv.min(), 0)
        self.assertLessEqual(x_adv.max(), 1)

    def assert_same_weights(self, weights, expected):
        self.assertEqual(list(weights), list(expected))
        for name, tensor in expected.items():
            self.assert_same(weights[name], tensor, name)


class TemporaryFolder(TensorCase):
    """self.root: a new folder for each test, with a space and an accent in its name."""

    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="out put é")))


# A run of a second or two: 3 epochs of 25 steps
TINY = ("--data shapes --res 16 --limit 400 --holdout 40 --epochs 3 --batch-size 16 --val-every 2 "
        "--log-every 1 --eps 2 --step-size 2 --act relu --smooth-backward both --dropout 0.1 "
        "--ema").split()


@cache
def finished_run(*flags):
    """The folder of a run with these flags, made once: read it or copy it, but leave it as it is."""
    folder = tempfile.mkdtemp(prefix="out put é")
    unittest.addModuleCleanup(shutil.rmtree, folder)
    text, code = quietly(train.main, *flags, "--out", folder + "/whole")
    assert code is None and "held-out clean" in text, (code, text)
    return Path(folder, "whole")


def a_run():
    return finished_run(*TINY)


def net_of_a_run():
    """The network that a_run() has kept, read without the scripts."""
    net = build("resnet8", num_classes=10, small_input=True).eval()
    load_weights(net, a_run() / "model.pt")
    return net


class RunCase(TemporaryFolder):
    """self.out: the folder of a run, which does not exist until the test makes it."""

    def setUp(self):
        super().setUp()
        self.out = self.root / "run"

    def copy_of_a_run(self):
        shutil.copytree(a_run(), self.out)


def log_of(folder, kind):
    """The lines of one kind in a run's log.jsonl, in order."""
    lines = []
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == kind:
            lines.append(line)
    return lines


def json_file(path, content):
    """Write `content` as JSON -> path."""
    Path(path).write_text(json.dumps(content))
    return path


def files_below(root):
    """{relative name: bytes} of all files anywhere below a folder."""
    found = {}
    for file in root.rglob("*"):
        if file.is_file():
            found[str(file.relative_to(root))] = file.read_bytes()
    return found


def gradient_picture(width=48, height=40):
    """A smooth RGB picture; up to 255 pixels a side, every pixel has a colour of its own."""
    row, column = np.mgrid[:height, :width]
    red = 255 * column // width
    green = 255 * row // height
    return Image.fromarray(np.stack([red, green, 255 - red], 2).astype(np.uint8))


def image_folder(root, classes=("cat", "dog", "owl"), split="train", n=5):
    """root/split/<class>/<class>0.JPEG ..., n pictures a class, as --data imagenet takes it -> root."""
    for name in classes:
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(n):
            gradient_picture(48 + i).save(folder / f"{name}{i}.JPEG")
    return root


@contextlib.contextmanager
def before_step(epoch, step, action):
    """While it lasts, train.main calls `action` before the update of one step (both count from 0).

    What the action returns, if anything, is that step's learning rate.
    """
    lr_at = train.lr_at

    def with_action(args, current_epoch, current_step, n_steps):
        lr = lr_at(args, current_epoch, current_step, n_steps)
        if (current_epoch, current_step) == (epoch, step):
            changed = action()
            return lr if changed is None else changed
        return lr

    with mock.patch("train.lr_at", with_action):
        yield


def terminate():
    """What `kill`, or a cluster that wants its machine back, does to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def overflowing_scaler(scale):
    """While it lasts, float16's gradients are scaled by so much that the first steps overflow."""
    def too_large(device, enabled):
        return scaler(device, init_scale=scale, enabled=enabled)

    scaler = torch.amp.GradScaler
    return mock.patch("torch.amp.GradScaler", too_large)


def kill_in_training(test, out, n_steps, *command):
    """Start a training into the folder `out`, and kill it when its log has n_steps steps."""
    with subprocess.Popen([*command, "--save-every", "0.002"], stdout=subprocess.DEVNULL) as process:
        while not (out / "last.pt").exists() or len(log_of(out, "step")) < n_steps:
            test.assertIsNone(process.poll())
            time.sleep(0.005)
        process.kill()


def fill_the_disk(test, n_bytes):
    """No file of this process can grow above n_bytes, until the test ends or calls what is returned."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    _, hard_limit = limits
    make_room = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
    test.addCleanup(make_room)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard_limit))
    return make_room


@contextlib.contextmanager
def locked_by_another_process(path):
    """While it lasts, another process holds the lock on a file."""
    program = ("import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
               "print('locked', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.stdin.close()


@contextlib.contextmanager
def imported_from(folder):
    """Inside, the project's modules are those of another folder."""
    originals = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(originals)


# activations

def softplus(x):
    """log(1 + exp(x)) where exp(x) overflows too."""
    return torch.logaddexp(torch.zeros_like(x), x)


def closed_form(name, x, alpha):
    """The paper's formula of a curve, in the precision of x."""
    positive = x.relu()  # its slope at 0 is 0, as ReLU's
    negative = x - positive
    if name == "relu":
        return positive
    if name == "softplus":
        return softplus(x)
    if name == "softplus_centred":
        return softplus(x) - math.log(2)
    if name == "psoftplus":
        return softplus(alpha * x) / alpha
    if name == "silu":
        return x * torch.exp(-softplus(-x))
    if name == "gelu":
        return x * torch.erfc(-x / 2**0.5) / 2
    if name == "gelu_tanh":  # x (1 + tanh z) / 2, where (1 + tanh z) / 2 = sigmoid(2 z) loses no digits
        z = (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)
        return x * torch.exp(-softplus(-2 * z))
    if name == "elu":
        return torch.where(x > 0, x, alpha * torch.expm1(negative))
    if name == "celu":
        return torch.where(x > 0, x, alpha * torch.expm1(negative / alpha))
    if name == "smoothrelu":
        return positive - torch.log1p(alpha * positive) / alpha
    if name == "mish":
        return x * torch.tanh(softplus(x))
    raise AssertionError(f"no formula for {name}")


# Every curve with the alpha of the paper, then other alphas; None: the curve has none
CURVES = [
    ("relu", None), ("softplus", None), ("softplus_centred", None), ("psoftplus", 10.0),
    ("silu", None), ("gelu", None), ("gelu_tanh", None), ("elu", 1.0), ("celu", 1.0),
    ("smoothrelu", 400.0), ("mish", None),
    ("psoftplus", 2.5), ("elu", 0.5), ("elu", 2.0), ("celu", 0.5), ("celu", 3.0), ("smoothrelu", 1.7),
]


def with_slope(function, x):
    """A function's values and slopes at x -> two tensors, float64. It must keep x and its dtype."""
    x_before = x.clone()
    x = x.clone().requires_grad_()
    value = function(x)
    slope, = torch.autograd.grad(value.sum(), x)
    assert value.dtype == slope.dtype == x.dtype
    assert torch.equal(x, x_before), "the activation works in place"
    return value.detach().double(), slope.double()


class TestActivations(TensorCase):
    """Each curve against its formula in float64, and what the optimizer and the attacker see of it."""

    def assert_closed_form(self, name, alpha, act, x, tolerance):
        """Values and slopes of `act` at x are those of the formula at x, in float64."""
        if name == "smoothrelu":
            alpha = act.alpha.item()  # beta**2 + 0.001, so that it stays positive
        if name == "gelu_tanh":
            tolerance = 2 * tolerance  # torch's own slope: 1 - tanh² cancels

        def formula(x):
            return closed_form(name, x, alpha)

        value, slope = with_slope(act, x)
        exact_value, exact_slope = with_slope(formula, x.double())
        value_error = (value - exact_value).abs() / (1 + exact_value.abs())
        slope_error = (slope - exact_slope).abs() / (1 + exact_slope.abs())
        self.assertLess(value_error.max(), tolerance)
        self.assertLess(slope_error.max(), tolerance)

    def test_the_alphas_are_the_papers_by_default(self):
        for name, alpha in CURVES[:len(ACTIVATIONS)]:
            with self.subTest(name):
                x = torch.linspace(-3, 3, 100)
                self.assert_same(make_act(name)(x), make_act(name, alpha)(x))

    def test_values_and_slopes_are_the_closed_forms(self):
        x = torch.cat([torch.linspace(-30, 30, 6000), torch.linspace(-0.1, 0.1, 2000)])
        for dtype, tolerance in ((torch.float64, 3e-9), (torch.float32, 1e-6)):
            for name, alpha in CURVES:
                with self.subTest(name, alpha=alpha, dtype=dtype):
                    act = make_act(name, alpha).to(dtype)
                    self.assert_closed_form(name, alpha, act, x.to(dtype), tolerance)

    def test_values_and_slopes_are_the_closed_forms_in_16_bits_also_far_out(self):
        x = torch.tensor([-1e3, -200.0, -1.0, 0.0, 1.0, 200.0, 1e3])
        for dtype in (torch.bfloat16, torch.float16):
            for weight_dtype in (dtype, torch.float32):  # under autocast alpha stays float32
                for name, alpha in CURVES:
                    with self.subTest(name, alpha=alpha, dtype=dtype, weight_dtype=weight_dtype):
                        act = make_act(name, alpha).to(weight_dtype)
                        self.assert_closed_form(name, alpha, act, x.to(dtype), tolerance=0.01)

    def test_smoothrelus_gradients_in_x_and_beta_are_finite_differences(self):
        act = SmoothReLU(9.0).double()  # its parameter is beta: alpha = beta**2 + 0.001
        x = torch.tensor([-2, -0.1, 0.05, 0.3, 1, 7], dtype=torch.float64, requires_grad=True)

        def value_of(x, beta):
            return torch.func.functional_call(act, {"beta": beta}, x)

        self.assertTrue(torch.autograd.gradcheck(value_of, (x, act.beta)))

    def test_smoothrelus_alpha_stays_positive_and_its_gradient_finite(self):
        for beta in (20.0, 0.0, -5.0):
            with self.subTest(beta=beta):
                act = SmoothReLU()
                act.beta.data.fill_(beta)
                act(torch.tensor([-1e3, 0.0, 1e-3, 30.0])).sum().backward()
                self.assertGreater(act.alpha.item(), 0)
                self.assertTrue(act.beta.grad.isfinite())

    def test_smooth_backward_keeps_relus_values_to_the_bit_and_sends_back_a_sigmoid(self):
        edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, -1e-40, 6e4])
        for dtype, bits in ((torch.float32, torch.int32), (torch.float16, torch.int16)):
            with self.subTest(dtype=dtype):
                x = torch.cat([torch.linspace(-30, 30, 4001), edges]).to(dtype).requires_grad_()
                value = make_act("relu", smooth_backward=True)(x)
                self.assert_same(value.detach().view(bits), F.relu(x.detach()).view(bits))
                value.backward(torch.full_like(x, 3))
                self.assert_same(x.grad, 3 * torch.sigmoid(10 * x))

    def test_our_own_activations_keep_one_tensor_of_the_inputs_size_for_the_way_back(self):
        for name, smooth_backward in (("relu", True), ("smoothrelu", False)):
            kept = []

            def keep(tensor):
                kept.append(tensor)
                return tensor

            with self.subTest(name):
                act = make_act(name, smooth_backward=smooth_backward)
                x = torch.rand(100, dtype=torch.float16, requires_grad=True)
                with torch.autograd.graph.saved_tensors_hooks(keep, torch.clone):
                    act(x)
                dtypes = [tensor.dtype for tensor in kept if tensor.numel() > 1]  # not alpha
                self.assertEqual(dtypes, [torch.float16])

    def test_the_compiled_gradient_is_the_eager_one_for_every_curve(self):
        self.addCleanup(torch._dynamo.reset)
        curves = [(name, False) for name in ACTIVATIONS] + [("relu", True)]
        for name, smooth_backward in curves:
            with self.subTest(name, smooth_backward=smooth_backward):
                torch._dynamo.reset()
                act = make_act(name, smooth_backward=smooth_backward)
                x = torch.linspace(-3, 3, 100, requires_grad=True)
                wanted = (x, *act.parameters())  # the image, and SmoothReLU's alpha
                compiled = torch.compile(act, backend="aot_eager", fullgraph=True)
                eager_grads = torch.autograd.grad(act(x).sum(), wanted)
                compiled_grads = torch.autograd.grad(compiled(x).sum(), wanted)
                self.assertGreater(eager_grads[0].abs().max(), 0.9)
                torch.testing.assert_close(compiled_grads, eager_grads)

    def test_wrong_activations_are_refused(self):
        for words, arguments in (("swish.*silu", dict(name="swish")),
                                 ("silu has no alpha", dict(name="silu", alpha=2.0)),
                                 ("relu", dict(name="elu", smooth_backward=True)),
                                 ("0 is not positive", dict(name="elu", alpha=0.0)),
                                 ("-1 is not positive", dict(name="elu", alpha=-1.0)),
                                 ("nan is not positive", dict(name="elu", alpha=math.nan)),
                                 ("inf is not positive", dict(name="elu", alpha=math.inf))):
            with self.subTest(words):
                refuses(self, ValueError, words, make_act, **arguments)


# models

class TestModels(TensorCase):
    """The networks against torchvision's, and against the published sizes."""

    torchvisions = sorted(set(MODELS) & set(torchvision.models.list_models()))

    def test_keys_and_shapes_are_torchvisions(self):
        self.assertEqual(len(self.torchvisions), 5 + 2 + 8)  # ResNets, ResNeXts, EfficientNets
        for arch in self.torchvisions:
            with self.subTest(arch):
                with torch.device("meta"):
                    own = build(arch).state_dict()
                    published = torchvision.models.get_model(arch).state_dict()
                self.assertEqual(list(own), list(published))
                for name, tensor in published.items():
                    self.assertEqual(own[name].shape, tensor.shape, name)

    def test_logits_are_torchvisions_with_the_same_weights(self):
        torch.manual_seed(0)
        x = torch.rand(2, 3, 64, 64)
        x[1] *= 0.1  # two images that no network takes for the same
        x_normalised = torchvision.transforms.functional.normalize(x, (0.485, 0.456, 0.406),
                                                                   (0.229, 0.224, 0.225))
        for arch, act in (("resnet18", "relu"), ("resnet50", "relu"), ("resnext50_32x4d", "relu"),
                          ("efficientnet_b0", "silu"), ("efficientnet_b1", "silu")):
            with self.subTest(arch):
                net = randomize_norms(build(arch, act)).eval()
                with torch.device("meta"):
                    published = torchvision.models.get_model(arch).eval()
                published.load_state_dict(net.state_dict(), strict=True, assign=True)
                with torch.no_grad():
                    logits = net(x)
                    expected = published(x_normalised)
                scale = expected.abs().max()
                self.assertGreater((expected[0] - expected[1]).abs().max(), 1e-3 * scale)  # it sees x
                self.assert_close(logits, expected, delta=1e-5 * scale)

    def test_networks_that_torchvision_lacks_have_the_published_number_of_parameters(self):
        for arch, num_classes, millions, room in (
                ("resnet8", 10, 0.08, 0.005), ("resnet20", 10, 0.27, 0.005),
                ("resnext50_32x8d", 1000, 48.0, 0.05), ("resnext152_32x8d", 1000, 122.4, 0.05),
                ("efficientnet_l1", 1000, 272.6, 0.05)):
            with self.subTest(arch), torch.device("meta"):
                net = build(arch, num_classes=num_classes)
                n_parameters = sum(p.numel() for p in net.parameters())
                self.assertAlmostEqual(n_parameters / 1e6, millions, delta=room)

    def test_every_site_has_an_activation_of_its_own_that_is_used(self):
        for arch, n_sites in (("resnet8", 7), ("resnet50", 49), ("efficientnet_b0", 49)):
            with self.subTest(arch):
                net = build(arch, "smoothrelu")  # one learnable alpha a site
                net(torch.rand(2, 3, 32, 32)).sum().backward()
                alphas = [p for name, p in net.named_parameters() if name.endswith(".beta")]
                self.assertEqual(len(alphas), n_sites)
                self.assertFalse([p for p in net.parameters() if p.grad is None])

    def test_eps_reaches_every_norm(self):
        net = small(bn_eps=1e-3)
        found = {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
        self.assertEqual(found, {1e-3})

    def test_the_first_weights_have_the_deviation_of_the_released_code_or_of_torch(self):
        layers = {  # name: deviation in the released code; inputs of one output, which are torch's rule
            "resnet50": {
                "conv1": ((2 / (64 * 49)) ** 0.5, 3 * 49),  # He-normal, fan-out
                "layer1.0.conv2": ((2 / (64 * 9)) ** 0.5, 64 * 9),
                "layer2.0.downsample.0": ((2 / 512) ** 0.5, 256),
                "fc": (0.01, 2048)},
            "efficientnet_b0": {
                "features.0.0": ((2 / (32 * 9)) ** 0.5, 3 * 9),
                "features.2.0.block.0.0": ((2 / 96) ** 0.5, 16),
                "features.2.0.block.1.0": ((2 / 9) ** 0.5, 9),  # depthwise
                "features.5.0.block.2.fc1": ((2 / 20) ** 0.5, 480),
                "classifier.1": ((1 / 3000) ** 0.5, 1280)}}  # uniform up to 1000**-0.5
        torch.manual_seed(0)
        for arch in layers:
            as_sat = build(arch)
            as_torch = build(arch, initial="torch")
            for name, (deviation, n_inputs) in layers[arch].items():
                with self.subTest(arch, layer=name):
                    of_sat = as_sat.get_submodule(name).weight.std().item()
                    of_torch = as_torch.get_submodule(name).weight.std().item()
                    self.assertAlmostEqual(of_sat / deviation, 1, delta=0.05)
                    self.assertAlmostEqual(of_torch / (3 * n_inputs) ** -0.5, 1, delta=0.05)

    def test_the_released_code_starts_at_0_what_torch_starts_otherwise(self):
        for arch, last_norm in (("resnet8", "bn2"), ("resnet50", "bn3"), ("efficientnet_b0", None)):
            for initial in ("sat", "torch"):
                net = build(arch, initial=initial)
                for name, module in net.named_modules():
                    own_name = name.rpartition(".")[2]
                    with self.subTest(arch, initial=initial, layer=name):
                        if isinstance(module, nn.BatchNorm2d):  # the last of a residual block
                            gamma = 0 if own_name == last_norm and initial == "sat" else 1
                            self.assertTrue((module.weight == gamma).all())
                        elif getattr(module, "bias", None) is not None:
                            self.assertEqual(module.bias.any().item(), initial == "torch")

    def test_the_first_weights_are_the_same_whatever_the_activation(self):
        for act, initial in itertools.product(ACTIVATIONS, ("sat", "torch")):
            with self.subTest(act, initial=initial):
                weights = small(act=act, initial=initial).state_dict()
                for name, weight in small(initial=initial).state_dict().items():
                    self.assert_same(weights[name], weight, name)

    def test_wrong_networks_are_refused(self):
        for words, function, arguments in (
                ("resnet51.*resnet50", build, dict(arch="resnet51")),
                ("EfficientNet", build, dict(arch="resnet8", stochastic_depth=0.2)),
                ("he.*sat or torch", build, dict(arch="resnet8", initial="he")),
                ("mean.*three", build, dict(arch="resnet8", mean=(0.5, 0.5))),
                ("std.*three", build, dict(arch="resnet8", std=(1.0, 1.0, math.nan))),
                ("std.*positive", build, dict(arch="resnet8", std=(1.0, 0.0, 1.0))),
                ("ReLU", attacker_view, dict(train_net=small(act="silu"), smooth_backward=True))):
            with self.subTest(words):
                refuses(self, ValueError, words, function, **arguments)


class WithLayerNorm(nn.Module):
    """A network as a fork may bring: LayerNorm, one weight used twice, a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor(0.5))
        self.stem = nn.Conv2d(3, 10, 4, stride=4)
        self.norm = nn.LayerNorm(10)
        self.mix = nn.Linear(10, 10)
        self.mix_again = self.mix

    def forward(self, x):
        features = self.stem(x - self.shift).mean((2, 3))  # (N, 3, H, W) -> (N, C)
        return self.mix_again(self.mix(self.norm(features)).tanh())


class TestView(TensorCase):
    """The attacker's view: a second module that shares the network's tensors."""

    def setUp(self):
        torch.manual_seed(0)
        self.x = torch.rand(8, 3, 32, 32)
        self.y = torch.arange(8)

    def test_the_view_is_the_network_also_after_its_weights_moved(self):
        for name, net in (("resnet8", small()),
                          ("efficientnet_b0", small("efficientnet_b0", act="smoothrelu")),
                          ("LayerNorm", WithLayerNorm())):
            with self.subTest(name):
                view = attacker_view(net)
                self.assertFalse(any(p.requires_grad for p in view.parameters()))
                before = view(self.x)
                F.cross_entropy(net.train()(self.x), self.y).backward()
                torch.optim.SGD(net.parameters(), 0.1).step()
                self.assert_same(view(self.x), net.eval()(self.x))
                self.assert_differ(view(self.x), before)

    def test_dropout_and_stochastic_depth_are_off_in_the_view(self):
        for arch, rates in (("resnet8", dict(dropout=0.5)), ("efficientnet_b0", dict(dropout=0.5)),
                            ("efficientnet_b0", dict(stochastic_depth=0.5))):
            with self.subTest(arch, **rates):
                net = small(arch, **rates).train()
                view = attacker_view(net)
                self.assert_differ(net(self.x), net(self.x))
                self.assert_same(view(self.x), net.eval()(self.x))


class TestNumerics(TensorCase):
    def setUp(self):
        self.addCleanup(set_numerics, "fp32")
        self.device = torch.device("cpu")

    def tf32(self):
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def test_subnormal_numbers_are_flushed(self):
        torch.set_flush_denormal(False)
        smallest_normal = torch.tensor([2.0**-126])
        self.assertGreater((smallest_normal / 2).item(), 0)
        set_numerics("fp32")
        self.assertEqual((smallest_normal / 2).item(), 0)

    def test_precision_nests_and_restores_also_after_an_error(self):
        set_numerics("tf32")
        with precision("tf32", self.device):
            with precision("fp32", self.device):
                self.assertEqual(self.tf32(), (False, False))
            self.assertEqual(self.tf32(), (True, True))
            with self.assertRaises(KeyError), precision("bf16", self.device):
                self.assertEqual(self.tf32(), (False, False))
                raise KeyError
            self.assertEqual(self.tf32(), (True, True))
        self.assertFalse(torch.is_autocast_enabled("cpu"))

    def test_a_network_runs_in_the_precision_it_is_asked_to_also_inside_another(self):
        layer = nn.Linear(3, 2)
        for dtype, expected in (("fp32", torch.float32), ("tf32", torch.float32),
                                ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            for outer in ("fp32", "bf16"):
                with self.subTest(dtype, outer=outer), precision(outer, self.device):
                    model = in_precision(layer, dtype, self.device)
                    self.assertEqual(model(torch.ones(1, 3)).dtype, expected)

    def test_tf32_is_off_in_the_forward_and_in_the_backward_pass_unless_asked_for(self):
        seen = []

        def look(*_):
            seen.extend(self.tf32())

        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
        net.register_forward_hook(look)
        net.register_full_backward_hook(look)
        x = torch.rand(1, 3, 4, 4)
        for dtype in ("fp32", "tf32", "bf16"):
            with self.subTest(dtype):
                seen.clear()
                set_numerics(dtype)
                model = in_precision(net, dtype, self.device)
                pgd(model, x, torch.tensor([0]), eps=0.1, step_size=0.1, steps=1)
                self.assertEqual(seen, [dtype == "tf32"] * 4)


class TestWeights(TemporaryFolder):
    """Weights are found in whatever a file wraps them in, or the file is refused with a sentence."""

    def setUp(self):
        super().setUp()
        self.file = self.root / "some.pt"
        self.net = small()
        self.weights = self.net.state_dict()
        self.raw = small().state_dict()  # other weights, as they lie beside an average
        for tensor in self.raw.values():
            tensor += 1

    def loaded(self, content):
        """Save the content, load it into a fresh network -> this network, the sentence."""
        if isinstance(content, bytes):
            self.file.write_bytes(content)
        else:
            torch.save(content, self.file)
        net = build("resnet8", num_classes=10, small_input=True)
        return net, load_weights(net, self.file)

    def test_every_layout_of_one_network_gives_its_weights_and_says_where_they_were(self):
        def under(prefix, weights=self.weights):
            return {prefix + name: tensor for name, tensor in weights.items()}

        counters = [name for name in self.weights if name.endswith("num_batches_tracked")]
        without_counters = {name: self.weights[name] for name in self.weights if name not in counters}
        n_averaged = {"n_averaged": torch.tensor(3)}
        momentum = {"state": {0: {"momentum_buffer": torch.ones(3)}}}
        norm = {"normalize.mean": torch.full((1, 3, 1, 1), 0.5), "normalize.std": torch.full((3,), 0.2)}
        of_sequential = {"0.mean": torch.full((3,), 0.5), "0.std": torch.full((3,), 0.2), **under("1.")}
        of_robustness = {"module.normalizer.new_mean": torch.full((3, 1, 1), 0.5),
                         "module.normalizer.new_std": torch.full((3, 1, 1), 0.2),
                         **under("module.model."), **under("module.attacker.model.")}
        of_one_module = {**under("online_model.", self.raw), **under("ema_model.")}
        layouts = {
            "bare": (self.weights, "^$"),
            "without counters": (without_counters, "^$"),
            "compiled in DDP": (under("module._orig_mod."), "taken from module._orig_mod$"),
            "model": ({"model": self.weights, "epoch": 3}, "taken from model$"),
            "state_dict": ({"epoch": 3, "state_dict": under("module.")}, "from state_dict.module$"),
            "model_state_dict": ({"model_state_dict": self.weights, "optimizer": momentum}, "_dict$"),
            "nested": ({"checkpoint": {"model": under("module.model.")}}, "model.module.model$"),
            "AveragedModel": ({**n_averaged, **under("module.")}, "taken from module$"),
            "state_dict_ema": ({"state_dict": self.raw, "state_dict_ema": self.weights}, "an average"),
            "model_ema": ({"model": self.raw, "model_ema": {**n_averaged, **under("module.")}},
                          "model_ema.module, an average"),
            "two in one module": (of_one_module, "ema_model, an average"),
            "last.pt": ({"model": self.raw, "ema": self.weights, "optimizer": {}}, "ema, an average"),
            "twice the same": ({"model": self.weights, "copy": self.weights}, "taken from model$"),
            "normalisation beside": ({**norm, **under("model.")}, "from model, mean 0.5 .*, std 0.2"),
            "normalisation as lists": ({"net": self.weights, "mean": [0.5] * 3, "std": [0.2] * 3},
                                       "from net, mean 0.5 .*, std 0.2"),
            "counters of a profiler": (self.weights | {"total_ops": torch.ones(1)}, "^$"),
            "a stray counter": (self.weights | {"n_seen": torch.tensor(3)}, "^$"),
            "Sequential": (of_sequential, "taken from 1, mean 0.5 .*, std 0.2"),
            "robustness": ({"model": of_robustness}, "module.model, mean 0.5 .*, std 0.2"),
        }
        for name, (content, words) in layouts.items():
            with self.subTest(name):
                net, sentence = self.loaded(content)
                for wanted, found in zip(self.net.parameters(), net.parameters()):
                    self.assert_same(wanted, found)
                self.assert_same(net.bn1.running_var, self.net.bn1.running_var)
                self.assertRegex(sentence, words)
                if "mean" in words:
                    self.assertTrue((net.mean == 0.5).all() and (net.std == 0.2).all())
                else:
                    self.assert_same(net.mean, self.net.mean)

    def test_files_that_are_damaged_or_without_weights_that_fit_are_refused(self):
        too_few = {name: tensor for name, tensor in self.weights.items() if name != "fc.bias"}
        torch.save(self.weights, self.file)
        whole = self.file.read_bytes()
        flipped = bytearray(whole)
        flipped[whole.find(self.net.conv1.weight.detach().numpy().tobytes()) + 10] ^= 1
        contents = {
            "too few": (too_few, "e.g. fc.bias"),
            "too many": ({**self.weights, "fc.gain": torch.ones(10)}, "e.g. fc.gain"),
            "another network": (small("resnet20").state_dict(), "does not fit .*layer1.1"),
            "no shape fits": ({"conv1.weight": torch.ones(5), "block.conv1.weight": torch.zeros(5)},
                              "does not fit this network: .* differ"),
            "other classes": (build("resnet8", num_classes=1000, small_input=True).state_dict(),
                              "some.pt has 1000 classes and the data 10; use"),
            "another curve": (small(act="smoothrelu").state_dict(), "does not fit .*act.beta"),
            "no deviation": (self.weights | {"std": torch.zeros(3)}, "std is .*positive"),
            "a nan as mean": (self.weights | {"mean": torch.full((3,), math.nan)}, "mean is .*finite"),
            "two means": (self.weights | {"a.mean": torch.ones(3), "b.mean": torch.zeros(3)},
                          "several normalisations, e.g. b.mean"),
            "nan": (self.weights | {"fc.bias": torch.full((10,), math.nan)}, "fc.bias is not finite"),
            "infinite": (self.weights | {"fc.bias": torch.full((10,), -math.inf)}, "is not finite"),
            "two that differ": ({"model": self.weights, "best": self.raw}, "fit, model and best; save"),
            "a Namespace beside": ({"state_dict": self.weights, "args": argparse.Namespace(lr=1)},
                                   r"holds argparse.Namespace beside .*some.pt', weights_only=F"),
            "a number of NumPy beside": ({"net": self.weights, "acc": np.float64(93)}, "holds numpy"),
            "a list": ([1, 2], "no state dict"), "a tensor": (torch.ones(3), "no state dict"),
            "nothing": ({}, "holds no state dict"), "no tensors": ({"epoch": 3}, "holds no state dict"),
            "text": (b"not a file of weights", "some.pt is damaged or"),
            "empty": (b"", "some.pt is damaged or"),
            "truncated": (whole[:-1000], "some.pt is damaged or"),
            "flipped bit": (bytes(flipped), "does not match its checksum"),
        }
        for name, (content, words) in contents.items():
            with self.subTest(name):
                refuses(self, ValueError, words, self.loaded, content)
        refuses(self, ValueError, "is damaged or", load_file, self.root)
        refuses(self, ValueError, "no file .*other.pt", load_file, self.root / "other.pt")

    def test_the_line_that_converts_a_file_can_be_pasted(self):
        content = {"state_dict": self.weights, "args": argparse.Namespace(lr=1)}
        with self.assertRaises(ValueError) as caught:
            self.loaded(content)
        _, line = str(caught.exception).split("'state_dict': ")
        line = line.replace("python", shlex.quote(sys.executable), 1)
        subprocess.run(line, shell=True, check=True, cwd=self.root)
        self.assertEqual(load_weights(self.net, self.root / "weights.pt"), "")


# attacks

EPS = 0.05


def linear(classes=10, size=4, scale=1.0):
    """A linear model of (N, 3, size, size) images, whose best L-inf attack has a closed form.

    The classes have weights of different lengths: the class with the second highest logit is not
    always the one that is easiest to reach. scale: small logits keep every softmax unsaturated.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)).eval()
    net[1].weight.data *= scale * torch.linspace(0.5, 2, classes)[:, None]
    net[1].bias.data *= scale
    return net


def classify(model, x):
    """The class that the model sees in each image."""
    with torch.no_grad():
        return model(x).argmax(1)


def images_of(net, n=40, size=4):
    """Random images (n, 3, size, size), and the classes that the net sees in them as their labels."""
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x, classify(net, x)


def can_be_fooled(net, x, y, eps=EPS):
    """Which images of a linear model have an adversarial image in ball and box -> (N,) bool.

    For each wrong class the best pixels are known: each is as low or as high as it can be. In float64.
    """
    weight = net[1].weight.detach().double()
    bias = net[1].bias.detach().double()
    lower = (x.double() - eps).clamp(0, 1).flatten(1)[:, None]  # (N, 1, P)
    upper = (x.double() + eps).clamp(0, 1).flatten(1)[:, None]
    slope = weight[None] - weight[y][:, None]  # (N, K, P): of logit K minus the label's, in pixel P
    best_pixels = torch.where(slope > 0, upper, lower)
    best_margin = (best_pixels * slope).sum(2) + bias[None] - bias[y][:, None]
    best_margin.scatter_(1, y[:, None], -math.inf)
    return best_margin.amax(1) > 0


def half_robust(n=90):
    """A linear model, index, x, y: it is wrong on a ninth of x, and EPS fools half of the others."""
    net = linear()
    x, y = images_of(net, n)
    y[::9] = (y[::9] + 1) % 10
    return net, torch.arange(n), x, y


def plain_verdicts(model, index, x, y, eps, step_size, steps, restarts, seed):
    """What `pgd_search` has to find, by a whole PGD for each restart and each number of steps.

    -> is the image fooled by this iterate? (restarts, steps + 1, N) bool.
    """
    fooled = torch.empty(restarts, steps + 1, len(y), dtype=torch.bool)
    for restart in range(restarts):
        noise = random_start(x, eps, seed, index, restart)
        for step in range(steps + 1):
            x_adv = pgd(model, x, y, eps=eps, step_size=step_size, steps=step, noise=noise)
            fooled[restart, step] = model(x_adv).argmax(1) != y
    return fooled


def negated(net):
    """A model that is wrong wherever the net is right."""
    def model(x):
        return -net(x)
    return model


class Recorder:
    """A model that keeps the images of every call, and whether their gradient was asked for."""

    def __init__(self, model):
        self.model = model
        self.calls = []
        self.with_gradient = []

    def __call__(self, x):
        self.calls.append(x.detach().clone())
        self.with_gradient.append(x.requires_grad)
        return self.model(x)

    def n_images(self):
        """How many images all calls together were asked about."""
        return sum(len(x) for x in self.calls)


def with_wrong_slope(logits, factor):
    """The logits, whose slope is multiplied by a factor."""
    if logits.requires_grad:
        logits.register_hook(partial(torch.mul, factor))
    return logits


def constant_model(x):
    """Four classes, the first one for every image, slope 0: Square always starts from its stripes."""
    return torch.tensor([3.0, 2.0, 1.0, 0.0]) + 0 * x.flatten(1)[:, :4]


class Scripted:
    """A model of images of one pixel, all of class 0, that answers by a script, whatever the pixel is.

    losses, slopes: (calls, N), the logit of class 0 and its slope in the pixel.
    """

    def __init__(self, losses, slopes):
        self.losses = losses
        self.slopes = slopes
        self.pixels = []  # (N,) of each call

    def __call__(self, x):
        step = len(self.pixels)
        pixel = x.flatten()
        self.pixels.append(pixel.detach())
        logit = self.losses[step] + self.slopes[step] * (pixel - pixel.detach())
        return torch.stack([logit, logit - 1], 1)


def plain_apgd(start, eps, losses, slopes):
    """AA's Algorithm 1 and its two conditions on one pixel of 1/2 -> its iterates, conditions.

    losses, slopes: of each iterate. conditions: {checkpoint: (is 1 true?, is 2 true?)}.
    """
    losses = list(losses)
    slopes = list(slopes)
    x = [start]
    iterates = []
    conditions = {}
    step_size = 2 * eps
    last = 0  # the last checkpoint; whether the step was halved there, and the highest loss by then
    halved = True
    highest = None
    for k in range(len(losses)):
        iterates.append(x[k])
        best = max(range(k + 1), key=losses.__getitem__)  # the first of the highest
        if k in (22, 41, 57, 70, 80, 87, 93, 99):
            n_up = sum(losses[i + 1] > losses[i] for i in range(last, k))
            too_few = n_up <= 0.75 * (k - last)
            stood_still = not halved and losses[best] == highest
            conditions[k] = (too_few, stood_still)
            halved = too_few or stood_still
            if halved:
                step_size /= 2
                x[k] = x[best]
                losses[k] = losses[best]
                slopes[k] = slopes[best]
            last = k
            highest = losses[best]
        ascent = min(max(x[k] + step_size * slopes[k], 0.5 - eps), 0.5 + eps)
        moved = ascent
        if k > 0:
            moved = x[k] + 0.75 * (ascent - x[k]) + 0.25 * (x[k] - x[k - 1])
        x.append(min(max(moved, 0.5 - eps), 0.5 + eps))
    return iterates, conditions


def in_units(x_adv):
    """How far pixels are from 1/2, in units of 2^-24, which is what a float32 there resolves."""
    return torch.round((x_adv - 0.5) * 2**24).flatten().long().tolist()


class TestUniform(TensorCase):
    def test_its_bits_never_change(self):
        two_images = torch.tensor([49999, 49999])
        words = torch.tensor([11, 12])  # one for each image
        for seed, index, counter, bits in (
                (0, 0, 0, [1961223, 7289376, 6086541, 2630420]),
                (3, 7, (1, 2), [12281060, 12254642, 6002808, 10867134]),
                (-1, 2**40, 5, [15026158, 16496648, 3066510, 3262466]),
                (2**62, two_images, (2, words), [1115381, 6664669, 4062016, 1689964])):
            with self.subTest(seed=seed, index=index):
                index = torch.as_tensor(index).view(-1)
                numbers = uniform(seed, index, counter, (4 // len(index),))
                self.assertEqual((numbers * 2**24).flatten().tolist(), bits)


class TestPGD(TensorCase):
    """On a linear model of two classes the best attack moves every pixel as far as it can."""

    def setUp(self):
        torch.manual_seed(0)
        self.x = torch.rand(6, 3, 8, 8)
        self.x[:, :, 0] = 0.0  # a row at each end of the box
        self.x[:, :, 1] = 1.0
        self.y = torch.arange(6) % 2
        sizes = torch.randint(1, 17, (192, 1)) / 128  # no weight is 0: every pixel has a direction
        signs = (torch.rand(192, 1) - 0.5).sign()
        self.w = torch.cat([-sizes * signs, sizes * signs], 1)  # (192, 2)
        self.up = self.w[:, 1 - self.y].T.sign().view_as(self.x)  # the direction that raises the loss
        self.noise = torch.empty_like(self.x).uniform_(-0.05, 0.05)
        self.inner = (self.x > 0.15) & (self.x < 0.85)  # where an eps of 0.1 never meets the box

    def model(self, x):
        return x.flatten(1) @ self.w

    def test_it_is_optimal_on_a_linear_model(self):
        for eps in (4 / 255, 8 / 255, 0.3):
            best = (self.x.double() + eps * self.up).clamp(0, 1)
            for steps, step_size in ((1, 2 * eps), (10, eps / 4)):
                with self.subTest(eps=eps, steps=steps):
                    x_adv = pgd(self.model, self.x, self.y, eps, step_size, steps)
                    self.assert_close(x_adv, best, delta=2e-7)

    def test_it_takes_k_signed_steps_from_its_start_and_returns_the_last(self):
        for steps in (0, 1, 4):
            model = Recorder(self.model)
            x_adv = pgd(model, self.x, self.y, 0.1, 0.01, steps, noise=self.noise)
            expected = self.x + self.noise + steps * 0.01 * self.up
            with self.subTest(steps=steps):
                self.assert_close(x_adv[self.inner], expected[self.inner], delta=1e-6)
                self.assert_inside(x_adv, self.x, 0.1)
                self.assertEqual(model.with_gradient, [True] * steps)

    def test_without_noise_the_start_is_uniform_in_the_ball(self):
        start = pgd(self.model, self.x, self.y, 0.1, 0.01, steps=0)
        moved = (start - self.x)[self.inner]
        self.assertAlmostEqual(moved.mean().item(), 0, delta=0.01)
        self.assertAlmostEqual(moved.var().item(), 0.1**2 / 3, delta=5e-4)

    def test_it_climbs_the_loss_it_is_given(self):
        def logit_of_class_1(logits, y):
            return logits[:, 1]

        up = self.w[:, 1].sign().view(1, 3, 8, 8)
        best = (self.x + 0.1 * up).clamp(0, 1)
        x_adv = pgd(self.model, self.x, self.y, 0.1, 0.05, steps=6, loss=logit_of_class_1)
        self.assert_close(x_adv, best, delta=1e-6)

    def test_the_float32_ball_is_inside_the_exact_ball_and_not_much_smaller(self):
        anywhere = torch.rand(100_000)
        bytes_ = torch.arange(256) / 255
        tiny = torch.rand(10_000) * 2**-24
        x = torch.cat([anywhere, bytes_, tiny, 1 - tiny])
        for eps in (0.0, 1e-8, *(k / 255 for k in range(1, 65)), 0.1, 0.3):
            lower, upper = ball(x, eps)
            exact_lower = (x.double() - eps).clamp(0, 1)
            exact_upper = (x.double() + eps).clamp(0, 1)
            with self.subTest(eps=eps):
                self.assert_inside(lower, x, eps)
                self.assert_inside(upper, x, eps)
                self.assert_close(lower, exact_lower, delta=2e-7)
                self.assert_close(upper, exact_upper, delta=2e-7)

    def test_without_check_nothing_waits_for_the_device(self):
        # A tensor on "meta" has no values, so asking for one is an error
        x = torch.empty(2, 3, 8, 8, device="meta")
        y = torch.empty(2, dtype=torch.int64, device="meta")
        net = linear(size=8).to("meta")
        x_adv = pgd(net, x, y, 0.1, 0.01, steps=2, check=False)
        self.assertEqual(x_adv.shape, x.shape)
        with self.assertRaises(RuntimeError):
            pgd(net, x, y, 0.1, 0.01, steps=2)


class TestInputGradient(TensorCase):
    def setUp(self):
        self.net = linear()
        self.x, self.y = images_of(self.net, 8)

    def climbed(self, logits):
        return F.cross_entropy(logits, self.y, reduction="none")

    def test_it_is_the_slope_of_each_images_own_loss(self):
        weight = self.net[1].weight.detach()
        logits, grad = input_gradient(self.net, self.x, self.climbed)
        excess = logits.softmax(1) - F.one_hot(self.y, 10)  # the cross-entropy's slope
        self.assert_close(grad.flatten(1), excess @ weight, delta=1e-6)
        self.assert_same(logits, self.net(self.x))
        self.assertFalse(logits.requires_grad or grad.requires_grad or self.x.requires_grad)

    def test_float16_does_not_underflow_on_the_way_back(self):
        signs = torch.ones(48)
        signs[::2] = -1
        w = torch.stack([-signs, signs], 1).half()
        bias = torch.tensor([18.0, 0.0]).half()  # the slope is 1.5e-8, float16's least 6e-8
        x = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
        y = torch.tensor([0])

        def half_model(x):
            return x.flatten(1).half() @ w + bias

        def climbed(logits):
            return F.cross_entropy(logits, y, reduction="none")

        unscaled, = torch.autograd.grad(climbed(half_model(x).float()).sum(), x)
        self.assertEqual(unscaled.abs().max(), 0)
        _, grad = input_gradient(half_model, x, climbed)
        # The loss has the slope p1 in logit 1, and p0 - 1 in logit 0, which is 0 in float32
        expected = signs / (1 + math.exp(18))
        self.assert_close(grad.flatten() / expected, 1, delta=0.05)
        x_adv = pgd(half_model, x, y, 0.1, 0.1, 1, noise=torch.zeros_like(x))
        self.assert_same((x_adv - x).sign().flatten(), signs)

    def test_a_gradient_that_is_not_finite_becomes_nan_so_that_training_stops(self):
        for factor in (math.nan, math.inf):
            def model(x):
                logits = self.net(x)
                return torch.cat([logits[:1], with_wrong_slope(logits[1:], factor)])

            with self.subTest(factor):
                x_adv = pgd(model, self.x, self.y, 0.1, 0.1, 1)
                self.assertTrue(x_adv[0].isfinite().all())
                self.assertTrue(x_adv[1:].isnan().any())


class TestPGDSearch(TensorCase):
    """verify: the float32 model, which confirms what a search in lower precision has found."""

    def setUp(self):
        self.net, self.index, self.x, self.y = half_robust()
        self.correct = classify(self.net, self.x) == self.y

    def search(self, model, rows=slice(None), steps=6, **more):
        """PGD with verdicts on some images, by default all -> x_adv, report."""
        return pgd_search(model, self.x[rows], self.y[rows], eps=EPS, step_size=EPS / 10, steps=steps,
                          index=self.index[rows], **more)

    def plain(self, steps=6, restarts=1, seed=0):
        """The verdicts of a plain loop on all images."""
        return plain_verdicts(self.net, self.index, self.x, self.y, EPS, EPS / 10, steps, restarts, seed)

    def test_it_equals_a_plain_loop_for_every_batch_size_and_order(self):
        fooled = self.plain(restarts=3, seed=5)
        by_first_restart = fooled[0].any(0)
        by_later_ones = fooled[1:].flatten(0, 1).any(0)
        self.assertTrue((by_later_ones & ~by_first_restart).any())  # else restarts could be forgotten
        shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(1))
        for batch_size, order in ((1, shuffled[:40]), (7, shuffled), (64, self.index), (500, shuffled)):
            for rows in order.split(batch_size):
                _, report = self.search(self.net, rows, restarts=3, seed=5)
                for k, i in enumerate(rows.tolist()):
                    fooling = fooled[:, :, i].nonzero().tolist()  # [restart, step] of each, in order
                    first_fooling = [-1, -1]
                    if self.correct[i] and fooling:
                        first_fooling = fooling[0]
                    with self.subTest(batch_size=batch_size, image=i):
                        self.assertEqual([report["restart"][k], report["step"][k]], first_fooling)
                        self.assertEqual(report["robust"][k], self.correct[i] and not fooling)

    def test_the_last_iterate_is_a_plain_loops_for_all_images(self):
        def wavy(x):
            waves = torch.sin(1000 * x.mean((1, 2, 3)))
            return torch.stack([waves, 0 * waves], 1)

        y = self.index % 2
        fooled = plain_verdicts(wavy, self.index, self.x, y, EPS, EPS / 10, 6, 1, seed=5)[0]
        only_for_a_step = fooled[:-1] & ~fooled[1:]
        self.assertGreater(only_for_a_step.sum(), 20)  # else the last iterate is like all others
        x_adv, report = pgd_search(wavy, self.x, y, eps=EPS, step_size=EPS / 10, steps=6,
                                   index=self.index, seed=5, last_iterate=True)
        self.assert_same(report["robust_at"], ~fooled.T)
        self.assert_same(report["robust"], ~fooled[-1])  # for images that are wrong on x too
        self.assertEqual(report["restart"].unique().tolist(), [-1])
        self.assertEqual(report["step"].unique().tolist(), [-1])
        noise = random_start(self.x, EPS, 5, self.index)
        expected = pgd(wavy, self.x, y, EPS, EPS / 10, 6, noise=noise)
        self.assert_same(x_adv, expected)

    def test_every_forward_is_counted(self):
        for more in ({}, {"restarts": 3}, {"last_iterate": True}):
            for has_verify in (False, True):
                with self.subTest(has_verify=has_verify, **more):
                    model = Recorder(self.net)
                    verify = Recorder(self.net)
                    _, report = self.search(model, verify=verify if has_verify else None, **more)
                    n_images = model.n_images() + verify.n_images()
                    self.assertEqual(report["forwards"].sum(), n_images)

    def test_a_restart_of_k_steps_has_k_gradients_and_one_forward_more(self):
        model = Recorder(self.net)
        robust = ~can_be_fooled(self.net, self.x, self.y) & self.correct
        _, report = self.search(model, robust.nonzero().squeeze(1)[:1], steps=3, restarts=2)
        self.assertEqual(model.with_gradient, [False] + 2 * [True, True, True, False])
        self.assertEqual(report["forwards"].tolist(), [9])

    def test_verify_has_the_last_word_over_a_search_that_claims_every_image(self):
        with self.subTest("every iterate"):
            _, report = self.search(negated(self.net), steps=0, restarts=2, verify=self.net)
            start_fools = self.plain(steps=0, restarts=2).any(0)[0]
            self.assert_same(report["robust"], self.correct & ~start_fools)
            self.assert_same(report["clean"], classify(self.net, self.x))
        with self.subTest("last iterate"):
            _, report = self.search(negated(self.net), steps=0, verify=self.net, last_iterate=True)
            start_fools = self.plain(steps=0)[0]
            self.assert_same(report["robust_at"], ~start_fools.T)

    def test_progress_counts_the_steps_of_all_restarts_and_the_images_not_yet_fooled(self):
        calls = []

        def progress(*where):
            calls.append(where)

        _, report = self.search(self.net, restarts=3, progress=progress)
        fooled_at = 7 * report["restart"] + report["step"]  # a restart is 7 iterates: the start, 6 steps
        expected = []
        for step in range(21):
            is_open = self.correct & (report["robust"] | (fooled_at >= step))
            expected.append(("pgd", step, 21, is_open.sum()))
        self.assertEqual(calls, expected)


def run_autoattack(model, x, y, eps=EPS, **more):
    """AutoAttack on images 0 to N - 1 -> fooled (N,) bool, x_adv, report."""
    x_adv, report = autoattack(model, x, y, eps=eps, index=torch.arange(len(x)), **more)
    fooled = torch.tensor([name is not None for name in report["fooled_by"]], dtype=torch.bool)
    return fooled, x_adv, report


def reasons(report):
    """Of the report's warnings, each "reason: sentence"."""
    return [warning.partition(":")[0] for warning in report["warnings"]]


class TestAutoAttack(TensorCase):
    def test_each_attack_misses_at_most_one_image_of_a_linear_model_that_can_be_fooled(self):
        # Cross-entropy raises all wrong classes at once: with two or more it may miss the nearest one
        for attack, classes in (("apgd-ce", 2), ("apgd-t", 10), ("fab-t", 10), ("square", 10)):
            net = linear(classes, scale=1e-3)
            x, y = images_of(net, 120)
            possible = can_be_fooled(net, x, y)
            fooled, x_adv, _ = run_autoattack(net, x, y, attacks=(attack,), queries=1000)
            is_wrong = classify(net, x_adv) != y
            with self.subTest(attack):
                self.assertTrue(20 < possible.sum() < 100)  # neither all nor none
                self.assertFalse((fooled & ~possible).any())
                self.assertLessEqual((fooled != possible).sum(), 1)  # of 120
                self.assertTrue(is_wrong[fooled].all())
                self.assert_same(x_adv[~fooled], x[~fooled])

    def test_verify_has_the_last_word_in_each_attack(self):
        net = linear(scale=1e-3)
        x, y = images_of(net, 120)
        possible = can_be_fooled(net, x, y)
        for attack in STANDARD:
            fooled, _, report = run_autoattack(negated(net), x, y, verify=net, attacks=(attack,),
                                               steps=9, queries=9)
            with self.subTest(attack):
                self.assertTrue((report["forwards"] > 3).all())  # 3 are on x
                self.assertFalse((fooled & ~possible).any())

    def test_each_attack_agrees_with_brute_force_on_a_two_layer_net_but_for_at_most_one_image(self):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
        net[1].weight.data *= 3
        x, y = images_of(net, 100, size=1)
        one_axis = torch.linspace(-EPS, EPS, 21)
        grid = torch.cartesian_prod(one_axis, one_axis, one_axis)
        points = (x.view(-1, 1, 3) + grid).clamp(0, 1)  # (100, 9261, 3)
        classes = classify(net, points.view(-1, 3, 1, 1))
        is_wrong = classes.view(100, -1) != y[:, None]
        possible = is_wrong.any(1)
        self.assertTrue(10 < possible.sum() < 90)
        for attack in STANDARD:
            fooled, _, _ = run_autoattack(net, x, y, attacks=(attack,), queries=500)
            with self.subTest(attack):
                self.assertLessEqual((fooled != possible).sum(), 1)

    def test_every_target_class_is_tried(self):
        fixed = torch.tensor([0.0, *torch.linspace(-0.1, -0.2, 8), -1.0])  # the last class is furthest
        slope = 99 * torch.eye(10)[9]  # and the only one that the image changes

        def model(x):
            brighter = x.mean((1, 2, 3)) - 0.5
            return fixed + slope * brighter[:, None]

        x = torch.full((5, 3, 4, 4), 0.5)
        y = torch.zeros(5).long()
        for attack in ("apgd-t", "fab-t"):
            fooled, _, _ = run_autoattack(model, x, y, attacks=(attack,))
            with self.subTest(attack):
                self.assertTrue(fooled.all())

    def test_fab_oversteps_the_boundary_and_comes_back(self):
        x = torch.full((1, 3, 4, 4), 0.5)
        w = torch.linspace(-1, 2, 48).view(3, 4, 4)
        label_logit = 0.1 * w.abs().sum()

        def two_logits(x):
            other_logit = (w * (x - 0.5)).sum()
            return torch.stack([label_logit, other_logit])[None]

        # FAB then moves on the line x + 0.1 * place * sign(w): place 0 is x, at place 1 both logits are
        # equal. It takes eta (1.05) times the way to place 1, once from its place and once from x, and
        # mixes the two: alpha, at most 0.1, is x's share. Past place 1, beta pulls it back towards x
        for more, beta in (({}, 0.9), ({"beta": 0.5}, 0.5)):
            place = 0.0
            places = []
            for _ in range(4):
                places.append(place)  # where the slope is taken
                distance = abs(1 - place)
                alpha = min(distance / (distance + 1), 0.1)
                from_place = place + 1.05 * (1 - place)
                place = (1 - alpha) * from_place + alpha * 1.05
                places.append(place)  # where the class is asked for
                if place > 1:
                    place = beta * place
            model = Recorder(two_logits)
            fab(model, x, torch.tensor([0]), eps=0.01, target=torch.tensor([1]), steps=4, **more)
            self.assertEqual(len(model.calls), len(places))
            for step, place in enumerate(places):
                expected = x + 0.1 * place * w.sign()
                with self.subTest(beta=beta, step=step):
                    self.assert_close(model.calls[step], expected, delta=1e-5)

    def test_the_step_to_a_hyperplane_is_the_smallest_one_in_the_box(self):
        torch.manual_seed(0)
        x = torch.rand(50, 3, 4, 4)
        w = torch.randn(50, 3, 4, 4)
        gap = torch.linspace(-15, 15, 50)
        steps = to_hyperplane(x, w, gap)
        for i in range(50):
            direction = w[i].sign() * gap[i].sign()
            room = torch.where(direction > 0, 1 - x[i], x[i])
            low = 0.0
            high = 1.0
            for _ in range(30):  # bisection for the least reach that closes the gap
                reach = (low + high) / 2
                closed = (w[i].abs() * room.clamp(max=reach)).sum()
                if closed < gap[i].abs():
                    low = reach
                else:
                    high = reach
            with self.subTest(gap=gap[i].item()):
                self.assert_close(steps[i], direction * room.clamp(max=high), delta=1e-5)

    def test_the_starts_never_change(self):
        x = torch.full((1, 1, 2, 2), 0.5)
        common = dict(x=x, y=torch.tensor([0]), eps=0.25, index=torch.tensor([49999]), seed=5, steps=0)
        # One start a restart or a target. APGD's touch the ball: one pixel is at ±1/4, 2^22 units
        for search, starts in (
                (partial(pgd_search, step_size=0.1, restarts=2),
                 [[3598139, -1572555, 3927204, -3133413], [-817400, 195246, -102932, -3344602]]),
                (partial(autoattack, attacks="apgd-ce"), [[2572073, 216998, 4194304, -1361488]]),
                (partial(autoattack, attacks="apgd-t"),
                 [[4194304, -238008, -602022, 3926533], [-3734772, 78683, 4194304, -3665450],
                  [2836240, 3155449, -1455957, 4194304]])):
            model = Recorder(constant_model)
            search(model, **common)
            with self.subTest(search):
                for x_adv, start in zip(model.calls[-len(starts):], starts):  # those on x come first
                    units = torch.tensor(in_units(x_adv))
                    self.assert_close(units, torch.tensor(start), delta=3)  # the ball is 2^-23 smaller

    def test_the_stripes_and_squares_of_the_square_attack_never_change(self):
        x = torch.full((1, 1, 6, 6), 0.5)
        model = Recorder(constant_model)
        square(model, x, torch.tensor([0]), eps=0.25, index=torch.tensor([49999]), seed=5, queries=2)
        stripes = ["000111"] * 6
        first_square = ["000111"] + ["111111"] * 5
        second_square = ["111111"] * 5 + ["000111"]
        pictures = []
        for x_adv in model.calls:
            picture = []
            for row in (x_adv[0, 0] > 0.5).tolist():
                picture.append("".join("1" if pixel else "0" for pixel in row))
            pictures.append(picture)
        self.assertEqual(pictures, [stripes, first_square, second_square])

    def test_apgd_is_a_plain_loop_with_both_conditions_at_every_checkpoint(self):
        n = 300
        generator = torch.Generator().manual_seed(0)
        chance = torch.rand(101, n, generator=generator)
        rises = torch.randint(1, 4, (101, n), generator=generator)
        falls = torch.tensor([1, 5, 30]).repeat(n // 3)  # after a deep one the best stands for long
        changes = torch.where(chance < torch.linspace(0.6, 0.95, n), rises, -falls)
        changes[chance > 0.95] = 0
        losses = changes.cumsum(0).float()
        slopes = torch.randint(0, 2, (101, n), generator=generator) * 2.0 - 1
        model = Scripted(losses, slopes)
        x = torch.full((n, 1, 1, 1), 0.5)
        apgd(model, x, torch.zeros(n).long(), eps=0.25, loss=logit_of)
        iterates = torch.stack(model.pixels)  # (101, N)
        seen = set()
        for i in range(n):
            expected, conditions = plain_apgd(iterates[0, i].item(), 0.25, losses[:, i].tolist(),
                                              slopes[:, i].tolist())
            seen.update(conditions.items())
            with self.subTest(image=i):
                self.assert_close(iterates[:, i], torch.tensor(expected), delta=1e-6)
        for checkpoint in (41, 57, 70, 80, 87, 93, 99):  # each condition decides alone
            self.assertLessEqual({(checkpoint, (True, False)), (checkpoint, (False, True)),
                                  (checkpoint, (False, False))}, seen)

    def test_the_squares_shrink_after_the_published_numbers_of_queries(self):
        def draw(seed, index, counter, shape):
            """So that the start is dark all over, and every square bright."""
            is_start = counter == (SQUARE, 0)
            return torch.full((len(index), *shape), 0.1 if is_start else 0.9)

        x = torch.full((1, 1, 32, 32), 0.5)
        model = Recorder(constant_model)
        with mock.patch("attacks.uniform", draw):
            square(model, x, torch.tensor([0]), eps=0.1, index=torch.tensor([0]), queries=8002)
        first_query = {}  # of each side, in pixels
        for query, x_adv in enumerate(model.calls[1:]):
            side = (x_adv > 0.5).sum().sqrt().item()
            first_query.setdefault(side, query)
        # The side is the root of the area: 0.8 of 32 x 32 pixels, then half of that, and so on
        self.assertEqual(first_query, {29: 0, 20: 11, 14: 51, 10: 201, 7: 501, 5: 1001, 4: 2001, 3: 4001,
                                       2: 6001, 1: 8001})

    def test_steps_queries_and_targets_are_the_published_ones_and_progress_is_told_each(self):
        net = linear(scale=1e-3)
        net[1].bias.data[0] = 1e3  # so sure of class 0 that no attack fools it
        x, y = images_of(net, 2)
        calls = []

        def progress(*where):
            calls.append(where)

        _, _, report = run_autoattack(net, x, y, verify=net, progress=progress)
        expected = []
        for name, n_steps in (("apgd-ce", 101), ("apgd-t", 9 * 101), ("fab-t", 9 * 100),
                              ("square", 5001)):
            expected += [(name, step, n_steps, 2) for step in range(n_steps)]
        self.assertTrue(calls == expected)  # a diff of 6,911 calls would take more than ten minutes
        self.assertEqual(report["forwards"].tolist(), 2 * [3 + 101 + 9 * 101 + 9 * 200 + 5001])

    def test_no_attack_leaves_a_trace(self):
        net = small(act="silu").eval()
        x, y = images_of(net, 6, size=16)
        noise = torch.zeros_like(x)
        before = traces(net, x, y, noise)
        pgd(net, x, y, eps=0.01, step_size=0.01, steps=3, noise=noise)
        pgd_search(net, x, y, eps=0.01, step_size=0.01, steps=3)
        run_autoattack(net, x, y, eps=0.01, steps=3, queries=5)
        self.assertEqual(before, traces(net, x, y, noise))

    def test_what_blinds_an_attack_is_named_in_a_warning(self):
        net = linear()
        x, _ = images_of(net)
        torch.manual_seed(0)

        def saturated(x):
            return 1e5 * net(x)

        def rounded(x):
            return net((20 * x).round() / 20)

        def noisy(x):
            return net(x + 0.05 * torch.randn_like(x))

        def probabilities(x):
            return net(x).softmax(1)

        def infinite(x):
            return net(x) / (x[:, 0, 0, :1] > 0.5)

        factors = itertools.chain([1.0, 1.0, math.nan], itertools.repeat(1.0))

        def broken_in_its_third_call(x):  # the first is for the labels
            return net(x) * next(factors)

        for reason, model in (("zero gradients", saturated), ("zero gradients", rounded),
                              ("masked gradients", rounded), ("random logits", noisy),
                              ("random logits", broken_in_its_third_call),
                              ("probabilities", probabilities), ("not finite", infinite)):
            y = model(x).argmax(1)
            _, _, report = run_autoattack(model, x, y, eps=0.1, steps=5, queries=200)
            _, of_pgd = pgd_search(model, x, y, eps=0.1, step_size=0.02, steps=5)
            with self.subTest(reason, model=model.__name__):
                self.assertIn(reason, reasons(report))
                if reason not in ("masked gradients", "random logits"):  # PGD cannot tell these
                    self.assertIn(reason, reasons(of_pgd))

    def test_a_sound_model_gets_no_warning_in_any_precision(self):
        net = linear()
        x, y = images_of(net)

        def bfloat16(x):
            return net(x).bfloat16()

        for model, verify in ((net, None), (net, net), (bfloat16, net)):
            _, _, report = run_autoattack(model, x, y, eps=0.1, steps=5, queries=200, verify=verify)
            self.assertEqual(report["warnings"], [])
            _, report = pgd_search(model, x, y, eps=0.1, step_size=0.02, steps=5, verify=verify)
            self.assertEqual(report["warnings"], [])

    def test_square_runs_on_a_model_without_gradients(self):
        net = linear()
        x, y = images_of(net)
        fooled, _, report = run_autoattack(torch.no_grad()(net), x, y, attacks="square", queries=50)
        self.assertTrue(fooled.any())
        self.assert_same(report["robust"], ~fooled)

    def test_square_warns_of_masked_gradients_only_after_gradient_attacks_and_above_0_2_percent(self):
        for name, fooled, n_warnings in (("more", {"apgd-ce": 9, "square": 3}, 1),
                                         ("as many", {"apgd-ce": 9, "square": 2}, 0),
                                         ("square alone", {"square": 9}, 0),
                                         ("no square", {"apgd-ce": 9, "fab-t": 9}, 0)):
            with self.subTest(name):
                self.assertEqual(len(masked_gradients(1000, fooled)), n_warnings)

    def test_every_iterate_is_in_ball_and_box_even_where_the_slope_is_nan(self):
        net = linear()
        x, _ = images_of(net, 10)
        x[:, :, 0] = 0
        x[:, :, 1] = 1
        x = x.to(memory_format=torch.channels_last)  # any strides will do
        y = net(x).argmax(1)

        seen = Recorder(net)
        pgd_search(seen, x, y, eps=1e-3, step_size=1e-3, steps=3, index=torch.arange(10))
        for attack in ("apgd-ce", "apgd-t", "square"):  # FAB leaves the ball on its way
            run_autoattack(seen, x, y, eps=1e-3, attacks=(attack,), steps=4, queries=9)
        for x_adv in seen.calls:
            distances = (x_adv[:, None] - x[None]).abs().amax((2, 3, 4))
            own_image = distances.argmin(1)  # which of the images this is an iterate of
            self.assert_inside(x_adv, x[own_image], 1e-3)
        _, x_adv, _ = run_autoattack(net, x, y, eps=0.1, attacks="fab-t", steps=4)
        self.assert_inside(x_adv, x, 0.1)

    def test_a_search_goes_on_where_the_slope_is_not_finite(self):
        x = torch.rand(3, 1, 1, 1)
        factors = torch.tensor([math.nan, math.inf, 2.0])

        def climbed(logits):
            return logits[:, 0] * factors

        _, grad = search_gradient(nn.Flatten(), x, climbed)
        self.assertEqual(grad.flatten().tolist(), [0, 0, 2])

    def test_the_targeted_loss_is_the_published_ratio_of_differences(self):
        logits = torch.tensor([[1.0, 8.0, -2.0, 5.0, 3.0], [4.0, 0.0, 1.0, 2.0, 9.0]])
        # (target - label) / (first - (third + fourth) / 2), the places by size
        expected = torch.tensor([(3 - 8) / (8 - (3 + 1) / 2), (9 - 1) / (9 - (2 + 1) / 2)])
        found = targeted_dlr(logits, y=torch.tensor([1, 2]), target=torch.tensor([4, 4]))
        self.assert_close(found, expected, delta=1e-6)

    def test_with_few_classes_apgd_t_climbs_targeted_cross_entropy(self):
        for classes in (2, 3):
            net = linear(classes)
            x, y = images_of(net)
            fooled, _, report = run_autoattack(net, x, y, steps=20, attacks=("apgd-t",))
            possible = can_be_fooled(net, x, y)
            with self.subTest(classes=classes):
                self.assertIn("few classes", report["warnings"][0])
                self.assertFalse((fooled & ~possible).any())
                self.assertLessEqual((fooled != possible).sum(), 2)  # it may miss the nearest class

    def test_the_attacks_run_in_their_own_order_each_on_the_images_not_yet_fooled(self):
        net = linear()
        x, y = images_of(net, 60)
        given = ("square", "apgd-t", "apgd-ce")
        n_at_start = {}

        def progress(name, step, n_steps, n_undecided):
            if step == 0:
                n_at_start[name] = n_undecided

        _, _, report = run_autoattack(net, x, y, steps=20, queries=100, attacks=given, progress=progress)
        n_after_ce = 60 - report["fooled_by"].count("apgd-ce")
        n_after_t = n_after_ce - report["fooled_by"].count("apgd-t")
        self.assertEqual(list(n_at_start), ["apgd-ce", "apgd-t", "square"])
        self.assertEqual(n_at_start, {"apgd-ce": 60, "apgd-t": n_after_ce, "square": n_after_t})

    def test_an_image_that_is_wrong_already_is_not_attacked(self):
        net, index, x, y = half_robust()
        is_wrong = index % 9 == 0
        fooled, x_adv, report = run_autoattack(net, x, y, steps=5, queries=20)
        self.assertFalse(fooled[is_wrong].any())
        self.assertEqual(report["forwards"][is_wrong].unique().tolist(), [3])
        self.assert_same(report["robust"], ~is_wrong & ~fooled)
        self.assert_same(x_adv[is_wrong], x[is_wrong])

    def test_nan_logits_are_wrong_on_x_and_fool_beside_it(self):
        net = linear()
        x, y = images_of(net)

        def broken(points):
            """NaN in the highest logit, which argmax takes, but for the images x[1:] themselves."""
            logits = net(points)
            whole = (points[:, None] == x[1:]).flatten(2).all(2).any(1)
            highest = logits == logits.amax(1, keepdim=True)
            return torch.where(highest & ~whole[:, None], math.nan, logits)

        for last in (False, True):
            _, report = pgd_search(broken, x, y, eps=0.01, step_size=0.01, steps=1, last_iterate=last)
            self.assertEqual(report["clean"].tolist(), [-1, *y[1:]])
            self.assertFalse(report["robust"].any())
        for attack in ("apgd-ce", "apgd-t", "square"):  # FAB leaves the ball on its way
            fooled, _, report = run_autoattack(broken, x, y, eps=0.01, attacks=attack)
            with self.subTest(attack):
                self.assertEqual(report["clean"].tolist(), [-1, *y[1:]])
                self.assertTrue(fooled[1:].all())


class TestRefusals(TensorCase):
    def test_what_makes_an_attack_weak_or_breaks_it_ends_in_a_sentence(self):
        net = linear(2)
        x, y = images_of(net, 6)
        train_mode = nn.Sequential(net, nn.Dropout())
        train_mode.eval()[1].train()  # a single module

        def pair(x):
            return net(x), x

        def flat(x):
            return net(x)[:, 0]

        attacks = {"pgd": partial(pgd, step_size=0.1, steps=1),
                   "pgd_search": partial(pgd_search, step_size=0.1, steps=1),
                   "autoattack": autoattack}
        every = "pgd pgd_search autoattack"
        searches = "pgd_search autoattack"
        for names, words, changes in (
                (every, "train mode.*eval", {"model": train_mode}),
                (searches, "train mode.*eval", {"verify": train_mode}),
                (every, "pixels run from -0.01", {"x": x - 0.01 - x.amin()}),
                (every, "pixels run from .* to 1.01", {"x": x + 1.01 - x.amax()}),
                (every, "pixels run from nan", {"x": x * math.nan}),
                (every, "float64; attacks need .*float32", {"x": x.double()}),
                (every, r"uint8; attacks need .*x.float\(\) / 255", {"x": x.byte()}),
                (every, r"need \(N, C, H, W\)", {"x": x[0]}),
                (searches, "images are a list; .* torch.Tensor", {"x": x.tolist()}),
                (every, r"int32; attacks need \(6,\) torch.int64", {"y": y.int()}),
                (every, r"\(5,\) .*; attacks need \(6,\)", {"y": y[:5]}),
                (every, "labels run from . to 2; .* 2 classes", {"y": y + 2 - y.amax()}),
                (every, "labels run from -1 to .; .* 2 classes", {"y": y - 1 - y.amin()}),
                (every, "gives a tuple; attacks need its logits", {"model": pair}),
                (every, r"gives \(6,\); attacks need logits, \(6, K\)", {"model": flat}),
                (every, "eps is 8; .*fraction.*8 / 255", {"eps": 8}),
                (every, "eps is -0.03; .*fraction", {"eps": -0.03}),
                (every, "eps is nan; .*fraction", {"eps": math.nan}),
                ("pgd pgd_search", "step_size is 2; .*fraction", {"step_size": 2}),
                (every, "steps is -1; .* 0 or more", {"steps": -1}),
                ("autoattack", "queries is -1; .* 0 or more", {"queries": -1}),
                ("pgd_search", "restarts is 0; .* 1 or more", {"restarts": 0}),
                ("pgd_search", "restarts is 2.*restarts=1", {"restarts": 2, "last_iterate": True}),
                (searches, r"index is \(2,\); attacks need \(6,\)", {"index": [0, 1]}),
                ("autoattack", "attack fab is unknown; use .*fab-t", {"attacks": "fab"})):
            for name in names.split():
                arguments = {"model": net, "x": x, "y": y, "eps": 0.1} | changes
                with self.subTest(words, attack=name):
                    refuses(self, ValueError, words, attacks[name], **arguments)

    def test_pixels_that_are_outside_by_rounding_are_accepted(self):
        net = linear(2)
        x_adv = pgd(net, torch.full((2, 3, 4, 4), 1 + 5e-7), torch.tensor([0, 1]), 0.1, 0.03, 4)
        self.assertLessEqual(x_adv.max(), 1)


# data

def grey_ramp(width, height):
    """A picture of 16-bit greys, from black on the left to almost white, as (height, width) numbers."""
    row = np.linspace(0, 65_000, width).astype(np.uint16)
    return np.broadcast_to(row, (height, width)).copy()


def save_all_kinds(folder, picture):
    """The kinds of pictures that a data set may hold, saved in a folder: five files."""
    picture.convert("CMYK").save(folder / "cmyk.JPEG")
    picture.convert("L").save(folder / "grey.JPEG")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(grey_ramp(*picture.size)).save(folder / "sixteen.png")


def cut_short(file):
    """As an interrupted copy leaves it: its last 100 bytes are missing."""
    content = file.read_bytes()
    file.write_bytes(content[:-100])


def mean_difference(picture, other):
    """Between two pictures, in 1/255."""
    difference = np.asarray(picture).astype(int) - np.asarray(other)
    return np.abs(difference).mean()


class TestSubsets(TensorCase):
    """Which images are used, and in which order."""

    def test_the_permutation_behind_limit_and_holdout_never_changes(self):
        self.assertEqual(data.subset(1000, 8).tolist(), [37, 44, 209, 500, 675, 719, 775, 947])
        self.assertEqual(data.subset(50_000, 4).tolist(), [11341, 36044, 37807, 49165])
        train, held_out = data.hold_out(100, limit=12, holdout=3)
        self.assertEqual(train.tolist(), [19, 37, 42, 44, 53, 69, 71, 81, 90, 91, 93, 95])
        self.assertEqual(held_out.tolist(), [51])

    def test_the_order_of_an_epoch_never_changes(self):
        batches = data.epoch_batches(torch.arange(20, 30), epoch=3, seed=7, batch_size=5)
        self.assertEqual(batches.tolist(), [[29, 25, 26, 21, 27], [20, 24, 28, 23, 22]])

    def test_held_out_images_are_at_most_a_tenth_and_never_trained_on(self):
        for n, limit, holdout in itertools.product((1000, 15), (None, 200, 950), (0, 50, 90, 500)):
            with self.subTest(n=n, limit=limit, holdout=holdout):
                train, held_out = data.hold_out(n, limit, holdout)
                n_asked = n if limit is None else min(n, limit)
                self.assertEqual(len(held_out), min(holdout, n_asked // 10))
                self.assertEqual(len(train), min(n_asked, n - len(held_out)))
                self.assertFalse(set(train.tolist()) & set(held_out.tolist()))

    def test_the_batches_of_an_epoch_are_full_or_one_that_splits_over_the_processes(self):
        for n, batch_size, world, sizes in (
                (11, 5, 1, [5, 5]), (15, 8, 2, [8]), (16, 8, 2, [8, 8]), (4, 2, 2, [2, 2]),
                (8, 8, 1, [8]), (7, 128, 1, [7]), (7, 128, 2, [6]), (7, 128, 3, [6]),
                (3, 128, 2, []), (1, 128, 1, []), (0, 128, 1, [])):  # BatchNorm needs two a process
            with self.subTest(n=n, batch_size=batch_size, world=world):
                batches = data.epoch_batches(torch.arange(n), 0, 0, batch_size, world)
                self.assertEqual([len(batch) for batch in batches], sizes)


# The first picture of each class at 16 pixels: red, green and blue at (8, 8)
TEST_CENTRES = [
    [210, 109, 148], [82, 78, 62], [197, 187, 113], [60, 66, 64], [103, 126, 104],
    [95, 145, 156], [147, 159, 180], [120, 112, 175], [69, 47, 60], [82, 52, 57]]
TRAIN_CENTRES = [
    [133, 77, 76], [85, 46, 50], [121, 176, 109], [79, 75, 61], [77, 150, 136],
    [87, 136, 105], [79, 166, 198], [114, 101, 112], [45, 64, 70], [94, 75, 45]]


class TestShapes(TensorCase):
    """The data set that data.py draws itself."""

    def test_the_pictures_never_change(self):
        for training, centres in ((False, TEST_CENTRES), (True, TRAIN_CENTRES)):
            with self.subTest(training=training):
                x, y = data.draw_shapes(10, 16, training)
                self.assertEqual(y.tolist(), list(range(10)))
                # By at most 1, since the cosine of another processor may end in another bit
                self.assert_close(x[:, :, 8, 8].long(), torch.tensor(centres), delta=2)

    def test_large_pictures_are_drawn_a_few_at_a_time_and_never_change(self):
        x, _ = data.draw_shapes(18, 256, train=True)  # 16 at a time: the last is in the second part
        row = [101, 105, 114, 109, 104, 119, 102, 103, 113, 93, 117, 100, 96, 106, 114, 97]
        self.assert_close(x[17, 0, 128, 120:136].long(), torch.tensor(row), delta=2)


class TestFolders(TemporaryFolder):
    """What an image folder is read as, and which data are refused."""

    def load(self, **settings):
        return data.load("imagenet", self.root, res=32, **settings)

    def test_the_order_and_the_numbers_are_torchvisions(self):
        image_folder(self.root, classes=("owl", "Cat", "dog10", "dog9"), n=11)
        nested = self.root / "train/dog9/a/dogs"
        nested.mkdir(parents=True)
        for name in ("a.PNG", "b.bmp", "c.webp"):
            gradient_picture().save(nested / name)
        expected = torchvision.datasets.ImageFolder(self.root / "train")
        images = self.load()
        self.assertEqual(images.classes, expected.classes)
        self.assertEqual(images.y.tolist(), expected.targets)
        files = [str(images.file(index)) for index in range(images.n)]
        self.assertEqual(files, [path for path, _ in expected.samples])

    def test_hidden_folders_are_no_classes_and_hidden_files_no_pictures_but_the_root_may_be_hidden(self):
        self.root = image_folder(self.root / ".cache")
        expected = self.load()
        for hidden in (".ipynb_checkpoints/cat0.JPEG", "cat/.ipynb_checkpoints/cat0.JPEG",
                       "cat/._cat0.JPEG"):
            copy = self.root / "train" / hidden
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(self.root / "train/cat/cat0.JPEG", copy)
        images = self.load()
        self.assertEqual(images.classes, ["cat", "dog", "owl"])
        self.assertEqual(images.paths.tolist(), expected.paths.tolist())

    def test_each_real_folder_comes_once_whatever_links_lead_to_it(self):
        image_folder(self.root)
        image_folder(self.root / "elsewhere", classes=["more"], n=2)
        expected = self.load()
        links = (("cat/again", "."), ("cat/loop", ".."), ("cat/dogs", "../dog"), ("owl/top", "../.."))
        for name, target in links:
            (self.root / "train" / name).symlink_to(target)
        self.assertEqual(self.load().paths.tolist(), expected.paths.tolist())
        for name in ("owl/more", "owl/more again"):
            (self.root / "train" / name).symlink_to(self.root / "elsewhere/train/more")
        added = set(self.load().paths.tolist()) - set(expected.paths.tolist())
        self.assertEqual(added, {"owl/more/more0.JPEG", "owl/more/more1.JPEG"})

    def test_what_is_left_out_is_said_in_one_line(self):
        image_folder(self.root)
        (self.root / "train/cat/one.jfif").touch()
        (self.root / "train/cat/two.txt").touch()
        locked = PermissionError(13, "Permission denied", str(self.root / "train/dog"))

        def walk(top, onerror):
            onerror(locked)  # the superuser, who may run this, can read every folder
            return walk_of_os(top)

        walk_of_os = os.walk
        with mock.patch("os.walk", walk), contextlib.redirect_stdout(io.StringIO()) as text:
            self.load()
        self.assertRegex(text.getvalue(), r"\Aleft out files or folders: 3, .*dog \(Permission.*\n\Z")

    def test_data_that_do_not_exist_or_do_not_fit_are_refused(self):
        image_folder(self.root / "three")
        image_folder(self.root / "one", classes=["cat"])
        image_folder(self.root / "hole")
        (self.root / "hole/train/bat").mkdir()
        image_folder(self.root / "twice")
        (self.root / "twice/train/zebra").symlink_to("cat")
        (self.root / "no class/train").mkdir(parents=True)
        (self.root / "no class/train/cat.JPEG").touch()
        (self.root / "no image/train/cat").mkdir(parents=True)
        no_images = "no images under .*--data-dir.*--data shapes"
        for name, folder, settings, words in (
                ("imagenet", "missing", {}, no_images),
                ("imagenet", "no class", {}, no_images),
                ("imagenet", "no image", {}, no_images),
                ("imagenet", "hole", {}, "train/bat holds no image of its own"),
                ("imagenet", "twice", {}, "train/zebra holds no image of its own"),
                ("imagenet", "one", {}, "one class, cat; give .* two or more"),
                ("imagenet", "three", {"classes": ["cat", "owl"]}, "unknown classes, e.g. dog"),
                ("imagenet", "three", {"res": 8}, "--res 8"),
                ("mnist", "", {}, "mnist.*shapes"),
                ("cifar10", "", {}, "--data-dir, or add --download"),
                ("cifar10", "", {"download": True}, "cannot fetch CIFAR-10 .*no network.*by hand"),
                ("cifar10", "", {"res": 64}, "--res 64"),
                ("shapes", "", {"download": True}, "cifar10 only")):
            with self.subTest(name=name, folder=folder, **settings):
                with mock.patch("data.CIFAR10", side_effect=URLError("no network")):
                    refuses(self, SystemExit, words, data.load, name, self.root / folder, **settings)

    def test_the_classes_of_a_trained_network_map_by_name_and_one_of_them_is_enough(self):
        image_folder(self.root, classes=["dog"], split="val")
        images = self.load(train=False, classes=["cat", "owl", "dog"])
        self.assertEqual(images.classes, ["cat", "owl", "dog"])
        self.assertEqual(images.y.tolist(), [2] * 5)

    def test_evaluation_crops_off_32_pixels_and_below_224_a_seventh_of_the_resolution(self):
        for res, shorter_side in ((224, 256), (299, 331), (380, 412), (64, 73), (32, 36)):
            with self.subTest(res=res):
                picture = gradient_picture(shorter_side, shorter_side)  # so that nothing is resized
                x = data.eval_transform(res)(picture)
                expected = torchvision.transforms.CenterCrop(res)(picture)
                self.assertTrue(np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(expected)))

    def test_pictures_of_all_kinds_become_rgb(self):
        picture = gradient_picture(256)
        save_all_kinds(self.root, picture)
        eight_bits = Image.fromarray((grey_ramp(*picture.size) / 256).astype(np.uint8))
        for name, expected in (("cmyk.JPEG", picture), ("grey.JPEG", picture.convert("L")),
                               ("palette.png", picture.convert("P")), ("alpha.png", picture),
                               ("sixteen.png", eight_bits)):
            with self.subTest(name):
                seen = data.read_picture(self.root / name)
                self.assertEqual(seen.mode, "RGB")
                self.assertLess(mean_difference(seen, expected.convert("RGB")), 3)

    def test_pixels_that_may_not_fit_8_bits_are_refused(self):
        for dtype, mode in (("float32", "F"), ("int32", "I")):
            with self.subTest(dtype):
                Image.fromarray(np.ones((8, 8), dtype)).save(self.root / "cat.tif")
                refuses(self, ValueError, f"mode {mode}", data.read_picture, self.root / "cat.tif")


class TestBatches(TensorCase):
    """What training and evaluation are given, from memory and from files."""

    @classmethod
    def setUpClass(cls):
        cls.root = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.root)
        image_folder(cls.root)
        save_all_kinds(cls.root / "train/dog", gradient_picture())
        cls.folder = data.load("imagenet", cls.root, res=32)  # 5 cats, 10 dogs, 5 owls
        cls.shapes = data.load("shapes", res=16, train=False)

    def pixels_of(self, images, members, batches):
        """The pixels of each of `members`, in their order; each must be there once, with its label."""
        indices, xs, ys = zip(*batches)
        index = torch.cat(indices)
        x = torch.cat(xs)
        y = torch.cat(ys)
        self.assertEqual(index.sort().values.tolist(), list(members))
        self.assert_same(y, images.y[index])
        return x[index.argsort()]

    def test_a_crop_is_that_of_a_plain_loop(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(1, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
        u = torch.rand(40, 3, generator=generator)
        images = data.Images(["one"], 8, torch.zeros(40, dtype=torch.long), x)
        with mock.patch("data.uniform", return_value=u):
            (index, cropped, _), = data.train_batches(images, torch.arange(40), 40, 1)
        for i, number in enumerate(index.tolist()):
            top = int(u[i, 0] * 9)
            left = int(u[i, 1] * 9)
            padded = torch.zeros(3, 16, 16, dtype=torch.uint8)
            padded[:, 4:12, 4:12] = x[number]
            expected = padded[:, top: top + 8, left: left + 8]
            if u[i, 2] >= 0.5:
                expected = expected.flip(2)
            self.assert_same(cropped[i], expected / 255)

    def test_a_stream_that_starts_late_is_the_tail_of_the_whole(self):
        members = torch.arange(20)  # with 6 a batch: three batches an epoch
        for name, images, settings in (("shapes", self.shapes, {}),
                                       ("autoaugment", self.shapes, {"autoaugment": True}),
                                       ("files", self.folder, {}),
                                       ("files, workers", self.folder, {"workers": 2})):
            whole = list(data.train_batches(images, members, 6, epochs=3, seed=1, **settings))
            self.assertEqual(len(whole), 9)
            for epoch, step in ((1, 2), (1, 3), (2, 0)):
                with self.subTest(name, epoch=epoch, step=step):
                    tail = list(data.train_batches(images, members, 6, epochs=3, seed=1,
                                                   start=(epoch, step), **settings))
                    expected = whole[3 * epoch + step:]
                    self.assertEqual(len(tail), len(expected))
                    for tensors, expected_tensors in zip(tail, expected):
                        self.assertTrue(all(map(torch.equal, tensors, expected_tensors)))

    def test_a_stream_moves_nobody_elses_random_numbers(self):
        for name, images, more in (("autoaugment", self.shapes, {"autoaugment": True}),
                                   ("files", self.folder, {}),
                                   ("workers", self.folder, {"workers": 1})):
            with self.subTest(name):
                before = torch.get_rng_state()
                for _ in data.train_batches(images, torch.arange(10), 5, 1, **more):
                    pass
                self.assert_same(torch.get_rng_state(), before)

    def test_augmentation_belongs_to_the_image_whatever_the_batch_and_the_process(self):
        for name, images in (("shapes", self.shapes), ("files", self.folder)):
            with self.subTest(name):
                members = torch.arange(18)
                alone = data.train_batches(images, members, 6, 1)
                in_three = []
                for rank in range(3):
                    in_three += data.train_batches(images, members, 18, 1, rank=rank, world=3)
                x = self.pixels_of(images, range(18), alone)
                x_in_three = self.pixels_of(images, range(18), in_three)
                self.assert_same(x, x_in_three)

    def test_one_file_under_several_numbers_is_augmented_each_time_in_another_way(self):
        y = torch.zeros(9, dtype=torch.long)
        images = data.Images(["one"], 16, y, root=self.root, paths=np.array(["train/cat/cat0.JPEG"] * 9))
        _, x, _ = next(data.train_batches(images, torch.arange(9), 9, 1))
        self.assertEqual((x.shape, x.dtype), ((9, 3, 16, 16), torch.float32))
        self.assertGreater(len(x.flatten(1).unique(dim=0)), 6)

    def test_another_epoch_or_seed_augments_anew(self):
        for name, images in (("shapes", self.shapes), ("files", self.folder)):
            members = torch.arange(20)
            x = self.pixels_of(images, range(20), data.train_batches(images, members, 5, 1))
            for epoch, seed in ((1, 0), (0, 1)):
                with self.subTest(name, epoch=epoch, seed=seed):
                    batches = data.train_batches(images, members, 5, epoch + 1, seed, start=(epoch, 0))
                    x_anew = self.pixels_of(images, range(20), batches)
                    changed = (x != x_anew).flatten(1).any(1)
                    self.assertGreater(changed.float().mean(), 0.85)

    def test_evaluation_is_in_order_whole_and_not_augmented(self):
        def from_file(number):
            return data.eval_transform(32)(data.read_picture(self.folder.file(number)))

        members = torch.tensor([3, 4, 7, 12, 13, 14, 19])
        shapes = self.shapes.x[members]
        pictures = torch.stack([from_file(number) for number in members.tolist()])
        for name, images, workers, expected in (("shapes", self.shapes, 0, shapes),
                                                ("files", self.folder, 0, pictures),
                                                ("workers", self.folder, 2, pictures)):
            with self.subTest(name):
                indices, xs, ys = zip(*data.eval_batches(images, members, 3, workers))
                self.assertEqual([len(index) for index in indices], [3, 3, 1])
                self.assert_same(torch.cat(indices), members)
                self.assert_same(torch.cat(xs), expected / 255)
                self.assert_same(torch.cat(ys), images.y[members])


class TestUnreadable(TemporaryFolder):
    """Training goes on without a damaged file, evaluation stops."""

    def setUp(self):
        super().setUp()
        image_folder(self.root, classes=("cat", "dog"))  # numbers 0 to 4 and 5 to 9
        cut_short(self.root / "train/dog/dog1.JPEG")
        (self.root / "train/dog/dog2.JPEG").write_text("not an image")
        (self.root / "train/dog/dog4.JPEG").write_text("not an image")
        self.images = data.load("imagenet", self.root, res=32)
        self.enterContext(contextlib.redirect_stdout(io.StringIO()))

    def test_in_training_the_next_member_replaces_an_unreadable_one_and_the_first_the_last(self):
        seen = []
        for index, _, y in data.train_batches(self.images, torch.arange(10), 5, epochs=1):
            seen += index.tolist()
            self.assert_same(y, self.images.y[index])
        self.assertEqual(sorted(seen), [0, 0, 1, 2, 3, 4, 5, 8, 8, 8])  # 8 for 6 and 7, 0 for 9

    def test_the_worker_names_them_with_the_reason_and_evaluation_stops(self):
        program = ("import sys, torch, data; images = data.load('imagenet', sys.argv[1], res=32); "
                   "members = torch.tensor([6, 7, 8]); "
                   "list(data.train_batches(images, members, 3, 1, workers=1)); "
                   "list(data.eval_batches(images, members, 3, workers=1))")
        dogs = os.fsencode(self.root) + b"/train/dog/"
        os.rename(dogs + b"dog1.JPEG", dogs + b"dog1\xe9.JPEG")  # this name is not UTF-8
        process = subprocess.run([sys.executable, "-W", "ignore", "-c", program, self.root], cwd=ROOT,
                                 capture_output=True, text=True)
        self.assertRegex(process.stdout, r"cannot read .*dog1\\xe9.JPEG \(.*truncated.*training takes")
        self.assertRegex(process.stdout, r"cannot read .*dog2.JPEG \(not an image\); training takes")
        assert_sentence(self, process.stderr.strip(), r"cannot read .*dog1\S*.JPEG .*change the score")

    def test_training_stops_where_nothing_can_be_read(self):
        batches = data.train_batches(self.images, torch.tensor([6, 7]), 2, 1)
        refuses(self, SystemExit, "cannot read .*dog.*is the disk", list, batches)

    def test_a_mistake_in_a_transform_is_not_taken_for_a_damaged_file(self):
        with mock.patch("data.train_transform", return_value=len):  # a picture has no length
            batches = data.train_batches(self.images, torch.tensor([0, 1]), 2, 1)
            self.assertRaises(TypeError, list, batches)


class SessionOf(torch.utils.data.Dataset):
    """Any item -> the session of the process that reads it."""

    def __getitem__(self, item):
        return os.getsid(0)


class Enormous(torch.utils.data.Dataset):
    """Any item -> a tensor that takes no memory, of which two cannot be stacked on any machine."""

    def __getitem__(self, item):
        return torch.zeros(1, dtype=torch.uint8).expand(2**50)


def die(_):
    """What the system does to a worker where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


class TestWorkers(TemporaryFolder):
    """No worker outlives its work, and no process waits for a dead one."""

    def test_a_worker_has_a_session_of_its_own_that_no_ctrl_c_reaches(self):
        sessions, = data.from_workers(SessionOf(), [[0, 1]], workers=1)
        self.assertNotEqual(sessions[0], os.getsid(0))

    def test_a_worker_that_dies_is_named_with_what_to_do(self):
        with mock.patch("data.leave_session", die):  # every worker's first call
            batches = data.from_workers(SessionOf(), [[0]], workers=1)
            sentence = "DataLoader worker.*(killed|exited).*fewer than --workers 1"
            refuses(self, SystemExit, sentence, list, batches)

    def test_a_batch_that_does_not_fit_into_shared_memory_ends_it(self):
        batches = data.from_workers(Enormous(), [[0, 1]], workers=1)
        refuses(self, SystemExit, "no room in /dev/shm.*fewer --workers.*--shm-size", list, batches)
        self.assertEqual(multiprocessing.active_children(), [])


class TestFingerprint(TemporaryFolder):
    """How a run and a ledger (an evaluation's file of verdicts) recognise their images."""

    def setUp(self):
        super().setUp()
        image_folder(self.root / "data")
        self.file = self.root / "data/train/dog/dog3.JPEG"

    def load(self, name="data"):
        return data.load("imagenet", self.root / name, res=32)

    def test_another_size_of_a_file_changes_it_but_not_the_names(self):
        before = self.load()
        fingerprint = before.fingerprint()
        self.file.write_bytes(self.file.read_bytes() + b".")
        self.assertNotEqual(self.load().fingerprint(), fingerprint)
        self.assertEqual(self.load().names_hash(), before.names_hash())

    def test_another_folder_or_date_does_not_change_it(self):
        before = self.load().fingerprint()
        shutil.copytree(self.root / "data", self.root / "elsewhere")
        os.utime(self.root / "elsewhere/train/dog/dog3.JPEG", (0, 0))
        self.assertEqual(self.load("elsewhere").fingerprint(), before)

    def test_another_pixel_in_memory_changes_it(self):
        images = data.load("shapes", res=16, train=False)
        before = images.fingerprint()
        images.x[7, 1, 3, 3] ^= 1
        self.assertNotEqual(images.fingerprint(), before)

    def test_names_change_with_label_file_name_class_and_number_of_images(self):
        folder = self.root / "data/train"
        digests = {self.load().names_hash()}
        for old, new in (("dog/dog3.JPEG", "dog/dog9.JPEG"), ("dog/dog9.JPEG", "cat/dog9.JPEG"),
                         ("cat/cat1.JPEG", "cat/more/cat1.JPEG")):
            (folder / new).parent.mkdir(exist_ok=True)
            (folder / old).rename(folder / new)
            digests.add(self.load().names_hash())
        (folder / "cat/dog9.JPEG").unlink()
        fewer = self.load()
        digests.add(fewer.names_hash())
        fewer.y[0] = 2
        digests.add(fewer.names_hash())
        self.assertEqual(len(digests), 6)


class TestShrink(TemporaryFolder):
    """python data.py shrink FROM TO."""

    def setUp(self):
        super().setUp()
        self.source = self.root / "large"
        self.target = self.root / "small"
        image_folder(self.source, classes=["cat"], n=5)  # 40 pixels and so small enough
        gradient_picture(150, 50).save(self.source / "train/cat/wide.JPEG")  # and so is this
        self.large = self.source / "val/dog"  # here every picture has to shrink
        self.large.mkdir(parents=True)
        save_all_kinds(self.large, gradient_picture(150, 100))

    def shrink(self, *more):
        """The command -> what it printed, its exit code or sentence."""
        flags = ("shrink", self.source, self.target, "--short", 64, "--workers", 0, *more)
        with mock.patch("sys.stderr"):
            return quietly(data.main, *flags)

    def test_every_picture_is_there_by_its_name_and_small_enough_or_the_same_file(self):
        (self.large / "notes.txt").write_text("no picture")
        (self.large / "._grey.JPEG").write_text("no picture")
        text, code = self.shrink()
        self.assertEqual(code, 0, text)
        expected = files_below(self.source)
        del expected["val/dog/notes.txt"], expected["val/dog/._grey.JPEG"]
        self.assertEqual(files_below(self.target).keys(), expected.keys())
        for name, content in files_below(self.target).items():
            if name.startswith("val/dog"):
                with Image.open(self.target / name) as picture:
                    self.assertEqual(min(picture.size), 64)
            else:
                self.assertEqual(content, expected[name])

    def test_the_loader_sees_in_a_shrunk_picture_what_it_saw_in_the_large_one(self):
        self.shrink()
        resize = torchvision.transforms.Resize(64, data.LANCZOS)
        for name, most in (("cmyk.JPEG", 1.5), ("grey.JPEG", 1.5), ("palette.png", 0), ("alpha.png", 0),
                           ("sixteen.png", 0)):
            with self.subTest(name):
                expected = resize(data.read_picture(self.large / name))
                seen = data.read_picture(self.target / "val/dog" / name)
                self.assertLessEqual(mean_difference(seen, expected), most)

    def test_after_ctrl_c_the_same_command_goes_on_and_leaves_finished_pictures_alone(self):
        interrupted = [gradient_picture(), gradient_picture(), KeyboardInterrupt]
        with mock.patch("data.read_picture", side_effect=interrupted):
            _, sentence = self.shrink()
        self.assertIn("the same command goes on", sentence)
        finished = list(files_below(self.target))
        self.assertEqual(len(finished), 2)
        for name in finished:
            (self.target / name).write_text("finished")
        text, code = self.shrink()
        self.assertEqual(code, 0)
        self.assertIn("2 of 11", text)
        found = files_below(self.target)
        self.assertEqual(len(found), 11)
        self.assertEqual([found[name] for name in finished], [b"finished", b"finished"])

    def test_unreadable_pictures_are_skipped_and_named_and_make_the_exit_code_1(self):
        cut_short(self.large / "grey.JPEG")
        (self.source / "train/cat/cat1.JPEG").write_text("no picture, and a small file")
        text, code = self.shrink()
        self.assertEqual(code, 1)
        self.assertRegex(text, r"skipped .*cat1.JPEG \(not an image\)\n")
        self.assertRegex(text, r"skipped .*grey.JPEG \(.*truncated.*\)\n")
        self.assertIn("2 unreadable", text)
        self.assertEqual(len(files_below(self.target)), 9)

    def test_a_missing_or_empty_source_and_wrong_numbers_are_refused(self):
        self.assertEqual(self.shrink("--short", 0)[1], 2)  # argparse's exit code
        self.assertEqual(self.shrink("--workers", -1)[1], 2)
        self.source = self.root / "missing"
        self.assertIn("no pictures below", self.shrink()[1])

    def test_a_full_disk_ends_it_with_a_sentence(self):
        full = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch("data.write_whole", side_effect=full):
            _, sentence = self.shrink()
        words = r"cannot write .*small.*cat0.JPEG \(No space left on device\); .*the same command"
        assert_sentence(self, sentence, words)


# train

def flags_of(text):
    """train.py's flags as its command line gives them -> args."""
    return train.get_args(text.split())


class TestTrainFlags(TemporaryFolder):
    def test_recipes_are_the_papers(self):
        baseline = dict(  # Sec. 3.1
            data="imagenet", arch="resnet50", act="silu", epochs=100, batch_size=1024, lr=0.4, wd=1e-4,
            eps=4, steps=1, step_size=4, res=224, label_smoothing=0, nesterov=False, dropout=0,
            clean_start=0, autoaugment=False, ema=False, initial="sat", decay="weights")
        enhanced = dict(  # Sec. 5.2, and one flag that wins over it
            wd=1e-5, epochs=200, dropout=0.5, stochastic_depth=0.2, res=600, autoaugment=True,
            early_stop=True, ema=False)
        small = dict(eps=8, step_size=8, res=32, initial="torch", decay="all")
        for text, recipe in (("", baseline),
                             ("--arch efficientnet_l1 --enhanced --no-ema", enhanced),
                             ("--data cifar10", dict(small, arch="resnet18")),
                             ("--data shapes --eps 3", dict(small, arch="resnet8", eps=3))):
            with self.subTest(text):
                args = vars(flags_of(text))
                self.assertEqual(args, args | recipe)

    def test_the_learning_rate_follows_its_schedule(self):
        # {epoch: the rate at its first step of 1,000}; 2.5 is the middle of the third epoch. In the five
        # epochs of warm-up the step itself counts already: 0.4 * (0 + 0.001) / 5 = 8e-5
        for text, rates in (
                ("", {0: 8e-5, 2.5: 0.20008, 5: 0.4, 29: 0.4, 30: 0.04, 60: 0.004, 90: 0.0004}),
                ("--epochs 200", {59.9: 0.4, 60: 0.04}),
                ("--lr 3 --warmup-epochs 0", {0: 3, 29.9: 3, 30: 0.3}),
                ("--data cifar10", {3: 0.1, 6: 0.2, 10.5: 0.1, 15: 0})):  # one cycle
            for epoch, lr in rates.items():
                with self.subTest(text, epoch=epoch):
                    self.assertAlmostEqual(train.lr_at(flags_of(text), epoch, 0, 1000), lr, 4)

    def test_wrong_flags_get_one_sentence_and_leave_no_run(self):
        (self.root / "file").touch()
        for text, words in (
                ("--eps nan", "--eps nan is out of range"),
                ("--step-size 0", "--step-size 0 is no attack"),
                ("--dropout 1.1", "--dropout 1.1 is not a fraction"),
                ("--limit 13 --batch-size 64 --accum 8", "13 images .* parts of fewer than two"),
                ("--batch-size 1", "a batch of 1 images .* parts of fewer than two"),
                ("--batch-size 10 --accum 3", "use 9 or 12"),
                ("--early-stop --holdout 0", "--early-stop needs held-out images; use --holdout"),
                ("--mean 1 2 nan", "mean"),
                ("--early-stop --limit 9", "--early-stop needs held-out images, .* a tenth of 9"),
                ("--stochastic-depth 0.2", "EfficientNet"),
                ("--act-alpha 2 --act silu", "silu has no alpha"),
                ("--smooth-backward both --act silu", "use --act relu"),
                ("--compile --dtype bf16 --device cpu", "use --dtype fp32 or --no-compile"),
                ("--compile --dtype fp32 --device cpu", "needs a C.. compiler.*--no-compile"),
                ("--device tpu", "--device tpu"),
                ("--data imagenet --res 32 --data-dir nowhere", "under nowhere"),
                ("--download", "cifar10"),
                ("--init nowhere.pt", "no file nowhere.pt"),
                ("--out ' '", "--out is empty"),
                ("--out file", "cannot write into file .*choose another --out")):
            with self.subTest(text), mock.patch("shutil.which", return_value=None):  # no compiler
                with contextlib.chdir(self.root):
                    _, sentence = quietly(train.main, *"--data shapes --res 16".split(),
                                          *shlex.split(text))
                assert_sentence(self, sentence, words)
                # Empty logs may be there: train.py opens them first, to lock the folder
                for content in files_below(self.root).values():
                    self.assertEqual(content, b"")


class TestTrainPieces(TensorCase):
    """The functions that main calls, each by itself."""

    def setUp(self):
        torch.manual_seed(0)

    def test_weights_decay_or_all_parameters_but_never_an_alpha(self):
        net = build("efficientnet_b0", "smoothrelu")
        for decay, decayed_ndims, other_ndims in (("weights", {2, 4}, {0, 1}), ("all", {1, 2, 4}, {0})):
            with self.subTest(decay):
                decayed, others = train.parameter_groups(net, 1e-4, decay)
                self.assertEqual((decayed["weight_decay"], others["weight_decay"]), (1e-4, 0))
                self.assertEqual({p.ndim for p in decayed["params"]}, decayed_ndims)
                self.assertEqual({p.ndim for p in others["params"]}, other_ndims)  # 0: alphas
                n = len(decayed["params"]) + len(others["params"])
                self.assertEqual(n, len(list(net.parameters())))

    def test_the_network_is_built_as_the_flags_say(self):
        text = ("--data shapes --arch resnet20 --act elu --act-alpha 2 --dropout 0.3 --bn-eps 0.1 "
                "--stochastic-depth 0.4 --initial torch --mean 1 2 3 --std 4 5 6")
        with mock.patch("train.build") as build:
            train.network(flags_of(text), 10)
        build.assert_called_once_with(
            "resnet20", "elu", 10, act_alpha=2, smooth_backward=False, dropout=0.3, bn_eps=0.1,
            stochastic_depth=0.4, small_input=True, initial="torch", mean=[1, 2, 3], std=[4, 5, 6])

    def test_one_update_is_a_plain_loop(self):
        args = flags_of("--data shapes --act relu --lr 0.1 --wd 0.01 --steps 2 --step-size 3")
        device = torch.device("cpu")
        x = torch.rand(8, 3, 32, 32)
        y = torch.arange(8)
        net = small()
        optimizer, scaler = train.make_optimizer(args, net, device)
        attack_model, train_model, _ = train.make_views(net, args, device)
        torch.manual_seed(5)
        sums = train.update(args, attack_model, train_model, optimizer, scaler, x, y)

        plain = small().eval()
        torch.manual_seed(5)
        noise = torch.empty_like(x).uniform_(-8 / 255, 8 / 255)
        x_adv = pgd(plain, x, y, eps=8 / 255, step_size=3 / 255, steps=2, noise=noise)
        logits = plain.train()(x_adv)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=0.01).step()
        n_errors = (logits.argmax(1) != y).sum()
        self.assertAlmostEqual(sums[0].item() / 8, loss.item(), 5)
        self.assertEqual(sums[1:].tolist(), [n_errors, 8])  # of 8 images
        self.assert_same_weights(net.state_dict(), plain.state_dict())

    def test_the_smooth_backward_flag_reaches_the_views_it_names_and_never_validation(self):
        views = []

        def keep(*arguments, **settings):
            views.append(attacker_view(*arguments, **settings))
            return views[-1]

        for who, attacker_is_smooth, optimizer_is_smooth in (
                ("none", False, False), ("attacker", True, False),
                ("optimizer", False, True), ("both", True, True)):
            args = flags_of(f"--data shapes --act relu --smooth-backward {who}")
            net = train.network(args, 10)
            with self.subTest(who), mock.patch("train.attacker_view", keep):
                views.clear()
                train.make_views(net, args, torch.device("cpu"))
                expected = (optimizer_is_smooth, attacker_is_smooth, False)
                for view, is_smooth in zip((net, *views), expected, strict=True):
                    relus = [m for m in view.modules() if isinstance(m, ReLU)]
                    self.assertEqual([relu.smooth_backward for relu in relus], 7 * [is_smooth])

    def test_a_compiler_that_is_wrong_is_caught_and_one_that_is_right_is_not(self):
        args = flags_of("--data shapes --act silu")
        net = small(act="silu")
        view = train.attack_view(net, args)
        x = torch.rand(12, 3, 32, 32)
        y = torch.arange(12) % 10
        before = traces(net)
        train.check_compiled(args, net, view, x, y)
        self.assertEqual(traces(net), before)  # nothing of the run moves
        only_one = torch.ones(12, 1)
        only_one[5] = 0
        for name, factor in (("zero", 0), ("NaN", math.nan), ("zero for one image", only_one),
                             ("of the wrong sign", -1)):
            def model(x):
                return with_wrong_slope(view(x), factor)

            with self.subTest(name):
                refuses(self, SystemExit, "gradient is wrong .*--no-compile", train.check_compiled, args,
                        net, model, x, y)

    def test_no_steps_is_normal_training(self):
        x = torch.rand(6, 3, 32, 32)
        x_adv = train.attack(flags_of("--data shapes --steps 0"), None, x, None)
        self.assert_same(x_adv, x)

    def test_a_share_of_the_images_is_attacked_from_the_clean_image(self):
        def flat(x):
            return x.flatten(1)[:, :10] * 0.0  # no slope: the start stays where it is

        x = 0.3 + 0.4 * torch.rand(1000, 3, 2, 2)
        y = torch.zeros(1000, dtype=torch.long)
        for share in (0.0, 0.2, 1.0):
            with self.subTest(share=share):
                args = flags_of(f"--data shapes --clean-start {share}")
                x_adv = train.attack(args, flat, x, y)
                is_clean = (x_adv == x).flatten(1).all(1)
                self.assertAlmostEqual(is_clean.float().mean().item(), share, delta=0.05)

    def test_the_average_follows_its_formula_buffers_too(self):
        net = small()
        ema = small().eval().requires_grad_(False)
        expected = {name: tensor.double() for name, tensor in ema.state_dict().items()}
        for n_updates in (1, 2, 50, 10**6):
            with torch.no_grad():
                for tensor in net.state_dict().values():
                    tensor += 1
            decay = min(0.9999, (1 + n_updates) / (10 + n_updates))
            for name, tensor in net.state_dict().items():
                expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
            train.update_ema(ema, net, n_updates)
        for name, tensor in ema.state_dict().items():
            if name.endswith("num_batches_tracked"):
                self.assertEqual(tensor, net.state_dict()[name])
            else:
                self.assert_close(tensor, expected[name], delta=1e-5)

    def test_the_first_signal_asks_to_stop_and_a_second_one_ends_at_once(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number):
                stop_asked = train.listen()
                self.assertFalse(stop_asked.is_set())
                signal.raise_signal(number)
                self.assertTrue(stop_asked.is_set())
                for second in (signal.SIGINT, signal.SIGTERM):
                    self.assertEqual(signal.getsignal(second), signal.SIG_DFL)


class OneLayer(nn.Module):
    """A network of a fork: no BatchNorm, one layer."""

    def __init__(self, args, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * args.res**2, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


class TrainCase(RunCase):
    """Tests that train."""

    def train(self, text="", *flags, out=None):
        """Train with TINY, the flags of a text, and more -> what was printed, exit code or sentence."""
        return quietly(train.main, *TINY, "--out", out or self.out, *text.split(), *flags)


class TestRun(TrainCase):
    """What a run does, and what it leaves in its folder."""

    def test_the_loss_and_error_of_an_epoch_are_the_means_of_its_steps(self):
        steps = log_of(a_run(), "step")
        for line in log_of(a_run(), "epoch"):
            its_steps = [step for step in steps if step["epoch"] == line["epoch"]]
            self.assertEqual(len(its_steps), 25)
            for name in ("loss", "error"):
                self.assertAlmostEqual(line[name], np.mean([step[name] for step in its_steps]), 5)

    def test_args_json_has_all_flags_and_what_describes_the_data(self):
        saved = train.read_json(a_run() / "args.json")
        args = vars(train.get_args([*TINY, "--out", str(a_run())]))
        self.assertEqual(saved, saved | args)
        self.assertEqual((saved["n_images"], len(saved["classes"])), (6000, 10))
        self.assertEqual((saved["small_input"], saved["processes"]), (True, 1))

    def test_validation_is_a_plain_pgd_10_on_the_held_out_images_and_the_kept_weights(self):
        net = net_of_a_run()
        images = data.load("shapes", train=True, res=16)
        _, held_out = data.hold_out(images.n, 400, 40)
        index, x, y = next(data.eval_batches(images, held_out, 40))
        noise = random_start(x, 2 / 255, 0, index)
        plain = Recorder(net)
        x_adv = pgd(plain, x, y, eps=2 / 255, step_size=0.5 / 255, steps=10, noise=noise)
        correct = net(x).argmax(1) == y
        robust = correct & (net(x_adv).argmax(1) == y)
        second, last = log_of(a_run(), "val")  # every second epoch, and the last
        self.assertEqual(second["epoch"], 2)
        expected = dict(kind="val", epoch=3, n=40, clean=correct.sum() / 40, robust=robust.sum() / 40)
        self.assertEqual(last, expected)
        args = train.get_args([*TINY, "--batch-size", "40"])  # all in one batch, as above
        validated = Recorder(net)
        train.validate(args, validated, images, held_out, 0, torch.device("cpu"), rank=0, world=1)
        for iterate, expected in zip(validated.calls, plain.calls):
            self.assert_same(iterate, expected)

    def test_every_step_draws_anew_and_runs_with_another_activation_draw_the_same(self):
        images = {"silu": [], "gelu": []}
        draws = {"silu": [], "gelu": []}
        for act in images:
            def look(args, model, x, y):
                images[act].append(x)
                draws[act].append(tuple(torch.rand(5).tolist()))  # what a start would be made of
                return x

            with mock.patch("train.attack", look):
                self.train("--limit 64 --epochs 2 --holdout 0 --smooth-backward none --no-ema --act",
                           act, out=self.root / act)
        self.assert_same(torch.stack(images["silu"]), torch.stack(images["gelu"]))
        self.assertEqual(draws["silu"], draws["gelu"])
        self.assertEqual(len(set(draws["silu"])), 8)

    def test_parts_of_a_batch_add_up_to_the_whole(self):
        flags = "--limit 64 --epochs 1 --holdout 0 --no-ema --smooth-backward none --lr 0.5 --steps 0"
        weights = {}
        for accum in (1, 2, 8):
            out = self.root / str(accum)
            with mock.patch("train.network", OneLayer):  # BatchNorm would see the size of the parts
                self.train(flags, "--accum", accum, out=out)
            weights[accum] = load_file(out / "model.pt")["fc.weight"]
        torch.manual_seed(0)
        fresh = OneLayer(train.get_args(TINY), 10).fc.weight
        self.assertGreater((weights[1] - fresh).abs().max(), 0.01)
        for accum in (2, 8):
            with self.subTest(accum=accum):
                self.assert_close(weights[accum], weights[1], delta=1e-6)


class TestRunFolder(TrainCase):
    """Nothing that a run has written is ever written over by accident."""

    def test_a_run_that_cannot_go_on_is_refused_and_stays_as_it_is(self):
        saved = train.read_json(a_run() / "args.json")
        weights = (a_run() / "model.pt").read_bytes()
        state = load_file(a_run() / "last.pt")
        other_network = io.BytesIO()
        torch.save(state | {"model": small("resnet20").state_dict()}, other_network)
        cases = [  # flags, words, which files of a finished run have another content
            ("", "holds a run .*--resume", {}),
            ("--resume --wd 4 --log-every 5",
             r"has --wd 0.0005 \(here 4.0\); --resume needs only --out", {}),
            ("--resume --epochs 5", r"--epochs 3 \(here 5\).*another --out and --init .*model.pt", {}),
            ("--resume", "args.json is damaged", {"args.json": b'{"data": "sha'}),
            ("--resume", "last.pt is no checkpoint", {"last.pt": weights, "last.prev.pt": b""}),
            ("--resume", "not of the network in args.json", {"last.pt": other_network.getvalue()}),
            ("--resume", "damaged.*nothing to go on from",
             {"last.pt": b"garbage", "last.prev.pt": b"garbage"})]
        for name, value, words in (("names", "other", "other file names"),
                                   ("n_images", 5, "another number of images"),
                                   ("classes", ["cat"], "other classes")):
            changed = json.dumps(saved | {name: value})
            cases.append(("--resume", words, {"args.json": changed.encode()}))
        for survivor in ("model.pt", "best.pt", "log.txt", "log.jsonl"):
            emptied = set(train.RUN_FILES) - {"args.json", survivor}  # an empty file counts as absent
            words = f"{survivor}.*no checkpoint to go on from"
            cases.append(("--resume", words, dict.fromkeys(emptied, b"")))
        for flags, words, changes in cases:
            with self.subTest(words):
                shutil.rmtree(self.out, ignore_errors=True)
                self.copy_of_a_run()
                for name, content in changes.items():
                    (self.out / name).write_bytes(content)
                before = files_below(self.out)
                _, sentence = self.train(flags)
                assert_sentence(self, sentence, words)
                self.assertEqual(files_below(self.out), before)

    def test_resume_needs_no_flag_but_the_folder(self):
        with before_step(1, 1, terminate):
            text, _ = self.train("--limit 64")
        text, code = quietly(train.main, "--resume", "--out", self.out)
        self.assertIsNone(code)
        self.assertIn("going on at epoch 2, step 2", text)
        whole = self.root / "whole"
        self.train("--limit 64", out=whole)
        self.assert_same_weights(load_file(self.out / "model.pt"), load_file(whole / "model.pt"))

    def test_resuming_a_finished_run_changes_nothing_but_log_txt(self):
        self.copy_of_a_run()
        _, code = self.train("--resume")
        self.assertIsNone(code)
        unchanged = set(train.RUN_FILES) - {"log.txt"}
        for name in unchanged:
            self.assertEqual((self.out / name).read_bytes(), (a_run() / name).read_bytes(), name)

    def test_a_damaged_checkpoint_gives_way_to_the_one_before(self):
        self.copy_of_a_run()
        whole = (self.out / "last.pt").read_bytes()
        (self.out / "last.pt").write_bytes(whole[:len(whole) // 2])
        text, code = self.train("--resume")
        self.assertIsNone(code)
        self.assertRegex(text, "last.pt is damaged.*going on from .*last.prev.pt")
        weights = load_file(self.out / "last.pt")["model"]
        self.assert_same_weights(weights, load_file(a_run() / "last.pt")["model"])

    def test_two_runs_cannot_write_into_one_folder(self):
        self.out.mkdir()
        with locked_by_another_process(self.out / "log.txt"):
            _, code = self.train("--resume")
        assert_sentence(self, code, "another run writes into")

    def test_a_full_disk_ends_the_run_with_one_sentence_and_the_old_checkpoint_whole(self):
        def fill():
            fill_the_disk(self, 100_000)  # a log fits, a checkpoint does not

        with before_step(1, 1, fill):
            _, code = self.train("--limit 64 --holdout 0 --save-every 0")
        assert_sentence(self, code, "cannot write .*last.pt .*disk full.*--resume")
        self.assertEqual(load_file(self.out / "last.pt")["epoch"], 1)
        self.assertEqual(set(files_below(self.out)) - set(train.RUN_FILES), set())

    def test_a_log_that_cannot_be_written_ends_with_one_sentence(self):
        self.out.mkdir()
        (self.out / "log.txt").symlink_to("/dev/full")
        run = train.Run(SimpleNamespace(out=self.out, resume=False), rank=0)
        with contextlib.redirect_stdout(io.StringIO()):
            refuses(self, SystemExit, "cannot write the log .*disk full", run.log, "a line")


class TestResume(TrainCase):
    """A run that was killed or stopped is, bit for bit, the run that was not."""

    def assert_same_run(self, folder, expected):
        """Two finished runs have the same weights and have logged the same numbers."""
        state = load_file(folder / "last.pt")
        expected_state = load_file(expected / "last.pt")
        self.assert_same_weights(state["model"], expected_state["model"])
        self.assertEqual(state["n_updates"], expected_state["n_updates"])
        if "ema" in expected_state:
            self.assert_same_weights(state["ema"], expected_state["ema"])
        for kind in ("epoch", "val"):
            # A kill between an epoch's line and the save that follows lets it be logged twice: its last
            # line counts
            logged = {line["epoch"]: line for line in log_of(folder, kind)}
            self.assertEqual(logged, {line["epoch"]: line for line in log_of(expected, kind)})

    def test_a_run_that_was_killed_and_then_stopped_ends_as_one_that_was_neither(self):
        killed_at = random.randrange(8, 50)  # of 75 steps
        # The niceness lets the parent see the child's steps in time, however busy the machine is
        kill_in_training(self, self.out, killed_at, "nice", sys.executable, train.__file__, *TINY,
                         "--out", self.out)
        with before_step(2, 20, terminate):
            text, code = self.train("--resume --save-every 0.002")
        self.assertEqual(code, 75, f"killed after {killed_at} steps: {text}")  # 75: go on with --resume
        self.assertRegex(text, r"going on at epoch \d, step \d")
        self.assertIn("stopped at epoch 3, step 21; go on with the same command and --resume", text)
        text, code = self.train("--resume")
        self.assertIsNone(code)
        self.assertIn("going on at epoch 3, step 21", text)
        self.assert_same_run(self.out, a_run())

    def test_a_checkpoint_of_another_device_leaves_the_optimizer_as_this_one_wants_it(self):
        with before_step(0, 1, terminate):
            self.train("--limit 64")
        state = load_file(self.out / "last.pt")
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = True  # as on a GPU
        torch.save(state, self.out / "last.pt")
        self.train("--limit 64 --resume")
        for group in load_file(self.out / "last.pt")["optimizer"]["param_groups"]:
            self.assertFalse(group["fused"])

    def test_a_run_killed_while_it_validates_goes_on_with_the_validation(self):
        flags = "--limit 64 --val-every 1 --save-every 0"
        with mock.patch("train.validate", side_effect=SystemExit("cannot read a held-out image")):
            _, code = self.train(flags)
        self.assertEqual(code, "cannot read a held-out image")
        state = load_file(self.out / "last.pt")
        self.assertEqual((state["epoch"], state["step"]), (0, 4))
        text, code = self.train(flags, "--resume")
        self.assertIsNone(code)
        self.assertEqual([line["epoch"] for line in log_of(self.out, "val")], [1, 2, 3])

    def test_another_optimizer_goes_on_exactly_too(self):
        def adamw(args, net, device):
            groups = train.parameter_groups(net, args.wd, args.decay)
            return torch.optim.AdamW(groups, args.lr), torch.amp.GradScaler("cpu", enabled=False)

        # SmoothReLU's alpha is a tensor without dimensions, as AdamW's count of steps is: a resume must
        # not mix them up
        flags = ("--limit 64 --epochs 2 --holdout 0 --lr 0.01 --no-ema --act smoothrelu "
                 "--smooth-backward none")
        with mock.patch("train.make_optimizer", adamw):
            self.train(flags, out=self.root / "whole")
            with before_step(1, 1, terminate):
                self.train(flags)
            _, code = self.train(flags, "--resume")
        self.assertIsNone(code)
        self.assert_same_run(self.out, self.root / "whole")

    def test_float16_skips_steps_that_overflow_and_goes_on_exactly_after_a_resume(self):
        flags = "--limit 64 --epochs 2 --holdout 0 --no-ema --dtype fp16"
        with overflowing_scaler(2.0**21):
            self.train(flags, out=self.root / "whole")
            with before_step(1, 2, terminate):
                self.train(flags)
            _, code = self.train(flags, "--resume")
        self.assertIsNone(code)
        self.assertLess(load_file(self.out / "last.pt")["scaler"]["scale"], 2.0**21)
        self.assert_same_run(self.out, self.root / "whole")


class NoSlope(OneLayer):
    """Its logits and weight gradients are finite, its input gradient is NaN, and so is x_adv."""

    def forward(self, x):
        zero = (x - x.detach()).sqrt()  # with the slope of a square root at 0
        return super().forward(x + 0 * zero)


class TestDivergence(TrainCase):
    """What is not finite stops a run, and is never saved."""

    def assert_last_checkpoint_is_finite(self, epoch):
        state = load_file(self.out / "last.pt")
        self.assertEqual(state["epoch"], epoch)
        for name, tensor in state["model"].items():
            self.assertTrue(tensor.isfinite().all(), name)

    def test_weights_that_an_update_spoiled_stop_the_run_at_the_next_log_line_or_save(self):
        def infinite():  # as the learning rate of one step
            return math.inf

        # At the next log line, the next save, the end of the epoch
        for flags, step, epoch in (("--log-every 1", 2, 0), ("--log-every 1000 --save-every 0", 2, 1),
                                   ("--log-every 1000", 4, 0)):
            with self.subTest(flags):
                shutil.rmtree(self.out, ignore_errors=True)
                with before_step(1, 1, infinite):
                    _, code = self.train("--limit 64 --val-every 1 " + flags)
                words = f"epoch 2, step {step} .*last good checkpoint: .*last.pt; try a smaller --lr"
                assert_sentence(self, code, words)
                self.assert_last_checkpoint_is_finite(epoch)

    def test_an_image_gradient_that_is_not_finite_stops_float16_though_no_weight_moves(self):
        with mock.patch("train.network", NoSlope):
            _, code = self.train("--limit 64 --dtype fp16 --smooth-backward none")
        assert_sentence(self, code, "not finite at epoch 1, step 1 .*last.pt")
        self.assert_last_checkpoint_is_finite(epoch=0)

    def test_a_collapse_of_robustness_ends_the_run_for_good_and_keeps_the_best_weights(self):
        flags = "--no-ema --early-stop --epochs 9 --val-every 1 --limit 64 "
        # Images, correct, robust of each epoch: the best is 20 of 30, and 13 of 30 is 23 points below
        counts = [(30, 25, 12), (30, 25, 20), (30, 25, 15), (30, 25, 13), (30, 25, 30)]
        with mock.patch("train.validate", side_effect=counts):
            for more in ("", "--resume"):
                text, code = self.train(flags + more)
                self.assertIsNone(code)
                self.assertIn("stopped early: robust accuracy dropped from 66.7% to 43.3%", text)
        state = load_file(self.out / "last.pt")
        self.assertEqual((state["epoch"], state["best_epoch"]), (4, 2))
        best = load_file(self.out / "best.pt")
        self.assert_same_weights(load_file(self.out / "model.pt"), best)
        self.assert_differ(best["fc.weight"], state["model"]["fc.weight"])


class TestInit(TrainCase):
    """A run that starts from weights."""

    def start_from(self, content, flags=""):
        """Start a run from the weights in a file, stop after a step -> first weights, text, code."""
        torch.save(content, self.root / "init.pt")
        with before_step(0, 0, terminate):
            text, code = self.train(flags, "--init", self.root / "init.pt")
        checkpoint = self.out / "last.prev.pt"  # last.pt is that of the stop
        weights = load_file(checkpoint)["model"] if checkpoint.exists() else None
        return weights, text, code

    def test_init_takes_what_fits_and_names_the_rest(self):
        saved = load_file(a_run() / "model.pt")
        saved["fc.weight"] = torch.zeros(7, 64)
        saved["fc.bias"] = torch.zeros(7)
        saved["more"] = torch.zeros(3)
        weights, text, code = self.start_from({"state_dict": saved})
        self.assertEqual(code, 75)
        self.assertIn("2 stay at their initialisation: fc.weight, fc.bias", text)
        torch.manual_seed(0)
        fresh = train.network(train.get_args(TINY), 10).state_dict()
        for name, tensor in weights.items():
            expected = fresh[name] if name.startswith("fc.") else saved[name]
            self.assert_same(tensor, expected, name)

    def test_resume_does_not_need_the_file_of_init(self):
        _, _, code = self.start_from(load_file(a_run() / "model.pt"), "--limit 64")
        self.assertEqual(code, 75)
        (self.root / "init.pt").unlink()
        text, code = self.train("--limit 64 --resume --init", self.root / "init.pt")
        self.assertIsNone(code)
        self.assertIn("going on at epoch 1, step 1", text)

    def test_init_from_weights_with_another_normalisation_is_refused_and_says_which(self):
        saved = load_file(a_run() / "model.pt") | {"mean": torch.tensor([0.5, 0.4, 0.3])}
        _, _, code = self.start_from(saved)
        assert_sentence(self, code, "another normalisation; add --mean 0.5 0.4 0.3")
        _, text, code = self.start_from(saved, "--mean 0.5 0.4 0.3")
        self.assertEqual(code, 75, text)

    def test_init_from_a_run_compares_the_normalisation_in_its_args_json(self):
        json_file(self.root / "args.json", {"std": [0.5, 0.4, 0.3]})
        _, _, code = self.start_from(load_file(a_run() / "model.pt"))
        assert_sentence(self, code, "another normalisation; add --std 0.5 0.4 0.3")

    def test_init_from_weights_of_which_nothing_fits_is_refused(self):
        _, _, code = self.start_from({"other.weight": torch.ones(3)})
        assert_sentence(self, code, "--init .*no tensor fits this network")
        self.assertFalse((self.out / "args.json").exists())


TWO = "--limit 80 --accum 2".split()
EVALUATE_TWO = "--limit 41 --steps 4 --batch-size 16".split()


def two_ranks(folder):
    """What each rank does: train, train without BatchNorm, evaluate, evaluate too few images."""
    average = train.average_batchnorm_statistics
    attack = train.attack

    def average_and_compare(net, world):
        average(net, world)
        state = torch.cat([tensor.flatten().double() for tensor in net.state_dict().values()])
        largest = state.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        assert torch.equal(state, largest), "weights or BatchNorm's statistics differ between the ranks"

    def count_and_attack(args, model, x, y):
        assert len(x) * 2 * args.accum == args.batch_size
        return attack(args, model, x, y)

    def call(main, *flags):
        with mock.patch.object(sys, "argv", ["script.py", *map(str, flags)]):
            main()

    folder = Path(folder)
    # Each main opens the process group or takes the one that is open, and closes it; here it stays open
    close = dist.destroy_process_group
    dist.destroy_process_group = mock.Mock()
    with mock.patch("train.average_batchnorm_statistics", average_and_compare):
        with mock.patch("train.attack", count_and_attack):
            call(train.main, *TINY, *TWO, "--out", folder / "two")
        # No BatchNorm, no statistics to average: this only has to run
        with mock.patch("train.network", OneLayer):
            call(train.main, *TINY, *TWO, "--smooth-backward", "none", "--out", folder / "fork")
    call(evaluate.main, *EVALUATE_TWO, "--out", folder / "two", "--json", folder / "two.json")

    # One image for two processes, from a file; the second time its verdict is in the ledger
    weights = folder / "pictures.pt"
    if dist.get_rank() == 0:
        torch.save(build("resnet8", num_classes=3).state_dict(), weights)
    dist.barrier()
    flags = "--arch resnet8 --act relu --data imagenet --res 32 --limit 1 --steps 2 --workers 1".split()
    for name in ("first.json", "again.json"):
        call(evaluate.main, *flags, "--weights", weights, "--data-dir", folder / "pictures",
             "--out", folder / "of pictures", "--json", folder / name)
    close()


def run_two_ranks(folder, *more):
    """One torchrun of two processes runs `two_ranks`, which leaves its files in the folder.

    more: "gpu", as on the command line; without it the processes see no GPU.
    """
    image_folder(folder / "pictures", split="val")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [sys.executable, *torchrun, __file__, "two-ranks", str(folder), *more]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **quiet) as process:
        try:
            _, errors = process.communicate(timeout=3600)  # a limit for a hang, not for a slow machine
        finally:
            process.terminate()  # torchrun then ends its processes
    assert process.returncode == 0, errors[-3000:]  # what the ranks assert is there too


class TestTwoRanks(TemporaryFolder):
    """One torchrun of two processes on gloo runs `two_ranks`; the tests look at the files it made."""

    @classmethod
    def setUpClass(cls):
        cls.made = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="out put é")))
        run_two_ranks(cls.made)

    def setUp(self):
        super().setUp()
        self.out = shutil.copytree(self.made / "two", self.root / "two")
        self.report = train.read_json(self.made / "two.json")

    def test_validation_counts_each_held_out_image_once(self):
        self.assertEqual({line["n"] for line in log_of(self.out, "val")}, {8})

    def test_evaluation_counts_each_image_once(self):
        self.assertEqual((self.report["processes"], self.report["n"]), (2, 41))
        ledgers = list((self.out / "eval").glob(f"{self.report['ledger']}.*.jsonl"))
        self.assertEqual(len(ledgers), 2)
        lines = []
        for ledger in ledgers:
            lines += [json.loads(text) for text in ledger.read_text().splitlines()]
        numbers = sorted(line["index"] for line in lines)
        self.assertEqual(numbers, data.subset(1000, 41).tolist())
        self.assertEqual(self.report["forwards"], sum(line["forwards"] for line in lines))

    def test_one_process_reads_the_ledgers_of_both_and_measures_the_same(self):
        path = self.out / "one.json"
        for more, is_read in (([], True), (["--fresh"], False)):
            with self.subTest(more):
                flags = [*EVALUATE_TWO, "--out", self.out, "--json", path, *more]
                text, code = quietly(evaluate.main, *flags)
                self.assertIsNone(code)
                self.assertEqual("41 verdicts are in" in text, is_read)
                report = train.read_json(path)
                for name in ("n", "n_correct", "n_robust", "robust_after", "ledger"):
                    self.assertEqual(report[name], self.report[name])
                self.assertEqual(report["processes"], 2 if is_read else 1)  # that took the time

    def test_one_image_is_enough_for_two_processes_in_a_second_evaluation_too(self):
        for name in ("first.json", "again.json"):
            with self.subTest(name):
                report = train.read_json(self.made / name)
                self.assertEqual((report["n"], report["processes"]), (1, 2))

    def test_another_number_of_processes_is_said_not_to_be_exact(self):
        text, code = quietly(train.main, *TINY, *TWO, "--out", self.out, "--resume")
        self.assertIsNone(code)
        self.assertIn("1 processes instead of 2: not bit-exact", text)


# evaluate

def searching(name, search):
    """While it lasts, --attack `name` calls `search`."""
    return mock.patch.dict(evaluate.ATTACKS, {name: evaluate.ATTACKS[name]._replace(search=search)})


class EvaluateCase(RunCase):
    """Tests that evaluate a run, or weights."""

    def images(self, n):
        """What --limit n measures of a run -> index, x, y."""
        images = data.load("shapes", train=False, res=16)
        return next(data.eval_batches(images, data.subset(images.n, n), n))

    def weights_alone(self):
        """The weights of a run without its args.json -> the flags that evaluate them."""
        shutil.copy(a_run() / "model.pt", self.root / "alone.pt")
        return ["--weights", self.root / "alone.pt", *"--arch resnet8 --data shapes --res 16".split()]

    def measure(self, text, *flags):
        """Evaluate with the flags of a text, and more -> the report, what was printed."""
        path = self.root / "report.json"
        printed, code = quietly(evaluate.main, "--out", self.out, "--json", path, *text.split(), *flags)
        self.assertIsNone(code)
        return train.read_json(path), printed

    def verdicts_of(self, report):
        """{index: line} of the report's ledger."""
        verdicts, _ = evaluate.read_ledger(self.out / "eval", report["ledger"])
        return verdicts

    def ledger_of(self, report, ending="0.jsonl"):
        """The report's file with verdicts, its lock, or the report itself."""
        return self.out / "eval" / f"{report['ledger']}.{ending}"

    def assert_refused(self, words, text="", *flags):
        """evaluate.py must end with one sentence in which the pattern `words` is found."""
        _, sentence = quietly(evaluate.main, "--out", self.out, *shlex.split(text), *flags)
        assert_sentence(self, sentence, words)


class TestEvaluateReport(EvaluateCase):
    """What is measured equals what a plain loop over the same images measures."""

    def setUp(self):
        super().setUp()
        self.copy_of_a_run()
        self.index, self.x, self.y = self.images(40)
        self.net = net_of_a_run()

    def fooled_by_pgd(self, restarts=1):
        return plain_verdicts(self.net, self.index, self.x, self.y, eps=3 / 255, step_size=1 / 255,
                              steps=3, restarts=restarts, seed=5)

    def test_a_strict_report_counts_what_a_plain_loop_counts(self):
        correct = classify(self.net, self.x) == self.y
        fooled = self.fooled_by_pgd(restarts=2)  # (restarts, steps + 1, N)
        robust_after = []  # steps of the first restart
        for step in range(4):
            fooled_by_now = fooled[0, :step + 1].any(0)
            robust_after.append(int((correct & ~fooled_by_now).sum()))
        n_correct = int(correct.sum())
        n_robust = int((correct & ~fooled.flatten(0, 1).any(0)).sum())
        self.assertTrue(0 < n_robust < n_correct < 40)
        report, text = self.measure("--limit 40 --batch-size 16 --eps 3/255 --step-size 1 --steps 3 "
                                    "--seed 5 --restarts 2")
        expected = dict(n=40, n_correct=n_correct, n_robust=n_robust, robust_after=robust_after,
                        interval=evaluate.wilson(n_robust, 40))
        self.assertEqual(report, report | expected)
        self.assertLessEqual(sanity.IN_REPORTS, report.keys())
        for name, k in (("clean", n_correct), ("robust", n_robust)):
            self.assertRegex(text, rf"{name} +{100 * k / 40:.2f}% +{k} of 40")

    def test_a_last_iterate_report_and_its_ledger_are_what_a_plain_loop_finds(self):
        robust_at = ~self.fooled_by_pgd()[0]  # (steps + 1, N); those wrong on x count too
        robust_after = robust_at.sum(1).tolist()
        report, _ = self.measure("--limit 40 --eps 3 --step-size 1 --steps 3 --seed 5 --last-iterate")
        self.assertEqual(report["robust_after"], robust_after)
        self.assertEqual(report["n_robust"], robust_after[-1])
        self.assertEqual(report["n_correct"], int((self.net(self.x).argmax(1) == self.y).sum()))
        verdicts = self.verdicts_of(report)
        for row, line in enumerate(verdicts.values()):
            digits = [int(digit) for digit in line["robust_at"]]
            self.assertEqual(digits, robust_at[:, row].int().tolist())

    def test_a_report_of_autoattack_counts_what_each_attack_fooled(self):
        for attack, names in (("apgd", STANDARD[:2]), ("autoattack", STANDARD)):
            few = partial(evaluate.ATTACKS[attack].search, steps=2, queries=5)
            with self.subTest(attack), searching(attack, few):
                flags = "--limit 40 --eps 2 --seed 5 --batch-size 16 --attack"
                report, _ = self.measure(flags, attack)
                _, whole = autoattack(self.net, self.x, self.y, eps=2 / 255, index=self.index, seed=5,
                                      attacks=names, steps=2, queries=5)
                n_correct = int((whole["clean"] == self.y).sum())
                fooled_by = {name: whole["fooled_by"].count(name) for name in names}
                self.assertLessEqual(sanity.IN_REPORTS, report.keys())
                self.assertEqual(report["fooled_by"], fooled_by)
                self.assertEqual(report["n_correct"], n_correct)
                self.assertEqual(report["n_robust"], n_correct - sum(fooled_by.values()))
                self.assertEqual(report["forwards"], int(whole["forwards"].sum()))

    def test_a_new_attack_is_its_function_its_name_and_its_flags(self):
        def corners(model, x, y, eps, index, seed, verify, progress, steps=0, queries=7):
            """Random corners of the ball."""
            clean = model(x).argmax(1)
            robust = clean == y
            for query in range(queries):
                progress("corners", query, queries, int(robust.sum()))
                noise = uniform(seed, index, (99, query), x.shape[1:])
                x_adv = (x + eps * (2 * noise - 1).sign()).clamp(0, 1)
                robust &= model(x_adv).argmax(1) == y
            return x, dict(clean=clean, robust=robust, forwards=y, warnings=[])

        get_args = evaluate.get_args

        def with_its_flag(argv=None):
            return argparse.Namespace(queries=None, **vars(get_args(argv)))

        attack = evaluate.Attack(corners, flags=("queries", "steps"))
        flags = "--attack corners --limit 40 --eps 24 --batch-size 16 --steps 3"
        with mock.patch.dict(evaluate.ATTACKS, corners=attack):
            with mock.patch("evaluate.get_args", with_its_flag):
                report, text = self.measure(flags)
        _, expected = corners(self.net, self.x, self.y, 24 / 255, self.index, 0, None, mock.Mock())
        self.assertTrue(0 < report["n_robust"] < report["n_correct"])
        self.assertIn("queries7", report["ledger"])
        self.assertIn("corners, queries 7, steps 3", text)
        self.assertNotIn("robust_after", report)  # which counts PGD's steps
        for line, robust in zip(self.verdicts_of(report).values(), expected["robust"].tolist()):
            is_fooled = line["clean"] == line["label"] and not robust
            self.assertEqual(line["fooled"], "corners" if is_fooled else None)

    def test_the_attack_is_the_data_sets_and_not_that_of_the_training(self):
        report, _ = self.measure("--limit 2")
        self.assertEqual(report["train"]["eps"], 2)
        self.assertEqual((report["eps"], report["step_size"], report["steps"]), (8, 2, 50))
        for name, attack in (("imagenet", (4, 1, 200)), ("cifar10", (8, 2, 50)), ("shapes", (8, 2, 50))):
            data_set = data.DATA_SETS[name]
            self.assertEqual((data_set.eps, data_set.step_size, data_set.steps), attack)

    def test_the_search_has_the_precision_and_slope_of_the_flags_and_float32_confirms_16_bits(self):
        def loss(logits):
            return cross_entropy(logits, self.y)

        seen = {}

        @wraps(pgd_search)
        def look(model, x, y, verify=None, **settings):
            seen["dtype"] = model(x).dtype
            seen["logits"], seen["grad"] = input_gradient(model, x, loss)
            seen["verify"] = None if verify is None else verify(x)
            return pgd_search(model, x, y, verify=verify, **settings)

        exact, grad = input_gradient(attacker_view(self.net), self.x, loss)
        _, smooth_grad = input_gradient(attacker_view(self.net, smooth_backward=True), self.x, loss)
        self.assert_differ(grad, smooth_grad)
        with searching("pgd", look):
            self.measure("--limit 40 --steps 1")
            self.assert_same(seen["logits"], exact)
            self.assert_same(seen["grad"], grad)
            self.assertIsNone(seen["verify"])
            self.measure("--limit 40 --steps 1 --smooth-backward attacker")
            self.assert_same(seen["grad"], smooth_grad)
            self.measure("--limit 40 --steps 1 --dtype bf16")
            self.assertEqual(seen["dtype"], torch.bfloat16)
            self.assert_same(seen["verify"], exact)

    def test_a_network_whose_robustness_says_nothing_is_warned_about(self):
        saved = load_file(self.out / "model.pt")
        for name, tensor, n_right, words in (
                ("fc.weight", torch.zeros_like(saved["fc.weight"]), None, "one class: every image"),
                ("fc.weight", 1e5 * saved["fc.weight"], None, "zero gradients: "),
                ("bn1.running_var", -torch.ones(16), 0, "not finite: 40 of 40 clean images")):
            with self.subTest(words):
                torch.save(saved | {name: tensor}, self.out / "model.pt")
                report, text = self.measure("--limit 40 --steps 1 --batch-size 20")
                self.assertRegex("\n".join(report["warnings"]), words)
                self.assertRegex(text, f"warning +{words}")
                if n_right is not None:
                    self.assertEqual((report["n_correct"], report["n_robust"]), (n_right, n_right))

    def test_without_a_terminal_a_line_a_minute_says_how_far_it_is(self):
        clock = SimpleNamespace(monotonic=partial(next, itertools.count(0, 50)))  # 50 s a look
        with mock.patch("evaluate.time", clock):
            _, text = self.measure("--limit 40 --batch-size 20 --steps 5 --last-iterate")
        etas = re.findall(r"pgd step \d/6, 20 open .* eta (\S+)", text)
        self.assertEqual(len(etas), 6)  # every other of 12
        self.assertNotIn("?", etas)


class TestTally(TensorCase):
    """The counts of lines written by hand, and their interval."""

    def test_the_interval_is_wilsons_and_holds_the_share(self):
        np.testing.assert_allclose(evaluate.wilson(81, 263), (0.2553, 0.3662), atol=5e-5)  # published
        self.assertEqual(evaluate.wilson(0, 0), [0.0, 1.0])
        for k in (0, 3, 10):
            low, high = evaluate.wilson(k, 10)
            self.assertTrue(0 <= low <= k / 10 + 1e-9)
            self.assertTrue(k / 10 - 1e-9 <= high <= 1)

    def test_robust_after_counts_the_first_restart_and_robust_counts_all(self):
        lines = [
            dict(clean=1, label=1, fooled=None, forwards=9),
            dict(clean=0, label=1, fooled=None, forwards=1),  # wrong on x
            dict(clean=1, label=1, fooled=[0, 0], forwards=2),
            dict(clean=2, label=2, fooled=[0, 2], forwards=4),
            dict(clean=2, label=2, fooled=[1, 0], forwards=5),  # by the second restart only
            dict(clean=-1, label=2, fooled=None, forwards=1),  # NaN
        ]
        counts = evaluate.tally(lines, steps=2)
        self.assertEqual(counts, dict(n=6, n_correct=4, n_robust=1, n_nan=1, robust_after=[3, 3, 2],
                                      forwards=22))

    def test_of_the_last_iterates_verdicts_the_last_digit_counts_also_where_x_is_wrong(self):
        lines = [dict(clean=1, label=1, forwards=4, robust_at="001"),
                 dict(clean=0, label=1, forwards=4, robust_at="011"),
                 dict(clean=1, label=1, forwards=4, robust_at="110")]
        counts = evaluate.tally(lines, steps=2)
        self.assertEqual((counts["n_correct"], counts["n_robust"]), (2, 2))
        self.assertEqual(counts["robust_after"], [1, 2, 2])


class TestLedger(EvaluateCase):
    """A stopped evaluation goes on, a finished one answers, and no image counts twice."""

    def setUp(self):
        super().setUp()
        self.copy_of_a_run()

    def assert_nothing_is_attacked(self, text, *flags):
        """Evaluate, which must take every verdict from the ledger -> the report, what was printed."""
        with mock.patch("evaluate.verdict_lines", side_effect=AssertionError("it attacks again")):
            return self.measure(text, *flags)

    def test_an_evaluation_that_was_stopped_goes_on_and_counts_no_image_twice(self):
        few_steps = partial(evaluate.ATTACKS["apgd"].search, steps=3)
        for flags, name, search in (("--steps 3", "pgd", pgd_search),
                                    ("--last-iterate --steps 3", "pgd", pgd_search),
                                    ("--attack apgd --eps 1", "apgd", few_steps)):
            calls = itertools.count(1)

            @wraps(search)
            def stopped(*arguments, **settings):
                if next(calls) == 3:
                    raise KeyboardInterrupt
                return search(*arguments, **settings)

            with self.subTest(flags):
                command = flags + " --limit 40 --batch-size 7"
                with searching(name, search):
                    expected, _ = self.measure(command)
                shutil.rmtree(self.out / "eval")
                with searching(name, stopped), self.assertRaises(KeyboardInterrupt):
                    self.measure(command)
                # Of 14 lines 13 stay whole: 4 of another process, 9 of ours. Each file ends torn
                ledger = self.ledger_of(expected)
                lines = ledger.read_text().splitlines(keepends=True)
                of_process_5 = ledger.with_name(ledger.name.replace(".0.", ".5."))
                of_process_5.write_text("".join(lines[:4]) + lines[4][:20])
                ledger.write_text("".join(lines[4:13]) + lines[13][:20])
                with searching(name, search):
                    report, _ = self.measure(command)
                self.assertEqual(report["n_timed"], 40 - 13)
                timing = dict(seconds=0, n_timed=40)
                self.assertEqual(report | timing, expected | timing)
                again, _ = self.assert_nothing_is_attacked(command)
                self.assertEqual(again, report)

    def test_a_smaller_limit_answers_from_the_ledger_and_counts_the_fewer_images(self):
        whole, _ = self.measure("--limit 40 --steps 3")
        verdicts = self.verdicts_of(whole)
        report, _ = self.assert_nothing_is_attacked("--limit 9 --steps 3")
        lines = [verdicts[number] for number in data.subset(1000, 9).tolist()]
        self.assertEqual(report, report | evaluate.tally(lines, 3))
        self.assertEqual(report["n"], 9)
        kept = train.read_json(self.ledger_of(whole, "json"))
        self.assertEqual(kept, whole)  # a look at fewer images does not replace it

    def test_where_nothing_can_be_locked_or_written_a_finished_evaluation_still_answers(self):
        expected, _ = self.measure("--limit 9 --steps 1")

        def assert_it_answers():
            report, _ = self.assert_nothing_is_attacked("--limit 9 --steps 1")
            self.assertEqual(report, expected)
            self.assert_refused("cannot write or lock .*lock", "--limit 10 --steps 1")
            self.assert_refused("cannot write or lock .*lock", "--limit 9 --steps 1 --fresh")

        no_locks = OSError(errno.ENOSYS, "Function not implemented")
        with mock.patch("fcntl.lockf", side_effect=no_locks):
            assert_it_answers()
        lock = self.ledger_of(expected, "lock")
        lock.unlink()
        lock.mkdir()  # nobody can write to a folder, and root can write everywhere else
        assert_it_answers()

    def test_fresh_beside_a_running_evaluation_leaves_its_ledger_alone(self):
        report, _ = self.measure("--limit 9 --steps 2")
        before = files_below(self.out / "eval")
        with locked_by_another_process(self.ledger_of(report, "lock")):
            self.assert_refused("another evaluation writes", "--limit 9 --steps 2 --fresh")
        self.assertEqual(files_below(self.out / "eval"), before)

    def test_lines_that_are_no_verdicts_are_refused(self):
        report, _ = self.measure("--limit 9 --steps 2")
        ledger = self.ledger_of(report)
        whole = ledger.read_bytes()
        for line in (b"7", b"garbage", b"\xff\xfe\x00", b"[1]", b'{"index": 3, "label": 1}', b""):
            with self.subTest(line=line):
                ledger.write_bytes(whole + line + b"\n" + whole)
                self.assert_refused("holds a line that is neither", "--limit 9 --steps 2")

    def test_warnings_of_a_search_come_back_with_the_verdicts(self):
        @wraps(pgd_search)
        def warns(*arguments, **settings):
            x_adv, report = pgd_search(*arguments, **settings)
            report["warnings"] = ["random logits: they change", "masked gradients: in this batch"]
            return x_adv, report

        flags = "--limit 20 --batch-size 8 --steps 1"
        with searching("pgd", warns):
            expected, _ = self.measure(flags)
        self.assertEqual(expected["warnings"],
                         ["random logits: they change (in a batch of 8)"])  # once
        report, text = self.assert_nothing_is_attacked(flags)
        self.assertEqual(report["warnings"], expected["warnings"])
        self.assertIn("random logits: they change", text)

    def test_masked_gradients_are_judged_on_all_images(self):
        def square_wins(model, x, y, **settings):
            fooled_by = ["square"] + [None] * (len(y) - 1)
            robust = torch.tensor([name is None for name in fooled_by])
            return x, dict(clean=y, robust=robust, fooled_by=fooled_by, forwards=y, warnings=[])

        with searching("autoattack", square_wins):
            report, _ = self.measure("--attack autoattack --limit 20 --batch-size 8")
        warning, = report["warnings"]
        self.assertIn("of 20 images, Square fooled 3", warning)


class TestIdentity(EvaluateCase):
    """A verdict is taken from the ledger only if nothing that can change it has changed."""

    def test_flags_that_change_no_verdict_keep_the_ledger(self):
        self.copy_of_a_run()
        report, _ = self.measure("--limit 2 --steps 1")
        for flags in ("--batch-size 1", "--limit 3", "--workers 0", "--act relu --arch resnet8",
                      "--eps 8 --step-size 2"):
            with self.subTest(flags):
                other, _ = self.measure("--limit 2 --steps 1 " + flags)
                self.assertEqual(other["ledger"], report["ledger"])
        other, _ = self.measure("--limit 2 --steps 1 --act relu", *self.weights_alone())  # no args.json
        self.assertEqual(other["ledger"], report["ledger"])
        self.assertIsNone(other["train"])

    def test_all_that_can_change_a_verdict_gives_another_ledger(self):
        weights = ["--limit", 2, "--act", "relu", "--steps", 1, *self.weights_alone()]
        names = set()
        different = ("--seed 0", "--seed 1", "--eps 3", "--step-size 1", "--steps 2", "--restarts 2",
                     "--last-iterate", "--smooth-backward attacker", "--dtype bf16", "--bn-eps 0.001",
                     "--act gelu", "--act elu", "--act elu --act-alpha 2", "--mean 0.5 0.5 0.5",
                     "--std 0.5 0.5 0.5", "--res 17")
        for flags in different:
            report, _ = self.measure("", *weights, *flags.split())
            names.add(report["ledger"])
        for function, field in (("evaluate.code_digest", "code"), ("data.Images.fingerprint", "images")):
            with mock.patch(function, return_value="another"):
                report, _ = self.measure("", *weights)
                self.assertEqual(report[field], "another")
                names.add(report["ledger"])
        saved = load_file(self.root / "alone.pt")
        for name in ("fc.bias", "bn1.running_var"):
            saved[name][0] += 1e-3
            torch.save(saved, self.root / "alone.pt")
            report, _ = self.measure("", *weights)
            names.add(report["ledger"])
        self.assertEqual(len(names), len(different) + 4)

    def test_the_codes_digest_is_that_of_the_statements_that_decide_a_verdict(self):
        for file, old, new, changes in (
                ("attacks.py", "LOSS_SCALE = 2.0**7", "LOSS_SCALE = 2.0**8", True),
                ("models.py", "0.485", "0.5", True),
                ("activations.py", "1e-3", "2e-3", True),
                ("data.py", "res // 7", "res // 8", True),
                ("attacks.py", "\n# ", "\n# An edited comment: ", False),
                ("data.py", "AUGMENT = 1", "AUGMENT = 7", False),
                ("train.py", "momentum=0.9", "momentum=0.8", False)):
            with self.subTest(file, new=new):
                copy = Path(tempfile.mkdtemp(dir=self.root))
                for path in ROOT.glob("*.py"):
                    shutil.copy(path, copy)
                text = (copy / file).read_text()
                self.assertIn(old, text)
                (copy / file).write_text(text.replace(old, new, 1))
                with imported_from(copy):
                    digest = importlib.import_module("evaluate").code_digest()
                self.assertEqual(digest != evaluate.code_digest(), changes)


class TestEvaluateInput(EvaluateCase):
    """Where the network and the data come from, and what is refused."""

    def test_load_gives_a_runs_network_ready_to_attack(self):
        self.copy_of_a_run()
        net = evaluate.load(self.out)
        index, x, y = self.images(20)
        _, report = pgd_search(net, x, y, eps=8 / 255, step_size=2 / 255, steps=2, index=index)
        expected, _ = self.measure("--limit 20 --steps 2")
        self.assertEqual(int(report["robust"].sum()), expected["n_robust"])
        shutil.copy(self.out / "model.pt", self.root / "alone.pt")
        flags = dict(arch="resnet8", act="relu", data="shapes", num_classes=10)
        self.assert_same(evaluate.load(self.root / "alone.pt", **flags)(x), net(x))
        refuses(self, ValueError, "args.json says --act relu", evaluate.load, self.out, act="silu")
        refuses(self, ValueError, "knows no activation", evaluate.load, self.out, activation="relu")

    def test_only_model_pt_is_measured_into_the_runs_own_folder(self):
        self.copy_of_a_run()
        shutil.copy(self.out / "model.pt", self.out / "other.pt")
        shutil.copytree(self.out, self.root / "elsewhere")
        elsewhere = self.root / "elsewhere" / "model.pt"
        for flags, folder in ((["--out", self.out], self.out / "eval"),
                              (["--weights", self.out / "model.pt"], self.out / "eval"),
                              (["--weights", self.out / "best.pt"], self.out / "eval-best"),
                              (["--weights", self.out / "other.pt"], self.out / "eval-other"),
                              (["--weights", elsewhere, "--out", self.out], self.out / "eval-model")):
            with self.subTest(flags=flags):
                _, code = quietly(evaluate.main, *flags, *"--limit 2 --steps 1".split())
                self.assertIsNone(code)
                self.assertEqual(len(list(folder.glob("*.json"))), 1)
                shutil.rmtree(folder)
                self.assertEqual(list(self.root.glob("*/eval*")), [])

    def test_images_are_normalised_as_flags_args_json_or_the_file_say(self):
        self.copy_of_a_run()
        weights = ["--act", "relu", *self.weights_alone()]
        expected, text = self.measure("--limit 40 --steps 0 --mean 0.9 0.1 0.5 --std 1 1 1", *weights)
        self.assertRegex(text.splitlines()[0], "mean .*0.9, 0.1, 0.5.* std .*1.0")
        plain, text = self.measure("--limit 40 --steps 0", *weights)
        self.assertNotIn("mean", text)
        self.assertNotEqual(plain["n_correct"], expected["n_correct"])

        saved = train.read_json(self.out / "args.json")
        saved |= dict(mean=[0.9, 0.1, 0.5], std=[1, 1, 1])
        (self.out / "args.json").write_text(json.dumps(saved))
        report, _ = self.measure("--limit 40 --steps 0")
        self.assertEqual(report["n_correct"], expected["n_correct"])

        of_file = {"mean": torch.tensor([0.9, 0.1, 0.5]), "std": torch.ones(3)}
        torch.save(load_file(self.root / "alone.pt") | of_file, self.root / "alone.pt")
        report, text = self.measure("--limit 40 --steps 0", *weights)
        self.assertEqual(report["n_correct"], expected["n_correct"])
        self.assertEqual(report["mean"], [0.9, 0.1, 0.5])
        self.assertIn("alone.pt: mean 0.9 0.1 0.5, std 1 1 1", text)
        report, _ = self.measure("--limit 40 --steps 0 --mean 0.4 0.5 0.5", *weights)
        self.assertEqual(report["mean"], [0.9, 0.1, 0.5])

    def test_a_damaged_args_json_gets_one_sentence(self):
        self.copy_of_a_run()
        saved = train.read_json(self.out / "args.json")
        texts = ['{"data": "sha', "", "null", "[]", "\x00"]
        for change in (dict(data="mnist"), dict(arch=None), dict(act="swish"),
                       dict(classes=["cat", "dog"])):
            texts.append(json.dumps(saved | change))
        for text in texts:
            with self.subTest(text[:100]):
                (self.out / "args.json").write_text(text)
                self.assert_refused("(args.json|unknown)", "--limit 2")

    def test_what_cannot_be_measured_gets_one_sentence(self):
        self.assert_refused("no run in .*run.*train.py")
        self.copy_of_a_run()
        (self.root / "file").write_text("")
        alone = " ".join(map(shlex.quote, map(str, self.weights_alone())))
        for text, words in (
                ("--act silu", r"args.json says --act relu \(here silu\)"),
                ("--arch resnet20", r"args.json says --arch resnet8 \(here resnet20\)"),
                ("--act-alpha 2", r"args.json says --act-alpha None \(here 2.0\)"),
                ("--bn-eps 0.001", r"args.json says --bn-eps 1e-05 \(here 0.001\)"),
                ("--data imagenet", r"args.json says --data shapes \(here imagenet\)"),
                ("--mean 0.5 0.5 0.5", r"args.json says --mean .*0.485.* \(here .*0.5.*\)"),
                ("--std 1 1 1", r"args.json says --std .*0.229.* \(here .*1.0.*\)"),
                ("--weights x.pt", "needs the --arch and --act"),
                ("--weights x.pt --arch resnet8 --act relu --data shapes", "no file x.pt"),
                (f"{alone} --act rely", "rely is unknown"),
                (f"{alone} --act relu --arch resnet20", "does not fit this network"),
                (f"{alone} --act silu --smooth-backward attacker", "ReLU"),
                ("--eps nan", "--eps nan is out of range"),
                ("--step-size 0", "--step-size 0 is no attack"),
                ("--eps 300", "--eps 300 is out of range"),
                ("--restarts 2 --last-iterate", "restarts is 2.*restarts=1"),
                ("--attack apgd --steps 0", "--steps is a flag of --attack pgd"),
                ("--attack apgd --last-iterate", "--last-iterate is a flag of --attack pgd"),
                ("--device tpu", "--device tpu"),
                ("--out /dev/null/run", "no run in"),
                (f"--json {shlex.quote(str(self.root))}", "--json .* is a folder"),
                (f"--json {shlex.quote(str(self.root))}/file/report.json", "cannot make the folder")):
            with self.subTest(text):
                self.assert_refused(words, text)
                self.assertFalse(list((self.out / "eval").glob("*.json")))
        (self.out / "model.pt").unlink()
        self.assert_refused("no .*model.pt yet.*--weights .*last.pt", "--limit 2")

    def test_an_eps_that_looks_like_a_fraction_is_warned_about(self):
        self.copy_of_a_run()
        _, text = self.measure("--eps 0.03 --limit 2 --steps 1")
        self.assertIn("--eps 0.03 means 0.03/255", text)

    def test_a_full_disk_ends_with_one_sentence_and_the_verdicts_before_are_kept(self):
        self.copy_of_a_run()
        make_room = fill_the_disk(self, 1000)
        words = "cannot write .*jsonl .*disk full.*same command"
        self.assert_refused(words, "--limit 40 --steps 1")
        make_room()
        report, text = self.measure("--limit 40 --steps 1")
        self.assertRegex(text, "1[0-9] verdicts are in")
        self.assertEqual(sorted(self.verdicts_of(report)), data.subset(1000, 40).tolist())

    def test_ctrl_c_ends_evaluate_and_train_with_one_sentence(self):
        self.copy_of_a_run()
        for script, flags, words in ((evaluate, ["--out", str(self.out)], "stopped; the same command"),
                                     (train, ["--data", "shapes"], "stopped before this process")):
            with self.subTest(words), mock.patch("data.load", side_effect=KeyboardInterrupt):
                with mock.patch.object(sys, "argv", [script.__file__, *flags]):
                    with self.assertRaisesRegex(SystemExit, words):
                        runpy.run_path(script.__file__, run_name="__main__")


# sanity: report

def run_sanity(*flags):
    """Run sanity.py as its command line would -> what it printed. A sentence it ends with is raised."""
    text, code = quietly(sanity.main, *flags)
    if code is not None:
        raise SystemExit(code)
    return text


class Straight(nn.Module):
    """The class is the sign of (mean of the pixels - 1/2), so its robustness is known.

    `before`, `bend` and `after`, which change the pixels, the margin and the logits, can mask its
    gradient.
    """

    def __init__(self, slope=100.0, before=torch.clone, bend=torch.clone, after=torch.clone):
        super().__init__()
        self.slope = slope
        self.before = before
        self.bend = bend
        self.after = after
        self.eval()

    def forward(self, x):
        margin = self.before(x).mean((1, 2, 3)) - 0.5
        z = self.slope * self.bend(margin)
        never = -z.abs() - 1  # the logits of two classes that are not chosen
        return self.after(torch.stack((-z, z, never, never - 1), 1))


def run_of(net, low=0.01, high=0.09, n=256):
    """What sanity.py's checks, its "doubts", take: a net, n images of two classes in turn, eps, step.

    The mean of an image's pixels is `low` to `high` away from 1/2, evenly over the images.
    """
    index = torch.arange(n)
    y = index % 2
    x = uniform(5, index, 0, (3, 8, 8))
    sign = 2 * y - 1
    shift = torch.linspace(low, high, n) * sign - 0.4 * x.mean((1, 2, 3))
    x = 0.5 + 0.4 * x + shift[:, None, None, None]
    return SimpleNamespace(net=net, n=n, batches=[(index, x, y)], eps=8, step_size=2)


def rows_on(run, **others):
    """{doubt: its row of the report} of all doubts about a run, without the curves."""
    rows = {row["what"]: row for row in sanity.all_doubts(run, **others)}
    return {what: row for what, row in rows.items() if row["verdict"]}


def verdicts_on(run, **others):
    """{doubt: verdict} of all doubts about a run."""
    return {what: row["verdict"] for what, row in rows_on(run, **others).items()}


def quantized(x):
    """Pixels in 65 steps: nearly the same picture, without any slope."""
    return (64 * x).round() / 64


def trench(margin):
    """The margin, but of the other sign at 0.032 to 0.044 from the boundary.

    PGD-1, a random start and one step of eps clipped to the ball, moves 3/4 of 8/255 on average: from
    0.05 it lands near 0.026, beyond that band. PGD-50, whose steps are 2/255 = 0.008, lands in it.
    """
    return margin * (1 - 3 * torch.exp(-(((margin.abs() - 0.038) / 0.006) ** 2)))


def mirror_fractions(x):
    """Images of 8 bits stay as they are, others are mirrored to the other side of 1/2."""
    fraction = (255 * x - (255 * x).round()).abs().mean((1, 2, 3))
    is_8_bit = fraction < 1e-3
    return torch.where(is_8_bit[:, None, None, None], x, 1 - x)


class TestReport(TemporaryFolder):
    """Nets whose robustness or masks are known, and what `report` says of them."""

    def test_a_robust_net_passes_every_doubt_on_256_images(self):
        verdicts = verdicts_on(run_of(Straight()), surrogate=Straight(50.0))
        others = {doubt: verdict for doubt, verdict in verdicts.items() if verdict != "PASS"}
        self.assertEqual(others, {"a normal net is robust": "SKIP"})  # there is none to compare with

    def test_a_normal_net_that_withstands_pgd_means_that_pgd_is_weak(self):
        doubts = rows_on(run_of(Straight()), normal=Straight())
        normal = doubts["a normal net is robust"]
        self.assertEqual(normal["verdict"], "FAIL")
        self.assertEqual(normal["n_hit"], doubts["robust"]["n_hit"])  # since it is the same net

    def test_masks_are_caught_by_the_doubts_that_should(self):
        generator = torch.Generator().manual_seed(0)

        def noisy(logits):
            return logits + 2 * torch.randn(logits.shape, generator=generator)

        blind = ["zeros in the input gradient", "robust at eps 64", "fooled by steps 1 to 200",
                 "robust to both, not to Square", "loss rises all the way to x_adv"]
        cases = {
            "saturated": (run_of(Straight(1e7)), blind),
            "quantized": (run_of(Straight(before=quantized)), blind),
            "random": (run_of(Straight(after=noisy)),
                       ["two calls differ", "loss rises all the way to x_adv"]),
            "softmax": (run_of(Straight(after=nn.Softmax(1))), ["outputs are not logits"]),
            "no margin": (run_of(Straight(), 0.001, 0.02), ["robust"]),
            "overfit to one step": (run_of(Straight(bend=trench), 0.049, 0.051),
                                    ["withstands PGD-1, PGD-50 too"]),
        }
        for name, (run, doubts) in cases.items():
            with self.subTest(name):
                verdicts = verdicts_on(run)
                for doubt in doubts:
                    self.assertIn(verdicts[doubt], ("WARN", "FAIL"), f"{doubt}: {verdicts}")
                self.assertIn("FAIL", verdicts.values())

    def test_adversarial_images_that_rounding_undoes_are_caught(self):
        run = run_of(Straight(before=mirror_fractions))
        (index, x, y), = run.batches
        run.batches = [(index, (255 * x).round() / 255, y)]
        self.assertEqual(verdicts_on(run)["fooled by 8-bit pictures too"], "WARN")

    def test_a_verdict_needs_the_whole_interval(self):
        cases = ((0, 0, "SKIP"), (1, 1, "UNSURE"), (0, 100, "UNSURE"), (0, 256, "PASS"),
                 (5, 256, "UNSURE"), (13, 256, "WARN"), (26, 256, "WARN"), (60, 256, "FAIL"))
        for n_bad, n, wanted in cases:
            with self.subTest(n_bad=n_bad, n=n):
                self.assertEqual(sanity.judge(n_bad, n, warn=0.02, fail=0.1), wanted)

    def test_batches_change_no_verdict(self):
        whole = run_of(Straight(), 0.001, 0.06, n=60)
        parts = run_of(Straight(), 0.001, 0.06, n=60)
        parts.batches = list(zip(*(tensor.split(25) for tensor in whole.batches[0])))
        self.assertEqual(rows_on(parts), rows_on(whole))

    def test_the_exit_code_says_whether_there_was_a_fail_or_too_little_evidence(self):
        cases = (({"PASS", "WARN", "SKIP"}, None), ({"PASS", "UNSURE"}, 3), ({"FAIL", "UNSURE"}, 1))
        for verdicts, code in cases:
            doubts = []
            for verdict in verdicts:
                doubts.append(dict(verdict=verdict, what=verdict, measured="", wanted="", why=""))
            with self.subTest(code=code), mock.patch("sanity.all_doubts", return_value=doubts):
                _, found = quietly(sanity.main, "report", "--out", a_run(), "--limit", 10)
                self.assertEqual(found, code)

    def test_report_measures_a_run_and_prints_every_doubt(self):
        text, code = quietly(sanity.main, "report", "--out", a_run(), "--limit", 4,
                             "--surrogate", a_run())
        self.assertIn(code, (1, 3))
        self.assertRegex(text, r"model.pt \([0-9a-f]{12}\): resnet8 .*, 4 of the \d+ images of shapes")
        doubts = re.findall(r"(?m)^(PASS|WARN|FAIL|UNSURE|SKIP) +(.*?)  +(.*) +at (?:most|least)", text)
        self.assertEqual(len(doubts), 18)
        self.assertIn(("SKIP", "a normal net is robust"), [doubt[:2] for doubt in doubts])


# sanity: compare

def simulate(n_comparisons, n_seeds, n_images, shares, delta, seed):
    """Verdicts of two methods of which one is `delta` more accurate -> new, old, (n, S, N) bool.

    A verdict is right where a standard normal number is below the threshold of its method's accuracy.
    The number is image + (image, method) + (seed, method) + rest; shares are the variances of the first
    three.
    """
    generator = torch.Generator().manual_seed(seed)
    of_image, of_image_and_method, of_seed = shares

    def normal(variance, *shape):
        return math.sqrt(variance) * torch.randn(shape, generator=generator)

    shared = normal(of_image, n_comparisons, 1, n_images)
    sides = []
    for accuracy in (0.45 + delta, 0.45):
        number = shared + normal(of_image_and_method, n_comparisons, 1, n_images)
        number = number + normal(of_seed, n_comparisons, n_seeds, 1)
        number = number + normal(1 - sum(shares), n_comparisons, n_seeds, n_images)
        threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(accuracy))
        sides.append((number < threshold).numpy())
    return sides


def run_folder(root, name, clean, robust_at, seed=0, eps=8, images="pictures", code="code", last=True,
               index=None, **others):
    """A run's folder as `compare` reads it: args.json, a log, the report and the ledger of one PGD.

    clean (N,) and robust_at (N, steps + 1), bool, are the verdicts. last: whether --last-iterate made
    it. index: the images' numbers, by default 0 to N - 1. others: what the report says besides. The
    curve in args.json is the first word of the name.
    """
    folder = root / name
    (folder / "eval").mkdir(parents=True)
    network = dict(arch="resnet8", act=name.split("-")[0], act_alpha=None, res=32)
    (folder / "args.json").write_text(json.dumps(dict(network, seed=seed, out=name)))
    lines = [dict(kind="epoch", epoch=1, loss=9.0, error=0.9), dict(kind="step", epoch=2, loss=7.0),
             dict(kind="epoch", epoch=2, loss=1.0, error=0.5)]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(log + '{"kind": "ep')  # a kill tore the last line
    steps = robust_at.shape[1] - 1
    if index is None:
        index = range(len(clean))
    report = dict(attack="pgd", eps=eps, step_size=2, steps=steps, restarts=1, last_iterate=last, seed=0,
                  smooth_backward="none", dtype="fp32", ledger="ledger", images=images, code=code,
                  hash="weights", n=len(clean), n_correct=int(clean.sum()), n_robust=0, train=None,
                  **network)
    (folder / "eval" / "ledger.json").write_text(json.dumps(report | others))
    with open(folder / "eval" / "ledger.0.jsonl", "w") as ledger:
        for row, number in enumerate(index):
            line = dict(index=number, label=3, clean=3 if clean[row] else 4, forwards=1)
            if last:
                line["robust_at"] = "".join(str(int(digit)) for digit in robust_at[row])
            else:
                is_fooled = clean[row] and not robust_at[row].all()  # wrong images are not attacked
                line["fooled"] = [0, 1] if is_fooled else None
            ledger.write(json.dumps(line) + "\n")
    return folder


class TestCompare(TemporaryFolder):
    def folders(self, name, seeds, shift=0.0, n=200, stream=0, **settings):
        """Runs of some seeds. shift: how much likelier a verdict is right.

        Runs of the same seed and stream draw the same numbers: but for the shift, the same verdicts.
        """
        folders = []
        for seed in seeds:
            generator = np.random.default_rng([seed, stream])
            clean = generator.random(n) < 0.8 + shift
            robust_at = generator.random((n, 3)) < 0.5 + shift
            folder = run_folder(self.root, f"{name}-{seed}", clean, robust_at, seed=seed, **settings)
            folders.append(folder)
        return folders

    def compare(self, new, old):
        """What `compare` says of two lists of folders -> what it printed, what it wrote with --json."""
        path = self.root / "compared.json"
        text = run_sanity("compare", *new, "--against", *old, "--json", path)
        return text, train.read_json(path)

    def test_the_interval_of_two_nets_holds_the_true_difference_in_95_of_100_comparisons(self):
        for delta in (0, 0.03):
            new, old = simulate(2000, 1, 100, (0.5, 0.1, 0), delta, seed=1)
            covered = []
            for k in range(2000):
                low, high = sanity.interval_of_two_nets(new[k, 0], old[k, 0])
                covered.append(low <= delta <= high)
            self.assertGreater(np.mean(covered), 0.935)
            self.assertLess(np.mean(covered), 0.975)

    def test_the_interval_of_seeds_errs_in_5_of_100_comparisons(self):
        # Variances as in simulate: of images, of image and method, of seed and method. The mean over 300
        # images keeps 1/300 of the second and all of the third, so that seeds differ most in the first
        # case, images in the second, and neither in the third
        cases = {"seeds": (0.7, 0.02, 0.003), "images": (0.5, 0.15, 0.0003), "rest": (0.7, 0, 0)}
        for name, n_seeds, delta in itertools.product(cases, (3, 5), (0, 0.03)):
            with self.subTest(name, n_seeds=n_seeds, delta=delta):
                new, old = simulate(2000, n_seeds, 300, cases[name], delta, seed=2)
                n_missed = 0
                for k in range(2000):
                    low, high = sanity.interval_of_seeds(new[k], old[k])
                    if not low <= delta <= high:
                        n_missed += 1
                self.assertLess(n_missed / 2000, 0.065)
                self.assertGreater(n_missed / 2000, 0.015)  # it may be a bit too wide

    def test_runs_are_paired_by_seed(self):
        text, written = self.compare(self.folders("silu", (0, 1, 2)), self.folders("relu", (2, 1, 3, 0)))
        self.assertEqual(written["seeds"], [0, 1, 2])
        self.assertIn("seeds 3 are on one side only", text)
        for row in written["comparisons"]:  # runs of one seed have the same verdicts here
            self.assertEqual((row["only_new"], row["only_old"]), (0, 0))

    def robust_in_ledger(self, folder):
        """By a plain loop: is the image right on x and on every iterate? [N] bool."""
        robust = []
        for text in (folder / "eval" / "ledger.0.jsonl").read_text().splitlines():
            line = json.loads(text)
            robust.append(line["clean"] == line["label"] and "0" not in line["robust_at"])
        return robust

    def test_a_difference_is_counted_image_by_image(self):
        new_folders = self.folders("silu", (0, 1, 2), shift=0.15)
        old_folders = self.folders("relu", (0, 1, 2), stream=1)
        _, written = self.compare(new_folders, old_folders)
        rows = {row["what"]: row for row in written["comparisons"]}
        self.assertEqual(list(rows), ["clean", "robust (last iterate)", "robust (every iterate)"])
        row = rows["robust (every iterate)"]
        new = np.array([self.robust_in_ledger(folder) for folder in new_folders])
        old = np.array([self.robust_in_ledger(folder) for folder in old_folders])
        self.assertAlmostEqual(row["difference"], 100 * (new.mean() - old.mean()))
        self.assertAlmostEqual(row["only_new"], (new & ~old).sum() / 3)
        self.assertAlmostEqual(row["only_old"], (old & ~new).sum() / 3)
        self.assertEqual((row["low"], row["high"]),
                         tuple(100 * end for end in sanity.interval_of_seeds(new, old)))
        self.assertEqual(row["verdict"], "higher")

    def test_the_training_loss_is_that_of_the_last_epoch(self):
        _, written = self.compare(self.folders("silu", [0]), self.folders("relu", [0]))
        self.assertEqual(written["training"][0]["new"], 1.0)

    def test_one_run_a_side_is_compared_as_two_networks(self):
        text, written = self.compare(self.folders("silu", [4]), self.folders("relu", [7]))
        self.assertIn("about these two networks, not about the method", text)
        for row in written["comparisons"]:
            self.assertLess(row["low"], row["high"])
            self.assertEqual(row["verdict"], "undecided")

    def test_ledgers_without_the_last_iterate_have_one_robust_accuracy(self):
        new = self.folders("silu", [0], last=False)
        _, written = self.compare(new, self.folders("relu", [0], last=False))
        _, robust = written["comparisons"]
        self.assertEqual(robust["what"], "robust")
        _, written = self.compare(self.folders("gelu", [0]), self.folders("elu", [0]))
        _, _, every = written["comparisons"]  # the same verdicts, in ledgers of --last-iterate
        self.assertEqual(robust["new"], every["new"])

    def test_what_cannot_be_compared_is_refused_with_a_sentence(self):
        old = self.folders("relu", [0])
        no_ledger = self.folders("no-ledger", [0])
        (no_ledger[0] / "eval" / "ledger.0.jsonl").unlink()
        no_report = self.folders("no-report", [0])
        (no_report[0] / "eval" / "ledger.json").unlink()
        damaged = self.folders("damaged", [0])
        (damaged[0] / "eval" / "ledger.json").write_text("{")
        other_act = self.folders("other-act", [0], act="gelu")
        other_seeds = self.folders("other-seeds", [5, 6])
        cases = {
            "eps": (self.folders("eps4", [0], eps=4), "no attack.*same flags"),
            "images": (self.folders("other-images", [0], images="others"), "different images"),
            "one image": (self.folders("one-image", [0], n=1, index=[17]), "1 images in common"),
            "no image": (self.folders("no-image", [0], index=range(1000, 1200)), "0 images in common"),
            "no ledger": (no_ledger, "ledger.*missing"),
            "no report": (no_report, "no report.*evaluate.py"),
            "damaged": (damaged, "no report.*evaluate.py"),
            "another net's report": (other_act, "no report.*evaluate.py"),
            "no run": ([self.root / "nowhere"], "nowhere"),
            "no seed": (other_seeds, r"no seed is on both sides: NEW has \[5, 6\].*\[0\]"),
            "a seed twice": ([*old, *self.folders("again", [0])], "NEW has a seed twice"),
        }
        for name, (new, words) in cases.items():
            with self.subTest(name):
                refuses(self, SystemExit, words, self.compare, new, old)

    def test_other_code_and_images_of_one_side_only_are_warned_of(self):
        new = self.folders("silu", [0], code="edited", n=150)
        text, written = self.compare(new, self.folders("relu", [0]))
        self.assertRegex(text, "warning: .*different versions of the code")
        self.assertRegex(text, "warning: .*150 of 200 images")
        self.assertEqual(written["comparisons"][0]["n"], 150)


class TestReports(TemporaryFolder):
    """Which reports are read as a run's own, and the table of them."""

    def folder(self, *reports):
        """A run of SiLU with these reports, what each says besides, oldest first -> their paths."""
        folder = run_folder(self.root, "silu-0", np.array([True, False]), np.ones((2, 2), bool), seed=7)
        written = train.read_json(folder / "eval" / "ledger.json")
        (folder / "eval" / "ledger.json").unlink()
        paths = []
        for age, changed in enumerate(reports):
            path = json_file(folder / "eval" / f"{age}.json", written | changed)
            os.utime(path, (age, age))
            paths.append(path)
        return paths

    def read(self, *paths):
        """-> the numbers of the reports that are read, what is said of the others."""
        with mock.patch.object(sanity, "say") as say:
            found = sanity.read_reports(paths)
        return [path.stem for path, _ in found], "\n".join(call.args[0] for call in say.call_args_list)

    def test_reports_on_other_weights_than_model_pt_are_left_out_however_new_their_files_are(self):
        weights = {"fc.weight": torch.ones(3)}
        old, new = self.folder(dict(hash="old"), dict(eps=4, hash=weights_hash(weights)))
        torch.save(weights, old.parent.parent / "model.pt")
        os.utime(old)
        found, text = self.read(old, new)
        self.assertEqual(found, ["1"])
        self.assertRegex(text, "0.json is about other weights than .*model.pt")

    def test_a_report_that_is_not_about_the_run_and_its_newest_weights_is_named_and_left_out(self):
        for changed, words in ((dict(act="relu"), "about act relu, the run has silu"),
                               (dict(act_alpha=2.0), "about act_alpha 2.0"),
                               (dict(arch="resnet20"), "about arch resnet20"),
                               (dict(res=48), "about res 48, the run has 32"),
                               (dict(hash="old"), "about other weights")):
            with self.subTest(words):
                self.root = self.root / "next"
                found, text = self.read(*self.folder({}, changed, dict(eps=4)))
                self.assertEqual(found, ["0", "2"])
                self.assertRegex(text, "1.json is " + words)

    def test_the_table_has_the_newest_report_of_each_attack_on_a_run(self):
        self.folder(dict(n_robust=1), dict(n_robust=2), dict(eps=4, attack="apgd", restarts=None))
        with contextlib.chdir(self.root):
            header, *rows = run_sanity("table", ".").splitlines()
        self.assertEqual(header.split()[:6], ["activation", "network", "seed", "clean", "robust", "n"])
        pgd_row, apgd_row = rows
        self.assertRegex(pgd_row, r"^silu +resnet8 +- +50.00 +100.00 +2 .*PGD-1, eps 8, step 2.*silu-0$")
        self.assertRegex(apgd_row, r"^silu .* 0.00 +2 +0.00 to [\d.]+ +apgd, eps 4")
        refuses(self, SystemExit, "no report", run_sanity, "table", self.root / "nowhere")

    def test_runs_and_attacks_that_are_left_out_are_named(self):
        self.folder({}, dict(eps=4))
        json_file(self.root / "args.json", {})
        self.assertIn(f"left out: {self.root} has no report", run_sanity("table", self.root))
        shutil.copytree(self.root / "silu-0", self.root / "silu-1")
        (self.root / "silu-1" / "eval" / "1.json").unlink()
        text = run_sanity("compare", self.root / "silu-0", "--against", self.root / "silu-1")
        self.assertRegex(text, "left out: PGD-1, eps 4, step 2, .*not run on .*silu-1")


# sanity: cost

class TestCost(TensorCase):
    """Nothing here depends on seconds: the machine may be busy."""

    tiny = "cost --data shapes --res 16 --rounds 2 --batch-size 4 --device cpu".split()

    def test_the_table_has_a_row_for_every_activation_and_number_of_steps(self):
        text = run_sanity(*self.tiny, "--acts", "silu", "relu", "--pgd", 0, 2, "--epochs", 3)
        self.assertIn("resnet8, 16 px, 4 images", text)
        self.assertIn("3 epochs of 5500 images", text)
        rows = [line.split() for line in text.splitlines()[-4:]]
        self.assertEqual([row[:2] for row in rows],
                         [["silu", "0"], ["silu", "2"], ["relu", "0"], ["relu", "2"]])
        plain, attacked, *_ = rows
        self.assertEqual(plain[4], "1.00")  # times the first row
        # (2 steps of 2 forwards' cost + the update's 3) / 3
        self.assertAlmostEqual(float(attacked[-1]) / float(plain[-1]), 7 / 3, delta=0.02)

    def test_what_is_timed_is_the_step_of_train(self):
        seen = []

        def update(flags, attack_model, train_model, optimizer, scaler, x, y):
            seen.append((flags.act, flags.steps, flags.nesterov, x.shape[0]))

        with mock.patch("train.update", update):  # as a fork would change it
            run_sanity(*self.tiny, "--acts", "silu", "relu", "--pgd", 3, "--nesterov")
        n_each = sanity.N_WARMUPS + 2
        self.assertEqual(len(seen), 2 * n_each)
        self.assertEqual(set(seen), {("silu", 3, True, 4), ("relu", 3, True, 4)})

    def test_the_flops_of_resnet50_are_known(self):
        flops = sanity.forward_flops(train.get_args([]), 1000)
        self.assertAlmostEqual(flops / 2e9, 4.089, 2)  # torchvision: 4.09 GMACs

    def test_a_flag_of_train_is_not_taken_for_one_of_cost(self):
        args = sanity.get_args("cost --act relu --acts silu gelu --data shapes --rounds 4".split())
        self.assertEqual((args.acts, args.rounds), (["silu", "gelu"], 4))
        self.assertEqual((args.train.act, args.train.data), ("relu", "shapes"))


class InAnEmptyFolder(TemporaryFolder):
    """The working folder is an empty one, so that default paths can be seen."""

    def setUp(self):
        super().setUp()
        self.enterContext(contextlib.chdir(self.root))


def comparison(difference, low, high, verdict="higher", what="robust", n=1000):
    """What `compare --json` writes, with one row: a difference and its interval."""
    row = dict(setting="PGD-50, eps 8, last iterate", what=what, difference=difference, low=low,
               high=high, verdict=verdict, n=n)
    return dict(comparisons=[row], old=["out/relu-0", "out/relu-1"])


class TestCommands(InAnEmptyFolder):
    def test_a_wrong_flag_of_any_script_is_refused_in_two_lines(self):
        for script, flags, word in ((sanity, "report --limit ten", "ten"),
                                    (sanity, "report --nonsense", "nonsense"),
                                    (sanity, "nonsense", "nonsense"),
                                    (evaluate, "--eps 4/256", "4/256 is not in 1/255"),
                                    (train, "--step-size 8/256", "8/256 is not in 1/255")):
            with self.subTest(flags), contextlib.redirect_stderr(io.StringIO()) as text:
                quietly(script.main, *flags.split())
                self.assertEqual(len(text.getvalue().splitlines()), 2)
                self.assertIn(word, text.getvalue())

    def test_what_cannot_be_done_is_refused_with_a_sentence(self):
        json_file("list.json", [1])
        json_file("empty.json", {})
        json_file("good.json", comparison(2, 1, 3))
        (Path("damaged")).mkdir()
        Path("damaged", "log.jsonl").write_text("{torn\n")
        (Path("number")).mkdir()
        Path("number", "log.jsonl").write_text("7\n")
        cases = [("report --out nowhere", "nowhere"), ("compare x --against y --json .", "folder"),
                 ("cost --data shapes --pgd -1", "--pgd -1"), ("cost --data shapes --wd inf", "--wd"),
                 ("cost --data-dir nowhere", "nowhere"),
                 ("curves mistyped", "mistyped"), ("curves damaged", "damaged"),
                 ("curves number", "number"),
                 ("scatter mistyped.json empty.json", "no report"),
                 ("forest mistyped.json", "mistyped.json"), ("forest list.json", "list.json"),
                 ("forest empty.json", "empty.json has no comparisons"),
                 ("forest good.json --only nothing", "--only"),
                 ("forest good.json --paper list.json", "list.json")]
        for command in ("activations", "landscape", "gallery", "curves x", "scatter x", "forest x"):
            for png in ("x.xyz", "x", "."):
                cases.append((f"{command} --png {png}", "--png"))
        for flags, words in cases:
            with self.subTest(flags):
                refuses(self, SystemExit, words, run_sanity, *flags.split())


# sanity: pictures

def evaluation(act="silu", clean=900, robust=600, seed=0, train_steps=1, **more):
    """A report as evaluate.py writes it, on 1,000 images, with what the pictures read.

    seed and train_steps are those of the training; train_steps=0 is normal training.
    """
    recipe = dict(seed=seed, steps=train_steps, eps=8, smooth_backward="none", epochs=10)
    report = dict(weights=f"out/{act}-{seed}/model.pt", arch="resnet8", act=act, act_alpha=None, res=32,
                  data="shapes", attack="pgd", steps=50, eps=8, step_size=2, restarts=1, seed=0,
                  last_iterate=False, smooth_backward="none", dtype="fp32", n=1000, n_correct=clean,
                  n_robust=robust, train=recipe, hash="weights", ledger="ledger",
                  images="pictures", code="code")
    return report | more


def name_of(report):
    """The name by which `scatter` tells a report's network."""
    return sanity.network_name(SimpleNamespace(**report))


class Planes(nn.Module):
    """Two classes; the loss depends on red minus blue alone, so its gradient has one direction."""

    def forward(self, x):
        z = 8 * (x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)))
        return torch.stack([z, -z], 1)


def tiny_run():
    """What `open_run` gives, for three random images of 8 px."""
    x = 0.3 + 0.4 * torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0])
    batches = zip(torch.arange(3).split(2), x.split(2), y.split(2))
    return SimpleNamespace(net=Planes().eval(), n=3, batches=batches, eps=8, step_size=2, steps=5,
                           images=SimpleNamespace(classes=["cat", "dog"]), out=Path("out"))


class TestPictures(InAnEmptyFolder):
    def test_ticks_are_round_numbers_inside_the_range_and_not_too_many(self):
        for ends, expected in (((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
                               ((-8.3, 10.2), [-5, 0, 5, 10]),
                               ((97.1, 100), [97.5, 98, 98.5, 99, 99.5, 100]),
                               ((0, 1e-6), [0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6]),
                               ((-2e7, 3e7), [-2e7, -1e7, 0, 1e7, 2e7, 3e7])):
            with self.subTest(ends=ends):
                np.testing.assert_allclose(sanity.ticks(ends, most=8), expected)

    def test_a_point_lands_between_the_numbers_that_its_axis_says(self):
        fig = sanity.Figure(1, 1, 300, 200)
        with mock.patch.object(fig, "text") as text:
            place = sanity.axes(fig, fig.boxes[0], (-3.3, 7.1), (0.02, 0.31), "", "", "")
        numbers = {call.args[1]: call.args[0] for call in text.call_args_list if call.args[1]}
        for number, axis, other in (("-2", 0, 0.1), ("6", 0, 0.1), ("0.3", 1, 0), ("0.1", 1, 0)):
            with self.subTest(number):
                point = (float(number), other) if axis == 0 else (other, float(number))
                self.assertAlmostEqual(numbers[number][axis], place(*point)[axis])

    def test_a_heat_map_has_its_first_index_to_the_right_and_its_second_upwards(self):
        ramp = np.linspace(0, 1, 9)
        for name, z, low_end, high_end in (  # the ends as row, column of pixels, two a unit
                ("first", np.repeat(ramp[:, None], 9, 1), (80, 4), (80, 155)),
                ("second", np.repeat(ramp[None], 9, 0), (155, 80), (4, 80))):
            with self.subTest(index=name):
                fig = sanity.Figure(1, 1, 80, 80, left=0, above=0)
                sanity.heat_map(fig, (0, 0, 80, 80), z, (0.05, 0.95))
                fig.save("map.png")
                pixels = np.asarray(Image.open("map.png")).astype(int)
                np.testing.assert_allclose(pixels[low_end], sanity.VIRIDIS[0], atol=24)
                np.testing.assert_allclose(pixels[high_end], sanity.VIRIDIS[-1], atol=24)

    def test_each_curve_is_drawn_with_its_slope(self):
        points, slopes = sanity.value_and_slope(make_act("elu"), torch.tensor([-1.0, 2.0]).double())
        np.testing.assert_allclose(points, [(-1, math.exp(-1) - 1), (2, 2)])
        np.testing.assert_allclose(slopes, [(-1, math.exp(-1)), (2, 1)])
        with mock.patch.object(sanity, "plot", wraps=sanity.plot) as plot:
            run_sanity("activations")
        self.assertEqual([len(call.args[2]) for call in plot.call_args_list], 4 * [len(ACTIVATIONS)])
        self.assertTrue(Path("out/activations.png").exists())

    def log(self, folder, *lines):
        """A run's folder with these lines in its log."""
        Path(folder).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (Path(folder) / "log.jsonl").write_text(text)

    def test_points_are_the_logged_values_and_a_run_that_is_not_validated_has_none_there(self):
        first = dict(kind="epoch", epoch=1, loss=2.0)
        second = dict(kind="epoch", epoch=2, loss=1.0)
        repeated = dict(second, loss=8.0)  # a run that was resumed logs an epoch twice: the last counts
        self.log("validated", first, repeated, second, dict(kind="val", epoch=2, clean=0.5, robust=0.25))
        self.log("young", first, second)
        with mock.patch.object(sanity, "plot", wraps=sanity.plot) as plot:
            run_sanity("curves", "validated", "young")
        loss, clean, robust = [call.args[2] for call in plot.call_args_list]
        self.assertEqual(loss, [[(1, 2), (2, 1)], [(1, 2), (2, 1)]])
        self.assertEqual(clean, [[(2, 50)], []])
        self.assertEqual(robust, [[(2, 25)], []])
        self.assertTrue(Path("out/curves.png").exists())

    def test_seeds_share_a_style_and_other_recipes_do_not(self):
        first = name_of(evaluation(seed=0))
        self.assertEqual(name_of(evaluation(seed=1)), first)
        for name, other in (("act", evaluation(act="relu")), ("normal", evaluation(train_steps=0)),
                            ("alpha", evaluation(act_alpha=2.0)), ("unknown", evaluation(train=None))):
            with self.subTest(name=name):
                self.assertNotEqual(name_of(other), first)

    def test_a_report_is_a_marker_right_for_clean_and_up_for_robust_in_a_panel_of_its_attack(self):
        robust = json_file("robust.json", evaluation(clean=900, robust=600))
        normal = json_file("normal.json", evaluation(clean=980, robust=0, train_steps=0))
        other = json_file("other.json", evaluation(eps=4))
        for age, path in enumerate((robust, normal, other)):  # the order of the panels
            os.utime(path, (age, age))
        with mock.patch.object(sanity, "axes", wraps=sanity.axes) as axes, \
                mock.patch.object(sanity.Figure, "marker") as marker:
            run_sanity("scatter", robust, normal, other)
        self.assertEqual([call.args[-1] for call in axes.call_args_list],
                         ["shapes, PGD-50, eps 8, step 2", "shapes, PGD-50, eps 4, step 2"])
        first, second = [call.args for call in marker.call_args_list[:2]]
        (x, y), colour, _, _ = first
        (x_of_normal, y_of_normal), colour_of_normal, _, _ = second
        self.assertLess(x, x_of_normal)
        self.assertLess(y, y_of_normal)  # y downwards
        self.assertNotEqual(colour, colour_of_normal)
        self.assertTrue(Path("out/scatter.png").exists())

    def test_files_become_rows_beside_the_papers_values(self):
        silu = json_file("silu.json", comparison(2, 1, 3))
        elu = json_file("elu.json", comparison(-1, -2, 0.5, "undecided"))
        gelu = json_file("gelu.json", comparison(-3, -4, -2, "lower"))
        paper = json_file("paper.json", {"silu": 9.3})
        with mock.patch.object(sanity.Figure, "marker") as marker, \
                mock.patch.object(sanity.Figure, "text") as text:
            run_sanity("forest", silu, elu, gelu, "--paper", paper)
        words = [call.args[1] for call in text.call_args_list]
        for wanted in ("silu", "+2.0 [1.0, 3.0]", "paper +9.3", "elu"):
            self.assertIn(wanted, words)
        title, = [line for line in words if "accuracy" in line]
        self.assertEqual(title, "Difference in accuracy: robust, PGD-50, eps 8")
        colours = [call.args[1] for call in marker.call_args_list]  # from below: gelu, elu, silu
        self.assertEqual(colours, [sanity.ORANGE, sanity.GREY, sanity.INK, sanity.BLUE])
        x = [call.args[0][0] for call in marker.call_args_list]
        self.assertEqual(sorted(x), [x[0], x[1], x[3], x[2]])  # -3, -1, 2 and the paper's 9.3
        self.assertTrue(Path("out/forest.png").exists())

    def test_one_picture_shows_one_measurement(self):
        both = comparison(2, 1, 3)
        both["comparisons"] += comparison(1, 0, 2, what="robust (last iterate)")["comparisons"]
        for n in (100, 1000, 10):  # the clean images of several settings: most images count
            both["comparisons"] += comparison(n, 0, n, what="clean", n=n)["comparisons"]
        path = Path(json_file("silu.json", both))
        refuses(self, SystemExit, "--only", sanity.read_comparison, path, "robust")
        self.assertEqual(sanity.read_comparison(path, "robust (last").difference, 1)
        self.assertEqual(sanity.read_comparison(path, "clean").n, 1000)

    def test_the_two_directions_are_at_right_angles_and_of_mean_square_1(self):
        delta = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        to_attack, at_random = sanity.directions(delta, torch.tensor([7]))
        for name, direction in (("attack", to_attack), ("random", at_random)):
            with self.subTest(name=name):
                self.assertAlmostEqual(direction.square().mean().item(), 1, places=5)
        self.assertAlmostEqual((to_attack * at_random).mean().item(), 0, places=5)
        torch.testing.assert_close(to_attack * delta.square().mean().sqrt(), delta)

    def test_the_surface_is_the_loss_at_the_points_of_the_plane(self):
        run = tiny_run()
        index, x, y = [tensor[:1] for tensor in next(run.batches)]
        to_attack, at_random = sanity.directions(torch.randn_like(x), index)
        surface = sanity.loss_surface(run.net, x, y, to_attack, at_random, 0.1, 5)
        steps = (-0.1, -0.05, 0, 0.05, 0.1)
        for i, a in enumerate(steps):
            for j, b in enumerate(steps):
                logits = run.net(x + a * to_attack + b * at_random)
                loss = nn.functional.cross_entropy(logits, y).item()
                self.assertAlmostEqual(surface[i, j], loss, places=5)

    def test_a_plane_is_not_rough_and_a_parabola_is(self):
        a = np.arange(6.0)
        # Second differences of a parabola are 2, along the other axis 0; roughness is their mean square
        self.assertAlmostEqual(sanity.roughness(3 * a[:, None] - 2 * a), 0)
        self.assertAlmostEqual(sanity.roughness(a[:, None] ** 2 + 0 * a), (2**2 + 0) / 2)

    def test_landscape_draws_a_panel_for_each_net_and_says_what_roughness_is(self):
        with mock.patch.object(sanity, "open_run", return_value=tiny_run()), \
                mock.patch.object(sanity, "other_net", return_value=Planes().eval()), \
                mock.patch.object(sanity.Figure, "note") as note:
            text = run_sanity("landscape", "--against", "elsewhere")
        first, second, definition, path = text.splitlines()
        self.assertRegex(first, r"^out: roughness .*; over 3 images .* \+- ")
        self.assertRegex(second, "^elsewhere: roughness ")
        self.assertIn("mean squared second difference", definition)
        note.assert_called_once_with(definition)
        self.assertTrue(Path("out/landscape.png").exists())

    def test_a_loss_that_is_the_same_everywhere_is_drawn_too(self):
        flat = np.full((31, 31), 100, np.float32)
        with mock.patch.object(sanity, "open_run", return_value=tiny_run()), \
                mock.patch.object(sanity, "loss_surface", return_value=flat):
            self.assertIn("roughness 0", run_sanity("landscape"))

    def test_the_gallery_shows_clean_attacked_and_their_difference_and_explains_itself(self):
        _, x, _ = next(tiny_run().batches)
        with mock.patch.object(sanity, "open_run", return_value=tiny_run()), \
                mock.patch.object(sanity.Figure, "paste") as paste, \
                mock.patch.object(sanity.Figure, "note") as note:
            run_sanity("gallery")
        self.assertEqual(paste.call_count, 6)
        pictures = torch.tensor(np.stack([call.args[0] for call in paste.call_args_list]))
        clean, attacked, difference = pictures.float().view(2, 3, 8, 8, 3).unbind(1)
        torch.testing.assert_close(clean, 255 * x.permute(0, 2, 3, 1), atol=0.51, rtol=0)
        self.assertTrue(((attacked - clean).abs() <= 8 + 1).all())
        self.assertTrue((attacked != clean).any())
        rebuilt = clean + (difference - 127.5) / 16
        torch.testing.assert_close(rebuilt, attacked, atol=1.1, rtol=0)
        self.assertIn("orange", note.call_args.args[0])


# A GPU

GPU_RUN = "--data shapes --epochs 4 --log-every 20 --val-every 4 --act silu".split()


def a_gpu_run():
    """Made as the flags have it by default: bf16, compiled, with CUDA graphs."""
    return finished_run(*GPU_RUN)


@unittest.skipUnless(ON_GPU and torch.cuda.is_available(),
                     "about a GPU: python test_all.py gpu, on a machine that has one")
class TestGPU(TrainCase):
    def train_on_gpu(self, text=""):
        return quietly(train.main, *GPU_RUN, "--out", self.out, *text.split())

    def test_training_in_bf16_compiled_ends_within_reach_of_float32(self):
        saved = train.read_json(a_gpu_run() / "args.json")
        self.assertEqual((saved["dtype"], saved["compile"]), ("bf16", True))
        _, code = self.train_on_gpu("--dtype fp32 --no-compile")
        self.assertIsNone(code)
        last = log_of(a_gpu_run(), "val")[-1]
        expected = log_of(self.out, "val")[-1]
        for name in ("clean", "robust"):
            self.assertAlmostEqual(last[name], expected[name], delta=0.15)
        self.assertGreater(last["robust"], 0.3)

    def test_verdicts_are_those_of_a_cpu(self):
        path = self.root / "report.json"
        is_fooled = {}  # with these flags, (100,) bool
        for flags in ("--device cpu", "--dtype fp32", "--dtype bf16", "--dtype fp16"):
            text, code = quietly(evaluate.main, "--out", a_gpu_run(), "--limit", 100, "--steps", 10,
                                 "--json", path, *flags.split())
            self.assertIsNone(code, text)
            verdicts, _ = evaluate.read_ledger(a_gpu_run() / "eval", train.read_json(path)["ledger"])
            self.assertEqual(len(verdicts), 100)
            lines = [verdicts[index] for index in sorted(verdicts)]
            is_fooled[flags] = np.array([line["fooled"] is not None for line in lines])
        for flags, fooled in is_fooled.items():
            with self.subTest(flags):
                n_different = (fooled != is_fooled["--device cpu"]).sum()
                self.assertLessEqual(n_different, 1)  # rounding may decide one

    def test_a_killed_run_goes_on(self):
        kill_in_training(self, self.out, 3, sys.executable, train.__file__, *GPU_RUN, "--out", self.out)
        text, code = quietly(train.main, "--resume", "--out", self.out)
        self.assertIsNone(code)
        self.assertRegex(text, r"going on at epoch \d, step \d")
        self.assertGreater(log_of(self.out, "val")[-1]["robust"], 0.3)

    def test_float16_survives_overflowing_weight_gradients(self):
        with overflowing_scaler(2.0**24):
            text, code = self.train_on_gpu("--dtype fp16 --epochs 1 --no-compile")
        self.assertIsNone(code, text)
        self.assertLess(load_file(self.out / "last.pt")["scaler"]["scale"], 2.0**24)

    def test_float16_stops_at_an_image_gradient_that_is_not_finite(self):
        with mock.patch("train.network", NoSlope):
            _, code = self.train_on_gpu("--dtype fp16 --no-compile")
        assert_sentence(self, code, "not finite at epoch 1")

    def test_between_two_log_lines_no_step_waits_for_the_gpu(self):
        lr_at = train.lr_at

        def watched(args, epoch, step, n_steps):
            if epoch == 1:  # everything is compiled and recorded by then
                torch.cuda.set_sync_debug_mode("error" if 20 < step < 39 else "default")
            return lr_at(args, epoch, step, n_steps)

        self.addCleanup(torch.cuda.set_sync_debug_mode, "default")
        for flags in ("", "--no-compile --ema --accum 2 --clean-start 0.2"):
            with self.subTest(flags), mock.patch("train.lr_at", watched):
                shutil.rmtree(self.out, ignore_errors=True)
                text, code = self.train_on_gpu("--epochs 2 " + flags)
                self.assertIsNone(code, text)

    def test_compiled_gradients_are_the_eager_ones_for_every_curve(self):
        def one_block(args, num_classes):
            torch.manual_seed(0)
            arch = models.resnet(models.BasicBlock, 1, width=16)
            return arch.make(act=partial(make_act, args.act), norm=nn.BatchNorm2d, dropout=0.0,
                             num_classes=num_classes, stochastic_depth=0.0, small_input=True)

        device = torch.device("cuda")
        x = torch.rand(16, 3, 32, 32, device=device)
        y = torch.arange(16, device=device) % 10
        for act, dtype in itertools.product(ACTIVATIONS, ("fp32", "bf16")):
            with self.subTest(act, dtype=dtype):
                torch._dynamo.reset()
                args = flags_of(f"--data shapes --act {act} --compile --dtype {dtype}")
                net = on_device(one_block(args, 10), device)
                attack_model, _, _ = train.make_views(net, args, device)
                train.check_compiled(args, net, attack_model, x, y)

    def test_cuda_graphs_change_no_step(self):
        device = torch.device("cuda")
        x = torch.rand(32, 3, 32, 32, device=device)
        y = torch.arange(32, device=device) % 10
        weights = {}
        for res in (32, 65):  # graphs or none: --res up to 64 has them
            args = flags_of(f"--data shapes --act silu --compile --dtype fp32 --lr 0.01 --res {res}")
            torch.manual_seed(0)
            net = on_device(train.network(args, 10), device)
            optimizer, scaler = train.make_optimizer(args, net, device)
            attack_model, train_model, _ = train.make_views(net, args, device)
            for step in range(6):
                torch.manual_seed(step)
                train.update(args, attack_model, train_model, optimizer, scaler, x, y)
            weights[res] = torch.cat([p.detach().flatten() for p in net.parameters()])
        self.assert_close(weights[32], weights[65], delta=1e-3)

    @unittest.skipUnless(torch.cuda.device_count() > 1, "about two GPUs")
    def test_two_gpus_train_and_evaluate(self):
        run_two_ranks(self.root, "gpu")


# README

def blocks(text, language=""):
    """The fenced blocks of a language in a Markdown text."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for label, block in found if label == language]


def table_rows(text, header):
    """The rows of every table whose header line begins with `header` -> lists of cells."""
    rows = []
    in_table = False
    for line in text.splitlines():
        if line.startswith(header):
            in_table = True
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not line.startswith("|---"):
            rows.append([cell.strip(" `") for cell in line.strip("|").split("|")])
    return rows


def commands_of(shell_text):
    """The commands with python or torchrun that a shell would run, its loops and functions expanded."""
    stubs = 'python() { printf "%q " "$@"; echo; }; torchrun() { printf "%q " "$@"; echo; }; '
    done = subprocess.run(["bash", "-c", stubs + shell_text], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def apply_edit(folder, diff):
    """Make an edit of the README in a copy of the project -> how many lines it adds.

    Its first line names the file. Lines with + are added, with - removed, the others are kept.
    """
    name, *lines = diff.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    path = folder / name
    text = path.read_text()
    old = "\n".join(before) + "\n"
    assert text.count(old) == 1, f"{name} has these lines {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, "\n".join(after) + "\n"))
    return sum(line.startswith("+") for line in lines)


class TestReadme(TemporaryFolder):
    """Its commands are understood by the scripts, its rows are the paper's, its edits work."""

    text = (ROOT / "README.md").read_text()
    reproduce = text.partition("## Reproduce")[2].partition("\n## ")[0]

    def shell(self):
        """All that the README lets a shell run: its blocks in order, one of which defines `train` and
        `evaluate`, commands in the text, tables."""
        commands = [block for block in blocks(self.text)
                    if "venv" not in block and (".py" in block or block.startswith("for "))]
        commands += re.findall(r"`((?:python|evaluate|train) [^`]*)`", self.text)
        commands += re.findall(r"\.venv/bin/(python train\.py .*)$", self.text, re.MULTILINE)
        for name, flags, *_ in table_rows(self.reproduce, "| name | flags of train"):
            if flags.startswith("--"):  # not "(of Table 1)", a run that another table trains
                commands.append(f"train {name} {flags}")
        for name, _, flags, *_ in table_rows(self.reproduce, "| name | flags of train | evaluate with"):
            commands.append(f"evaluate {name} {flags}")
        commands = [text for text in commands if "--help" not in text]  # which ends a script
        return "\n".join(commands)

    def test_every_command_is_understood_by_its_script(self):
        scripts = {"data.py": data, "train.py": train, "evaluate.py": evaluate, "sanity.py": sanity}
        n_understood = 0
        for line in commands_of(self.shell()):
            words = [word for word in shlex.split(line)
                     if word not in ("--standalone", "--nproc_per_node=8")]
            script, *flags = words
            if script in scripts:
                with self.subTest(line):
                    args = scripts[script].get_args(flags)
                    if script == "train.py":
                        train.check(args, world=8 if args.data == "imagenet" else 1)
                        with torch.device("meta"):
                            train.network(args, 10)
                    n_understood += 1
        self.assertGreater(n_understood, 60)

    def test_every_row_of_the_paper_has_its_command(self):
        trained = []  # the flags after --out NAME, but for --accum, which the paper does not name
        for line in commands_of(self.shell()):
            if "train.py --out" in line:
                _, _, name_and_flags = line.partition(" --out ")
                _, _, flags = name_and_flags.partition(" ")
                trained.append(re.sub(r" --accum \d+", "", flags).strip())
        acts = ("relu", "psoftplus", "silu", "gelu", "elu", "smoothrelu", "softplus")
        rows = [f"--act {act}" for act in acts]  # Fig. 3
        for who in ("attacker", "optimizer", "both"):  # Table 1
            rows.append(f"--act relu --smooth-backward {who}")
        rows += ["--act relu --steps 0", "--act relu --steps 0 --smooth-backward optimizer",  # Sec. 3.2
                 "--act relu --steps 2", "--act relu --epochs 200"]  # Sec. 3.3
        for act in ("elu", "celu"):  # Table 2
            for alpha in ("1.2", "1.4", "1.6", "1.8", "2.0"):
                rows.append(f"--act {act} --act-alpha {alpha}")
        rows += ["--arch resnet101", "--arch resnet152", "--arch resnext50_32x4d",  # Table 3
                 "--arch resnext50_32x8d", "--res 299", "--res 380",
                 "--arch resnext152_32x8d --res 380"]
        for size in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l1"):  # Fig. 4
            rows.append(f"--arch efficientnet_{size}")
        rows += ["--arch efficientnet_l1 --enhanced",
                 "--arch efficientnet_l1 --enhanced --steps 0 --no-early-stop"]
        for flags in rows:
            with self.subTest(flags):
                self.assertIn(flags, trained)

    def test_the_edits_under_change_it_work_in_the_lines_that_they_say(self):
        section = self.text.partition("## Change it")[2].partition("\n## ")[0]
        usage = {
            "A new activation": "--act squareplus",
            "Another attack in training": "",
            "Another loss": "",
            "Another optimizer and schedule": "--lr 0.001",
            "A data set of your own": "--data mine --res 32",
            "An L2 attack in evaluation": "",
        }
        for title, flags in usage.items():
            with self.subTest(title):
                folder = self.root / title
                folder.mkdir()
                for name in MODULES:
                    shutil.copy(ROOT / f"{name}.py", folder)
                edit = section.partition(f"**{title}**")[2].partition("\n**")[0]
                n_added = sum(apply_edit(folder, diff) for diff in blocks(edit, "diff"))
                n_said = int(re.search(r"(\d+) lines?", edit).group(1))
                self.assertEqual(n_added, n_said)
                self.train_three_steps(folder, flags.split())

    def train_three_steps(self, folder, flags):
        """Train three steps and evaluate some images with the project in `folder`."""
        x = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8).numpy()
        for part in ("train", "test"):
            np.save(folder / f"{part}_x.npy", x)
            np.save(folder / f"{part}_y.npy", np.arange(200) % 2)
        if "--data" not in flags:
            flags = ["--data", "shapes", *flags]
        usual = ["--data-dir", folder, "--limit", 192, "--batch-size", 64, "--epochs", 1, "--holdout", 0]
        with imported_from(folder):
            script = importlib.import_module("train")
            text, code = quietly(script.main, *flags, *usual, "--out", folder / "out")
            self.assertIsNone(code, text)
            self.assertIn("step     3/3", text)
            script = importlib.import_module("evaluate")
            text, code = quietly(script.main, "--out", folder / "out", "--limit", 20, "--steps", 3)
            self.assertIsNone(code, text)
            self.assertIn("robust", text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["two-ranks"]:
        two_ranks(sys.argv[2])
    elif ON_GPU:
        unittest.main(argv=["test_all.py", "TestGPU"], warnings="ignore")
    else:
        unittest.main(warnings="ignore")
