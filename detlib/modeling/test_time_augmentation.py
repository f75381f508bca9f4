"""Test-time augmentation, under the path that users import it from.

It needs transforms of pictures, which models do not. So it lives in
`detlib.evaluation.test_time_augmentation`, and is imported when one of its names is first used.
"""

__all__ = ["DatasetMapperTTA", "GeneralizedRCNNWithTTA"]  # noqa: F822


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detlib.evaluation import test_time_augmentation

    return getattr(test_time_augmentation, name)
