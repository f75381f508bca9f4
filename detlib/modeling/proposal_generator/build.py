"""The registry of proposal generators and the function that builds one from a config."""

from detlib.utils.registry import Registry

__all__ = ["PROPOSAL_GENERATOR_REGISTRY", "build_proposal_generator"]

PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
PROPOSAL_GENERATOR_REGISTRY.__doc__ = """
Classes called as `cls(cfg, input_shape: dict[str, ShapeSpec])`, found by
`cfg.MODEL.PROPOSAL_GENERATOR.NAME`. A generator maps `(images: ImageList, features: dict[str, Tensor],
gt_instances: list[Instances] | None)` to proposals (`list[Instances]`) and losses (`dict[str, Tensor]`).
"""


@PROPOSAL_GENERATOR_REGISTRY.register()
def PrecomputedProposals(cfg, input_shape) -> None:
    """Return None: the proposals are part of the input."""


def build_proposal_generator(cfg, input_shape):
    """Build the proposal generator `cfg.MODEL.PROPOSAL_GENERATOR.NAME`.

    Args:
        cfg: the full config.
        input_shape: the backbone's `output_shape()`.

    Returns:
        nn.Module | None: None for "PrecomputedProposals", where the proposals are part of the input.
    """
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    return PROPOSAL_GENERATOR_REGISTRY.get(name, key="MODEL.PROPOSAL_GENERATOR.NAME")(cfg, input_shape)
