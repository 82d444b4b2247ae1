"""Weights cast under autocast once a window instead of once a micro-batch.

Under ``torch.autocast`` an fp32 weight is cast anew, 6 bytes a parameter, whenever the outermost autocast context has
been left in between: leaving it clears torch's cache of casts (torch/amp/autocast_mode.py, ``autocast.__exit__``). So
while a window is open one level of nesting is held here, and no context of the user's is the outermost. Weights do not
change inside a window; before they do, at its end, the cache is cleared. Gradients are the same to the last bit: each
micro-batch's own is made in the low precision, cast, and added up in fp32, as before.

A cast knows nothing of the weight after it was made, so it is thrown away

    before an update, and where a window is given up: `KeptCasts.release`
    after the step of any optimizer, of another model that trains beside this one, say
    before a window: where autocast is around the whole loop, torch itself goes on with weights from before the update

What is not seen is a weight that is changed in place by hand inside a window, or loaded: call
``torch.clear_autocast_cache()`` after it. The cache does not know the dtype either: a weight used under fp16 and bf16
in one window gets the first one's, which layers refuse ("must have the same dtype"), while a product of two weights
takes it in silence. Both are torch's own rules for one context around it all, and both end with
``torch.autocast(..., cache_enabled=False)``, which leaves nothing to hold.

The price: casts are alive until the window ends, 2 bytes a parameter, which the graph holds anyway at the end of a
forward, where the peak is. Where nothing is added up in place (``fused=False``) the gradients of weights whose casts
come from an earlier micro-batch also wait for the end of the backward in the low precision: `Graph.hurry_casts`.

Known inefficiency: nesting is a thread's, the cache is not. Checkpoints on CUDA run again in threads of the engine,
whose contexts clear the cache; and so do micro-batches in lockstep. Then weights are cast again.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class KeptCasts:
    """Torch's cache of casts, kept while it is held.

    Holding it is asked for in every window, also where there is no autocast: it must cost no more than a few calls.
    """

    def __init__(self) -> None:
        self._level: _Level | None = None
        self._is_held = False

    def hold(self) -> None:
        """From now on casts are kept, those made before are not."""
        if not self._is_held:
            torch.clear_autocast_cache()
            if self._level is None or not self._level.enter():
                self._level = _Level(self)
            self._is_held = True

    def release(self) -> None:
        """No cast is kept any longer; needs not be held, and may be called in any thread."""
        torch.clear_autocast_cache()
        if self._is_held and self._level is not None:
            self._is_held = False
            self._level.leave()

    def __del__(self) -> None:
        if self._is_held:
            self.release()


class _Level:
    """One level of autocast nesting, in the thread that made it; held from the start.

    Args:
        owner: while it is there the hook stays.
    """

    def __init__(self, owner: KeptCasts) -> None:
        self._thread = threading.get_ident()
        self._is_held = True
        self._is_wanted = True
        hook = register_optimizer_step_post_hook(self._has_stepped)
        weakref.finalize(owner, hook.remove).atexit = False
        torch.autocast_increment_nesting()

    def enter(self) -> bool:
        """Holds it again; not in another thread."""
        if threading.get_ident() != self._thread:
            return False
        self._is_wanted = True
        if not self._is_held:
            self._is_held = True
            torch.autocast_increment_nesting()
        return True

    def leave(self) -> None:
        """Ends it; in another thread (garbage is collected in any) not before its own one makes a step."""
        self._is_wanted = False
        if threading.get_ident() == self._thread:
            self._end()

    def _has_stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._is_held:
            torch.clear_autocast_cache()
            if not self._is_wanted and threading.get_ident() == self._thread:
                self._end()

    def _end(self) -> None:
        if self._is_held:
            self._is_held = False
            torch.autocast_decrement_nesting()
