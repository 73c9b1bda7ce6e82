"""A device that is not the CPU, on the CPU: what a GPU would refuse raises, and what would make it wait is counted.

Tensors of the device `pretend` hold a tensor of the CPU and compute with it, so results are the CPU's to the last bit.
An operator that is given tensors of both places raises, as it does with a real device. What the host has to wait for
(a number read, a mask's number of entries, a copy back) is a *wait*: a real device would first finish all its work.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_aten = torch.ops.aten
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
          "equal", "is_nonzero"}  # fmt: skip
"""Operators whose result, or its shape, the host needs at once."""


class _OnDevice(Tensor):
    """A tensor whose device is `pretend`."""

    inner: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]

    @staticmethod
    def __new__(cls, inner: Tensor) -> _OnDevice:
        wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"pretend({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class _Device(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits)


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    leaves = pytree.arg_tree_leaves(*args, **kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
    name = func._schema.name.removeprefix("aten::")
    asked = kwargs.get("device")
    onto = bool(ours) if asked is None else torch.device(asked).type == NAME
    if not ours and not onto:
        return func(*args, **kwargs)
    if name in ("_to_copy", "copy_"):
        # To the host: it waits. From the host: it does not where memory is pinned, which is left to the driver.
        source = args[1] if name == "copy_" else args[0]
        to = args[0] if name == "copy_" else None
        if isinstance(source, _OnDevice) and (not onto if to is None else not isinstance(to, _OnDevice)):
            waits[f"copy in {_where()}"] += 1
    else:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, _OnDevice) and tensor.ndim > 0]
        if ours and strangers:
            raise RuntimeError(f"{name}: tensors on {NAME} and on {strangers[0].device}")
        if name in _WAITS or (name.startswith("index") and _has_mask(args)):
            waits[f"{name} in {_where()}"] += 1
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    inner_args, inner_kwargs = pytree.tree_map_only(_OnDevice, lambda each: each.inner, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and name != "set_" and name.endswith("_"):
        return args[0]
    return pytree.tree_map_only(Tensor, _OnDevice, result) if onto else result


def _where() -> str:
    """The innermost function of the library that is running."""
    frame = sys._getframe()
    while frame is not None and f"{os.sep}dar{os.sep}" not in frame.f_code.co_filename:
        frame = frame.f_back
    return (
        "?" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}:{frame.f_lineno}"
    )


def _has_mask(args: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in pytree.tree_leaves(args[1:2]))


_registered: list[Any] = []


@contextmanager
def pretend_device() -> Iterator[tuple[torch.device, Counter[str]]]:
    """(the device, how often the host had to wait for it and for what)."""
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        # What `torch.tensor(…, device=…)` calls below every mode, and autocast, which changes nothing here.
        own, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
        own.impl("empty_strided", lambda size, stride, **options: _OnDevice(
            torch.empty_strided(size, stride, dtype=options.get("dtype"))), "PrivateUse1")  # fmt: skip
        own.impl("_copy_from", _copied, "PrivateUse1")
        every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _registered.extend((own, every))
    # Parameters that two modules share stay shared when they move, as they do with a real device.
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Device() as mode:
            yield torch.device(NAME, 0), mode.waits
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inner = [each.inner if isinstance(each, _OnDevice) else each for each in (source, target)]
    inner[1].copy_(inner[0])
    return target


class _Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        pass
