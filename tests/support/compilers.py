"""A compiler in a hurry, for tests whose subject is not what XLA makes of a program.

Most of the time that tests take goes into XLA, and most of that into the speed of programs that
run once.
"""

import functools
from typing import Any

import jax
from jax._src import compiler

# One kernel for each operation, none of them optimized, all in one module: a quarter of the time.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# A part of the keys of JAX's caches: what was compiled quickly is used by no other test.
quickly = jax.make_user_context(default_value=False)


@functools.cache
def known() -> dict[str, Any]:
    """The options that this version of XLA has."""
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
    """The same for a process of its own, in which programs run many times: a bit optimized."""
    options = {**known(), "xla_backend_optimization_level": 1}
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


def install() -> None:
    """Give the options to all programs of the context, those of single operations included.

    JAX has no public setting for that.
    """
    usual = compiler.get_compile_options

    @functools.wraps(usual)
    def get_compile_options(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
        options = {**(known() if quickly.value else {}), **(env_options_overrides or {})}
        return usual(*args, env_options_overrides=options, **kwargs)

    compiler.get_compile_options = get_compile_options
