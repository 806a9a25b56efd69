"""Compiling for a GPU or TPU that is not there.

JAX's plugins hold XLA's whole compiler. A topology, a list of devices that can be compiled for and
nothing else, is made from a name or, for a GPU, from the description below. So kernels, buffers,
bytes and collectives are those of the real device. Times are not known: there is no autotuner.
"""

import functools
import importlib.metadata
import re
from enum import StrEnum
from typing import Any, NamedTuple

# What a process needs that compiles: nobody may look for a device.
AWAY = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
EXTRA = "pip install 'bnjax[programs]'"
_WANTED = re.compile(r"libtpu==([\d.]+)\.\*")


class Platform(StrEnum):
    """Whose compiler it is."""

    gpu = "gpu"
    tpu = "tpu"

    @property
    def package(self) -> str:
        """The plugin, as it is installed."""
        return "jax-cuda12-plugin" if self is Platform.gpu else "libtpu"

    @property
    def wanted(self) -> str:
        """The version of the plugin that fits the jaxlib that is installed, or how it begins."""
        if self is Platform.gpu:
            return importlib.metadata.version("jaxlib")
        pins = map(_WANTED.match, importlib.metadata.requires("jax") or ())
        return next(pin[1] for pin in pins if pin)

    @property
    def missing(self) -> str:
        """Why nothing can be compiled for it here, and what to install; or nothing."""
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self}: {self.package} is not installed: {EXTRA}"
        if f"{found}.".startswith(f"{self.wanted}."):
            return ""
        fitting = f"{self.package}=={self.wanted}" + ("" if self is Platform.gpu else ".*")
        return f"{self}: {self.package} {found} does not fit this jaxlib: pip install '{fitting}'"

    @property
    def versions(self) -> dict[str, str]:
        """Those on which a count depends."""
        return {name: importlib.metadata.version(name) for name in ("jax", "flax", self.package)}


class Chip(NamedTuple):
    """One kind of device.

    Attributes:
        name: as its makers call it.
        platform: whose compiler it has.
        layouts: the topologies of so many devices, in the compiler's words.
        settings: what a topology is asked for with besides its name.
    """

    name: str
    platform: Platform
    layouts: dict[int, str]
    settings: dict[str, str]

    def devices(self, count: int = 1) -> Any:
        """So many of them, to be compiled for; of a TPU's smallest topology the first."""
        smallest = min(size for size in self.layouts if size >= count)
        return _devices(self.platform, self.layouts[smallest], tuple(self.settings.items()))[:count]


@functools.cache
def _devices(platform: Platform, layout: str, settings: tuple[tuple[str, str], ...]) -> Any:
    from jax.experimental import topologies

    if platform is Platform.tpu:
        named = {"platform": "tpu", "topology_name": layout}
    else:
        named = {"platform": "cuda", "topology_name": "h100", "topology": layout}
    return topologies.get_topology_desc(**named, **dict(settings)).devices


# The text of a GpuTargetConfigProto.
H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  device_address_bits: 64  pcie_bandwidth: 34359738368
  cuda_compute_capability { major: 9  feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation"  platform_version: "Compute Capability 9.0a"
  ecc_enabled: true  name: "NVIDIA H100 80GB HBM3"
  driver_version: "12.8.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10  patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_MEGACORE, _MEGACHIP = ({"chip_config_name": n} for n in ("megacore", "megachip_tccontrol"))

# A GPU's topology is slices x hosts x GPUs, with eight to a host.
H100 = Chip(
    "H100",
    Platform.gpu,
    {1: "1x1x1", 8: "1x1x8", 64: "1x8x8", 256: "1x32x8", 4096: "1x512x8"},
    {"target_config": H100_TARGET},
)
V5E = Chip(
    "TPU v5e", Platform.tpu, {4: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}, {}
)
V6E = Chip("TPU v6e", Platform.tpu, {4: "v6e:2x2", 8: "v6e:2x4"}, _MEGACHIP)
_CUBES = {8: "2x2x2", 64: "4x4x4", 256: "4x8x8", 4096: "16x16x16"}
V4, V5P = (
    Chip(f"TPU {name}", Platform.tpu, {n: f"{name}:{cube}" for n, cube in _CUBES.items()}, settings)
    for name, settings in (("v4", _MEGACORE), ("v5p", _MEGACHIP))
)
CHIPS = {Platform.gpu: (H100,), Platform.tpu: (V5E, V6E)}
BIG = {Platform.gpu: (H100,), Platform.tpu: (V5E, V4, V5P)}


def compiled(function: Any, arguments: Any, chip: Chip, **options: Any) -> Any:
    """What XLA makes of a function for the devices on which the arguments are."""
    import jax

    gpu = chip.platform is Platform.gpu
    # The autotuner times kernels on a device.
    settings: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"} if gpu else {}
    lowered = (
        jax.jit(function, **options)
        .trace(*arguments)
        .lower(lowering_platforms=("cuda" if gpu else "tpu",))
    )
    return lowered.compile(compiler_options=settings)
