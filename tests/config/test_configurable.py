import pytest
import yacs.config

from detlib.config import CfgNode, configurable, get_cfg


class Head:
    @configurable
    def __init__(self, *, channels, classes=80, name="head"):
        """Doc."""
        self.args = (channels, classes, name)

    @classmethod
    def from_config(cls, cfg, shape=5):
        return {"channels": shape, "classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}


class WithDepth(Head):
    @configurable
    def __init__(self, *, depth, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth

    @classmethod
    def from_config(cls, cfg, shape):
        return super().from_config(cfg, shape) | {"depth": 3}


class Plain(Head):
    """A subclass without an __init__ of its own."""

    @classmethod
    def from_config(cls, cfg):
        return {"channels": 1}


class ByHand(Head):
    """A subclass with an undecorated __init__, which passes the config on."""

    def __init__(self, cfg, shape):
        super().__init__(cfg, shape, name="by hand")


@pytest.fixture
def cfg():
    return get_cfg()


def test_explicit_arguments_and_config(cfg):
    assert Head(channels=1).args == (1, 80, "head")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    assert Head(cfg).args == (5, 3, "head")
    assert Head(cfg, 7).args == Head(cfg, shape=7).args == Head(shape=7, cfg=cfg).args == (7, 3, "head")
    assert Head(cfg, classes=9, name="x").args == (5, 9, "x")
    assert Head(yacs.config.CfgNode(cfg)).args == (5, 3, "head")
    assert Head.__init__.__doc__ == "Doc."


def test_subclasses_inherit_or_extend_from_config(cfg):
    head = WithDepth(cfg, 7, name="d")
    assert head.args == (7, 80, "d") and head.depth == 3
    assert WithDepth(depth=1, channels=2).args == (2, 80, "head")
    assert Plain(cfg).args == (1, 80, "head")
    assert ByHand(cfg, 6).args == (6, 80, "by hand")


def test_only_a_cfg_node_is_a_config(cfg):
    with pytest.raises(TypeError, match="positional"):
        Head({"MODEL": 1})

    class TakesAny:
        @configurable
        def __init__(self, value):
            self.value = value

        @classmethod
        def from_config(cls, cfg):
            return {"value": "from config"}

    assert TakesAny({"a": 1}).value == {"a": 1}
    assert TakesAny(CfgNode()).value == "from config"


def test_unknown_argument_names_class_and_key(cfg):
    class Wrong(Head):
        @classmethod
        def from_config(cls, cfg):
            return {"channels": 1, "clases": 2}

    with pytest.raises(TypeError, match="Wrong.*'clases'.*from_config.*'classes'"):
        Wrong(cfg)
    with pytest.raises(TypeError, match="Head.*'nam'.*the call gave.*'name'"):
        Head(cfg, nam="x")
    with pytest.raises(TypeError, match="missing.*'channels'"):
        Head()


def test_from_config_may_accept_any_keyword(cfg):
    class Any(Head):
        @classmethod
        def from_config(cls, cfg, **kwargs):
            return {"channels": kwargs.pop("double") * 2, **kwargs}

    assert Any(cfg, double=4, name="n").args == (8, 80, "n")


def test_missing_or_wrong_from_config_fails(cfg):
    class Without:
        @configurable
        def __init__(self, *, a=1):
            pass

    with pytest.raises(TypeError, match="Without.*from_config"):
        Without(cfg)

    class NotAClassMethod(Without):
        def from_config(self, cfg):
            return {}

    with pytest.raises(TypeError, match="NotAClassMethod.*class method"):
        NotAClassMethod(cfg)

    class NoDict(Without):
        @classmethod
        def from_config(cls, cfg):
            return [1]

    with pytest.raises(TypeError, match="NoDict.*dict.*list"):
        NoDict(cfg)
    with pytest.raises(TypeError, match="__init__"):
        configurable(lambda a: a)


def test_configurable_function(cfg):
    @configurable(from_config=lambda cfg, scale=1: {"size": cfg.INPUT.MIN_SIZE_TEST * scale})
    def build(size, flip=False):
        """Doc."""
        return size, flip

    assert build(3) == build(size=3) == (3, False)
    assert build(cfg) == (800, False)
    assert build(cfg, scale=2, flip=True) == build(cfg=cfg, scale=2, flip=True) == (1600, True)
    assert build(cfg, size=5) == (5, False)
    assert build.__doc__ == "Doc." and build.from_config(cfg) == {"size": 800}
    with pytest.raises(TypeError, match="build.*'flipp'.*'flip'"):
        build(cfg, flipp=True)
    with pytest.raises(TypeError, match="'cfg'"):
        configurable(from_config=lambda config: {})
    with pytest.raises(TypeError, match="function"):
        configurable(from_config={"a": 1})
