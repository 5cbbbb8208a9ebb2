"""Replicas: the copies that passes run on. They share the parameters of the user's network, and nothing else.

A replica is a deep copy of the network in which every parameter is a new object with the storage of the original. So
weights do not take more memory, and further training takes effect. Whatever else a pass changes (buffers, training
flags, hooks, attributes, a parameter that is assigned) changes in the copy. These rules go beyond a deep copy:

* Parameters that a pass writes to are state, not weights. Replicas have copies of them.
* Tensors that are plain attributes, such as the weight that old-style weight norm computes, are copied.
* Hooks and a patched ``forward`` are copied with the network. A bound method is bound to the copy. A function stays the
  same function, and runs in every pass.
* Wrappers (``torch.compile``, ``DataParallel``) are removed.
* A network that cannot be copied, or whose copy calls the original's layers (for example in a closure), runs in place:
  one call at a time, with its buffers replaced and its flags set until the call ends.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from stochbn.network.copying import copied_with, put_in_training
from stochbn.network.knowledge import Knowledge
from stochbn.network.layers import buffer_names, qualified_names, unwrap
from stochbn.network.snapshot import Snapshot
from stochbn.undisturbed import scope, undisturbed, without_gradients

__all__ = ["Network", "Replica", "named_modules"]


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a network by name, without ``torch.compile``, so that names are the same in replicas."""
    return {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}


