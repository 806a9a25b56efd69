"""Trees for tests of files, and the packages that each format needs."""

import jax.numpy as jnp
import numpy as np

NEEDS = {".safetensors": "safetensors", ".pth": "torch", ".msgpack": "msgpack", "": "orbax"}
STATE_DICT = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "bn.weight": np.ones(5, jnp.bfloat16),
    "bn.running_mean": np.linspace(0, 1, 5, dtype=np.float16),
    "bn.running_var": np.ones(5, np.float32),
    "bn.num_batches_tracked": np.array(3),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}
VARIABLES = {
    "params": {"conv": {"kernel": STATE_DICT["conv.weight"]}, "bn_0": {"scale": np.ones(5, "f")}},
    "batch_stats": {"bn_0": {"mean": np.zeros(5, "f")}},
}
