"""Triton's interpreter, with bfloat16 as a GPU computes with it, and for present versions of numpy.

It keeps bfloat16 values as 16-bit integers, whose sums and products Triton 3.6 takes as integers,
and drops the lower half of a float32 where a GPU rounds. Its scalars are arrays of one element,
which numpy 2.4 no longer takes for bounds of a loop; the sizes of its arrays are compile-time
numbers that do not divide. Import this before launching a kernel in a test.
"""

import threading

import jax
import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from torchfold import _triton

_ONE_AT_A_TIME = threading.Lock()  # the interpreter changes triton.language while a kernel runs
_create_dot = interpreter.InterpreterBuilder.create_dot
_binary_op = interpreter.InterpreterBuilder.binary_op
_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor


def _widened(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle(x.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def binary_op(self, lhs, rhs, op):
    if lhs.dtype.scalar != tl.bfloat16:
        return _binary_op(self, lhs, rhs, op)
    result = op(_widened(lhs).data, _widened(rhs).data)
    if result.dtype != np.float32:  # a comparison
        return interpreter.TensorHandle(result, tl.int1)
    return interpreter.TensorHandle(_rounded(result), tl.bfloat16)


def _rounded(data):
    return data.astype(ml_dtypes.bfloat16).view(np.uint16)


def convert_float(data, input_dtype, output_dtype, rounding_mode):
    if output_dtype == tl.bfloat16 and input_dtype == tl.float32:
        return _rounded(data.view(np.float32))
    if output_dtype == tl.float32 and input_dtype == tl.bfloat16:
        return data.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32)
    return _convert_float(data, input_dtype, output_dtype, rounding_mode)


def patch_lang_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter.InterpreterBuilder.create_dot = create_dot
interpreter.InterpreterBuilder.binary_op = binary_op
interpreter._patch_lang_tensor = patch_lang_tensor
interpreter._convert_float = convert_float
tl.constexpr.__rmod__ = lambda self, other: other % self.value


def jax_call(launch, *inputs):
    """What ``jaxfold._triton.call`` does, on the host by way of PyTorch's wrapper."""

    def run(*arrays):
        tensors = [_from_numpy(np.array(x)) for x in arrays]
        with _ONE_AT_A_TIME:
            return tuple(map(_to_numpy, _triton.call(launch, *tensors)))

    shapes = tuple(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in launch.outputs)
    return jax.pure_callback(run, shapes, *inputs)


def _from_numpy(x):
    """As PyTorch's array, which knows no bfloat16 of numpy: such numbers as two bytes."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _to_numpy(x):
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()
