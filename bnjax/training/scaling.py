"""Loss scaling, which keeps float16 gradients in range."""

from typing import Any

import jax
import jax.numpy as jnp


class Scale:
    """A dynamic loss scale, Flax's or jmp's; None leaves the loss alone.

    Args:
        scale: `flax.training.dynamic_scale.DynamicScale`, or an object with the methods `scale`,
            `unscale` and `adjust`, such as `jmp.DynamicLossScale`.
    """

    def __init__(self, scale: Any) -> None:
        self._scale = scale
        self._is_flax = hasattr(scale, "value_and_grad")

    def up(self, loss: jax.Array) -> jax.Array:
        """The loss, scaled."""
        if self._scale is None:
            return loss
        return loss * self._scale.scale if self._is_flax else self._scale.scale(loss)

    def down(self, grads: Any) -> Any:
        """Gradients of the scaled loss, unscaled in float32 so that none underflows."""
        if self._scale is None:
            return grads
        wide = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        if self._is_flax:
            return jax.tree.map(lambda grad: grad / self._scale.scale, wide)
        return self._scale.unscale(wide)

    def adjusted(self, finite: jax.Array) -> Any:
        """The scale for the next step, raised or lowered as the gradients were finite or not."""
        if self._is_flax:
            # Flax inspects the gradients of a function: pass one with finite or NaN gradients.
            sign = jnp.where(finite, 1.0, jnp.nan)
            return self._scale.value_and_grad(lambda x: x * sign)(jnp.ones(()))[0]
        return None if self._scale is None else self._scale.adjust(finite)
