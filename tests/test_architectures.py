from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import stochbn
from conftest import normal, settled
from stochbn.network.layers import batch_norms
from stochbn.sources.architectures import (
    NETWORKS,
    PreActivationBlock,
    PreActivationBottleneck,
    build,
    build_with_uniform_scale,
    lenet5,
    resnet,
    resnet18_final_bn,
    vgg,
)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def dropouts(model: nn.Module) -> list[float]:
    return [m.p for m in model.modules() if isinstance(m, nn.Dropout)]


@given(classes=st.integers(1, 20), channels=st.integers(1, 4), size=st.integers(16, 70))
def test_lenet5_has_the_parameters_of_its_layers(classes: int, channels: int, size: int) -> None:
    with torch.device("meta"):
        model = lenet5(classes, channels, size)
    side = size
    for _ in range(2):
        side = (side - 5 + 1) // 2
    convolutions = 25 * channels * 20 + 20 + 25 * 20 * 50 + 50
    linear = 50 * side**2 * 500 + 500 + 500 * classes + classes
    norms = 2 * (20 + 50 + 500)
    assert count(model) == convolutions + linear + norms
    assert {m.num_features for m in batch_norms(model).values()} == {20, 50, 500}


def test_lenet5_for_mnist_has_as_many_parameters_as_the_papers() -> None:
    # 20 and 50 channels, 500 hidden units: 520 + 25,050 + 400,500 + 5,010, and two for each of 570 normalised channels
    assert count(lenet5()) == 431_080 + 1_140


VGG_CHANNELS = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


