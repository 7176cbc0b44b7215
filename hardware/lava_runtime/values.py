"""Values of variables, as Lava hands them out and takes them, in one piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from lava.utils.sparse import find
from scipy.sparse import csr_matrix


def as_lava_gives_it(value: Any, shape: tuple[int, ...]) -> npt.NDArray:
    """What `Runtime.get_var` gives: float64 of the variable's shape.

    Strings become their ASCII codes, sparse matrices the values of their non-zero elements:
    `Var.get` makes strings and matrices of them.
    """
    if isinstance(value, str):
        return np.array(list(value.encode("ascii")), dtype=np.float64)
    if isinstance(value, csr_matrix):
        return np.asarray(find(value, explicit_zeros=True)[2], dtype=np.float64)
    result = np.array(value, dtype=np.float64)
    return result.reshape(shape) if result.size == np.prod(shape) else result


def replaced(old: Any, new: Any, index: Any = None) -> Any:
    """A variable's value after it is set: an array in place, anything else anew, of the same type.

    Args:
        old: the value in the process model.
        new: what `Var.set` hands over: an array; ASCII codes for a string; for a sparse matrix the
            values of its non-zero elements.
        index: elements to set, for arrays; all of them if None.

    Raises:
        ValueError, TypeError, IndexError: it does not fit.
    """
    if isinstance(old, str):
        return bytes(np.asarray(new).astype(int).tolist()).decode("ascii")
    given = np.asarray(new)
    if isinstance(old, csr_matrix):
        rows, columns, _ = find(old, explicit_zeros=True)
        return csr_matrix((given.ravel(), (rows, columns)), old.shape)
    if not isinstance(old, np.ndarray):
        return type(old)(given.item())
    if index is not None:
        old[index] = given
    elif given.size != old.size:
        raise ValueError(f"{given.size} elements given, it has {old.size} of shape {old.shape}")
    else:
        old[...] = given.reshape(old.shape)
    return old
