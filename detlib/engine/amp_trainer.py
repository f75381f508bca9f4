"""The training step in mixed precision."""

import logging

import torch
from torch import nn
from torch.nn.parallel import DataParallel

from detlib.engine.simple_trainer import SimpleTrainer
from detlib.utils.events import get_event_storage

__all__ = ["AMPTrainer"]

logger = logging.getLogger(__name__)


class AMPTrainer(SimpleTrainer):
    """`SimpleTrainer` with autocast and, for float16, scaled gradients.

    On the CPU, whose kernels have little for float16, that precision is replaced by bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
        **kwargs,
    ):
        """
        Args:
            model, data_loader, optimizer, gather_metric_period, zero_grad_before_forward,
                async_write_metrics, **kwargs: as in `SimpleTrainer`.
            grad_scaler: scales the loss so that small gradients survive; None makes one, which does nothing
                unless `precision` is float16.
            precision: torch.float16 or torch.bfloat16.
            log_grad_scaler: put the scale into the storage as "[metric]grad_scaler".

        Raises:
            ValueError: for another precision, or a model that one process spreads over several devices.
        """
        if precision not in (torch.float16, torch.bfloat16):
            raise ValueError(f"precision must be torch.float16 or torch.bfloat16, got {precision}")
        if isinstance(model, DataParallel) or len(getattr(model, "device_ids", None) or []) > 1:
            raise ValueError("AMPTrainer trains one device per process: use detlib.engine.launch for several")
        super().__init__(
            model,
            data_loader,
            optimizer,
            gather_metric_period,
            zero_grad_before_forward,
            async_write_metrics,
            **kwargs,
        )
        self.device_type = next(model.parameters()).device.type
        if self.device_type == "cpu" and precision == torch.float16:
            logger.info("Mixed precision on the CPU uses bfloat16 in place of float16")
            precision = torch.bfloat16
        self.precision = precision
        if grad_scaler is None:
            grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)
        self.grad_scaler = grad_scaler
        _make_fused_momentum(optimizer)
        self.log_grad_scaler = log_grad_scaler

    def run_step(self) -> None:
        super().run_step()
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())

    def _forward(self, data) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device_type, dtype=self.precision):
            return super()._forward(data)

    def _backward(self, losses: torch.Tensor) -> None:
        self.grad_scaler.scale(losses).backward()

    def _update(self) -> None:
        # Explicitly, so that clipping sees true gradients also with optimizers that unscale by themselves.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # A training that began in full precision has none.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _make_fused_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives a fused SGD its momentum, of zeros, before the first step.

    PyTorch would make it in that step, of memory as it is, and leave it so where the gradients
    overflow, as those of first steps often do: NaN a step later.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"]:
            for param in group["params"]:
                state = optimizer.state[param]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(param)
