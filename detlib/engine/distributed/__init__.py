"""The processes of a training: how they find each other, what happens when one fails, and restarts.

`detlib.engine.launch` starts or joins them.
"""
