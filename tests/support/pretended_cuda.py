"""A CUDA device that is not there: tensors say ``cuda:0``, compute on the CPU, and refuse as CUDA.

    PRETENDED_GPUS=1 PYTHONPATH=.:tests/support python -m pytest ...  # all processes, Ray's too
    pretended_cuda.install(1)                                         # this one, before tensors

A tensor of it is a :class:`CudaTensor` around a CPU tensor, so that everything is computed, and one
CUDA global generator stands beside the CPU's. As on CUDA, these are errors: ``.numpy()``, pickling,
operands on two devices, a generator of another device, products of whole numbers, and an index or
label out of range, after which every operation fails. CPU scalars and CPU indices may join in.

:func:`counting` counts kernels and the points where the CPU waits for the device. With
``DRIVER.limit`` set, tensors that do not fit into so many bytes are out of memory.

What it cannot show: times, other roundings, kernels without an order, races between streams, the
memory of a CUDA context, kernels that one of the devices lacks. Made for PyTorch 2.15; it reaches
into what is private there.
"""

import functools
import os
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPUS = "PRETENDED_GPUS"
"""The environment variable that says how many; its processes pretend as soon as they have torch."""

_SPARE = "pretended"  # torch's device for third parties, where the tensors lie as C++ sees them
_OTHER_NUMBERS = 0x5EED  # CUDA draws other numbers than the CPU of the same seed
_MIXED = "Expected all tensors to be on the same device, but found at least two devices"


class Driver:
    """What a CUDA driver would know, and what is counted.

    Attributes:
        limit: Bytes of memory; 0 for any number.
        used: Bytes that tensors hold now, followed while there is a limit.
        peak: The most they held.
        kernels: How often each operation was launched while counting.
        waits: How often the CPU waited, by reason, while counting.
        places: The same, by the line of the project.
        fractions: The memory caps that were asked for.
    """

    def __init__(self) -> None:
        self.started = self.broken = self.counts = False
        self.seed: int | None = None
        self.random = torch.Generator()
        self.random.manual_seed(1)
        self.limit = self.used = self.peak = 0
        self.storages: dict[int, list[int]] = {}
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.places: Counter[tuple[str, str]] = Counter()
        self.fractions: list[float] = []

    def start(self) -> None:
        """Be initialised, as at the first use of CUDA; a seed that was set before holds."""
        if not self.started:
            self.started = True
            if self.seed is not None:
                self.random.manual_seed(self.seed)

    def seed_all(self, seed: int) -> None:
        self.seed = int(seed) ^ _OTHER_NUMBERS
        if self.started:
            self.random.manual_seed(self.seed)

    def launched(self, operation: str) -> None:
        if self.counts:
            self.kernels[operation] += 1

    def waited(self, why: str, times: int = 1) -> None:
        if self.counts and times:
            self.waits[why] += times
            self.places[why, _place()] += times


DRIVER = Driver()


