"""Which step of a generation a forward belongs to, and which of the step's calls it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PROMPTS = 4  # of one step: with and without guidance, and those of a generation that was broken off


@dataclass(frozen=True)
class Call:
    """Which of the calls of a step a forward is: guidance may need several, with prompts of their own.

    `prompt` numbers the prompt; `has_prompt` says that it is that of the step's first call. A call that
    compares with dense attention is none of a generation.
    """

    prompt: int = 0
    has_prompt: bool = True
    is_first_step: bool = True
    is_first_call: bool = True
    is_comparing: bool = False


class Steps:
    """Count the steps of a generation by the timesteps that a transformer gets.

    `step` is that of the latest forward, counted from 0, -1 before the first; `call` says which of the step's
    calls it was. A new object has forgotten everything.
    """

    def __init__(self) -> None:
        self.step = -1
        self.call = Call()
        self._timestep = float("-inf")
        self._scheduler_calls = 0
        self._has_begun = self._is_driven = False
        self._prompts: list[Tensor] = []
        self._first_prompt = self._next_prompt = 0

    def count(self, timestep: Any, scheduler: Any, *, rises: bool) -> None:
        """Count changes, not calls: guidance calls the model twice per step. A step back is a new generation.

        Frames that are given, not made, may have a timestep of 0 of their own: the noisiest token counts.
        The pipeline's scheduler, if there is one, knows better where it drives the model, that is where it
        begins and goes on with the timesteps: when a generation begins, and how many evaluations a step has,
        whose timesteps may repeat or rise. Those of two steps may be equal where a pipeline rounds them to
        bfloat16, as HunyuanVideo's does.
        """
        now = float(timestep.detach().max() if torch.is_tensor(timestep) else timestep)
        now = -now if rises else now
        order, begin = getattr(scheduler, "order", 1), getattr(scheduler, "begin_index", None) or 0
        calls = getattr(scheduler, "step_index", None)
        calls = begin if calls is None else calls  # some begin to count at the end of the first step
        goes_on = self._is_driven and calls != self._scheduler_calls
        begins = calls == begin and self._has_begun
        is_new = begins or (now > self._timestep and not goes_on)
        is_change, before = goes_on or now != self._timestep, self.step
        if is_new:
            self.step, self._is_driven = 0, calls == begin
        elif is_change:
            self.step, self._is_driven = self.step + 1, goes_on
        self._timestep, self._scheduler_calls, self._has_begun = now, calls, calls != begin
        if order > 1 and self._is_driven:
            self.step = (calls - begin) // order
            is_change = self.step != before
        self.call = Call(is_first_step=self.step == 0, is_first_call=is_new or is_change)

    def number_prompt(self, prompt: Tensor) -> None:
        """Tell prompts apart by what they are: a generation that follows one that was broken off in its first
        step, or had but one, begins at the same timestep and looks like a further call of that step.
        """
        call, prompts = self.call, self._prompts
        kind = lambda x: (x.shape, x.dtype, x.device)  # noqa: E731
        same = (i for i, x in enumerate(prompts) if kind(x) == kind(prompt) and torch.equal(x, prompt))
        number = next(same, None)
        if number is None and call.is_first_step:
            number, self._next_prompt = self._next_prompt, (self._next_prompt + 1) % PROMPTS
            prompts[number : number + 1] = [prompt.detach().clone()]
        elif number is None and call.is_first_call:
            # A prompt that changes on the way goes on with what is remembered of the step before.
            number = self._first_prompt
            prompts[number : number + 1] = [prompt.detach().clone()]
        if call.is_first_call:
            self._first_prompt = number
        has_prompt = number == self._first_prompt
        number = self._first_prompt if number is None else number
        self.call = replace(call, prompt=number, has_prompt=has_prompt)
