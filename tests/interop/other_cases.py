"""Networks of pytorchcv, MONAI, PyTorch Geometric and pytorch-tabnet, and an InceptionTime, randomly initialised."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from interop_check import Case
from torch import Tensor, nn

__all__ = ["CASES"]


def normal(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda seed, count: torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def pytorchcv(module: str, function: str, size: int = 32, **more: Any) -> Case:
    """A network of pytorchcv, whose other modules need torchvision and are not imported."""

    def build() -> nn.Module:
        networks = importlib.import_module(f"pytorchcv.models.{module}")
        model: nn.Module = getattr(networks, function)(pretrained=False, **more)
        return model

    return Case("pytorchcv", function, build, normal(3, size, size), objects=4 if size < 100 else 2)


class Inception(nn.Module):
    """A block of InceptionTime (Ismail Fawaz et al., 2020): convolutions of three lengths beside a pooled one."""

    def __init__(self, channels: int, filters: int, lengths: tuple[int, ...] = (5, 9, 17)) -> None:
        super().__init__()
        self.narrow = nn.Conv1d(channels, filters, 1, bias=False)
        self.wide = nn.ModuleList(nn.Conv1d(filters, filters, k, padding=k // 2, bias=False) for k in lengths)
        self.pooled = nn.Conv1d(channels, filters, 1, bias=False)
        self.norm = nn.BatchNorm1d(filters * (len(lengths) + 1))

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.narrow(x)
        pooled = self.pooled(nn.functional.max_pool1d(x, 3, 1, 1))
        return torch.relu(self.norm(torch.cat([*(conv(narrow) for conv in self.wide), pooled], 1)))


class InceptionTime(nn.Module):
    """Blocks with a residual connection over every three."""

    def __init__(self, channels: int = 2, filters: int = 4, depth: int = 6, classes: int = 5) -> None:
        super().__init__()
        widths = [channels] + [4 * filters] * depth
        self.blocks = nn.ModuleList(Inception(width, filters) for width in widths[:-1])
        self.shortcuts = nn.ModuleList(
            nn.Sequential(nn.Conv1d(widths[i], 4 * filters, 1, bias=False), nn.BatchNorm1d(4 * filters))
            for i in range(0, depth, 3)
        )
        self.head = nn.Linear(4 * filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 3 == 2:
                start = x = torch.relu(x + self.shortcuts[i // 3](start))
        out: Tensor = self.head(x.mean(2))
        return out


def monai(name: str, network: str, shape: tuple[int, ...], **settings: Any) -> Case:
    def build() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module("monai.networks.nets"), network)(**settings)
        return model

    return Case("monai", name, build, normal(*shape), objects=3)


class GraphNet(nn.Module):
    """A graph network of PyTorch Geometric with a sum over the nodes of each graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        geometric = importlib.import_module("torch_geometric.nn")
        self.body = getattr(geometric, kind)(4, 8, 2, norm="batch_norm")
        self.pool = geometric.global_add_pool
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.body(x, edge_index), batch))
        return out


def graphs(seed: int, count: int) -> Any:
    """A batch of random graphs, as PyTorch Geometric's loader gives it."""
    data = importlib.import_module("torch_geometric.data")
    generator = torch.Generator().manual_seed(seed)
    return data.Batch.from_data_list(
        [
            data.Data(
                x=torch.randn(5, 4, generator=generator), edge_index=torch.randint(5, (2, 9), generator=generator)
            )
            for _ in range(count)
        ]
    )


def of_graphs(batch: Any) -> dict[str, Tensor]:
    return {"x": batch.x, "edge_index": batch.edge_index, "batch": batch.batch}


def geometric(kind: str) -> Case:
    return Case("torch_geometric", kind, functools.partial(GraphNet, kind), graphs, {"inputs": of_graphs},
                fit={"batch_size": None})  # fmt: skip


def tabnet() -> nn.Module:
    network = importlib.import_module("pytorch_tabnet.tab_network")
    model: nn.Module = network.TabNet(
        10, 4, n_d=8, n_a=8, n_steps=3, virtual_batch_size=4, group_attention_matrix=torch.eye(10)
    )
    return model


CASES = [
    pytorchcv("resnet_cifar", "resnet20_cifar10"),
    pytorchcv("preresnet_cifar", "preresnet20_cifar10"),
    pytorchcv("seresnet_cifar", "seresnet20_cifar10"),
    pytorchcv("densenet_cifar", "densenet40_k12_cifar10"),
    pytorchcv("diaresnet_cifar", "diaresnet20_cifar10"),
    pytorchcv("shakeshakeresnet_cifar", "shakeshakeresnet20_2x16d_cifar10"),
    pytorchcv("ror_cifar", "ror3_56_cifar10"),
    pytorchcv("mobilenetv2", "mobilenetv2_wd4", 224),
    pytorchcv("mobilenetv3", "mobilenetv3_small_wd2", 224),
    pytorchcv("shufflenetv2", "shufflenetv2_wd2", 224),
    pytorchcv("squeezenext", "sqnxt23_w1", 224),
    pytorchcv("ghostnet", "ghostnet", 224),
    pytorchcv("efficientnet", "efficientnet_b0", 224),
    pytorchcv("mnasnet", "mnasnet_small", 224),
    pytorchcv("peleenet", "peleenet", 224),
    pytorchcv("fdmobilenet", "fdmobilenet_wd4", 224),
    pytorchcv("igcv3", "igcv3_wd4", 224),
    pytorchcv("menet", "menet108_8x1_g3", 224),
    pytorchcv("shufflenet", "shufflenet_g3_wd4", 224),
    monai("UNet, 3-D", "UNet", (1, 16, 16, 16), spatial_dims=3, in_channels=1, out_channels=3, channels=(4, 8, 16),
          strides=(2, 2), num_res_units=1, norm="batch"),
    monai("SegResNet", "SegResNet", (1, 16, 16, 16), spatial_dims=3, in_channels=1, out_channels=2, init_filters=8,
          norm="batch"),
    monai("DenseNet", "DenseNet", (1, 32, 32), spatial_dims=2, in_channels=1, out_channels=4, init_features=8,
          growth_rate=4, block_config=(2, 2, 2)),
    monai("BasicUNet", "BasicUNet", (1, 32, 32), spatial_dims=2, in_channels=1, out_channels=2,
          features=(4, 4, 8, 8, 16, 4), norm="batch"),
    monai("VNet", "VNet", (1, 16, 16, 16), spatial_dims=3, in_channels=1, out_channels=2),
    monai("AttentionUnet", "AttentionUnet", (1, 32, 32), spatial_dims=2, in_channels=1, out_channels=2,
          channels=(4, 8, 16), strides=(2, 2)),
    monai("DynUNet", "DynUNet", (1, 32, 32), spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3],
          strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 8], norm_name="batch"),
    monai("ResNet, 3-D", "resnet10", (1, 16, 16, 16), spatial_dims=3, n_input_channels=1, num_classes=3,
          widen_factor=0.125, pretrained=False),
    *map(geometric, ("GIN", "GCN", "GraphSAGE")),
    Case("pytorch_tabnet", "TabNet", tabnet, normal(10), {"logits": 0}, lambda output: output[0]),
    Case("written here", "InceptionTime", InceptionTime, normal(2, 40)),
]  # fmt: skip
