"""Factors and kernels of PyTorch modules against the Jacobians of torch.func."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import assert_close

import ntkfast as nf

torch = pytest.importorskip("torch")
import ntkfast.torch  # noqa: E402

nn = torch.nn
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


class Block(nn.Module):
    """A convolutional residual block with a nonlinearity in place; layers called out of their order, and by keyword."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4 * 9, 3)
        self.second = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", bias=False)
        self.first = nn.Conv2d(2, 4, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.first(input=x))
        return self.out((x + torch.tanh(self.second(x)))[:, :, :3, :3].flatten(1))


class Tokens(nn.Module):
    """Linear layers along an axis of positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(5, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.nn.functional.gelu(self.mix(torch.sin(self.embed(x)))).mean(dim=(1, 2)))


def frozen_parts():
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 4),
                           nn.Softplus(), nn.Dropout(0.3), nn.Linear(4, 3))  # fmt: skip
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    module[3].requires_grad_(False)
    module[4].requires_grad_(False)
    module[3].running_mean += 0.3
    return module.eval()


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 3)), (5,)),
    "one output": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1), nn.Flatten(0)), (5,)),
    "linear": (lambda: nn.Linear(4, 2), (4,)),
    "in place": (lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(inplace=True), nn.Linear(9, 3),
                                       nn.ELU(inplace=True)), (5,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(4, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (2, 8, 8)),
    "block": (Block, (2, 7, 5)),
    "wide filters": (lambda: nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 30, 2), nn.Flatten(),
                                           nn.Linear(30, 2)), (3, 4, 4)),
    "1-d": (lambda: nn.Sequential(nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2, padding_mode="reflect"),
                                  nn.SiLU(), nn.Conv1d(5, 4, 2, padding="same"), nn.Flatten(), nn.LazyLinear(2)),
            (3, 11)),
    "positions": (Tokens, (3, 2, 5)),
    "frozen": (frozen_parts, (5,)),
}  # fmt: skip


def build(name, dtype=torch.float64, n=6):
    torch.manual_seed(len(name))
    make, shape = MODULES[name]
    module = make().to(dtype)
    x = torch.randn(n, *shape, dtype=dtype)
    with torch.no_grad():
        module(x)  # sizes of lazy layers
    return module.to(dtype), x


def jacobian(module, x):
    """(n, C, parameters) per trained layer, by torch.func; float64."""
    module = module.double()
    trained = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
    fixed = {k: p.detach() for k, p in module.named_parameters() if not p.requires_grad} | dict(module.named_buffers())

    def f(parameters, row):
        return torch.func.functional_call(module, (parameters, fixed), (row[None],)).reshape(-1)

    found = torch.func.vmap(torch.func.jacrev(f), (None, 0))(trained, x.double())
    layers = {}
    for name, J in found.items():
        layers.setdefault(name.rpartition(".")[0], []).append(J.flatten(2))
    return [torch.cat(parts, dim=2).numpy() for parts in layers.values()]


def kernels(J):
    """Every layer's (n, C, n, C)."""
    return np.array([np.einsum("icp,jdp->icjd", block, block) for block in J])


