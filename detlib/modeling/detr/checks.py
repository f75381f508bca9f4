"""Checks that the parts of a DETR-like model fit each other, made when it is built."""

from torch import nn

from detlib.modeling.config_checks import check_features

__all__ = ["check_decoder", "check_embed_dim", "check_neck"]


def check_embed_dim(embed_dim: int, position_embedding: nn.Module, transformer: nn.Module) -> None:
    """Raise ValueError unless the parts work on `embed_dim` channels, as far as they tell."""
    if getattr(transformer, "embed_dim", embed_dim) != embed_dim:
        raise ValueError(
            f"embed_dim is {embed_dim}, but that of the transformer's encoder is {transformer.embed_dim}"
        )
    decoder_dim = getattr(getattr(transformer, "decoder", None), "embed_dim", embed_dim)
    if decoder_dim != embed_dim:
        raise ValueError(f"embed_dim is {embed_dim}, but that of the transformer's decoder is {decoder_dim}")
    half = getattr(position_embedding, "num_pos_feats", None)
    if half is not None and 2 * half != embed_dim:
        raise ValueError(
            f"position_embedding's num_pos_feats must be half of embed_dim = {embed_dim}, got {half}"
        )


def check_decoder(transformer: nn.Module) -> None:
    """Raise ValueError if the decoder gives its last layer alone: heads and references go by layers."""
    if not getattr(transformer.decoder, "return_intermediate", True):
        raise ValueError(
            "return_intermediate of the transformer's decoder must be True, got False; to learn from the "
            "last layer alone give the model aux_loss=False"
        )


def check_neck(neck: nn.Module, backbone: nn.Module, embed_dim: int) -> None:
    """Raise ValueError unless the backbone gives what the neck takes, as far as they tell."""
    if getattr(neck, "out_channels", embed_dim) != embed_dim:
        raise ValueError(f"embed_dim is {embed_dim}, but the neck's out_channels is {neck.out_channels}")
    if not hasattr(neck, "in_features") or not hasattr(backbone, "output_shape"):
        return
    shapes = backbone.output_shape()
    check_features(neck.in_features, shapes, "the neck's in_features")
    for name, conv in zip(neck.in_features, getattr(neck, "convs", ())):
        expected = getattr(getattr(conv, "conv", None), "in_channels", None)
        if None not in (expected, shapes[name].channels) and expected != shapes[name].channels:
            raise ValueError(
                f"the neck's input_shapes say that {name!r} has {expected} channels, but the backbone gives "
                f"{shapes[name].channels}"
            )
