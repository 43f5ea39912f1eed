"""Stacks of threads: what is read of them, and that reading keeps nothing alive."""

import threading
import weakref

import torch
from torch import nn

from yafsdp_like.comm.stacks import Spot, own_spot, spot_of


class Waiting(threading.Thread):
    """A thread whose function has a tensor, and waits."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.waits, self.may_go = threading.Event(), threading.Event()

    def run(self) -> None:
        local = torch.ones(1)
        self.local = weakref.ref(local)
        self.waits.set()
        self.may_go.wait()


def test_a_thread_is_told_with_the_line_of_the_users_code_and_what_was_read_keeps_no_tensor_of_it() -> None:
    thread = Waiting()
    thread.start()
    assert thread.waits.wait(30) and thread.ident is not None
    spot = spot_of(thread.ident)
    thread.may_go.set()
    thread.join(30)
    assert spot.line.startswith(f"{__file__}:") and spot.line.endswith(" in run")
    assert spot.innermost is not None and spot.innermost.function == "wait"
    assert thread.local() is None


class Told(nn.Module):
    """Its output is where its own forward was."""

    def forward(self) -> Spot:
        return own_spot()


def test_phases_are_told_apart() -> None:
    forward = Told()()
    assert (forward.phase, forward.line.rsplit(" ", 1)[1]) == ("forward", "forward")
    found = []
    parameter = nn.Parameter(torch.ones(1))
    parameter.register_hook(lambda gradient: found.append(own_spot()))
    parameter.sum().backward()
    assert found[0].phase == "backward"
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    def closure() -> float:
        found.append(own_spot())
        return 0.0

    optimizer.step(closure)
    assert found[1].phase == "an optimizer's step"
    assert own_spot().phase == ""


def test_a_thread_that_is_not_there_is_nowhere() -> None:
    assert spot_of(-1) == Spot()