class Replica:
    """A network to make passes with.

    Args:
        model: the copy, or the user's network if it runs in place.
        original: the user's network.
        own: the names of parameters that are copied.
        tensors: all other tensors of the copy, each with the original.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        own: Collection[str] = (),
        tensors: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.model = model
        self.modules = named_modules(model)
        self.norms: dict[str, _BatchNorm] = {}
        for name, place in qualified_names(model).items():
            layer = model.get_submodule(place)
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
                self.norms[name] = layer
        self._statistics = {
            name: (layer._buffers, key)
            for layer_name, layer in self.norms.items()
            for name, key in zip(buffer_names(layer_name), ("running_mean", "running_var"), strict=True)
        }
        self._own = {name: buffers[key] for name, (buffers, key) in self._statistics.items()}
        self._types = {name: (t.device, t.dtype) for name, t in self._own.items() if t is not None}
        self._copies, self._originals = [copy for copy, _ in tensors], [original for _, original in tensors]
        theirs = dict(original.named_parameters())
        mine = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
        self._owned = [(mine[name.replace("_orig_mod.", "")], theirs[name]) for name in own if name in theirs]
        self.usable = True  # until a pass has failed on it
        self.warm = False  # whether a pass has filled the caches
        self.through: Callable[..., Any] | None = None  # what passes call instead of the model
        self.compiled: Any = None  # the model's compiled code, once a call has asked for it
        self._parameters: list[tuple[dict[str, Any], str, Any]] = []
        self._training: frozenset[str] | None = None
        self._state: Snapshot | None = None
        self._versions: list[int] = []

    def fits(self) -> bool:
        """Whether its tensors still have the shapes of the originals."""
        return all(copy.shape == original.shape for copy, original in zip(self._copies, self._originals, strict=True))

    def refresh(self) -> None:
        """Update all copied tensors from the user's network."""
        self.statistics({})
        with torch.no_grad():
            if self._copies:
                torch._foreach_copy_(self._copies, self._originals)
            for parameter, original in self._owned:
                parameter.copy_(original)

    def modes(self, training: frozenset[str]) -> None:
        """Put the modules of these names in training mode and all others in evaluation mode.

        Flags are set one by one, because ``train()`` may be overridden.
        """
        for name, module in self.modules.items():
            flag = name in training
            if isinstance(module, torch.jit.ScriptModule):
                module.training = flag
            else:
                vars(module)["training"] = flag
        if training != self._training:
            self._training, self._state = training, None

    def statistics(self, draw: Mapping[str, Tensor]) -> None:
        """Replace the statistics of layers by drawn ones; layers that are not in `draw` get their own."""
        for name, (buffers, key) in self._statistics.items():
            value = draw.get(name)
            if value is None:
                buffers[key] = self._own[name]
                continue
            device, dtype = self._types[name]
            buffers[key] = value if value.dtype == dtype and value.device == device else value.to(device, dtype)

    def exchange(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace the parameters of these names by other tensors, until `restore`."""
        for name, value in parameters.items():
            prefix, _, key = name.rpartition(".")
            own = self.modules[prefix]._parameters
            self._parameters.append((own, key, own[key]))
            own[key] = value  # type: ignore[assignment]

    def restore(self) -> None:
        """Restore the network's own statistics and parameters."""
        self.statistics({})
        while self._parameters:
            own, key, value = self._parameters.pop()
            own[key] = value

    def mark(self) -> None:
        """Record the current state, for `changed`, if it is not recorded."""
        if self._state is None:
            self._state = Snapshot.of(self.model)
        self._versions = self._state.versions(without=self._observing())

    def changed(self) -> bool:
        """Whether anything has been assigned or written to since `mark`.

        Tensors that `restore` restores do not count, nor do buffers of batch norms in training mode, which do not use
        them. Copied parameters count.
        """
        if any(p.shape != original.shape or not torch.equal(p, original) for p, original in self._owned):
            return True
        state = self._state
        if state is None or not state.of_this(self.model):
            return True
        return state.versions(without=self._observing()) != self._versions

    def _observing(self) -> set[int]:
        return {id(buffer) for norm in self.norms.values() if norm.training for buffer in norm._buffers.values()}


class Network:
    """A user's network, and cached results about it: one object for all predictives of the network.

    If a network can be copied, nothing here waits for a lock, because an interrupted thread may never release it.

    Attributes:
        model: the user's network, without wrappers.
        known: cached results about it.
    """

    ABOUT_A_NETWORK: ClassVar[bool] = True
    """Skipped when taking a snapshot of a module that refers to it."""
    _all: ClassVar[weakref.WeakKeyDictionary[nn.Module, weakref.ref[Network]]] = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known = Knowledge(Snapshot.of(nn.Module()))
        self._in_use = threading.RLock()
        self._borrower: int | None = None  # the thread that runs the network in place, which changes it
        self._borrows = 0  # how often this thread entered
        self._local = threading.local()

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        """Return the object of a network, and make it if there is none.

        Raises:
            ValueError: parameters have no shape before a first input.
        """
        inner = unwrap(model)
        lazy = next((name for name, p in inner.named_parameters() if isinstance(p, UninitializedParameter)), None)
        if lazy is not None:
            raise ValueError(
                f"the parameter {lazy!r} of {type(inner).__name__} has no shape yet, as it belongs to a lazy layer; "
                "call the network once, and train it, before"
            )
        made = cls(inner)
        while True:
            first = cls._all.setdefault(inner, weakref.ref(made))()
            if first is not None:
                return first
            cls._all.pop(inner, None)  # the previous one was not referenced

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return Network(copy.deepcopy(self.model, memo))  # a model that holds a predictive may be half built here

    def __reduce__(self) -> tuple[Any, ...]:
        return Network.of, (self.model,)

    def weights(self) -> tuple[Any, ...]:
        """A value that changes with most writes to parameters since the last `look`, except those through ``.data``."""
        return tuple((*_form(p), None if p.is_inference() else p._version) for p in self.known.parameters)

    def state(self) -> tuple[Any, ...]:
        """A value that changes when buffers, except those of batch norms, are replaced or written to."""
        return tuple((id(b), -1 if b.is_inference() else b._version) for b in self.known.buffers)

    @undisturbed
    def look(self) -> None:
        """Drop the cached results if more of the network than parameters and buffers has changed.

        If another thread runs the network in place, this waits, because the network is changed until then.
        """
        if not self.known.in_place and self._borrower is None:
            before, known = self._borrows, self._looked()
            if self._borrows == before:
                self.known = known
                return
        with self._alone():
            if self._borrower != threading.get_ident():  # not from within a pass
                self.known = self._looked()

    def _looked(self) -> Knowledge:
        return self.known if self.known.is_of(self.model) else Knowledge(Snapshot.of(self.model), self.model)

    @scope
    def replica(self) -> Generator[Replica, None, None]:
        """Lend a replica for one call in this thread; after an exception it is dropped."""
        if not self.known.in_place:
            replica = self._take()
            if replica is not None:
                yield replica
                if replica.usable:
                    self._local.kept = self._key(), replica
                return
        with self._borrow() as borrowed:
            yield borrowed

    @scope
    def _alone(self) -> Generator[None, None, None]:
        """Keep other threads from the network itself."""
        lock: Any = self._in_use
        nested = lock._is_owned()
        if nested:
            yield
            return
        try:
            try:
                lock.acquire()
                yield
            finally:
                _let_go(lock)
        finally:  # again, as an interrupt may have come in between
            _let_go(lock)

    @scope
    def _borrow(self) -> Generator[Replica, None, None]:
        """The user's own network, for one thread at a time."""
        with self._alone():
            before = self._borrower
            try:
                try:
                    self._borrower = threading.get_ident()
                    self._borrows += 1
                    with _borrowed(self.model) as borrowed:
                        yield borrowed
                finally:
                    self._borrower = before
            finally:  # again, as an interrupt may have come in between
                self._borrower = before

    def trained(self) -> frozenset[str]:
        """The names of modules that are in training mode during training.

        Modules whose own ``train()`` leaves them in evaluation mode, such as backbones with frozen batch norms, are
        left out. ``train()`` is called on a copy, because it may change more than flags. Scripted modules, which cannot
        be drawn, are left out too.
        """
        names = {n for n, m in named_modules(self.model).items() if not isinstance(m, torch.jit.ScriptModule)}
        replica = self.fresh(own_parameters=True)
        if replica is not None and put_in_training(replica.model):
            names &= {name for name, module in replica.modules.items() if module.training}
        return frozenset(names)

    @scope
    def copied(self, *, train: bool = False) -> Generator[Replica, None, None]:
        """Lend a replica with its own parameters, for passes that may write to anything.

        Args:
            train: call its ``train()``.
        """
        replica = None if self.known.in_place else self.fresh(own_parameters=True)
        if replica is not None:
            if train:
                put_in_training(replica.model)
            yield replica
        else:
            with self._borrow() as borrowed:
                yield borrowed

    def _key(self) -> tuple[Any, ...]:
        return (
            self.known,
            self.known.state,
            tuple(map(_form, self.known.parameters)),
        )

    def _take(self) -> Replica | None:
        key, replica = self._local.__dict__.pop("kept", (None, None))
        if replica is None or key != self._key() or not replica.fits():
            return self.fresh()
        replica.refresh()
        return replica  # type: ignore[no-any-return]

    @without_gradients
    def fresh(self, *, own_parameters: bool = False, generators: dict[int, Any] | None = None) -> Replica | None:
        """A new replica; None for a network that cannot be copied, which ``known.in_place`` then explains.

        Args:
            own_parameters: it has copies of all parameters, so nothing that a pass writes to is shared.
            generators: those of random numbers that it shares with other replicas of the same call.
        """
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        try:
            own = names if own_parameters else self.known.state
            model, tensors = copied_with(self.model, own, {} if generators is None else generators)
            return Replica(model, self.model, own, tensors)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            self.known.in_place = f"it cannot be copied ({type(error).__name__}: {reason})"
            return None


def _let_go(lock: Any) -> None:
    """Release a lock of this thread's, if it has it, however often."""
    while lock._is_owned():
        lock.release()


def _form(parameter: Tensor) -> tuple[Any, ...]:
    """Where a parameter's numbers are, and how they lie."""
    return parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()


@scope
def _borrowed(model: nn.Module) -> Generator[Replica, None, None]:
    """The user's own network, its buffers exchanged for copies and its flags put back afterwards."""
    undo: list[Callable[[], Any]] = []

    def put_back() -> None:
        for each in reversed(undo):
            each()

    try:
        try:
            for module in model.modules():
                own = vars(module)  # in which a name is put back at once, whatever interrupts
                restore = own.__setitem__ if "training" in own else functools.partial(setattr, module)
                undo.append(functools.partial(restore, "training", module.training))
                for name, parameter in module._parameters.items():
                    undo.append(functools.partial(module._parameters.__setitem__, name, parameter))
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        undo.append(functools.partial(module._buffers.__setitem__, name, buffer))
                        module._buffers[name] = _cloned(buffer)
                if isinstance(module, _BatchNorm):
                    undo.append(functools.partial(own.__setitem__, "momentum", module.momentum))
            yield Replica(model, model)
        finally:
            put_back()
    finally:  # again, as an interrupt may have come in between
        put_back()


@without_gradients
def _cloned(buffer: Tensor) -> Tensor:
    return buffer.clone()