@pytest.mark.parametrize("name", MODULES)
def test_against_torch_func(name):
    module, x = build(name)
    before = [p.clone() for p in module.parameters()]
    K = kernels(jacobian(module, x))
    n, C = K.shape[1:3]
    scale = np.abs(K.sum(axis=0)).max()
    layers = {"sum": K.sum(axis=(2, 4)), 0: K[:, :, 0, :, 0], "each": K.reshape(len(K), n * C, n * C)}
    for output, wanted in layers.items():
        factors = nf.torch.jacobian_factors(module, x, output=output)
        assert all(isinstance(t, torch.Tensor) and not t.requires_grad for f in factors for t in f)
        assert_close(nf.jacobian_gram(factors, per_layer=True), wanted, scale, 1e-12)
    total = K.sum(axis=0)
    cases = {"sum": total.sum(axis=(1, 3)), C - 1: total[:, -1, :, -1], -1: total[:, -1, :, -1],
             "trace": np.einsum("icjc->ij", total), "full": total.reshape(n * C, n * C)}  # fmt: skip
    for output, wanted in cases.items():
        for memory in (None, 1):  # all samples at once, one by one
            found = nf.torch.empirical_ntk(module, x, output=output, memory=memory)
            assert isinstance(found, torch.Tensor)
            assert found.dtype == torch.float64
            assert_close(found.numpy(), wanted, scale, 1e-12)
            assert bool((found == found.T).all())
    assert all(p.grad is None and bool((p == q).all()) for p, q in zip(module.parameters(), before, strict=True))
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("name", ["mlp", "cnn", "block"])
def test_float32(name):
    module, x = build(name, torch.float32)
    found = nf.torch.empirical_ntk(module, x)
    assert found.dtype == torch.float32
    K = kernels(jacobian(module, x)).sum(axis=(0, 2, 4))
    assert_close(found.numpy(), K, np.abs(K).max(), 2e-6)


@pytest.mark.parametrize("entries", [1, 300, 1 << 24])
@pytest.mark.parametrize("name", ["mlp", "cnn", "wide filters", "positions"])
def test_products_of_a_device(name, entries, monkeypatch):
    """The path of CUDA tensors, here on the CPU."""
    module, x = build(name, n=11)
    monkeypatch.setattr(nf.torch, "_ENTRIES", entries)
    factors, other = nf.torch.jacobian_factors(module, x), nf.torch.jacobian_factors(module, x[:4])
    K = nf.jacobian_gram(factors, other).numpy()
    assert_close(nf.torch._device_gram(factors, other).numpy(), K, np.abs(K).max(), 1e-13)


def test_without_gradients_and_with_one_sample():
    module, x = build("cnn")
    K = nf.torch.empirical_ntk(module, x)
    with torch.no_grad():
        again = nf.torch.empirical_ntk(module, x.requires_grad_())
    assert bool((again == K).all())
    one = nf.torch.empirical_ntk(module, x[2:3])
    assert_close(one.numpy(), K[2:3, 2:3].numpy(), float(K.max()), 1e-13)


class Convolutional(nn.Module):
    """A ConvNetwork of average=False with unit variances as a module, channels first, with the weights of a network."""

    def __init__(self, network, grid):
        super().__init__()
        net, self.grid = network.net, grid
        kind = nn.Conv1d if len(grid) == 1 else nn.Conv2d
        sizes, todo, convolutions, channels = net.windows(len(grid)), iter(network.weights), [], 3
        for layer in net.layers:
            W = torch.from_numpy(next(todo)).reshape(network.width, *sizes, channels).movedim(-1, 1)
            conv = kind(channels, network.width, sizes, padding="same", bias=bool(layer.bias_variance),
                        padding_mode=net.padding, dtype=W.dtype)  # fmt: skip
            with torch.no_grad():
                conv.weight.copy_(W)
                if conv.bias is not None:
                    conv.bias.copy_(torch.from_numpy(next(todo)))
            conv.requires_grad_(layer.trained)
            convolutions.append(conv)
            channels = network.width
        self.convolutions, self.net = nn.ModuleList(convolutions), net
        a = torch.from_numpy(next(todo))  # (positions, m), or (m,)
        self.readout = nn.Linear(a.numel(), 1, bias=False, dtype=a.dtype)
        with torch.no_grad():
            self.readout.weight.copy_((a if net.pooling == "gap" else a.T).reshape(1, -1))

    def forward(self, x):
        for layer, conv in zip(self.net.layers, self.convolutions, strict=True):
            act = {"relu": torch.relu, "tanh": torch.tanh, "gelu": nn.functional.gelu}[layer.activation.name]
            h = act(conv(x)) / conv.out_channels**0.5
            x = layer.gain**0.5 * h if isinstance(layer, nf.Dense) else layer.skip * x + layer.scale * h
        return self.readout(x.flatten(2).mean(dim=2) if self.net.pooling == "gap" else x.flatten(1))


