"""What the batch norms of a ResNet-50 communicate in one training step, counted in compiled code.

Run it as `python -m tests.benchmarks.collectives`. Time would mean nothing on virtual devices, so
none is measured: the collectives that each step runs are counted in the program that XLA made, less
those of the same network with affine layers in place of batch norm, and their bytes computed from
the shapes.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import bnjax
from tests.support import hlo

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
CHANNELS = [64] + [
    channels
    for width, blocks in STAGES
    for block in range(blocks)
    for channels in (width, width, 4 * width, *([4 * width] if block == 0 else []))
]


class Affine(nn.Module):
    """What is left of a batch norm that takes no statistics."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale and shift."""
        scale, bias = (self.param(n, nn.initializers.ones, x.shape[-1:]) for n in ("scale", "bias"))
        return x * scale + bias


class Stack(nn.Module):
    """A layer of each of ResNet-50's widths."""

    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, C) to (N, 2048)."""
        for channels in CHANNELS:
            x = nn.Dense(channels, use_bias=False)(x)
            x = bnjax.BatchNorm1d(axis_name="data")(x) if self.norm else Affine()(x)
            x = nn.relu(x)
        return x


def collectives(devices: int, norm: bool, backward: bool) -> int:
    """How many there are in the compiled step over so many devices."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    model = Stack(norm)
    x = jnp.zeros((4 * devices, 8))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def step(variables, x):
        params, stats = variables["params"], variables.get("batch_stats", {})

        def loss(params):
            y, moved = model.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return jnp.sum(y**2), moved

        # The gradients stay on their devices here: their sum is no business of batch norm.
        return jax.value_and_grad(loss, has_aux=True)(params) if backward else loss(params)

    split = jax.shard_map(
        lambda v, x: jax.tree.map(lambda leaf: leaf[None], step(v, x)),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )
    return len(hlo.collectives(jax.jit(split), (variables, x)))


def main() -> None:
    """Print the table."""
    layers, channels = len(CHANNELS), sum(CHANNELS)
    sent = 4 * (2 * channels + layers), 4 * 2 * channels
    table = Table(
        title=f"ResNet-50: {layers} batch norms, {channels:,} channels, one training step"
    )
    for column in ("devices", "forward", "forward+backward", "sent forward", "summed backward"):
        table.add_column(column, justify="right")
    for devices in (1, 2, 4, 8):
        counts = [
            collectives(devices, True, backward) - collectives(devices, False, backward)
            for backward in (False, True)
        ]
        table.add_row(str(devices), *map(str, counts), *(f"{n / 1024:,.0f} KiB" for n in sent))
    Console().print(table)
    Console().print("bytes are for each device and step, whatever the batch size")


if __name__ == "__main__":
    main()
