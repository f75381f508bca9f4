"""ViT-L and ViT-H, with their layer-wise learning rate decay."""

from functools import partial

from detlib.modeling import get_vit_lr_decay_rate


def _windows(depth):
    """Return the indices of the blocks with window attention: all but the last of each quarter."""
    return [i for i in range(depth) if (i + 1) % (depth // 4)]


def use_vit_large(model, optimizer, train):
    """Set the backbone to ViT-L."""
    model.backbone.net.update(
        embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.4, window_block_indexes=_windows(24)
    )
    optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=24, lr_decay_rate=0.8)
    train.init_checkpoint = (
        "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_large.pth?matching_heuristics=True"
    )


def use_vit_huge(model, optimizer, train):
    """Set the backbone to ViT-H, with weight decay for norms and position embeddings too."""
    model.backbone.net.update(
        embed_dim=1280, depth=32, num_heads=16, drop_path_rate=0.5, window_block_indexes=_windows(32)
    )
    optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=32, lr_decay_rate=0.9)
    optimizer.params.weight_decay_norm = None
    optimizer.params.overrides = {}
    train.init_checkpoint = (
        "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_huge_p14to16.pth?matching_heuristics=True"
    )