@pytest.mark.parametrize("pooling", ["flatten", "gap"])
@pytest.mark.parametrize(("grid", "window", "padding"), [((5, 9), (3, 5), "zeros"), ((5, 6), 3, "circular"),
                                                         ((7,), 5, "circular"), ((1, 7), 3, "zeros")])  # fmt: skip
def test_finite_convolutional_networks(grid, window, padding, pooling, rng):
    """init(...) against the same network in PyTorch: outputs, torch.func, and factors by hooks."""
    layers = [nf.Dense("gelu", gain=1.7, bias_variance=1.0), nf.Residual("relu", scale=0.8, skip=-0.9),
              nf.Dense("tanh", gain=0.4, trained=False), nf.Residual("gelu", scale=0.5, bias_variance=1.0)]  # fmt: skip
    net = nf.ConvNetwork(layers, window=window, padding=padding, average=False, pooling=pooling)
    network = nf.init(net, (*grid, 3), 7, seed=0)
    module, x = Convolutional(network, grid), torch.from_numpy(rng.standard_normal((5, 3, *grid)))
    X, option = x.numpy(), {"data_format": "channels_first"}
    f = module(x).detach().numpy()[:, 0]
    assert_close(network.outputs(X, **option), f, np.abs(f).max(), 1e-13)
    K = nf.empirical_ntk(network, X, per_layer=True, **option)
    wanted = kernels(jacobian(module, x))[:, :, 0, :, 0]
    assert_close(K, wanted, wanted.max(), 1e-12)
    assert_close(nf.torch.empirical_ntk(module, x).numpy(), K.sum(axis=0), K.max(), 1e-13)
    own, hooks = network.jacobian_factors(X, **option), nf.torch.jacobian_factors(module, x)
    for ours, theirs in zip(own, hooks, strict=True):
        assert ours.inputs.shape == tuple(theirs.inputs.shape)
        assert_close(nf.jacobian_gram([ours]), nf.jacobian_gram([theirs]).numpy(), K.max(), 1e-13)
    tensors = network.jacobian_factors(x, **option)
    assert all(isinstance(t, torch.Tensor) for f in tensors for t in f)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(torch.tanh(self.fc(x)))


class Aside(Twice):
    """Uses the weight of a layer that also runs."""

    def forward(self, x):
        return self.fc(x) + torch.tanh(x) @ self.fc.weight


