"""Necks: modules between a backbone and a transformer."""

from detlib.modeling.neck.channel_mapper import ChannelMapper

__all__ = ["ChannelMapper"]
