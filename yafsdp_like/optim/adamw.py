"""AdamW in few launches: torch's optimizer with another ``step``, which also writes what is all-gathered next.

States, parameter groups and checkpoints are ``torch.optim.AdamW``'s own; moments may be kept in fewer bytes
(``moments.py``). This file knows which parameters are updated together and in what order; the arithmetic is in
``kernels/adamw.py``. It does not know units: a runtime that wants its units updated in the order of their forward says
so with ``Passes``.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from yafsdp_like.kernels.adamw import AdamWStep, AdamWTable, AdamWTensors, rate_row
from yafsdp_like.kernels.blocks import upload
from yafsdp_like.ops.split_master import SplitTensor
from yafsdp_like.optim.clipping import clipping_factor, total_norm
from yafsdp_like.optim.moments import (
    MOMENTS,
    MomentsFormat,
    check_format,
    first_element,
    from_saved,
    local,
    new_moment,
    to_saved,
)
from yafsdp_like.optim.offload import OffloadedMoments

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from torch.optim.optimizer import ParamsT

Kind = tuple[torch.device, tuple[torch.dtype | None, ...], AdamWStep]  # what the parameters of a launch agree in
UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


def no_compute_copy(param: nn.Parameter) -> None:
    """Say that parameters are computed on as they are."""


def nothing(batch_index: int) -> None:
    """Do nothing after a batch."""


@dataclass(frozen=True)
class Passes:
    """The order in which parameters are updated, what else gets their new values, and what is called in between.

    ``batches`` are updated one after the other, each in one launch where dtypes, betas, eps and step counts agree;
    parameters that none of them names come last, in a batch of their own. ``compute_of`` gives a parameter's
    contiguous copy in another dtype, with as many elements as its local shard, which gets the new values too; it is
    called in every step. ``after_batch`` is called with a batch's index once its update is on the current stream.

    Raises ``ValueError`` when a parameter is named twice.
    """

    batches: Sequence[Sequence[nn.Parameter]] = ()
    compute_of: Callable[[nn.Parameter], torch.Tensor | None] = no_compute_copy
    after_batch: Callable[[int], None] = nothing

    def __post_init__(self) -> None:
        named = [param for batch in self.batches for param in batch]
        if len(set(named)) != len(named):
            raise ValueError(f"expected each parameter in one batch, found {len(named) - len(set(named))} repeated")


class AdamW(torch.optim.AdamW):
    """Drop-in for ``torch.optim.AdamW`` on plain and on sharded parameters, which it updates shard by shard.

    ``foreach`` and ``fused`` choose among torch's implementations and change nothing here. ``passes``, ``max_norm`` and
    two factors for gradients as they are read may be set between steps; no checkpoint has them. ``gradient_scale`` is a
    number. ``clip_factor`` is a tensor ``()`` on any device, or None: what it gives is rounded to the gradient's dtype.

    ``max_norm`` has ``step`` clip gradients to that 2-norm of all gradients of all groups together, over all ranks, as
    ``torch.nn.utils.clip_grad_norm_`` before it would, bit for bit where that is given parameters in the order of the
    groups; but the update multiplies them as it reads them, so that ``.grad`` keeps its values and is neither written
    nor read once more. ``grad_norm`` is then the norm of the last step, ``()`` on the device, before clipping: 0
    without gradients, and possibly not finite, which is no error. The CPU waits for nothing. See ``total_norm`` for
    several meshes.

    ``moments`` says what both moments are kept in: "fp32", which is the parameter's own dtype as in torch; "bf16",
    rounded stochastically; or "int8", 8 bit by blocks of 32, where the elements of a row divide into blocks, and the
    parameter's own dtype elsewhere (norms, biases). Rounding draws on ``seed``, equal on all ranks, the step, the
    parameter's position among the optimizer's and an element's in the whole parameter: ranks, their number and their
    shards give the same bits. See [Note: rounded stochastically] and [Note: moments in checkpoints].

    ``offload_moments`` keeps both in host memory, pinned for a GPU, and copies them to the device and back in each
    step, see [Note: offloaded moments]; the same bits come out. States and state dicts then have tensors of the host:
    ``state_dict`` waits for the last step's, whoever reads ``state`` itself must ``torch.cuda.synchronize`` before.
    Remainders of split masters that ``RemainderOffloadPolicy`` keeps in host memory are copied with them.

    Raises ``ValueError`` for what is not supported: ``amsgrad``, ``maximize``, ``capturable``, ``differentiable``, in
    the constructor, in a group, or in a loaded state, and other ``moments``; and in ``step`` for tensors that are not
    contiguous or not float32, bfloat16 or float16, for gradients sharded otherwise than their parameter, and for
    parameters not sharded by rows whose moments are rounded stochastically.
    """

    passes = Passes()
    gradient_scale = 1.0
    max_norm: float | None = None
    clip_factor: torch.Tensor | None = None  # another during a step with max_norm
    grad_norm: torch.Tensor | None = None
    moments: MomentsFormat = "fp32"
    seed = 0
    offload_moments = False
    _offloaded: OffloadedMoments | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        moments: MomentsFormat = "fp32",
        seed: int = 0,
        offload_moments: bool = False,
        max_norm: float | None = None,
        **unsupported: bool,
    ) -> None:
        self.max_norm = _checked(max_norm)
        self.moments, self.seed, self.offload_moments = check_format(moments), seed, offload_moments
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **unsupported)
        self._forget_places()

    def _forget_places(self) -> None:
        self._tables: dict[tuple[int, int, int], AdamWTable] = {}  # by batch, part of it, and launch within that
        self._rates: dict[torch.device, tuple[list[tuple[float, float]], torch.Tensor]] = {}  # as set, and there
        self._origins: dict[nn.Parameter, tuple[int, int]] = {}  # number and first element: of what random bits depend
        if self.offload_moments and self._offloaded is None:
            self._offloaded = OffloadedMoments(self.moments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch's does. Raises ``ValueError`` for an option that is not supported."""
        super().add_param_group(param_group)
        _refuse_unsupported(self.param_groups[-1:])

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied."""
        self._wait_for_moments()
        names = ("moments", "seed", "offload_moments", "max_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state, at the end of ``load_state_dict``, unpickling and copying."""
        _refuse_unsupported(state["param_groups"])
        super().__setstate__(state)
        self._forget_places()
        for values in self.state.values():
            if "step" in values:  # torch's fused AdamW keeps them on the GPU, where reading them would wait for it
                values["step"] = values["step"].cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's does, with moments as floats: see [Note: moments in checkpoints]."""
        self._wait_for_moments()
        found = super().state_dict()
        if self.moments == "int8":
            states = dict(found["state"])
            for key, param in self._by_key(found["param_groups"]):
                if (state := states.get(key)) is not None:
                    saved = {name: to_saved(state[name], param, signed) for name, signed in MOMENTS.items()}
                    states[key] = state | saved
            found["state"] = states
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of torch's AdamW or of this one, whatever its moments were kept in, and convert those."""
        self._wait_for_moments()
        if self.moments == "fp32" and not self.offload_moments:  # torch's way: into the parameter's dtype
            super().load_state_dict(state_dict)
            return
        states = state_dict["state"]
        others = {key: {name: state[name] for name in state if name not in MOMENTS} for key, state in states.items()}
        super().load_state_dict({**state_dict, "state": others})
        for key, param in self._by_key(state_dict["param_groups"]):
            for name in MOMENTS.keys() & states.get(key, {}):
                device = torch.device("cpu") if self.offload_moments else param.device
                self.state[param][name] = from_saved(states[key][name], param, MOMENTS[name], self.moments, device)

    @property
    def moment_buffers(self) -> Sequence[torch.Tensor]:
        """What offloaded moments go through on the device; nothing before the first step, or if they are kept there."""
        return [] if self._offloaded is None else self._offloaded.buffers

    def _wait_for_moments(self) -> None:
        if self._offloaded is not None:
            self._offloaded.wait()

    def _by_key(self, saved_groups: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, nn.Parameter]]:
        """Return parameters with their keys in a state dict whose groups are ``saved_groups``."""
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            yield from zip(saved["params"], group["params"], strict=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what ``closure`` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = self.group_indices()
        batches = self._batches(group_of)
        if self._offloaded is not None:
            self._offloaded.begin(batches, self.state)
        given, max_norm = self.clip_factor, _checked(self.max_norm)
        if max_norm is not None:
            grads = [p.grad for p in group_of if p.grad is not None]
            self.grad_norm = total_norm(grads) if grads else torch.tensor(0.0)
            self.clip_factor = clipping_factor(self.grad_norm, max_norm)
        try:
            for index, batch in enumerate(batches):
                self.update(index, [(p, group_of[p]) for p in batch if p.grad is not None])
                self.passes.after_batch(index)
        finally:
            self.clip_factor = given  # the next step may be one without max_norm
        return loss

    def _batches(self, group_of: dict[nn.Parameter, int]) -> list[Sequence[nn.Parameter]]:
        named = {p for batch in self.passes.batches for p in batch}
        unknown = sum(p not in group_of for p in named)
        if unknown:
            raise RuntimeError(
                f"the optimizer's batches name {unknown} parameters that are in none of its groups: set `passes` "
                "again after parameters were replaced"
            )
        rest = [p for p in group_of if p not in named]
        return [*self.passes.batches, *([rest] if rest else [])]

    def group_indices(self) -> dict[nn.Parameter, int]:
        """Return the index of every parameter's group."""
        return {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}

    @torch.no_grad()
    def update(self, batch_index: int, params: Sequence[tuple[nn.Parameter, int]]) -> None:
        """Do the step of ``params``, which have gradients and come with the index of their group.

        Launches a kernel for each kind of parameter. Its table is kept for the next call with the same ``batch_index``.
        """
        updates = {param: (self._tensors(param, index), self._advance(param, index)) for param, index in params}
        with closing(self._parts(batch_index, updates)) as parts:
            for part_index, part in enumerate(parts):
                launches: dict[Kind, list[AdamWTensors]] = {}
                for tensors, step in part:
                    launches.setdefault((tensors.main.device, tensors.dtypes, step), []).append(tensors)
                for launch_index, ((device, _, step), tensors_of_launch) in enumerate(launches.items()):
                    table = self._tables.setdefault((batch_index, part_index, launch_index), AdamWTable())
                    table.update(tensors_of_launch, self._rates_on(device), step, self.clip_factor)
        written: list[torch.Tensor] = []
        for param, (tensors, _) in updates.items():
            written += [param, tensors.main, *([] if tensors.compute is None else [tensors.compute])]
        increment_version(written)  # autograd does not see a kernel's writes

    def make_states(self, params: Iterable[nn.Parameter]) -> None:
        """Make the states of those of ``params`` that have none, on the current stream."""
        for state, param in ((self.state[param], param) for param in params):
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state.update({name: new_moment(param, self.moments) for name in MOMENTS})

    def _parts(
        self, batch_index: int, updates: dict[nn.Parameter, tuple[AdamWTensors, AdamWStep]]
    ) -> Generator[list[tuple[AdamWTensors, AdamWStep]]]:
        """Yield what is updated together: a batch, or what is on the device of one whose moments are offloaded."""
        if self._offloaded is None:
            yield list(updates.values())
            return
        with closing(self._offloaded.pieces(batch_index)) as loaded:
            for pieces in loaded:
                found = [(piece, *updates[piece.param]) for piece in pieces if piece.param in updates]
                yield [(tensors.with_states(*piece[1:]), step) for piece, tensors, step in found]

    def _advance(self, param: nn.Parameter, group_index: int) -> AdamWStep:
        group, count = self.param_groups[group_index], self.state[param]["step"]
        count += 1
        beta1, beta2 = group["betas"]
        seed = None if self.moments == "fp32" else self.seed
        return AdamWStep(int(count), float(beta1), float(beta2), group["eps"], self.gradient_scale, seed)

    def _tensors(self, param: nn.Parameter, group_index: int) -> AdamWTensors:
        """Return this rank's part of a parameter, its gradient and its states, which are made by its first step."""
        self.make_states([param])
        state = self.state[param]
        assert param.grad is not None
        main, remainder = local(param), None
        if isinstance(main, SplitTensor):
            main, remainder = main.halves()
        return AdamWTensors(
            main,
            _local_grad(param, param.grad),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            self.passes.compute_of(param),
            group_index,
            *((0, 0) if self.moments == "fp32" else self._origin(param)),
            remainder,
        )

    def _origin(self, param: nn.Parameter) -> tuple[int, int]:
        """Return a parameter's number among the optimizer's, and where its elements here begin in the whole one."""
        if param not in self._origins:
            params = (p for group in self.param_groups for p in group["params"])
            self._origins[param] = next(k for k, p in enumerate(params) if p is param), first_element(param)
        return self._origins[param]

    def _rates_on(self, device: torch.device) -> torch.Tensor:
        """Return the groups' learning rates and decays, ``(num_groups, 2)`` float32; copied when one has changed."""
        rates = [rate_row(float(group["lr"]), float(group["weight_decay"])) for group in self.param_groups]
        if device not in self._rates or self._rates[device][0] != rates:
            self._rates[device] = rates, upload(rates, torch.float32, device)
        return self._rates[device][1]


def _local_grad(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    found, expected = (t.placements if isinstance(t, DTensor) else None for t in (grad, param))
    if found != expected:
        raise ValueError(
            f"a gradient of shape {tuple(grad.shape)}: expected its parameter's placements {expected}, found {found}"
        )
    return local(grad)


def _checked(max_norm: float | None) -> float | None:
    """Return ``max_norm``. Raises ``ValueError`` for one that clips nothing sensible."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"AdamW: expected max_norm above 0, or None for no clipping, found {max_norm}")
    return max_norm


def _refuse_unsupported(groups: Sequence[dict[str, Any]]) -> None:
    for option in UNSUPPORTED:
        if any(group.get(option) for group in groups):
            raise ValueError(f"AdamW does not support {option}=True: use torch.optim.AdamW, or leave it out")