class Outside(Twice):
    """Uses the weight without the layer."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)


class Mixing(Twice):
    def forward(self, x):
        return torch.tanh(self.fc(x)) * x.mean()


class Reshaping(Twice):
    """Samples leave the first axis."""

    def forward(self, x):
        return self.fc(x.reshape(-1, 5)).reshape(len(x), -1)


class Own(nn.Linear):
    pass


class Pair(Twice):
    def forward(self, x):
        return self.fc(x), x


def tied():
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    module[2].weight = module[0].weight
    return module


def norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))


REFUSED = {
    "twice": (Twice, "'fc' runs more than once"),
    "aside": (Aside, "'fc' is not that of one layer"),
    "outside": (Outside, "'fc' has trained parameters but did not run"),
    "tied": (tied, "0.weight' and '2.weight' are one"),
    "mixing": (Mixing, "depends on the other samples"),
    "own": (lambda: Own(5, 3), r"the module \(Own\)"),
    "pair": (Pair, "one tensor"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), "mixes samples"),
    "batch norm, trained": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).eval(), r"1 \(BatchNorm1d\)"),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), r"1 \(LayerNorm\).*bias.*weight"),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), "random"),
    "prelu": (lambda: nn.Sequential(nn.Linear(5, 3), nn.PReLU()), "PReLU"),
    "weight norm": (norm, "Parametrized"),
    "lstm": (lambda: nn.Sequential(nn.Linear(5, 3), nn.LSTM(3, 2)), "LSTM"),
    "nothing trained": (lambda: nn.Linear(5, 3).requires_grad_(False), "no trained parameters"),
    "no parameters": (nn.Tanh, "no trained parameters"),
    "scalar": (lambda: nn.Sequential(nn.Linear(5, 1), nn.Flatten(0), nn.Softmax(dim=0)), "depends on the other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_named(name):
    make, words = REFUSED[name]
    module, x = make().double(), torch.randn(4, 5, dtype=torch.float64)
    kind = TypeError if name == "pair" else ValueError
    with pytest.raises(kind, match=words):
        nf.torch.jacobian_factors(module, x)
    assert not any(m._forward_hooks for m in module.modules())
    with pytest.raises(kind, match=words):
        nf.torch.empirical_ntk(module, x)


def test_more_that_is_not_covered():
    x = torch.randn(4, 4, 6, 6)
    for module, words in [
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()), "groups=2"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()), "GroupNorm"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.Flatten()), "ConvTranspose2d"),
        (nn.Sequential(nn.Flatten(0, 2), nn.Linear(6, 2), nn.Flatten(0)), "one row per sample"),
    ]:
        with pytest.raises(ValueError, match=words):
            nf.torch.jacobian_factors(module, x)
    embedding = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"0 \(Embedding\)"):
        nf.torch.jacobian_factors(embedding, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="first axis"):
        nf.torch.jacobian_factors(Reshaping(), torch.randn(3, 10))


def test_bad_arguments():
    module, x = build("mlp")
    for given, kind, words in [
        ((np.eye(3), x), TypeError, "Module"),
        ((module, x.numpy()), TypeError, "Tensor"),
        ((module, x[:0]), ValueError, "empty"),
        ((module, x[0]), ValueError, "empty|first"),
    ]:
        with pytest.raises(kind, match=words):
            nf.torch.jacobian_factors(*given)
    for output, words in [
        (3, "out of range"),
        (-4, "out of range"),
        ("all", "unknown"),
        (True, "unknown"),
        (1.0, "unknown"),
    ]:
        with pytest.raises(ValueError, match=words):
            nf.torch.jacobian_factors(module, x, output=output)
    for output in ("each", "all"):
        with pytest.raises(ValueError, match="unknown"):
            nf.torch.empirical_ntk(module, x, output=output)
    nothing = nn.Sequential(nn.Linear(5, 3), nn.Threshold(1e9, 0.0), nn.Linear(3, 2)).double()
    assert bool((nf.torch.empirical_ntk(nothing, x) == 2.0).all())  # only the last bias is left: (1, 1)


def test_gradients_switched_off_inside():
    class Off(Twice):
        def forward(self, x):
            with torch.no_grad():
                return self.fc(x)

    with pytest.raises(ValueError, match="switched off"):
        nf.torch.jacobian_factors(Off(), torch.randn(3, 5))


def test_factors_in_tensors_come_back_as_tensors():
    module, x = build("cnn")
    factors = nf.torch.jacobian_factors(module, x)
    K = nf.jacobian_gram(factors)
    assert isinstance(K, torch.Tensor)
    assert_close(nf.jacobian_diagonal(factors).numpy(), K.diagonal().numpy(), float(K.max()), 1e-13)


def test_import_names_the_extra(fresh_python):
    code = """
import sys
sys.modules["torch"] = None
import ntkfast
try:
    import ntkfast.torch
except ImportError as error:
    print(error)
"""
    assert 'pip install "ntkfast[torch]"' in fresh_python(code)


@pytest.mark.parametrize("kernels", [True, False])
def test_overflow_names_the_row(kernels, monkeypatch):
    monkeypatch.setattr(nf.torch, "_has_kernels", lambda device: kernels)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(9, 3)
    x[5] *= 1e20
    for output, row in (("sum", 5), (1, 5), ("trace", 5), ("full", 10)):
        for memory in (None, 200):
            with pytest.raises(OverflowError, match=f"row {row} with itself.*range of float32.*; use float64"):
                nf.torch.empirical_ntk(module, x, output=output, memory=memory)
