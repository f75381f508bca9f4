"""The training loop and the hooks around its steps."""

import logging
import weakref
from typing import Any

from detlib.utils.events import EventStorage

__all__ = ["HookBase", "TrainerBase"]

logger = logging.getLogger(__name__)


class HookBase:
    """Something to be done at fixed points of the training loop.

    The loop calls, on each hook in the order of registration::

        hook.before_train()
        for iter in range(start_iter, max_iter):
            hook.before_step()
            trainer.run_step()      # calls hook.after_backward() between backward pass and update
            hook.after_step()
        hook.after_train()          # also when training ends with an error

    In a step, ``trainer.iter`` is the number of that step. In `after_train` it is the number of steps done,
    so ``trainer.iter < trainer.max_iter`` there means that training was cut short.
    """

    trainer: "TrainerBase"
    """A weak reference to the trainer, set by `TrainerBase.register_hooks`."""

    def before_train(self) -> None:
        """Called before the first step."""

    def after_train(self) -> None:
        """Called after the last step."""

    def before_step(self) -> None:
        """Called before each step."""

    def after_backward(self) -> None:
        """Called after the backward pass of each step, before the update."""

    def after_step(self) -> None:
        """Called after each step."""

    def state_dict(self) -> dict:
        """What a resumed training must know. Hooks that return something define ``load_state_dict`` too."""
        return {}


class TrainerBase:
    """The loop around `run_step`, which knows nothing of models, data or optimizers.

    Attributes:
        iter: the current step's number.
        start_iter: the first step's number.
        max_iter: the number of steps after which training ends.
        storage: the `EventStorage` of the training under way.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter: int = 0
        self.start_iter: int = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Adds hooks after those that are there; None entries are left out.

        Raises:
            TypeError: if an entry is no hook.
        """
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"hooks must be HookBase instances or None, got {type(hook).__name__}")
            # Hooks and trainer would otherwise hold each other, and the data loader's workers, for good.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Runs the steps from `start_iter` up to but without `max_iter`."""
        if start_iter >= max_iter:
            logger.warning(
                "Nothing is left to train: the start iteration %d is not below the last one, %d",
                start_iter,
                max_iter,
            )
        else:
            logger.info("Starting training from iteration %d of %d", start_iter, max_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                while self.iter < max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except Exception:
                logger.exception("Training failed at iteration %d:", self.iter)
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        # The storage counts on its own otherwise, and would lag in steps that are skipped.
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        for hook in self._hooks:
            hook.after_step()

    def run_step(self) -> None:
        """One step of training, for subclasses to define."""
        raise NotImplementedError(f"{type(self).__name__} must define run_step()")

    def state_dict(self) -> dict:
        """Returns ``{"iteration": ..., "hooks": {class name: state}}``; a class's second hook is "Name#1"."""
        state: dict[str, Any] = {"iteration": self.iter}
        hooks = {name: hook.state_dict() for name, hook in self._named_hooks()}
        hooks = {name: hook_state for name, hook_state in hooks.items() if hook_state}
        if hooks:
            state["hooks"] = hooks
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` returned; states of hooks that are not registered are left out."""
        self.iter = state_dict["iteration"]
        hooks = dict(self._named_hooks())
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(state)
            else:
                logger.warning("The checkpoint has a state for the hook '%s', which is not registered", name)

    def _named_hooks(self) -> list[tuple[str, HookBase]]:
        """The hooks with the names that their states have in checkpoints."""
        seen: dict[str, int] = {}
        named = []
        for hook in self._hooks:
            name = type(hook).__qualname__
            count = seen.get(name, 0)
            seen[name] = count + 1
            named.append((f"{name}#{count}" if count else name, hook))
        return named
