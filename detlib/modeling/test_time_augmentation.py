"""Test-time augmentation under detectron2's path.

It needs image transforms, which models do not depend on. So the code is in
`detlib.evaluation.test_time_augmentation`, which is imported when one of its names is first used.
"""

__all__ = ["DatasetMapperTTA", "GeneralizedRCNNWithTTA"]  # noqa: F822


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detlib.evaluation import test_time_augmentation

    return getattr(test_time_augmentation, name)
