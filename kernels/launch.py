"""Launching a kernel again without what `kernel[grid](...)` does every time: binding and typing of some thirty arguments, 30 to 60 µs.

A launch is described by a key, from which everything but the tensors follows: grid, numbers, constants, options. What Triton made of it is kept
under the key, as long as every pointer begins at a multiple of 16 bytes, which Triton compiles in.
"""

import functools

MOST = 1024  # launches kept; where shapes change with every batch, older ones are of no use
remembered = functools.lru_cache(MOST)  # for what follows from a key


class Launcher:
    """A kernel with its launches so far.

    Args:
        kernel: A function under `triton.jit` whose first parameters are tensors.
        plan: key -> (grid, {name: number or constant} of all other parameters, options such as num_warps); a pure function.
    """

    def __init__(self, kernel, plan):
        self.kernel, self.plan, self.ready = kernel, plan, {}

    def __call__(self, tensors, key):
        """Launch; the tensors' dtypes and device must follow from the key too. Returns Triton's handle of the compiled kernel; None in the interpreter."""
        ready = self.ready.get(key)
        if ready is not None and _aligned(tensors):
            compiled, grid, rest = ready
            compiled[grid](*tensors, *rest)
            return compiled
        grid, values, options = self.plan(*key)
        compiled = self.kernel[grid](*tensors, **values, **options)
        if compiled is not None and _aligned(tensors):
            if len(self.ready) >= MOST:
                self.ready.clear()
            rest = tuple(values[name] for name in self.kernel.arg_names[len(tensors):])
            self.ready[key] = compiled, (*grid, 1, 1)[:3], rest
        return compiled


def _aligned(tensors):
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