def _place() -> str:
    """Return the innermost line of the project that led here."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        if "site-packages" not in frame.filename and frame.filename != __file__:
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
    return "?"


class CudaTensor(Tensor):
    """A tensor that says it lies on ``cuda``, around a CPU tensor with its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, inner: Tensor, index: int = 0) -> "CudaTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("privateuseone", index),
            requires_grad=False,
        )

    def __init__(self, inner: Tensor, index: int = 0) -> None:
        self._inner, self._index = inner, index
        DRIVER.start()
        if DRIVER.limit:
            self._claim = _Claim(inner)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({self._inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a CUDA tensor is pickled: it opens only where there is such a device")

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaTensor":
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support deepcopy")
        copied = CudaTensor(self._inner.detach().clone(), self._index)
        DRIVER.launched("clone")
        if getattr(self, "_is_param", False):
            copied._is_param = True
        copied.requires_grad_(self.requires_grad)
        if self.grad is not None:
            copied.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = copied
        return copied

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._index)

    @property
    def is_cuda(self) -> bool:
        return True

    def tolist(self) -> Any:
        DRIVER.waited("tolist")
        return _inner(self).tolist()


class _Claim:
    """Counts a tensor's storage as used until the tensor is gone."""

    def __init__(self, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        self.key, size = storage.data_ptr(), storage.nbytes()
        known = DRIVER.storages.setdefault(self.key, [size, 0])
        if not known[1]:
            if DRIVER.used + size > DRIVER.limit:
                del DRIVER.storages[self.key]
                self.key = 0
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has a total "
                    f"capacity of {DRIVER.limit} bytes of which {DRIVER.limit - DRIVER.used} free."
                )
            DRIVER.used += size
            DRIVER.peak = max(DRIVER.peak, DRIVER.used)
        known[1] += 1

    def __del__(self) -> None:
        known = DRIVER.storages.get(self.key) if DRIVER is not None else None
        if known is not None:
            known[1] -= 1
            if not known[1]:
                DRIVER.used -= known[0]
                del DRIVER.storages[self.key]


class _Everywhere(TorchDispatchMode):
    """Sees every operation of its thread, those that make a tensor included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(func, args, kwargs or {})


# ------------------------------------------------------------------ what CUDA takes, and refuses

_CROSSING = {"_to_copy", "copy_", "copy", "_copy_from", "lift_fresh", "lift_fresh_copy", "set_"}
_INDEXING = {
    *("index", "index_put", "index_put_", "_index_put_impl_"),
    *("_unsafe_index", "_unsafe_index_put"),
}
_STRICT = {  # do not even take a CPU scalar
    *("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "mv", "dot", "vdot"),
    *("cat", "stack", "convolution", "convolution_backward", "gather", "scatter", "scatter_"),
    *("scatter_add", "scatter_add_", "index_select", "index_copy", "index_copy_", "index_add"),
    *("index_add_", "embedding", "embedding_dense_backward", "nll_loss_forward"),
    *("nll_loss_backward", "native_batch_norm", "native_batch_norm_backward", "searchsorted"),
    *("isin", "_cdist_forward", "_cdist_backward", "grid_sampler_2d", "take", "index_fill"),
    *("bincount", "_fused_adam_"),
}
_NO_KERNEL = {
    *("detach", "alias", "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t"),
    *("unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "unbind", "narrow"),
    *("as_strided", "diagonal", "unfold", "lift_fresh", "_reshape_alias", "chunk", "movedim"),
    *("real", "imag", "is_same_size", "empty", "empty_like", "new_empty", "empty_strided"),
    "new_empty_strided",
}
_WAITING = {  # the size or the value of the result must come to the CPU
    "_local_scalar_dense": "item",
    **dict.fromkeys(("equal", "allclose"), "equal"),
    **dict.fromkeys(("nonzero", "masked_select", "argwhere"), "nonzero"),
    **dict.fromkeys(("_unique2", "unique_dim", "unique_consecutive"), "unique"),
    **dict.fromkeys(("bincount", "repeat_interleave"), "size"),
    **dict.fromkeys(("_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_inv_ex"), "linalg"),
    **dict.fromkeys(("linalg_lstsq", "linalg_cholesky_ex"), "linalg"),
}
_FLOATING = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
_UNFOLLOWED = {"t_", "transpose_", "squeeze_", "unsqueeze_", "resize_", "resize_as_", "swapaxes_"}


def _operate(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute one operation: on the CPU what lies there, else as CUDA would."""
    name = func._schema.name.split("::")[-1]
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    ours = [each for each in tensors if isinstance(each, CudaTensor)]
    asked = _named(kwargs.get("device"))
    if not ours and (asked is None or asked.type != "cuda"):
        _check_generator(kwargs, "cpu")
        return func(*args, **kwargs)
    if DRIVER.broken:
        raise RuntimeError("CUDA error: device-side assert triggered by an earlier operation")
    DRIVER.start()
    if name in _UNFOLLOWED:
        raise NotImplementedError(f"the pretended device does not follow {name}")
    target = asked or torch.device("cuda", ours[0]._index)
    _check_generator(kwargs, target.type)
    _check_devices(func, name, args, kwargs, tensors)
    if name in _FLOATING and ours and not ours[0].dtype.is_floating_point:
        raise RuntimeError(f'"addmm_cuda" not implemented for {ours[0].dtype}')
    if DRIVER.counts:
        _count(name, args, tensors, target)
    result = _computed(func, args, kwargs, cuda=target.type == "cuda")
    writes, written = _written(func, args, kwargs)
    if writes:
        return written
    if target.type == "cpu":
        return result
    return tree_map(lambda x: CudaTensor(x, target.index or 0) if type(x) is Tensor else x, result)


def _computed(func: Any, args: Any, kwargs: Any, *, cuda: bool) -> Any:
    """Compute an operation on the numbers, drawing from CUDA's global generator."""
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    draws = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
    try:
        with _cuda_numbers() if draws and cuda else nullcontext():
            return func(*inner_args, **inner_kwargs)
    except IndexError as error:
        if "out of bounds" not in str(error) and "out of range" not in str(error):
            raise
        DRIVER.broken = True
        raise RuntimeError(f"CUDA error: device-side assert triggered ({error})") from error


def _inner(value: Any) -> Any:
    return value._inner if isinstance(value, CudaTensor) else value


@contextmanager
def _cuda_numbers() -> Iterator[None]:
    kept = torch.default_generator.get_state()
    torch.default_generator.set_state(DRIVER.random.get_state())
    try:
        yield
    finally:
        DRIVER.random.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(kept)


def _arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operation writes to."""
    return [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _written(func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
    """Return whether an operation only writes to its arguments, and what it then returns."""
    written, returns = _arguments(func, args, kwargs), func._schema.returns
    if not written or func._schema.name.endswith(("native_batch_norm", "batch_norm_legit")):
        return False, None
    if not returns:
        return True, None
    if all(each.alias_info is not None and each.alias_info.is_write for each in returns):
        return True, written[0] if len(returns) == 1 else tuple(written)
    return False, None


def _check_devices(func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    ours = [each for each in tensors if isinstance(each, CudaTensor)]
    others = [each for each in tensors if not isinstance(each, CudaTensor)]
    if name in _CROSSING:
        return
    if len({each._index for each in ours}) > 1:
        raise RuntimeError(f"{_MIXED}, both GPUs")
    if not ours or not others:
        return
    if name in _INDEXING:
        _check_index(name, args)
        return
    written = [each for each in _arguments(func, args, kwargs) if isinstance(each, Tensor)]
    strict = name in _STRICT or name.startswith(("linalg_", "_linalg"))
    if strict or any(each.dim() for each in others) or any(not _ours(each) for each in written):
        shapes = [tuple(each.shape) for each in others]
        raise RuntimeError(f"{_MIXED}, cuda:0 and cpu! ({name}; {shapes} on the CPU)")


def _ours(value: Any) -> bool:
    return isinstance(value, CudaTensor)


def _check_index(name: str, args: Any) -> None:
    """CPU indices may index a CUDA tensor; the other way round, and values, may not."""
    if not _ours(args[0]):
        raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
    values = args[2] if len(args) > 2 else None
    if isinstance(values, Tensor) and not _ours(values) and values.dim():
        raise RuntimeError(f"{_MIXED}, cuda:0 and cpu! (the values of {name})")


def _check_generator(kwargs: Any, kind: str) -> None:
    if (generator := kwargs.get("generator")) is None:
        return
    if (found := _GENERATORS.get(generator._cdata, generator).device.type) != kind:
        raise RuntimeError(f"Expected a {kind!r} device type for generator but found {found!r}")


def _count(name: str, args: Any, tensors: list[Tensor], target: torch.device) -> None:
    if name in {"_to_copy", "copy_"}:
        source = args[0] if name == "_to_copy" else args[1]
        there = target.type == "cuda" if name == "_to_copy" else _ours(args[0])
        if _ours(source) != there:
            pinned = there and getattr(source, "_pretends_pinned", False)
            DRIVER.waited("to gpu" if there else "to cpu", 0 if pinned else 1)
            return
    if name in _INDEXING:
        given = [each for each in args[1] if each is not None]
        masks = [each for each in given if each.dtype == torch.bool]
        values = args[2] if len(args) > 2 else None
        if not (isinstance(values, Tensor) and not _ours(values) and values.numel() == 1):
            DRIVER.waited("mask index", len(masks))
        DRIVER.waited("to gpu", sum(not _ours(each) for each in given) if not masks else 0)
    if name in _WAITING:
        DRIVER.waited(_WAITING[name])
    if name not in _NO_KERNEL:
        DRIVER.launched(name)


# ---------------------------------------------------------------------------- in torch's place


def _named(device: Any) -> torch.device | None:
    """Return a device with its index, refused where there is none of that number."""
    if device is None:
        return None
    found = torch.device(device)
    if found.type not in {"cuda", _SPARE, "privateuseone"}:
        return found
    if found.index is not None and found.index >= _visible():
        raise RuntimeError("CUDA error: invalid device ordinal")
    return torch.device("cuda", found.index or 0)


def _visible() -> int:
    """Return how many GPUs this process may see."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return int(os.environ.get(GPUS, "1"))
    return len([each for each in chosen.split(",") if each.strip()])


_GENERATORS: dict[int, "_Generator"] = {}


class _AnyGenerator(type(torch._C.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch._C.Generator)


class _Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """``torch.Generator``; for ``cuda``, one that says so."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != "cuda":
            return torch._C.Generator(device)
        made = super().__new__(cls, "cpu")
        made._place = _named(device)
        _GENERATORS[made._cdata] = made  # C++ hands the same one back as another object
        return made

    @property
    def device(self) -> torch.device:
        return self._place

    def manual_seed(self, seed: int) -> Any:
        return super().manual_seed(seed ^ _OTHER_NUMBERS)


def install(gpus: int | None = None) -> None:
    """Pretend from now on, in this thread, in those to come and in autograd's.

    Args:
        gpus: How many GPUs; None for what the environment says. A process that pretends already
            keeps those it has.
    """
    if torch.Generator is _Generator:
        return
    if gpus is not None:
        os.environ[GPUS] = str(gpus)
    _setup_privateuseone_for_python_backend(_SPARE, backend_module=torch.cuda)
    torch._C._ensureCUDADeviceGuardSet()
    torch.backends.cudnn.enabled = False
    torch.Generator = _Generator
    for name, does in _cuda_functions().items():
        setattr(torch.cuda, name, does)
    _replace_moves()
    for name in ("tensor", "as_tensor"):
        _replace_maker(name)
    _let_optimizers_take_it()
    _enter_threads()


def _cuda_functions() -> dict[str, Callable[..., Any]]:
    def initialise() -> None:
        if not _visible():
            raise RuntimeError("No CUDA GPUs are available")
        DRIVER.start()

    def state(device: Any = None) -> Tensor:
        initialise()
        return DRIVER.random.get_state()

    def cap(share: float, device: Any = None) -> None:
        initialise()
        DRIVER.fractions.append(share)

    return {
        "is_available": lambda: _visible() > 0,
        "device_count": _visible,
        "current_device": lambda: 0,
        "_lazy_init": initialise,
        "init": initialise,
        "is_initialized": lambda: DRIVER.started,
        "synchronize": lambda device=None: DRIVER.waited("synchronize"),
        "manual_seed": DRIVER.seed_all,
        "manual_seed_all": DRIVER.seed_all,
        "get_rng_state": state,
        "get_rng_state_all": lambda: [state()],
        "set_rng_state": lambda value, device=None: DRIVER.random.set_state(value),
        "set_rng_state_all": lambda values: DRIVER.random.set_state(values[0]),
        "is_current_stream_capturing": lambda: False,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "Pretended GPU",
        "mem_get_info": lambda device=None: (max(0, DRIVER.limit - DRIVER.used), DRIVER.limit),
        "memory_allocated": lambda device=None: DRIVER.used,
        "max_memory_allocated": lambda device=None: DRIVER.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(DRIVER, "peak", DRIVER.used),
        "set_per_process_memory_fraction": cap,
    }


def _replace_moves() -> None:
    """Let ``Tensor.to``, ``.cuda``, ``.pin_memory`` and ``Module.to`` know the device."""
    to, apply = Tensor.to, torch.nn.Module._apply
    swapping = torch.__future__

    def spare(value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
            return torch.device("privateuseone", _named(value).index)  # type: ignore[union-attr]
        return value

    @functools.wraps(to)
    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = {name: spare(value) for name, value in kwargs.items()}
        return to(self, *(spare(each) for each in args), **named)

    @functools.wraps(apply)
    def applied(self: Any, fn: Any, recurse: bool = True) -> Any:
        # A real move keeps the Parameter objects; with a subclass torch does so by swapping.
        kept = swapping.get_swap_module_params_on_conversion()
        swapping.set_swap_module_params_on_conversion(True)
        try:
            return apply(self, fn, recurse)
        finally:
            swapping.set_swap_module_params_on_conversion(kept)

    def pinned(self: Tensor, device: Any = None) -> Tensor:
        copied = self.clone()
        copied._pretends_pinned = True  # type: ignore[attr-defined]
        return copied

    Tensor.to = moved
    Tensor.cuda = lambda self, device=None, **_: self.to(_named(device or "cuda"))
    Tensor.pin_memory = pinned
    torch.nn.Module._apply = applied


def _replace_maker(name: str) -> None:
    original = getattr(torch, name)

    @functools.wraps(original)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        place = _named(device)
        if place is None or place.type != "cuda":
            where = {} if place is None else {"device": place}
            return original(data, *args, **where, **kwargs)
        found = original(data, *args, **kwargs)
        return found if _ours(found) else found.to(place)

    setattr(torch, name, made)


def _let_optimizers_take_it() -> None:
    """Let the fused and stacked forms of optimisers run, as they do on CUDA."""
    for module in (optimizer, _foreach_utils):
        kinds = getattr(module, "_foreach_supported_types", None)
        if isinstance(kinds, list) and CudaTensor not in kinds:
            kinds.append(CudaTensor)


def _enter_threads() -> None:
    """Watch this thread's operations, and those of every thread that starts from now on."""
    begin = threading.Thread._bootstrap_inner

    @functools.wraps(begin)
    def watched(self: threading.Thread) -> None:
        with _Everywhere():
            torch._C._set_only_lift_cpu_tensors(True)
            begin(self)

    threading.Thread._bootstrap_inner = watched
    torch._C._set_only_lift_cpu_tensors(True)
    _Everywhere().__enter__()  # for good


@contextmanager
def counting() -> Iterator[Driver]:
    """Count kernels and waits inside the block.

    Yields:
        The driver, whose ``kernels``, ``waits`` and ``places`` are read after it.
    """
    for counter in (DRIVER.kernels, DRIVER.waits, DRIVER.places):
        counter.clear()
    DRIVER.counts = True
    try:
        yield DRIVER
    finally:
        DRIVER.counts = False


@contextmanager
def memory(limit: int) -> Iterator[Driver]:
    """Give the device so many bytes more than are used, inside the block.

    Yields:
        The driver, whose ``peak`` starts at what is used.
    """
    DRIVER.limit, DRIVER.peak = DRIVER.used + limit, DRIVER.used
    try:
        yield DRIVER
    finally:
        DRIVER.limit = 0


if os.environ.get(GPUS):
    install()
