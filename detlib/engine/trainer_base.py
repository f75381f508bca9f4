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
        for iter in range(start_iter, max_iter):    # up to trainer.stop()
            hook.before_step()
            trainer.run_step()      # calls hook.after_backward() between backward pass and update
            hook.after_step()
        hook.after_train()          # also when training ends with an error

    In a step, ``trainer.iter`` is the number of that step. In `after_train` it is the number of steps done,
    and ``trainer.is_finished`` says whether training came to its end, be it early, or was cut short by an
    error.
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
        stopped_reason: why `stop` was called; None if it was not.
        batch: the data of the step under way, for hooks that ask for it with `keep_batch`; else None.
        keep_batch: whether the current step keeps its batch until its hooks are through; a hook sets it in
            ``before_step``, and it lasts for that step.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter: int = 0
        self.start_iter: int = 0
        self.max_iter: int
        self.storage: EventStorage
        self.stopped_reason: str | None = None
        self.batch: Any = None
        self.keep_batch: bool = False
        self._is_over = False
        self._has_failed = False

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
        self.stopped_reason = None
        self._is_over = self._has_failed = False
        with EventStorage(start_iter) as self.storage:
            try:
                self._run(max_iter)
            except BaseException as error:
                self._has_failed = True
                if isinstance(error, Exception):
                    logger.exception("Training failed at iteration %d:", self.iter)
                try:
                    self.after_train()
                except Exception:
                    # What went wrong first is what is to be known.
                    logger.exception("After that, the end of the training failed too:")
                raise
            self.after_train()

    def _run(self, max_iter: int) -> None:
        """`before_train` and the steps."""
        try:
            self.before_train()
            while self.iter < max_iter and self.stopped_reason is None:
                self.before_step()
                self.run_step()
                self.after_step()
                self.iter += 1
        finally:
            self._is_over = True
            self.keep_batch, self.batch = False, None

    def stop(self, reason: str) -> None:
        """Ends the training in good order once the hooks of the step under way are through.

        In distributed training every process must call it at the same step. What is due at the end is then
        done: the final checkpoint, the last evaluation.

        Args:
            reason: said in the log, as the end of "Training stops: ...".
        """
        if self.stopped_reason is None:
            self.stopped_reason = reason
            logger.info("Training stops: %s", reason)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done or `stop` was called, and nothing failed."""
        return not self._has_failed and (self.stopped_reason is not None or self.iter >= self.max_iter)

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        """Calls all hooks, also when one of them fails, and then raises the first one's error."""
        self.storage.iter = self.iter
        errors: list[Exception] = []
        for hook in self._hooks:
            try:
                hook.after_train()
            except Exception as error:
                if errors:
                    logger.error("%s failed too:", type(hook).__name__, exc_info=error)
                errors.append(error)
        if errors:
            raise errors[0]

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
        self.keep_batch, self.batch = False, None

    def run_step(self) -> None:
        """One step of training, for subclasses to define."""
        raise NotImplementedError(f"{type(self).__name__} must define run_step()")

    def state_dict(self) -> dict:
        """Returns ``{"iteration": ..., "hooks": {class name: state}}``; a class's second hook is "Name#1"."""
        # The number of the last step, beyond which `iter` is once the loop is over.
        state: dict[str, Any] = {"iteration": self.iter - 1 if self._is_over else self.iter}
        hooks = {name: hook.state_dict() for name, hook in self._named_hooks()}
        hooks = {name: hook_state for name, hook_state in hooks.items() if hook_state}
        if hooks:
            state["hooks"] = hooks
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` returned; states of hooks that are not registered are left out."""
        self.iter = state_dict["iteration"]
        self._is_over = False
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
