"""Compile quickly, for tests that do not depend on how XLA compiles a program.

Tests spend most of their time in XLA, mostly to optimize programs that run once.
"""

import functools
from typing import Any

import jax
from jax._src import compiler

# One unoptimized kernel for each operation, all in one module: a quarter of the compile time.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# Part of JAX's cache keys, so that other tests do not reuse programs that were compiled quickly.
quickly = jax.make_user_context(default_value=False)


@functools.cache
def known() -> dict[str, Any]:
    """The options that this version of XLA knows."""
    found = {}
    for name, value in QUICK.items():
        try:
            with quickly(False):
                jax.jit(lambda: 0, compiler_options={name: value})()
        except jax.errors.JaxRuntimeError:
            continue
        found[name] = value
    return found


def flags() -> str:
    """XLA flags for other processes, whose programs run many times: with some optimization."""
    options = {**known(), "xla_backend_optimization_level": 1}
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


def install() -> None:
    """Apply the options to all programs in the context, including those of single operations.

    JAX has no public setting for this.
    """
    usual = compiler.get_compile_options

    @functools.wraps(usual)
    def get_compile_options(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
        options = {**(known() if quickly.value else {}), **(env_options_overrides or {})}
        return usual(*args, env_options_overrides=options, **kwargs)

    compiler.get_compile_options = get_compile_options