@given(
    depth=st.sampled_from(sorted(VGG_CHANNELS)),
    classes=st.integers(1, 20),
    channels=st.integers(1, 4),
    size=st.integers(32, 100),
    eighths=st.integers(1, 16),
    bias=st.booleans(),
)
def test_vgg_has_the_parameters_of_its_layers(
    depth: int, classes: int, channels: int, size: int, eighths: int, bias: bool
) -> None:
    with torch.device("meta"):
        model = vgg(depth, classes, channels, size, width=eighths / 8, bias=bias)
    outputs = [int(word) * eighths // 8 for word in VGG_CHANNELS[depth].split() if word != "M"]
    assert len(outputs) == depth - 3
    convolutions = sum(9 * a * b for a, b in zip([channels, *outputs], outputs))  # noqa: B905 (one shorter)
    side = size
    for _ in range(5):
        side //= 2
    norms = 2 * sum(outputs)
    assert count(model) == convolutions + sum(outputs) * bias + norms + outputs[-1] * side**2 * classes + classes
    assert [m.num_features for m in batch_norms(model).values()] == outputs


@pytest.mark.parametrize("depth", sorted(VGG_CHANNELS))
def test_vgg_pools_where_the_paper_does(depth: int) -> None:
    words = []
    for layer in vgg(depth, width=0.125):
        if isinstance(layer, nn.Conv2d):
            words.append(str(8 * layer.out_channels))
        elif isinstance(layer, nn.MaxPool2d):
            words.append("M")
    assert " ".join(words) == VGG_CHANNELS[depth]


RESNET_BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


@pytest.mark.parametrize("depth", sorted(RESNET_BLOCKS))
@given(classes=st.integers(1, 20), channels=st.integers(1, 4), size=st.integers(8, 100), eighths=st.integers(1, 16))
@settings(max_examples=5)
def test_resnets_have_the_parameters_of_their_layers(
    depth: int, classes: int, channels: int, size: int, eighths: int
) -> None:
    with torch.device("meta"):
        model = resnet(depth, classes, channels, size, width=eighths / 8)
    stem, expansion = 8 * eighths, 4 if depth >= 50 else 1
    parameters, layers, inputs = 9 * channels * stem + 2 * stem, 2, stem  # the stem; with the linear layer, two layers
    for stage, blocks in enumerate(RESNET_BLOCKS[depth]):
        inside = 8 * eighths * 2**stage
        outputs = expansion * inside
        for block in range(blocks):
            if expansion == 4:
                convolutions = inputs * inside + 9 * inside**2 + inside * outputs
                norms = 2 * (inputs + inside + inside)
            else:
                convolutions = 9 * inputs * inside + 9 * inside**2
                norms = 2 * (inputs + inside)
            parameters += convolutions + norms
            if inputs != outputs or (stage and not block):
                parameters += inputs * outputs  # the projection of the shortcut
            layers += 3 if expansion == 4 else 2
            inputs = outputs
    assert count(model) == parameters + inputs * classes + classes
    assert layers == depth


def test_resnet18_normalises_behind_the_stem_and_not_before_the_pooling() -> None:
    layers = list(resnet(18, width=0.125))
    assert [type(layer) for layer in layers[:4]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, PreActivationBlock]
    assert [type(layer) for layer in layers[-4:]] == [PreActivationBlock, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


def test_the_other_resnet18_normalises_before_the_pooling_and_not_behind_the_stem() -> None:
    layers = list(resnet18_final_bn(width=0.125))
    assert [type(layer) for layer in layers[:2]] == [nn.Conv2d, PreActivationBlock]
    assert [type(layer) for layer in layers[-5:-2]] == [nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d]
    assert count(resnet18_final_bn()) == count(resnet(18)) - 2 * 64 + 2 * 512


@pytest.mark.parametrize("name", ["lenet5", "vgg11", "resnet18", "resnet50"])
def test_the_scale_of_every_batch_norm_can_start_from_a_uniform_distribution(name: str) -> None:
    torch.manual_seed(3)
    model = build_with_uniform_scale(name)
    scales = [module.weight.detach() for module in batch_norms(model).values()]
    together = torch.cat(scales)
    assert together.min() >= 0
    assert together.max() <= 1
    assert together.mean().item() == pytest.approx(0.5, abs=4 / (12 * len(together)) ** 0.5)
    assert all(len(set(scale.tolist())) > 10 for scale in scales)
    assert all((module.weight == 1).all() for module in batch_norms(build(name)).values())


def test_weights_and_biases_start_from_the_distribution_that_pytorch_used_in_2018() -> None:
    """Until today: uniform between plus and minus one over the square root of the number of inputs."""
    torch.manual_seed(0)
    for layer in (nn.Conv2d(64, 256, 3), nn.Linear(576, 4096)):
        for values in layer.parameters():
            bound = 1 / 24
            assert values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def normalised(layer: nn.BatchNorm2d, value: Tensor) -> Tensor:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var, weight, bias = (
        t[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (value - mean) / (var + layer.eps).sqrt() * weight + bias


def slow_block(block: PreActivationBlock, x: Tensor) -> Tensor:
    activated = normalised(block.bn1, x).clamp(min=0)
    stride = block.conv1.stride[0]
    hidden = normalised(block.bn2, F.conv2d(activated, block.conv1.weight, padding=1)[:, :, ::stride, ::stride]).clamp(
        min=0
    )
    residual = F.conv2d(hidden, block.conv2.weight, padding=1)
    if block.shortcut is None:
        return x + residual
    weight = block.shortcut.weight
    assert isinstance(weight, Tensor)
    return F.conv2d(activated[:, :, ::stride, ::stride], weight) + residual


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 6, 2), (3, 5, 1)])
def test_a_block_normalises_and_activates_before_each_convolution(inputs: int, outputs: int, stride: int) -> None:
    block = settled(PreActivationBlock(inputs, outputs, stride).double(), inputs, 8, 6)
    assert isinstance(block, PreActivationBlock)
    x = normal(3, inputs, 8, 6, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(block(x), slow_block(block, x))
    assert x.equal(before), "the input was overwritten"
    assert (block.shortcut is None) == (stride == 1 and inputs == outputs)


def slow_bottleneck(block: PreActivationBottleneck, x: Tensor) -> Tensor:
    stride = block.conv2.stride[0]
    activated = normalised(block.bn1, x).clamp(min=0)
    hidden = normalised(block.bn2, F.conv2d(activated, block.conv1.weight)).clamp(min=0)
    hidden = F.conv2d(hidden, block.conv2.weight, padding=1)[:, :, ::stride, ::stride]
    residual = F.conv2d(normalised(block.bn3, hidden).clamp(min=0), block.conv3.weight)
    if block.shortcut is None:
        return x + residual
    weight = block.shortcut.weight
    assert isinstance(weight, Tensor)
    return F.conv2d(activated[:, :, ::stride, ::stride], weight) + residual


@pytest.mark.parametrize(("inputs", "channels", "stride"), [(8, 2, 1), (4, 2, 2), (3, 2, 1), (8, 2, 2)])
def test_a_bottleneck_normalises_and_activates_before_each_convolution(inputs: int, channels: int, stride: int) -> None:
    block = settled(PreActivationBottleneck(inputs, channels, stride).double(), inputs, 8, 6)
    assert isinstance(block, PreActivationBottleneck)
    x = normal(3, inputs, 8, 6, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(block(x), slow_bottleneck(block, x))
    assert x.equal(before), "the input was overwritten"
    assert block(x).shape[1] == 4 * channels


@given(rate=st.floats(0.01, 0.99), name=st.sampled_from(sorted(NETWORKS)))
@settings(max_examples=10)
def test_dropout_layers_are_there_if_and_only_if_the_rate_is_positive(rate: float, name: str) -> None:
    with torch.device("meta"):
        without, explicit, dropped = build(name), build(name, dropout=0.0), build(name, dropout=rate)
    assert dropouts(without) == dropouts(explicit) == []
    assert set(dropouts(dropped)) == {rate}
    assert count(dropped) == count(without)


def in_the_papers_order(network: nn.Sequential) -> nn.Sequential:
    """The same layers with every ReLU directly behind its batch norm: before dropout and pooling."""
    layers = list(network)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.ReLU):
            before = max(j for j in range(i) if isinstance(layers[j], (nn.BatchNorm1d, nn.BatchNorm2d)))
            layers.insert(before + 1, layers.pop(i))
    return nn.Sequential(*layers)


def test_lenet5_has_dropout_after_every_relu_in_the_papers_order() -> None:
    kinds = [type(layer) for layer in in_the_papers_order(lenet5(dropout=0.5))]
    after = [kinds[i + 1 : i + 3] for i, kind in enumerate(kinds) if kind is nn.ReLU]
    assert after == [[nn.Dropout, nn.MaxPool2d], [nn.Dropout, nn.MaxPool2d], [nn.Dropout, nn.Linear]]
    assert kinds.count(nn.Dropout) == 3


def test_vgg11_has_dropout_after_the_relus_without_pooling_and_before_the_classifier() -> None:
    layers = list(in_the_papers_order(vgg(dropout=0.1, classifier_dropout=0.5, width=0.125)))
    after = [type(layers[i + 1]) for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    assert after == [nn.MaxPool2d, nn.MaxPool2d, *[nn.Dropout, nn.MaxPool2d] * 3]
    assert isinstance(layers[-2], nn.Dropout)
    assert dropouts(vgg(dropout=0.1, classifier_dropout=0.5, width=0.125)) == [0.1, 0.1, 0.1, 0.5]
    assert dropouts(vgg(classifier_dropout=0.5, width=0.125)) == [0.5]


@pytest.mark.parametrize("name", ["lenet5", "vgg11"])
def test_the_order_of_relu_dropout_and_pooling_changes_neither_outputs_nor_gradients(name: str) -> None:
    arguments = {"dropout": 0.3, "channels": 3, "size": 32} | ({"width": 0.125} if name == "vgg11" else {})
    network = build(name, **arguments)
    assert isinstance(network, nn.Sequential)
    found = []
    for version in (network, in_the_papers_order(network)):
        torch.manual_seed(1)
        network.zero_grad()
        output = version.train()(normal(8, 3, 32, 32))
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) > 8
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lenet5", {"classes": 5, "channels": 3, "size": 19}),
        ("lenet5", {"classes": 10, "channels": 1, "size": 16, "dropout": 0.5}),
        ("vgg11", {"classes": 4, "channels": 1, "size": 32, "width": 0.1, "dropout": 0.1, "classifier_dropout": 0.5}),
        ("vgg11", {"classes": 5, "channels": 3, "size": 64, "width": 0.1}),
        ("resnet18", {"classes": 7, "channels": 3, "size": 32, "width": 0.1}),
        ("vgg16", {"classes": 5, "channels": 3, "size": 32, "width": 0.1, "bias": False}),
        ("resnet18-final-bn", {"classes": 7, "channels": 3, "size": 32, "width": 0.1}),
        ("resnet50", {"classes": 7, "channels": 3, "size": 16, "width": 0.05}),
        ("resnet18", {"classes": 2, "channels": 2, "size": 9, "width": 0.1, "dropout": 0.3}),
    ],
)
def test_networks_give_logits_and_work_with_sbn(name: str, arguments: dict[str, Any]) -> None:
    shape = arguments["channels"], arguments["size"], arguments["size"]
    torch.manual_seed(0)
    model = build(name, **arguments)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    model = settled(model, *shape)
    x = normal(6, *shape)
    assert model(x).shape == (6, arguments["classes"])
    posterior = stochbn.fit(model, [normal(16, *shape, seed=1)], batch_size=4, centre="observed")
    assert list(posterior.layers) == list(batch_norms(model))
    assert not posterior.skipped
    prediction = stochbn.Predictive(model, posterior, draws=3)(x)
    assert prediction.probs.shape == (6, arguments["classes"])
    assert (prediction.mutual_information > 0).any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lenet5", {"size": 15}, "LeNet-5 needs inputs of at least 16x16 pixels, got 15x15"),
        ("vgg11", {"size": 31}, "VGG-11 needs inputs of at least 32x32 pixels, got 31x31"),
        ("resnet18", {"size": 7}, "ResNet-18 needs inputs of at least 8x8 pixels, got 7x7"),
        ("vgg11", {"width": 0.001}, "leaves a layer without channels"),
        ("resnet18", {"width": 0.001}, "leaves a layer without channels"),
        ("lenet6", {}, "unknown network 'lenet6'; there are lenet5"),
        ("resnet18", {"depth": 34}, "resnet18 has no argument depth; it has classes"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)
